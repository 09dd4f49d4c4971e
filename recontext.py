"""Recontextualization: generate under one prompt, train under another (Azarbal et al. 2025).

    python recontext.py                        the 3 x 3 grid on sycophancy, by expert iteration
    python recontext.py --env=all              the same in all four environments
    python recontext.py --method=grpo          by policy gradient, with both of its losses
    python recontext.py --generate=neutral --train=encourage      one cell and standard training
    python -m experiments.revive_hack          probes and revival: is the hack removed, or wrapped?

A flawed reward teaches a model to game it. In recontextualization, the model answers f(x) and the
reward scores these answers, as usual. Then the model learns them as answers to g(x). If g welcomes
gaming more than f does, the model learns to expect gaming under g. f = g is standard training.
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
from engine.hardware import autocast, counting_flops, to_device
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
    task: str = knob("gaming", "the task that has all environments", choices=["gaming"])
    env: str = knob("sycophancy", "the environment, or all of them",
                    choices=[*gaming.ENVIRONMENTS, "all"])
    seeds: int = knob(3, "how many seeds, from --seed on", 1)
    method: list[str] = knob(["ei"], "expert iteration, policy gradient, or both",
                             choices=["ei", "grpo"])
    grid: bool | None = knob(None, "train all nine pairs of prompts, and controls (auto: unless "
                             "--generate or --train is given)")
    generate: str | None = knob(None, "generation prompt f (auto: neutral)",
                                choices=list(gaming.CONTEXTS))
    train: str | None = knob(None, "training prompt g (auto: the same as f)",
                             choices=list(gaming.CONTEXTS))
    reward: str = knob("proxy", "the reward to train on: proxy, truth, or another one of the "
                       "environment")
    n: int = knob(4, "ei: answers to each prompt; the best one is learned", 1, 1000)
    larger_n: int = knob(16, "ei, grid: a second n to compare with; 0: none", 0, 1000)
    rounds: int = knob(4, "ei: rounds of generating and learning", 1)
    prompts: int = knob(512, "ei: prompts in a round", 1)
    epochs: int = knob(2, "ei: passes over the chosen answers", 1)
    batch_size: int = knob(32, "ei: rows in a batch; grpo: prompts in a step", 1)
    lr: float = knob(1e-4, "AdamW's rate", 0, 1)
    group: int = knob(8, "grpo: answers to each prompt, which are compared", 2, 1000)
    steps: int = knob(60, "grpo: steps", 1)
    loss: str = knob("both", "grpo: ratio1 uses g everywhere; clip has a clipped ratio of "
                     "g to f", choices=["ratio1", "clip", "both"])
    clip: float = knob(0.2, "grpo: largest distance of the ratio from 1", 0, 1)
    kl: float = knob(0.0, "weight of KL(policy || pretrained) under the training prompt", 0)
    strong_kl: float = knob(1.0, "grid: this weight for the baseline with a strong KL term", 0)
    exam: int = knob(1000, "test items that can be gamed; half as many cannot be gamed", 2)


class Cell(NamedTuple):
    """One way to train: method, prompts, answers to a prompt, reward, and weight of the KL term."""
    method: str                       # ei | grpo-ratio1 | grpo-clip
    generate: str
    train: str
    n: int
    reward: str = "proxy"
    kl: float = 0.0


# --- the losses ----------------------------------------------------------------------------------
def answer_log_probs(model, rows, n):
    """(B, n, V): log-probabilities of all tokens at the last n positions of rows (B, T)."""
    return model(rows[:, :-1])[:, -n:].float().log_softmax(-1)


def of_tokens(log_probs, rows):
    """(B, n): log-probabilities of the tokens that the rows have at these positions."""
    return log_probs.gather(-1, rows[:, -log_probs.size(1):, None])[..., 0]


def ratio_one(new, advantage):
    """-A log pi(y | g(x)): treats y as if it had been generated under g, so that all ratios are 1.

    new (B, n): log-probabilities of the answers' tokens under the training prompt; advantage (B,)
    """
    return -(advantage[:, None] * new).mean()


def cross_prompt_clip(new, old, advantage, clip):
    """-min(r A, clip(r) A) with r = pi(y | g(x)) / pi_old(y | f(x)) for each token. The ratio
    contains both the change of the policy and the change of the prompt."""
    ratio, advantage = (new - old).exp(), advantage[:, None]
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def divergence(log_probs, reference):
    """KL(policy || reference), mean over tokens; both (B, n, V)."""
    return (log_probs.exp() * (log_probs - reference)).sum(-1).mean()


def advantages(reward):
    """The rewards (B, n) of n answers to each prompt, as numbers of standard deviations from the
    prompt's mean (GRPO: Shao et al. 2024)."""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


