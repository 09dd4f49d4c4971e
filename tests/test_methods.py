"""Unlearning losses that go beyond the paper's: by hand, at their limits, by finite differences."""
import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from test_unlearn import FORGET, RETAIN, T, lively, rows, same, small, weights, whole

import unlearn
from engine.hardware import counting_flops
from engine.knobs import BadInput
from engine.store import models_of
from engine.streams import torch_stream

CFG = unlearn.Config(device="cpu", compile=False, retain_weight=0.0, beta=0.3, gamma=1.5, rho=0.5,
                     steer=4.0, mmd=5.0, inner_steps=2, inner_lrs=[1e-3, 1e-2])
LAST = tuple(x if i == 0 else x[:, -4:] for i, x in enumerate(FORGET))     # few targets in a row


def log_p(model, idx, targets):
    """(B,) float64: the log-likelihood of the targets, token by token."""
    out = []
    for row, wanted in zip(idx, targets):
        said = model(row[None])[0, -len(wanted):].detach().double()
        out.append(sum(math.log((z.exp() / z.exp().sum())[t]) for z, t in zip(said, wanted)))
    return torch.tensor(out, dtype=torch.float64)


def gradient(loss, model):
    return torch.cat([g.flatten() for g in unlearn.gradient(loss, list(model.parameters()))])


def cosine(a, b):
    return F.cosine_similarity(a, b, 0).item()


# --- npo, simnpo, undial -------------------------------------------------------------------------
@pytest.mark.parametrize("forget", [FORGET, LAST])
@pytest.mark.parametrize("b", [0.05, 0.3])
def test_npo(b, forget):
    model, base = lively(1), lively(0)
    power = (log_p(model, *forget) - log_p(base, *forget)).exp() ** b
    by_hand = (2 / b * (1 + power).log()).mean().item()
    assert whole("npo", model, forget, RETAIN, base, CFG, beta=b).item() == pytest.approx(
        by_hand, rel=1e-4)


def test_npo_at_its_limits():
    """For b -> 0 it is gradient ascent. A row that is far less likely than before is let go; where
    the rows are those of base, it goes as ascent does."""
    model, base = lively(1), lively(0)
    up = gradient(whole("graddiff", model, FORGET, RETAIN, base, CFG), model)
    g = gradient(whole("npo", model, FORGET, RETAIN, base, CFG, beta=1e-4), model)
    assert cosine(g, up) > 0.9999
    assert g.norm() / up.norm() == pytest.approx(T, rel=0.01)                  # a sum, not a mean
    at_base = gradient(whole("npo", base, FORGET, RETAIN, base, CFG, beta=5.0), base)
    assert cosine(at_base, gradient(whole("graddiff", base, FORGET, RETAIN, base, CFG),
                                    base)) > 0.9999
    sure = copy.deepcopy(base)                                      # says one token, whatever it is
    with torch.no_grad():
        sure.wte.weight.mul_(8)
    ratio = log_p(sure, *FORGET) - log_p(base, *FORGET)
    assert ratio.max() < -40
    let_go = gradient(whole("npo", sure, FORGET, RETAIN, base, CFG, beta=0.5), sure)
    assert let_go.norm() < 1e-3 * gradient(whole("graddiff", sure, FORGET, RETAIN, base, CFG),
                                           sure).norm() * T


@pytest.mark.parametrize("method", ["npo", "simnpo", "undial"])
def test_a_step_down_forgets(method):
    """Whatever its sign conventions: forget rows become less likely, retain rows count by w."""
    model, base = lively(0), lively(0)
    loss = whole(method, model, FORGET, RETAIN, base, CFG, retain_weight=2.0)
    alone = whole(method, model, FORGET, RETAIN, base, CFG)
    kept = F.cross_entropy(model(RETAIN[0]).flatten(0, 1), RETAIN[1].flatten())
    assert loss.item() == pytest.approx((alone + 2 * kept).item(), rel=1e-4)
    before = log_p(model, *FORGET).sum()
    with torch.no_grad():
        for p, g in zip(model.parameters(), unlearn.gradient(alone, list(model.parameters()))):
            p.sub_(0.01 * g)
    assert log_p(model, *FORGET).sum() < before - 0.01


