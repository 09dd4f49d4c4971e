"""Knobs, the one training loop, models and data on disk."""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import eval as judges
import train
import undo
import unlearn
from data import SPLITS, BadInput
from engine import store
from engine.knobs import command_line, knob
from engine.store import obtain
from engine.streams import seed_of
from model import GPT, GPTConfig
from train import fit, optimizers, pretrain

CFG = train.Config(device="cpu", compile=False)


def tiny(seed=0, vocab_size=100, block_size=16, n_layer=2, n_embd=32):
    gpt = GPT(GPTConfig(vocab_size, block_size, n_layer, 2, n_embd))
    gpt.init_weights(torch.Generator().manual_seed(seed))
    return gpt


def rows(n=4, T=16, vocab_size=100, seed=0):
    drawn = torch.randint(0, vocab_size, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


def on_rows(model, step):
    return model(*rows())


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- knobs ---------------------------------------------------------------------------------------
@dataclass
class Knobs:
    steps: int = knob(10, "how many steps", 1)
    lr: float = knob(1e-3, "the rate", 0, 1)
    compile: bool | None = knob(None, "whether to compile")
    out: str = knob("out", "where to")
    kind: str = knob("a", "which kind", choices=["a", "b"])
    alphas: list[float] = knob([0.5, 1.0], "some shares", 0, 1)
    counts: list[int] | None = knob(None, "some numbers", 1)
    rate: float | str | None = knob(None, "a rate, or sweep", 0, 1, ["sweep"])


def given(*argv):
    return command_line(Knobs, "A story.", list(argv))


def test_defaults():
    assert given() == Knobs() and given().alphas is not Knobs().alphas
    assert given().compile is None and given().alphas == [0.5, 1.0]


@pytest.mark.parametrize("argument,name,value", [
    ("--lr=1", "lr", 1.0), ("--lr=0", "lr", 0.0), ("--lr=3e-4", "lr", 3e-4),
    ("--steps=3", "steps", 3),
    ("--compile=true", "compile", True), ("--compile=False", "compile", False),
    ("--compile=auto", "compile", None), ("--out=a=b c", "out", "a=b c"), ("--out=5", "out", "5"),
    ("--kind=b", "kind", "b"), ("--alphas=0,1,0.25", "alphas", [0.0, 1.0, 0.25]),
    ("--alphas=1", "alphas", [1.0]), ("--counts=4", "counts", [4]),
    ("--counts=4,2", "counts", [4, 2]),
    ("--counts=auto", "counts", None), ("--rate=sweep", "rate", "sweep"), ("--rate=1", "rate", 1.0),
    ("--rate=auto", "rate", None)])
def test_values(argument, name, value):
    for argv in ([argument], argument.split("=", 1)):                # --lr=1 and --lr 1
        got = getattr(given(*argv), name)
        assert got == value and type(got) is type(value)
        assert [type(v) for v in got] == [type(v) for v in value] if type(value) is list else True
        assert given(*argv) == dataclasses.replace(Knobs(), **{name: value})


@pytest.mark.parametrize("argument,name", [
    ("--steps=1.5", "steps"), ("--steps=1e3", "steps"), ("--steps=", "steps"),
    ("--steps=x", "steps"),
    ("--steps=auto", "steps"), ("--steps=true", "steps"), ("--lr=fast", "lr"), ("--lr=nan", "lr"),
    ("--lr=inf", "lr"), ("--lr=0,1", "lr"), ("--compile=yes", "compile"),
    ("--compile=1", "compile"),
    ("--alphas=0.5,x", "alphas"), ("--alphas=", "alphas"), ("--alphas=0.5,,1", "alphas"),
    ("--counts=1,2.5", "counts"), ("--alphas=nan", "alphas"),                         # ill-typed
    ("--steps=0", "steps"), ("--steps=-1", "steps"), ("--lr=-1", "lr"), ("--lr=1.01", "lr"),
    ("--alphas=0.5,1.5", "alphas"), ("--alphas=-0.1", "alphas"), ("--counts=3,0", "counts"),
    ("--rate=2", "rate"), ("--kind=c", "kind"), ("--kind=A", "kind"), ("--rate=swep", "rate"),
    ("--rate=nan", "rate"), ("--steps", "steps")])
def test_bad_values(argument, name):
    """Ill-typed or out of range: one line with the knob's name."""
    with pytest.raises(BadInput, match=f"--{name}") as error:
        given("--out=x", argument)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argument,meant", [("--step=3", "--steps"), ("--stpes=3", "--steps"),
                                            ("--alpha=0.5", "--alphas"), ("--ou", "--out"),
                                            ("-lr=1", "--lr")])
