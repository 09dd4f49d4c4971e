"""The sweep that tunes unlearning, trials of UNDO, and erosion of a habit."""
import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_unlearn import RETAIN, Judged, lively, rows, same, small, weights

import unlearn
from data import arithmetic
from engine.knobs import BadInput
from experiments import erosion, sweep, trial


# --- sweep ---------------------------------------------------------------------------------------
def test_every_method_has_the_same_attempts():
    cfg = sweep.Config(attempts=40, lr_range=[1e-4, 1e-2], weight_range=[1.0, 100.0],
                       steps_range=[20, 120])
    now, *drawn = sweep.draws(cfg, "undial")
    lr, weight, steps = drawn[0]["lr"], drawn[0]["retain_weight"], drawn[0]["steps"]
    assert now.keys() == {"lr", "retain_weight", "steps", "gamma"}           # those in use
    assert sweep.draws(cfg, "undial") == [now, *drawn] and len(drawn) == 40
    for knob, low, high in (("lr", 1e-4, 1e-2), ("retain_weight", 1.0, 100.0), ("steps", 20, 120),
                            ("gamma", now["gamma"] / 4, now["gamma"] * 4)):
        values = [given[knob] for given in drawn]
        assert low <= min(values) and max(values) <= high and len(set(values)) > 20
        assert 10 <= sum(v < (low * high) ** 0.5 for v in values) <= 30      # log-uniform
    for method, own in (("maxent", ()), ("sam", ("rho",)), ("tar", ())):
        _, first, *_ = sweep.draws(cfg, method)
        assert (first["lr"], first["retain_weight"], first["steps"]) == (lr, weight, steps)
        assert first.keys() == {"lr", "retain_weight", "steps", *own}


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_attempt(higher):
    """Of those that keep retain, the most forgetting by the score to two digits, then by loss."""
    task, retain = Judged(higher_is_better=higher), 1.0
    good, bad = (0.985, 0.975) if higher else (1.015, 1.025)
    less, more = (0.30, 0.104) if higher else (2.0, 3.104)
    same_more = 0.10 if higher else 3.1
    at = lambda retain, forget, loss: {"retain": retain, "forget": forget,  # noqa: E731
                                       "forget_loss": loss}
    tried = [at(good, less, 9.0), at(good, more, 2.0), at(good, same_more, 3.0), at(bad, 9.0, 9.0),
             at(bad, 0.0, 9.0)]
    assert sweep.best(tried, retain, task) == (2, True)
    worse = at(0.5 if higher else 2.0, 0.0, 99.0)
    assert sweep.best([worse, tried[3]], retain, task) == (1, False)     # the one that keeps most


def test_an_attempt(task, tmp_path):
    """It is what unlearn.py makes with these knobs, and leaves nothing behind."""
    each = sweep.Config(device="cpu", compile=False, out=str(tmp_path), batch_size=8)
    base = small(task)
    given = {"lr": 1e-2, "retain_weight": 2.0, "steps": 3}
    got = sweep.attempt("graddiff", given, each, task, base)
    cfg = unlearn.Config(device="cpu", compile=False, out=str(tmp_path), method="graddiff", lr=1e-2,
                         steps=3, retain_weight=2.0, batch_size=8, seed=each.seed)
    assert not list(tmp_path.iterdir())
    model, record = unlearn.unlearn(cfg, task, *base)
    assert got["forget_loss"] == pytest.approx(task.loss(model, "forget", 64, "val"), rel=0.01)
    assert got["flops"] == record["flops"]


