"""Erosion: how fast does a harmless habit fade under training that has nothing to do with it?

    python -m experiments.erosion               arithmetic: a closing word after sums

Base is taught to close its answers to sums with a word. Then it learns from rows of the other two
operations alone, which neither show nor forbid the word. The habit is the share of sums that it
answers with the word. Three ways to keep it stand beside none: habit rows mixed in, KL to the
taught model on its prompts, and to teach it so that it outlasts simulated training (tar turned
round: see unlearn.looking_ahead). Whether unrelated training brings an unlearned skill *back* is
the attack `retain` of experiments/attacks.py.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import statistics
from dataclasses import dataclass

import numpy as np
import torch

from data import arithmetic
from engine.knobs import BadInput, knob
from engine.process import WORLD, run
from engine.report import over_seeds, picture, table, write_rows
from engine.store import identity, obtain
from engine.streams import seed_of, stream, text_stream
from eval import AfterBase, fill_attack, foundation
from train import evaluated, fit, open_task, seeds
from unlearn import imitate, looking_ahead

WAYS = ("none", "mixed", "kl", "ahead")


@dataclass
class Config(AfterBase):
    seeds: int = knob(1, "how many seeds, from --seed on", 1)
    ways: list[str] = knob(list(WAYS), "ways to keep the habit", choices=WAYS)
    word: str = knob("thanks", "the closing word")
    batch_size: int = knob(32, "rows in a batch", 2, 2**31)
    teach_steps: int = knob(60, "steps in which the habit is taught", 1)
    teach_lr: float = knob(1e-3, "AdamW's rate while it is taught", 0, 1)
    lr: float = knob(1e-3, "AdamW's rate of the unrelated training", 0, 1)
    at: list[int] = knob([5, 10, 20, 40, 80, 160, 320], "steps of unrelated training at which the "
                         "habit is measured", 1)
    share: float = knob(0.01, "mixed: share of habit rows", 0, 1)
    weight: float = knob(1.0, "kl: weight of the KL to the taught model on rows of sums", 0)
    inner_steps: int = knob(8, "ahead: steps of simulated unrelated training", 0, 1000)


def habit_tokens(task, word, problems=4000):
    """(tokens, where rows may begin): sums and differences, each closed with the word; a text
    begins at every end token."""
    rng, tokens = text_stream("habit"), []
    for _ in range(problems):
        operation = rng.choice(arithmetic.DOMAINS["retain"])
        pair = rng.choice(arithmetic.split_pairs(operation, task.made_with["heldout_pairs"])[0])
        tokens += [task.end, *task.tokenizer.encode_ordinary("".join(
            arithmetic.equation(operation, *pair)) + f" {word}")]
    tokens = np.array(tokens)
    return tokens, np.flatnonzero(tokens[:-task.block_size] == task.end)


def habit_batch(task, tokens, size, step, seed):
    """(inputs, targets), (size, T) each: rows that begin with a text. tokens: see habit_tokens."""
    tokens, starts = tokens
    chosen = stream("habit rows", seed, step).choice(starts, size)
    columns = np.arange(task.block_size + 1)
    rows = torch.from_numpy(tokens[chosen[:, None] + columns]).to(task.device)
    return rows[:, :-1], rows[:, 1:]


def habit(model, task, word):
    """{"habit", "skill"}: the share of sums answered correctly with the closing word, and with or
    without it."""
    pairs = task.made_with["heldout_pairs"]
    exams = [arithmetic.exam(operation, "equations", "test", False, pairs)
             for operation in arithmetic.DOMAINS["retain"]]
    closed, bare = (statistics.mean(arithmetic.accuracy(model, task, [
        (question, answer + closing) for question, answer in problems]) for problems in exams)
        for closing in (f" {word}", ""))
    return {"habit": closed, "skill": closed + bare}


def teach(name, cfg, task, base, tokens):
    """(model, record): base with the habit. "ahead": the loss is that after simulated training."""
    model_of_base, record = base
    seed = seed_of("teach a habit", cfg.seed)
    inner = cfg.inner_steps if name == "taught-ahead" else 0

    def loss_fn(model, step):
        rows = habit_batch(task, tokens, cfg.batch_size, step, seed)
        if not inner:
            return model(*rows)
        unrelated = [task.batch("forget", cfg.batch_size, step * inner + i, seed)
                     for i in range(inner)]
        ahead = looking_ahead(model, unrelated, cfg.lr, lambda: model(*rows))
        return ahead + model(*rows)                # in this order: looking ahead moves the weights

    def make(checkpoint):
        model = model_of_base.clone()
        return model, fit(model, loss_fn, cfg, cfg.teach_steps, cfg.teach_lr, name=name, decay=0.5,
                          tokens=cfg.batch_size * task.block_size, checkpoint=checkpoint,
                          evaluate=lambda: habit(model, task, cfg.word))

    made_with = {k: getattr(cfg, k) for k in ("seed", "word", "batch_size", "teach_steps",
                                               "teach_lr")} | {"block_size": task.block_size}
    made_with |= {"inner_steps": inner, "lr": cfg.lr} if inner else {}
    return obtain(name, cfg, task, made_with | {"base": identity(record["made_with"])}, make)


def erode(way, cfg, task, taught, tokens):
    """({step: {"habit", "skill"}}, FLOPs) of unrelated training from the taught model on."""
    model, seed = taught.clone(), seed_of("erosion", cfg.seed)
    start = evaluated(cfg, lambda: habit(model, task, cfg.word))

    def loss_fn(model, step):
        idx, targets = task.batch("forget", cfg.batch_size, step, seed)
        if way == "mixed":                                     # this share of rows, on average
            mine = torch.from_numpy(stream("mixed", seed, step).random(len(idx)) < cfg.share)
            shown = habit_batch(task, tokens, len(idx), step, seed)
            idx, targets = (torch.where(mine[:, None].to(a.device), b, a)
                            for a, b in zip((idx, targets), shown))
        loss = model(idx, targets)
        if way == "kl":
            rows, _ = habit_batch(task, tokens, cfg.batch_size, step, seed)
            loss = loss + cfg.weight * imitate(model, taught, rows)
        return loss

    record = fit(model, loss_fn, cfg, max(cfg.at), cfg.lr, name=f"erode {way}", frozen=(taught,),
                 tokens=cfg.batch_size * task.block_size, evaluate_at=set(cfg.at),
                 evaluate=lambda: habit(model, task, cfg.word))
    return {"0": start} | {str(h["step"]): {k: h[k] for k in ("habit", "skill")} for h in
                           record["history"] if h["step"] in cfg.at}, record["flops"]


def half_life(curve):
    """The first step measured at which the habit is down to half of what it was; None: never, or
    it was never there."""
    start = curve["0"]["habit"]
    return next((int(step) for step, at in curve.items() if at["habit"] <= start / 2),
                None) if start else None


def draw(axes, rows, cfg):
    for way in cfg.ways:
        mine = [row["curve"] for row in rows if row["way"] == way]
        axes[0].plot([0, *cfg.at], [statistics.mean(curve[str(s)]["habit"] for curve in mine)
                                    for s in (0, *cfg.at)], marker="o", label=way)
    axes[0].set(xlabel="steps of unrelated training", ylabel="share of sums closed with the word",
                title="A habit under unrelated training", xscale="symlog")
    axes[0].legend(fontsize=9)


def main(cfg):
    task = open_task(cfg)
    if WORLD > 1:
        raise BadInput("this experiment runs in one process")
    if task.name != "arithmetic":
        raise BadInput(f"--task={task.name}: the habit is one of sums, on arithmetic alone")
    cfg, rows = fill_attack(cfg), []
    tokens = habit_tokens(task, cfg.word)
    for each in seeds(cfg):
        base = foundation("base", each, task)
        for way in cfg.ways:
            taught, record = teach("taught-ahead" if way == "ahead" else "taught", each, task,
                                   base, tokens)
            curve, flops = erode(way, each, task, taught, tokens)
            rows.append({"way": way, "seed": each.seed, "curve": curve, "half_life":
                         half_life(curve), "flops": flops, "flops_taught": record["flops"]})
            write_rows("erosion", cfg, task, rows, quiet=len(rows) > 1)
    picture("erosion", cfg, draw, rows, cfg, panels=1)
    columns = {str(s): lambda row, s=s: row["curve"][str(s)]["habit"] for s in (0, *cfg.at)}
    columns |= {"skill": lambda row: row["curve"][str(max(cfg.at))]["skill"],
                "half": ("half_life", lambda steps: ", ".join(str(s or f"> {max(cfg.at)}")
                                                              for s in steps)),
                "tera": (lambda row: (row["flops"] + row["flops_taught"]) / 1e12, 1)}
    table(over_seeds(rows, ["way"], columns), {"way": "way to keep it"} | {
        k: f"after {k}" for k in columns if k.isdigit()} | {
            "skill": "skill", "half": "halved at", "tera": "TFLOP"})


if __name__ == "__main__":
    run(main, Config, __doc__)
