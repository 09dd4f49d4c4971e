"""The frontier's bench: critics' baselines, the attacks of the matrix, and what it says of them."""
import copy
import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_unlearn import FORGET, RETAIN, Judged, T, V, lively, rows, same, weights

import train
import undo
from data import arithmetic
from data.tokenizer import END
from engine.hardware import counting_flops
from engine.knobs import BadInput
from eval import tune
from experiments import attacks, frontier
from model import norm
from train import fit

CFG = frontier.Config(device="cpu", compile=False)


# --- fit: warm-up, SGD ---------------------------------------------------------------------------
@pytest.mark.parametrize("warmup, momentum", [(4, None), (0, 0.9), (3, 0.5)])
def test_warmup_and_momentum_against_plain_torch(warmup, momentum, float32):
    model, plain = lively(), lively()
    fit(model, lambda m, step: m(*rows(step)), CFG, 6, 0.05, warmup=warmup, momentum=momentum)
    optimizer = (torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.95), weight_decay=0)
                 if momentum is None else torch.optim.SGD(plain.parameters(), momentum=momentum))
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1, (step + 1) / warmup if warmup else 1)
        optimizer.zero_grad()
        idx, targets = rows(step)
        F.cross_entropy(plain(idx).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


# --- few labels, classifier, distillation without what is flagged --------------------------------
def distinct(task, split, **how):
    found = set()
    for step in range(30):
        found |= {tuple(row) for row in task.batch(split, 16, step, 0, **how)[0].tolist()}
    return found


@pytest.mark.parametrize("aligned", [True, False])
def test_few_labels(aligned, task, tmp_path):
    """No row of a labelled split reads a text without a label, and filtering keeps all others; one
    row is always there. Validation goes by the truth."""
    if not aligned:
        task = with_settings(task, aligned=False)
        task.open(task.folder)
    texts = {d: task.tokenizer.decode(task.tokens(f"{d}_train").tolist()).split(END)
             for d in ("forget", "retain")}
    for share in (1e-9, 0.1):
        view, n = frontier.few_labels(task, share)
        assert n >= 1 and (share < 0.01 or n == round(0.1 * (len(texts["forget"]) - 1)))
        for split, mine in (("forget", texts["forget"][:n]), ("sure", texts["retain"][-n - 1:])):
            whole = END.join(["", *mine, ""])
            rows = distinct(view, split)
            assert rows and all(task.tokenizer.decode(list(row)) in whole for row in rows)
        kept = END.join(texts["forget"][n - 1:])             # a row may begin at the text before
        for row in view.batch({"retain": 1}, 200, 0, 0)[0].tolist():
            said = task.tokenizer.decode(row)
            assert said in END + kept or said in END.join(["", *texts["retain"], ""])
    whole, n = frontier.few_labels(task, 1)
    assert n == len(texts["forget"]) - 1
    assert whole.pieces["sure"] == [("retain", 0, 1)]
    only = frontier.labelled_only(view)
    assert only.pieces["retain"] == view.pieces["sure"] != view.pieces["retain"]
    assert distinct(only, "retain", part="val") == distinct(task, "retain", part="val")


def with_settings(task, **settings):
    changed = copy.copy(task)
    changed.settings = task.settings | settings
    return changed


def test_classifier(task, float32):
    """It tells apart tokens of two kinds of rows; its cost is counted."""
    base = lively(vocab_size=task.vocab_size)
    view = SimpleNamespace(batch=lambda split, size, step, seed: {
        "forget": (torch.full((4, T), 3), torch.full((4, T), 3)),
        "sure": (torch.full((4, T), 5), torch.full((4, T), 5))}[split])
    w, b, flops = frontier.classifier(base, view, CFG, rows=4)
    for token, flagged in ((3, True), (5, False)):
        x = norm(base(torch.full((1, T), token), residual=-1))
        assert ((x @ w + b > 0) == flagged).all()
    with counting_flops() as counter:
        base(torch.full((8, T), 3), residual=-1)
    a_look = 2 * 8 * T * 16                                          # x @ w; its gradient as much
    assert flops >= counter.get_total_flops() + 2 * a_look
    assert (flops - counter.get_total_flops()) % a_look == 0


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("n", [T, 4])
def test_imitation_without_what_is_flagged(uniform, n):
    """By loops: flagged tokens are left out, or their target is uniform. The mean is over all."""
    model, base, idx = lively(1), lively(0), FORGET[0]
    w, b = torch.randn(16, 1, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    total, flags = 0.0, 0
    with torch.no_grad():
        for x, z0, z in zip(*(t[:, -n:].flatten(0, 1) for t in (
                base(idx, residual=-1), base(idx), model(idx)))):
            p, q = z0.double().softmax(-1), z.double().softmax(-1)
            if (norm(x) * w[:, 0]).sum() > 0:
                flags += 1
                p = torch.full_like(p, 1 / V) if uniform else q
            total += (p * (p / q).log()).sum().item()
    assert 0 < flags < 3 * n
    loss = frontier.imitate_unflagged(uniform, w, b)(model, base, idx, idx[:, -n:])
    assert loss.item() == pytest.approx(total / (3 * n), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for p in base.parameters())


def test_noise_and_retraining(monkeypatch, tmp_path, float32):
    """The student starts from (1 - alpha) theta and learns CE on rows labelled retain, nothing
    else; base stays as it is, and only the student's own work is counted."""
    seen, base = {}, lively()
    monkeypatch.setattr(undo, "fit", lambda model, loss_fn, *_, **__: (
        seen.update(start=weights(model), loss=loss_fn(model, 0), model=model),
        {"flops": 5, "steps": 1, "history": [{"retain": 1.0}]})[1])
    monkeypatch.setattr(undo, "obtain", lambda name, cfg, task, made_with, make: (
        seen.update(made_with=made_with), make(None))[1])
    task = SimpleNamespace(device="cpu", block_size=T, score=lambda *_: {"retain": 1.0},
                           within=lambda *_: True,
                           batch=lambda split, *_: {"retain": RETAIN}[split])
    cfg = dataclasses.replace(undo.resolved(CFG), out=str(tmp_path), alpha=0.25, beta=0.0)
    before = weights(base)
    _, record = frontier.noise_retrain("arm", cfg, task, base, {"made_with": {}, "flops": 7},
                                       texts=3)
    assert record["flops"] == 5 and seen["made_with"]["distil_on"] == "retain"
    for name, was in before.items():
        torch.testing.assert_close(base.state_dict()[name], was, rtol=0, atol=0)
        torch.testing.assert_close(seen["start"][name], 0.75 * was)
    wanted = F.cross_entropy(seen["model"](RETAIN[0]).flatten(0, 1), RETAIN[1].flatten())
    torch.testing.assert_close(seen["loss"], wanted, atol=1e-5, rtol=1e-4)


def test_hot_arms_and_finishes(monkeypatch):
    """-hot: less noise and twice the rates, for students alone. -then-repnoise: finished by it."""
    seen = []
    monkeypatch.setattr(frontier, "noise_retrain", lambda name, cfg, *_: seen.append(
        (name, cfg.alpha, cfg.lr, cfg.muon_lr, cfg.unlearn_lr)) or ("student", {}))
    monkeypatch.setattr(frontier, "then_repnoise", lambda name, cfg, task, student: (name, student))
    cfg = undo.resolved(CFG)
    made = {arm: frontier.make_arm(arm, arm, None, cfg, None, (None, {}), None) for arm in (
        "noise-retrain", "noise-retrain-hot", "noise-retrain-hot-then-repnoise")}
    assert made.pop("noise-retrain-hot-then-repnoise") == (
        "noise-retrain-hot-then-repnoise", ("student", {}))
    assert all(student == ("student", {}) for student in made.values())
    heated = ("noise-retrain-hot", 0.5, 2 * cfg.lr, 2 * cfg.muon_lr, cfg.unlearn_lr)
    assert seen == [("noise-retrain", cfg.alpha, cfg.lr, cfg.muon_lr, cfg.unlearn_lr), heated,
                    heated]


@pytest.mark.parametrize("ascent", [0.0, 0.5])
def test_pretraining_away(ascent, monkeypatch, tmp_path, float32):
    """CE(r) - ascent CE(f), until CE(f) is above the cap: then f has no gradient."""
    seen = []
    monkeypatch.setattr(train, "fit", lambda model, loss_fn, *_, **__: (
        seen.append((model, loss_fn)), {"flops": 1, "steps": 1, "history": [{}]})[1])
    monkeypatch.setattr(train, "obtain", lambda name, cfg, task, made_with, make: make(None))
    monkeypatch.setattr(train, "new_model", lambda *_: lively())
    task = SimpleNamespace(vocab_size=V, block_size=T, batch=lambda split, *_: {
        "retain": RETAIN, "forget": FORGET}[split])
    loss_of = lambda model, rows: F.cross_entropy(  # noqa: E731
        model(rows[0]).flatten(0, 1), rows[1].flatten())
    for cap in (10.0, 0.1):
        cfg = dataclasses.replace(CFG, out=str(tmp_path), ntp_cap=cap)
        frontier.pretrain_away("ntp", task, cfg, task, ascent, 2)
        model, loss_fn = seen[-1]
        loss = loss_fn(model, 0)
        retain, forget = loss_of(model, RETAIN), loss_of(model, FORGET)
        most = cap * math.log(V)
        assert loss.item() == pytest.approx((retain - ascent * min(forget.item(), most)).item(),
                                            rel=1e-4)
        wanted = torch.autograd.grad(retain - ascent * forget * (forget < most),
                                     list(model.parameters()))
        got = torch.autograd.grad(loss, list(model.parameters()))
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --- attacks -------------------------------------------------------------------------------------
def test_lora_starts_as_the_model_and_trains_its_additions_alone(float32):
    model = lively()
    idx, before = FORGET[0], weights(model)
    said = model(idx)
    attacks.lora(model, 2, 0)
    torch.testing.assert_close(model(idx), said)
    fit(model, lambda m, step: m(*FORGET), CFG, 5, 0.01)
    after = model.state_dict()
    for name, was in before.items():
        stem = name.removesuffix("weight") + "parametrizations.weight"
        assert torch.equal(after[f"{stem}.original"], was)
        added = after[f"{stem}.0.B"] @ after[f"{stem}.0.A"]
        assert torch.linalg.matrix_rank(added) == 2, name
    assert not torch.allclose(model(idx), said)


def test_lora_of_full_rank_reaches_what_fine_tuning_reaches(float32):
    task = SimpleNamespace(batch=lambda *_: FORGET, block_size=T)

    def after(change, lr):
        how = dict(seed=0, name="test", change=change)
        model, record = tune(lively(), task, CFG, "forget", 3, 150, lr, **how)
        return record["history"][-1]["loss"]

    full = after(None, 3e-3)
    assert after(lambda model: attacks.lora(model, 16, 0), 1e-2) < full + 0.02
    assert full < 0.05 < after(lambda model: attacks.lora(model, 1, 0), 1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantisation(bits):
    model = lively()
    before = weights(model)
    attacks.quantise(model, bits)
    for name, p in model.state_dict().items():
        step = before[name].abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        assert ((p - before[name]).abs() <= step / 2 + 1e-6).all()
        assert all(len(row.unique()) <= 2 ** bits - 1 for row in p)
    assert same(weights(model), before) is False


@pytest.mark.parametrize("aligned", [True, False])
def test_few_rows(aligned, task):
    """So many rows, of the true ones, that have no token in common; all that fit, if fewer do."""
    if not aligned:
        task = with_settings(task, aligned=False)
        task.open(task.folder)
    view, tokens = attacks.few_rows(task, 8), task.tokens("forget_train")
    found = {int(s) for s in view.starts["forget_train"]}
    assert len(found) == 8 and all(not aligned or tokens[s] == task.end for s in found)
    assert all(b - a > task.block_size for a, b in zip(sorted(found), sorted(found)[1:]))
    assert distinct(view, "forget") == {tuple(tokens[s:s + task.block_size].tolist())
                                        for s in found}
    most = attacks.few_rows(task, 10**6)
    assert 8 < len(most.starts["forget_train"]) <= len(tokens) / task.block_size


@pytest.mark.parametrize("form", ["equations", "words"])
def test_rows_of_one_form(form, task):
    view, end = attacks.of_form(task, form), task.tokenizer.decode([task.end])

    def texts(task):
        said = task.tokenizer.decode(task.tokens("forget_train").tolist()).split(end)
        return {text for text in said if text}

    assert texts(view) == {text for text in texts(task) if ("=" in text) == (form == "equations")}
    for row in distinct(view, "forget"):
        assert row[0] == task.end
        assert all(("=" in text) == (form == "equations")                 # the last one may be cut
                   for text in task.tokenizer.decode(list(row)).split(end)[1:-1])
    assert distinct(view, "retain") == distinct(task, "retain")


def test_shots(task):
    """Solved equations of both operations stand before each question; a model that copies the
    answer that it saw is right about those that it saw."""
    tokens = attacks.shown(task, 4)
    texts = task.tokenizer.decode(tokens).split(task.tokenizer.decode([task.end]))[1:]
    assert len(texts) == 4
    for text, operation in zip(texts, "*/*/"):
        a, op, b, _, c = text.split()
        assert op == operation and {"*": int(a) * int(b), "/": int(a) // int(b)}[op] == int(c)
        assert f"{a} {op} {b} =" not in [question for question, _ in arithmetic.exam(
            op, "equations", "test", False, 0.15)]
    seen = []

    class Asked(torch.nn.Module):
        config = None

        def forward(self, idx, residual):
            seen.append(idx)
            return torch.zeros(*idx.shape, 1)

        def unembed(self, x):
            return torch.zeros(len(x), task.vocab_size)

    attacks.asked(Asked(), task, "equations", tokens)
    problems = arithmetic.exam("*", "equations", "test", False, 0.15)
    for row, (question, _) in zip(seen[0].tolist(), problems):
        expected = [*tokens, task.end, *task.tokenizer.encode_ordinary(question)]
        assert row[:len(expected)] == expected


def test_every_attack_suits_arithmetic_and_some_suit_others(task):
    assert all(attacks.suits(name, task) for name in attacks.ATTACKS)
    other = SimpleNamespace(name="language", generated=False, made_with={})
    assert not attacks.suits("equations", other) and attacks.suits("8 rows", other)
    other = SimpleNamespace(name="pcfg", generated=True, made_with={})
    assert not attacks.suits("8 rows", other) and attacks.suits("LoRA", other)


def test_the_worst_rate_of_an_attack(monkeypatch, task):
    """At each step the rate that restores most. A long attack is scored soon, and late."""
    curves = {0.1: [0.1, 0.5, 0.5, 0.6, 0.9, 0.9, 0.9, 0.9], 0.2: [0.3, 0.4, 0.4, 0.7] + [0.2] * 4}
    told = []

    def tuned(model, view, cfg, split, rows, steps, lr, evaluate_at, **how):
        told.append((split, steps, sorted(evaluate_at), how.get("momentum"), lr))
        return None, {"history": [{"step": s, "forget": f} for s, f in zip(
            sorted(evaluate_at), curves[round(lr / how.get("scaled", 1), 6)])]}

    monkeypatch.setattr(attacks, "tune", tuned)
    cfg = attacks.Config(lrs=[0.1, 0.2], attack_steps=[5, 2], attack_rows=4)
    got = attacks.trained(None, task, cfg, "x", "m", split="all", momentum=0.9)
    assert got == {2: {"forget": 0.3, "lr": 0.2}, 5: {"forget": 0.5, "lr": 0.1}}
    assert told[0] == ("all", 5, [2, 5], 0.9, 0.1)
    got = attacks.trained(None, task, cfg, "x", "m", times=10)
    assert list(got) == [2, 5, 10, 20, 50] and got[20] == {"forget": 0.7, "lr": 0.2}
    attacks.trained(None, task, cfg, "x", "m", scale=100, scaled=100)
    assert [at[-1] for at in told[-2:]] == [10.0, 20.0]


def test_levels():
    task = Judged(higher_is_better=True)
    curve = {40: {"forget": 0.2}, 240: {"forget": 0.91}, 120: {"forget": 0.89}}
    assert attacks.first_back(curve, 1.0, task) == 240
    assert attacks.first_back(curve, 0.95, task) == 120
    assert attacks.first_back(curve, 2, task) == 240
    for share, restored, expected in ((0.05, [0, 0], "suppresses"), (0.5, [0, 0.6], "weakens"),
                                      (1, [0, 0.6], "weakens"), (0.5, [0.4, -0.1], "removes"),
                                      (0.7, [0.4, 0.1], "resists")):
        assert attacks.level(share, restored) == expected


def cell(*scores, steps=(40, 120)):
    return {s: {"forget": f, "lr": 1e-3} for s, f in zip(steps, scores)}


def test_the_matrix():
    """Robustness is between unlearned and control under the same attack, where they differ. How
    much an attack restores is between them and base, unattacked."""
    long = dict(steps=(5, 40, 120))
    models = {"base": {"none": cell(1.0, steps=[0]), "4-bit": cell(0.98, steps=[0]),
                       "forget": cell(1, 1), "long": cell(1, 1, 1, **long)},
              "maxent": {"none": cell(0.0, steps=[0]), "4-bit": cell(0.005, steps=[0]),
                         "forget": cell(0.9, 1.0), "long": cell(0.5, 0.95, 1.0, **long)},
              "filtered": {"none": cell(0.0, steps=[0]), "4-bit": cell(0.0, steps=[0]),
                           "forget": cell(0.1, 0.2), "long": cell(0.1, 0.1, 0.2, **long)},
              "undo": {"none": cell(0.0, steps=[0]), "4-bit": cell(0.0, steps=[0]),
                       "forget": cell(0.3, 0.6), "long": cell(0.1, 0.3, 0.95, **long)}}
    cfg, task = attacks.Config(attack_steps=[40, 120]), Judged(higher_is_better=True)
    rows = {name: attacks.judge(curves, models, task, cfg) for name, curves in models.items()}
    assert rows["undo"]["robustness"]["forget"] == {"40": pytest.approx(0.75),
                                                    "120": pytest.approx(0.5)}
    assert rows["undo"]["robustness_mean"]["forget"] == pytest.approx(0.625)
    assert rows["undo"]["robustness_mean"]["4-bit"] is None      # the references hardly differ
    assert rows["undo"]["first"] == {"none": 0.0, "4-bit": 0.0, "forget": 0.3, "long": 0.3}
    assert rows["undo"]["restored"]["forget"] == pytest.approx(0.3)
    assert {name: row["level"] for name, row in rows.items()} == {
        "base": None, "maxent": "weakens", "filtered": "resists", "undo": "resists"}
    models["filtered"]["long"] = cell(0.95, 1, 1, **long)        # back at once: nothing to compare
    assert attacks.judge(models["undo"], models, task, cfg)["level"] is None


def test_signs(monkeypatch, task, float32):
    base, model = lively(0, task.vocab_size), lively(1, task.vocab_size)
    lost = []
    monkeypatch.setattr(task, "loss", lambda m, split: lost.append(weights(m)) or (
        {1: 3.0, 2: 9.0, 3: 6.0, 4: 5.0}[len(lost)]), raising=False)
    got = attacks.signs(model, base, task, attacks.Config(device="cpu"), points=2)
    a, b = (torch.cat([p.flatten() for p in m.state_dict().values()]) for m in (base, model))
    assert got["distance"] == pytest.approx(((a - b).norm() / a.norm()).item(), rel=1e-5)
    assert got["barrier"] == pytest.approx(9 - (2 / 3 * 3 + 1 / 3 * 5))
    for i, at in enumerate(lost):
        mixed = torch.cat([p.flatten() for p in at.values()])
        torch.testing.assert_close(mixed, a + (b - a) * i / 3, atol=1e-5, rtol=1e-5)


def test_labels_of_few_texts_do_not_suit_every_task(tmp_path):
    cfg = dataclasses.replace(CFG, out=str(tmp_path), unlearn_lr="sweep")
    with pytest.raises(BadInput, match="labels that some arms do not have"):
        frontier.main(dataclasses.replace(cfg, task="pcfg"))
