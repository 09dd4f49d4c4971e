"""Masks against hand-written backward passes and whole optimizer steps; labels against the files;
methods against what they must not touch."""
import dataclasses
import gzip
import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as judges
import recontext
import route
import train
import undo
import unlearn
from data import BadInput
from data import digits as handwritten
from data.tokenizer import END
from engine.streams import seed_of
from experiments import digits, gridworld, steer
from model import GPT, GPTConfig, read_model
from route import Config, Frozen, ablate, calibrated_losses, forget_part, silence
from train import fit

ROOT = Path(__file__).parent.parent
SMALL = dict(n_layer=2, n_head=4, n_embd=32)
CFG = Config(device="cpu", compile=False, steps=6, batch_size=8, lr=1e-2, muon_lr=0.0, seed=3,
             forget_units=16, expand=16, forget_embedding=True, off_heads=1.0, **SMALL)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The language task, small."""
    return data.load("language", folder=tmp_path_factory.mktemp("data"), stories=200, block_size=32)


def lively(task, more_units=0, seed=0):
    """A model all of whose weights are random."""
    model = train.new_model(CFG, task, "route", more_units)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5
    return model


def gradients(model, loss):
    return dict(zip((n for n, _ in model.named_parameters()),
                    torch.autograd.grad(loss, list(model.parameters()))))


# --- masks ---------------------------------------------------------------------------------------
def test_route_leaves_values_alone():
    h = torch.randn(50, 7) * 10.0 ** torch.arange(-3, 4)
    for m in (1.0, 0.0, -0.75, 0.3, torch.rand(50, 1)):
        assert torch.equal(route.route(h, m), h)
        low = h.bfloat16()
        assert torch.equal(route.route(low, torch.as_tensor(m).bfloat16()), low)


def test_route_against_a_backward_pass_by_hand():
    """y = W2 relu(W1 x), squared error; the hidden layer masked by example and unit."""
    generator = torch.Generator().manual_seed(0)
    x, t = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    W1, W2 = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
              for s in ((4, 5), (3, 4)))
    m = torch.tensor([[1, 0, -0.75, 0.5]], dtype=torch.float64).repeat(6, 1)
    m[3:] = torch.tensor([0.25, -2, 1, 0], dtype=torch.float64)
    loss = (route.route((x @ W1.T).relu(), m) @ W2.T - t).square().sum()
    got1, got2 = torch.autograd.grad(loss, (W1, W2))
    by_hand1, by_hand2 = np.zeros((4, 5)), np.zeros((3, 4))
    for n in range(6):
        before = W1.detach().numpy() @ x[n].numpy()
        h = np.maximum(before, 0)
        error = 2 * (W2.detach().numpy() @ h - t[n].numpy())
        by_hand2 += np.outer(error, h)                       # what comes after is not masked
        back = (W2.detach().numpy().T @ error) * m[n].numpy() * (before > 0)
        by_hand1 += np.outer(back, x[n].numpy())
    np.testing.assert_allclose(got1.numpy(), by_hand1, rtol=1e-12)
    np.testing.assert_allclose(got2.numpy(), by_hand2, rtol=1e-12)


def test_forget_part_and_ablation(stories):
    model = lively(stories)
    before = {n: p.clone() for n, p in model.named_parameters()}
    idx, _ = stories.batch("forget", 4, 0, 0)
    quiet = silence((torch.arange(4) < 3)[:, None], torch.arange(128) < 112)
    silenced = model(idx, hook=quiet)
    assert (silenced - model(idx)).abs().max() > 0.1
    ablate(model, 1, 16)
    torch.testing.assert_close(model(idx), silenced, atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        zero = torch.zeros_like(p, dtype=torch.bool)
        if name.endswith("qkv.weight"):
            for third in range(3):                           # q, k and v, 8 rows a head
                zero[32 * third + 24:32 * third + 32] = True
        elif name.endswith("proj.weight"):
            zero[:, 24:] = True
        elif name.endswith("up.weight"):
            zero[112:] = True
        elif name.endswith("down.weight"):
            zero[:, 112:] = True
        assert torch.equal(p, before[name].masked_fill(zero, 0)), name
    untouched = lively(stories)
    ablate(untouched, 0, 0)
    assert all(torch.equal(p, before[n]) for n, p in untouched.named_parameters())


def decaying(optimizers):
    """train.optimizers, but everything decays."""
    def made(*given):
        found, leaves = optimizers(*given)
        for optimizer in found:
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.1
        return found, leaves

    return made


@pytest.mark.parametrize("muon_lr, embedding", [(0.0, True), (0.02, False)])
def test_sgtm_holds_to_the_bit(stories, monkeypatch, float32, muon_lr, embedding):
    """Through whole steps, momentum and weight decay on: on forget rows no parameter of the blocks
    moves but the forget part, on labelled retain rows none of the forget part, else all. The
    embedding moves on all rows, or on all but forget rows."""
    monkeypatch.setattr(train, "optimizers", decaying(train.optimizers))
    task, model, frozen = stories.labelled(0.7, 0.1, 0.5), lively(stories), Frozen()
    cfg = dataclasses.replace(CFG, forget_embedding=embedding)
    loss_fn = route.sgtm(model, task, cfg, frozen)
    marked = lively(stories)
    for p in marked.parameters():
        p.data.zero_()
    for w in forget_part(marked, 1, 16):
        w.data.fill_(1)
    own = {n: p > 0 for n, p in marked.named_parameters()}
    kinds, batch, seen = [], task.batch, []
    task.batch = lambda kind, *rest: (kinds.append(kind), batch(kind, *rest))[1]
    now = {}

    def before_step(model, step):
        now.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return loss_fn(model, step)

    def after_step():
        frozen.after_step()
        for name, p in model.blocks.named_parameters(prefix="blocks"):
            same, mine = p.detach() == now[name], own[name]
            if kinds[-1] == "forget":
                assert same[~mine].all() and not same[mine].all(), name
            elif kinds[-1] == "sure":
                assert same[mine].all() and not same[~mine].all(), name
            else:
                assert not same[mine].all() and not same[~mine].all(), name
        moved = not torch.equal(model.wte.weight, now["wte.weight"])
        assert moved == (embedding or kinds[-1] != "forget")
        seen.append(kinds[-1])

    fit(model, before_step, CFG, 24, 0.01, muon_lr, after_backward=frozen.after_backward,
        after_step=after_step, pieces=frozen.pieces)
    assert {kind: seen.count(kind) > 2 for kind in ("forget", "sure", "unlabelled")} == {
        "forget": True, "sure": True, "unlabelled": True}
    assert set(seen[1:seen.index("sure")]) != set() or seen[0] == "sure"


def test_silenced_rows_give_the_forget_part_no_gradient(stories, float32):
    """Even before anything is held: labelled retain rows do not pass through it."""
    model = lively(stories)
    quiet = silence((torch.arange(4) < 3)[:, None], torch.arange(128) < 112)
    model(*stories.batch("retain", 4, 0, 0), hook=quiet).backward()
    marked = lively(stories)
    for p in marked.parameters():
        p.data.zero_()
    for w in forget_part(marked, 1, 16):
        w.data.fill_(1)
    for p, mark in zip(model.blocks.parameters(), marked.blocks.parameters()):
        assert (p.grad[mark > 0] == 0).all() and (p.grad[mark == 0] != 0).any()


def test_unlabelled_rows_are_plain_training(stories, float32):
    """sgtm's unlabelled steps and an era without labelled tokens, to the last bit."""
    model, frozen = lively(stories), Frozen()
    task = stories.labelled(0.5, 0.0, 0.25)
    task.pieces |= {"forget": [], "sure": []}
    loss_fn = route.sgtm(model, task, CFG, frozen)
    plain = model(*task.batch("unlabelled", 8, 0, route.batch_seed(CFG)))
    expected, got = gradients(model, plain), gradients(model, loss_fn(model, 0))
    assert frozen.masks == [] and all(torch.equal(got[n], expected[n]) for n in expected)

    wide = lively(stories, 16)
    cfg = dataclasses.replace(CFG, off_target=1.0, l1=0.0)    # every token has weight 1 everywhere
    loss_fn = route.era(wide, task := stories.labelled(0.5), cfg, frozen)
    idx, targets, _ = route.mixed_batch(task, cfg, 0)
    expected, got = gradients(wide, wide(idx, targets)), gradients(wide, loss_fn(wide, 0))
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_era_weights(stories, float32):
    """The down projection of original units, in the last block, gets the forget rows' gradient
    as ever; the up projection gets it times each token's weight: by a loop over tokens."""
    cfg, task = dataclasses.replace(CFG, l1=0.0, n_layer=1), stories.labelled(1.0, 0.1)
    model = GPT(GPTConfig(task.vocab_size, 32, 1, 4, 32, 144))
    model.load_state_dict({k: v for k, v in lively(stories, 16).state_dict().items()
                           if not k.startswith("blocks.1")})
    counts = {s: task.counts(s).double().numpy() + 1 for s in ("forget", "retain")}
    r = counts["forget"] / counts["forget"].sum() / (counts["retain"] / counts["retain"].sum())
    w = 1 - 1 / (1 + np.exp(-(r - 1 / r - 4)))
    weight = w + (1 - w) * cfg.off_target
    idx, targets, forget = route.mixed_batch(task, cfg, 5)
    assert forget.shape == (len(idx), 1) and forget.any() and not forget.all()
    got = gradients(model, route.era(model, task, cfg, Frozen())(model, 5))
    up = model.blocks[0].mlp.up.weight
    total = torch.zeros_like(up)
    seen = {}

    def hook(site, i, h):
        if site == "units":
            seen["h"] = h
        return h

    loss = model(idx, targets, hook=hook)
    back, = torch.autograd.grad(loss, seen["h"], retain_graph=True)
    for row in range(len(idx)):
        for at in range(idx.size(1)):
            m = float(weight[targets[row, at]]) if forget[row] else 1.0
            back[row, at, :128] *= m
    total, = torch.autograd.grad(seen["h"], up, back, retain_graph=True)
    torch.testing.assert_close(got["blocks.0.mlp.up.weight"], total, atol=1e-6, rtol=1e-4)
    plain = gradients(model, loss)["blocks.0.mlp.down.weight"]
    torch.testing.assert_close(got["blocks.0.mlp.down.weight"], plain, atol=1e-6, rtol=1e-4)
    assert weight.min() < -0.7 and weight.max() > 0.9       # both kinds of token are there


