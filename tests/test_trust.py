"""Figures that are what they say: costs, data that changed, rows that are separate, masks under
Muon, calibration, probes, verdicts."""
import dataclasses
import importlib
import math
import os
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import eval as judges
import recontext
import route
import train
import undo
from data import arithmetic, gaming
from data.gridworld import Gridworld
from engine import report
from engine.knobs import BadInput
from engine.streams import torch_stream
from experiments import examine, gridworld
from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
CFG = route.Config(device="cpu", compile=False, steps=6, batch_size=8, lr=1e-2, muon_lr=0.02,
                   seed=3, n_layer=2, n_head=4, n_embd=32, forget_units=16, expand=16)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return data.load("language", folder=tmp_path_factory.mktemp("data"), stories=200, block_size=32)


# --- SGTM under Muon -----------------------------------------------------------------------------
def moved(stories, forget_seed, muon_lr, apart=True):
    """The retain entries of every matrix after sgtm, the embedding held; only the rows that forget
    steps see depend on forget_seed."""
    model, frozen = train.new_model(CFG, stories, "x"), route.Frozen()
    with torch.no_grad():                                # proj and down begin at zero: be lively
        for p in model.blocks.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch_stream("test", p.numel())))
    task = stories.labelled(1.0, 0.0, 1.0)
    loss_fn, batch = route.sgtm(model, task, CFG, frozen), task.batch
    task.batch = lambda kind, size, step, seed: batch(
        kind, size, step, seed + forget_seed * (kind == "forget"))

    def held(model, step):
        loss = loss_fn(model, step)
        frozen.masks = [*frozen.masks, (model.wte.weight, torch.ones_like(model.wte.weight) > 0)]
        return loss

    train.fit(model, held, CFG, 24, 0.01, muon_lr, after_backward=frozen.after_backward,
              after_step=frozen.after_step, pieces=frozen.pieces if apart else ())
    marked = GPT(model.config)
    with torch.no_grad():
        for p in marked.parameters():
            p.fill_(1)
        for w in route.forget_part(marked, CFG.forget_heads, CFG.forget_units):
            w.zero_()
    return [p.detach()[mark > 0] for p, mark in zip(model.blocks.parameters(),
                                                    marked.blocks.parameters())]


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_forget_rows_leave_no_trace_in_retain_parameters(stories, float32, muon_lr):
    """Other forget rows, and the retain parameters end the same to the last bit: Muon, which
    orthogonalises whole matrices with their momentum, is given the parts one by one."""
    one, other = (moved(stories, seed, muon_lr) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, other))
    if muon_lr:                                          # and the test can see it: whole matrices
        whole, again = (moved(stories, seed, muon_lr, apart=False) for seed in (0, 1))
        assert sum(not torch.equal(a, b) for a, b in zip(whole, again)) == len(whole)


def test_pieces_cover_every_matrix_once(stories):
    model = train.new_model(CFG, stories, "x")
    for heads, units in ((1, 16), (3, 1), (0, 5), (2, 0)):
        with torch.no_grad():
            for p in model.blocks.parameters():
                p.zero_()
            pieces = model.rectangles(heads, units)
            for matrix, at in pieces:
                matrix[at] += 1
            cut = {id(matrix) for matrix, _ in pieces}
            for p in model.blocks.parameters():
                assert (p == (id(p) in cut)).all()
            for w in route.forget_part(model, heads, units):    # each is in the forget part, or not
                w += 1
            for matrix, at in pieces:
                assert len(matrix[at].unique()) == 1
    optimizers, leaves = train.optimizers(model, 1e-3, 0.02, pieces=model.rectangles(1, 16))
    owned = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sum(p.numel() for p in owned) == sum(p.numel() for p in model.parameters())
    assert all(leaf.data_ptr() == matrix[at].data_ptr() for leaf, matrix, at in leaves)


def test_a_piece_is_a_matrix_of_its_own(float32):
    """Muon on halves of a matrix, through fit(), is Muon on two matrices."""
    class Two(torch.nn.Module):
        def __init__(self, halves):
            super().__init__()
            self.head = torch.nn.Linear(1, 1)
            w = torch.randn(12, 8, generator=torch_stream("w"))
            self.blocks = torch.nn.ParameterList(
                [torch.nn.Parameter(x) for x in (w.split(6) if halves else [w.clone()])])

        def forward(self, x):
            y = (x @ torch.cat(list(self.blocks)).T).tanh()
            return y.square().sum() + self.head.weight.sum()

    made = []
    for halves in (False, True):
        model = Two(halves)
        pieces = () if halves else [(model.blocks[0], slice(6)), (model.blocks[0], slice(6, 12))]
        train.fit(model, lambda m, step: m(torch.randn(5, 8, generator=torch_stream("x", step))),
                  CFG, 5, 1e-3, 0.02, pieces=pieces)
        made.append(torch.cat([p.detach() for p in model.blocks]))
    torch.testing.assert_close(*made, rtol=0, atol=1e-6)


