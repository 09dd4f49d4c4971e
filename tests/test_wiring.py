"""Stories, watched: who is trained from whom, on which rows, beside whom, and is judged on what.

What a loss or a mask computes is tested elsewhere. Here almost nothing is trained: fit() asks for
one loss, marks the model as trained and judges it, so that every story is over in no time.
"""
import json
import random
import re
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
from data import gaming, instruct, pcfg, tinystories
from data.gridworld import CELLS, DIAMOND, GHOST, NOTHING, PAIRS, STATES, Gridworld
from data.tokenizer import END
from model import GPT, GPTConfig, write_model

SMALL = dict(device="cpu", compile=False, n_layer=1, n_head=2, n_embd=8)
BASE = dict(base_steps=2, filtered_steps=2)
ATTACK = dict(lrs=[1e-3], attack_steps=[1], attack_rows=4, attack_seeds=1)
EXAMINE = dict(probe_rows=4, cut=[1], draws=1, revive_lr=1e-3, revive_steps=300, check_every=1)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def worth(model):
    """What the watched judge says of a model: another number for every one that was trained."""
    return 1 / (0.01 + abs(model.wte.weight[0, 0].item()))


def lively(vocab_size, block_size, seed=0, n_units=0, n_layer=1):
    """A model all of whose weights are random."""
    model, generator = GPT(GPTConfig(vocab_size, block_size, n_layer, 2, 8, n_units)), (
        torch.Generator().manual_seed(seed))
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) / 3
    return model


class Seen(SimpleNamespace):
    __eq__, __hash__ = object.__eq__, object.__hash__                # each is itself alone


class Watch:
    """fits     every call of fit(): the model it was given and its weights at the start and the end,
                frozen=, stop=, which others its loss called, and the rows that were learned from
    models      what was obtained, by name; .made: the (last) fit that made it
    asked       which rows or scores were asked for, of which task, by what part and in which fit
    generated   (model, prompts); revived: what revive() was given
    """

    def __init__(self, monkeypatch):
        self.fits, self.models, self.made, self.asked = [], {}, {}, []
        self.generated, self.revived, self.now, self.name = [], [], None, None
        forward, generate, whole = GPT.forward, GPT.generate, data.Task.whole
        own = {"fit": self.fit, "obtain": self.obtain, "revive": self.revive, "probe": self.probe}
        for module in (train, judges, unlearn, undo, route, recontext):
            for name in own.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, own[name])

        def watched_forward(model, idx, *given, **how):
            found = forward(model, idx, *given, **how)
            if self.now:
                self.now.called.append((model, idx, found))
                if found.requires_grad:
                    found.retain_grad()
            return found

        def watched_generate(model, prompts, *given, **how):
            self.generated.append((model, prompts))
            return generate(model, prompts, *given, **how)

        def watched_whole(task, split, size, step, seed, part):
            self.note("rows", task, split, part)
            return whole(task, split, size, step, seed, part)

        def score(task, model, domains=("retain", "forget"), part="test", finer=False):
            self.note("score", task, domains, part, model)
            return dict.fromkeys(domains, worth(model))

        def loss(task, model, domain, rows=128, part="test", **how):
            self.note("score", task, domain, part, model)
            return worth(model)

        for owner, name, spy in ((GPT, "forward", watched_forward), (data.Task, "score", score),
                                 (GPT, "generate", watched_generate), (data.Task, "loss", loss),
                                 (data.Task, "whole", watched_whole)):
            monkeypatch.setattr(owner, name, spy)

    def note(self, what, task, split, part, model=None):
        self.asked.append(Seen(what=what, task=task, split=split, part=part, model=model,
                               fit=self.now, weights=model and weights(model)))

    def fit(self, model, loss_fn, cfg, steps, lr, muon_lr=0.0, *, frozen=(), evaluate=None,
            stop=None, after_backward=None, after_step=None, **how):
        self.now = it = Seen(model=model, start=weights(model), frozen=list(frozen), stop=stop,
                             called=[], of=self.name)
        self.fits.append(it)
        self.made[self.name] = it
        loss_fn(model, 0).backward()
        it.others = [m for m, *_ in it.called if m is not model]
        assert all(p.grad is None for m in it.others for p in m.parameters())       # frozen
        assert any(p.grad is not None for p in model.parameters())
        it.learned = [idx for _, idx, found in it.called if found.grad is not None]
        if after_backward:
            after_backward()
        model.zero_grad()
        with torch.no_grad():
            model.wte.weight[0, 0] = len(self.fits) + 10
        if after_step:
            after_step()
        with torch.no_grad():
            found = evaluate() if evaluate else {}
        it.end, self.now = weights(model), None
        return {"steps": steps, "skipped": 0, "flops": 1, "seconds": 0.0,
                "history": [{"step": 1, "loss": 0.0, "flops": 1} | found]}

    def obtain(self, name, cfg, task, made_with, make, quiet=False):
        self.name = name
        model, record = make(None)
        self.models[name], self.name = model, None
        return model, {"made_with": made_with} | record

    def revive(self, model, task, cfg, goal, name="model"):
        self.revived.append(Seen(model=model, goal=goal, name=name))
        return {"base": 0, "hider": 50}.get(name, 300), {0: worth(model)}

    def probe(self, model, task, cfg):
        return [worth(model)], 0.5

    def parts(self, fit, what):
        return {(ask.split, ask.part) for ask in self.asked if ask.fit is fit and ask.what == what}