@pytest.mark.parametrize("off", [0.0, -1.0])
def test_era_on_attention_heads(off, stories, float32):
    """What heads computed from is told of each forget token's loss by its weight; by a loop."""
    task = stories.labelled(1.0)
    cfg = dataclasses.replace(CFG, l1=0.0, off_target=1.0, off_heads=off)
    model, seen = lively(stories, 16), {}
    counts = {s: task.counts(s).double().numpy() + 1 for s in ("forget", "retain")}
    r = counts["forget"] / counts["forget"].sum() / (counts["retain"] / counts["retain"].sum())
    weight = 1 - (1 - off) / (1 + np.exp(-np.maximum(r - 1 / r - 4, -500)))
    idx, targets, forget = route.mixed_batch(task, cfg, 5)
    got = gradients(model, route.era(model, task, cfg, Frozen())(model, 5))

    def hook(site, i, h):
        if (site, i) == ("heads", 1):
            seen["h"] = h
        return h

    back, = torch.autograd.grad(model(idx, targets, hook=hook), seen["h"], retain_graph=True)
    for row in range(len(idx)):
        for at in range(idx.size(1)):
            back[row, at] *= float(weight[targets[row, at]]) if forget[row] else 1.0
    qkv = model.blocks[1].attn.qkv.weight
    expected, = torch.autograd.grad(seen["h"], qkv, back)
    torch.testing.assert_close(got["blocks.1.attn.qkv.weight"], expected, atol=1e-6, rtol=1e-4)