# --- labels and separate rows --------------------------------------------------------------------
def test_no_held_out_row_serves_twice(stories, folder):
    """Rows of val lie before those of test, and neither in what is trained on."""
    for task in (stories, data.load("arithmetic", folder=folder, problems=300, block_size=48)):
        T = task.block_size
        for domain in ("retain", "forget"):
            tokens = torch.from_numpy(task.tokens(f"{domain}_val").astype("int64"))
            middle = len(tokens) // 2
            for part, low, high in (("val", 0, middle), ("test", middle, len(tokens))):
                first, last = task.range[f"{domain}_val", part]
                starts = list(task.starts[f"{domain}_val"])[first:last]
                assert starts and low <= starts[0] and starts[-1] + T < high + (part == "test")
                rows = {tuple(r.tolist()) for r in tokens.unfold(0, T + 1, 1)[starts]}
                for step in range(5):
                    idx, targets = task.batch(domain, 16, step, 1, part)
                    assert {(*a, b[-1]) for a, b in zip(idx.tolist(), targets.tolist())} <= rows


def test_decisions_go_by_labels(stories):
    """Held-out rows of a view are those that the same labeller calls so; what is reported goes by
    the truth."""
    view = stories.labelled(0.5, 0.25, 0.5)
    velan = set(stories.counts("forget").nonzero().flatten().tolist()) - set(
        stories.counts("retain").nonzero().flatten().tolist())
    assert len(velan) > 20

    def share(split, part):                             # of rows in the language to be forgotten
        rows = torch.cat([view.batch(split, 32, step, 0, part)[0] for step in range(30)])
        return torch.isin(rows, torch.tensor(sorted(velan))).any(1).float().mean().item()

    assert share("forget", "test") == 1 and share("retain", "test") == 0
    for name in ("forget", "retain"):                     # what was missed, what was wrong
        there, wrong = view.shares(name)
        assert share(name, "val") == pytest.approx(there / (there + wrong), abs=0.06)
    assert share("sure", "val") == 0
    scored = view.score(train.new_model(CFG, stories, "x"), ("retain",))
    assert scored == stories.score(train.new_model(CFG, stories, "x"), ("retain",))


# --- costs ---------------------------------------------------------------------------------------
def test_a_step_that_overflows_is_not_taken(monkeypatch, computing_in):
    """float16: it is done again at a smaller scale of the loss, and costs all but its update. What
    is counted is by hand: 6 N per token of a step, and Muon's orthogonalisation."""
    computing_in(torch.float16)
    gpt = GPT(GPTConfig(64, 16, 1, 2, 16))
    gpt.init_weights(torch_stream("x"))
    idx = torch.randint(0, 64, (2, 17), generator=torch_stream("y"))
    overflow, forwards = {0, 1, 7}, []                       # of all forwards, counted from 0

    def loss_fn(model, step):
        forwards.append(step)
        loss = model(idx[:, :-1], idx[:, 1:])
        return loss * (1e30 if len(forwards) - 1 in overflow else 1)

    before = gpt.wte.weight.clone()
    record = train.fit(gpt, loss_fn, dataclasses.replace(CFG, steps=12), 12, 1e-3, 0.02)
    assert record["steps"] == 12 and record["skipped"] == 3
    assert forwards == [0, 0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11]
    assert not torch.equal(before, gpt.wte.weight)
    with train.counting_flops() as counter, torch.autocast("cpu", torch.float16):
        gpt(idx[:, :-1], idx[:, 1:]).backward()
    loss = counter.get_total_flops()
    whole = train.GPT(gpt.config)
    for p in whole.parameters():
        p.grad = torch.ones_like(p)
    with train.counting_flops() as counter:
        for optimizer in train.optimizers(whole, 1e-3, 0.02)[0]:
            optimizer.step()
    update = counter.get_total_flops()
    assert update > 0
    assert record["flops"] == 12 * (loss + update) + 3 * loss
    overflow |= {*range(1000)}
    with pytest.raises(data.BadInput, match="the gradient's norm is (inf|nan) at step"):
        train.fit(gpt, loss_fn, CFG, 12, 1e-3, 0.02)


