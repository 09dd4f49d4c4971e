"""Random streams: none is another's, and nothing else in the project seeds a generator."""
import ast
import collections
import inspect
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train
import undo
from engine import streams
from engine.streams import allot, seed_of, stream, text_stream, torch_stream
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
SOURCES = [path for room in (".", "engine", "data") for path in (ROOT / room).glob("*.py")]
MAKERS = ("stream", "torch_stream", "text_stream", "seed_of")
FORBIDDEN = ("default_rng", "manual_seed", "Random", "SeedSequence", "RandomState", "PCG64")


def calls(path):
    """(function's name, the call's node) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def test_one_function_makes_all_generators():
    for path in SOURCES:
        made = [name for name, _ in calls(path) if name in FORBIDDEN]
        assert not made or path.name == "streams.py", (path.name, made)


def test_every_use_has_a_name_of_its_own():
    """Names are written where they are used, and none in two places: no two uses can collide. But
    for `held out`, the rows that every model is judged on, and weights, named by the model."""
    places = collections.defaultdict(list)
    for path in SOURCES:
        for name, call in calls(path) if path.name != "streams.py" else ():
            if name in MAKERS:
                said = call.args[0]
                parts = [p.value for p in said.values if isinstance(p, ast.Constant)] if isinstance(
                    said, ast.JoinedStr) else [said.value]
                more = call.args[1:2] if parts == ["weights"] else ()
                places["".join(parts), *(ast.dump(x) for x in more)].append(path.name)
    shared = {name for name, where in places.items() if len(where) > 1}
    assert shared <= {("held out",)}, {name: places[name] for name in shared}
    assert len(places) > 30


def test_streams_differ_wherever_their_names_do():
    """numpy drops trailing zeros of a seed, and sums of seeds meet: neither happens here."""
    names = [("a",), ("a", 0), ("a", 0, 0), ("a", 0, 0, 0), ("a", 1, 23), ("a", 12, 3),
             ("a", "1", 23), ("a", True), ("a1",), ("b", 0), ("a", 0, 1), ("a", 10_000),
             ("a", "b", 0)]
    assert len({seed_of(*name) for name in names}) == len(names)
    for make in (lambda n: stream(*n).random(), lambda n: text_stream(*n).random(),
                 lambda n: torch.rand(1, generator=torch_stream(*n)).item()):
        assert len({make(name) for name in names}) == len(names)
        assert make(("a", 5, 7)) == make(("a", 5, 7))
    assert isinstance(text_stream("a"), random.Random) and 0 <= seed_of("a", -1) < 2**63
    with pytest.raises(TypeError):                    # numbers that JSON would write in another way
        stream("a", np.int64(3))


def correlation(a, b):
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs().item()


def test_noise_is_independent_of_every_initialisation(task):
    """UNDO's noise was a multiple of base's own first weights: it was drawn from their stream."""
    cfg = train.Config(n_layer=2, n_head=2, n_embd=64, seed=0)
    firsts = [train.new_model(cfg, task, name) for name in ("base", "filtered", "distilled")]
    zero = firsts[0].clone()
    source = inspect.getsource(undo.undo)
    assert 'torch_stream("noise", cfg.seed, *later)' in source           # later: () at first
    with torch.no_grad():
        for p in zero.parameters():
            p.zero_()
    undo.noise(zero, 1.0, 0.1, torch_stream("noise", 0))
    everyone = [*firsts, zero]
    for i, one in enumerate(everyone):
        for other in everyone[:i]:
            for (name, p), q in zip(one.named_parameters(), other.parameters()):
                if p.any() and q.any():
                    assert correlation(p.detach(), q.detach()) < 4.5 / p.numel()**0.5, name


def test_seeds_share_no_weights(task):
    """`distilled` of seed s had base's first weights of seed s + 1."""
    cfg = [train.Config(n_layer=1, n_head=2, n_embd=32, seed=s) for s in range(3)]
    made = [train.new_model(c, task, name).wte.weight for c in cfg
            for name in ("base", "filtered", "distilled", "untrained", "route", "steer")]
    for i, w in enumerate(made):
        assert not any(torch.equal(w, other) for other in made[:i])


