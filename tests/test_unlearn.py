"""Losses by closed form and finite differences, UNDO's noise by its formula, scripted attacks."""
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import eval as judges
import undo
import unlearn
from data import BadInput, Task
from engine.streams import seed_of, torch_stream
from eval import relearn, robustness
from model import GPT, GPTConfig, Stack
from train import fit
from unlearn import kl


class Judged(SimpleNamespace):
    """A task that compares scores as tasks do."""
    knows_more, within = Task.knows_more, Task.within


V, T = 30, 12
CFG = unlearn.Config(device="cpu", compile=False, retain_weight=1.0, steer=4.0)


def lively(seed=0, vocab_size=V, n_layer=2, block_size=T):
    """A model all of whose weights are random."""
    gpt = GPT(GPTConfig(vocab_size, block_size, n_layer, 2, 16))
    generator = torch.Generator().manual_seed(seed)
    for p in gpt.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5
    return gpt


def rows(seed, n=3):
    drawn = torch.randint(0, V, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    return drawn[:, :-1], drawn[:, 1:]


FORGET, RETAIN = rows(1), rows(2)


def whole(method, model, forget, retain, reference, cfg, step=0, **knobs):
    """A method's loss with its retain term."""
    return unlearn.objective(model, forget, retain, reference,
                             dataclasses.replace(cfg, method=method, **knobs), step)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(
        loss, list(model.parameters()), allow_unused=True, materialize_grads=True)])