@pytest.mark.parametrize("forget", [FORGET, LAST])
@pytest.mark.parametrize("b,g", [(0.3, 0.0), (2.5, 1.5)])
def test_simnpo(b, g, forget):
    model = lively(1)
    z = -b * log_p(model, *forget) / forget[1].size(1) - g
    by_hand = (2 / b * (1 + (-z).exp()).log()).mean().item()
    assert whole("simnpo", model, forget, RETAIN, None, CFG, beta=b, gamma=g).item() == \
        pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("forget", [FORGET, LAST])
@pytest.mark.parametrize("g", [0.0, 3.0])
def test_undial(g, forget):
    model, base = lively(1), lively(0)
    idx, targets = forget
    total = 0.0
    for row, wanted in zip(idx, targets):
        z0, z = (m(row[None])[0, -len(wanted):].detach().double() for m in (base, model))
        for at, t in enumerate(wanted):
            z0[at, t] -= g
            p, q = (x[at].exp() / x[at].exp().sum() for x in (z0, z))
            total += (p * (p / q).log()).sum().item()
    assert whole("undial", model, forget, RETAIN, base, CFG, gamma=g).item() == pytest.approx(
        total / targets.numel(), rel=1e-4)


def test_undial_without_adjustment_is_at_rest():
    base = lively(0)
    still = gradient(whole("undial", base, FORGET, RETAIN, base, CFG, gamma=0.0), base)
    moving = gradient(whole("undial", base, FORGET, RETAIN, base, CFG, gamma=3.0), base)
    assert still.norm() < 1e-5 < 1e-2 < moving.norm()