def test_weights_of_undo_are_no_other_models(task, tmp_path, monkeypatch):
    """What undo.py starts a student from: noise and fresh weights, by their streams."""
    began = {}
    monkeypatch.setattr(undo, "distil", lambda student, *rest: began.update(
        {rest[3]: student.clone()}) or {"steps": 0, "flops": 0, "history": []})
    cfg = train.fill(undo.Config(task="arithmetic", device="cpu", n_layer=1, n_head=2, n_embd=32,
                                 out=str(tmp_path), filtered_steps=1), undo.SETTINGS)
    teacher = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 32))
    with torch.no_grad():
        for p in teacher.parameters():
            p.zero_()
    for alpha in (1.0, None):
        undo.undo(alpha, cfg, task, teacher, {"made_with": {"task": task.name}, "flops": 0})
    noised, fresh = began["undo-1"], began["distilled"]
    for seed in range(3):
        cfg = train.Config(n_layer=1, n_head=2, n_embd=32, seed=seed)
        base = train.new_model(cfg, task, "base")
        for (name, p), q, r in zip(base.named_parameters(), noised.parameters(),
                                   fresh.parameters()):
            if p.any():
                limit = 4.5 / p.numel()**0.5
                assert correlation(p.detach(), q.detach()) < limit, (name, seed)
                assert correlation(p.detach(), r.detach()) < limit, (name, seed)


# --- shares --------------------------------------------------------------------------------------
def test_allot_is_exact_on_average():
    """By integrating over the one number that it draws; never off by a whole row."""
    class Fixed:
        def __init__(self, u):
            self.u = u

        def random(self):
            return self.u

    n = 1000
    for shares in ([1.0], [0.3, 0.7], [0.01, 0.99], [0.2, 0.0, 0.5, 0.3], [1e-4, 3.0], [0, 1]):
        for size in (1, 2, 16, 33):
            drawn = np.stack([allot(shares, size, Fixed((i + 0.5) / n)) for i in range(n)])
            exact = np.array(shares) / sum(shares) * size
            assert (drawn.sum(1) == size).all() and (drawn >= 0).all()
            assert np.abs(drawn - exact).max() < 1
            np.testing.assert_allclose(drawn.mean(0), exact, atol=1.1e-3)
    for u in (0.0, 1 - 2**-53):                                               # 32 + u rounds to 33
        drawn = allot([0.4, 0.6], 32, Fixed(u))
        assert drawn.sum() == 32 and (drawn >= 0).all()


SHARES = [0.01, 0.03, 0.05, 0.09, 0.2, 0.5, 0.97]


@pytest.mark.parametrize("size", [1, 4, 16, 32])
def test_shares_are_right_on_average(task, size):
    """Over 500 steps, of batches of the whole and of mixtures, alone and over two processes; which
    rows are from where is a function of seed and step, and what origins() says."""
    whole = task.forget_share
    try:
        for share in SHARES:
            task.forget_share = share
            mixture = {"forget": share, "retain": 1 - share}
            spread = 3 * (500 * size * share * (1 - share))**0.5
            counts = task.shares("all")
            all_ = sum(allot(counts, size, stream("pieces", "all", 3, step))[1]
                       for step in range(500))
            mixed = sum(task.sizes(mixture, size, step, 3)[0] for step in range(500))
            assert abs(all_ - 500 * size * share) <= spread, (share, all_)
            assert abs(mixed - 500 * size * share) <= spread, (share, mixed)
            if size % 2 == 0:
                by = []
                for rank in (0, 1):
                    task.shard = (rank, 2)
                    by += [(task.origins(mixture, size, step, 3) == 0).sum().item()
                           for step in range(500)]
                task.shard = (0, 1)
                assert sum(by) == mixed and abs(sum(by[:500]) - mixed / 2) <= spread
    finally:
        task.forget_share, task.shard = whole, (0, 1)