@pytest.fixture
def watch(monkeypatch):
    return Watch(monkeypatch)


@pytest.fixture(scope="module")
def strings():
    return data.load("pcfg", block_size=14)


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The language task, small: two thirds of a story fit a row."""
    return data.load("language", folder=tmp_path_factory.mktemp("data"), stories=100, block_size=64)


# --- unlearning and UNDO -------------------------------------------------------------------------
def test_the_story_of_undo(watch, strings):
    """base is unlearned; students start from that teacher, damaged, or from nothing, and imitate it
    alone; filtered is the oracle's example. All are attacked and judged on what nobody looked at.
    """
    cfg = undo.Config(task="pcfg", **SMALL, **BASE, **ATTACK, alphas=[0.25], beta=0.0, steps=4,
                      method="graddiff", unlearn_lr=1e-3, unlearn_steps=1, batch_size=4, lr=1e-3,
                      muon_lr=0.0, check_every=1)
    rows = {row["model"]: row for row in undo.story(cfg, strings)}
    names = ["base", "filtered", "graddiff", "oracle", "undo-0.25", "distilled"]
    base, filtered, teacher, *_ = models = [watch.models[name] for name in names]
    made = watch.made
    drawn = {name: watch.parts(made[name], "rows") for name in names}
    both = {("forget", "train"), ("retain", "train")}
    mix = {("all", "train")}
    assert list(drawn.values()) == [mix, {("retain", "train")}, both, both, mix, mix]
    for name, start, others in (("base", None, []), ("filtered", None, []),
                                ("graddiff", base, []), ("oracle", base, [filtered]),
                                ("undo-0.25", None, [teacher]), ("distilled", None, [teacher])):
        assert not start or same(made[name].start, weights(start))
        assert made[name].model is watch.models[name] and made[name].others == others
        assert all(m in made[name].frozen for m in others)
    damaged, fresh = made["undo-0.25"].start, made["distilled"].start
    for name, w in weights(teacher).items():
        torch.testing.assert_close(damaged[name], 0.75 * w)
        assert fresh[name].abs().sum() == 0 or w.abs().sum() == 0 or abs(torch.corrcoef(
            torch.stack((fresh[name].flatten(), w.flatten())))[0, 1]) < 0.5
    assert made["distilled"].frozen == made["undo-0.25"].frozen == [teacher]
    for name in ("undo-0.25", "distilled"):               # until as good as the teacher, on val
        goal = (1 - cfg.tolerance) * worth(teacher)
        assert made[name].stop({"retain": goal + 1e-6})
        assert not made[name].stop({"retain": goal - 1e-6})
        assert watch.parts(made[name], "score") == {(("retain",), "val")}
    for name in names[:4]:
        assert {part for _, part in watch.parts(made[name], "score")} == {"val"}
    for name, model in zip(names, models):                # who is judged, and who is attacked
        attack, = [it for it in watch.fits if not it.of and same(it.start, weights(model))]
        assert attack.model is not model
        assert watch.parts(attack, "rows") == {("forget", "train")}
        assert {part for _, part in watch.parts(attack, "score")} == {"test"}
        assert rows[name]["retain"] == rows[name]["forget"] == worth(model)
        assert rows[name]["relearned"] == {"1": worth(attack.model)}
    reported = [ask for ask in watch.asked if not ask.fit and ask.what == "score"]
    assert all(ask.model is teacher for ask in reported if ask.part == "val")
    assert [ask.model for ask in reported if ask.part == "test"] == models
    assert rows["graddiff"]["robustness_mean"] == 0 and rows["filtered"]["robustness_mean"] == 1


def test_spent_until_the_first_time():
    """What filtered had cost when it first was as good, though it fell back; all, if it never was.
    """
    for higher in (True, False):
        task = SimpleNamespace(higher_is_better=higher)
        curve = [score if higher else 1 - score for score in (0.5, 0.9, 0.6, 0.95)]
        gold = {"flops": 50, "history": [{"retain": score, "flops": flops} for score, flops in
                                         zip(curve, (10, 20, 30, 40))]}
        for score, flops in ((0.8, 20), (0.4, 10), (0.93, 40), (0.99, 50)):
            assert undo.spent_until(score if higher else 1 - score, gold, task) == flops


@pytest.mark.parametrize("method, of", [("maxent", {"forget"}), ("graddiff", {"forget"}),
                                        ("rmu", {"forget", "length"}), ("finetune", {"retain"}),
                                        ("oracle", {"forget", "retain"})])
def test_rows_to_forget_go_to_the_forget_term(watch, strings, monkeypatch, method, of):
    """Where the retain term weighs nothing, a loss is a function of the rows to forget alone (rmu:
    and of a length, which it takes from base on the others); finetune's of those to retain."""
    cfg = unlearn.Config(task="pcfg", **SMALL, method=method, lr=1e-3, steps=1, batch_size=8,
                         retain_weight=0.0)
    base, filtered = (lively(strings.vocab_size, 14, seed) for seed in (1, 2))
    batch, other, found = data.Task.batch, None, {}
    monkeypatch.setattr(data.Task, "batch", lambda task, split, size, step, seed, *rest: batch(
        task, split, size, step + 5 * (other in split), seed, *rest))
    fit = watch.fit

    def keeping(model, loss_fn, *given, **how):
        found[other] = loss_fn(model, 0)
        return fit(model, loss_fn, *given, **how)

    monkeypatch.setattr(unlearn, "fit", keeping)
    for other in ("none", "forget", "retain"):
        record = {"made_with": {}, "flops": 0}
        model, _ = unlearn.unlearn(cfg, strings, base, record, filtered, record)
        it = watch.made[method]
        assert it.model is model and same(it.start, weights(base))
        expected = {"oracle": filtered, "rmu": base}.get(method)
        assert set(it.others) == ({expected} if expected else set())
        assert watch.parts(it, "rows") == {("forget", "train"), ("retain", "train")}
    for split in ("forget", "retain"):
        assert (found[split] != found["none"]) == (split in of or split == "retain" and
                                                   "length" in of)
    if method == "graddiff":
        forget = batch(strings, "forget", 4, 0, data.seed_of("unlearn by graddiff", 0))
        assert found["none"].item() == pytest.approx(-base(*forget).item(), rel=1e-5)