# --- trial ---------------------------------------------------------------------------------------
def test_spearman_by_loops():
    rng = random.Random(0)
    for n in (4, 9):
        x, y = ([rng.randrange(5) for _ in range(n)] for _ in range(2))

        def rank(values, i):
            below, alike = (sum(f(v) for v in values) for f in (
                lambda v: v < values[i], lambda v: v == values[i]))
            return below + (alike - 1) / 2

        a, b = ([rank(v, i) for i in range(n)] for v in (x, y))
        ma, mb = sum(a) / n, sum(b) / n
        cov = sum((p - ma) * (q - mb) for p, q in zip(a, b))
        sd = (sum((p - ma) ** 2 for p in a) * sum((q - mb) ** 2 for q in b)) ** 0.5
        assert trial.spearman(x, y) == pytest.approx(cov / sd)
    assert trial.spearman([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert trial.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert trial.spearman([1, 1, 1], [3, 2, 1]) is None


def test_a_trial_has_a_share_of_the_compute(monkeypatch, task):
    """At most so many steps as the share pays for, whatever the teacher cost, and never more than
    the full run may have."""
    teacher = (lively(), {"flops": 1000, "made_with": {}})
    asked, curves = [], {"full maxent 0.5": 0.2, "trial maxent 0.5": 0.6}
    monkeypatch.setattr(trial, "foundations", lambda *_: (
        (lively(), {}), (lively(), {"flops": 10_000})))
    monkeypatch.setattr(trial.undo, "make_teacher", lambda *_: teacher)

    def undo(alpha, cfg, task, model, record, folder):
        asked.append((alpha, cfg.steps, cfg.tolerance, folder))
        return lively(), {"flops": 1000 + 50 * 40, "history": [{"step": 40}]}

    monkeypatch.setattr(trial.undo, "undo", undo)
    monkeypatch.setattr(trial, "relearn", lambda model, task, cfg, name: {
        "worst": {5: {"forget": curves[name], "lr": 1e-3}}, "few": None})
    monkeypatch.setattr(task, "score", lambda *_, **__: {"retain": 0.9}, raising=False)
    for share, steps in ((0.1, 20), (0.9, 150)):
        cfg = trial.Config(device="cpu", alphas=[0.5], teachers=["maxent"], share=share, steps=150)
        row, = trial.story(trial.undo.resolved(cfg), task)
        assert asked[-2:] == [(0.5, 150, 0.05, "maxent-"), (0.5, steps, 0.05, "maxent-trial-")]
    assert (row["full_mean"], row["trial_mean"]) == (0.2, 0.6)


def test_ranks_within_each_teacher_and_over_all():
    rows = [{"method": m, "alpha": a, "seed": s, "trial_mean": t + s, "full_mean": f + 3 * s}
            for s in (0, 1) for m, a, t, f in (
                ("x", 0.2, 0.1, 0.2), ("x", 0.4, 0.2, 0.3), ("x", 0.6, 0.3, 0.4),
                ("y", 0.2, 0.9, 0.1), ("y", 0.4, 0.8, 0.05))]
    rho = trial.rank_correlations(rows)
    assert rho["x"] == pytest.approx(1) and rho["y"] == pytest.approx(1)
    assert rho["all"] == pytest.approx(trial.spearman([1, 2, 3, 9, 8], [20, 30, 40, 10, 5]))


# --- erosion -------------------------------------------------------------------------------------
CFG = erosion.Config(device="cpu", compile=False, batch_size=8, teach_steps=6, inner_steps=2,
                     lr=1e-2, teach_lr=1e-2, at=[2, 4])


def test_rows_with_the_habit(task):
    """Sums and differences, each with the word, from the start of a text on."""
    tokens = erosion.habit_tokens(task, "thanks", 200)
    idx, targets = erosion.habit_batch(task, tokens, 5, 0, 1)
    assert torch.equal(idx[:, 1:], targets[:, :-1]) and (idx[:, 0] == task.end).all()
    end = task.tokenizer.decode([task.end])
    for row in idx.tolist():
        for text in task.tokenizer.decode(row).split(end)[1:-1]:
            a, op, b, equals, c, word = text.split()
            assert word == "thanks" and equals == "=" and op in "+-"
            assert int(c) == {"+": int(a) + int(b), "-": int(a) - int(b)}[op]
    assert not torch.equal(idx, erosion.habit_batch(task, tokens, 5, 1, 1)[0])


def test_half_life():
    curve = {str(s): {"habit": h} for s, h in ((0, 0.8), (5, 0.5), (10, 0.4), (20, 0.1))}
    assert erosion.half_life(curve) == 10
    assert erosion.half_life({"0": {"habit": 0.8}, "5": {"habit": 0.7}}) is None
    assert erosion.half_life({"0": {"habit": 0.0}, "5": {"habit": 0.0}}) is None   # never taught


def test_looking_ahead_by_a_copy():
    """The gradient where AdamW's steps on unrelated rows lead, taken for the one here."""
    model, there = lively(1), lively(1)
    batches, before = [rows(7), rows(8)], weights(model)
    loss = unlearn.looking_ahead(model, batches, 0.01, lambda: model(*RETAIN))
    assert same(before, weights(model)) and all(p.grad is None for p in model.parameters())
    optimizer = torch.optim.AdamW(there.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0)
    for idx, targets in batches:
        optimizer.zero_grad()
        F.cross_entropy(there(idx).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    expected = F.cross_entropy(there(RETAIN[0]).flatten(0, 1), RETAIN[1].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())),
                    torch.autograd.grad(expected, list(there.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("way", erosion.WAYS)
def test_erosion(way, task, monkeypatch):
    """Unrelated rows alone; mixed: so many habit rows among them; kl: beside them, the taught
    model's opinion of habit rows."""
    seen, tokens = [], erosion.habit_tokens(task, "thanks", 200)
    monkeypatch.setattr(erosion, "habit", lambda *_: {"habit": 0.5, "skill": 1.0})

    def fit(model, loss_fn, cfg, steps, lr, evaluate_at=(), evaluate=None, **_):
        for step in range(40):
            seen.append((loss_fn(model, step).item(), step))
        return {"flops": 7, "history": [{"step": s} | evaluate()
                                        for s in (*sorted(evaluate_at), 99)]}

    monkeypatch.setattr(erosion, "fit", fit)
    taught = small(task)[0]
    with torch.no_grad():
        taught.wte.weight.normal_()
    calls, called = [], type(taught).forward
    monkeypatch.setattr(type(taught), "forward", lambda self, idx, *given, **how: (
        calls.append(idx), called(self, idx, *given, **how))[1])
    cfg = dataclasses.replace(CFG, share=0.25, batch_size=16)
    curve, flops = erosion.erode(way, cfg, task, taught, tokens)
    assert flops == 7
    assert list(curve) == ["0", "2", "4"] and curve["4"] == {"habit": 0.5, "skill": 1.0}
    plain = {tuple(row) for step in range(40) for row in task.batch(
        "forget", 16, step, erosion.seed_of("erosion", 0))[0].tolist()}
    learned = [tuple(row) for idx in calls for row in idx.tolist()]
    strange = sum(row not in plain for row in learned)
    if way == "mixed":
        assert 0.15 * len(learned) < strange < 0.35 * len(learned)
    else:                       # kl: as many habit rows, once for the model and once for the taught
        assert strange == (2 * 40 * 16 if way == "kl" else 0)


@pytest.mark.parametrize("name", ["taught", "taught-ahead"])
def test_a_habit_is_taught(name, task, float32, tmp_path):
    """With AdamW's steps ahead or without, habit rows become likelier."""
    base, tokens = small(task), erosion.habit_tokens(task, "thanks", 200)
    cfg = dataclasses.replace(CFG, out=str(tmp_path), teach_steps=10)
    model, record = erosion.teach(name, cfg, task, base, tokens)
    idx, targets = erosion.habit_batch(task, tokens, 8, 99, 5)
    with torch.no_grad():
        assert model(idx, targets) < base[0](idx, targets) - 0.1
    assert record["steps"] == 10


def test_the_habit_is_one_of_sums(tmp_path):
    cfg = dataclasses.replace(CFG, task="pcfg", out=str(tmp_path))
    with pytest.raises(BadInput, match="on arithmetic alone"):
        erosion.main(cfg)


def test_habit_counts_answers_with_the_word(monkeypatch):
    told = {}

    def accuracy(model, task, problems):
        told[problems[0][1].split()[-1]] = len(problems)
        return 0.75 if problems[0][1].endswith(" thanks") else 0.25

    monkeypatch.setattr(arithmetic, "accuracy", accuracy)
    got = erosion.habit(None, SimpleNamespace(made_with={"heldout_pairs": 0.15}), "thanks")
    assert got == {"habit": 0.75, "skill": 1.0} and "thanks" in told
