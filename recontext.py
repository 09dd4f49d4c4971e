"""Recontextualization: generate under one prompt, train under another (Azarbal et al. 2025).

    python recontext.py                        the 3 x 3 grid on sycophancy, by expert iteration
    python recontext.py --env=all              the same in all four environments
    python recontext.py --method=grpo          by policy gradient, with both of its losses
    python recontext.py --generate=neutral --train=encourage      one cell beside standard training
    python recontext.py --revive               is the hack removed, or wrapped? Probes and revival

A flawed reward teaches to game it. Answers to f(x) are scored by that reward as ever, and then
learned as answers to g(x): if g welcomes gaming more than f does, what is learned is that such
answers were to be expected there. f = g is standard training.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import eval as judges
from data import gaming
from engine.hardware import autocast, counting_flops
from engine.knobs import BadInput, knob
from engine.process import WORLD, run
from engine.report import (
    draw_grid,
    draw_revival,
    mean_sd,
    mean_steps,
    picture,
    table,
    write_rows,
)
from engine.store import identity, obtain
from engine.streams import seed_of, stream
from eval import Foundations, foundation, probe, revive
from train import common, figures, fill, fit, open_task, seeds

KINDS = ("discourage", "neutral", "encourage")


@dataclass
class Config(Foundations):
    task: str = knob("gaming", "the environments are one task", choices=["gaming"])
    env: str = knob("sycophancy", "which environment, or all of them",
                    choices=[*gaming.ENVIRONMENTS, "all"])
    seeds: int = knob(3, "how many seeds, from --seed on", 1)
    method: list[str] = knob(["ei"], "expert iteration, policy gradient, or both",
                             choices=["ei", "grpo"])
    grid: bool | None = knob(None, "all nine pairs of prompts, with controls (auto: unless "
                             "--generate or --train is given)")
    generate: str | None = knob(None, "the prompt f that answers are generated under (auto: "
                                "neutral)", choices=list(gaming.CONTEXTS))
    train: str | None = knob(None, "the prompt g that they are learned under (auto: the same)",
                             choices=list(gaming.CONTEXTS))
    reward: str = knob("proxy", "what answers are scored by: proxy, truth, or another of the "
                       "environment's")
    n: int = knob(4, "ei: answers to a prompt, of which the best is learned", 1, 1000)
    larger_n: int = knob(16, "ei, grid: as many for comparison; 0: none", 0, 1000)
    rounds: int = knob(4, "ei: of generating and learning", 1)
    prompts: int = knob(512, "ei: prompts a round", 1)
    epochs: int = knob(2, "ei: passes over the chosen answers", 1)
    batch_size: int = knob(32, "ei: rows in a batch; grpo: prompts in a step", 1)
    lr: float = knob(1e-4, "AdamW's rate", 0, 1)
    group: int = knob(8, "grpo: answers to a prompt, scored against each other", 2, 1000)
    steps: int = knob(60, "grpo: steps", 1)
    loss: str = knob("both", "grpo: the prompt swapped everywhere, or a clipped ratio across "
                     "prompts", choices=["ratio1", "clip", "both"])
    clip: float = knob(0.2, "grpo: how far the ratio may go from 1", 0, 1)
    kl: float = knob(0.0, "weight of KL(policy || pretrained) under the training prompt", 0)
    strong_kl: float = knob(1.0, "grid: the same for the baseline with a stronger one", 0)
    exam: int = knob(1000, "items to judge by that can be gamed; half as many that cannot", 2)
    revive: bool = knob(False, "fine-tune standard and recontextualized models until the hack is "
                        "back, beside a model that never had it")


class Cell(NamedTuple):
    """One way to train: by what, under which prompts, on which reward, how near to pretraining."""
    method: str                       # ei | grpo-ratio1 | grpo-clip
    generate: str
    train: str
    n: int
    reward: str = "proxy"
    kl: float = 0.0


# --- the losses ----------------------------------------------------------------------------------
def answers(model, rows, n):
    """(B, n, V): log-probabilities of each token at the last n places of rows (B, T)."""
    return model(rows[:, :-1])[:, -n:].float().log_softmax(-1)


def of_tokens(log_probs, rows):
    """(B, n): those of the tokens that stand there."""
    return log_probs.gather(-1, rows[:, -log_probs.size(1):, None])[..., 0]


def ratio_one(new, advantage):
    """-A log pi(y | g(x)): as though y had been generated under g; all ratios are 1.

    new (B, n): log-probabilities of the answers' tokens under the training prompt; advantage (B,)
    """
    return -(advantage[:, None] * new).mean()


def cross_prompt_clip(new, old, advantage, clip):
    """-min(r A, clip(r) A) with r = pi(y | g(x)) / pi_old(y | f(x)), token by token: the ratio
    takes both the change of the policy and the change of the prompt."""
    ratio, advantage = (new - old).exp(), advantage[:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def divergence(log_probs, reference):
    """KL(policy || reference), mean over tokens; both (B, n, V)."""
    return (log_probs.exp() * (log_probs - reference)).sum(-1).mean()


def advantages(reward):
    """(B, n) rewards of n answers to each prompt, in standard deviations from their mean (GRPO:
    Shao et al. 2024)."""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


# --- rollouts ------------------------------------------------------------------------------------
class Rollouts(NamedTuple):
    """n answers to each of B prompts.

    rows       (B, n, T) int64: the answers behind the training prompt g(x)
    asked      (B, n, T): behind the prompt f(x) that they were generated under
    reward     (B, n)
    hacked     (G, n) bool: whether they game, of the items on which one can
    """
    rows: torch.Tensor
    asked: torch.Tensor
    reward: torch.Tensor
    hacked: torch.Tensor


@torch.no_grad()
def rollouts(model, task, cfg, cell, size, step):
    """Fresh items under paraphrases f(x) of cell.generate, answers sampled at temperature 1."""
    env = gaming.environment(task)
    rng = stream("rollouts", cfg.seed, step)
    gameable, harmless = gaming.gameable_of(size, rng)
    item = gaming.items(rng, env, gameable, harmless)
    paraphrase = rng.choice(gaming.SEEN, size)
    f, g = gaming.prompts(rng, task, item, *(gaming.phrases(context, paraphrase)
                                             for context in (cell.generate, cell.train)))
    # A cache would keep weights that were cast without a gradient, and older versions of torch
    # would hand them to the loss that follows
    with autocast(cfg, cache_enabled=False):
        answer = model.generate(f, env.length + 1, temperature=1.0, samples=cell.n,
                                seed=seed_of("answers of rollouts", cfg.seed, step))
    luck = torch.from_numpy(rng.random(len(answer), np.float32)).to(task.device)
    f, g = (prompt.repeat_interleave(cell.n, 0) for prompt in (f, g))
    item, body, _ = gaming.split_off(f, answer)
    reward = env.rewards[cell.reward](item, body, luck).float().view(size, cell.n)
    hacked = env.hacked(item, body).view(size, cell.n)[:gameable]
    asked, rows = (torch.cat((prompt, answer), 1).view(size, cell.n, -1) for prompt in (f, g))
    return Rollouts(rows, asked, reward, hacked)


# --- two ways to learn from them -----------------------------------------------------------------
def penalty(log_probs, rows, reference, kl):
    """The KL term, for what the policy (log_probs) says of rows."""
    if not kl:
        return 0
    with torch.no_grad():
        before = answers(reference, rows, log_probs.size(1))
    return kl * divergence(log_probs, before)


def expert_iteration(model, reference, task, cfg, cell):
    """Rounds of supervised learning on the best of n answers. Trains model; returns the record,
    whose FLOPs are those of fit() and of the rollouts."""
    n = gaming.environment(task).length + 1
    record = {"steps": 0, "flops": 0, "seconds": 0.0, "history": []}
    for turn in range(cfg.rounds):
        with counting_flops() as counter:
            found = rollouts(model, task, cfg, cell, cfg.prompts, turn)
        record["flops"] += counter.get_total_flops()
        best = found.rows[torch.arange(cfg.prompts), found.reward.argmax(1)]     # of equals, one
        rng = stream("order of answers", cfg.seed, turn)
        order = np.concatenate([rng.permutation(cfg.prompts) for _ in range(cfg.epochs)])
        batches = best[torch.from_numpy(order).to(task.device)].split(cfg.batch_size)

        def loss_fn(policy, step):
            rows = batches[step]
            log_probs = answers(policy, rows, n)
            return -of_tokens(log_probs, rows).mean() + penalty(log_probs, rows, reference, cell.kl)

        did = fit(model, loss_fn, cfg, len(batches), cfg.lr, name=f"{name_of(cell)}, {turn + 1}",
                  frozen=[reference] * (cell.kl > 0))
        for at in did["history"]:                       # of the whole, not of this round
            at |= {"step": record["steps"] + at["step"], "flops": record["flops"] + at["flops"]}
        record = {k: record[k] + did[k] for k in record}
    return record


def policy_gradient(model, reference, task, cfg, cell):
    """GRPO, one step for each batch of rollouts. Trains model; returns fit's record."""
    n = gaming.environment(task).length + 1

    def loss_fn(policy, step):
        found = rollouts(model, task, cfg, cell, cfg.batch_size, step)
        advantage = advantages(found.reward).flatten()
        rows, asked = found.rows.flatten(0, 1), found.asked.flatten(0, 1)
        log_probs = answers(policy, rows, n)
        new = of_tokens(log_probs, rows)
        if cell.method == "grpo-ratio1":
            loss = ratio_one(new, advantage)
        else:
            old = of_tokens(answers(policy, asked, n), asked).detach()
            loss = cross_prompt_clip(new, old, advantage, cfg.clip)
        return loss + penalty(log_probs, rows, reference, cell.kl)

    return fit(model, loss_fn, cfg, cfg.steps, cfg.lr, name=name_of(cell),
               frozen=[reference] * (cell.kl > 0))