def test_misspelt(argument, meant):
    with pytest.raises(BadInput, match=rf"did you mean {meant}\?") as error:
        given(argument)
    assert argument.split("=")[0] in str(error.value)


@pytest.mark.parametrize("argument", ["--zzzzzz=1", "stray", "--=3", "7"])
def test_unknown(argument):
    with pytest.raises(BadInput, match="unknown knob"):
        given(argument)


@pytest.mark.parametrize("config", [
    train.Config, undo.Config, judges.Config, Knobs, unlearn.Config])
def test_help_lists_every_knob(config, capsys):
    """Every knob, its reason and its default; the story above."""
    with pytest.raises(SystemExit) as end:
        command_line(config, "A story.", ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert not end.value.code and "A story." in said
    for f in dataclasses.fields(config):
        assert f"--{f.name} " in said
        assert " ".join(f.metadata["why"].split()) in said
    assert "[0.5,1.0]" in said or config is not Knobs


def test_help_stands_in_groups(capsys):
    """A script's own knobs first, then those that it shares; two screens of 40 lines are enough."""
    with pytest.raises(SystemExit):
        command_line(train.Config, train.__doc__, ["--help"])
    shown = capsys.readouterr().out
    titles = [line for line in shown.splitlines() if line.startswith("Knobs")]
    assert titles == ["Knobs of this script:", "Knobs of the task and of the model:",
                      "Knobs of a run, which every script has:",
                      "Knobs of the task arithmetic:"]
    own, task, run, arithmetic = shown.split("Knobs of ")[1:]
    assert "--words" in arithmetic and "--env" not in shown
    assert "--filtered_steps" in own and "--data_dir" in task and "--out" in run
    assert shown.count("\n") <= 80 and shown.count("python train.py") + shown.count("torchrun") == 3


@pytest.mark.parametrize("config", [train.Config, unlearn.Config, undo.Config, judges.Config])
def test_knobs_common_to_all_scripts(config):
    """Spelt the same everywhere, with the same default; every default passes its own check."""
    fields = {f.name: f for f in dataclasses.fields(config)}
    for name in ("seed", "device", "compile", "data_dir", "out"):
        assert getattr(config(), name) == getattr(train.Common(), name)
    assert config().task == "arithmetic"
    for name, f in fields.items():
        default = getattr(config(), name)
        if default is not None and default != "":
            shown = ",".join(map(str, default)) if isinstance(default, list) else str(default)
            assert getattr(command_line(config, "", [f"--{name}={shown}"]), name) == default


# --- the loop ------------------------------------------------------------------------------------
def test_every_parameter_is_optimized_once():
    model = tiny()
    inside = {id(p) for p in model.blocks.parameters()}
    for muon_lr in (0.02, 0.0):
        made, leaves = optimizers(model, 1e-3, muon_lr)
        assert leaves == []
        covered = [id(p) for o in made for group in o.param_groups for p in group["params"]]
        assert sorted(covered) == sorted(id(p) for p in model.parameters())
        kinds = {type(o).__name__: {id(p) for group in o.param_groups for p in group["params"]}
                 for o in made}
        assert kinds.get("Muon", set()) == (inside if muon_lr else set())


def rates(monkeypatch, steps, **knobs):
    """[(step, AdamW's rate, Muon's rate)] as fit sets them."""
    made, seen = [], []
    monkeypatch.setattr(train, "optimizers", lambda *a: (
        made.extend(optimizers(*a)[0]) or made, []))

    def loss_fn(model, step):
        seen.append((step, *(o.param_groups[0]["lr"] for o in made)))
        return on_rows(model, step)

    fit(tiny(), loss_fn, CFG, steps, 0.01, 0.02, **knobs)
    return seen


def test_schedule(monkeypatch, float32):
    """Constant, then a straight line whose next point would be zero."""
    got = rates(monkeypatch, 10, decay=0.5)
    share = [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    assert [s for s, _, _ in got] == list(range(10))
    assert [a for _, a, _ in got] == pytest.approx([0.01 * s for s in share])
    assert [m for _, _, m in got] == pytest.approx([0.02 * s for s in share])


def test_schedule_without_decay(monkeypatch, float32):
    assert rates(monkeypatch, 4) == [(s, 0.01, 0.02) for s in range(4)]


def test_adamw_step_by_hand(float32):
    """Two steps of AdamW as in Kingma and Ba, betas .9 and .95, no weight decay."""
    model = tiny()
    p, m, v = (torch.zeros(()) + x for x in (model.wte.weight.detach().clone().double(), 0, 0))
    grads = []

    def after_backward():
        grads.append(model.wte.weight.grad.double().clone())

    fit(model, on_rows, CFG, 2, 0.01, after_backward=after_backward)
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 0.01 * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.95 ** t)).sqrt() + 1e-8)
    torch.testing.assert_close(model.wte.weight.detach().double(), p, atol=1e-5, rtol=1e-4)