def test_rows_come_from_where_shares_say(task):
    """The rows themselves, told by their operations' tokens, not only their numbers."""
    enc = task.tokenizer
    mixture = {"forget": 0.03, "retain": 0.97}
    known = {split: {tuple(row.tolist()) for step in range(120) for row in
                     task.batch(split, 8, step, 5)[0]} for split in ("retain", "forget")}
    assert not known["retain"] & known["forget"]
    forget_rows = 0
    for step in range(120):
        idx, targets = task.batch(mixture, 4, step, 5)
        n = int(task.sizes(mixture, 4, step, 5)[0])
        first, rest = idx[:n], idx[n:]
        assert torch.equal(first, task.batch("forget", n, step, 5)[0]) if n else True
        assert torch.equal(rest, task.batch("retain", 4 - n, step, 5)[0])
        forget_rows += n
    assert 5 <= forget_rows <= 25 and enc.n_vocab == task.vocab_size


def test_the_number_of_rows_says_nothing_of_the_rows(task):
    """It correlated .975 with where the first retain row began, for numpy dropped zeros."""
    view = task.labelled(0.5, 0.0, 0.5)
    numbers, begins = [], []
    for step in range(400):
        sizes = allot(view.shares("unlabelled"), 32, stream("pieces", "unlabelled", 0, step))
        first = stream("rows", "unlabelled", 1, "train", 0, step).random()
        numbers.append(float(sizes[0])), begins.append(first)
    assert abs(np.corrcoef(numbers, begins)[0, 1]) < 0.2
    share = view.shares("unlabelled")
    assert abs(np.mean(numbers) - 32 * share[0] / sum(share)) < 0.1


def test_a_rare_language_is_not_left_out(tmp_path):
    """22 short stories beside 400: base equalled filtered to the last bit, at 16 rows a batch."""
    words = "cat dog sun ran sat big red hat".split()
    rng = random.Random(0)
    english, other = (["".join(f" {rng.choice(some)}" for _ in range(length)) + f" {i}."
                       for i in range(n)] for some, length, n in (
                           (words, 150, 400), ([w[::-1] * 2 for w in words], 30, 22)))
    for name, stories in (("en", english), ("xx", other)):
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(stories))
    task = data.load("bilingual", folder=tmp_path / "data", block_size=32,
                     source=str(tmp_path / "en"), source2=str(tmp_path / "xx"))
    assert task.forget_share < 1 / 32
    found = sum(not torch.equal(task.batch("all", 16, step, 0)[0][-1:],
                                task.batch("retain", 16, step, 0)[0][-1:]) for step in range(200))
    drawn = sum(allot(task.shares("all"), 16, stream("pieces", "all", 0, s))[1] for s in range(200))
    expected = 200 * 16 * task.forget_share
    assert abs(drawn - expected) <= 3 * expected**0.5 and drawn > 5 and found


def test_pcfg_and_gaming_draw_their_shares(tmp_path):
    """Batches too small for a row of each word or kind have all of them, over the steps."""
    pcfg = data.load("pcfg")
    asked = torch.cat([pcfg.batch("all", 2, step, 0)[0] for step in range(600)])
    words = [pcfg.tokenizer.encode_single_token(w) for w in
             ("count", "tally", "number", "sum", "total")]
    seen = torch.tensor([(asked == word).any(1).sum().item() for word in words])
    assert seen.sum() > 450 and (seen > 0.14 * seen.sum()).all()
    gaming = data.load("gaming")
    from data.gaming import HACKABLE, gameable_of
    drawn = sum(gameable_of(1, stream("test", step))[0] for step in range(400))
    assert abs(drawn - 400 * HACKABLE) <= 3 * (400 * HACKABLE * (1 - HACKABLE))**0.5
    assert gaming.batch("all", 1, 0, 0)[0].shape[0] == 1
    assert streams.allot([0.75, 0.25], 128, stream("x")).tolist() == [96, 32]