def test_a_sweep_looks_at_val_alone(watch, strings):
    """Every attempt starts from base; the choice is made on held-out rows that are not reported."""
    cfg = unlearn.Config(task="pcfg", **SMALL, method="graddiff", lr="sweep", sweep=[1e-3, 1e-2],
                         steps=1, batch_size=8, retain_weight=1.0)
    base = lively(strings.vocab_size, 14)
    unlearn.unlearn(cfg, strings, base, {"made_with": {}, "flops": 0})
    assert len(watch.fits) == 2 and all(same(it.start, weights(base)) for it in watch.fits)
    scores = [ask for ask in watch.asked if ask.what == "score"]
    assert {ask.part for ask in scores} == {"val"} and scores[0].model is base
    assert {ask.split for ask in scores if not ask.fit} == {("retain",), "forget"}


# --- routing -------------------------------------------------------------------------------------
ROUTE = route.Config(task="language", **SMALL, **ATTACK, steps=1, batch_size=8, lr=1e-3, expand=4,
                     muon_lr=0.0, forget_units=8, coherence_steps=1)


def test_methods_learn_from_what_the_labels_say(watch, stories):
    """base learns from everything, filtered from what is not labelled forget, the others from all
    kinds of labels; methods of one size begin alike."""
    view, learns = stories.labelled(0.5, 0.25, 0.5), {
        "base": {"all"}, "expanded": {"all"}, "filtered": {"retain"}, "era": {"forget", "retain"},
        "demix": {"forget", "retain"}, "sgtm": {"forget", "sure", "unlabelled"}}
    for method, expected in learns.items():
        route.trained(method, 0.5, view, ROUTE)
        drawn, it = watch.parts(watch.fits[-1], "rows"), watch.fits[-1]
        assert drawn <= {(split, "train") for split in expected} and drawn, method
        assert method == "sgtm" or len(drawn) == len(expected)
        if method in ("base", "filtered", "sgtm"):
            assert same(it.start, watch.fits[0].start)
    assert all(ask.task is view for ask in watch.asked)