def test_era_leaves_the_embeddings_of_forget_tokens_alone(stories, float32):
    """Where it must, through whole steps; all others move, and so does all without this."""
    counts = {s: stories.counts(s).double() + 1 for s in ("forget", "retain")}
    for still in (True, False):
        cfg, frozen = dataclasses.replace(CFG, forget_embedding=not still), Frozen()
        model = lively(stories, 16)
        before = model.wte.weight.detach().clone()
        fit(model, route.era(model, stories, cfg, frozen), cfg, 3, 1e-2, 0.02,
            after_backward=frozen.after_backward, after_step=frozen.after_step)
        moved = (model.wte.weight != before).any(1)[:stories.vocab_size]
        for token in range(stories.vocab_size):
            share = [counts[s][token] / counts[s].sum() for s in ("forget", "retain")]
            r = (share[0] / share[1]).item()
            typical = r - 1 / r > 4                            # w = 1 - sigmoid(..) < 1/2
            assert moved[token] == (not (still and typical)), token


def test_demix(stories, float32):
    """Each row trains its own expert; without the other, the retain expert is left."""
    model, task = lively(stories, 128), stories.labelled(1.0)
    of = route.experts(model, "cpu")
    idx, _ = stories.batch("retain", 4, 0, 0)
    retain_only = model(idx, hook=silence(units=of["retain"]))
    ablate(model, 0, 128)
    torch.testing.assert_close(model(idx), retain_only, atol=1e-5, rtol=1e-5)
    model = lively(stories, 128)
    for split, quiet in (("forget", slice(0, 128)), ("retain", slice(128, 256))):
        task.batch = lambda kind, size, *rest: stories.batch(split, size, *rest)
        forget = torch.full((8, 1), split == "forget")
        mixed = route.mixed_batch
        route.mixed_batch = lambda task, cfg, step: (*task.batch("", 8, 0, 0), forget)
        try:
            got = gradients(model, route.demix(model, task, CFG, Frozen())(model, 0))
        finally:
            route.mixed_batch = mixed
        for i in range(2):
            assert (got[f"blocks.{i}.mlp.up.weight"][quiet] == 0).all()
            assert (got[f"blocks.{i}.mlp.down.weight"][:, quiet] == 0).all()
        assert (got["blocks.0.mlp.up.weight"] != 0).any()


