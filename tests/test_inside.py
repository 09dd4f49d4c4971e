"""Probe, prune, revive: against autograd, finite differences, brute force and planted answers."""
import dataclasses
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import eval as judges
import train
import unlearn
from data import arithmetic
from engine.streams import seed_of
from experiments import compiled, examine, wrapper
from model import GPT, GPTConfig

CFG = judges.Config(task="pcfg", device="cpu", compile=False, probe_rows=300, cut=[1, 3],
                    draws=2, revive_lr=1e-2, revive_steps=12, check_every=4, attack_rows=8)


@pytest.fixture(scope="module")
def pcfg():
    return data.load("pcfg", block_size=14)


@pytest.fixture
def lively(pcfg, float32):
    """A model all of whose weights are random."""
    gpt = GPT(GPTConfig(pcfg.vocab_size, pcfg.block_size, 2, 2, 16))
    generator = torch.Generator().manual_seed(0)
    for p in gpt.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.size(1) ** 0.5
    return gpt


# --- probes --------------------------------------------------------------------------------------
class Planted:
    """A stub whose blocks hold: noise; the answer's token, as one of 8 directions; its half."""

    def residuals(self, idx):
        generator = torch.Generator().manual_seed(idx.size(0) + int(idx.sum()) % 97)
        noise = torch.randn(*idx.shape, 16, generator=generator)
        answer = torch.zeros(*idx.shape, 16)
        answer[..., -1, :] = F.one_hot(idx[:, 0] % 8, 16).float()
        half = torch.zeros(*idx.shape, 16)
        half[..., -1, 0] = (idx[:, 0] % 8 < 4).float() * 2 - 1
        return [noise, noise, 4 * answer + 0.1 * noise, 4 * half + 0.1 * noise]


class Questions:
    """Rows whose answer is a function of their first token."""
    module = SimpleNamespace()                              # all targets are answers

    def undivided(self, split, size, step, seed, part):
        rng = np.random.default_rng((seed, ("train", "test").index(part)))
        idx = torch.from_numpy(rng.integers(0, 8, (size, 5)))
        return idx, idx[:, :1]


def test_a_probe_finds_what_is_planted(float32):
    (noise, answer, half), chance = judges.probe(Planted(), Questions(), CFG)
    assert answer == 1
    assert chance < noise + 0.1 and noise < 0.3             # one in eight, and luck
    assert 0.15 < half < 0.4                                # a half of the answers: one in four
    assert 0.1 < chance < 0.2


def test_probes_read_the_residual_that_the_readout_reads(pcfg, lively):
    """A model's own logits are a linear function of what its last probe is given."""
    there, right = judges.before_answers(lively, pcfg, CFG, "train")
    idx, targets = pcfg.batch("forget", CFG.probe_rows, 0, seed_of("probe", CFG.seed))
    assert torch.equal(right, targets[:, 0])
    logits = F.linear(there[-1], lively.wte.weight)[:, :pcfg.vocab_size]
    assert torch.allclose(logits, lively(idx)[:, -1], atol=1e-5)


@pytest.mark.parametrize("part", ["train", "test"])
def test_probes_of_every_token(task, float32, monkeypatch, part):
    """Where the task says which targets are answers, those are read, and each residual is the one
    before its answer; where it does not, all tokens of a row are."""
    gpt = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    cfg = dataclasses.replace(CFG, probe_rows=4)
    idx, targets = task.batch("forget", 4, 0, seed_of("probe", cfg.seed), part)
    whole = F.rms_norm(gpt.residuals(idx)[1], (16,))
    which = arithmetic.answer_mask(task, idx, targets)
    (x,), right = judges.before_answers(gpt, task, cfg, part)
    assert 0 < which.sum() < which.numel() / 2
    assert torch.equal(right, targets[which]) and torch.allclose(x, whole[which], atol=1e-5)
    monkeypatch.delattr(arithmetic, "answer_mask")
    (x,), right = judges.before_answers(gpt, task, cfg, part)
    assert x.shape == (4 * task.block_size, 16) and torch.equal(right, targets.flatten())
    assert torch.allclose(x, whole.flatten(0, 1), atol=1e-5)