def test_what_is_attacked_is_what_was_mended(watch, stories):
    """The routed model is judged whole, then without its forget part, then once it is mended on
    rows labelled retain; that last model is attacked."""
    view, model = stories.labelled(0.5), lively(stories.vocab_size, 64, n_units=36)
    model.wte.weight.data[0, 0] = 1                      # a better score than it will have
    whole, record = weights(model), {"made_with": {}}
    row = route.examine(model, stories, view, ROUTE, "era", 0.5, (0, 4), None, record)
    mend, attack = watch.fits
    ablated = weights(lively(stories.vocab_size, 64, n_units=36)) | {"wte.weight":
                                                                     whole["wte.weight"]}
    ablated["blocks.0.mlp.up.weight"][-4:] = 0
    ablated["blocks.0.mlp.down.weight"][:, -4:] = 0
    assert same(mend.start, ablated) and not same(mend.end, ablated)
    assert same(weights(watch.models["route-era-50-ablated"]), mend.end)
    assert same(attack.start, mend.end) and row["relearned"] == {"1": worth(attack.model)}
    judged = [ask for ask in watch.asked if ask.what == "score" and not ask.fit]
    reported = [ask.weights for ask in judged if ask.part == "test"]
    for at, expected in zip(range(0, 12, 4), (whole, ablated, mend.end)):
        assert all(same(seen, expected) for seen in reported[at:at + 4])
    assert len(reported) == 12
    mending = [ask for ask in watch.asked if ask.split == "sure"]
    assert {(ask.what, ask.part) for ask in mending} == {("rows", "train"), ("score", "val")}
    assert all((ask.task is view) == (ask in mending) for ask in watch.asked)