# --- losses --------------------------------------------------------------------------------------
def logits(seed, shape=(10, 7)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def kl_in_loops(p_logits, q_logits):
    """Sum over rows and the vocabulary of p log(p / q)."""
    total = 0.0
    for p_row, q_row in zip(p_logits.double(), q_logits.double()):
        p, q = (x.exp() / x.exp().sum() for x in (p_row, q_row))
        total += sum(pi * math.log(pi / qi) for pi, qi in zip(p.tolist(), q.tolist()))
    return total


def kl_a_token(p_logits, q_logits):
    """Its mean over tokens, for logits (B, T, V)."""
    return kl_in_loops(p_logits.flatten(0, 1), q_logits.flatten(0, 1)) / p_logits[..., 0].numel()


def test_kl():
    teacher, student = logits(0), logits(1)
    assert kl(teacher, student).item() == pytest.approx(kl_in_loops(teacher, student), rel=1e-5)
    assert kl(student, teacher).item() == pytest.approx(kl_in_loops(student, teacher), rel=1e-5)
    assert kl(teacher, student).item() != pytest.approx(kl(student, teacher).item(), rel=0.01)
    assert kl(teacher, teacher).item() == pytest.approx(0, abs=1e-6)
    assert kl(teacher, teacher + 3).item() == pytest.approx(0, abs=1e-6)       # the same softmax
    model = lively()
    said = model(FORGET[0]).flatten(0, 1)
    assert kl(said, said).item() == pytest.approx(0, abs=1e-6)


def test_kl_gradient():
    """Closed form q - p, and finite differences in float64."""
    teacher, student = logits(0), logits(1).requires_grad_()
    got, = torch.autograd.grad(kl(teacher, student), student)
    expected = student.softmax(-1) - teacher.softmax(-1)
    torch.testing.assert_close(got, expected.detach(), atol=1e-6, rtol=1e-4)
    for at in ((0, 0), (8, 6), (9, 2)):
        up, down = (student.detach().double().clone() for _ in range(2))
        up[at] += 1e-5
        down[at] -= 1e-5
        slope = (kl_in_loops(teacher, up) - kl_in_loops(teacher, down)) / 2e-5
        assert got[at].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_graddiff(w):
    model, cfg = lively(), dataclasses.replace(CFG, retain_weight=w)
    forget, retain = (F.cross_entropy(model(x).flatten(0, 1), y.flatten()) for x, y in
                      (FORGET, RETAIN))
    loss = whole("graddiff", model, FORGET, RETAIN, None, cfg)
    assert loss.item() == pytest.approx((-forget + w * retain).item(), abs=1e-5)
    torch.testing.assert_close(gradients(loss, model), -gradients(forget, model)
                               + w * gradients(retain, model), atol=1e-5, rtol=1e-4)


class Fixed(torch.nn.Module):
    """A model that says the same logits about forget rows, and loses `loss` on retain rows."""

    def __init__(self, said, loss=0.0):
        super().__init__()
        self.said, self.loss = said, torch.tensor(loss)

    def forward(self, idx, targets, criterion=None):
        said = self.said.flatten(0, 1)
        return criterion(said, targets.flatten()) / len(said) if criterion else self.loss


@pytest.mark.parametrize("w", [0.0, 1.0, 2.5])
def test_maxent(w):
    """KL(uniform || p) + w CE, by the sum and by autograd: its gradient is that of -mean ln p."""
    cfg = dataclasses.replace(CFG, retain_weight=w)
    model = lively()
    uniform = kl_a_token(torch.zeros(3, T, V), model(FORGET[0]).detach())
    retain = F.cross_entropy(model(RETAIN[0]).flatten(0, 1), RETAIN[1].flatten())
    loss = whole("maxent", model, FORGET, RETAIN, None, cfg)
    assert loss.item() == pytest.approx(uniform + w * retain.item(), rel=1e-4)
    said = logits(0, (3, T, V)).requires_grad_()
    got, = torch.autograd.grad(whole("maxent", Fixed(said), FORGET, RETAIN, None, cfg), said)
    torch.testing.assert_close(got, (said.softmax(-1) - 1 / V).detach() / (3 * T),
                               atol=1e-6, rtol=1e-4)


def test_maxent_is_least_when_uniform():
    at = lambda said: whole("maxent", Fixed(said), FORGET, RETAIN, None, CFG).item()  # noqa: E731
    flat = torch.full((3, T, V), 4.0)
    assert at(flat) == pytest.approx(0, abs=1e-5)
    for seed in range(5):
        assert at(flat + 0.1 * logits(seed, flat.shape)) > 1e-4
    assert whole("maxent", Fixed(flat, 1.5), FORGET, RETAIN, None, CFG).item() == pytest.approx(
        1.5, abs=1e-5)


def test_maxent_ignores_the_vocabularys_padding():
    """Uniform over V tokens, not over the rows that the model pads its embedding to."""
    model = lively()
    before = whole("maxent", model, FORGET, RETAIN, None, CFG).item()
    with torch.no_grad():
        model.wte.weight[V:] += 50
    assert whole("maxent", model, FORGET, RETAIN, None, CFG).item() == before


def rmu_by_hand(model, reference, cfg, layer):
    """Li et al. 2024, with both terms in units of the length of the reference's residual."""
    u = torch.rand(16, generator=torch_stream("steering vector", cfg.seed))
    u = (u / u.square().sum().sqrt()).double()
    h = lambda m, idx: m.residuals(idx)[layer].detach().double()  # noqa: E731
    length = lambda idx: sum(row.square().sum().sqrt() for row in  # noqa: E731
                             h(reference, idx).flatten(0, 1)) / (3 * T)
    c = length(FORGET[0])
    push = sum((row - cfg.steer * c * u).square().sum()
               for row in h(model, FORGET[0]).flatten(0, 1))
    stay = (h(model, RETAIN[0]) - h(reference, RETAIN[0])).square().sum()
    return (push / (3 * T) / c ** 2).item(), (stay / (3 * T) / length(RETAIN[0]) ** 2).item()


@pytest.mark.parametrize("layer,seed", [(1, 0), (2, 0), (None, 7)])
def test_rmu(layer, seed):
    cfg = dataclasses.replace(CFG, layer=layer, seed=seed, retain_weight=2.0, steer=3.0)
    model, reference = lively(1), lively(0)
    middle = layer or 1                                              # of two blocks: the first
    for student in (model, reference):
        push, stay = rmu_by_hand(student, reference, cfg, middle)
        loss = whole("rmu", student, FORGET, RETAIN, reference, cfg).item()
        assert loss == pytest.approx(push + 2.0 * stay, rel=1e-4)
    assert stay == 0                          # at the reference the retain term is zero, and flat:
    no_retain = dataclasses.replace(cfg, retain_weight=0.0)
    both = [gradients(whole("rmu", reference, FORGET, RETAIN, reference, c), reference)
            for c in (cfg, no_retain)]
    torch.testing.assert_close(both[0], both[1], atol=1e-6, rtol=1e-5)


def test_rmu_leaves_later_blocks_alone():
    model, reference = lively(1), lively(0)
    cfg = dataclasses.replace(CFG, layer=1)
    whole("rmu", model, FORGET, RETAIN, reference, cfg).backward()
    assert model.blocks[0].mlp.up.weight.grad.any() and model.blocks[1].mlp.up.weight.grad is None
    assert all(p.grad is None for p in reference.parameters())


def test_oracle_and_finetune():
    model, filtered = lively(1), lively(0)
    loss = whole("oracle", model, FORGET, RETAIN, filtered, CFG)
    with torch.no_grad():
        each = [kl_a_token(filtered(idx), model(idx)) for idx, _ in (FORGET, RETAIN)]
    assert loss.item() == pytest.approx(sum(each), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in filtered.parameters())
    assert whole("oracle", filtered, FORGET, RETAIN, filtered, CFG).item() == pytest.approx(
        0, abs=1e-6)
    assert whole("finetune", model, FORGET, RETAIN, None, CFG).item() == pytest.approx(
        F.cross_entropy(model(RETAIN[0]).flatten(0, 1), RETAIN[1].flatten()).item(), rel=1e-5)


# --- unlearning ----------------------------------------------------------------------------------
@pytest.fixture
def cfg(tmp_path):
    return unlearn.Config(device="cpu", compile=False, out=str(tmp_path), steps=4, batch_size=8,
                          lr=1e-3)


def small(task, seed=0):
    return GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16)).train(False), {
        "made_with": {"task": task.name, "seed": seed}, "flops": 1000 + seed}


