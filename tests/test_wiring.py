"""Stories, watched: who is trained from whom, on which rows, beside whom, and is judged on what.

Almost nothing is trained here: fit() asks for one loss, marks the model as trained and judges it.
"""
import json
import random
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import eval as judges
import recontext
import route
import train
import undo
import unlearn
from data import arithmetic, gaming, pcfg
from data.gridworld import CELLS, DIAMOND, GHOST, NOTHING, PAIRS, STATES, Gridworld
from data.tokenizer import END
from engine.streams import stream
from experiments import examine, gridworld, revive_hack, wrapper
from model import GPT, GPTConfig, write_model

TINY = dict(device="cpu", compile=False, n_layer=1, n_head=2, n_embd=8)
ATTACK = dict(**TINY, attack="forget", lrs=[1e-3], attack_steps=[1], attack_rows=4, attack_seeds=1)
ROUTE = route.Config(**ATTACK, task="language", steps=1, batch_size=512, lr=1e-3, muon_lr=0.0,
                     coherence_steps=1)
OVERSEE = gridworld.Config(device="cpu", compile=False, steps=1, batch_size=512, lr=1e-3, width=8)
STRINGS, GAME, WORLD = data.load("pcfg", block_size=14), data.load("gaming"), Gridworld()
BOTH, RECORD, equal = ("retain", "forget"), {"made_with": {}, "flops": 0}, torch.equal
VAL = dict(what="score", part="val")


def lively(task, seed=0):
    """A model all of whose weights are random."""
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 8))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) / 3
    return model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def worth(model):
    """What the watched judge says of a model: another number for each that was trained."""
    return 1 / (0.01 + abs(model.wte.weight[0, 0].item()))


def rows(*splits, what="rows", part="train"):
    return {(what, split, part) for split in splits}


@pytest.fixture
def watch(monkeypatch):
    """fits: of every call of fit() the model, its weights at start and end, frozen, stop, the name
    of what it makes (of), its loss, the others that this called, the rows learned from; made: the
    last by name; models: all that were obtained; revived: (model, goal); asked: what rows and
    scores, of which task, split, part, model, in which fit; called: (model, idx, residual, cache);
    disk: {} where a model that was made is read the next time, None where it is made again
    """
    it = SimpleNamespace(fits=[], models={}, made={}, asked=[], called=[], revived=[],
                         disk=None)
    now, residuals, whole = SimpleNamespace(fit=None, name=None), GPT.residuals, data.Task.undivided
    it.of = lambda fit: {(ask.what, ask.split, ask.part) for ask in it.asked if ask.fit is fit}

    def watched(model, idx, cache=None, hook=None):
        found = residuals(model, idx, cache, hook)
        if found[-1].requires_grad:
            found[-1].retain_grad()
        it.called.append((model, idx, found[-1], cache))
        return found

    def note(what, task, split, part, model=None):
        it.asked.append(SimpleNamespace(what=what, task=task, split=split, part=part, fit=now.fit,
                                        model=model, weights=model and weights(model)))

    def score(task, model, domains=BOTH, part="test", finer=False):
        for domain in domains:
            note("score", task, domain, part, model)
        return dict.fromkeys([*domains, *["spurious"] * finer], worth(model))

    def revive(model, task, cfg, goal, name="model"):
        it.revived.append((model, goal))
        return {"base": 0, "hider": 50}.get(name, 300), {0: worth(model)}

    def obtain(name, cfg, task, made_with, make, quiet=False):
        if it.disk and name in it.disk:
            return it.disk[name]
        now.name = name
        it.models[name], record = make(None)
        now.name = None
        found = it.models[name], {"made_with": made_with} | record
        if it.disk is not None:
            it.disk[name] = found
        return found

    def fit(model, loss_fn, cfg, steps, *rates, frozen=(), evaluate=None, stop=None,
            after_backward=None, after_step=None, **how):
        now.fit = it.made[now.name] = this = SimpleNamespace(
            model=model, start=weights(model), frozen=[*frozen], stop=stop, of=now.name)
        it.fits.append(this)
        before, loss = len(it.called), loss_fn(model, 0)
        loss.backward()
        this.loss, called = loss.item(), it.called[before:]
        this.others = [other for other, *_ in called if other is not model]
        assert all(p.grad is None for other in this.others for p in other.parameters())   # frozen
        this.learned = [idx for _, idx, x, _ in called if x.grad is not None]
        if after_backward:
            after_backward()
        model.zero_grad()
        with torch.no_grad():
            model.wte.weight[0, 0] = len(it.fits) + 10
            if after_step:
                after_step()
            found = evaluate() if evaluate else {}
        this.end, now.fit = weights(model), None
        return {"steps": steps, "skipped": 0, "flops": 1, "seconds": 0.0,
                "history": [{"step": 1, "loss": 0.0, "flops": 1} | found]}

    own = {"fit": fit, "obtain": obtain, "revive": revive,
           "probe": lambda model, *given: ([worth(model)], 0.5)}
    for module in (train, judges, unlearn, undo, route, recontext, examine, wrapper, revive_hack):
        for name in own.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, own[name])
    for owner, name, spy in (
            (GPT, "residuals", watched), (data.Task, "score", score),
            (data.Task, "undivided", lambda task, split, size, step, seed, part: (
                note("rows", task, split, part), whole(task, split, size, step, seed, part))[1]),
            (data.Task, "loss", lambda task, model, domain, rows=128, part="test", **how: score(
                task, model, (domain,), part)[domain])):
        monkeypatch.setattr(owner, name, spy)
    monkeypatch.setitem(sys.modules, "matplotlib", None)                          # no pictures
    return it


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    return data.load("language", folder=tmp_path_factory.mktemp("data"), stories=100)


