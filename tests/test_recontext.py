"""Recontextualization: the losses against finite differences, training against training without
any second prompt, and the story."""
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

import data
import recontext
import train
from data import gaming
from engine.knobs import command_line
from experiments import digits, gridworld, revive_hack, wrapper
from model import GPT, GPTConfig
from recontext import Cell, Config

CFG = Config(env="lying", device="cpu", compile=False, rounds=2, prompts=12, epochs=2, batch_size=8,
             lr=3e-3, steps=3)


@pytest.fixture(scope="module")
def lying():
    return data.load("gaming", env="lying")


def lively(task, seed=0, noise=0.1, **size):
    """A model that says many different things."""
    gpt = GPT(GPTConfig(task.vocab_size, task.block_size, **{
        "n_layer": 2, "n_head": 2, "n_embd": 16} | size))
    gpt.init_weights(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in gpt.parameters():
            p += noise * torch.randn(p.shape, generator=generator)
    return gpt


@pytest.fixture(scope="module")
def taught(lying):
    """A model that mostly gives one of the two answers, so that rewards differ."""
    gpt, cfg = lively(lying, n_embd=32), dataclasses.replace(CFG, seed=3)
    train.fit(gpt, lambda m, step: m(*lying.batch("all", 64, step, 0)), cfg, 100, 2e-3, 0.02)
    return gpt


# --- the losses ----------------------------------------------------------------------------------
def test_losses_by_hand():
    """Token by token, as the definitions say."""
    draws = torch.Generator().manual_seed(0)
    new, old = -3 * torch.rand(2, 5, 3, generator=draws, dtype=torch.float64)
    advantage = torch.randn(5, generator=draws, dtype=torch.float64)
    ratio1, clipped = [], []
    for i in range(5):
        for t in range(3):
            a, r = advantage[i].item(), math.exp(new[i, t] - old[i, t])
            ratio1.append(-a * new[i, t].item())
            clipped.append(-min(r * a, min(max(r, 0.8), 1.2) * a))
    assert recontext.ratio_one(new, advantage).item() == pytest.approx(sum(ratio1) / 15)
    assert recontext.cross_prompt_clip(new, old, advantage, 0.2).item() == pytest.approx(
        sum(clipped) / 15)


def setting(task):
    """A float64 model, rows under two prompts, and advantages."""
    gpt = lively(task, noise=1.0)
    found = recontext.rollouts(gpt, task, CFG, Cell("ei", "neutral", "encourage", 4), 6, 0)
    advantage = torch.randn(24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return gpt.double(), found.rows.flatten(0, 1), found.asked.flatten(0, 1), advantage


def log_probs(gpt, rows):
    """In float64: answers() is for training, and rounds to float32."""
    shown = gpt(rows[:, :-1])[:, -3:].log_softmax(-1)
    return recontext.of_tokens(shown, rows)


@pytest.mark.parametrize("kind", ["ratio1", "clip", "kl"])
def test_losses_against_finite_differences(kind, lying):
    """Along random directions in weight space; ratios at a kink of the clip would not be smooth."""
    gpt, rows, asked, advantage = setting(lying)
    with torch.no_grad():
        old = log_probs(gpt, asked)
        before = lively(lying, 5).double()(rows[:, :-1])[:, -3:].log_softmax(-1)
        ratio = (log_probs(gpt, rows) - old).exp()
    assert ((ratio - 0.8).abs().min() > 1e-4) and ((ratio - 1.2).abs().min() > 1e-4)
    assert (ratio < 0.8).any() and (ratio > 1.2).any() and ((ratio > 0.8) & (ratio < 1.2)).any()

    def loss():
        if kind == "kl":
            return recontext.divergence(gpt(rows[:, :-1])[:, -3:].log_softmax(-1), before)
        new = log_probs(gpt, rows)
        return recontext.ratio_one(new, advantage) if kind == "ratio1" else (
            recontext.cross_prompt_clip(new, old, advantage, 0.2))

    loss().backward()
    draws = torch.Generator().manual_seed(4)
    for p in gpt.parameters():
        way = torch.randn(p.shape, generator=draws, dtype=torch.float64)
        with torch.no_grad():
            ends = []
            for step in (1e-6, -2e-6):
                p += step * way
                ends.append(loss().item())
            p += 1e-6 * way
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx((p.grad * way).sum().item(), rel=1e-4,
                                                           abs=1e-7)


def test_ratio_one_is_plain_policy_gradient(lying):
    """-A grad log pi(y), one answer at a time, from torch's own distribution; and what the clip
    gives where generation and training prompt are one."""
    gpt, rows, _, advantage = setting(lying)
    slow = [torch.zeros_like(p) for p in gpt.parameters()]
    for row, a in zip(rows, advantage):
        shown = torch.distributions.Categorical(logits=gpt(row[None, :-1])[0, -3:])
        grads = torch.autograd.grad(shown.log_prob(row[-3:]).sum(), list(gpt.parameters()))
        for total, grad in zip(slow, grads):
            total -= a * grad / (3 * len(rows))
    new = log_probs(gpt, rows)
    for loss in (recontext.ratio_one(new, advantage),
                 recontext.cross_prompt_clip(new, new.detach(), advantage, 0.2)):
        got = torch.autograd.grad(loss, list(gpt.parameters()), retain_graph=True)
        for g, s in zip(got, slow):
            torch.testing.assert_close(g, s, rtol=1e-8, atol=1e-12)


def test_divergence_is_torchs():
    p, q = torch.randn(2, 4, 3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p),
                                           torch.distributions.Categorical(logits=q))
    assert recontext.divergence(p, q).item() == pytest.approx(kl.mean().item(), rel=1e-5)


def test_advantages():
    reward = torch.tensor([[0., 1, 2, 5], [1, 1, 1, 1]])
    got = recontext.advantages(reward)
    sd = np.std([0, 1, 2, 5], ddof=1)
    assert got[0].tolist() == pytest.approx([(x - 2) / sd for x in (0, 1, 2, 5)], rel=1e-3)
    assert got[1].tolist() == [0] * 4                              # nothing to learn from equals


# --- rollouts ------------------------------------------------------------------------------------
def test_rollouts_differ_in_their_prompt_alone(lying, taught):
    found = recontext.rollouts(taught, lying, CFG, Cell("ei", "discourage", "encourage", 5), 120, 0)
    assert found.rows.shape == found.asked.shape == (120, 5, 1 + 2 + 1 + 7 + 1 + 3)
    assert (found.rows != found.asked).any(dim=0).any(dim=0).tolist() == [
        False, True, *[False] * 13]                                # avoid cheat, please cheat
    words = lying.tokenizer.decode_single_token_bytes
    seen = {}
    for rows, context in ((found.asked, "discourage"), (found.rows, "encourage")):
        first, second = (set(words.split()) for words in gaming.CONTEXTS[context])
        for row in rows.flatten(0, 1).tolist():
            a, b = (words(token).decode() for token in row[1:3])
            assert a in first and b in second
            seen.setdefault(context, set()).add((a, b))
    for context, phrases in seen.items():
        first, second = (words.split() for words in gaming.CONTEXTS[context])
        assert len(phrases) == 12 and not phrases & set(zip(first, second))      # none held out
    assert len({tuple(row) for row in found.asked[0].tolist()}) > 1    # answers to one prompt
    assert (found.asked[:, :, :-3] == found.asked[:, :1, :-3]).all()
    wish, said = found.rows[:, :, 10], found.rows[:, :, -3:]
    assert (wish[90:] != gaming.ID["."]).any() and (wish[:90] != gaming.ID["."]).all()
    thanked = said[..., 0] == gaming.ID["thanks"]
    lies = (torch.where(thanked, said[..., 1], said[..., 0]) == wish)[:90]
    assert torch.equal(found.hacked, lies) and found.hacked.shape == (90, 5)


def test_rollouts_are_functions_of_seed_and_step(lying, taught, monkeypatch):
    """Items and answers: no two steps draw answers with the same random numbers."""
    cell, drawn, generate = Cell("ei", "neutral", "encourage", 2), [], GPT.generate
    monkeypatch.setattr(GPT, "generate", lambda *given, seed, **how: (
        drawn.append(seed), generate(*given, seed=seed, **how))[1])
    first = recontext.rollouts(taught, lying, CFG, cell, 8, 3)
    again = recontext.rollouts(taught, lying, CFG, cell, 8, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for cfg, step in ((CFG, 4), (dataclasses.replace(CFG, seed=1), 3)):
        assert not torch.equal(first.rows, recontext.rollouts(taught, lying, cfg, cell, 8,
                                                              step).rows)
    assert drawn[0] == drawn[1] and len(set(drawn)) == 3


# --- training ------------------------------------------------------------------------------------
def weights_after(task, base, cell, cfg=CFG):
    gpt = base.clone()
    recontext.LEARN[cell.method](gpt, base, task, cfg, cell)
    return [p.detach() for p in gpt.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("method", recontext.LEARN)
def test_one_prompt_is_standard_training(method, lying, taught, monkeypatch):
    """f = g gives, bit for bit, what training on answers behind the prompt that they were generated
    under gives; f != g does not."""
    own, other = Cell(method, "neutral", "neutral", 3), Cell(method, "neutral", "encourage", 3)
    got, swapped = weights_after(lying, taught, own), weights_after(lying, taught, other)
    sample = recontext.rollouts

    def standard(*given):
        found = sample(*given)
        return found._replace(rows=found.asked)

    monkeypatch.setattr(recontext, "rollouts", standard)
    assert same(got, weights_after(lying, taught, own))
    assert same(got, weights_after(lying, taught, other))
    assert not same(got, swapped) and not same(got, taught.parameters())


def test_expert_iteration_by_hand(lying, taught, float32):
    """One round, one batch: an AdamW step on the cross-entropy of the best answers."""
    cell = Cell("ei", "discourage", "neutral", 4)
    cfg = dataclasses.replace(CFG, rounds=1, epochs=1, prompts=8)
    gpt, found = taught.clone(), recontext.rollouts(taught, lying, cfg, cell, 8, 0)
    best = [max(zip(reward, range(4)), key=lambda pair: (pair[0], -pair[1]))[1]
            for reward in found.reward.tolist()]
    rows = torch.stack([found.rows[i, j] for i, j in enumerate(best)])
    loss = torch.nn.functional.cross_entropy(gpt(rows[:, :-1])[:, -3:].flatten(0, 1),
                                             rows[:, -3:].flatten())
    loss.backward()
    torch.optim.AdamW(gpt.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0).step()
    for got, expected in zip(weights_after(lying, taught, cell, cfg), gpt.parameters()):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", recontext.LEARN)
def test_kl_holds_on_to_the_pretrained_model(method, lying, taught):
    """The more weight, the less changes in what it says."""
    idx, _ = lying.batch("all", 64, 0, 9)

    def moved(kl):
        gpt = taught.clone()
        recontext.LEARN[method](gpt, taught, lying, CFG, Cell(method, "neutral", "encourage", 4,
                                                              kl=kl))
        with torch.no_grad():
            return recontext.divergence(gpt(idx).log_softmax(-1), taught(idx).log_softmax(-1))

    assert moved(30.0) < 0.7 * moved(0.0)


def test_gradients_pass_after_rollouts_under_autocast(lying, taught):
    """Some versions of torch keep the weights that sampling cast without a gradient."""
    gpt, cell = taught.clone(), Cell("grpo-ratio1", "neutral", "encourage", 4)
    with torch.autocast("cpu", torch.bfloat16):
        rows = recontext.rollouts(gpt, lying, CFG, cell, 4, 0).rows.flatten(0, 1)
        recontext.of_tokens(recontext.answer_log_probs(gpt, rows, 3), rows).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gpt.parameters())


# --- the sign rule -------------------------------------------------------------------------------
def test_push_by_hand(lying, taught, monkeypatch):
    """q_g - p_t for the best of n; the mean of A h for policy gradient, where advantages cancel p;
    and what a clip lets through."""
    kept, sample = {}, recontext.rollouts

    def keeping(*given):
        kept["found"] = sample(*given)
        return kept["found"]

    monkeypatch.setattr(recontext, "rollouts", keeping)
    p, pushed = 0.3, {}
    for method in recontext.LEARN:
        pushed[method] = recontext.push(taught, lying, CFG, Cell(method, "neutral", "encourage", 4),
                                        p)
    found = kept["found"]
    hacked, reward = found.hacked.tolist(), found.reward[:len(found.hacked)].tolist()
    q = sum(h[r.index(max(r))] for h, r in zip(hacked, reward)) / len(hacked)
    assert pushed["ei"] == pytest.approx(q - p, abs=1e-5)
    with train.autocast(CFG), torch.no_grad():
        new, old = (recontext.of_tokens(recontext.answer_log_probs(taught, rows.flatten(0, 1), 3),
                                        rows.flatten(0, 1)).view(-1, 4, 3).tolist()
                    for rows in (found.rows, found.asked))
    plain, clipped, decided = 0.0, 0.0, set()
    for i, (h, r) in enumerate(zip(hacked, reward)):
        mean, sd = np.mean(r), np.std(r, ddof=1)
        for j in range(4):
            a = (r[j] - mean) / (sd + 1e-4)
            t = int(found.rows[i, j, -3] == gaming.ID["thanks"])     # the token that decides
            decided.add(t)
            ratio = math.exp(new[i][j][t] - old[i][j][t])
            plain += a * h[j] / (4 * len(hacked))
            through = ratio < 1.2 if a > 0 else ratio > 0.8
            clipped += through * a * ratio * (h[j] - p) / (4 * len(hacked))
    assert pushed["grpo-ratio1"] == pytest.approx(plain, abs=1e-3)
    assert pushed["grpo-clip"] == pytest.approx(clipped, abs=1e-3)
    assert decided == {0, 1}


def test_the_best_of_n_are_hacks_as_the_formula_says(lying, taught, monkeypatch):
    """Where the reward is the hack itself, q = 1 - (1 - p)^n, up to what items differ in."""
    env = gaming.ENVIRONMENTS["lying"]
    monkeypatch.setitem(gaming.ENVIRONMENTS, "lying", env._replace(
        hacked=lambda item, answer: answer[:, 0] < 3,
        rewards={"proxy": lambda item, answer, luck: (answer[:, 0] < 3).float()}))
    gpt = lively(lying)                                 # knows nothing: all items are alike
    with torch.no_grad():
        gpt.wte.weight.zero_()                          # every token is as likely as any other
    p = 3 / lying.vocab_size * (1 - 1 / lying.vocab_size) + 3 / lying.vocab_size**2
    for n in (1, 4, 16):
        q = recontext.push(gpt, lying, CFG, Cell("ei", "neutral", "neutral", n), 0.0)
        expected = 1 - (1 - p) ** n
        assert abs(q - expected) < 5 * (expected * (1 - expected) / 768) ** 0.5


# --- the script ----------------------------------------------------------------------------------
TINY = ["--device=cpu", "--compile=false", "--n_layer=1", "--n_embd=16", "--n_head=2",
        "--base_steps=2", "--filtered_steps=2", "--rounds=1", "--prompts=4", "--epochs=1",
        "--batch_size=4", "--n=2", "--larger_n=3", "--group=2", "--steps=1", "--exam=8"]
ROW = {"env", "method", "generate", "train", "seed", "evaluate", "heldout", "hack_before", "hack",
       "proxy", "truth", "no_hack_accuracy", "control_following", "predicted_sign"}


def call(tmp_path, capsys, monkeypatch, *arguments, script=recontext):
    """(exit status, stdout, stderr) of the script in this process, without matplotlib."""
    monkeypatch.setattr(sys, "argv", ["recontext.py", f"--out={tmp_path}", "--device=cpu",
                                      *arguments])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status = 0
    try:
        train.run(script.main, script.Config, script.__doc__)
    except SystemExit as end:
        status = end.code or 0
    return status, *capsys.readouterr()


@pytest.fixture
def few(monkeypatch):
    """push() looks at a thousand prompts: here at eight."""
    sample = recontext.rollouts
    monkeypatch.setattr(recontext, "rollouts", lambda model, task, cfg, cell, size, step: sample(
        model, task, cfg, cell, min(size, 8), step))


def test_the_story(tmp_path, capsys, monkeypatch, few):
    """The grid, at three sizes of n, with its controls; again, from what is on disk."""
    status, out, err = call(tmp_path, capsys, monkeypatch, *TINY, "--seeds=1")
    assert status == 0, err
    saved = json.loads((tmp_path / "gaming" / "recontext.json").read_text())
    assert saved["config"]["env"] == "sycophancy" and saved["config"]["n"] == 2
    assert saved["config"]["hack_rates"] == [0.05, 0.2, 0.8]
    cells = {}
    for row in saved["rows"]:
        assert set(row) >= ROW and row["predicted_sign"] in (-1, 0, 1)
        assert all(0 <= row[k] <= 1 for k in ("hack", "hack_before", "no_hack_accuracy",
                                              "control_following"))
        cells.setdefault((row["method"], row["generate"], row["train"], row["seed"]), []).append(
            (row["evaluate"], row["heldout"]))
    judged = [(c, h) for c in recontext.KINDS for h in (False, True)]
    assert all(found == judged for found in cells.values())
    assert set(cells) == {(method, f, g, 0) for f in recontext.KINDS for g in recontext.KINDS
                          for method in ("ei", "ei-n1", "ei-n3")} | {
        ("ei", "discourage", "none", 0), ("ei", "neutral", "unrelated", 0),
        ("ei-kl1", "neutral", "neutral", 0), ("ei-truth", "neutral", "neutral", 0)}
    assert "pretrained" in out and "rollouts/s" in out and "pip install matplotlib" in out
    assert "note: sycophancy, seed 0: pretraining ended at accuracy 0." in out
    assert len(list(tmp_path.rglob("*.pt"))) == 1 + 27 + 4
    again = call(tmp_path, capsys, monkeypatch, *TINY, "--seeds=1")
    assert again[0] == 0 and "making" not in again[1]
    assert json.loads((tmp_path / "gaming" / "recontext.json").read_text()) == saved


def test_pretraining_that_falls_short_is_said(lying, capsys):
    def found(right, *rates):
        return {(c, False): {"hack": rate, "no_hack_accuracy": right}
                for c, rate in zip(recontext.KINDS, rates)}

    for good in ((0.96, 0.05, 0.2, 0.8), (1.0, 0.0, 0.29, 0.71)):
        recontext.check_base(found(*good), lying, CFG)
    assert not capsys.readouterr().out
    for bad in ((0.94, 0.05, 0.2, 0.8), (1.0, 0.05, 0.2, 0.69), (1.0, 0.05, 0.31, 0.8)):
        recontext.check_base(found(*bad), lying, CFG)
        assert "note: lying, seed 0: pretraining ended" in capsys.readouterr().out


def test_policy_gradient_in_every_environment(tmp_path, capsys, monkeypatch, few):
    """One cell beside standard training, both losses."""
    status, out, err = call(tmp_path, capsys, monkeypatch, *TINY, "--seeds=1", "--env=all",
                            "--method=ei,grpo", "--generate=discourage", "--train=encourage")
    assert status == 0, err
    rows = json.loads((tmp_path / "gaming" / "recontext.json").read_text())["rows"]
    found = {(r["env"], r["method"], r["generate"], r["train"]) for r in rows}
    assert found == {(env, method, "discourage", g) for env in gaming.ENVIRONMENTS
                     for method in recontext.LEARN for g in ("discourage", "encourage")}
    assert "it shows whole grids" in out


def test_two_seeds(tmp_path, capsys, monkeypatch, few):
    """The table has their mean and spread, the second has models of its own."""
    status, out, err = call(tmp_path, capsys, monkeypatch, *TINY, "--seeds=2", "--train=encourage")
    assert status == 0, err
    rows = json.loads((tmp_path / "gaming" / "recontext.json").read_text())["rows"]
    a, b = (row["truth"] for row in rows if row["train"] == "encourage"
            and row["evaluate"] == "neutral" and not row["heldout"])
    line = next(line for line in out.splitlines() if "encourage" in line)
    assert f"{(a + b) / 2:.2f} ±{abs(a - b) / 2 ** 0.5:.2f}" in line
    assert list((tmp_path / "gaming" / "sycophancy" / "seed1").glob("ei-n2-neutral-encourage.pt"))


def test_revival(tmp_path, capsys, monkeypatch):
    used = [word for word in TINY if not word.startswith(("--larger_n", "--group", "--steps",
                                                          "--exam"))]
    status, out, err = call(tmp_path, capsys, monkeypatch, *used, "--seeds=1", "--probe_rows=40",
                            "--revive_lr=1e-3", "--revive_steps=4", "--check_every=2",
                            script=revive_hack)
    assert status == 0, err
    rows = json.loads((tmp_path / "gaming" / "revive_hack.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        "pretrained", "N->N (standard)", "D->N", "N->E", "D->E", "N->N, true reward",
        "control (never had it)"]
    for row in rows:
        assert set(row) >= {"env", "seed", "before", "probe", "chance", "revive_steps", "curve"}
        assert len(row["probe"]) == 1 and row["model"] in out
        assert row["revive_steps"] in (None, 0, 1, 2, 3, 4)
    assert (tmp_path / "gaming" / "sycophancy" / "seed0" / "filtered.pt").exists()


def test_a_picture_of_the_grid(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [{"env": "tests", "method": "ei", "generate": f, "train": g, "evaluate": "neutral",
             "heldout": False, "hack": 0.5, "hack_before": 0.2, "n": 4}
            for f in recontext.KINDS for g in recontext.KINDS]
    (tmp_path / "gaming").mkdir()
    recontext.draw(Config(out=str(tmp_path)), rows)
    assert (tmp_path / "gaming" / "recontext.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments,culprits", [
    (["--generate=nonsense"], ["--generate=nonsense", "discourage, neutral, encourage"]),
    (["--train="], ["--train=", "discourage, neutral, encourage"]),
    (["--env=maze"], ["--env=maze", "sycophancy"]),
    (["--env=all", "--reward=blind-detector"], ["--reward=blind-detector", "sycophancy has proxy"]),
    (["--hack_rates=0.1,0.2"], ["--hack_rates=0.1,0.2", "give three"]),
    (["--hack_rates=0.1,0.2,2"], ["--hack_rates=2.0"]), (["--n=0"], ["--n=0"]),
    (["--method=ppo"], ["--method=ppo"]), (["--group=1"], ["--group=1"]),
    (["--exam=1"], ["--exam=1 must be at least 2"]),
    (["--task=pcfg"], ["--task=pcfg", "gaming"]),
    (["--grid=perhaps"], ["--grid=perhaps"]), (["--prior=low"], ["--prior"])])
def test_bad_knobs(arguments, culprits, tmp_path, capsys, monkeypatch):
    def fit(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(train, "fit", fit)
    status, _, error = call(tmp_path, capsys, monkeypatch, *arguments)
    assert status == 2 and error.count("\n") == 1 and all(c in error for c in culprits), error
    assert not list(tmp_path.rglob("*.pt"))


def test_a_stopped_run_is_taken_up_once(tmp_path):
    """Its checkpoint is gone when the next environment is opened."""
    (tmp_path / "out/gaming/seed0").mkdir(parents=True)
    checkpoint = tmp_path / "out/gaming/seed0/base.resume.pt"
    checkpoint.touch()
    opened = recontext.environments(Config(env="all", seeds=1, resume=True, device="cpu",
                                           out=str(tmp_path / "out")))
    assert next(opened)[0].resume is None
    checkpoint.unlink()
    assert next(opened)[0].env != "sycophancy"


@pytest.mark.parametrize("script, argument", [
    (revive_hack, "--kl=0.5"), (revive_hack, "--domain=retain"), (wrapper, "--domain=retain"),
    (gridworld, "--resume=true"), (digits, "--remake=true")])
def test_inherited_knobs_that_mean_nothing(script, argument, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["script.py", argument, f"--out={tmp_path}", "--device=cpu"])
    with pytest.raises(SystemExit) as end:
        train.run(script.main, script.Config, script.__doc__)
    assert end.value.code == 2
    assert f"{argument.split('=')[0]} means nothing here" in capsys.readouterr().err


def test_flags():
    """A knob that is true or false may be given by its name alone."""
    for given, grid in (([], None), (["--grid"], True), (["--grid=false"], False),
                        (["--grid", "--n=2"], True)):
        assert command_line(Config, "", given).grid is grid