def test_posthoc_learns_by_labels_and_is_judged_by_truth(watch, stories):
    """Given the same labels: whatever trains or decides sees the view, whatever is reported and the
    attacker see the truth. All begin from route.py's base."""
    view, base = stories.labelled(0.5, 0.25), lively(stories.vocab_size, 64)
    route.posthoc(0.5, stories, view, ROUTE, (base, {"made_with": {}, "flops": 0}))
    made = {"maxent": base, "rmu": base, "graddiff": base, "undo-0.6": None}
    assert watch.models.keys() == made.keys()
    attacks = [it for it in watch.fits if watch.parts(it, "rows") == {("forget", "train")}]
    mends = [it for it in watch.fits if watch.parts(it, "rows") == {("sure", "train")}]
    assert len(attacks) == len(mends) == 3
    assert [it.start["wte.weight"].tolist() for it in attacks] == [      # a mended model, or, where
        weights(watch.models[name])["wte.weight"].tolist() if worth(it.model) > worth(
            watch.models[name]) else it.end["wte.weight"].tolist()       # that is better, as it was
        for name, it in zip(("maxent", "rmu", "undo-0.6"), mends)]
    for name, start in made.items():
        assert not start or same(watch.made[name].start, weights(start))
    assert watch.made["undo-0.6"].others == [watch.models["graddiff"]]
    for ask in watch.asked:
        judging = ask.part == "test" or ask.fit in attacks or not ask.fit and ask.part == "train"
        if ask.split != "sure":
            assert ask.task is (stories if judging else view), vars(ask)


def test_labels_go_for_val_and_truth_for_test(stories):
    """Under labels, held-out rows to decide by are those labelled so; those to report are not."""
    view, ear = stories.labelled(0.5, 0.25, 0.5), Ear(stories)
    for split, truly in (("retain", {"retain", "forget"}), ("forget", {"retain", "forget"}),
                         ("sure", {"retain"})):
        x, y = view.batch(split, 200, 0, 0, "val")
        assert parts_of(stories, torch.cat((x, y[:, -1:]), 1)) == {(d, "val") for d in truly}
    for part, truly in (("val", {"retain", "forget"}), ("test", {"retain"})):
        view.score(ear, ("retain",), part)
        assert ear.parts() == {(domain, part) for domain in truly}


# --- gridworld -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def world():
    return Gridworld()


@pytest.mark.parametrize("method", route.OVERSEERS)
def test_overseers(world, method, monkeypatch):
    """Each learns from its own episodes, by its own reward; its Diamond expert alone is deployed.
    """
    seen, loss = [], route.Oversight.loss

    def watched(run, agent, *given):
        seen.append(given)
        return loss(run, agent, *given)

    def fit(agent, loss_fn, cfg, *given, evaluate, **how):
        for step in range(3):
            loss_fn(agent, step)
        found = [evaluate()]
        parts = [agent.diamond] if agent.gate is None else [agent.ghost, agent.gate, agent.diamond]
        for i, part in enumerate(parts):                # only the last of these is to matter
            for p in part.parameters():
                p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            found.append(evaluate())
        assert all(f == found[0] for f in found[:-1]) and found[-1] != found[0]
        policy = agent.diamond(world.planes).softmax(-1)
        assert found[-1]["return"] == pytest.approx(world.exact(policy, 0.3), abs=1e-5)
        return {"history": [found[0] | {"step": 3}]}

    monkeypatch.setitem(route.PPO, "envs", 256)
    monkeypatch.setattr(route, "fit", fit)
    monkeypatch.setattr(route.Oversight, "loss", watched)
    cfg = route.Config(device="cpu", compile=False, steps=8, batch_size=512, lr=1e-3, width=8)
    route.oversee(cfg, world, method, 0.3, 0)
    states, actions, _, _, returns, labels = (torch.cat(part) for part in zip(*seen))
    to = world.step(states, actions)
    holds, overseen = (table[to] for table in (world.holds, world.seen))
    last = holds != NOTHING
    feared = {"oracle": holds == GHOST, "naive": (holds == GHOST) & overseen,
              "filtering": holds == GHOST}.get(method, torch.zeros_like(last))
    torch.testing.assert_close(returns[last], torch.where(feared, -1.0, 1.0)[last])
    assert torch.equal(labels[last], (holds * overseen)[last])
    assert (labels == NOTHING).any() == (method != "filtering") and (labels != NOTHING).any()
    assert ((holds == GHOST) & overseen).any() and (last & ~overseen).any() == (
        method != "filtering")