@pytest.mark.parametrize("method", unlearn.NAMES)
def test_every_method(method, cfg, task):
    """Made once; base is left as it was; the oracle pays for the filtered model."""
    base, filtered = small(task), small(task, 5)
    before = weights(base[0]), weights(filtered[0])
    cfg = dataclasses.replace(cfg, method=method)
    first = dataclasses.replace(cfg, method="maxent", steps=None, lr=None, batch_size=None)
    paid = {"oracle": 1005, "tar": unlearn.unlearn(first, task, *base)[1]["flops"] if
            method == "tar" else 0}.get(method, 0)
    model, record = unlearn.unlearn(cfg, task, *base, *filtered)
    assert same(before[0], weights(base[0])) and same(before[1], weights(filtered[0]))
    assert not same(before[0], weights(model)) and record["steps"] == 4
    again, checkpoint = unlearn.unlearn(cfg, task, *base, *filtered)
    assert same(weights(model), weights(again)) and checkpoint["flops"] == record["flops"]
    assert record["flops"] == paid + record["history"][-1]["flops"]
    name = "first-maxent" if method == "tar" else method      # tar's teacher notices first
    with pytest.raises(BadInput, match=f"{name}.pt was made with base="):
        unlearn.unlearn(cfg, task, base[0], {"made_with": {"seed": 9}, "flops": 0}, *filtered)


def test_half_of_a_batch_each(cfg, task, monkeypatch):
    seen = []
    monkeypatch.setattr(unlearn, "objective", lambda model, forget, retain, reference, cfg, step: (
        seen.append((forget, retain)), model(*retain))[1])
    unlearn.unlearn(cfg, task, *small(task))
    seed = seed_of("unlearn by maxent", cfg.seed)
    for step, (forget, retain) in enumerate(seen):
        assert torch.equal(forget[0], task.batch("forget", 4, step, seed)[0])
        assert torch.equal(retain[1], task.batch("retain", 4, step, seed)[1])
    assert len(seen) == 4


@pytest.mark.parametrize("method", unlearn.NAMES)
def test_unlearning_starts_from_base(method, cfg, task):
    """At rate 0 it stays there."""
    base = small(task)
    cfg = dataclasses.replace(cfg, method=method, lr=0.0, steps=1, after="")
    model, _ = unlearn.unlearn(cfg, task, *base, *small(task, 5))
    assert same(weights(model), weights(base[0]))


def test_a_block_that_is_not_there(cfg, task):
    with pytest.raises(BadInput, match="--layer=2: the model has 1 blocks"):
        unlearn.unlearn(dataclasses.replace(cfg, method="rmu", layer=2), task, *small(task))


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("kept,chosen", [((1, 1, 1), 1), ((1, 0, 1), 2), ((0, 0, 0), 1)])
def test_sweep(kept, chosen, higher, cfg, capsys):
    """The most forgetting among the rates that keep the retain score, or among all if none does;
    both on what is never reported."""
    reference, forget = 0.8, [2.0, 5.0, 4.0]
    good, bad = (0.79, 0.7) if higher else (0.81, 0.9)
    task = Judged(
        higher_is_better=higher,
        score=lambda model, domains, part: {"val": {"retain": reference}}[part],
        loss=lambda model, domain, rows, part: {("forget", "val"): forget}[domain, part][model])
    cfg = dataclasses.replace(cfg, sweep=[0.1, 0.2, 0.3])

    def attempt(lr):
        i = cfg.sweep.index(lr)
        return i, {"flops": 10 ** i, "steps": 4, "history": [
            {"retain": bad}, {"retain": good if kept[i] else bad}]}

    model, record = unlearn.sweep(cfg, task, None, attempt)
    assert model == chosen and record["flops"] == 111                # every attempt is paid for
    assert ("no rate" in capsys.readouterr().out) == (not any(kept))

    def diverges(lr):
        if lr != 0.3:
            raise BadInput("the loss is nan")
        return attempt(lr)

    model, record = unlearn.sweep(cfg, task, None, diverges)          # the others still count
    assert model == 2 and record["flops"] == 100
    with pytest.raises(BadInput, match="no rate ended well"):
        unlearn.sweep(dataclasses.replace(cfg, sweep=[0.1, 0.2]), task, None, diverges)


def test_sweep_for_true(cfg, task):
    """Each rate trains: the model chosen is the one that its rate alone gives."""
    base = small(task)
    cfg = dataclasses.replace(cfg, method="graddiff", lr="sweep", sweep=[1e-3, 1e-2])
    model, record = unlearn.unlearn(cfg, task, *base)
    alone = [unlearn.unlearn(dataclasses.replace(cfg, lr=lr, out=f"{cfg.out}/{lr}"), task, *base)
             for lr in cfg.sweep]
    assert sum(same(weights(model), weights(other)) for other, _ in alone) == 1
    assert record["flops"] == sum(r["flops"] for _, r in alone)