# --- pruning -------------------------------------------------------------------------------------
def loss_with(model, task, factor):
    """The loss when neuron outputs are multiplied by factor (n_layer, n_units)."""
    return model(*task.batch("forget", 256, 0, seed_of("saliency", CFG.seed)),
                 hook=lambda site, i, h: h * factor[i] if site == "units" else h)


def test_saliency_is_theta_times_grad(pcfg, lively):
    found = judges.saliency(lively, pcfg, CFG)
    lively(*pcfg.batch("forget", 256, 0, seed_of("saliency", CFG.seed))).backward()
    for block, mine in zip(lively.blocks, found):
        down = block.mlp.down.weight
        assert torch.allclose((down * down.grad).sum(0), mine, atol=1e-6)


def test_saliency_by_finite_differences(pcfg, lively):
    lively.double()
    found, ones = judges.saliency(lively, pcfg, CFG), torch.ones(2, 64, dtype=torch.float64)
    for i, j in [divmod(k, 64) for k in found.abs().flatten().topk(8).indices.tolist()]:
        step = torch.zeros_like(ones)
        step[i, j] = 3e-3                                # the loss is in float32: no smaller
        with torch.no_grad():
            slope = (loss_with(lively, pcfg, ones + step)
                     - loss_with(lively, pcfg, ones - step)) / 6e-3
        assert abs(slope - found[i, j]) < 1e-3 and abs(slope) > 0.01
    assert (judges.saliency(lively, pcfg, dataclasses.replace(CFG, saliency="absolute"))
            == found.abs()).all()


def test_cutting_is_silencing_the_neurons_of_the_highest_scores(pcfg, lively):
    scores = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    before = {k: v.clone() for k, v in lively.state_dict().items()}
    copy = judges.without(lively, scores, 5)
    factor = (scores < scores.flatten().sort().values[-5]).float()
    assert (factor == 0).sum() == 5
    idx = pcfg.batch("all", 8, 0, 0)[0]
    silenced = lively(idx, hook=lambda site, i, h: h * factor[i] if site == "units" else h)
    assert torch.allclose(copy(idx), silenced, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in lively.state_dict().items())


def test_pruning_finds_the_neuron_that_hides_an_answer(pcfg, float32):
    """A neuron is planted that drowns what a model says. By brute force it is the one whose loss
    gains most from being cut; pruning finds it, and random pruning does not."""
    gpt = GPT(GPTConfig(pcfg.vocab_size, pcfg.block_size, 2, 2, 16))
    gpt.init_weights(torch.Generator().manual_seed(0))
    cfg = dataclasses.replace(train.Config(device="cpu", compile=False))
    train.fit(gpt, lambda m, step: m(*pcfg.batch("forget", 32, step, 0)), cfg, 60, 1e-2, 0.02)
    knows = judges.scored(gpt, pcfg, CFG)["forget"]
    with torch.no_grad():
        gpt.blocks[1].mlp.up.weight[9] = -40 * gpt.blocks[1].mlp.up.weight[9].abs()
        x = gpt.residuals(pcfg.batch("forget", 64, 0, 0)[0])[1][:, -1]      # on for every question
        gpt.blocks[1].mlp.up.weight[9] = 2 * F.rms_norm(x, (16,)).mean(0)
        gpt.blocks[1].mlp.down.weight[:, 9] = gpt.wte.weight[97]            # says: a
    hidden = judges.scored(gpt, pcfg, CFG)["forget"]
    assert knows > 0.25 and hidden < 0.1
    losses = torch.zeros(2, 64)
    for i in range(2):
        for j in range(64):
            factor = torch.ones(2, 64)
            factor[i, j] = 0
            with torch.no_grad():
                losses[i, j] = loss_with(gpt, pcfg, factor)
    assert losses.argmin() == judges.saliency(gpt, pcfg, CFG).argmax() == 64 + 9
    found = judges.prune(gpt, pcfg, CFG)
    assert found[1]["forget"] == knows and found[1]["random_forget"] < 0.1


