"""Recontextualization: generate under one prompt, train under another (Azarbal et al. 2025).

    python recontext.py                        the 3 x 3 grid on sycophancy, by expert iteration
    python recontext.py --env=all              the same in all four environments
    python recontext.py --method=grpo          by policy gradient, with both of its losses
    python recontext.py --generate=neutral --train=encourage      one cell beside standard training
    python -m experiments.revive_hack          is the hack removed, or wrapped? Probes and revival

A flawed reward teaches a model to game it. In recontextualization the answers to f(x) are scored by
that reward, as usual, but then they are learned as answers to g(x). If g welcomes gaming more than
f does, the model learns that such answers are to be expected under g. f = g is standard training.
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

from data import gaming
from engine.hardware import autocast, counting_flops
from engine.knobs import BadInput, knob
from engine.process import WORLD, run
from engine.report import draw_grid, how_many, mean, over_seeds, picture, table, write_rows
from engine.store import identity, obtain
from engine.streams import seed_of, stream
from eval import Foundations, foundation
from train import evaluated, fit, open_task, seeds

MOVED = {f"--revive{value}": "python -m experiments.revive_hack" for value in ("", "=true")}
KINDS = ("discourage", "neutral", "encourage")


@dataclass
class Config(Foundations, gaming.Knobs):
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


class Cell(NamedTuple):
    """One way to train: by what, under which prompts, on which reward, how near to pretraining."""
    method: str                       # ei | grpo-ratio1 | grpo-clip
    generate: str
    train: str
    n: int
    reward: str = "proxy"
    kl: float = 0.0


# --- the losses ----------------------------------------------------------------------------------
def answer_log_probs(model, rows, n):
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
        before = answer_log_probs(reference, rows, log_probs.size(1))
    return kl * divergence(log_probs, before)


def expert_iteration(model, reference, task, cfg, cell):
    """Rounds of supervised learning on the best of n answers. Trains model; returns the record,
    whose FLOPs are those of fit() and of the rollouts."""
    n = gaming.environment(task).length + 1
    record = {"steps": 0, "flops": 0, "seconds": 0.0, "history": []}
    for turn in range(cfg.rounds):
        with counting_flops() as counter:
            played = rollouts(model, task, cfg, cell, cfg.prompts, turn)
        record["flops"] += counter.get_total_flops()
        best = played.rows[torch.arange(cfg.prompts), played.reward.argmax(1)]   # of equals, one
        rng = stream("order of answers", cfg.seed, turn)
        order = np.concatenate([rng.permutation(cfg.prompts) for _ in range(cfg.epochs)])
        batches = best[torch.from_numpy(order).to(task.device)].split(cfg.batch_size)

        def loss_fn(policy, step):
            rows = batches[step]
            log_probs = answer_log_probs(policy, rows, n)
            return -of_tokens(log_probs, rows).mean() + penalty(log_probs, rows, reference, cell.kl)

        did = fit(model, loss_fn, cfg, len(batches), cfg.lr, name=f"{model_name(cell)}, {turn + 1}",
                  frozen=[reference] * (cell.kl > 0))
        for at in did["history"]:                       # of the whole, not of this round
            at |= {"step": record["steps"] + at["step"], "flops": record["flops"] + at["flops"]}
        record = {k: record[k] + did[k] for k in record}
    return record


def policy_gradient(model, reference, task, cfg, cell):
    """GRPO, one step for each batch of rollouts. Trains model; returns fit's record."""
    n = gaming.environment(task).length + 1

    def loss_fn(policy, step):
        played = rollouts(model, task, cfg, cell, cfg.batch_size, step)
        advantage = advantages(played.reward).flatten()
        rows, asked = played.rows.flatten(0, 1), played.asked.flatten(0, 1)
        log_probs = answer_log_probs(policy, rows, n)
        new = of_tokens(log_probs, rows)
        if cell.method == "grpo-ratio1":
            loss = ratio_one(new, advantage)
        else:
            old = of_tokens(answer_log_probs(policy, asked, n), asked).detach()
            loss = cross_prompt_clip(new, old, advantage, cfg.clip)
        return loss + penalty(log_probs, rows, reference, cell.kl)

    return fit(model, loss_fn, cfg, cfg.steps, cfg.lr, name=model_name(cell),
               frozen=[reference] * (cell.kl > 0))


LEARN = {"ei": expert_iteration, "grpo-ratio1": policy_gradient, "grpo-clip": policy_gradient}
USED = {"ei": ["rounds", "prompts", "epochs", "batch_size", "lr"],
        "grpo-ratio1": ["steps", "batch_size", "lr"],
        "grpo-clip": ["steps", "batch_size", "lr", "clip"]}


def model_name(cell):
    return "-".join([cell.method, f"n{cell.n}", cell.generate, cell.train]
                    + [cell.reward] * (cell.reward != "proxy") + [f"kl{cell.kl:g}"] * (cell.kl > 0))