# --- UNDO's noise --------------------------------------------------------------------------------
@pytest.mark.parametrize("alpha,beta", [(0.3, 0.1), (0.6, 0.1), (0.5, 2.0), (1.0, 0.1)])
def test_noise(alpha, beta):
    """What is added to (1 - alpha) theta is alpha beta U(-a, a), a = sqrt(6 / (in + out))."""
    model = GPT(GPTConfig(500, T, 2, 2, 64))
    for p in model.parameters():
        p.data.normal_()
    before = weights(model)
    undo.noise(model, alpha, beta, torch.Generator().manual_seed(0))
    added = []
    for name, p in model.named_parameters():
        N = (p.detach().double() - (1 - alpha) * before[name].double()) / (alpha * beta)
        a, n = (6 / sum(p.shape)) ** 0.5, p.numel()
        assert N.abs().max() <= a * 1.001 and N.abs().max() > 0.99 * a, name
        assert N.std().item() == pytest.approx(a / 3 ** 0.5, rel=5 / (2.2 * n) ** 0.5)
        assert abs(N.mean().item()) < 5 * a / (3 * n) ** 0.5
        assert ((N < -a / 2).double().mean() - 0.25).abs() < 5 * (0.19 / n) ** 0.5     # flat
        old = before[name].double()
        assert abs((N * old).mean() / (N.std() * old.std())) < 5 / n ** 0.5  # independent
        added.append(N.flatten()[:1000])
    assert not any(torch.allclose(added[i], added[j]) for i in range(len(added)) for j in range(i))


def test_noise_at_its_ends():
    """alpha 0 leaves the teacher, 1 nothing of it; the generator decides, and it alone."""
    def noised(alpha, seed, start):
        model = lively(start)
        undo.noise(model, alpha, 0.1, torch.Generator().manual_seed(seed))
        return weights(model)
    assert same(noised(0.0, 3, 0), weights(lively(0)))
    assert same(noised(1.0, 3, 0), noised(1.0, 3, 1))
    first = noised(0.5, 3, 0)
    torch.manual_seed(1)
    assert same(first, noised(0.5, 3, 0)) and not same(first, noised(0.5, 4, 0))


def damaged(model, alpha, **knobs):
    """model after UNDO's noise, and which of its weights are what they were."""
    cfg = undo.Config(**knobs)
    task = SimpleNamespace(device=torch.device("cpu"), batch=lambda *_: FORGET,
                           undivided=lambda domain, *_: {"forget": FORGET}[domain])
    before = weights(model)
    undo.noise(model, undo.spread(alpha, cfg, task, model), 0.1, torch.Generator().manual_seed(0))
    return {k: v == before[k] for k, v in model.state_dict().items()}, before