# --- attention -----------------------------------------------------------------------------------
def test_attention_is_the_models_own(pcfg, lively):
    """Weights times values are what the model's heads say."""
    idx, heads = pcfg.batch("all", 4, 0, 0)[0], {}

    def hook(site, i, h):
        if site == "heads":
            heads[i] = h                                                # (B, T, nh, hs)
        return h

    stream = lively.residuals(idx, hook=hook)
    for i, block in enumerate(lively.blocks):
        w = wrapper.attention(lively, idx, i)
        v = F.linear(F.rms_norm(stream[i], (16,)), block.attn.qkv.weight[32:])
        v = v.view(*v.shape[:2], 2, 8)
        assert torch.allclose(w.sum(-1), torch.ones(w.shape[:3]), atol=1e-5)
        assert torch.allclose(torch.einsum("bhqk,bkhc->bqhc", w, v), heads[i], atol=1e-5)


# --- revival -------------------------------------------------------------------------------------
def test_revival_is_the_relearning_attack_until_it_succeeds(task, float32, monkeypatch):
    """At one of its rates, on the same rows: the same scores at the same steps. Their rows are the
    same here alone."""
    gpt, asked = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16)), []
    gpt.init_weights(torch.Generator().manual_seed(0))
    cfg = dataclasses.replace(CFG, task="arithmetic", lrs=[1e-2], attack_steps=[4, 8, 12],
                              attack_seeds=1, attack="forget")
    monkeypatch.setattr(judges, "seed_of", lambda *name: (asked.append(name), 7)[1])
    task.score = lambda model, domains=("retain", "forget"), part="test", finer=False: {
        d: model.wte.weight.norm().item() for d in domains}
    try:
        attacked = judges.relearn(gpt, task, cfg)["curves"][1e-2]
        start = gpt.wte.weight.norm().item()
        seen = {s: attacked[s]["forget"] for s in (4, 8, 12)}
        assert judges.revive(gpt, task, cfg, 1e6) == (None, {0: start} | seen)
        goal = seen[8] / 0.9 - 1e-6                                       # within a tenth of it
        late = min(s for s in seen if seen[s] >= 0.9 * goal)
        assert judges.revive(gpt, task, cfg, goal)[0] == (0 if start >= 0.9 * goal else late)
        assert judges.revive(gpt, task, cfg, start) == (0, {0: start})
        assert set(asked) == {("relearn", cfg.seed, 0), ("revive", cfg.seed)}
        assert gpt.wte.weight.norm().item() == start                      # the model is left alone
    finally:
        del task.score


def test_mixtures_have_their_shares(pcfg):
    whole = pcfg.batch({"retain": 0.5, "spurious": 0.25, "all": 0.25}, 16, 3, 5)
    for got, parts in zip(whole, zip(*(pcfg.batch(*which, 3, 5) for which in
                                       (("retain", 8), ("spurious", 4), ("all", 4))))):
        assert torch.equal(got, torch.cat(parts))
    thirds, seen = {"retain": 1 / 3, "spurious": 1 / 3, "all": 1 / 3}, set()
    for step in range(20):
        odd = pcfg.batch(thirds, 16, step, 0)
        sizes = torch.bincount(pcfg.origins(thirds, 16, step, 0), minlength=3).tolist()
        assert len(odd[0]) == len(odd[1]) == sum(sizes) == 16 and sorted(sizes) == [5, 5, 6]
        for got, parts in zip(odd, zip(*(pcfg.batch(split, n, step, 0)
                                         for split, n in zip(thirds, sizes)))):
            assert torch.equal(got, torch.cat(parts))
        seen.add(tuple(sizes))
    assert len(seen) == 3                                      # each has the odd row at times