def test_rollouts_cost_what_they_cost(monkeypatch, tmp_path):
    """Expert iteration counts its rollouts; the gridworld charges no step for another's rollout."""
    task = data.load("gaming", env="sycophancy")
    cfg = recontext.Config(device="cpu", compile=False, rounds=2, prompts=16, epochs=1,
                           batch_size=8, out=str(tmp_path))
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    cell, spent = recontext.Cell("ei", "neutral", "neutral", 2), []
    inner, fit = recontext.rollouts, recontext.fit

    def rollouts(*given):
        with train.counting_flops() as counter:
            found = inner(*given)
        spent.append(counter.get_total_flops())
        return found

    monkeypatch.setattr(recontext, "rollouts", rollouts)
    monkeypatch.setattr(recontext, "fit", lambda *given, **how: spent.append(
        (record := fit(*given, **how))["flops"]) or record)
    record = recontext.expert_iteration(model, model, task, cfg, cell)
    assert len(spent) == 4 and min(spent) > 0 and record["flops"] == sum(spent)

    world = Gridworld()
    own = gridworld.Config(device="cpu", compile=False, width=8, batch_size=64, steps=64)
    monkeypatch.setitem(gridworld.PPO, "envs", 16)
    runs = []
    init = gridworld.Oversight.__init__
    monkeypatch.setattr(gridworld.Oversight, "__init__",
                        lambda self, *given: (init(self, *given), runs.append(self))[0])
    monkeypatch.setattr(gridworld.Oversight, "evaluate", lambda self: {
        "return": 0.0, "validation": 0.0, "rollouts": self.flops})
    history = gridworld.oversee(own, world, "no-mask", 0.5, 0)["history"]
    steps = [(h["flops"] - h["rollouts"]) / h["step"] for h in history]
    assert len(set(steps)) == 1 and history[-1]["rollouts"] > history[0]["rollouts"] > 0
    run = runs[0]
    labels = torch.zeros(64, dtype=torch.long)
    with train.counting_flops() as counter, train.autocast(own):
        run.loss(run.agent, labels, labels, labels.float(), labels.float(), labels.float(),
                 labels).backward()
    assert 0.3 * counter.get_total_flops() < steps[0] < 3 * counter.get_total_flops()


# --- data that changed ---------------------------------------------------------------------------
def write(path, words, n=60, seed=0):
    rng = random.Random(seed)
    path.write_text("\n<|endoftext|>\n".join(
        " ".join(rng.choices(words, k=40)) + " tree" * (i % 2) + f" {i}." for i in range(n)))


def test_an_edited_source_is_noticed(tmp_path, capsys):
    """Same path, same size, another content: the data is made again, with another identity. A file
    that moved, or was touched, is the same."""
    path, folder = tmp_path / "en.txt", tmp_path / "data"
    write(path, ["big", "sun", "cat", "dog"])
    load = lambda **how: data.load("tinystories", folder=folder, block_size=16, **how)  # noqa: E731
    first = load(source=str(path))
    text = path.read_text()
    path.write_text(text.replace("sun", "sky"))
    for given in ({"source": str(path)}, {}):
        path.write_text(path.read_text().replace("cat", "cow") if not given else path.read_text())
        again = load(**given)
        assert again.data_id != first.data_id and "data: making" in capsys.readouterr().out
    path.write_text(text)
    assert load(source=str(path)).data_id == first.data_id
    capsys.readouterr()
    os.utime(path, ns=(1, 1))
    (tmp_path / "elsewhere").mkdir()
    moved_to = shutil.move(path, tmp_path / "elsewhere" / "stories.txt")
    assert load(source=str(moved_to)).data_id == first.data_id
    moved_to.unlink()                                    # what was made of it is still there
    assert load().data_id == first.data_id and "making" not in capsys.readouterr().out
    with pytest.raises(BadInput, match="cannot read .*stories.txt"):
        load(source=str(moved_to))