def test_noise_in_the_blocks():
    """The embedding stays. By block, alpha is multiplied by the block's factor."""
    model = lively()
    stayed, _ = damaged(model, 0.5, noise="blocks")
    assert stayed["wte.weight"].all()
    assert not any(v.any() for k, v in stayed.items() if k.startswith("blocks"))
    model = lively()
    stayed, before = damaged(model, 0.5, by_block=[0.0, 0.5])
    assert not stayed["wte.weight"].any() and stayed["blocks.0.attn.qkv.weight"].all()
    N = torch.zeros(48, 16)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():                             # noise is drawn for every parameter
        N = torch.nn.init.xavier_uniform_(torch.zeros(p.shape), generator=generator)
        if p is model.blocks[1].attn.qkv.weight:
            break
    torch.testing.assert_close(model.blocks[1].attn.qkv.weight.detach(),
                               0.75 * before["blocks.1.attn.qkv.weight"] + 0.025 * N)
    with pytest.raises(BadInput, match="--by_block has 3 factors; the model has 2 blocks"):
        damaged(lively(), 0.5, by_block=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("kind", ["units", "saliency"])
def test_noise_in_some_units(kind):
    """A share alpha of the MLP units is replaced by noise, all weights that read and write them,
    and nothing else; either any units or those that matter most for forget rows."""
    model = lively()
    saliency = torch.zeros(2, 64)
    batch = [FORGET[0], FORGET[1]]
    for i, block in enumerate(model.blocks):
        w = block.mlp.down.weight
        g, = torch.autograd.grad(model(*batch), w)
        saliency[i] = (w * g).sum(0).abs().detach()
    stayed, before = damaged(model, 0.25, noise=kind)
    gone = torch.zeros(2, 64, dtype=torch.bool)
    for i in range(2):
        up, down = (stayed[f"blocks.{i}.mlp.{name}.weight"] for name in ("up", "down"))
        assert torch.equal(up.all(1), down.all(0)) and torch.equal(up.any(1), down.any(0))
        gone[i] = ~up.any(1)
        assert model.blocks[i].mlp.up.weight[gone[i]].abs().max() < 0.1 * (6 / 80) ** 0.5
    assert gone.sum() == 32 and all(v.all() for k, v in stayed.items() if "mlp" not in k)
    most = torch.zeros(128, dtype=torch.bool)
    most[saliency.flatten().topk(32).indices] = True
    assert torch.equal(gone.flatten(), most) == (kind == "saliency")


# --- distillation --------------------------------------------------------------------------------
def pupil(scores, higher=True):
    """A task whose student scores `scores` one after the other; the first is the teacher's. It
    lets training look at no test data, and has batches for distillation alone."""
    said = iter(scores)
    return Judged(
        name="arithmetic", device=torch.device("cpu"), block_size=T, higher_is_better=higher,
        batch=lambda split, size, step, seed: {
            ("all", seed_of("distil", 0)): rows(step, size)}[split, seed],
        score=lambda model, domains, part: {"val": lambda: {"retain": next(said)}}[part]())


DISTIL = undo.Config(device="cpu", compile=False, steps=40, batch_size=4, lr=1e-3, muon_lr=0.02,
                     tolerance=0.1, check_every=3, beta=0.1, distil_on="all")


@pytest.mark.parametrize("higher,scores,steps", [
    (True, [0.8, 0.1, 0.71, 0.73], 9), (True, [0.8, 0.9], 3), (True, [0.5, 0.44, 0.45, 0.5], 6),
    (False, [2.0, 5.0, 2.3, 2.1], 9), (False, [2.0, 1.9], 3)])
def test_distil_stops_at_the_tolerance(higher, scores, steps, capsys):
    """Within 10% of the teacher: the first look at which that holds is the last."""
    student, teacher = lively(1), lively(0)
    before = weights(teacher)
    record = undo.distil(student, teacher, pupil(scores, higher), DISTIL, "student")
    assert record["steps"] == steps == record["history"][-1]["step"]
    assert same(before, weights(teacher)) and not same(weights(student), weights(lively(1)))
    assert "short of" not in capsys.readouterr().out


def test_distil_that_does_not_get_there(capsys):
    cfg = dataclasses.replace(DISTIL, steps=7)
    record = undo.distil(lively(1), lively(0), pupil([0.8, 0.1, 0.2, 0.3]), cfg, "student")
    assert record["steps"] == 7 and [h["step"] for h in record["history"]] == [3, 6, 7]
    assert "student: stopped after 7 steps at retain 0.300" in capsys.readouterr().out


def test_distillation_is_forward_kl(float32):
    """KL(teacher || student), on the mix; the first step's loss is that of the start."""
    student, teacher = lively(1), lively(0)
    idx = rows(0, 4)[0]
    with torch.no_grad():
        expected = kl_a_token(teacher(idx), student(idx))
    record = undo.distil(student, teacher, pupil([1.0, 1.0]), dataclasses.replace(DISTIL, steps=1),
                         "student")
    assert record["history"][0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_distillation_distils():
    """A student comes to say what its teacher says; its FLOPs have the teacher's forward passes."""
    cfg = dataclasses.replace(DISTIL, steps=60, batch_size=8)
    student, teacher = lively(1), lively(0)
    idx = rows(77, 8)[0]
    with torch.no_grad():
        before = kl_a_token(teacher(idx), student(idx))
    record = undo.distil(student, teacher, pupil([1.0] + [0.0] * 60), cfg, "student")
    with torch.no_grad():
        assert kl_a_token(teacher(idx), student(idx)) < before / 3
    alone = fit(lively(1), lambda m, step: m(*rows(step, 8)), cfg, 60, 1e-3, 0.02)
    forward = 2 * 8 * T * (2 * 12 * 16 * 16 + 64 * 16) + 2 * 2 * 2 * 8 * T * T * 16
    assert record["flops"] == alone["flops"] + 60 * forward


@pytest.mark.parametrize("split", ["all", "retain"])
def test_rows_of_a_student(split):
    """Its rows are the unlabelled mix or those labelled retain, as it is told."""
    asked, task = [], pupil([1.0, 0.0, 0.0])
    task.batch = lambda split, size, step, seed: (asked.append(split), rows(step, size))[1]
    undo.distil(lively(1), lively(0), task, dataclasses.replace(
        DISTIL, steps=2, distil_on=split), "student")
    assert asked == [split] * 2


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5])
def test_undo(alpha, task, tmp_path, capsys, monkeypatch):
    """The student starts from the damaged teacher, or from a fresh initialisation, and pays for
    what the teacher has cost; another alpha or beta is another model. The fresh one may run as
    long as filtered did."""
    teacher, record = small(task)
    cfg = dataclasses.replace(DISTIL, out=str(tmp_path), steps=2, lr=0.0, muon_lr=0.0,
                              check_every=1, filtered_steps=3, tolerance=0.0)
    monkeypatch.setattr(task, "within", lambda *_: False)
    student, got = undo.undo(alpha, cfg, task, teacher, record)
    start = GPT(teacher.config)
    if alpha is None:
        start.init_weights(torch_stream("weights", "distilled", cfg.seed))
    else:
        start.load_state_dict(teacher.state_dict())
        undo.noise(start, alpha, cfg.beta, torch_stream("noise", cfg.seed))
    assert same(weights(student), weights(start))                    # at rate 0 it stays there
    assert got["flops"] == got["history"][-1]["flops"] + 1000
    assert got["steps"] == (3 if alpha is None else 2)
    name = "distilled" if alpha is None else f"undo-{alpha:g}"
    assert (tmp_path / "arithmetic" / "seed0" / f"{name}.pt").exists()
    if alpha is not None:
        with pytest.raises(BadInput, match="beta=0.1.*beta=0.2"):
            undo.undo(alpha, dataclasses.replace(cfg, beta=0.2), task, teacher, record)