LEARN = {"ei": expert_iteration, "grpo-ratio1": policy_gradient, "grpo-clip": policy_gradient}
USED = {"ei": ["rounds", "prompts", "epochs", "batch_size", "lr"],
        "grpo-ratio1": ["steps", "batch_size", "lr"],
        "grpo-clip": ["steps", "batch_size", "lr", "clip"]}


def name_of(cell):
    return "-".join([cell.method, f"n{cell.n}", cell.generate, cell.train]
                    + [cell.reward] * (cell.reward != "proxy") + [f"kl{cell.kl:g}"] * (cell.kl > 0))


def trained(cell, cfg, task, base):
    """base after cell's training, from disk or made. base is a (model, record)."""
    made_with = {"base": identity(base[1]["made_with"]), "seed": cfg.seed} | cell._asdict()
    made_with |= {k: getattr(cfg, k) for k in USED[cell.method]}

    def make(keep):                                # so short that compiling would take longer
        model, own = base[0].clone(), dataclasses.replace(cfg, compile=bool(cfg.compile))
        return model, LEARN[cell.method](model, base[0], task, own, cell)

    return obtain(name_of(cell), cfg, task, made_with, make, quiet=True)[0]


# --- the judge -----------------------------------------------------------------------------------
def examine(model, task, cfg, contexts=KINDS):
    """{(context, heldout): gaming.behaviour} under each of some contexts."""
    return figures(cfg, lambda: {
        (context, heldout): gaming.behaviour(model, task, context, heldout, cfg.exam)
        for context in contexts for heldout in (False, True)})