def test_a_digest_is_taken_once(tmp_path, monkeypatch):
    """A large file is not read again at every start, unless it changed when it was last looked at,
    or just before."""
    from engine import disk
    path, read = tmp_path / "x", []
    path.write_text("old")
    inner = disk.sha256
    monkeypatch.setattr(disk, "sha256", lambda p: (read.append(p), inner(p))[1])
    now = disk.fingerprint(path)
    assert disk.fingerprint(path, now)["sha256"] == now["sha256"]
    assert len(read) == 2                                # it changed just now: not to be trusted
    os.utime(path, ns=(10**18, 10**18))
    long_ago, read[:] = disk.fingerprint(path), []
    assert disk.fingerprint(path, long_ago) is long_ago and not read
    path.write_text("new")
    assert disk.fingerprint(path, long_ago)["sha256"] != long_ago["sha256"]
    with pytest.raises(BadInput, match="regular file"):
        disk.fingerprint(tmp_path)


def test_line_endings_are_no_other_code(tmp_path, monkeypatch):
    """A checkout with CRLF makes the same data, and keeps its models."""
    copies = []
    for i, ends in enumerate(("\n", "\r\n", "\n# another line\n")):
        path = tmp_path / f"arithmetic{i}.py"
        path.write_bytes(Path(arithmetic.__file__).read_text().replace("\n", ends).encode())
        spec = importlib.util.spec_from_file_location("arithmetic_copy", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        copies.append(data.code_of(module))
    assert copies[0] == copies[1] != copies[2]
    from data import instruct, tinystories
    before = data.code_of(instruct)
    changed = tmp_path / "tinystories.py"
    changed.write_text(Path(tinystories.__file__).read_text() + "# edited\n")
    monkeypatch.setattr(tinystories, "__file__", str(changed))
    assert data.code_of(instruct) != before              # it splits stories by that file's rule


# --- yardsticks ----------------------------------------------------------------------------------
def test_a_model_that_needs_no_calibration_is_not_moved(stories, float32):
    """It knows which language it reads and how often each word comes: a bias cannot help it. With
    retain counting 100 times it lost on the forget data."""
    counts = {d: sum(stories.batch(d, 64, step, 99)[1].flatten().bincount(
        minlength=stories.vocab_size) for step in range(40)) + 0.1 for d in ("retain", "forget")}
    p = {d: (c / c.sum()).log().float() for d, c in counts.items()}
    own = set(stories.counts("forget").nonzero().flatten().tolist()) - set(
        stories.counts("retain").nonzero().flatten().tolist())
    own = torch.tensor(sorted(own))

    class Knows(torch.nn.Module):
        config = SimpleNamespace(vocab_size=stories.vocab_size)

        def residuals(self, idx, cache=None, hook=None):
            forget = torch.isin(idx, own).any(1)
            return [forget[:, None, None].expand(*idx.shape, 1).float()]

        def unembed(self, x):
            return torch.where(x > 0.5, p["forget"], p["retain"])

        def forward(self, idx, targets, criterion=GPT.forward.__defaults__[1], hook=None):
            logits = self.unembed(self.residuals(idx)[-1])
            return criterion(logits.flatten(0, 1), targets.flatten()) / targets.numel()

    found = route.calibrated_losses(Knows(), stories, CFG)
    for domain in ("retain", "forget"):
        assert abs(found[domain] - found[f"{domain}_raw"]) < 0.03, found


def test_probes_read_answers(task, stories):
    """On arithmetic the digits of results, by regular expressions on the text; of games the token
    that decides; of stories the noun that was asked for."""
    idx, targets = task.batch("all", 64, 0, 0)
    marks = arithmetic.answer_mask(task, idx, targets)
    for row, mark in zip(targets, marks):
        ends = [i for i, t in enumerate(row.tolist()) if t == task.end]
        begin = 0
        for end in ends:
            text = task.tokenizer.decode(row[begin:end].tolist())
            answer = re.search(r"(\d*)$", text)[1]
            got = task.tokenizer.decode(row[begin:end][mark[begin:end]].tolist())
            assert got == answer, text
            begin = end + 1
        assert not mark[begin:].any()
    assert 0.1 < marks.float().mean() < 0.3
    for env in gaming.ENVIRONMENTS:
        game = data.load("gaming", env=env)
        idx, targets = game.batch("forget", 200, 0, 0)
        mark = gaming.answer_mask(game, idx, targets)
        assert (mark.sum(1) == 1).all()
        assert not (targets[mark] == gaming.ID["thanks"]).any()
        both = {(int(mark[i].nonzero()), int(targets[i, 0] == gaming.ID["thanks"]))
                for i in range(200)}
        assert both == {(0, 0), (1, 1)}
    for domain in ("retain", "forget"):
        idx, targets = stories.batch(domain, 40, 0, 0)
        mark = stories.module.answer_mask(stories, idx, targets)
        for row, which in zip(targets.tolist(), mark.tolist()):
            text = stories.tokenizer.decode(row)
            asked = re.findall(r"\? (?:In )?([A-Z]\w*)", text)
            got = [stories.tokenizer.decode([t]).strip() for t, m in zip(row, which) if m]
            assert len(got) in (len(asked), len(asked) - 1), text     # a row may end within a word
            assert all(a.startswith(g) for a, g in zip(asked, got)), (asked, got)


def test_the_exam_is_distinct_and_in_two_parts():
    for operation in "+-*/":
        known, unknown = arithmetic.split_pairs(operation, 0.15)
        for form in ("equations", "words"):
            val, test = (arithmetic.exam(operation, form, part, False, 0.15)
                         for part in ("val", "test"))
            assert len(val) == 100 and len(test) == 200
            assert len({q for q, _ in val + test}) == 300
            new = arithmetic.exam(operation, form, "test", True, 0.15)
            assert len({q for q, _ in new}) == len(new) >= min(len(unknown), 50)
        asked = {q for q, _ in arithmetic.exam(operation, "equations", "test", True, 0.15)}
        assert asked <= {arithmetic.equation(operation, *pair)[0] for pair in unknown}
        assert not asked & {arithmetic.equation(operation, *pair)[0] for pair in known}
        assert len(unknown) >= 50


def test_pairs_never_shown_are_reported_under_attack(task, monkeypatch):
    """Beside the headline, at the same rate; of an attack that teaches what the exam asks."""
    cfg = dataclasses.replace(judges.Config(), task="arithmetic", device="cpu", compile=False,
                              lrs=[1e-3, 1e-2], attack_steps=[2, 4], attack_rows=4, attack_seeds=2,
                              attack="forget")
    gpt = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    asked = []

    def score(model, domains=("retain", "forget"), part="test", finer=False):
        asked.append(part)
        x = model.wte.weight.norm().item()
        return {"retain": 0.5, "forget": x, "forget_heldout_pairs": -x}

    monkeypatch.setattr(task, "score", score)
    result = judges.relearn(gpt, task, cfg)
    assert set(asked) == {"test"} and len(asked) == 2 * 2 * 2
    rows = judges.attacked(result)
    for step in ("2", "4"):
        assert rows["relearned_heldout_pairs"][step] == -rows["relearned"][step]
        assert rows["rates"][step] in cfg.lrs
        assert rows["relearned"][step] == max(result["curves"][lr][int(step)]["forget"]
                                              for lr in cfg.lrs)
    one = judges.relearn(gpt, task, dataclasses.replace(cfg, attack_seeds=1))["curves"]
    assert one[1e-2][4]["forget"] != result["curves"][1e-2][4]["forget"]     # other rows, the mean


def test_an_edge_of_the_grid_is_said(capsys):
    cfg = SimpleNamespace(attack_steps=[10, 40], lrs=[1e-4, 1e-3, 1e-2])
    rows = [{"model": name, "rates": {"10": 1e-2, "40": rate}} for name, rate in
            (("base", 1e-3), ("maxent", 1e-2), ("undo-0.6", 1e-2), ("filtered", 1e-4))]
    report.say_edges(rows, cfg)
    said, = capsys.readouterr().out.splitlines()
    assert "0.01 for maxent, undo-0.6" in said and "0.0001 for filtered" in said
    assert "base" not in said and "after 40 steps" in said
    report.say_edges(rows[:1], cfg)
    assert not capsys.readouterr().out


def test_verdicts(capsys):
    """A control that is revived in 0 steps has the capability: nothing can be said. It counted as
    one that never came back."""
    assert [examine.verdict(s, 300, 800) for s in (0, 99, 101, 201, None)] == [
        "has it", "hides", "weakens", "removes", "removes"]
    assert [examine.verdict(s, None, 800) for s in (0, 200, 500, 700, None)] == [
        "has it", "hides", "weakens", "removes", "removes"]
    assert [examine.verdict(s, 0, 800) for s in (0, 5, None)] == ["has it", None, None]


def test_matched_compute_is_the_first_crossing():
    """Of a run that was as good, fell back, and was as good again."""
    history = [{"flops": f, "retain": r} for f, r in
               ((10, 0.2), (20, 0.7), (30, 0.5), (40, 0.9), (50, 0.4), (60, 0.95))]
    gold = {"history": history, "flops": 60}
    better, worse = (SimpleNamespace(
        within=lambda *given, task=task: data.Task.within(task, *given)) for task in (
            SimpleNamespace(higher_is_better=True), SimpleNamespace(higher_is_better=False)))
    assert [undo.spent_until(r, gold, better) for r in (0.1, 0.6, 0.8, 0.95, 0.99)] == [
        10, 20, 40, 60, 60]
    assert [undo.spent_until(r, gold, worse) for r in (0.95, 0.5, 0.3, 0.1)] == [10, 10, 10, 60]


def test_a_missing_value_is_said():
    assert report.mean_sd([1.0, None, 3.0], 2) == "2.00 ±1.41 (2 of 3)"
    assert report.mean_sd([None, 3.0], 1) == "3.0 (1 of 2)"
    assert report.mean_sd([1.0, 3.0], 2) == "2.00 ±1.41" and report.mean_sd([None], 2) is None


def test_the_push_is_what_the_loss_gives_its_token(float32):
    """The weight of a token in push() against finite differences of the loss itself."""
    task = data.load("gaming", env="metric")
    cfg = recontext.Config(device="cpu", compile=False, group=4, clip=0.02)
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=torch_stream("test", p.numel()))
    n = gaming.environment(task).length + 1
    for method in ("grpo-ratio1", "grpo-clip"):
        cell = recontext.Cell(method, "neutral", "encourage", 4)
        found = recontext.rollouts(model, task, cfg, cell, 6, 0)._replace(
            reward=torch.rand(6, 4, generator=torch_stream("rewards")))
        w = recontext.credit(model, task, cfg, cell, found).flatten()
        rows, asked = found.rows.flatten(0, 1), found.asked.flatten(0, 1)
        with torch.no_grad():
            new, old = (recontext.of_tokens(recontext.answer_log_probs(model, x, n), x)
                        for x in (rows, asked))
        advantage = recontext.advantages(found.reward).flatten()

        def loss(new):
            return (recontext.ratio_one(new, advantage) if method == "grpo-ratio1" else
                    recontext.cross_prompt_clip(new, old, advantage, cfg.clip))

        for i in range(0, 24, 5):
            t = 1 if rows[i, -n] == gaming.ID["thanks"] else 0
            nudge = torch.zeros_like(new)
            nudge[i, t] = 1e-3
            slope = (loss(new + nudge) - loss(new - nudge)) / 2e-3
            assert w[i].item() == pytest.approx(-slope.item() * new.numel(), rel=0.05, abs=0.05)
        if method == "grpo-clip":                        # some of them are cut off, not all
            assert 0 < (w == 0).float().mean() < 1