def test_undo_in_rounds(task, tmp_path, monkeypatch):
    """The second round damages the first one's student, by noise of its own; both are paid for."""
    teacher, record = small(task)
    cfg = dataclasses.replace(DISTIL, out=str(tmp_path), steps=2, lr=0.0, muon_lr=0.0,
                              check_every=1, rounds=2)
    monkeypatch.setattr(task, "within", lambda *_: False)
    student, got = undo.undo(0.5, cfg, task, teacher, record)
    start = teacher.clone()
    for stream in (("noise", cfg.seed), ("noise", cfg.seed, 2)):
        undo.noise(start, 0.5, cfg.beta, torch_stream(*stream))
    assert same(weights(student), weights(start))
    assert got["flops"] == 2 * got["history"][-1]["flops"] + 1000
    assert {p.stem for p in tmp_path.glob("**/*.pt")} == {"undo-0.5", "undo-0.5-round1"}
    alone, _ = undo.undo(0.5, dataclasses.replace(cfg, rounds=1, out=str(tmp_path / "1")), task,
                         teacher, record)
    assert same(weights(alone), weights(undo.undo(0.5, cfg, task, teacher, record, rounds=1)[0]))


# --- judges --------------------------------------------------------------------------------------
knows_more, within = Task.knows_more, Task.within
ACCURACY, LOSS = Judged(higher_is_better=True), Judged(higher_is_better=False)


def test_knows_more():
    assert knows_more(ACCURACY, 0.5, 0.4) and not knows_more(ACCURACY, 0.4, 0.5)
    assert knows_more(LOSS, 1.0, 2.0) and not knows_more(LOSS, 2.0, 1.0)
    assert not knows_more(ACCURACY, 1.0, 1.0) and not knows_more(LOSS, 1.0, 1.0)


def test_within():
    for score, expected in ((0.76, True), (0.7601, True), (0.75, False), (0.9, True)):
        assert within(ACCURACY, score, 0.8, 0.05) == expected
    for score, expected in ((2.1, True), (2.11, False), (1.0, True)):
        assert within(LOSS, score, 2.0, 0.05) == expected
    assert within(ACCURACY, 0.8, 0.8, 0.0) and within(LOSS, 2.0, 2.0, 0.0)


@pytest.mark.parametrize("method,unlearned,filtered,expected", [
    (0.9, 0.9, 0.1, 0), (0.1, 0.9, 0.1, 1), (0.5, 0.9, 0.1, 0.5), (1.0, 0.9, 0.1, -0.125),
    (0.0, 0.9, 0.1, 1.125), (2.5, 1.0, 3.0, 0.75), (0.5, 0.3, 0.3, None)])
def test_robustness(method, unlearned, filtered, expected):
    assert robustness(method, unlearned, filtered) == (
        expected if expected is None else pytest.approx(expected))


def attack(**knobs):
    return judges.Attack(device="cpu", compile=False, lrs=[0.1, 0.2, 0.3], attack_steps=[1, 2, 4],
                         **{"attack": "forget", "attack_rows": 4, "attack_seeds": 2} | knobs)


@pytest.mark.parametrize("higher,lrs", [(True, [0.3, 0.1, 0.2]), (False, [0.2, 0.3, 0.1])])
def test_relearn_takes_the_worst_rate_at_each_step(higher, lrs, monkeypatch):
    """Scripted curves; further scores go with the rate that was taken. Each rate is tried twice,
    and its mean counts: in its second run it forgets by 0.5 more and 0.5 less."""
    forget = {0.1: {1: 0.2, 2: 0.9, 4: 0.3}, 0.2: {1: 0.1, 2: 0.8, 4: 0.95},
              0.3: {1: 0.6, 2: 0.5, 4: 0.4}}
    if not higher:
        forget = {0.1: {1: 3.0, 2: 2.5, 4: 0.5}, 0.2: {1: 1.0, 2: 2.0, 4: 0.9},
                  0.3: {1: 4.0, 2: 1.5, 4: 0.6}}

    runs = []

    def scripted(copy, loss_fn, cfg, steps, lr, **knobs):
        assert steps == 4 and set(knobs["evaluate_at"]) == {1, 2, 4}
        runs.append(lr)
        luck = 0.5 if runs.count(lr) == 1 else -0.5
        return {"history": [{"step": s, "loss": 9.0, "flops": 1, "retain": lr + s - luck,
                             "forget": forget[lr][s] + luck, "forget_more": lr * s + luck,
                             "other": 1} for s in (1, 2, 4)]}

    monkeypatch.setattr(judges, "fit", scripted)
    task = Judged(higher_is_better=higher, device=torch.device("cpu"), block_size=T,
                           score=None)
    got = relearn(lively(), task, attack())
    assert runs == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    scores = {lr: {s: {"forget": forget[lr][s], "retain": lr + s, "forget_more": lr * s}
                   for s in (1, 2, 4)} for lr in (0.1, 0.2, 0.3)}
    assert set(got["worst"]) == {1, 2, 4} and set(got["curves"]) == set(scores)
    for s, lr in zip((1, 2, 4), lrs):
        assert got["worst"][s] == pytest.approx(scores[lr][s] | {"lr": lr})
    for lr in scores:
        assert set(got["curves"][lr]) == {1, 2, 4}
        for s in (1, 2, 4):
            assert got["curves"][lr][s] == pytest.approx(scores[lr][s])