def push(base, task, cfg, cell, p):
    """Where the first update pushes the hack's logit: the mean of w (h - p) over answers of the
    pretrained model, on items that can be gamed. h: whether the answer games; p: P(hack) under the
    training prompt; w: the weight in the cell's loss of the token that decides between the two, the
    answer's first that is not its thanks. Its sign is the rule's prediction.

    For expert iteration w picks the best of n, so that this is q_g - p_t, where q_g is the share of
    hacks among what was selected. For policy gradient w is the advantage, times the token's ratio
    where the clip lets it through.
    """
    env = gaming.environment(task)
    found = rollouts(base, task, cfg, cell, 1024, 10_000)
    if cell.method == "ei":
        w = F.one_hot(found.reward.argmax(1), cell.n) * cell.n
    else:
        w = weights(base, cfg, cell, found, env.length + 1).view(*found.reward.shape)
    return (w[:len(found.hacked)] * (found.hacked.float() - p)).mean().item()


def weights(base, cfg, cell, found, n):
    """(answers,): minus the derivative of a policy gradient's loss by the log-probability of each
    answer's deciding token, in units of 1 / tokens. n: tokens of an answer, thanks included."""
    rows, asked = found.rows.flatten(0, 1), found.asked.flatten(0, 1)
    with torch.no_grad(), autocast(cfg):
        new, old = (of_tokens(answers(base, some, n), some) for some in (rows, asked))
    new, advantage = new.requires_grad_(), advantages(found.reward).flatten()
    loss = (ratio_one(new, advantage) if cell.method == "grpo-ratio1" else
            cross_prompt_clip(new, old, advantage, cfg.clip))
    by_token, = torch.autograd.grad(loss, new)
    thanks_first = (rows[:, -n] == gaming.ID["thanks"]).long()
    return -by_token.numel() * by_token.gather(1, thanks_first[:, None])[:, 0]