def test_the_story_of_undo(watch):
    """base is unlearned; students start from that teacher, damaged, or from nothing, and imitate it
    alone; the oracle imitates filtered. All are attacked and judged on what nobody looked at."""
    cfg = undo.Config(task="pcfg", **ATTACK, base_steps=2, filtered_steps=2, alphas=[0.25], beta=0,
                      method="graddiff", unlearn_lr=1e-3, unlearn_steps=1, batch_size=4, lr=1e-3,
                      muon_lr=0.0, check_every=1, steps=4, distil_on="all")
    watch.disk = {}
    *_, rows_made = undo.story(cfg, STRINGS)
    told, made = {row["model"]: row for row in rows_made}, watch.made
    names = ["base", "filtered", "graddiff", "oracle", "undo-0.25", "distilled"]
    base, filtered, teacher, *_ = models = [watch.models[name] for name in names]
    some, two = rows("retain", **VAL), rows(*BOTH) | rows(*BOTH, **VAL)
    for name, asked, others in zip(
            names, [rows("all") | some, rows("retain") | some, two, two] + 2 * [rows("all") | some],
            ([], [], [], [filtered] * 2, [teacher], [teacher])):
        assert made[name].model is watch.models[name] and watch.of(made[name]) == asked, name
        assert made[name].others == others and all(m in made[name].frozen for m in others), name
    assert all(equal(made[name].start, weights(base)) for name in ("graddiff", "oracle"))
    torch.testing.assert_close(made["undo-0.25"].start, 0.75 * weights(teacher))
    assert all(abs(torch.stack((made["distilled"].start, weights(model))).corrcoef()[0, 1]) < 0.5
               for model in models[:-1])
    for name in names[-2:]:
        goal = (1 - cfg.tolerance) * worth(teacher)
        assert [made[name].stop({"retain": goal + d}) for d in (1e-6, -1e-6)] == [True, False]
    for name, model in zip(names, models):                # who is judged, and who is attacked
        attack, = [it for it in watch.fits if not it.of and equal(it.start, weights(model))]
        assert {(what, part) for what, _, part in watch.of(attack)} == {
            ("rows", "train"), ("score", "test")} and watch.of(attack) > rows("forget")
        assert attack.model is not model and told[name]["relearned"] == {"1": worth(attack.model)}
        assert told[name]["retain"] == told[name]["forget"] == worth(model)
    asked = [(ask.model, ask.part) for ask in watch.asked if not ask.fit and ask.split == "retain"]
    assert [ask for ask in asked if ask[1] == "val"] == 2 * [(teacher, "val")]  # students' goals
    order = [base, teacher, filtered, models[4], models[3], models[5]]              # as they come
    assert [ask for ask in asked if ask[1] == "test"] == [(model, "test") for model in order]
    assert told["graddiff"]["robustness_mean"] == 0 and told["filtered"]["robustness_mean"] == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_spent_until_the_first_time(sign):
    """What filtered had cost when it first was as good, though it fell back; all if never."""
    gold = {"flops": 50, "history": [{"retain": sign * score, "flops": flops} for score, flops
                                     in ((0.5, 10), (0.9, 20), (0.6, 30), (0.95, 40))]}
    for score, flops in ((0.8, 20), (0.4, 10), (0.93, 40), (0.99, 50)):
        task = SimpleNamespace(higher_is_better=sign > 0)
        task.within = lambda *given: data.Task.within(task, *given)
        assert undo.spent_until(sign * score, gold, task) == flops