def test_the_gate_learns_where_the_diamond_is_and_sees_no_oversight(world):
    """One step downhill on episodes labelled Diamond opens it, on those labelled Ghost shuts it;
    it says the same of two states that differ in who is overseen, where the experts do not."""
    cfg = route.Config(device="cpu", compile=False, steps=8, batch_size=512, lr=1e-3, width=8)
    run = route.Oversight("routed", world, 0.5, 0, cfg)
    agent, played = run.agent, run.rollout(torch.Generator().manual_seed(0))
    x = world.planes.view(-1, PAIRS * CELLS, 4 * CELLS)
    logits, gate = agent(x)
    assert gate[0].std() > 0 and all(torch.equal(each, gate[0]) for each in gate)
    assert not torch.equal(agent.diamond(x[0]), agent.diamond(x[3]))
    for label, way in ((DIAMOND, -1), (GHOST, 1)):
        agent.zero_grad()
        run.loss(agent, *(part[played[-1] == label] for part in played)).backward()
        assert agent.gate[-1].bias.grad.sign() == way


def test_exact_weighs_patterns_by_the_oversight_level(world):
    """At level 0 nobody is overseen, at level 1 both are: what a policy does elsewhere is nothing.
    """
    policy = torch.randn(2, STATES, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for level, pattern in ((0, 0), (1, 3)):
        states = torch.arange(STATES) // (PAIRS * CELLS) == pattern
        mixed = torch.where(states[:, None], policy[0], policy[1])
        own, other = (world.exact(p, level) for p in policy)
        assert world.exact(mixed, level) == pytest.approx(own, abs=1e-7) and own != other


# --- eval.py: the controls -----------------------------------------------------------------------
def told(cfg, name):
    return json.loads((cfg.out / cfg.task / f"{name}.json").read_text())["rows"]


@pytest.fixture
def judged(strings, tmp_path, monkeypatch):
    """A Config of eval.py for three models on disk; no pictures."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    cfg = judges.Config(task="pcfg", **SMALL, **BASE, **ATTACK, **EXAMINE, block_size=14,
                        out=tmp_path, model="hider", seeds=1, priors=["low"], rates=["L"],
                        c_tr=[1.0], tune_steps=1, tune_rows=4, tolerance=0.5)
    for i, name in enumerate(("base", "filtered", "hider")):
        (tmp_path / "pcfg").mkdir(exist_ok=True)
        model = lively(strings.vocab_size, 14, i)
        write_model(tmp_path / "pcfg" / f"{name}.pt", model, {
            "task": "pcfg", "data": strings.data_id}, {"steps": 1, "flops": 1, "history": []})
    return cfg


def test_the_control_of_revival(watch, judged, strings):
    """judge_revive: the goal is the reference's score, the control is the filtered model."""
    base, filtered, hider = (judges.known(name, judged, strings)
                             for name in ("base", "filtered", "hider"))
    judges.judge_revive(judged, strings, hider)
    assert [worth(it.model) for it in watch.revived[:2]] == [worth(hider), worth(filtered)]
    assert {it.goal for it in watch.revived} == {worth(base)} and len(watch.revived) == 3
    rows = told(judged, "revive")
    assert [row["before"] for row in rows[:2]] == [worth(hider), worth(filtered)]
    assert worth(watch.revived[2].model) not in map(worth, (base, filtered, hider))


def test_the_control_of_the_cross_examination(watch, judged, strings):
    """A model revived in a sixth of filtered's steps hides; base, the reference, has it."""
    judges.cross_examine(judged, strings)
    base, filtered = (judges.known(name, judged, strings) for name in ("base", "filtered"))
    assert {it.goal for it in watch.revived} == {worth(base)}
    verdicts = {row["model"]: row["verdict"] for row in told(judged, "examine")}
    assert verdicts == {"base": "has it", "filtered": "removes", "hider": "hides"}
    assert {it.name: worth(it.model) for it in watch.revived}["filtered"] == worth(filtered)


def test_the_control_of_the_wrapper(watch, judged, strings):
    """base is fine-tuned, goal and probe beforehand are its own, the control is filtered."""
    judges.wrapper(judged, strings)
    base, filtered = watch.models["base"], watch.models["filtered"]
    (row,), names = told(judged, "wrapper"), list(watch.models)
    assert watch.parts(watch.made["filtered"], "rows") == {("retain", "train")}
    assert {it.goal for it in watch.revived} == {worth(base)}
    assert row["control_curve"] == {"0": worth(filtered)} and row["curve"] == {
        "0": worth(watch.models["tuned-L-1"])}
    assert row["probe_a_pretrained"] == [worth(base)]
    for name, splits in (("tuned-L-1", {"spurious"}),
                         ("jailbreak-L-1", {"relabelled+1", "reworded"})):
        assert name in names and same(watch.made[name].start, weights(base))
        assert watch.parts(watch.made[name], "rows") == {(split, "train") for split in splits}


def test_probes_and_revival_read_other_rows_than_they_report(strings, monkeypatch):
    """A probe is fitted on training rows and judged on test; revival trains and is judged so, too.
    """
    revive, probe = judges.revive, judges.probe
    watch, model = Watch(monkeypatch), lively(strings.vocab_size, 14)
    cfg = judges.Config(task="pcfg", **SMALL, **ATTACK, **EXAMINE, domain="retain")
    probe(model, strings, cfg)
    assert watch.parts(None, "rows") == {("retain", "train"), ("retain", "test")}
    unseen = [ask for ask in watch.asked if ask.part == "test"]
    assert watch.asked.index(unseen[0]) == 1             # the second, by which it is judged
    steps, curve = revive(model, strings, cfg, 1e9)
    attack, = watch.fits
    assert same(attack.start, weights(model)) and attack.model is not model and steps is None
    assert watch.parts(attack, "rows") == {("retain", "train")}
    assert watch.parts(attack, "score") == {(("retain",), "test")}
    assert curve == {0: worth(model), 1: worth(attack.model)}


# --- recontext.py --------------------------------------------------------------------------------
def contexts(rows):
    """Which control phrases stand at the beginning of rows."""
    words = set(rows[..., 1].flatten().tolist())
    return {context for context, (first, _) in gaming.CONTEXTS.items()
            if words & {gaming.ID[word] for word in first.split()}}


@pytest.mark.parametrize("method", ["ei", "grpo-ratio1", "grpo-clip"])
def test_generated_under_one_prompt_and_learned_under_another(watch, method):
    """Answers come from the model in training, asked as the cell says, and are learned behind the
    other prompt; the pretrained model, frozen, is what the KL refers to."""
    task = data.load("gaming")
    base = lively(task.vocab_size, task.block_size)
    cfg = recontext.Config(**SMALL, rounds=2, prompts=16, batch_size=16, steps=1)
    cell = recontext.Cell(method, "discourage", "encourage", 4, kl=1.0)
    model = recontext.trained(cell, cfg, task, (base, {"made_with": {}}))
    assert len(watch.generated) == (2 if method == "ei" else 1) == len(watch.fits)
    assert same(watch.fits[0].start, weights(base))
    for (asked, prompts), it in zip(watch.generated, watch.fits):
        assert asked is it.model is model and contexts(prompts) == {"discourage"}
        assert [contexts(rows) for rows in it.learned] == [{"encourage"}]
        assert it.others == it.frozen == [base]
        assert all(contexts(rows) == {"encourage"} for m, rows, _ in it.called if m is base)


def test_the_control_of_recontextualization(watch, tmp_path, monkeypatch):
    """Revival aims at the hack rate of standard training; the control is the filtered model."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    cfg = recontext.Config(**SMALL, **BASE, env="lying", out=tmp_path, rounds=1, prompts=16,
                           batch_size=16, n=2, seeds=1, revive=True)
    recontext.wrapped(cfg)
    model, found = watch.models, {it.name: it.model for it in watch.revived}
    assert watch.parts(watch.made["filtered"], "rows") == {("retain", "train")}
    assert {it.goal for it in watch.revived} == {worth(model["ei-n2-neutral-neutral"])}
    assert found == {"pretrained": model["base"], "control (never had it)": model["filtered"],
                     "N->N (standard)": model["ei-n2-neutral-neutral"],
                     "D->N": model["ei-n2-discourage-neutral"],
                     "N->E": model["ei-n2-neutral-encourage"],
                     "D->E": model["ei-n2-discourage-encourage"],
                     "N->N, true reward": model["ei-n2-neutral-neutral-truth"]}
    assert all(same(watch.made[name].start, weights(model["base"])) for name in model
               if name.startswith("ei"))


# --- what scores read ----------------------------------------------------------------------------
class Ear:
    """A model that keeps what it is shown: rows with their targets, and prompts, a list a call."""

    def __init__(self, task):
        self.task, self.rows, self.prompts = task, [], []

    def __call__(self, idx, targets=None, residual=None, **how):
        if targets is None:
            return torch.zeros(*idx.shape, 1)
        self.rows.append(torch.cat((idx, targets[:, -1:]), 1))
        return torch.tensor(0.5)

    def unembed(self, x):
        return torch.zeros(*x.shape[:-1], self.task.vocab_size)

    def generate(self, prompts, n, *given, **how):
        self.prompts.append([list(map(int, prompt)) for prompt in prompts])
        return torch.zeros(len(prompts), n, dtype=torch.int64)

    def parts(self):
        """{(domain, part)} of all the rows shown since the last time."""
        rows, self.rows = torch.cat(self.rows), []
        return parts_of(self.task, rows)


def parts_of(task, rows):
    """Where rows (B, T + 1) stand, each of which must be in one place alone: {(domain, part)}."""
    where, found = {}, set()
    for domain in ("retain", "forget"):
        held_out = task.tokens(f"{domain}_val")
        middle = len(held_out) // 2
        for part, tokens in (("train", task.tokens(f"{domain}_train")),
                             ("val", held_out[:middle]), ("test", held_out[middle:])):
            for window in np.lib.stride_tricks.sliding_window_view(tokens, task.block_size + 1):
                where.setdefault(window.tobytes(), set()).add((domain, part))
    for row in rows.numpy().astype(np.uint16):
        assert len(where[row.tobytes()]) == 1
        found |= where[row.tobytes()]
    return found


def source(path, name, words, n=120):
    rng = random.Random(name)
    told = [f"One day, number {i} came. " + " ".join(rng.choices(words, k=40)) + "."
            for i in range(n)]
    path.joinpath(name).write_text("".join(f"{text}\n{END}\n" for text in told))
    return str(path / name)


def opened(name, path, monkeypatch, stories):
    """A task whose text lies on disk, small."""
    if name == "language":
        return stories
    module, words = data.module(name), "cat dog sun ran sat big red hat the a".split()
    monkeypatch.setitem(module.SETTINGS[name], "vocab_size", 300)
    knobs = {"source": source(path, "a", words + ["tree"] * (name == "tinystories") * 0 + words)}
    return data.load(name, folder=path, **knobs)