# --- rollouts ------------------------------------------------------------------------------------
class Rollouts(NamedTuple):
    """n answers to each of B prompts.

    rows       (B, n, T) int64: the training prompt g(x), then the answer
    asked      (B, n, T): the generation prompt f(x), then the answer
    reward     (B, n)
    hacked     (G, n) bool: which answers game, for the G items that can be gamed
    """
    rows: torch.Tensor
    asked: torch.Tensor
    reward: torch.Tensor
    hacked: torch.Tensor


@torch.no_grad()
def rollouts(model, task, cfg, cell, size, step):
    """Draws new items, asks them in paraphrases of cell.generate, samples at temperature 1."""
    env = gaming.environment(task)
    rng = stream("rollouts", cfg.seed, step)
    gameable, harmless = gaming.gameable_of(size, rng)
    item = gaming.items(rng, env, gameable, harmless)
    paraphrase = rng.choice(gaming.SEEN, size)
    f, g = gaming.prompts(rng, task, item, *(gaming.phrases(context, paraphrase)
                                             for context in (cell.generate, cell.train)))
    # Autocast's cache would keep weights that were cast without a gradient. Older versions of torch
    # would use them in the loss that follows
    with autocast(cfg, cache_enabled=False):
        answer = model.generate(f, env.length + 1, temperature=1.0, samples=cell.n,
                                seed=seed_of("answers of rollouts", cfg.seed, step))
    luck = to_device(torch.from_numpy(rng.random(len(answer), np.float32)), task.device)
    f, g = (prompt.repeat_interleave(cell.n, 0) for prompt in (f, g))
    item, body, _ = gaming.split_off(f, answer)
    reward = env.rewards[cell.reward](item, body, luck).float().view(size, cell.n)
    hacked = env.hacked(item, body).view(size, cell.n)[:gameable]
    asked, rows = (torch.cat((prompt, answer), 1).view(size, cell.n, -1) for prompt in (f, g))
    return Rollouts(rows, asked, reward, hacked)


# --- two ways to learn from them -----------------------------------------------------------------
def penalty(log_probs, rows, reference, kl):
    """The KL term. log_probs are the policy's, for the last positions of rows."""
    if not kl:
        return 0
    with torch.no_grad():
        before = answer_log_probs(reference, rows, log_probs.size(1))
    return kl * divergence(log_probs, before)


def expert_iteration(model, reference, task, cfg, cell):
    """Rounds of supervised learning on the best of n answers. Trains model and returns its record,
    with the FLOPs of fit() and of the rollouts."""
    n = gaming.environment(task).length + 1
    record = {"steps": 0, "flops": 0, "seconds": 0.0, "history": []}
    for turn in range(cfg.rounds):
        with counting_flops() as counter:
            played = rollouts(model, task, cfg, cell, cfg.prompts, turn)
        record["flops"] += counter.get_total_flops()
        best = played.rows[torch.arange(cfg.prompts), played.reward.argmax(1)]   # one, if equal
        rng = stream("order of answers", cfg.seed, turn)
        order = np.concatenate([rng.permutation(cfg.prompts) for _ in range(cfg.epochs)])
        batches = best[torch.from_numpy(order).to(task.device)].split(cfg.batch_size)

        def loss_fn(policy, step):
            rows = batches[step]
            log_probs = answer_log_probs(policy, rows, n)
            return -of_tokens(log_probs, rows).mean() + penalty(log_probs, rows, reference, cell.kl)

        did = fit(model, loss_fn, cfg, len(batches), cfg.lr, name=f"{model_name(cell)}, {turn + 1}",
                  frozen=[reference] * (cell.kl > 0))
        for at in did["history"]:                       # count from the first round on
            at |= {"step": record["steps"] + at["step"], "flops": record["flops"] + at["flops"]}
        record = {k: record[k] + did[k] for k in record}
    return record