@pytest.mark.parametrize("method, counts, others", [
    ("maxent", ["forget"], []), ("graddiff", ["forget"], []), ("finetune", ["retain"], []),
    ("oracle", [*BOTH], ["filtered"]), *((name, ["forget"], ["base"]) for name in (
        "rmu", "undial", "tar")), *((name, ["forget"], []) for name in (
            "simnpo", "sam", "repnoise"))])
def test_rows_to_forget_go_to_the_forget_term(watch, monkeypatch, method, counts, others):
    """Where the retain term weighs nothing, a loss is a function of the rows to forget alone;
    finetune's is one of those to retain. (npo's is the same for all rows at base.) A sweep
    starts from base every time and chooses by val alone."""
    models, whole = {"base": lively(STRINGS), "filtered": lively(STRINGS, 1)}, data.Task.undivided
    knobs = dict(**ATTACK, method=method, steps=1, batch_size=8, retain_weight=0.0, after="",
                 inner_steps=1)
    monkeypatch.setattr(data.Task, "undivided", lambda task, split, size, step, seed, part: whole(
        task, split, size, step + 5 * (split == other), seed, part))
    for other, lr in ((None, "sweep"), ("retain", 1e-3), ("forget", 1e-3), (None, 1e-3)):
        watch.asked.clear()
        cfg = unlearn.Config(task="pcfg", **knobs, lr=lr, sweep=[1e-3, 1e-2])
        unlearn.unlearn(cfg, STRINGS, models["base"], RECORD, models["filtered"], RECORD)
        assert watch.of(watch.fits[-1]) == rows(*BOTH) | rows(*BOTH, **VAL)
        assert watch.of(None) == (rows(*BOTH, **VAL) if lr == "sweep" else set())
        assert {*watch.fits[-1].others} == {models[name] for name in others}
    assert all(equal(it.start, weights(models["base"])) for it in watch.fits)
    *_, retain, forget, plain = (it.loss for it in watch.fits)
    assert [split for split, loss in zip(BOTH, (retain, forget)) if loss != plain] == counts