def test_relearn_aims_at_forget_words(monkeypatch):
    """Where they are scored, the worst rate is the one at which their loss is least."""
    curves = {0.1: (2.0, 5.0), 0.2: (2.5, 3.0), 0.3: (2.4, 4.0)}
    monkeypatch.setattr(judges, "fit", lambda copy, loss_fn, cfg, steps, lr, **knobs: {"history": [
        {"step": s, "forget": curves[lr][0], "forget_words": curves[lr][1]} for s in (1, 2, 4)]})
    got = relearn(lively(), Judged(higher_is_better=False, block_size=T), attack())
    assert got["worst"][4] == {"forget": 2.5, "forget_words": 3.0, "lr": 0.2}


@pytest.mark.parametrize("kind,split", [("forget", "forget"), ("mixed", "all"),
                                        ("retain", "retain")])
def test_relearn(kind, split, task):
    """Copies are attacked, each from the same start, on rows of the right kind that pretraining
    does not see in this order, the same for all rates and others in each run; the model itself
    stays as it was, bit for bit. It is scored on what is reported."""
    model, asked, looked = small(task)[0], [], []
    before = weights(model)

    class Spy(Judged):
        name, device, block_size, higher_is_better = task.name, task.device, task.block_size, True

        def batch(self, *arguments):
            asked.append(arguments)
            return task.batch(*arguments)

        def score(self, scored, domains, part="test", finer=False):
            assert (part, finer) == ("test", False) and scored is not model
            looked.append(domains)
            return {"retain": 0.5, "forget": task.loss(scored, "forget", rows=4)}

    got = relearn(model, Spy(), attack(attack=kind))
    assert same(before, weights(model)) and all(p.grad is None for p in model.parameters())
    assert looked == [("forget",)] * 18                      # 3 rates, 2 runs, 3 steps
    seeds = [seed_of("relearn", 0, i) for i in range(2)]
    assert asked == [(split, 4, step, seed) for _ in range(3) for seed in seeds
                     for step in range(4)]
    alone = []
    for seed in seeds:
        copy = GPT(model.config)
        copy.load_state_dict(before)
        fit(copy, lambda m, step: m(*task.batch(split, 4, step, seed)), attack(), 4, 0.2)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            alone.append(task.loss(copy, "forget", rows=4))
    assert got["curves"][0.2][4]["forget"] == pytest.approx(sum(alone) / 2, rel=0.02)
    if kind == "forget":
        assert got["curves"][0.1][4]["forget"] < task.loss(model, "forget", rows=4) - 0.2


def test_relearning_from_few_texts(monkeypatch):
    """The published attack: 40 steps at every rate on a few texts; the best score on held-out rows
    counts, whichever step and rate it is of."""
    asked = []
    curves = {0.1: {0: 3.0, 4: 2.5, 40: 2.6}, 0.2: {0: 2.9, 4: 1.9, 40: 2.7}, 0.3: {40: 9.0}}

    def scripted(copy, loss_fn, cfg, steps, lr, **knobs):
        assert steps == 40 and set(knobs["evaluate_at"]) >= {0, 4, 36}
        loss_fn(copy, 7)
        return {"history": [{"step": s, "forget": x} for s, x in curves[lr].items()]}

    def batch(*arguments):
        asked.append(arguments[:3])
        return rows(0, 4)

    monkeypatch.setattr(judges, "fit", scripted)
    task = Judged(higher_is_better=False, block_size=T, first_texts=lambda n: SimpleNamespace(
        batch=batch, block_size=T) if n == 64 else None)
    assert judges.relearn_few(lively(), task, attack(attack_few=64), "model") == 1.9
    assert asked == [("forget", 4, 7)] * 3
    result = {"worst": {1: {"forget": 0.5, "lr": 0.1}}, "few": 1.9}
    assert judges.attacked(result)["relearned_few"] == 1.9
    assert "relearned_few" not in judges.attacked(result | {"few": None})


