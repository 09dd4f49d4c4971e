"""The GPU path, where there is a GPU: `python -m pytest tests/test_cuda.py` takes two or three
minutes on one. What it compares with is the CPU, or the same steps uncompiled.

TEST_DEVICE=cpu runs the same tests on a CPU, to see that they themselves are sound.
"""
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import data
import eval as judges
import recontext
import route
import train
import unlearn
from engine import hardware
from engine.store import Checkpoint
from model import GPT, GPTConfig
from train import fit

DEVICE = torch.device(os.environ.get("TEST_DEVICE", "cuda"))
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(),
                                reason="needs a GPU")
SIZE = dict(n_layer=2, n_head=4, n_embd=64)
CFG = route.Config(device=DEVICE.type, compile=False, batch_size=16, seed=3, forget_units=16,
                   expand=16, off_heads=1.0, **SIZE)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The same stories on the CPU, and on DEVICE (there)."""
    folder = tmp_path_factory.mktemp("data")
    return {name: data.load("language", folder=folder, stories=200, block_size=48, device=device)
            for name, device in (("cpu", "cpu"), ("there", DEVICE.type))}


def lively(task, seed=0, more_units=0):
    """A model all of whose weights are random, the same on every device."""
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 2, 4, 64, 256 + more_units))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5)
    return model.to(task.device)


def computing_in(monkeypatch, dtype):
    """Everything on DEVICE in a dtype."""
    for room in (hardware, train):
        monkeypatch.setattr(room, "hardware", lambda cfg: (DEVICE, dtype, True))


def post_hoc(method):
    def made(task, model):
        cfg = unlearn.Config(method=method, retain_weight=2.0, seed=3, beta=0.1, gamma=1.0,
                             steer=4.0, rho=0.5, mmd=5.0, inner_steps=1)
        reference = lively(task, 1)
        return lambda model, step: unlearn.objective(
            model, task.batch("forget", 8, step, 0), task.batch("retain", 8, step, 0), reference,
            cfg, step)

    return made


def routed(method):
    def made(task, model):
        return route.LOSSES[method](model, task.labelled(0.5, 0.1, 0.5), CFG, route.Frozen())

    return made


def imitating(task, model):
    teacher = lively(task, 1)

    def loss_fn(model, step):
        return unlearn.imitate(model, teacher, task.batch("all", 8, step, 0)[0])

    loss_fn.teacher = teacher
    return loss_fn


def pretraining(task, model):
    return lambda model, step: model(*task.batch("all", 8, step, 0))


def clipped(task, model):
    rows = task.batch("all", 8, 0, 0)[0]

    def loss_fn(model, step):
        new, old = (recontext.of_tokens(recontext.answer_log_probs(model, some, 8), some)
                    for some in (rows, rows.flip(0)))
        advantage = torch.linspace(-1, 1, 8, device=task.device)
        return (recontext.ratio_one(new, advantage) +
                recontext.cross_prompt_clip(new, old.detach(), advantage, 0.2))

    return loss_fn


TECHNIQUES = {"pretraining": pretraining, "imitate": imitating, "recontext": clipped} | {
    name: post_hoc(name) for name in unlearn.NAMES} | {
    name: routed(name) for name in ("era", "sgtm", "demix")}


@pytest.mark.parametrize("name", TECHNIQUES)
def test_losses_and_gradients_are_the_cpus(name, tasks):
    found = []
    for task in tasks.values():
        model = lively(task, more_units=256 if name == "demix" else 16 * (name == "era"))
        loss_fn = TECHNIQUES[name](task, model)
        for step in range(3):                                      # sgtm: steps of several kinds
            loss_fn(model, step).backward()
        found.append([(torch.zeros_like(p) if p.grad is None else p.grad).cpu()
                      for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())


def trained(task, name, cfg, steps=50, evaluate=None, **how):
    """(weights, history) after some steps of a technique."""
    model = lively(task, more_units=16 * (name == "era"))
    loss_fn = TECHNIQUES[name](task, model)
    record = fit(model, loss_fn, cfg, steps, 1e-3, 0.01, evaluate_at=range(0, steps, 7),
                 frozen=[loss_fn.teacher] if hasattr(loss_fn, "teacher") else (),
                 evaluate=lambda: {"score": task.loss(model, "retain", 32)}, **how)
    return [p.detach().cpu() for p in model.parameters()], record["history"]


@pytest.mark.parametrize("name", ["pretraining", "imitate", "era", "sgtm"])
def test_compiled_steps_are_the_eager_ones(name, tasks, monkeypatch):
    """On a GPU: recorded once and replayed (CUDA graphs), with evaluations between."""
    computing_in(monkeypatch, torch.float32)
    task = tasks["there"]
    (eager, before), (compiled, after) = (
        trained(task, name, dataclasses.replace(CFG, compile=compile)) for compile in (False, True))
    for a, b in zip(before, after):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["score"] == pytest.approx(b["score"], rel=2e-3)
    for a, b in zip(eager, compiled):
        assert (a - b).norm() < 0.02 * a.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stacked_attack(dtype, tasks, monkeypatch):
    """All runs of an attack as one Stack, beside one after the other."""
    computing_in(monkeypatch, dtype)
    task, curves = tasks["there"], []
    cfg = judges.Attack(device=DEVICE.type, compile=False, attack="forget", lrs=[0.001, 0.003],
                        attack_rows=8, attack_steps=[5, 20], attack_seeds=2)
    assert DEVICE.type == "cpu" or judges.stackable(lively(task), task, 8, 4)
    for stacked in (False, True):
        monkeypatch.setattr(judges, "stackable", lambda *_, stacked=stacked: stacked)
        curves.append(judges.relearn(lively(task), task, cfg)["curves"])
    for lr in cfg.lrs:
        for step in cfg.attack_steps:
            assert curves[0][lr][step]["forget"] == pytest.approx(
                curves[1][lr][step]["forget"], rel=1e-3 if dtype == torch.float32 else 0.02)


def test_bfloat16(tasks, monkeypatch):
    """Learns as float32 does."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        computing_in(monkeypatch, dtype)
        ends.append(trained(tasks["there"], "pretraining", CFG)[1][-1]["loss"])
    assert ends[1] == pytest.approx(ends[0], rel=0.05)