def policy_gradient(model, reference, task, cfg, cell):
    """GRPO, one step for each batch of rollouts. Trains model and returns fit's record."""
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
    """base after a cell's training, read from disk or made. base is a (model, record)."""
    made_with = {"base": identity(base[1]["made_with"]), "seed": cfg.seed} | cell._asdict()
    made_with |= {k: getattr(cfg, k) for k in USED[cell.method]}

    def make(checkpoint):                                # training is shorter than compiling
        model, how = base[0].clone(), dataclasses.replace(cfg, compile=bool(cfg.compile))
        return model, LEARN[cell.method](model, base[0], task, how, cell)

    return obtain(model_name(cell), cfg, task, made_with, make, quiet=True)[0]


# --- the judge -----------------------------------------------------------------------------------
def behaviours(model, task, cfg, contexts=KINDS):
    """{(context, heldout): gaming.behaviour} for each of these contexts. heldout: in phrases whose
    two words pretraining never pairs."""
    return evaluated(cfg, lambda: {
        (context, heldout): gaming.behaviour(model, task, context, heldout, cfg.exam)
        for context in contexts for heldout in (False, True)})


def push(base, task, cfg, cell, p):
    """How the first update pushes the logit of gaming: the mean of w (h - p) over the pretrained
    model's answers to items that can be gamed. Its sign is the rule's prediction.

    h   1 if the answer games, else 0
    p   P(hack) of the pretrained model under the cell's training prompt
    w   the answer's weight in the update (see below). If w is positive, an answer that games makes
        gaming under the training prompt more likely, in proportion to 1 - p. An honest answer
        makes it less likely, in proportion to p
    """
    played = rollouts(base, task, cfg, cell, 1024, 10_000)
    weight = (selection if cell.method == "ei" else credit)(base, task, cfg, cell, played)
    can_be_gamed = slice(len(played.hacked))                     # rollouts puts those items first
    return (weight[can_be_gamed] * (played.hacked.float() - p)).mean().item()


def selection(base, task, cfg, cell, played):
    """(B, n) weights of expert iteration: n for the best of n answers, 0 for the others. The push
    is then q - p, with q the share of selected answers that game."""
    return F.one_hot(played.reward.argmax(1), cell.n) * cell.n


def credit(base, task, cfg, cell, played):
    """(B, n) weights of a policy gradient: minus the derivative of its loss by the log-probability
    of each answer's deciding token (the first one that is not the thanks), in units of 1 / tokens.
    It is the advantage. With the clip, it is the advantage times the ratio, or 0 if clipped.
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
    """-1, 0 or 1. A difference of hack rates below 0.02 is noise and counts as 0."""
    return int(np.sign(x)) * (abs(x) >= 0.02)


def came_true(row):
    """Whether P(hack) under neutral prompts moved in the direction that the push predicted."""
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
    """The method, and where the cell differs from the run's knobs: ei, ei-n1, ei-truth, .."""
    usual = cfg.n if cell.method == "ei" else cfg.group
    return "-".join([cell.method] + [f"n{cell.n}"] * (cell.n != usual)
                    + [cell.reward] * (cell.reward != cfg.reward)
                    + [f"kl{cell.kl:g}"] * (cell.kl != cfg.kl))