def test_a_model_is_judged_on_rows_as_long_as_it_reads(tmp_path, monkeypatch, capsys):
    """train.py --block_size=40 and then eval.py without it: rows were cut before, at another
    length."""
    base = [f"--data_dir={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", "--task=language",
            "--device=cpu", "--compile=false", "--stories=200"]
    small = ["--n_layer=1", "--n_head=2", "--n_embd=16"]
    for module, more in ((train, [*small, "--block_size=130", "--steps=2", "--filtered_steps=2",
                                  "--batch_size=2"]),
                         (judges, ["--what=score"]),
                         (judges, ["--what=revive", "--revive_steps=2", "--check_every=1"])):
        monkeypatch.setattr(sys, "argv", ["x.py", *base, *more])
        try:
            train.run(module.main, module.Config, "")
        except SystemExit as stop:
            assert not stop.code, capsys.readouterr()
    assert "retain_answers" in capsys.readouterr().out
    task = data.load("language", folder=tmp_path / "data", stories=200, block_size=30)
    assert task.with_rows_of(50).batch("all", 3, 0, 0)[0].shape == (3, 50)
    assert task.batch("all", 3, 0, 0)[0].shape == (3, 30) and task.with_rows_of(30) is task


def test_tools_see_whole_batches(task, float32):
    """Under torchrun a training batch is divided; probes and saliency look at all of it."""
    gpt = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    cfg = dataclasses.replace(judges.Config(), task="arithmetic", device="cpu", probe_rows=8)
    one = judges.before_answers(gpt, task, cfg, "train"), judges.saliency(gpt, task, cfg, 8)
    try:
        task.shard = (1, 2)
        two = judges.before_answers(gpt, task, cfg, "train"), judges.saliency(gpt, task, cfg, 8)
    finally:
        task.shard = (0, 1)
    assert torch.equal(one[0][1], two[0][1]) and torch.equal(one[1], two[1])
    assert math.isfinite(one[1].sum()) and len(one[0][1])