def test_relearning_brings_a_skill_back(task, float32):
    """An attack on a model that knows nothing teaches it: the loss falls steadily, step by step."""
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    model.init_weights(torch.Generator().manual_seed(0))
    task_of_losses = Judged(
        name=task.name, device=task.device, block_size=task.block_size, higher_is_better=False,
        batch=task.batch,
        score=lambda m, domains: {d: task.loss(m, d, 8) for d in domains})
    cfg = dataclasses.replace(attack(), lrs=[0.003, 0.03], attack_steps=[5, 10, 20])
    got = relearn(model, task_of_losses, cfg)
    curve = [got["worst"][s]["forget"] for s in (5, 10, 20)]
    assert math.log(task.vocab_size) > curve[0] > curve[1] > curve[2]
    assert {got["worst"][s]["lr"] for s in (5, 10, 20)} == {0.03}


# --- all rates and seeds at once -----------------------------------------------------------------
def attacked_both_ways(model, task, cfg, monkeypatch):
    """For one run after the other, and for all stacked: (what relearn() returns, the weights of
    every copy that was scored)."""
    for stacked in (False, True):
        monkeypatch.setattr(judges, "stackable", lambda *_, stacked=stacked: stacked)
        seen = []

        def score(scored, domains):
            seen.append(torch.cat([p.detach().flatten() for p in scored.parameters()]))
            return {domain: task.loss(scored, domain, 8) for domain in domains}

        spy = Judged(name=task.name, device=task.device, block_size=task.block_size,
                     higher_is_better=False, batch=task.batch, score=score)
        yield relearn(model, spy, cfg), seen


@pytest.mark.parametrize("kind", ["forget", "mixed"])
def test_stacked_attack_is_the_loop(kind, task, float32, monkeypatch):
    """Curves, and the weights of each copy after each step: two runs at each of four rates, one of
    which is zero. With a wrong rate or the rows of another run, they would differ by 0.001."""
    model = lively(vocab_size=task.vocab_size, block_size=task.block_size)
    before = weights(model)
    cfg = dataclasses.replace(attack(attack=kind), lrs=[0.003, 0.0, 0.03, 0.01],
                              attack_steps=[1, 2, 3, 4])
    (loop, ones), (stack, alls) = attacked_both_ways(model, task, cfg, monkeypatch)
    assert same(before, weights(model)) and all(p.grad is None for p in model.parameters())
    assert list(loop["curves"]) == list(stack["curves"]) == cfg.lrs
    for lr, curve in loop["curves"].items():
        assert {step: pytest.approx(at, rel=1e-4) for step, at in curve.items()} == (
            stack["curves"][lr])
    assert [at["lr"] for at in loop["worst"].values()] == [
        at["lr"] for at in stack["worst"].values()]
    start = torch.cat([p.flatten() for p in before.values()])
    assert len(ones) == len(alls) == 32
    for run in range(8):
        for step in range(4):                      # the loop scores run by run, the stack by step
            one, all_ = ones[4 * run + step], alls[8 * step + run]
            assert (one - all_).abs().max() < 1e-4
            assert torch.equal(all_, start) == (run in (2, 3))


def test_flops_of_a_stack(float32):
    """Those of its copies; its loss is the sum of theirs."""
    model = lively()
    alone = [fit(model.clone(), lambda m, step, i=i: m(*rows(10 * i + step)), CFG, 2, 1e-3)
             for i in range(3)]
    together = fit(Stack(model, 3), lambda m, step: m(*(torch.stack(x) for x in zip(*(
        rows(10 * i + step) for i in range(3))))), CFG, 2, 1e-3)
    assert together["flops"] == sum(each["flops"] for each in alone) > 0
    assert together["history"][-1]["loss"] == pytest.approx(
        sum(each["history"][-1]["loss"] for each in alone), rel=1e-5)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_rate_that_diverges_ends_the_attack(stacked, task, float32, monkeypatch):
    monkeypatch.setattr(judges, "stackable", lambda *_: stacked)
    model = lively(vocab_size=task.vocab_size, block_size=task.block_size)
    with pytest.raises(BadInput, match=r"relearn model.* (nan|inf) at step .*lr=1e\+30"):
        relearn(model, task, dataclasses.replace(attack(), lrs=[1e-3, 1e30]))


def test_what_is_stacked(monkeypatch):
    """Runs on one GPU whose logits all fit."""
    def asked(kind, vocab_size, K=6):
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size), wte=SimpleNamespace(
            weight=SimpleNamespace(device=torch.device(kind))))
        return judges.stackable(model, SimpleNamespace(block_size=64), 16, K)

    assert asked("cuda", 768) and not asked("cpu", 768) and not asked("mps", 768)
    assert asked("cuda", 2730) and not asked("cuda", 2731)                  # 2^24 / (6 * 16 * 64)
    monkeypatch.setattr(judges, "WORLD", 2)
    assert not asked("cuda", 768)