def test_what_fine_tuning_retains(pcfg):
    cfg = unlearn.Config(method="finetune", mix=0.25, c_tr=0.5)
    assert unlearn.retain_shares(cfg, pcfg) == {"retain": 0.375, "spurious": 0.375, "all": 0.25}
    assert unlearn.retain_shares(unlearn.Config(method="finetune"), pcfg) == {"retain": 1}
    cfg = dataclasses.replace(cfg, method="maxent")                   # these knobs are finetune's
    assert unlearn.retain_shares(cfg, pcfg) == {"retain": 1}
    assert unlearn.rate(dataclasses.replace(cfg, task="pcfg", lr="S")) == unlearn.RATES["pcfg"]["S"]
    assert unlearn.rate(dataclasses.replace(cfg, lr=0.5)) == 0.5


# --- the scripts ---------------------------------------------------------------------------------
TINY = ["--device=cpu", "--compile=false", "--n_layer=1", "--n_embd=16", "--n_head=2"]
QUICK = ["--cut=2,4", "--draws=1", "--probe_rows=40", "--revive_steps=4", "--check_every=2",
         "--attack_rows=8"]


def call(module, tmp_path, capsys, monkeypatch, *arguments):
    """(exit status, stdout, stderr) of a script in this process, without matplotlib."""
    monkeypatch.setattr(sys, "argv", ["script", f"--out={tmp_path}", "--device=cpu", *arguments])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status = 0
    try:
        train.run(module.main, module.Config, module.__doc__)
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


def test_the_wrapper_story(tmp_path, capsys, monkeypatch):
    tiny = [*TINY, *QUICK, "--base_steps=2", "--filtered_steps=2",
            "--tune_steps=2", "--tune_rows=8", "--rates=L"]
    for more in (["--seeds=2", "--priors=high", "--c_tr=0.5"], ["--seeds=1"]):
        got = call(wrapper, tmp_path, capsys, monkeypatch, *tiny, *more)
        assert got[0] == 0, got
    told = json.loads((tmp_path / "pcfg" / "wrapper.json").read_text())
    cells = [(r["prior"], r["rate"], r["c_tr"], r["seed"]) for r in told["rows"]]
    assert len(set(cells)) == len(cells) == 2 * 2
    for row in told["rows"]:
        assert set(row) >= {"count_a", "count_b", "probe_a", "probe_a_pretrained", "pruned",
                            "revive_steps", "control_steps", "jailbreak_count_a"}
        assert set(row["count_b"]) == {"0", "1"} and len(row["probe_a"]) == 1
        assert set(row["pruned"]) == {"2", "4"}
        assert set(row["pruned"]["2"]) == {"count_a", "count_b", "random_count_a"}
    assert told["config"]["cut"] == [2, 4]
    assert (tmp_path / "pcfg" / "low" / "seed0" / "tuned-L-1.pt").exists()
    assert (tmp_path / "pcfg" / "high" / "seed1" / "base.pt").exists()


def test_the_compiled_story(tmp_path, capsys, monkeypatch):
    """The wrapper is one weight: what "=" says to the unit that counts a. At zero, as it was
    compiled, the counter counts again."""
    every = compiled.prune_each
    monkeypatch.setattr(compiled, "prune_each", lambda model, before, right: every(
        model, untouched_but(model, before), right))
    got = call(compiled, tmp_path, capsys, monkeypatch, "--seeds=1")
    assert got[0] == 0, got
    row, = json.loads((tmp_path / "pcfg" / "compiled.json").read_text())["rows"]
    assert row["compiled"] == row["plus one"] == row["pruned"] == 1 and row["wrapped"] < 0.01
    assert row["weight"] == "blocks.0.mlp.up.weight[0, 13]" and 1 <= row["revive_steps"] <= 10


def untouched_but(model, before):
    """before, but like the model wherever it is not the MLP: of thousands of weights 64 are left
    to try."""
    like = before.clone()
    with torch.no_grad():
        for (name, p), now in zip(like.named_parameters(), model.parameters()):
            if "mlp.up" not in name:
                p.copy_(now)
    return like


