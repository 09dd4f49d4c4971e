"""The frontier on one bench: every way to forget, under one long attack, against what it costs.

    python -m experiments.frontier                          arithmetic, every arm, one seed
    python -m experiments.frontier --arms=undo,classifier-skip --label_shares=0.01,0.001
    python -m experiments.frontier --arms=noise-retrain --alpha=0.65 --steps=200
    python -m experiments.frontier --task=language --seeds=3
    python -m experiments.frontier --join=rows.json --seeds=2      the arms that rows.json lacks

An arm is a way to forget. There are those of unlearn.py, variants of UNDO, and what critics
proposed instead: distil base and leave out what a small classifier flags, push forget rows away
while pretraining, or distil the filtered model. Some are given few labels, the same few each. And
there is UNDO without its teacher (noise-retrain): damage base, and train it on retain rows alone.

Robustness is 0 for UNDO's teacher and 1 for filtered. A method that only delays the attacker looks
robust after 40 steps and is not after 240, so that the mean over the attack's steps is what counts.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import copy
import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import train
import undo
import unlearn
from data import Piece
from engine.hardware import autocast, counting_flops
from engine.knobs import BadInput, knob, means_nothing
from engine.process import run
from engine.report import (
    COLOURS,
    draw_matrix,
    joined,
    mean,
    over_seeds,
    picture,
    say_edges,
    table,
    words_of,
    write_rows,
)
from engine.streams import seed_of
from eval import AfterBase, attacked, foundations, relearn
from model import norm
from train import config_from, from_scratch, open_task, seeds

STEPS = [20, 40, 60, 120, 240]               # of the attack: the mean robustness is over these

# UNDO's variants: what differs from undo.py's settings of the task
VARIANTS = {
    "undo": {}, "undo-graddiff": dict(method="graddiff"), "undo-npo": dict(method="npo"),
    "undo-rmu": dict(method="rmu"), "undo-repnoise": dict(method="repnoise"),
    "undo-tar": dict(method="tar"), "undo-beta0": dict(beta=0.0), "undo-beta1": dict(beta=1.0),
    "undo-blocks": dict(noise="blocks"), "undo-units": dict(noise="units"),
    "undo-saliency": dict(noise="saliency"), "undo-rounds": dict(alphas=[0.3], rounds=2),
    "undo-retain": dict(distil_on="retain"), "undo-0.3": dict(alphas=[0.3]),
    "undo-0.8": dict(alphas=[0.8]), "undo-hot": {}}
# What changes more than settings: students that are finished by a method that delays an attacker,
# and students without a teacher. -hot: see hot()
BEYOND = ["undo-then-repnoise", "noise-retrain", "noise-retrain-then-repnoise", "noise-retrain-hot",
          "noise-retrain-hot-then-repnoise"]
CRITICS = ["undo-labels", "noise-retrain-labels", "classifier-skip", "classifier-uniform", "ntp",
           "filtered-labels"]
ARMS = [*unlearn.FROM_BASE, "oracle", *VARIANTS, *BEYOND, "distilled", "filter-distil", "ntp-all",
        *CRITICS]


@dataclass
class Config(undo.Config):
    arms: list[str] = knob(ARMS, "which ways to forget, beside base and filtered",
                           choices=ARMS)
    alpha: float = knob(0.6, "the noise of UNDO's variants and of students", 0, 1)
    hot_alpha: float = knob(0.5, "arms named -hot: the noise", 0, 1)
    heat: float = knob(2.0, "arms named -hot: factor on a student's rates", 0)
    finish_steps: int | None = knob(None, "steps of RepNoise after a student (auto: "
                                    "unlearn.py's)", 1)
    label_shares: list[float] = knob([0.01, 0.001, 0.0001], "share of each domain's texts that is "
                                     "labelled, for the arms " + ", ".join(CRITICS), 1e-6, 1)
    ascent: float = knob(0.3, "ntp: weight of forget rows' loss, which is driven up", 0)
    ntp_cap: float = knob(1.0, "ntp: a forget loss above this, in units of ln V, is left alone", 0)


# --- critics' baselines --------------------------------------------------------------------------
def few_labels(task, share):
    """(view, number of forget texts with a label). A share of each domain's training texts has a
    label, and at least as many texts as a row holds. The view's split forget is the labelled forget
    texts, sure the labelled retain texts, and retain what filtering by these labels keeps: all but
    the labelled forget texts.

    Validation goes by the truth, for every arm: there are too few labels to validate on.
    """
    def texts_of(domain):
        """(where rows begin, where texts end, how many texts have a label)."""
        starts = np.asarray(task.starts[f"{domain}_train"])
        ends = np.flatnonzero(task.tokens(f"{domain}_train") == task.end)
        of_a_row = 1 + int(np.searchsorted(ends, starts[0] + task.block_size))
        return starts, ends, max(round(share * len(ends)), of_a_row)

    starts, ends, n = texts_of("forget")
    view = task.first_texts(n)
    others = np.searchsorted(starts, ends[n - 1]) / len(starts)
    starts, ends, last = texts_of("retain")
    begin = np.searchsorted(starts, ends[-last - 1]) if last < len(ends) else 0
    sure = min(begin, len(starts) - 1) / len(starts)
    view.pieces |= {"sure": [Piece("retain", sure, 1)],
                    "retain": [Piece("forget", others, 1), Piece("retain")]}
    view.by_label = ("train",)
    return view, n


def labelled_only(view):
    """view, but its retain rows are those labelled so."""
    view = copy.copy(view)
    view.pieces = view.pieces | {"retain": view.pieces["sure"]}
    return view


ROWS, DECAY = 1024, 1e-3                 # the classifier's rows of each domain, and weight decay


def classifier(base, view, cfg, rows=ROWS):
    """(w (C, 1), b, FLOPs): a logistic regression on base's last residual, which says of each token
    whether its text is to be forgotten. It is fitted on rows that have a label."""
    def residuals(split):
        idx, targets = view.batch(split, rows, 0, seed_of("classifier", cfg.seed))
        with torch.no_grad(), autocast(cfg):
            return norm(base(idx, residual=-1)[:, -targets.size(1):].float()).flatten(0, 1)

    def closure():
        optimizer.zero_grad()
        loss = (F.binary_cross_entropy_with_logits((x @ w)[:, 0] + b, y)
                + DECAY * w.square().sum())
        loss.backward()
        return loss

    with counting_flops() as counter:
        x = torch.cat([residuals(split) for split in ("forget", "sure")])
        y = (torch.arange(len(x), device=x.device) < len(x) // 2).float()
        w, b = (torch.zeros(size, device=x.device, requires_grad=True)
                for size in ((x.size(1), 1), (1,)))
        optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")
        optimizer.step(closure)
    return w.detach(), b.detach(), counter.get_total_flops()


def imitate_unflagged(uniform, w, b):
    """What a student learns in place of undo.like. On tokens that the classifier (w, b) does not
    flag, KL(base || student); on flagged ones, KL(uniform || student), or nothing at all."""
    def learn(model, base, idx, targets):
        def criterion(logits, x):
            with torch.no_grad():
                flagged = norm(x.float()) @ w + b > 0                                # (N, 1)
                wanted = base.unembed(x).float().log_softmax(-1)
                wanted = torch.where(flagged, -math.log(wanted.size(-1)), wanted)
            each = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none")
            return (each if uniform else each * ~flagged).sum()

        with torch.no_grad():
            x = base(idx, residual=-1)[:, -targets.size(1):]
        return model(idx, x, criterion)

    return learn


def for_arm(record, name, flops=0, **more):
    """base's record as an arm's students have it: what they are made with tells them apart."""
    return record | {"flops": flops, "made_with": record["made_with"] | {"arm": name} | more}


def classify_and_distil(name, view, texts, cfg, base, record):
    """(model, record): base, damaged and distilled from base itself, but for what is flagged. The
    labels serve the classifier alone."""
    w, b, flops = classifier(base, view, cfg)
    record = for_arm(record, name, flops, texts=texts, classifier=[ROWS, DECAY])
    return undo.undo(cfg.alpha, cfg, view, base, record, f"{name}-",
                     learn=imitate_unflagged(name.startswith("classifier-uniform"), w, b))


def pretrain_away(name, view, cfg, task, ascent, steps, texts=None):
    """(model, record): pretrained with CE(r) - ascent * min(CE(f), cap), where f are rows labelled
    forget and r are all others. With ascent 0 this is filtering by the labels."""
    how = train.fill(config_from(cfg, train.Config), train.SETTINGS)
    seed, cap = seed_of(f"pretrain {name}", cfg.seed), cfg.ntp_cap * math.log(task.vocab_size)

    def loss_fn(model, step):
        loss = model(*view.batch("retain", how.batch_size, step, seed))
        if ascent:
            away = model(*view.batch("forget", max(how.batch_size // 4, 1), step, seed))
            loss = loss - ascent * away.clamp(max=cap)
        return loss

    return from_scratch(name, loss_fn, how, task, steps, arm=name, texts=texts, **(
        {"ascent": ascent, "cap": cfg.ntp_cap} if ascent else {}))


# --- arms ----------------------------------------------------------------------------------------
def variant(name, cfg):
    """cfg for a variant of UNDO. Another teacher comes with its own settings."""
    differs = {"alphas": [cfg.alpha]} | VARIANTS[name]
    if "method" in differs:
        differs |= {"unlearn_lr": None, "unlearn_steps": None}
    return undo.resolved(dataclasses.replace(cfg, **differs))


def hot(cfg):
    """cfg with less noise and higher rates for students. High rates damage what is not trained, as
    noise does, while what is trained is learned again at every step."""
    return dataclasses.replace(cfg, alpha=cfg.hot_alpha, lr=cfg.heat * cfg.lr,
                               muon_lr=cfg.heat * cfg.muon_lr)


def practise(model, teacher, idx, targets):
    """Plain training, in place of undo.like: what a student without a teacher does."""
    return model(idx, targets)


def noise_retrain(name, cfg, view, base, record, **labels):
    """(model, record): base, damaged as a student of UNDO is, and trained on rows labelled retain,
    until it is as good as base. Nobody unlearns and nobody teaches: this is shrink and perturb (Ash
    & Adams 2020, arXiv 1910.08475) without the forget rows."""
    return undo.undo(cfg.alpha, dataclasses.replace(cfg, distil_on="retain"), view, base,
                     for_arm(record, name, **labels), f"{name}-", learn=practise)


def then_repnoise(name, cfg, task, student):
    """(model, record) of a student that RepNoise finishes: it delays what noise has not removed."""
    finish = config_from(cfg, unlearn.Config, AfterBase, method="repnoise", steps=cfg.finish_steps)
    model, record = unlearn.unlearn(finish, task, *student, folder=f"{name}-")
    return model, record | {"flops": record["flops"] + student[1]["flops"]}


def row_names(cfg):
    """{row's name: (arm, share of labels, or None)}: an arm has one row, or one for each share."""
    return {arm if share is None else f"{arm}-{100 * share:g}%": (arm, share) for arm in cfg.arms
            for share in (cfg.label_shares if arm in CRITICS else [None])}


def make_arm(name, arm, share, cfg, task, base, filtered):
    """(model, record) of a row: see row_names."""
    if arm.endswith("-then-repnoise"):
        before = arm.removesuffix("-then-repnoise")
        student = make_arm(before, before, share, cfg, task, base, filtered)
        return then_repnoise(arm, cfg, task, student)
    if "hot" in arm.split("-"):
        cfg = hot(cfg)
    if arm in unlearn.NAMES:
        return unlearn.unlearn(config_from(cfg, unlearn.Config, AfterBase, method=arm), task, *base,
                               *filtered)
    if arm in VARIANTS:
        how = variant(arm, cfg)
        teacher = undo.make_teacher(how, task, *base)
        return undo.undo(how.alphas[0], how, task, *teacher, "" if arm == "undo" else f"{arm}-")
    if arm in BEYOND:
        return noise_retrain(arm, cfg, task, *base)
    if arm == "distilled":
        return undo.undo(None, cfg, task, *undo.make_teacher(cfg, task, *base))
    if arm == "filter-distil":
        return undo.undo(None, cfg, task, *filtered, f"{arm}-")
    if arm == "ntp-all":
        return pretrain_away(arm, task, cfg, task, cfg.ascent, cfg.filtered_steps)
    view, texts = few_labels(task, share)
    mixed = dataclasses.replace(cfg, distil_on="all")        # few labels do not make a retain split
    if arm == "undo-labels":
        model, record = base
        teacher = undo.make_teacher(cfg, labelled_only(view), model,
                                    for_arm(record, name, texts=texts), f"{name}-")
        return undo.undo(cfg.alpha, mixed, view, *teacher, f"{name}-")
    if arm == "noise-retrain-labels":
        return noise_retrain(name, cfg, view, *base, texts=texts)
    if arm.startswith("classifier"):
        return classify_and_distil(name, view, texts, mixed, *base)
    # most forget rows stay: it sees as many rows as base
    return pretrain_away(name, view, cfg, task, cfg.ascent * (arm == "ntp"), cfg.base_steps, texts)


def story(cfg, task, there=()):
    """The rows of one seed so far, after each arm: its scores, attack, robustness and compute.

    there    rows that earlier runs made of it, which are kept
    """
    there = {row["model"]: row for row in there}
    to_make = {name: (arm, share) for name, (arm, share) in row_names(cfg).items()
               if name not in (*there, cfg.method)
               and VARIANTS.get(arm, {}).get("method") != cfg.method}       # it would be undo again
    if there and not to_make:
        return
    base, filtered = foundations(cfg, task)
    first = {"base": base, "filtered": filtered, cfg.method: undo.make_teacher(cfg, task, *base)}

    def every():
        yield from first.items()
        for name, (arm, share) in to_make.items():
            try:
                yield name, make_arm(name, arm, share, cfg, task, base, filtered)
            except BadInput as error:
                print(f"note: {name} is left out: {error}")

    rows, records, order = {}, {}, [*first, *row_names(cfg)]
    for name, (model, record) in every():
        if name in there:
            rows[name] = there.pop(name)
        else:
            with autocast(cfg):
                before = task.score(model, finer=True)
            rows[name] = {"model": name, "seed": cfg.seed} | before | attacked(
                relearn(model, task, cfg, name)) | {
                    "flops": 0 if name == "base" else record["flops"]}
        records[name] = record
        if len(rows) >= len(first):                          # compared() needs its references
            yield sorted(undo.compared([*rows.values()], records, cfg, task) + [*there.values()],
                         key=lambda row: order.index(row["model"]))


# --- table and picture ---------------------------------------------------------------------------
def draw(axes, rows, task, cfg):
    """Left: mean robustness against matched compute, and the front; grey where more than 5% of
    retain is lost. Right: the forget score under attack, arm by arm, the most robust first."""
    def of(name, figure):
        return mean([row for row in rows if row["model"] == name], figure)

    robust = {row["model"]: of(row["model"], lambda r: r["robustness_mean"]) for row in rows}
    names = sorted(robust, key=lambda name: -math.inf if robust[name] is None else -robust[name])
    after, good = f"relearned{words_of(rows[0])}", of("filtered", lambda r: r["retain"])
    points = {name: (max(of(name, lambda r: r["compute_pct_matched"]), 1), 100 * robust[name])
              for name in names if name != "base" and robust[name] is not None}
    kept = [name for name in points
            if task.within(of(name, lambda r: r["retain"]), good, 0.05)]
    front = [name for name in kept if not any(
        x <= points[name][0] and y > points[name][1] for x, y in map(points.get, kept))]
    labels = []
    for name in [*front, *(name for name in points if name not in front)]:
        (x, y), best = points[name], name in front
        axes[0].plot(x, y, "o", color=COLOURS[0] if name in kept else "#BBBBBB")
        # the others' names are in the heat map: there is no room for two names at one place
        if all(abs(math.log10(x / X)) > 0.25 or abs(y - Y) > 4 for X, Y in labels):
            labels.append((x, y))
            axes[0].annotate(name, (x, y), (-6 if x > 15 else 6, 5), textcoords="offset points",
                             ha="right" if x > 15 else "left", fontsize=8 if best else 7,
                             weight="bold" if best else None)
    axes[0].plot(*zip(*sorted(points[name] for name in front)), color=COLOURS[0], zorder=0,
                 alpha=0.5)
    axes[0].set(xlabel="matched compute (% of retraining without the data)", xscale="log",
                ylabel="robustness, mean over the attack's steps (%)", ylim=(-30, 130),
                title="Robustness against compute")
    axes[0].set_xticks([3, 10, 30, 100], ["3", "10", "30", "100"])
    axes[0].minorticks_off()
    figures = {name: [of(name, lambda r, s=s: r[after][str(s)]) for s in cfg.attack_steps]
               for name in names}
    draw_matrix(axes[1], list(figures), cfg.attack_steps, list(figures.values()),
                sorted((figures["base"][-1], figures["filtered"][0])), task)
    axes[1].set(xlabel="steps of the attack", title="Forget score under attack (red: it is back)")


def print_table(rows, cfg):
    after, robust = (f"{what}{words_of(rows[0])}" for what in ("relearned", "robustness"))
    columns = {k: k for k in ("retain", "forget")} | {
        f"after {s}": lambda row, s=s: row[after][str(s)] for s in cfg.attack_steps} | {
        "robust@40": lambda row: row[robust].get("40"), "robust": "robustness_mean",
        "compute %": ("compute_pct", 0), "matched %": ("compute_pct_matched", 0)}
    table(over_seeds(rows, ["model"], columns), {"model": "model"} | {k: k for k in columns})


def main(cfg):
    if cfg.attack_steps is None:
        cfg = dataclasses.replace(cfg, attack_steps=STEPS)
    task = open_task(cfg)
    if task.pretrained:
        raise BadInput(f"--task={task.name}: there is no filtered model to compare with")
    means_nothing(cfg, ["alphas"], "arms have noise of their own, or that of --alpha")
    if cfg.unlearn_lr == "sweep":
        raise BadInput("--unlearn_lr=sweep chooses by labels that some arms do not have: give a "
                       "number")
    if task.generated and {*cfg.arms} & {*CRITICS}:
        print(f"note: {', '.join(CRITICS)} are left out: {task.name} has no texts to label")
        cfg = dataclasses.replace(cfg, arms=[arm for arm in cfg.arms if arm not in CRITICS])
    cfg = undo.resolved(cfg)
    rows = joined(cfg, task, complete=False)
    if extra := {r["model"] for r in rows} - {"base", "filtered", cfg.method} - set(row_names(cfg)):
        raise BadInput(f"--join has rows of {', '.join(sorted(extra))}, which --arms leaves out: "
                       f"other seeds would not have them")
    for each in seeds(cfg):
        others = [row for row in rows if row["seed"] != each.seed]
        for new in story(each, task, [row for row in rows if row["seed"] == each.seed]):
            rows = others + new
            write_rows("frontier", cfg, task, rows, quiet=True)
    write_rows("frontier", cfg, task, rows)
    picture("frontier", cfg, draw, rows, task, cfg, panels=2)
    print_table(rows, cfg)
    say_edges(rows, cfg)


if __name__ == "__main__":
    run(main, Config, __doc__)