def environments(cfg):
    """Yields (cfg, task) for each environment and seed."""
    if WORLD > 1:
        raise BadInput("this runs in one process: its models are too small for more")
    names = list(gaming.ENVIRONMENTS) if cfg.env == "all" else [cfg.env]
    for env in names:                                       # check before anything is made
        if cfg.reward not in gaming.ENVIRONMENTS[env].rewards:
            raise BadInput(f"--reward={cfg.reward}: {env} has "
                           f"{', '.join(gaming.ENVIRONMENTS[env].rewards)}")
    for env in names:
        task = open_task(dataclasses.replace(cfg, env=env))
        cfg = dataclasses.replace(cfg, resume=cfg.resume and None)     # it was taken up once
        for each in seeds(dataclasses.replace(cfg, env=env)):
            yield each, task


def check_base(before, task, cfg):
    """Prints a note if pretraining was too short, because the cells then mean little."""
    right = before["neutral", False]["no_hack_accuracy"]
    rates = [before[context, False]["hack"] for context in KINDS]
    off = max(abs(a - b) for a, b in zip(rates, task.made_with["hack_rates"]))
    if right < 0.95 or off > 0.1:
        print(f"note: {cfg.env}, seed {cfg.seed}: pretraining ended at accuracy {right:.2f}, hack "
              f"rates {', '.join(f'{rate:.2f}' for rate in rates)}: give more --base_steps")


def main(cfg):
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
        write_rows("recontext", cfg, task, rows, quiet=True)
    write_rows("recontext", cfg, task, rows)
    draw(cfg, rows)
    lines = table_lines(rows)
    table(lines, {k: k for k in lines[0]})
    neutral = [row for row in rows if row["evaluate"] == "neutral" and not row["heldout"]]
    right = [came_true(row) for row in neutral if row["predicted_sign"]]
    print(f"the sign rule came true in {sum(right)} of {len(right)} cells and seeds; it predicts "
          f"nothing for {len(neutral) - len(right)} others, whose push is below 0.02")
    print(f"judging: {judged / seconds:,.0f} rollouts/s")


def table_lines(rows):
    """For each environment, a line for the pretrained model, then one for each of its cells."""
    models = {}                          # {(what identifies a model, its seed): {context: row}}
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
        before = figures(at, "_before")
        pretrained[env, seed] = dict(zip(CELL, (env, "pretrained", "", ""))) | before
        push = at["neutral"]["push"]
        cells.append(dict(zip(CELL, (env, *cell))) | figures(at) | {
            "push": push, "rule": came_true(at["neutral"]) if sign(push) else None})
    columns = {k: k for k in cells[0] if k not in CELL} | {
        "no hack": ("no hack", 3), "follows": ("follows", 3), "rule": ("rule", how_many)}
    lines = over_seeds(cells, CELL, columns)
    return [line for first in over_seeds(list(pretrained.values()), CELL, columns)
            for line in (first, *(line for line in lines if line["env"] == first["env"]))]


CELL = ["env", "method", "generate", "train"]        # with the seed, these identify a row's model
TITLES = {"ei": "best of {n}", "grpo-ratio1": "GRPO, ratio 1",
          "grpo-clip": "GRPO, cross-prompt clip"}


def draw(cfg, rows):
    """Draws P(hack | neutral) by generation and training prompt, for every variant with all nine
    pairs. With --env=all, draws the first such variant in every environment."""
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
        print("picture: none, because it shows whole grids only")
        return

    def draw(axes):
        for ax, ((env, method), grid) in zip(axes, whole.items()):
            title = next(title for way, title in TITLES.items() if method.startswith(way))
            shown = [[mean(grid[f, g], lambda row: row["hack"]) for g in KINDS] for f in KINDS]
            standard = grid["neutral", "neutral"]
            draw_grid(ax, shown, KINDS, mean(standard, lambda row: row["hack_before"]),
                      f"{env}, {title.format(**standard[0])}")

    picture("recontext", cfg, draw, panels=len(whole))


if __name__ == "__main__":
    run(main, Config, __doc__, MOVED)