def by_hand(model, B, T):
    """(FLOPs of the matrix products of one forward pass, of which in attention): 2 a multiply-add.

    Attention counts the whole (T, T) square, q k^T and p v.
    """
    V = model.wte.weight.size(0)
    C, layers = model.config.n_embd, model.config.n_layer
    attention = layers * 2 * 2 * B * T * T * C
    return 2 * B * T * (layers * (3 + 1 + 4 + 4) * C * C + V * C) + attention, attention


def newton_schulz(model):
    """FLOPs of Muon's five iterations for every matrix of the blocks, m the shorter side."""
    sides = [sorted(p.shape) for p in model.blocks.parameters()]
    return sum(5 * (2 * m * m * n + 2 * m * m * m + 2 * m * m * n) for m, n in sides)


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_flops(muon_lr):
    """Forward and backward three times the forward; frozen models once; evaluations not at all.

    Backward, attention has four products, or five where the kernel computes q k^T anew.
    """
    model, teacher, (x, y) = tiny(), tiny(1, n_layer=1), rows()
    forward, attention = by_hand(model, *x.shape)

    def with_teacher(model, step):
        with torch.no_grad():
            target = teacher(x)
        return F.mse_loss(model(x), target)

    for loss_fn, more in ((on_rows, 0), (with_teacher, by_hand(teacher, *x.shape)[0])):
        record = fit(tiny(), loss_fn, CFG, 3, 1e-3, muon_lr, evaluate_at={1, 2},
                     evaluate=lambda: {"figure": model(x, y).item()})
        rest = forward - attention
        each = 3 * rest + more + (newton_schulz(model) if muon_lr else 0)
        allowed = [3 * (each + attention + back) for back in (2 * attention, 2.5 * attention)]
        assert record["flops"] in allowed, (record["flops"] / allowed[0], attention / forward)
        assert [h["flops"] for h in record["history"]] == [
            record["flops"] * k // 3 for k in (1, 2, 3)]


def test_overfits_one_batch():
    for muon_lr in (0.0, 0.02):
        model = tiny()
        record = fit(model, on_rows, CFG, 80, 0.02, muon_lr, decay=0.5)
        assert model(*rows()).item() < 0.1
        assert record["history"][-1]["step"] == 80 == record["steps"]


def test_one_seed_one_result():
    """Bit for bit, whatever was drawn before; another seed is another model."""
    def run(seed):
        model = tiny(seed)
        record = fit(model, lambda m, step: m(*rows(seed=step)), CFG, 12, 0.01, 0.02, decay=0.3)
        return weights(model), record["history"]
    first = run(0)
    torch.manual_seed(123)
    torch.rand(7)
    again = run(0)
    assert same(first[0], again[0]) and first[1] == again[1]
    assert not same(first[0], run(1)[0])


def test_history_and_stop():
    """Figures at the steps asked for and at the last; the loss is the mean since the one before."""
    losses, seen = [], []

    def loss_fn(model, step):
        loss = on_rows(model, step)
        losses.append(loss.item())
        return loss

    def evaluate():
        assert not torch.is_grad_enabled()
        return {"figure": len(losses)}

    def stop(at):
        seen.append(at["step"])
        return at["figure"] >= 7

    record = fit(tiny(), loss_fn, CFG, 9, 1e-3, evaluate=evaluate, evaluate_at={2, 5})
    assert [(h["step"], h["figure"]) for h in record["history"]] == [(2, 2), (5, 5), (9, 9)]
    means = [sum(losses[a:b]) / (b - a) for a, b in ((0, 2), (2, 5), (5, 9))]
    assert [h["loss"] for h in record["history"]] == pytest.approx(means, rel=1e-3)
    losses.clear()
    record = fit(tiny(), loss_fn, CFG, 90, 1e-3, evaluate=evaluate, evaluate_at=range(0, 90, 4),
                 stop=stop)
    assert seen == [4, 8] and record["steps"] == 8 == len(losses)
    assert record["history"][-1]["step"] == 8
    assert record["history"][-1]["flops"] == record["flops"] == 2 * record["history"][0]["flops"]


def test_a_bare_run_has_one_entry():
    record = fit(tiny(), on_rows, CFG, 3, 1e-3)
    assert [set(h) for h in record["history"]] == [{"step", "loss", "flops"}]
    assert record["seconds"] > 0 and math.isfinite(record["history"][0]["loss"])
    assert set(record) == {"steps", "skipped", "flops", "seconds", "history"}
    assert (record["steps"], record["skipped"]) == (3, 0)


def test_hooks():
    """Once a step each, in order; a mask on gradients holds a parameter, and so does a restore."""
    model, calls = tiny(), []
    held = model.blocks[0].mlp.up.weight
    restored = model.blocks[1].mlp.up.weight
    before = weights(model)

    def loss_fn(model, step):
        assert all(p.grad is None for p in model.parameters())
        calls.append("loss")
        return on_rows(model, step)

    def after_backward():
        assert all(p.grad is not None for p in model.parameters())
        calls.append("backward")
        held.grad.zero_()

    def after_step():
        calls.append("step")
        with torch.no_grad():
            restored.copy_(before["blocks.1.mlp.up.weight"])

    for muon_lr in (0.0, 0.02):
        calls.clear()
        fit(model, loss_fn, CFG, 3, 0.01, muon_lr, after_backward=after_backward,
            after_step=after_step)
        assert calls == ["loss", "backward", "step"] * 3
    after = weights(model)
    unchanged = {k for k in before if torch.equal(before[k], after[k])}
    assert unchanged == {"blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight"}


def test_a_lost_run_ends_soon():
    """The loss is looked at now and then, though nothing is evaluated before the end."""
    steps = []
    with pytest.raises(BadInput, match="nan at step "):
        fit(tiny(), lambda m, step: steps.append(step) or on_rows(m, step) * (
            math.nan if step == 4 else 1), CFG, 500, 0.01)
    assert len(steps) <= 50


@pytest.mark.parametrize("at", [0, 4, 7])
def test_loss_that_is_not_finite(at, tmp_path, task):
    """The run ends before the next evaluation, and nothing is saved."""
    cfg, evaluated = dataclasses.replace(CFG, out=str(tmp_path)), []
    model = tiny(vocab_size=task.vocab_size)

    def make(checkpoint):
        return model, fit(model, lambda m, step: on_rows(m, step) * (math.nan if step == at else 1),
                          cfg, 8, 0.01, name="fragile", evaluate=lambda: evaluated.append(1) or {})

    with pytest.raises(BadInput, match="fragile.*nan.*lr=0.01"):
        obtain("fragile", cfg, task, {}, make)
    assert not evaluated and not list(tmp_path.rglob("*.*"))


# --- models on disk ------------------------------------------------------------------------------
@pytest.fixture
def shelf(tmp_path, task):
    """(obtain with a counter of how often a model was made, cfg)."""
    cfg, made = dataclasses.replace(CFG, out=str(tmp_path)), []

    def get(made_with={"lr": 0.1, "split": "all"}, task=task, cfg=cfg):
        def make(checkpoint):
            made.append(1)
            model = tiny(len(made), vocab_size=task.vocab_size)
            return model, {"steps": 1, "flops": 5, "seconds": 1.0, "history": [{"step": 1}]}
        return obtain("m", cfg, task, made_with, make)
    return get, made, tmp_path / "arithmetic" / "seed0" / "m.pt"


def test_obtain_makes_once(shelf):
    get, made, path = shelf
    first, record = get()
    assert path.exists() and len(made) == 1
    again, checkpoint = get()
    assert len(made) == 1 and same(weights(first), weights(again))
    assert {k: checkpoint[k] for k in ("made_with", "steps", "flops", "history")} == {
        k: record[k] for k in ("made_with", "steps", "flops", "history")}
    path.unlink()
    get()
    assert len(made) == 2


@pytest.mark.parametrize("made_with,key", [
    ({"lr": 0.2, "split": "all"}, "lr=0.1.*lr=0.2"), ({"lr": 0.1, "split": "retain"}, "split=all"),
    ({"lr": 0.1}, "split=all.*split=None"), ({"lr": 0.1, "split": "all", "k": 1}, "k=None.*k=1")])
def test_obtain_refuses_another_config(made_with, key, shelf):
    get, made, path = shelf
    get()
    with pytest.raises(BadInput, match=key) as error:
        get(made_with)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(made) == 1


def test_obtain_refuses_other_data_and_vocabularies(shelf, tmp_path):
    """The same task, from another text; the same file under another task's name."""
    get, made, path = shelf
    get()
    other = data.load("arithmetic", folder=tmp_path / "other", problems=120)
    with pytest.raises(BadInput, match="m.pt was trained on other data"):
        get(task=other)
    other.name = "language"
    with pytest.raises(BadInput, match="m.pt was trained on arithmetic, not on language"):
        get(task=other)
    assert len(made) == 1


def test_obtain_refuses_a_damaged_file(shelf, task):
    get, made, path = shelf
    get()
    whole = path.read_bytes()
    for bad in (whole[:-1], whole[:1000], b"", whole[:500] + bytes([whole[500] ^ 1]) + whole[501:]):
        path.write_bytes(bad)
        with pytest.raises(BadInput, match="m.pt is damaged"):
            get()
        assert path.read_bytes() == bad and len(made) == 1
    with pytest.raises(BadInput, match="none.pt is missing"):
        store.load(path.parent / "none.pt", task)


def test_identity():
    """Depends on what a model was made with, not on the order in which it is told."""
    assert store.identity({"a": 1, "b": [2.0]}) == store.identity({"b": [2.0], "a": 1})
    assert len({store.identity(m) for m in ({"a": 1}, {"a": 2}, {"b": 1}, {})}) == 4


def test_pretrain(tmp_path, task):
    """base learns from the mix, filtered from retain rows alone, each as long as it is told, and on
    rows drawn for itself; both are functions of the seed; the retain score alone is watched, on
    what is not reported."""
    cfg = dataclasses.replace(CFG, out=str(tmp_path), n_layer=1, n_head=2, n_embd=16, batch_size=8,
                              steps=6, filtered_steps=5)
    asked = []

    class Spy:
        def __getattr__(self, name):
            return getattr(task, name)

        def batch(self, split, size, step, seed, part="train"):
            asked.append((split, size, step, seed))
            return task.batch(split, size, step, seed, part)

        def score(self, model, domains, part):
            assert (domains, part) == (("retain",), "val")
            return task.score(model, domains, part)

    base, record = pretrain("base", cfg, Spy())
    seeds = [seed_of(f"pretrain {name}", 0) for name in ("base", "filtered")]
    assert asked == [("all", 8, step, seeds[0]) for step in range(6)] and record["steps"] == 6
    asked.clear()
    _, gold = pretrain("filtered", cfg, Spy())
    assert asked == [("retain", 8, step, seeds[1]) for step in range(5)] and gold["steps"] == 5
    assert all("retain" in h and "forget" not in h for h in gold["history"])
    elsewhere = dataclasses.replace(cfg, out=str(tmp_path / "elsewhere"))
    assert same(weights(base), weights(pretrain("base", elsewhere, task)[0]))
    other = dataclasses.replace(cfg, out=str(tmp_path / "seed1"), seed=1)
    assert not same(weights(base), weights(pretrain("base", other, task)[0]))


@pytest.mark.parametrize("n_embd,n_head", [(30, 4), (8, 8)])
def test_pretrain_refuses_widths(n_embd, n_head, tmp_path, task):
    cfg = dataclasses.replace(CFG, out=str(tmp_path), n_embd=n_embd, n_head=n_head)
    with pytest.raises(BadInput, match=f"n_embd={n_embd}"):
        pretrain("base", cfg, task)
    assert not list(tmp_path.rglob("*.*"))


# --- data on disk --------------------------------------------------------------------------------
@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the small arithmetic, to damage."""
    shutil.copytree(folder, tmp_path / "d")
    return tmp_path / "d"


def load(folder, **knobs):
    return data.load("arithmetic", folder=folder, **({"problems": 300} | knobs))


@pytest.mark.parametrize("file", [f"{s}.bin" for s in SPLITS] + ["tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "turned", "longer", "missing", "empty"])
def test_damaged_data(file, damage, copy):
    path = copy / "arithmetic" / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-2], "empty": b"", "longer": content + b"\0\0", "turned":
                          content[:99] + bytes([content[99] ^ 1]) + content[100:]}[damage])
    with pytest.raises(BadInput, match=f"{file} is damaged.*delete the folder") as error:
        load(copy)
    assert "\n" not in str(error.value)
    path.write_bytes(content)
    load(copy)                                                       # whole again


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"files": {}}', "\ud800"])
def test_damaged_meta(content, copy):
    path = copy / "arithmetic" / "meta.json"
    meta = json.loads(path.read_text())
    bad = [content.encode("utf-8", "surrogatepass")] if content else [b""] + [
        json.dumps({k: v for k, v in meta.items() if k != key}).encode()
        for key in ("files", "made_with", "facts", "sources")] + [
        json.dumps(meta | {"files": {k: v for k, v in meta["files"].items() if k != gone}}).encode()
        for gone in meta["files"]] + [json.dumps(meta | {"files": meta["files"] | {
            "retain_val.bin": {"bytes": 1}}}).encode()]
    for each in bad:
        path.write_bytes(each)
        with pytest.raises(BadInput, match="meta.json is damaged.*delete the folder"):
            load(copy)


def test_data_is_made_anew_when_it_is_missing_or_other_knobs_are_given(copy, capsys):
    first = load(copy)
    capsys.readouterr()
    load(copy)
    assert "making" not in capsys.readouterr().out
    other = load(copy, words=1.0)
    assert "making" in capsys.readouterr().out and other.data_id != first.data_id
    (copy / "arithmetic" / "meta.json").unlink()                     # as after an interruption
    again = load(copy)
    assert "making" in capsys.readouterr().out and again.data_id == first.data_id
    assert not list(copy.rglob("*.tmp"))


def test_unfinished_data_is_no_data(copy, monkeypatch):
    """An interruption between the first file and the last leaves no meta.json."""
    calls = []

    def write(path, content):
        calls.append(path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, content)

    real = data.write
    monkeypatch.setattr(data, "write", write)
    with pytest.raises(KeyboardInterrupt):
        load(copy, words=1.0)
    assert not (copy / "arithmetic" / "meta.json").exists()
    monkeypatch.setattr(data, "write", real)
    load(copy, words=1.0)


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "f"
    data.write(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(BadInput, match=f"cannot write {path}: disk full"):
        data.write(path, b"new" * 1000)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_rows_cut_out_on_the_device(task):
    """As on a GPU, where data is kept if it fits: the same rows, also where uint16 is negative."""
    expected = [task.batch("all", 8, i, 0) for i in range(3)]
    try:
        task.move_to_device()
        for i, rows in enumerate(expected):
            assert all(torch.equal(a, b) for a, b in zip(task.batch("all", 8, i, 0), rows))
        task.resident = {s: torch.full_like(x, -1) for s, x in task.resident.items()}
        assert task.batch("retain", 8, 0, 0)[0].unique().tolist() == [65535]
    finally:
        task.resident = {}


LARGE = """
import resource, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import torch
import data, train
from model import GPT, GPTConfig
torch.set_num_threads(1)
folder = Path({folder!r})
for split in data.SPLITS:
    with open(folder / f"{{split}}.bin", "wb") as f:
        f.truncate({size})                                  # zeros, which take no place on the disk
task = data.Task("tinystories", folder, {{"made_with": {{}}, "facts": {{}}, "files": {{}}}}, 64)
for step in range(300):
    task.batch("retain", 64, step, 0)
model = GPT(GPTConfig(300, 64, 1, 2, 32))
cfg = train.Config(device="cpu", compile=False)
train.fit(model, lambda m, step: m(*task.batch("all", 64, step, 0)), cfg, 20, 1e-3)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_data_larger_than_memory(tmp_path, folder):
    """Training on 320 MB takes hardly more memory than on 10 MB: pages are let go of again."""
    pytest.importorskip("resource")
    peak = []
    for size in (10 << 20, 320 << 20):
        shutil.copy(folder / "arithmetic" / "tokenizer.json", tmp_path)
        code = LARGE.format(root=str(Path(train.__file__).parent), folder=str(tmp_path), size=size)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peak.append(int(done.stdout))
    assert peak[1] - peak[0] < 100


def test_unknown_task_and_knobs(tmp_path):
    with pytest.raises(BadInput, match="unknown task 'nope'.*arithmetic"):
        data.load("nope", folder=tmp_path)
    with pytest.raises(BadInput, match="--stories means nothing to the task arithmetic"):
        load(tmp_path, stories=5)
    assert load(tmp_path, stories=None).name == "arithmetic"         # None: not given


def test_rows_longer_than_the_data(copy):
    with pytest.raises(BadInput, match="retain_train holds .* tokens, too few for rows of 100000"):
        load(copy, block_size=100_000)
    assert load(copy, block_size=50).batch("all", 3, 0, 0)[0].shape == (3, 50)


def test_a_refused_command_leaves_the_data(tmp_path):
    """Data that would be too short for its rows replaces nothing."""
    (tmp_path / "s.txt").write_text("".join(f"The {w} story {i}. It was told.\n<|endoftext|>\n"
                                            for i in range(400) for w in ("tree", "red", "sun")))
    ask = dict(folder=tmp_path, block_size=32)
    first = data.load("tinystories", source=str(tmp_path / "s.txt"), **ask)
    before = {f.name: f.read_bytes() for f in (tmp_path / "tinystories").iterdir()}
    with pytest.raises(BadInput, match="too few for rows of 900"):
        data.load("tinystories", stories=60, folder=tmp_path, block_size=900)
    assert {f.name: f.read_bytes() for f in (tmp_path / "tinystories").iterdir()} == before
    assert data.load("tinystories", **ask).data_id == first.data_id


# --- tables and rows -----------------------------------------------------------------------------
def test_table(capsys):
    rows = [{"model": "base", "retain": 0.98765, "n": 3}, {"model": "filtered", "retain": None}]
    train.table(rows, {"model": "model", "retain": "kept", "n": "number"})
    assert capsys.readouterr().out.splitlines() == [
        "model     kept  number",
        "--------  ----  ------",
        "base      0.99       3",
        "filtered     -       -"]
    train.table(rows, {"model": "model", "retain": "kept", "n": "number"}, digits=3)
    assert capsys.readouterr().out.splitlines() == [
        "model      kept  number",
        "--------  -----  ------",
        "base      0.988       3",
        "filtered      -       -"]


def test_rows_on_disk(tmp_path, task):
    cfg = dataclasses.replace(CFG, out=str(tmp_path), steps=3)
    train.write_rows("story", cfg, task, [{"model": "base", "retain": 0.5}])
    saved = json.loads((tmp_path / "arithmetic" / "story.json").read_text())
    assert saved["rows"] == [{"model": "base", "retain": 0.5}]
    assert saved["config"] == dataclasses.asdict(cfg) | {
        "block_size": 64, "data": task.data_id, "device": "cpu",
        "precision": str(train.hardware(cfg)[1])[6:]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loop_against_plain_torch(dtype, monkeypatch, computing_in):
    """AdamW written out with torch's own pieces gives the same weights, bit for bit."""
    computing_in(dtype)
    model, plain = tiny(), tiny()
    fit(model, on_rows, CFG, 5, 0.01)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0,
                                  fused=True)
    for step in range(5):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = on_rows(plain, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(weights(model), weights(plain))