def test_float16_steps_that_overflow_are_not_taken(tasks, monkeypatch):
    """They count as no steps, and what sgtm holds still is untouched to the bit."""
    computing_in(monkeypatch, torch.float16)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, scale, **how: scaler(
        kind, 2.0**26, **how))
    task = tasks["there"]
    view, model, frozen = task.labelled(0.5, 0.1, 0.5), lively(task), route.Frozen()
    loss_fn, seen = route.sgtm(model, view, CFG, frozen), []

    def watched(model, step):
        loss = loss_fn(model, step)
        seen.append((step, [p.detach()[mask].clone() for p, mask in frozen.masks]))
        return loss

    def after_step():
        frozen.after_step()
        assert all(torch.equal(p[mask], was) for (p, mask), was in zip(frozen.masks, seen[-1][1]))

    record = fit(model, watched, CFG, 12, 1e-3, 0.01, after_backward=frozen.after_backward,
                 after_step=after_step, pieces=frozen.pieces)
    assert record["steps"] == 12 and record["skipped"] > 0
    assert len(seen) == 12 + record["skipped"] and {step for step, _ in seen} == set(range(12))


def test_going_on_gives_the_same_history(tasks, monkeypatch, tmp_path):
    """A run that is stopped and resumed, beside one that is not; compiled."""
    computing_in(monkeypatch, torch.float32)
    task, cfg = tasks["there"], dataclasses.replace(CFG, compile=True, save_every=10)
    whole = trained(task, "pretraining", cfg, 30)
    checkpoint = Checkpoint(tmp_path / "m.resume.pt", {"task": "language"})
    with pytest.raises(ZeroDivisionError):
        trained(task, "pretraining", cfg, 30, checkpoint=checkpoint, stop=lambda at: 0 / (
            at["step"] < 22))
    again = trained(task, "pretraining", cfg, 30, checkpoint=checkpoint)
    assert [h["step"] for h in again[1]] == [h["step"] for h in whole[1]]
    for a, b in zip(whole[1], again[1]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for a, b in zip(whole[0], again[0]):
        assert (a - b).norm() < 1e-3 * a.norm()


def test_compiled_decoding(tasks):
    """Ten shapes, as many tokens each as eager decoding gives."""
    task = tasks["there"]
    model = lively(task)
    for rows in range(1, 11):
        prompts = [[1 + i] * (2 + i % 3) for i in range(rows)]
        a, b = (model.generate(prompts, 8, compiled=compiled) for compiled in (False, True))
        assert torch.equal(a, b)


def test_data_on_the_device_is_the_data(tasks):
    cpu, gpu = tasks["cpu"], tasks["there"]
    assert bool(gpu.resident) == (DEVICE.type == "cuda")
    for split in ("retain", "all", {"forget": 0.3, "retain": 0.7}):
        for a, b in zip(cpu.batch(split, 16, 5, 0), gpu.batch(split, 16, 5, 0)):
            assert torch.equal(a, b.cpu())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CPU's is tested in test_faults.py")
def test_out_of_memory_is_one_line(tmp_path):
    got = subprocess.run([sys.executable, str(ROOT / "train.py"), "--batch_size=100000000",
                          f"--out={tmp_path}", "--n_layer=1"], capture_output=True, text=True)
    lines = [line for line in got.stderr.splitlines() if "%|" not in line and line.strip()]
    assert got.returncode == 2 and "out of memory" in lines[-1], got.stderr[-2000:]
