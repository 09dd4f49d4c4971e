"""torch.compile: what is compiled, how often, and Muon's products; with a backend that counts."""
import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_cuda import TECHNIQUES, lively
from torch._dynamo.testing import CompileCounter

import data
import train
import undo
from data import arithmetic
from engine import hardware, optimizers
from engine.hardware import should_compile
from engine.optimizers import Muon, orthogonalised

CFG = train.Config(device="cpu", compile=True)


@pytest.fixture
def counter(monkeypatch):
    """A backend that counts the graphs it is given, and runs them as they are."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def compile_in_place(model, mode=None):
        hardware.make_room()
        model.compile(dynamic=False, backend=counter)

    monkeypatch.setattr(train, "compile_in_place", compile_in_place)
    yield counter
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return data.load("language", folder=tmp_path_factory.mktemp("data"), stories=200,
                     block_size=48)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_nothing_is_compiled_after_a_few_steps(name, stories, counter, float32):
    """Each technique's graphs are compiled in its first compiled steps (sgtm has three kinds of
    steps), whole, and then never again; evaluations between compile nothing."""
    model = lively(stories, more_units=256 if name == "demix" else 16 * (name == "era"))
    loss_fn, seen = TECHNIQUES[name](stories, model), []
    train.fit(model, loss_fn, CFG, 16, 1e-3, 0.01, after_step=lambda: seen.append(
        counter.frame_count), frozen=[loss_fn.teacher] if hasattr(loss_fn, "teacher") else (),
        evaluate=lambda: {"score": stories.loss(model, "retain", 32)}, evaluate_at=range(16))
    assert seen[0] == 0                                              # the first step is counted
    assert 1 <= seen[-1] <= 4 and seen[3 if name != "sgtm" else 9] == seen[-1]
    assert model._compiled_call_impl is None


def test_a_story_compiles_a_dozen_graphs_and_another_seed_none(tmp_path, counter, monkeypatch,
                                                              float32):
    exam = arithmetic.exam
    monkeypatch.setattr(arithmetic, "exam", lambda *asked: exam(*asked)[:4])
    cfg = undo.resolved(undo.Config(
        device="cpu", compile=True, n_layer=1, n_embd=32, n_head=2, base_steps=3, filtered_steps=3,
        unlearn_steps=3, steps=3, alphas=[0.5], lrs=[1e-3], attack_steps=[3], attack_seeds=1,
        check_every=2, out=str(tmp_path)))
    task = data.load("arithmetic", folder=tmp_path / "data", problems=300)
    *_, rows = undo.story(cfg, task)
    first = counter.frame_count
    assert len(rows) == 6 and 4 <= first <= 12
    *_, rows = undo.story(dataclasses.replace(cfg, seed=1), task)
    assert counter.frame_count == first


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_kernels_add_in_a_fixed_order(stories):
    """Two threads would add an embedding's gradients in the order in which they come. The generated
    code has no atomic addition."""
    from torch._inductor.utils import run_and_get_code
    torch._dynamo.reset()
    model = lively(stories)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        hardware.compile_in_place(model)
        _, code = run_and_get_code(lambda: model(*stories.batch("all", 4, 0, 0)).backward())
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch._dynamo.reset()
    assert len(code) == 2 and "index_put" in code[1] and not any("atomic_add" in c for c in code)


def test_when_compiling_pays(monkeypatch):
    """By all steps of a kind that a script takes; a knob decides otherwise."""
    monkeypatch.setattr(hardware.shutil, "which", lambda name: "there")
    auto = dataclasses.replace(CFG, compile=None)
    assert should_compile(auto, 10, 6e12) and not should_compile(auto, 10**6, 4e12)
    monkeypatch.setattr(hardware, "hardware", lambda cfg: (torch.device("cuda"), None, True))
    assert should_compile(auto, 3000, 1.0) and not should_compile(auto, 1000, 1e15)
    for compile in (False, True):
        assert should_compile(dataclasses.replace(CFG, compile=compile), 1, 1.0) == compile


@pytest.mark.parametrize("faster", [False, True])
def test_precision_on_a_cpu(monkeypatch, faster):
    """Whichever multiplies faster, which is tried; in Muon, too."""
    clock, ones = [0.0], torch.ones

    class Slow(torch.Tensor):
        def __matmul__(self, other):
            clock[0] += 2 if self.dtype == torch.float32 else 1 if faster else 3

    monkeypatch.setattr(hardware.torch, "ones", lambda *n, dtype: Slow(ones(*n, dtype=dtype)))
    monkeypatch.setattr(hardware, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    hardware.multiplies_bf16.cache_clear()
    wanted = torch.bfloat16 if faster else torch.float32
    assert hardware.hardware(CFG) == (torch.device("cpu"), wanted, True)
    hardware.multiplies_bf16.cache_clear()


# --- Muon ----------------------------------------------------------------------------------------
def test_orthogonalised_by_singular_values(monkeypatch):
    """The singular vectors stay, the values come near 1."""
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: False)
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(3, 8, 20, generator=generator)
    usual, = torch.optim.Muon([torch.nn.Parameter(X[0])]).param_groups
    for x, got in zip(X, orthogonalised(X, usual["ns_coefficients"], usual["ns_steps"],
                                        usual["eps"])):
        U, _, Vh = torch.linalg.svd(x, full_matrices=False)
        values = U.T @ got @ Vh.T
        assert (values - values.diag().diag()).abs().max() < 1e-4
        assert values.diag().min() > 0.5 and values.diag().max() < 1.3


def test_muon_is_torchs():
    """Which computes in bfloat16, one matrix after the other: five steps of both, tall matrices and
    wide ones, of equal shapes and others; their states are the same, too."""
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8), (5, 7), (8, 8)]
    generator = torch.Generator().manual_seed(0)
    begin = [torch.randn(shape, generator=generator) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(5)]
    ends, states = [], []
    for kind in (Muon, torch.optim.Muon):
        matrices = [torch.nn.Parameter(x.clone()) for x in begin]
        optimizer = kind(matrices, lr=0.1, momentum=0.9, weight_decay=0.01)
        for step in grads:
            for p, grad in zip(matrices, step):
                p.grad = grad.clone()
            optimizer.step()
        ends.append(matrices)
        states.append(optimizer.state_dict()["state"])
    for a, b, start in zip(*ends, begin):
        assert (a - b).norm() < 0.05 * (b - start).norm()
    for i, state in states[0].items():
        assert set(state) == set(states[1][i])
        torch.testing.assert_close(state["momentum_buffer"], states[1][i]["momentum_buffer"])