def test_ablated_then_mended_then_attacked(watch, stories):
    """What is left without the forget part is mended on rows labelled retain, and that last model
    is attacked. All are judged by the truth. Methods learn from what the labels say."""
    task = stories.with_rows_of(24)
    view, model, left = task.labelled(0.5, 0.25, 0.5), lively(task), lively(task)
    left.blocks[0].mlp.up.weight.data[-4:] = left.blocks[0].mlp.down.weight.data[:, -4:] = 0
    whole = weights(model)
    row = route.judge(model, task, view, ROUTE, "era", 0.5, (0, 4), None, RECORD)
    mend, attack = watch.fits
    assert equal(mend.start, weights(left)) and equal(attack.start, mend.end)
    assert equal(weights(watch.models["route-era-50-ablated"]), mend.end)
    assert row["relearned"] == {"1": worth(attack.model)}
    tests = [ask.weights for ask in watch.asked if ask.part == "test" and not ask.fit]
    assert [[equal(a, b) for b in (whole, mend.start, mend.end)] for a in tests] == [
        [i // 4 == k for k in range(3)] for i in range(12)]
    assert all((ask.task is view) == (ask.split == "sure") for ask in watch.asked)
    assert {(ask.what, ask.part) for ask in watch.asked if ask.task is view} == {
        ("rows", "train"), ("score", "val")}
    for method, splits in {"base": ["all"], "filtered": ["retain"], "demix": BOTH}.items():
        route.train_by(method, 0.5, view, ROUTE)
        assert watch.of(watch.fits[-1]) == rows(*splits) and watch.asked[-1].task is view


def test_posthoc_learns_by_labels_and_is_judged_by_truth(watch, stories):
    """Whatever trains or decides sees the labels; what is reported, and the attacker, the truth."""
    task = stories.with_rows_of(24)
    view, base = task.labelled(0.5, 0.25), lively(task)
    route.posthoc(0.5, task, view, ROUTE, (base, RECORD))
    assert [it.of for it in watch.fits if it.of] == [
        f"labels-50/{name}" for name in ("maxent", "graddiff", "rmu", "graddiff", "undo-0.6")]
    assert all(equal(watch.made[name].start, weights(base)) for name in [*watch.models][:3])
    assert watch.made["labels-50/undo-0.6"].others == [watch.models["labels-50/graddiff"]]
    for ask in watch.asked:                        # outside of fits, training rows calibrate logits
        judging = ask.part == "test" or (not ask.fit.of if ask.fit else ask.part == "train")
        assert ask.task is (task if judging and ask.split != "sure" else view), vars(ask)


@pytest.mark.parametrize("method", gridworld.OVERSEERS)
def test_overseers(method, monkeypatch):
    """Each learns from its own episodes by its own reward; its Diamond expert alone is deployed."""
    seen, loss = [], gridworld.Oversight.loss

    def fit(agent, loss_fn, *given, evaluate, **how):
        for step in range(3):
            loss_fn(agent, step)
        found = evaluate() | {"step": 3}
        for p in [*agent.gate.parameters(), *agent.ghost.parameters()] if agent.gate else ():
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        exact = WORLD.exact(agent.diamond(WORLD.planes).softmax(-1), 0.3)
        assert found == found | evaluate() and found["return"] == pytest.approx(exact, abs=1e-6)
        return {"history": [found]}

    monkeypatch.setitem(gridworld.PPO, "envs", 256)
    monkeypatch.setattr(gridworld, "fit", fit)
    monkeypatch.setattr(gridworld.Oversight, "loss", lambda run, agent, *given: (
        seen.append(given), loss(run, agent, *given))[1])
    gridworld.oversee(OVERSEE, WORLD, method, 0.3, 0)
    states, actions, _, _, returns, labels = (torch.cat(part) for part in zip(*seen))
    to = WORLD.step(states, actions)
    holds, overseen, last = WORLD.holds[to], WORLD.seen[to], WORLD.holds[to] != NOTHING
    feared = (holds == GHOST) & {"oracle": last, "filtering": last, "naive": overseen}.get(
        method, ~last)
    torch.testing.assert_close(returns[last], torch.where(feared, -1.0, 1.0)[last])
    assert equal(labels[last], (holds * overseen)[last]) and {DIAMOND, GHOST} <= {*labels.tolist()}
    for unseen in (labels == NOTHING, (holds == GHOST) & ~overseen):
        assert unseen.any() == (method != "filtering")


def test_gate_and_oversight_level():
    """One step downhill on episodes labelled Diamond opens the gate, on those labelled Ghost shuts
    it; unlike the experts it does not see who is overseen. At level 0 nobody is, at level 1 both
    are: there what a policy does elsewhere counts for nothing."""
    run = gridworld.Oversight("routed", WORLD, 0.5, 0, OVERSEE)
    agent, played = run.agent, run.rollout(torch.Generator().manual_seed(0))
    gate, expert = (x.view(4, -1) for x in (agent(WORLD.planes)[1], agent.diamond(WORLD.planes)))
    assert gate[0].std() > 0 and torch.allclose(gate, gate[0].expand(4, -1), atol=1e-7)
    assert not torch.allclose(expert, expert[0].expand(4, -1), atol=1e-5)
    for label, way in ((DIAMOND, -1), (GHOST, 1)):
        agent.zero_grad()
        run.loss(agent, *(part[played[-1] == label] for part in played)).backward()
        assert agent.gate[-1].bias.grad.sign() == way
    policy = torch.randn(2, STATES, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for level, pattern in ((0.0, 0), (1.0, 3)):
        mixed = torch.where((torch.arange(STATES) // (PAIRS * CELLS) == pattern)[:, None], *policy)
        own, other = (WORLD.exact(each, level) for each in policy)
        assert WORLD.exact(mixed, level) == pytest.approx(own, abs=1e-7) and abs(own - other) > 1e-5


def test_the_controls(watch, tmp_path):
    """The goal of revival is what the reference scores; the control is filtered, by whose steps
    others are measured. What is examined as a wrapper is base, fine-tuned. recontext.py's goal is
    the hack rate of standard training."""
    small = dict(**TINY, base_steps=2, filtered_steps=2, block_size=14, probe_rows=4, cut=[1],
                 draws=1, revive_steps=300, attack_rows=4, out=str(tmp_path))
    cfg = judges.Config.for_task("pcfg")(task="pcfg", model="hider", lrs=[1e-3], attack_steps=[1],
                                         **small)
    models = {name: lively(STRINGS, i) for i, name in enumerate(("base", "filtered", "hider"))}
    (tmp_path / "pcfg" / "low" / "seed0").mkdir(parents=True)
    for name, model in models.items():
        write_model(tmp_path / "pcfg" / "low" / "seed0" / f"{name}.pt", model, {
            "task": "pcfg", "data": STRINGS.data_id}, {"steps": 1, "flops": 1, "history": []})

    def told(story, name, *given):
        story(*given)
        revived, watch.revived[:] = [(worth(model), goal) for model, goal in watch.revived], []
        return json.loads((tmp_path / "pcfg" / f"{name}.json").read_text())["rows"], revived

    base, filtered, hider = map(worth, models.values())
    found, revived = told(judges.judge_revive, "revive", cfg, STRINGS, models["hider"])
    assert revived[:2] == [(hider, base), (filtered, base)] and len(revived) == 3
    assert [row["before"] for row in found[:2]] == [hider, filtered]
    tools = train.config_from(cfg, examine.Config, judges.Tools)
    found, revived = told(examine.main, "examine", tools)
    assert revived == [(base, base), (filtered, base), (hider, base)]
    assert [row["verdict"] for row in found] == ["has it", "removes", "hides"]
    shutil.rmtree(tmp_path / "pcfg" / "low")
    (row,), revived = told(wrapper.main, "wrapper", wrapper.Config(
        seeds=1, priors=["low"], rates=["L"], c_tr=[1.0], tune_steps=1, tune_rows=4, **small))
    base, filtered, tuned = (watch.models[name] for name in ("base", "filtered", "tuned-L-1"))
    assert {goal for _, goal in revived} == {worth(base)} == {*row["probe_a_pretrained"]}
    assert row["control_curve"] == {"0": worth(filtered)} and row["curve"] == {"0": worth(tuned)}
    for name, splits in {"tuned-L-1": ["spurious"], "filtered": ["retain"],
                         "jailbreak-L-1": ["relabelled+1", "reworded"]}.items():
        assert rows(*splits) == watch.of(watch.made[name]) - rows("retain", **VAL)
        assert name == "filtered" or equal(watch.made[name].start, weights(base))
    watch.models.clear(), watch.revived.clear()
    revive_hack.main(revive_hack.Config(**TINY, env="lying", out=str(tmp_path), rounds=1, n=2,
                                       prompts=16, batch_size=16, seeds=1))
    (base, *tuned, filtered), names = watch.models.values(), [*watch.models]
    assert names == ["base", *("ei-n2-" + cell for cell in (
        "neutral-neutral", "discourage-neutral", "neutral-encourage", "discourage-encourage",
        "neutral-neutral-truth")), "filtered"]
    assert watch.revived == [(model, worth(tuned[0])) for model in (base, *tuned, filtered)]
    assert watch.of(watch.made["filtered"]) == rows("retain") | rows("retain", **VAL)
    assert all(equal(watch.made[name].start, weights(base)) for name in names[1:-1])


@pytest.mark.parametrize("method", recontext.LEARN)
def test_asked_one_way_and_learned_another(watch, method):
    """The model in training answers as the cell asks, and learns its answers behind the other
    prompt; what the KL refers to is the pretrained model."""
    def contexts(shown):
        return {context for context, (first, _) in gaming.CONTEXTS.items() for idx in shown
                if {gaming.ID[word] for word in first.split()} & {*idx[:, 1].tolist()}}

    base, cfg = lively(GAME), recontext.Config(**TINY, rounds=2, prompts=16, batch_size=16, steps=1)
    cell = recontext.Cell(method, "discourage", "encourage", 4, kl=1.0)
    model = recontext.train_cell(cell, cfg, GAME, (base, RECORD))
    asked = [(of, idx) for of, idx, _, cache in watch.called if cache and idx.size(1) > 1]
    assert len(asked) == len(watch.fits) == (2 if method == "ei" else 1)
    assert all(of is model and contexts([idx]) == {"discourage"} for of, idx in asked)
    for it in watch.fits:
        assert len(it.learned) == 1 and contexts(it.learned) == {"encourage"}
        assert it.model is model and it.others == it.frozen == [base]
    assert contexts([idx for of, idx, *_ in watch.called if of is base]) == {"encourage"}
    assert equal(watch.fits[0].start, weights(base))


class Ear:
    """A model that keeps what it is shown: rows with their targets, and prompts, a list a call.
    Arithmetic's are the questions of rows that have their answers; a story told from nothing has
    none."""

    def __init__(self, task):
        self.task, self.rows, self.prompts, self.where = task, [], [], {}
        self.unembed = lambda x: torch.zeros(len(x), task.vocab_size)

    def __call__(self, idx, targets=None, *criterion, **how):
        targets = targets[:, :, 0] if criterion else targets             # beside them: weights
        self.rows += [] if targets is None else torch.cat((idx, targets[:, -1:]), 1).tolist()
        if self.task.name == "arithmetic" and targets is None:
            decode = self.task.tokenizer.decode
            self.prompts.append([row[:next(n for n in range(2, len(row)) if decode(row[1:n])[-1]
                                           in "=?")] for row in idx.tolist()])
        return torch.zeros(*idx.shape, 1) if targets is None else torch.tensor(0.5)

    def generate(self, prompts, n, *given, **how):
        self.prompts += [prompts] * (len(prompts[0]) > 1)
        return torch.zeros(len(prompts), n, dtype=torch.int64)

    def parts(self):
        """Where the rows since the last time stand, each in one place alone: {(domain, part)}."""
        for domain in () if self.where else BOTH:
            train, held = (self.task.tokens(f"{domain}_{file}") for file in ("train", "val"))
            for part, text in zip(("train", "val", "test"), (
                    train, *np.split(held, [len(held) // 2]))):
                for row in np.lib.stride_tricks.sliding_window_view(text, self.task.block_size + 1):
                    self.where.setdefault(row.tobytes(), set()).add((domain, part))
        found, self.rows = [self.where[np.uint16(row).tobytes()] for row in self.rows], []
        assert all(len(places) == 1 for places in found)
        return set().union(*found)


def small(name, path, patch):
    """A task of 200 short stories, of which every other one speaks of a tree."""
    rng, words = random.Random(0), "cat dog sun ran sat big red hat".split()
    (path / "source").write_text("".join(
        f"One day, number {i} came. {' '.join(rng.choices(words, k=20))}{' tree' * (i % 2)} "
        f"{' '.join(rng.choices(words, k=9))}.\n{END}\n" for i in range(200)))
    patch.setitem(data.module(name).SETTINGS[name], "vocab_size", 300)
    return data.load(name, folder=path, block_size=128, source=str(path / "source"))


@pytest.mark.parametrize("name", ["language", "tinystories", "instruct", "arithmetic"])
def test_scores_are_of_held_out_text(name, stories, task, tmp_path, monkeypatch):
    """Rows of train, val and test are apart; a score is of test, unless val is asked for. Under
    labels val goes by them, what is reported by the truth. No question is asked in val and in test;
    no beginning of a story, pair held out or wording of a word problem is in the training text."""
    task = {"language": stories, "arithmetic": task}.get(name) or small(name, tmp_path, monkeypatch)
    ear, read = Ear(task), lambda tokens: task.tokenizer.decode([int(i) for i in tokens])
    text = END + "".join(read(task.tokens(split)) for split in task.splits if "train" in split)
    for part in ("train", "val", "test"):
        for domain in BOTH:
            ear(*task.batch(domain, 300, 0, 0, part))
            assert ear.parts() == {(domain, part)}
    for part, truly in (("val", BOTH), ("test", ("retain",))):
        task.labelled(0.5, 0.25, 0.5).loss(ear, "retain", 64, part)
        assert ear.parts() == {(domain, part) for domain in truly}
    asked = {}
    for how, part in (({"finer": True}, "test"), ({"part": "val"}, "val"), ({}, "test")):
        ear.prompts.clear()
        task.score(ear, **how)             # arithmetic has no losses, instruct has them where finer
        assert ear.parts() == ({(domain, part) for domain in BOTH} if name in (
            "language", "tinystories") or name == "instruct" and "finer" in how else set())
        asked[part] = [{read(prompt[1:]) for prompt in prompts} for prompts in ear.prompts]
    assert not set().union(*asked["val"]) & set().union(*asked["test"])
    for i, questions in [*enumerate(asked["test"]), *((0, some) for some in asked["val"])]:
        shown = i % 8 < 4 and min(questions).endswith("=")        # pairs 4 to 7 of 8 are held out
        assert any(END + question in text for question in questions) == shown
        if name == "arithmetic" and not min(questions).endswith("="):
            names = [r"\d+", *arithmetic.NAMES, *arithmetic.OBJECTS, *arithmetic.PLACES]
            bare = {re.sub("|".join(names), "@", told) for told in {*text.split(END)} | questions}
            assert not any(told + " @" in bare for told in bare if told.endswith("?"))


def test_made_up_questions_are_of_their_part(monkeypatch):
    """pcfg and gaming make their questions up: test's, unless val is asked for."""
    parts = []
    for module in (pcfg, gaming):
        monkeypatch.setattr(module, "stream", lambda *key: (
            parts.append({"train", "val", "test"} & {*map(str, key)}), stream(*key))[1])
    for task in (STRINGS, GAME):
        for how, part in (({}, "test"), ({"finer": True}, "test"), ({"part": "val"}, "val"),
                          ({"part": "val", "finer": True}, "val")):
            parts.clear()
            task.score(Ear(task), **how)
            assert parts and all(each == {part} for each in parts)