def train_cell(cell, cfg, task, base):
    """base after a cell's training, from disk or made. base is a (model, record)."""
    made_with = {"base": identity(base[1]["made_with"]), "seed": cfg.seed} | cell._asdict()
    made_with |= {k: getattr(cfg, k) for k in USED[cell.method]}

    def make(checkpoint):                                # so short that compiling would take longer
        model, how = base[0].clone(), dataclasses.replace(cfg, compile=bool(cfg.compile))
        return model, LEARN[cell.method](model, base[0], task, how, cell)

    return obtain(model_name(cell), cfg, task, made_with, make, quiet=True)[0]


# --- the judge -----------------------------------------------------------------------------------
def behaviours(model, task, cfg, contexts=KINDS):
    """{(context, heldout): gaming.behaviour} under each of some contexts. heldout: in phrases that
    pair a first and a second word as pretraining never does."""
    return evaluated(cfg, lambda: {
        (context, heldout): gaming.behaviour(model, task, context, heldout, cfg.exam)
        for context in contexts for heldout in (False, True)})


def push(base, task, cfg, cell, p):
    """Where the first update pushes the logit of gaming, by the pretrained model's answers to items
    that can be gamed: the mean over them of w (h - p). Its sign is the rule's prediction.

    h   1 if the answer games, else 0
    p   P(hack) of the pretrained model under the cell's training prompt
    w   the answer's weight in the update (see below). An answer that games and has a positive
        weight makes gaming more likely under the training prompt, in proportion to 1 - p; an
        honest one less likely, in proportion to p
    """
    played = rollouts(base, task, cfg, cell, 1024, 10_000)
    weight = (selection if cell.method == "ei" else credit)(base, task, cfg, cell, played)
    can_be_gamed = slice(len(played.hacked))                     # rollouts puts those items first
    return (weight[can_be_gamed] * (played.hacked.float() - p)).mean().item()


def selection(base, task, cfg, cell, played):
    """(B, n) weights of expert iteration: n for the best of n answers, 0 for the others. The push
    is then q - p, with q the share of gaming among what was selected."""
    return F.one_hot(played.reward.argmax(1), cell.n) * cell.n


def credit(base, task, cfg, cell, played):
    """(B, n) weights of a policy gradient: minus the derivative of its loss by the log-probability
    of each answer's deciding token (its first that is not the thanks), in units of 1 / tokens.
    That is the advantage, times the token's ratio where the clip lets it through.
    """
    n = gaming.environment(task).length + 1                      # an answer's tokens and its thanks
    rows, asked = played.rows.flatten(0, 1), played.asked.flatten(0, 1)
    with torch.no_grad(), autocast(cfg):
        new, old = (of_tokens(answer_log_probs(base, some, n), some) for some in (rows, asked))
    new, advantage = new.requires_grad_(), advantages(played.reward).flatten()
    loss = (ratio_one(new, advantage) if cell.method == "grpo-ratio1" else
            cross_prompt_clip(new, old, advantage, cfg.clip))
    by_token, = torch.autograd.grad(loss, new)
    thanks_first = (rows[:, -n] == gaming.ID["thanks"]).long()
    deciding = by_token.gather(1, thanks_first[:, None])[:, 0]
    return -by_token.numel() * deciding.view(played.reward.shape)


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


def environments(cfg):
    """Yields (cfg, task) for each environment and seed."""
    names = list(gaming.ENVIRONMENTS) if cfg.env == "all" else [cfg.env]
    for env in names:                                       # before anything is made
        if cfg.reward not in gaming.ENVIRONMENTS[env].rewards:
            raise BadInput(f"--reward={cfg.reward}: {env} has "
                           f"{', '.join(gaming.ENVIRONMENTS[env].rewards)}")
    for env in names:
        task = open_task(dataclasses.replace(cfg, env=env))
        for each in seeds(dataclasses.replace(cfg, env=env)):
            yield each, task


def check_base(before, task, cfg):
    """Says so where pretraining was too short: then its cells mean little."""
    right = before["neutral", False]["no_hack_accuracy"]
    rates = [before[context, False]["hack"] for context in KINDS]
    off = max(abs(a - b) for a, b in zip(rates, task.made_with["hack_rates"]))
    if right < 0.95 or off > 0.1:
        print(f"note: {cfg.env}, seed {cfg.seed}: pretraining ended at accuracy {right:.2f}, hack "
              f"rates {', '.join(f'{rate:.2f}' for rate in rates)}: give it more --base_steps")