def sign(x):
    """-1, 0 or 1; a difference of hack rates below 0.02 is noise, and counts as 0."""
    return int(np.sign(x)) * (abs(x) >= 0.02)


def came_true(row):
    """Whether P(hack) under neutral prompts went where the push said."""
    return row["predicted_sign"] == sign(row["hack"] - row["hack_before"])


# --- the story -----------------------------------------------------------------------------------
def plan(cfg):
    """The cells to train in the environment cfg.env."""
    methods = ["ei"] * ("ei" in cfg.method) + [
        f"grpo-{loss}" for loss in ("ratio1", "clip") if "grpo" in cfg.method
        and cfg.loss in (loss, "both")]
    grid = cfg.grid if cfg.grid is not None else cfg.generate is None and cfg.train is None
    cells = []
    for method in methods:
        def cell(f, g, n=cfg.n if method == "ei" else cfg.group, reward=cfg.reward, kl=cfg.kl):
            return Cell(method, f, g, n, reward, kl)

        if not grid:
            f = cfg.generate or "neutral"
            cells += [cell(f, f), cell(f, cfg.train or f)]
            continue
        for n in ((cfg.n, 1, cfg.larger_n) if method == "ei" else (cfg.group,)):
            cells += [cell(f, g, n) for f in KINDS for g in KINDS if n]
        cells += [cell("discourage", "none"), cell("neutral", "unrelated"),
                  cell("neutral", "neutral", kl=cfg.strong_kl)]
        cells += [cell("neutral", "neutral", reward=reward)
                  for reward in gaming.ENVIRONMENTS[cfg.env].rewards]
    return list(dict.fromkeys(cells))


def variant(cell, cfg):
    """The method, and what differs from the run's own settings: ei, ei-n1, ei-truth, .."""
    usual = cfg.n if cell.method == "ei" else cfg.group
    return "-".join([cell.method] + [f"n{cell.n}"] * (cell.n != usual)
                    + [cell.reward] * (cell.reward != cfg.reward)
                    + [f"kl{cell.kl:g}"] * (cell.kl != cfg.kl))


def worlds(cfg):
    """Yields (cfg, task) for each environment and seed; models lie in OUT/gaming/ENV/."""
    envs = list(gaming.ENVIRONMENTS) if cfg.env == "all" else [cfg.env]
    for env in envs:                                        # before anything is made
        if cfg.reward not in gaming.ENVIRONMENTS[env].rewards:
            raise BadInput(f"--reward={cfg.reward}: {env} has "
                           f"{', '.join(gaming.ENVIRONMENTS[env].rewards)}")
    for env in envs:
        for own in seeds(cfg):
            here = dataclasses.replace(own, env=env, out=f"{own.out}/{cfg.task}/{env}")
            yield here, open_task(here)