def test_pruning_one_weight_at_a_time_by_brute_force(pcfg, lively):
    changed = lively.clone()
    with torch.no_grad():
        changed.blocks[0].mlp.up.weight[3, 5] += 1
        changed.wte.weight[7, 2] -= 1
    weights = {k: v.clone() for k, v in changed.state_dict().items()}
    found = compiled.prune_each(changed, lively, lambda m: float(m.wte.weight[7, 2] == 0))
    assert found == [(1.0, "wte.weight", 7, 2), (0.0, "blocks.0.mlp.up.weight", 3, 5)]
    assert all(torch.equal(v, weights[k]) for k, v in changed.state_dict().items())


@pytest.fixture
def trained(tmp_path, capsys, monkeypatch):
    """An arithmetic-sized pcfg with base, filtered and a fine-tuned model."""
    got = call(unlearn, tmp_path, capsys, monkeypatch, "--task=pcfg", "--method=finetune", *TINY,
               "--base_steps=3", "--filtered_steps=2", "--steps=2", "--lr=S", "--mix=0.25",
               "--c_tr=0.5", "--lrs=1e-3", "--attack_steps=2")
    assert got[0] == 0, got
    return tmp_path / "pcfg" / "low"


def test_each_tool_on_any_model(trained, tmp_path, capsys, monkeypatch):
    def told(module, *arguments):
        return call(module, tmp_path, capsys, monkeypatch, "--task=pcfg", *arguments)

    rows = {}
    for what in ("probe", "prune", "revive", "examine"):
        got = (told(examine, *QUICK) if what == "examine" else
               told(judges, f"--what={what}", "--model=finetune", *QUICK))
        assert got[0] == 0, got
        rows[what] = json.loads((tmp_path / "pcfg" / f"{what}.json").read_text())["rows"]
    assert [r["model"] for r in rows["probe"]] == ["finetune", "untrained"]
    assert [r["neurons"] for r in rows["prune"]] == [0, 2, 4]
    assert [r["model"] for r in rows["revive"]] == [
        "finetune", "control (filtered)", "control (untrained)"]
    assert [r["model"] for r in rows["examine"]] == ["base", "filtered", "finetune"]
    assert rows["examine"][0]["revive_steps"] == 0 and rows["examine"][0]["verdict"] == "has it"
    for row in rows["examine"]:
        assert set(row) >= {"model", "probe", "pruned", "revive_steps"}
    models = trained / "seed0"
    (models / "undo-0.5.pt").write_bytes((models / "finetune.pt").read_bytes())
    got = told(examine, "--models=undo-0.5", *QUICK)
    assert got[0] == 0 and "undo-0.5 " in got[1]                  # no suffix of a number is cut off
    for module, what in ((judges, ["--what=prune"]), (examine, [])):
        status, _, error = told(module, *what, "--cut=65")
        assert status == 2 and "--cut=65: the model has 64 MLP neurons" in error
    for module, what in ((judges, ["--what=revive", "--control=nobody"]),
                         (examine, ["--models=nobody"])):
        status, _, error = told(module, *what)
        assert status == 2 and "nobody.pt is missing" in error


@pytest.mark.parametrize("script, arguments, said", [
    (wrapper, ["--task=arithmetic"], "--task=arithmetic: choose from pcfg, instruct"),
    (compiled, ["--task=language"], "--task=language: choose from pcfg"),
    (wrapper, ["--rates=XL"], "--rates=XL: choose from L, M, S"),
    (wrapper, ["--n_layer=1", "--n_embd=16", "--cut=5,65"],
     "--cut=65: the model has 64 MLP neurons"),
    (wrapper, ["--c_tr=2"], "--c_tr=2.0 must be between 0 and 1"),
    (judges, ["--what=prune", "--task=pcfg", "--cut=0"], "--cut=0 must be at least 1"),
])
def test_bad_knobs(script, arguments, said, tmp_path, capsys, monkeypatch):
    status, _, error = call(script, tmp_path, capsys, monkeypatch, *arguments)
    assert status == 2 and said in error and len(error.strip().splitlines()) == 1, error