# --- labels --------------------------------------------------------------------------------------
def begins(task, domain, rows, part):
    """The places in a part of a domain's data where each row (T,) may begin, as shares of all."""
    file = f"{domain}_{'train' if part == 'train' else 'val'}"
    tokens, starts = np.array(task.tokens(file)), task.starts[file][slice(*task.range[file, part])]
    places = {}
    for i, s in enumerate(starts):
        places.setdefault(tuple(tokens[s:s + 32].tolist()), []).append(i / len(starts))
    return [places.get(tuple(row), []) for row in rows.tolist()]


@pytest.mark.parametrize("part", ["train", "val"])
def test_labels_are_stretches_of_the_files(stories, part):
    """Of what training learns from, and of what it looks at to decide something."""
    task = stories.labelled(0.6, 0.1, 0.3)
    expected = {"forget": {"forget": (0, 0.6), "retain": (0, 0.1)},
                "retain": {"forget": (0.6, 1), "retain": (0.1, 1)},
                "sure": {"retain": (0.7, 1)},
                "unlabelled": {"forget": (0.6, 1), "retain": (0.1, 0.7)}}
    for split, stretches in expected.items():
        batches = [task.batch(split, 64, step, 0, part)[0] for step in range(12)]
        found = {d: [[b for b in begins(stories, d, rows, part) if b] for rows in batches]
                 for d in ("forget", "retain")}
        sizes = {d: [len(places) for places in found[d]] for d in found}
        found = {d: sum(found[d], []) for d in found}
        assert [sum(pair) for pair in zip(*sizes.values())] == [64] * 12
        for domain, places in found.items():
            low, high = stretches.get(domain, (0, 0))
            inside = [[b for b in row if low - 0.005 <= b < high + 0.005] for row in places]
            assert all(inside)
            if inside:                                       # and from all of it
                assert min(map(min, inside)) < low + 0.05 and max(map(max, inside)) > high - 0.05
        share = {d: (b[1] - b[0]) * (stories.forget_share if d == "forget" else
                                     1 - stories.forget_share) for d, b in stretches.items()}
        for domain in share:
            wanted = 64 * share[domain] / sum(share.values())
            assert all(abs(n - wanted) < 1 for n in sizes[domain])
        assert sum(task.shares(split)) == pytest.approx(sum(share.values()))
    same = [torch.equal(task.batch("all", 8, s, 1)[0], stories.batch("all", 8, s, 1)[0])
            for s in range(3)]
    assert all(same) and not torch.equal(task.batch("forget", 8, 0, 1)[0],
                                         stories.batch("forget", 8, 0, 1)[0])
    for split in ("forget", "retain", "all"):                # what is reported goes by the truth
        assert torch.equal(task.batch(split, 8, 0, 1, "test")[0],
                           stories.batch(split, 8, 0, 1, "test")[0])


def test_counts(stories):
    task = stories.labelled(0.5, 0.2)
    for split in ("forget", "retain", "all"):
        by_hand = np.zeros(task.vocab_size, int)
        for domain, low, high in task.pieces[split]:
            tokens = np.array(stories.tokens(f"{domain}_train")).tolist()
            for token in tokens[round(low * len(tokens)):round(high * len(tokens))]:
                by_hand[token] += 1
        assert task.counts(split).tolist() == by_hand.tolist()
    assert torch.equal(task.counts("forget") + task.counts("retain"), stories.counts("all"))


def test_too_few_labels(stories):
    with pytest.raises(BadInput, match="no row of forget_train"):
        stories.labelled(0.001).batch("forget", 4, 0, 0)