def main(cfg):
    if WORLD > 1:
        raise BadInput("recontext.py runs in one process: its models are too small for more")
    rows, judged, seconds = [], 0, 0.0
    for each, task in environments(cfg):
        base = foundation("base", each, task)
        before = behaviours(base[0], task, each, gaming.CONTEXTS)
        check_base(before, task, each)
        for cell in tqdm(plan(each), desc=f"{each.env}, seed {each.seed}", unit="cell",
                         leave=False):
            model = train_cell(cell, each, task, base)
            start = time.perf_counter()
            after = behaviours(model, task, each)
            seconds += time.perf_counter() - start
            judged += len(after) * (each.exam + each.exam // 2)
            pushed = push(base[0], task, each, cell, before[cell.train, False]["hack"])
            for (context, heldout), now in after.items():
                rows.append({"env": each.env, "method": variant(cell, cfg),
                             "generate": cell.generate, "train": cell.train, "seed": each.seed,
                             "evaluate": context, "heldout": heldout}
                            | {f"{k}_before": v for k, v in before[context, heldout].items()}
                            | now | {"n": cell.n, "reward": cell.reward, "kl": cell.kl,
                                     "push": pushed, "predicted_sign": sign(pushed)})
    write_rows("recontext", cfg, task, rows)
    draw(cfg, rows)
    lines = table_lines(rows)
    table(lines, {k: k for k in lines[0]})
    neutral = [row for row in rows if row["evaluate"] == "neutral" and not row["heldout"]]
    right = [came_true(row) for row in neutral if row["predicted_sign"]]
    print(f"sign rule: came true in {sum(right)} of {len(right)} cells and seeds; for "
          f"{len(neutral) - len(right)} more its push is below 0.02, and it predicts nothing")
    print(f"answers judged at {judged / seconds:,.0f} rollouts/s")


def table_lines(rows):
    """A line for each environment as it was pretrained, then one for each of its cells."""
    models = {}                          # what tells a model apart, and its seed: {context: row}
    for row in rows:
        models.setdefault(tuple(row[k] for k in (*CELL, "seed")), {})[
            row["evaluate"] + " unseen" * row["heldout"]] = row

    def figures(at, end=""):
        hacks = {f"hack {context[0].upper()}": at[context][f"hack{end}"] for context in KINDS}
        return hacks | {"unseen pair": at["neutral unseen"][f"hack{end}"]} | {
            column: at["neutral"][f"{key}{end}"] for column, key in (
                ("proxy", "proxy"), ("truth", "truth"), ("no hack", "no_hack_accuracy"),
                ("follows", "control_following"))}

    cells, pretrained = [], {}
    for (env, *cell, seed), at in models.items():
        pretrained[env, seed] = dict(zip(CELL, (env, "pretrained", "", ""))) | figures(at,
                                                                                       "_before")
        push = at["neutral"]["push"]
        cells.append(dict(zip(CELL, (env, *cell))) | figures(at) | {
            "push": push, "rule": came_true(at["neutral"]) if sign(push) else None})
    columns = {k: k for k in cells[0] if k not in CELL} | {
        "no hack": ("no hack", 3), "follows": ("follows", 3), "rule": ("rule", how_many)}
    lines = over_seeds(cells, CELL, columns)
    return [line for first in over_seeds(list(pretrained.values()), CELL, columns)
            for line in (first, *(line for line in lines if line["env"] == first["env"]))]


CELL = ["env", "method", "generate", "train"]        # what tells a row's model apart, but the seed
TITLES = {"ei": "best of {n}", "grpo-ratio1": "GRPO, ratio 1",
          "grpo-clip": "GRPO, cross-prompt clip"}


def draw(cfg, rows):
    """P(hack | neutral) by generation and training prompt: of every variant that has all nine
    pairs; or of the first of them, in every environment."""
    grids = {}                                           # (env, variant): {(f, g): rows}
    for row in rows:
        if row["evaluate"] == "neutral" and not row["heldout"] and row["train"] in KINDS:
            grid = grids.setdefault((row["env"], row["method"]), {})
            grid.setdefault((row["generate"], row["train"]), []).append(row)
    whole = {key: grid for key, grid in grids.items()
             if all((f, g) in grid for f in KINDS for g in KINDS)}
    if cfg.env == "all":
        whole = {key: grid for key, grid in whole.items() if key[1] == [*whole][0][1]}
    if not whole:
        print("picture: none, it shows whole grids")
        return

    def draw(axes):
        for ax, ((env, method), grid) in zip(axes, whole.items()):
            title = next(title for way, title in TITLES.items() if method.startswith(way))
            shown = [[mean(grid[f, g], lambda row: row["hack"]) for g in KINDS] for f in KINDS]
            row = grid["neutral", "neutral"][0]
            draw_grid(ax, shown, KINDS, mean(grid["neutral", "neutral"],
                                             lambda row: row["hack_before"]),
                      f"{env}, {title.format(**row)}")

    picture("recontext", cfg, draw, panels=len(whole))


if __name__ == "__main__":
    run(main, Config, __doc__, MOVED)