# --- sam -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("around", ["maxent", "npo", "rmu", "repnoise"])
def test_sam_of_radius_zero_is_its_method(around):
    model, base = lively(1), lively(0)
    cfg = dataclasses.replace(CFG, around=around, retain_weight=2.0)
    flat, plain = (whole(m, model, FORGET, RETAIN, base, cfg, rho=0.0) for m in ("sam", around))
    assert flat.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(gradient(flat, model), gradient(plain, model), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("around", ["maxent", "graddiff"])
def test_sam(around):
    """The gradient at theta + rho g / |g|, by a copy that stands there; the model stays."""
    model, base = lively(1), lively(0)
    before, cfg = weights(model), dataclasses.replace(CFG, around=around)
    loss = whole("sam", model, FORGET, RETAIN, base, cfg)
    assert same(before, weights(model))
    there = lively(1)
    g = unlearn.gradient(whole(around, there, FORGET, RETAIN, base, cfg), list(there.parameters()))
    length = sum(x.square().sum() for x in g).sqrt()
    with torch.no_grad():
        for p, x in zip(there.parameters(), g):
            p.add_(0.5 * x / length)
    expected = gradient(whole(around, there, FORGET, RETAIN, base, cfg), there)
    got = gradient(loss, model)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    here = gradient(whole(around, model, FORGET, RETAIN, base, cfg), model)
    assert cosine(got, here) < 0.999                       # it is another one than that at theta


def test_sam_pays_for_both_passes():
    model, base = lively(1), lively(0)
    cost = {}
    for method in ("maxent", "sam"):
        with counting_flops() as counter:
            whole(method, model, FORGET, RETAIN, base, CFG, retain_weight=1.0).backward()
        cost[method] = counter.get_total_flops()
    with counting_flops() as counter:
        model(*FORGET).backward()
    assert cost["sam"] - cost["maxent"] == counter.get_total_flops()


# --- repnoise ------------------------------------------------------------------------------------
def sample(seed, n, C=5, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, C, generator=torch.Generator().manual_seed(seed))


def test_mmd_by_loops():
    x, y = sample(0, 9, shift=0.5), sample(1, 9)
    s = sorted(((a - b) ** 2).sum().item() for a in x for b in y)[(81 - 1) // 2]
    k = lambda A, B: sum(math.exp(-((a - b) ** 2).sum().item() / s)  # noqa: E731
                         for a in A for b in B) / (len(A) * len(B))
    assert unlearn.mmd2(x, y).item() == pytest.approx(k(x, x) + k(y, y) - 2 * k(x, y), abs=1e-5)
    assert unlearn.mmd2(x, x).item() == pytest.approx(0, abs=1e-6)


def test_mmd_tells_distributions_apart():
    noise = sample(0, 400)
    alike, moved, spread = (unlearn.mmd2(sample(1, 400, **how), noise).item()
                            for how in ({}, {"shift": 0.5}, {"scale": 2.0}))
    assert alike < 0.01 < moved and 3 * alike < spread


def test_repnoise():
    """Without MMD it climbs log CE; with it, residuals of every block come to look like noise."""
    model = lively(1)
    alone = whole("repnoise", model, FORGET, RETAIN, None, CFG, mmd=0.0)
    loss = F.cross_entropy(model(FORGET[0]).flatten(0, 1), FORGET[1].flatten())
    assert alone.item() == pytest.approx(-loss.log().item(), rel=1e-5)
    noise = torch.randn(3 * T, 16, generator=torch_stream("noise of repnoise", CFG.seed, 4))
    far = sum(unlearn.mmd2(h.flatten(0, 1), noise) for h in model.residuals(FORGET[0])[1:]) / 2
    both = whole("repnoise", model, FORGET, RETAIN, None, CFG, step=4, mmd=3.0)
    assert both.item() == pytest.approx((alone + 3 * far).item(), rel=1e-5)
    other = whole("repnoise", model, FORGET, RETAIN, None, CFG, step=5, mmd=3.0)
    assert both.item() != other.item()                            # each step has noise of its own
    touched = unlearn.gradient(both, [block.mlp.down.weight for block in model.blocks])
    assert all(g.abs().max() > 0 for g in touched)


# --- tar -----------------------------------------------------------------------------------------
def test_tar_without_an_attack_is_maxent():
    model, base = lively(1), lively(0)
    loss = whole("tar", model, FORGET, RETAIN, base, CFG, inner_steps=0)
    plain = whole("maxent", model, FORGET, RETAIN, base, CFG)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(gradient(loss, model), gradient(plain, model), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("step", [0, 1])
def test_tar(step):
    """The gradient after an attack by torch's AdamW on a copy, on every second and third row, at
    the rates in turns; the model itself stays."""
    model, base = lively(1), lively(0)
    forget, before = rows(5, 9), weights(model)
    loss = whole("tar", model, forget, RETAIN, base, CFG, step=step)
    assert same(before, weights(model)) and all(p.grad is None for p in model.parameters())
    there = lively(1)
    optimizer = torch.optim.AdamW(there.parameters(), lr=CFG.inner_lrs[step], betas=(0.9, 0.95),
                                  weight_decay=0.0)
    for i in (1, 2):
        optimizer.zero_grad()
        F.cross_entropy(there(forget[0][i::3]).flatten(0, 1), forget[1][i::3].flatten()).backward()
        optimizer.step()
    last = whole("maxent", there, [x[::3] for x in forget], RETAIN, base, CFG)
    torch.testing.assert_close(gradient(loss, model), gradient(last, there), atol=1e-5, rtol=1e-3)
    assert loss.item() == pytest.approx(last.item(), rel=1e-4)


def test_tar_stays_near_its_start():
    """At the reference the residuals' term is zero; away from it, it is that of rmu."""
    model, base = lively(1), lively(0)
    for each, apart in ((base, 0), (model, unlearn.stay(model, RETAIN, base, CFG).item())):
        kept = unlearn.METHODS["tar"][1](each, RETAIN, base, CFG)
        assert kept.item() == pytest.approx(each(*RETAIN).item() + apart, rel=1e-5)
    assert apart > 0.1


# --- in low precision ----------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["sam", "tar"])
def test_a_moved_model_computes_with_the_moved_weights(method):
    """Autocast keeps bfloat16 copies of weights: those of the place that was left must not count.
    """
    model, base, forget = lively(1), lively(0), rows(5, 9)
    cfg = dataclasses.replace(CFG, rho=3.0, inner_lrs=[0.05])
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        got = gradient(whole(method, model, forget, RETAIN, base, cfg), model)
        after = model(*RETAIN).item()
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        wanted = gradient(whole(method, model, forget, RETAIN, base, cfg), model)
        here = model(*RETAIN).item()
    assert cosine(got, wanted) > 0.999 and after == pytest.approx(here, rel=1e-5)


# --- one method after another --------------------------------------------------------------------
@pytest.fixture
def cfg(tmp_path):
    return unlearn.Config(device="cpu", compile=False, out=str(tmp_path), steps=2, batch_size=8,
                          lr=1e-3, beta=0.1, gamma=1.0, retain_weight=1.0, inner_steps=1)


def test_after(cfg, task, monkeypatch):
    """It starts from the first method's model, made with that method's own settings, is compared
    with it, and pays for both; the two have files of their own."""
    monkeypatch.setitem(unlearn.SETTINGS["graddiff"], task.name, dict(
        steps=3, lr=1e-2, retain_weight=1.0, batch_size=4))
    base, seen = small(task), []
    true = unlearn.objective

    def watched(model, forget, retain, reference, cfg, step):
        seen.append((cfg.method, weights(reference), len(forget[0])))
        return true(model, forget, retain, reference, cfg, step)

    monkeypatch.setattr(unlearn, "objective", watched)
    teacher, paid = unlearn.unlearn(dataclasses.replace(
        cfg, method="graddiff", steps=None, lr=None, batch_size=None, retain_weight=None), task,
        *base)
    model, record = unlearn.unlearn(dataclasses.replace(cfg, method="npo", after="graddiff"),
                                    task, *base)
    assert [name for name, *_ in seen] == ["graddiff"] * 6 + ["npo"] * 2
    assert same(seen[0][1], weights(base[0])) and same(seen[-1][1], weights(teacher))
    assert record["flops"] == paid["flops"] + record["history"][-1]["flops"]
    unlearn.unlearn(dataclasses.replace(cfg, method="tar", after="graddiff", inner_steps=3), task,
                    *base)
    assert seen[-1][2] == 4 * 4
    assert {p.stem for p in models_of(cfg).glob("*.pt")} == {
        "graddiff", "first-graddiff", "npo", "tar"}
    with pytest.raises(BadInput, match="npo.pt was made with base="):
        unlearn.unlearn(dataclasses.replace(cfg, method="npo"), task, *base)


def test_sam_around_a_method_has_its_knobs(cfg, task, monkeypatch):
    """Those of the task, as the method itself has them."""
    monkeypatch.setitem(unlearn.SETTINGS["simnpo"], task.name, dict(
        steps=3, lr=1e-2, retain_weight=1.0, batch_size=4, beta=0.7, gamma=0.2))
    seen, true = [], unlearn.objective
    monkeypatch.setattr(unlearn, "objective", lambda model, forget, retain, reference, cfg, step: (
        seen.append((cfg.beta, cfg.gamma)), true(model, forget, retain, reference, cfg, step))[1])
    plain = dataclasses.replace(cfg, method="sam", around="simnpo", beta=None, gamma=None, rho=0.1)
    unlearn.unlearn(plain, task, *small(task))
    unlearn.unlearn(dataclasses.replace(plain, beta=0.4), task, *small(task), folder="other-")
    assert [*dict.fromkeys(seen)] == [(0.7, 0.2), (0.4, 0.2)]


def test_after_itself(cfg, task):
    with pytest.raises(BadInput, match="--after=npo: the same as --method"):
        unlearn.unlearn(dataclasses.replace(cfg, method="npo", after="npo"), task, *small(task))


def test_a_model_depends_on_its_methods_knobs(cfg, task):
    """Another value of a knob that the method uses is another model; of one that it does not use
    is not."""
    base, changed = small(task), {
        "npo": dict(beta=0.2), "simnpo": dict(gamma=2.0), "undial": dict(gamma=2.0),
        "sam": dict(rho=0.1), "repnoise": dict(mmd=1.0), "tar": dict(inner_steps=2)}
    for method, knobs in changed.items():
        mine = dataclasses.replace(cfg, method=method)
        first = weights(unlearn.unlearn(mine, task, *base)[0])
        unused = dict(steer=1.0) | ({} if method in ("npo", "simnpo") else dict(beta=0.7))
        assert same(first, weights(unlearn.unlearn(dataclasses.replace(mine, **unused), task,
                                                   *base)[0]))
        with pytest.raises(BadInput, match=f"was made with {next(iter(knobs))}="):
            unlearn.unlearn(dataclasses.replace(mine, **knobs), task, *base)
    mine = dataclasses.replace(cfg, method="sam", around="npo", remake=True)
    unlearn.unlearn(mine, task, *base)
    with pytest.raises(BadInput, match="was made with beta="):
        unlearn.unlearn(dataclasses.replace(mine, beta=0.2, remake=False), task, *base)