# --- judging -------------------------------------------------------------------------------------
def test_calibration_of_a_model_that_knows_nothing(stories):
    """Its best bias is the logarithm of the frequencies, both domains weighing the same, whatever
    it said before."""
    model = GPT(GPTConfig(stories.vocab_size, 32, 1, 2, 16))
    model.wte.weight.data.zero_()
    seen = {d: torch.bincount(
        stories.undivided(d, 64, 0, seed_of("calibrate"), "train")[1].flatten(),
        minlength=stories.vocab_size).double() for d in ("retain", "forget")}
    p = sum(c / c.sum() for c in seen.values()) / 2
    got = calibrated_losses(model, stories, CFG)
    uniform = math.log(stories.vocab_size)
    for domain in seen:
        targets = torch.cat([stories.batch(domain, 32, i, seed_of("held out"), "test")[1].flatten()
                             for i in range(4)])
        known = p[targets] > 0
        expected = -(p[targets[known]].log()).mean().item()
        assert known.float().mean() > 0.99
        assert got[domain] == pytest.approx(expected, abs=0.05)
        assert got[f"{domain}_raw"] == pytest.approx(uniform, abs=1e-4)
    assert got["retain"] < got["forget"]


def test_calibrated_forget_words(tmp_path):
    """Of a model that knows nothing: after calibration it expects a word's tokens as often as they
    come, and no longer one in V. Counted word by word, with its tokens found by their bytes."""
    told = [f"Ann saw {'a tree' if i % 3 == 0 else 'one dog'} by the {w} and ran home." for i in
            range(240) for w in (f"house {i}",)]
    (tmp_path / "s.txt").write_text("".join(f"{story}\n{END}\n" for story in told))
    task = data.load("tinystories", tmp_path, 32, source=str(tmp_path / "s.txt"))
    model = GPT(GPTConfig(task.vocab_size, 32, 1, 2, 16))
    model.wte.weight.data.zero_()
    got = calibrated_losses(model, task, CFG)
    p = sum(torch.bincount(task.undivided(d, 64, 0, seed_of("calibrate"), "train")[1].flatten(),
                           minlength=task.vocab_size) / (64 * 32) for d in ("retain", "forget")) / 2
    losses = []
    for i in range(4):
        idx, targets = task.batch("forget", 32, i, seed_of("held out"), "test")
        for row in torch.cat((idx[:, :1], targets), 1).tolist():
            for at, token in enumerate(row[1:], 1):          # " tree" is one token, or begins one
                before, piece = (task.tokenizer.decode(row[:n]) for n in (at, at + 1))
                if "tree" in task.tokenizer.decode(row) and (
                        len(piece) > len(before) and "tree" in (piece + "e")[len(before):]):
                    losses.append(-p[token].log().item())
    assert task.tokenizer.encode_ordinary(" tree") == [task.tokenizer.encode_single_token(" tree")]
    assert len(losses) > 100
    assert got["forget_words"] == pytest.approx(sum(losses) / len(losses), abs=0.05)
    assert got["forget_words"] < math.log(task.vocab_size) - 0.5


def test_calibration_leaves_a_calibrated_model_alone(stories, float32):
    cfg = dataclasses.replace(CFG, batch_size=16, lr=6e-3)
    model = train.new_model(cfg, stories, "route")
    fit(model, route.base(model, stories, cfg, Frozen()), cfg, 60, 6e-3, 0.02)
    got = calibrated_losses(model, stories, CFG)                  # on held-out rows: to some noise
    assert got["retain"] + got["forget"] < got["retain_raw"] + got["forget_raw"] + 0.02
    for domain in ("retain", "forget"):
        assert got[domain] == pytest.approx(got[f"{domain}_raw"], abs=0.1)


def test_coherence_never_harms(stories, float32):
    model = lively(stories)
    tuned = route.cohere(model, stories.labelled(1.0), CFG, "model")
    before, after = (stories.loss(m, "retain") for m in (model, tuned))
    assert after < before                                    # a random model gains from anything
    alone = dataclasses.replace(CFG, coherence_steps=0)
    same = route.cohere(model, stories.labelled(1.0), alone, "model")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters()))


# --- steering ------------------------------------------------------------------------------------
def test_steered_gradient(stories, float32):
    """With a single token's targets only, what lies below the routed residual learns through one
    dimension alone: the gradient of the loss there is zero in all others."""
    idx, targets = stories.batch("retain", 4, 0, 0)
    model, token = lively(stories), targets[0, 5]
    m = (torch.arange(32) == steer.LANE) | (targets != token)[:, :, None]
    seen = {}

    def hook(site, i, h):
        if site == "residual" and i == 0:
            seen["h"] = h
            return route.route(h, m.float())
        return h

    loss = F.cross_entropy(model(idx, hook=hook).flatten(0, 1), targets.flatten())
    back, = torch.autograd.grad(loss, seen["h"])
    routed = targets == token
    assert (back[routed][:, 1:] == 0).all() and (back[routed][:, 0] != 0).any()
    assert (back[~routed][:, 1:] != 0).any()