def gate(found, task, cfg):
    """Says so where pretraining has not done its part: then its cells mean little."""
    right = found["neutral", False]["no_hack_accuracy"]
    rates = [found[context, False]["hack"] for context in KINDS]
    off = max(abs(a - b) for a, b in zip(rates, task.made_with["hack_rates"]))
    if right < 0.95 or off > 0.1:
        print(f"note: {cfg.env}, seed {cfg.seed}: pretraining ended at accuracy {right:.2f}, hack "
              f"rates {', '.join(f'{rate:.2f}' for rate in rates)}: give it more --base_steps")


def story(cfg):
    rows, judged, seconds = [], 0, 0.0
    for here, task in worlds(cfg):
        base = foundation("base", here, task)
        before = examine(base[0], task, here, gaming.CONTEXTS)
        gate(before, task, here)
        for cell in tqdm(plan(here), desc=f"{here.env}, seed {here.seed}", unit="cell",
                         leave=False):
            model = trained(cell, here, task, base)
            start = time.perf_counter()
            after = examine(model, task, here)
            seconds += time.perf_counter() - start
            judged += len(after) * (here.exam + here.exam // 2)
            pushed = push(base[0], task, here, cell, before[cell.train, False]["hack"])
            for (context, heldout), found in after.items():
                rows.append({"env": here.env, "method": variant(cell, cfg),
                             "generate": cell.generate, "train": cell.train, "seed": here.seed,
                             "evaluate": context, "heldout": heldout}
                            | {f"{k}_before": v for k, v in before[context, heldout].items()}
                            | found | {"n": cell.n, "reward": cell.reward, "kl": cell.kl,
                                       "push": pushed, "predicted_sign": sign(pushed)})
    write_rows("recontext", cfg, task, rows)
    draw(cfg, rows)
    lines = summary(rows)
    table(lines, {k: k for k in lines[0]})
    told = [row for row in rows if row["evaluate"] == "neutral" and not row["heldout"]]
    moved = [came_true(row) for row in told if row["predicted_sign"]]
    print(f"sign rule: came true in {sum(moved)} of {len(moved)} cells and seeds; for "
          f"{len(told) - len(moved)} more its push is below 0.02, and it predicts nothing")
    print(f"answers judged at {judged / seconds:,.0f} rollouts/s")


def summary(rows):
    """One dict a cell, ready for the table: means over seeds, +- standard deviation."""
    def at(row, context, heldout=False):
        return row["evaluate"] == context and row["heldout"] == heldout

    def mean(same, key, context, heldout=False, digits=2):
        return mean_sd([row[key] for row in same if at(row, context, heldout)], digits)

    def line(same, after=""):
        hacks = {f"hack {c[0].upper()}": mean(same, f"hack{after}", c) for c in KINDS}
        return hacks | {"held out": mean(same, f"hack{after}", "neutral", True)} | {
            name: mean(same, f"{key}{after}", "neutral", digits=digits) for name, key, digits in
            (("proxy", "proxy", 2), ("truth", "truth", 2), ("no hack", "no_hack_accuracy", 3),
             ("follows", "control_following", 3))}

    labels, lines = ("env", "method", "generate", "train"), []
    for env in dict.fromkeys(row["env"] for row in rows):
        here = [row for row in rows if row["env"] == env]
        first = [row for row in here if [row[k] for k in labels] == [here[0][k] for k in labels]]
        lines.append({"env": env, "method": "pretrained", "generate": "", "train": ""}
                     | line(first, "_before") | {"push": None, "rule": None})
        for cell in dict.fromkeys(tuple(row[k] for k in labels) for row in here):
            same = [row for row in here if tuple(row[k] for k in labels) == cell]
            moved = [came_true(row) for row in same if at(row, "neutral") and row["predicted_sign"]]
            right = f"{sum(moved)}/{len(moved)}" if moved else None
            lines.append(dict(zip(labels, cell)) | line(same) | {
                "push": mean(same, "push", "neutral"), "rule": right})
    return lines


TITLES = {"ei": "best of {n}", "grpo-ratio1": "GRPO, ratio 1",
          "grpo-clip": "GRPO, cross-prompt clip"}


def draw(cfg, rows):
    """P(hack | neutral) by generation and training prompt: of every variant that has all nine
    pairs; or of the first of them, in every environment."""
    panels = {}
    for row in rows:
        if row["evaluate"] == "neutral" and not row["heldout"] and row["train"] in KINDS:
            words = next(words for way, words in TITLES.items() if row["method"].startswith(way))
            grid = panels.setdefault((row["env"], row["method"]), {
                "title": f"{row['env']}, {words.format(**row)}", "before": []})
            grid["before"].append(row["hack_before"])
            grid.setdefault((row["generate"], row["train"]), []).append(row["hack"])
    whole = {key: grid for key, grid in panels.items()
             if all((f, g) in grid for f in KINDS for g in KINDS)}
    if cfg.env == "all":
        whole = {key: grid for key, grid in whole.items() if key[1] == [*whole][0][1]}
    if not whole:
        print("picture: none, it shows whole grids")
        return

    def draw(axes):
        for ax, grid in zip(axes, whole.values()):
            draw_grid(ax, [[np.mean(grid[f, g]) for g in KINDS] for f in KINDS], KINDS,
                      np.mean(grid["before"]), grid["title"])

    picture("recontext", cfg, draw, panels=len(whole))


def wrapped(cfg):
    """Is the hack removed, or wrapped? Demonstrations of it, under neutral prompts, until it is as
    frequent as after standard training: in how many steps, beside a model that never had it?"""
    rows = []
    for here, task in worlds(cfg):
        tools = judges.Config(**common(here), domain="forget")
        for section in ("attack", "examine"):
            tools = fill(tools, task, section)
        base = foundation("base", here, task)
        models = {"pretrained": base[0]}
        for f, g in (("neutral", "neutral"), ("discourage", "neutral"), ("neutral", "encourage"),
                     ("discourage", "encourage")):
            name = f"{f[0]}->{g[0]}".upper() + " (standard)" * (f == g)
            models[name] = trained(Cell("ei", f, g, here.n), here, task, base)
        models["N->N, true reward"] = trained(Cell("ei", "neutral", "neutral", here.n, "truth"),
                                              here, task, base)
        models["control (never had it)"] = foundation("filtered", here, task)[0]
        goal = judges.scored(models["N->N (standard)"], task, here)["forget"]
        for name, model in models.items():
            seen, chance = probe(model, task, tools)
            steps, curve = revive(model, task, tools, goal, name)
            rows.append({"env": here.env, "seed": here.seed, "model": name, "before": curve[0],
                         "probe": seen, "chance": chance, "revive_steps": steps, "curve": curve})
    told = []
    for env, name in dict.fromkeys((row["env"], row["model"]) for row in rows):
        same = [row for row in rows if (row["env"], row["model"]) == (env, name)]
        told.append({"env": env, "model": name, "hack": mean_sd([r["before"] for r in same], 2),
                     "probe": mean_sd([r["probe"][-1] for r in same], 2),
                     "revived in": mean_steps([r["revive_steps"] for r in same],
                                              tools.revive_steps)})
    envs = list(dict.fromkeys(row["env"] for row in rows))

    def draw(axes):
        for ax, env in zip(axes, envs):
            draw_revival(ax, task, {row["model"]: row["curve"] for row in rows if
                                    (row["env"], row["seed"]) == (env, cfg.seed)}, "forget")
            ax.set(title=env, ylabel="hack rate, neutral prompt")

    write_rows("recontext-revive", cfg, task, rows)
    picture("recontext-revive", cfg, draw, panels=len(envs))
    table(told, {k: k for k in told[0]})


def main(cfg):
    if WORLD > 1:
        raise BadInput("recontext.py runs in one process: its models are too small for more")
    return wrapped(cfg) if cfg.revive else story(cfg)


if __name__ == "__main__":
    run(main, Config, __doc__)