# --- the scripts ---------------------------------------------------------------------------------
BRIEF = ["--device=cpu", "--compile=false", "--steps=3", "--batch_size=8"]
TEXT = [*BRIEF, "--n_layer=2", "--n_embd=32", "--n_head=4", "--block_size=32", "--stories=200"]
TINY = {route: [*TEXT, "--forget_units=16", "--expand=16", "--lrs=1e-3", "--attack_steps=1,2",
                "--attack_rows=4", "--attack_seeds=1", "--coherence_steps=1"],
        steer: TEXT, digits: BRIEF, gridworld: BRIEF, judges: []}


def argv(path, module, arguments):
    folder = [f"--data_dir={path}/data"] * (module is not gridworld)
    return [*TINY.get(module, []), *folder, f"--out={path}/out", *arguments]


def script(path, *arguments, module=route):
    """(exit status, stdout, stderr) of a script, run in the checkout."""
    name = ["route.py"] if module is route else ["-m", module.__name__]
    got = subprocess.run([sys.executable, *name, *argv(path, module, arguments)], cwd=ROOT,
                         capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "picture: none, " not in got.stdout.replace("none, pip install", "")
    return got.returncode, got.stdout, got.stderr


def in_process(path, monkeypatch, capsys, *arguments, module=route):
    """The same in this process, without matplotlib."""
    monkeypatch.setattr(sys, "argv", ["script.py", *argv(path, module, arguments)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status = 0
    try:
        train.run(module.main, module.Config, module.__doc__, getattr(module, "MOVED", {}))
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


KEYS = {"method", "label_fraction", "seed", "retain_before", "retain", "retain_finetuned",
        "forget_before", "forget", "forget_raw", "forget_finetuned", "relearned", "retain_raw",
        "rates"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the language story leaves, run for true."""
    path = tmp_path_factory.mktemp("route")
    status, out, err = script(path, "--label_fractions=0.5")
    assert status == 0, err
    return path, out


def test_language(made):
    path, out = made
    saved = json.loads((path / "out/language/route.json").read_text())
    assert saved["config"]["label_fractions"] == [0.5] and saved["config"]["task"] == "language"
    rows = {r["method"]: r for r in saved["rows"]}
    assert list(rows) == list(route.METHODS)
    for row in rows.values():
        assert set(row) == KEYS and set(row["relearned"]) == {"1", "2"}
        assert row["rates"] == {"1": 1e-3, "2": 1e-3}        # the only one that is tried
        assert all(math.isfinite(v) for v in [*row["relearned"].values()]
                   + [row[k] for k in KEYS if k.startswith(("retain", "forget"))])
        assert (row["label_fraction"], row["seed"]) == (0.5, 0)
    for method in ("base", "filtered"):                      # nothing to ablate
        assert rows[method]["forget_before"] == rows[method]["forget"]
    for method in ("era", "sgtm", "demix"):
        assert rows[method]["forget_before"] != rows[method]["forget"]
        left, _ = read_model(path / f"out/language/seed0/route-{method}-50-ablated.pt")
        whole, _ = read_model(path / f"out/language/seed0/route-{method}-50.pt")
        part = route.part_of(method, SimpleNamespace(**saved["config"]))
        for views in zip(forget_part(left, *part), forget_part(whole, *part)):
            assert (views[0] == 0).all() and (views[1] != 0).any() or not views[1].numel()
    assert all(method in out for method in route.METHODS)
    if importlib.util.find_spec("matplotlib"):
        assert (path / "out/language/route.png").read_bytes()[:4] == b"\x89PNG"


def test_language_again(made, monkeypatch, capsys):
    """Its models are reused, and a changed knob is refused by name."""
    path, _ = made
    again = ("--label_fractions=0.5", "--methods=base,sgtm")
    before = json.loads((path / "out/language/route.json").read_text())["rows"]
    status, out, err = in_process(path, monkeypatch, capsys, *again)
    assert status == 0 and "making" not in out
    rows = json.loads((path / "out/language/route.json").read_text())["rows"]
    assert rows == [r for r in before if r["label_fraction"] == 0.5 and r["seed"] == 0
                    and r["method"] in ("base", "sgtm")]
    status, out, err = in_process(path, monkeypatch, capsys, *again, "--forget_units=8")
    assert status == 2 and "forget_units=16" in err and err.count("\n") == 1
    status, out, err = in_process(path, monkeypatch, capsys, *again, "--false_positives=0.2")
    assert status == 2 and "false_positives=0.0" in err and err.count("\n") == 1


def test_fractions(made, monkeypatch, capsys):
    path, _ = made
    status, out, err = in_process(path, monkeypatch, capsys, "--label_fractions=1,0.5",
                                  "--methods=base,filtered")
    assert status == 0, err
    rows = json.loads((path / "out/language/route.json").read_text())["rows"]
    at = {(r["method"], r["label_fraction"]): r for r in rows}
    assert list(at) == [("base", 1), ("filtered", 1), ("base", 0.5), ("filtered", 0.5)]
    assert at["base", 1] == at["base", 0.5] | {"label_fraction": 1}          # looks at no labels
    assert at["filtered", 1]["forget"] != at["filtered", 0.5]["forget"]
    assert out.count("any") == 1


def test_seeds(made, monkeypatch, capsys):
    path, _ = made
    status, out, err = in_process(path, monkeypatch, capsys, "--label_fractions=0.5", "--seeds=2",
                                  "--methods=filtered")
    rows = json.loads((path / "out/language/route.json").read_text())["rows"]
    assert status == 0 and "±" in out and [r["seed"] for r in rows] == [0, 1]
    assert rows[0]["forget"] != rows[1]["forget"]
    assert (path / "out/language/seed1/route-filtered-50.pt").exists()


def test_with_posthoc(made, monkeypatch, capsys):
    """maxent, graddiff, rmu and undo start from the same base and see the same labels."""
    path, _ = made
    for settings in (*(unlearn.SETTINGS[m] for m in ("maxent", "rmu", "graddiff")), undo.SETTINGS):
        monkeypatch.setitem(settings, "language",
                            settings["language"] | {"steps": 2, "batch_size": 8})
    seen = []
    inner = unlearn.unlearn
    monkeypatch.setattr(unlearn, "unlearn", lambda cfg, task, *rest, **more: (
        seen.append((cfg.method, task.pieces["forget"])), inner(cfg, task, *rest, **more))[1])
    status, out, err = in_process(path, monkeypatch, capsys, "--label_fractions=0.5",
                                  "--methods=base", "--with_posthoc=true", "--alphas=0.5")
    assert status == 0, err
    rows = json.loads((path / "out/language/route.json").read_text())["rows"]
    assert [r["method"] for r in rows] == ["base", "maxent", "graddiff", "rmu", "undo-0.5"]
    assert all(set(r) == KEYS and r["label_fraction"] == 0.5 for r in rows)
    assert [m for m, _ in seen] == ["maxent", "graddiff", "rmu", "graddiff"]       # UNDO's teacher
    assert all(pool == [("forget", 0, 0.5), ("retain", 0, 0.0)] for _, pool in seen)
    status, out, err = in_process(path, monkeypatch, capsys, "--label_fractions=0.5",
                                  "--methods=base", "--with_posthoc=true", "--steps=2",
                                  f"--out={path}/other")
    assert status == 0 and "making" in out                   # another base: other students


def test_rows_are_there_after_each_seed(made, monkeypatch, capsys):
    path, _ = made
    rows = json.loads((path / "out/language/route.json").read_text())["rows"]

    def story(cfg, task, views):
        if cfg.seed == 1:
            raise KeyboardInterrupt
        return rows

    monkeypatch.setattr(route, "story", story)
    status, _, _ = in_process(path, monkeypatch, capsys, "--label_fractions=0.5", "--seeds=2",
                              f"--out={path}/stopped")
    assert status != 0
    assert json.loads((path / "stopped/language/route.json").read_text())["rows"] == rows


def test_steer(made):
    path, _ = made
    status, out, err = script(path, "--token= the, Rome", "--n_layer=3", f"--out={path}/steered",
                              module=steer)
    assert status == 0, err
    rows = json.loads((path / "steered/language/steer.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["routed", "control"]
    for row in rows:
        assert {"rank", "neighbours", "prob_down", "prob", "prob_up"} <= set(row)
        assert 1 <= row["rank"] <= 512 and len(row["neighbours"]) == 6
        assert all(0 <= row[k] <= 1 for k in ("prob_down", "prob", "prob_up"))
        assert "sample_down" in row and row["model"] in out


@pytest.mark.parametrize("module, arguments, said", [
    (route, ["--methods=base,sgmt"], "choose from base, filtered, era, sgtm, demix, expanded"),
    (route, ["--label_fractions=1.5"], "between 0.001 and 1"),
    (route, ["--label_fractions=0"], "between 0.001 and 1"),
    (route, ["--false_positives=2"], "between 0 and 0.9"),
    (route, ["--forget_heads=4"], "--forget_heads=4"),
    (route, ["--forget_units=128"], "--forget_units=128"),
    (route, ["--forget_units=0", "--forget_heads=0"], "--forget_heads"),
    (route, ["--retain_labels=0"], "--retain_labels=0.0"),
    (route, ["--task=arithmetic"], "choose from language, tinystories, bilingual"),
    (route, ["--expnd=1"], "did you mean --expand"),
    (route, ["--experiment=digits"], "a script of its own now: python -m experiments.digits"),
    (route, ["--experiment", "steer"], "a script of its own now: python -m experiments.steer"),
    (route, ["--experiment=language"], "unknown knob '--experiment=language'"),
    (judges, ["--what=wrapper"], "a script of its own now: python -m experiments.wrapper"),
    (judges, ["--what=examine"], "a script of its own now: python -m experiments.examine"),
    (recontext, ["--revive"], "a script of its own now: python -m experiments.revive_hack"),
    (judges, ["--what=compiled"], "a script of its own now: python -m experiments.compiled"),
    (digits, ["--task=language"], "unknown knob"), (digits, ["--source=nowhere"], "cannot read"),
    (gridworld, ["--oversight=0"], "between 0.001 and 1"),
    (steer, ["--token=Rome is where it is"], "tokens of this vocabulary"),
    (steer, ["--n_layer=1"], "--n_layer=1"), (steer, ["--token="], "--token"),
    (steer, ["--pushh=1"], "did you mean --push")])
def test_bad_input(made, monkeypatch, capsys, module, arguments, said):
    """One line, exit 2, nothing touched."""
    path, _ = made
    files = {p: p.stat().st_mtime_ns for p in path.rglob("*.pt")}
    status, out, err = in_process(path, monkeypatch, capsys, *arguments, module=module)
    assert status == 2 and said in err and err.count("\n") == 1, err
    assert files == {p: p.stat().st_mtime_ns for p in path.rglob("*.pt")}


def idx_files(folder, n=200):
    """Drawn digits as MNIST's four files."""
    for part, seed in (("train", 0), ("t10k", 1)):
        images, labels = handwritten.drawn(n, seed)
        for kind, items, sizes in (("images-idx3", images, (28, 28)), ("labels-idx1", labels, ())):
            header = struct.pack(f">{2 + len(sizes)}I", 0x801 + len(sizes), n, *sizes)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(
                gzip.compress(header + items.to(torch.uint8).numpy().tobytes()))


def test_digits(tmp_path):
    idx_files(tmp_path)
    status, out, err = script(tmp_path, "--seeds=2", "--width=16", f"--source={tmp_path}",
                              module=digits)
    assert status == 0, err
    saved = json.loads((tmp_path / "out/digits/digits.json").read_text())
    assert [(r["setting"], r["seed"]) for r in saved["rows"]] == [
        (name, seed) for seed in (0, 1) for name in ("routed", "no routing", "only 5-9, L1")]
    for row in saved["rows"]:
        assert {"error_0_4", "error_5_9"} <= set(row) and 0 < row["error_0_4"] < 2
    assert saved["config"]["width"] == 16 and "±" in out


def test_gridworld(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gridworld.PPO, "envs", 32)
    status, out, err = in_process(tmp_path, monkeypatch, capsys, "--oversight=0.1,0.5",
                                  "--width=8", "--seeds=2", module=gridworld)
    assert status == 0, err
    saved = json.loads((tmp_path / "out/gridworld/gridworld.json").read_text())
    at = {(r["method"], r["oversight"], r["seed"]): r for r in saved["rows"]}
    assert set(at) == {(m, p, s) for m in gridworld.OVERSEERS for p in (0.1, 0.5) for s in (0, 1)}
    for row in at.values():
        assert -1 <= row["return"] <= 1 and row["return"] == row["history"][-1]["return"]
        assert row["early"] in [h["return"] for h in row["history"]]
    assert "oracle, stopped early" in out and saved["config"]["oversight"] == [0.1, 0.5]


def test_digits_of_one_kind(tmp_path, monkeypatch, capsys):
    idx_files(tmp_path, 5)
    status, out, err = in_process(tmp_path, monkeypatch, capsys, f"--source={tmp_path}",
                                  module=digits)
    assert status == 2 and "holds out no" in err and err.count("\n") == 1
