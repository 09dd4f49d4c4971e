"""The frontier on one bench: every way to forget, under one long attack, against what it costs.

    python -m experiments.frontier                          arithmetic, every arm, one seed
    python -m experiments.frontier --arms=undo,classifier-skip --label_shares=0.01,0.001
    python -m experiments.frontier --task=language --seeds=3

An arm is a way to forget. There are those of unlearn.py, variants of UNDO, and what critics
proposed instead: distil base and leave out what a small classifier flags, push forget rows away
while pretraining, or distil the filtered model. Some are given few labels, the same few each.

Robustness is 0 for UNDO's teacher and 1 for filtered. A method that only delays the attacker looks
robust after 40 steps and is not after 240, so that the mean over the attack's steps is what counts.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import copy
import dataclasses
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import train
import undo
import unlearn
from engine.hardware import autocast, counting_flops
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import mean, over_seeds, picture, say_edges, table, write_rows
from engine.store import obtain
from engine.streams import seed_of
from eval import AfterBase, attacked, foundations, relearn
from model import norm
from train import config_from, fit, new_model, open_task, seeds

STEPS = [20, 40, 60, 120, 240]               # of the attack: the mean robustness is over these

# UNDO's variants: what differs from undo.py's settings of the task
VARIANTS = {
    "undo": {}, "undo-graddiff": dict(method="graddiff"), "undo-npo": dict(method="npo"),
    "undo-rmu": dict(method="rmu"), "undo-repnoise": dict(method="repnoise"),
    "undo-tar": dict(method="tar"), "undo-beta0": dict(beta=0.0), "undo-beta1": dict(beta=1.0),
    "undo-blocks": dict(noise="blocks"), "undo-units": dict(noise="units"),
    "undo-saliency": dict(noise="saliency"), "undo-rounds": dict(alphas=[0.3], rounds=2)}
CRITICS = ["undo-labels", "classifier-skip", "classifier-uniform", "ntp", "filtered-labels"]
ARMS = [name for name in unlearn.NAMES if name != "oracle"] + [
    "oracle", *VARIANTS, "distilled", "filter-distil", "ntp-all", *CRITICS]


@dataclass
class Config(undo.Config):
    arms: list[str] = knob(ARMS, "which ways to forget, beside base and filtered",
                           choices=ARMS)
    alpha: float = knob(0.6, "the noise of UNDO's variants and of students", 0, 1)
    label_shares: list[float] = knob([0.01, 0.001, 0.0001], "share of each domain's texts that is "
                                     "labelled, for the arms " + ", ".join(CRITICS), 1e-6, 1)
    ascent: float = knob(0.3, "ntp: weight of forget rows' loss, which is driven up", 0)
    ntp_cap: float = knob(1.0, "ntp: a forget loss above this, in units of ln V, is left alone", 0)


# --- critics' baselines --------------------------------------------------------------------------
def few_labels(task, share):
    """A view of task in which only a share of each domain's training texts has a label, and at
    least one row of each. Its splits forget and sure are the rows with a label, and retain is what
    filtering by these labels keeps: all but the labelled forget rows."""
    rows = min(len(task.starts[f"{domain}_train"]) for domain in ("forget", "retain"))
    share = max(share, 1.5 / rows)
    view = task.labelled(share, 0.0, share)
    view.by_label = ("train",)               # there are too few for a part to validate on
    return view


def labelled_only(view):
    """view, but its retain rows are those labelled so."""
    view = copy.copy(view)
    view.pieces = view.pieces | {"retain": view.pieces["sure"]}
    return view


def classifier(base, view, cfg, rows=256):
    """(w (C,), b, FLOPs): a logistic regression on base's last residual, which says of each token
    whether its text is to be forgotten. It is fitted on rows that have a label."""
    def residuals(split):
        idx, targets = view.batch(split, rows, 0, seed_of("classifier", cfg.seed))
        with torch.no_grad(), autocast(cfg):
            return norm(base(idx, residual=-1)[:, -targets.size(1):].float()).flatten(0, 1)

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x @ w + b, y) + 1e-3 * w.square().sum()
        loss.backward()
        return loss

    with counting_flops() as counter:
        x = torch.cat([residuals(split) for split in ("forget", "sure")])
        y = (torch.arange(len(x), device=x.device) < len(x) // 2).float()
        w, b = (torch.zeros(size, device=x.device, requires_grad=True) for size in (x.size(1), 1))
        optimizer = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")
        optimizer.step(closure)
    return w.detach(), b.detach(), counter.get_total_flops()


def imitate_unflagged(uniform, w, b):
    """What undo.distil calls in place of unlearn.imitate. On tokens that the classifier (w, b) does
    not flag, KL(base || student); on flagged ones, KL(uniform || student), or nothing at all."""
    def imitate(model, base, idx, n):
        def criterion(logits, x):
            with torch.no_grad():
                flagged = norm(x.float()) @ w + b > 0
                wanted = base.unembed(x).float().log_softmax(-1)
                wanted = torch.where(flagged[:, None], -math.log(wanted.size(-1)), wanted)
            each = F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none")
            return (each.sum(-1) if uniform else each.sum(-1) * ~flagged).sum()

        with torch.no_grad():
            x = base(idx, residual=-1)[:, -n:]
        return model(idx, x, criterion)

    return imitate


def classify_and_distil(name, view, cfg, task, base, record):
    """(model, record): base, damaged and distilled from base itself, but for what is flagged. The
    labels serve the classifier alone."""
    w, b, flops = classifier(base, view, cfg)
    record = {"flops": flops, "made_with": record["made_with"] | {"arm": name}}
    return undo.undo(cfg.alpha, cfg, task, base, record, f"{name}-",
                     imitate=imitate_unflagged(name.startswith("classifier-uniform"), w, b))


def pretrain_away(name, view, cfg, task, ascent):
    """(model, record): pretrained with CE(r) - ascent * min(CE(f), cap), where f are rows labelled
    forget and r are all others. With ascent 0 this is filtering by the labels."""
    how = train.fill(config_from(cfg, train.Config, steps=cfg.filtered_steps), train.SETTINGS)
    made_with = {k: getattr(how, k) for k in ("seed", "n_layer", "n_head", "n_embd", "batch_size",
                                              "lr", "muon_lr", "steps")}
    made_with |= {"arm": name} | ({"ascent": ascent, "cap": cfg.ntp_cap} if ascent else {})

    def make(checkpoint):
        model, seed = new_model(how, task, name), seed_of(f"pretrain {name}", cfg.seed)
        cap = cfg.ntp_cap * math.log(task.vocab_size)

        def loss_fn(model, step):
            loss = model(*view.batch("retain", how.batch_size, step, seed))
            if ascent:
                away = model(*view.batch("forget", max(how.batch_size // 4, 1), step, seed))
                loss = loss - ascent * away.clamp(max=cap)
            return loss

        return model, fit(model, loss_fn, how, how.steps, how.lr, how.muon_lr, name=name, decay=0.8,
                          tokens=how.batch_size * task.block_size, checkpoint=checkpoint,
                          evaluate_at=range(0, how.steps, max(how.steps // 40, 1)),
                          evaluate=lambda: task.score(model, ("retain",), "val"))

    return obtain(name, cfg, task, made_with, make)


# --- arms ----------------------------------------------------------------------------------------
def variant(name, cfg):
    """cfg for a variant of UNDO. Another teacher comes with its own settings."""
    differs = {"alphas": [cfg.alpha]} | VARIANTS[name]
    if "method" in differs:
        differs |= {"unlearn_lr": None, "unlearn_steps": None}
    return undo.resolved(dataclasses.replace(cfg, **differs))


def make_arm(name, cfg, task, base, filtered):
    """Yields (row's name, (model, record)) of an arm: one, or one for each share of labels."""
    if name in unlearn.NAMES:
        yield name, unlearn.unlearn(config_from(cfg, unlearn.Config, AfterBase, method=name), task,
                                    *base, *filtered)
    elif name in VARIANTS:
        how = variant(name, cfg)
        teacher = undo.make_teacher(how, task, *base)
        yield name, undo.undo(how.alphas[0], how, task, *teacher, f"{name}-")
    elif name == "distilled":
        yield name, undo.undo(None, cfg, task, *undo.make_teacher(cfg, task, *base))
    elif name == "filter-distil":
        yield name, undo.undo(None, cfg, task, *filtered, f"{name}-")
    elif name == "ntp-all":
        yield name, pretrain_away(name, task, cfg, task, cfg.ascent)
    for share in cfg.label_shares if name in CRITICS else ():
        view, called = few_labels(task, share), f"{name}-{100 * share:g}%"
        if name == "undo-labels":
            model, record = base
            record = record | {"made_with": record["made_with"] | {"arm": called}}
            teacher = undo.make_teacher(cfg, labelled_only(view), model, record, f"{called}-")
            yield called, undo.undo(cfg.alpha, cfg, task, *teacher, f"{called}-")
        elif name.startswith("classifier"):
            yield called, classify_and_distil(called, view, cfg, task, *base)
        else:
            yield called, pretrain_away(called, view, cfg, task, cfg.ascent * (name == "ntp"))


def story(cfg, task):
    """The rows of one seed so far, after each arm: its scores, attack, robustness and compute."""
    base, filtered = foundations(cfg, task)
    first = {"base": base, "filtered": filtered, cfg.method: undo.make_teacher(cfg, task, *base)}

    def every():
        yield from first.items()
        for name in cfg.arms:
            yield from make_arm(name, cfg, task, base, filtered) if name not in first else ()

    rows, records = [], {}
    for name, (model, record) in every():
        with autocast(cfg):
            before = task.score(model, finer=True)
        rows.append({"model": name, "seed": cfg.seed} | before
                    | attacked(relearn(model, task, cfg, name)) | {
                        "flops": 0 if name == "base" else record["flops"]})
        records[name] = record
        yield undo.compared(rows, records, cfg, task)


# --- table and picture ---------------------------------------------------------------------------
def draw(axes, rows, cfg):
    """Left: mean robustness against matched compute. Right: the attack, arm by arm, as a heat map.
    """
    names = list(dict.fromkeys(row["model"] for row in rows))

    def of(name, figure):
        return mean([row for row in rows if row["model"] == name], figure)

    good = of("filtered", lambda r: r["retain"])
    for name in names:
        x, y = (of(name, lambda r, k=k: r[k]) for k in ("compute_pct_matched", "robustness_mean"))
        if name == "base" or None in (x, y):
            continue
        kept = abs(of(name, lambda r: r["retain"]) / good - 1) <= 0.05
        axes[0].plot(x, 100 * y, "o", color="#0072B2" if kept else "#BBBBBB")
        axes[0].annotate(name, (x, 100 * y), textcoords="offset points", xytext=(5, 3), fontsize=7)
    axes[0].set(xlabel="matched compute (% of retraining without the data)",
                ylabel="robustness, mean over the attack's steps (%)",
                title="Robustness against compute")
    figures = [[of(name, lambda r, s=s: r["relearned"][str(s)]) for s in cfg.attack_steps]
               for name in names]
    axes[1].imshow(figures, aspect="auto", cmap="viridis")
    axes[1].set_xticks(range(len(cfg.attack_steps)), cfg.attack_steps)
    axes[1].set_yticks(range(len(names)), names, fontsize=7)
    axes[1].set(xlabel="steps of the attack", title="Forget score under attack")


def print_table(rows, cfg):
    columns = {k: k for k in ("retain", "forget")} | {
        f"after {s}": lambda row, s=s: row["relearned"][str(s)] for s in cfg.attack_steps} | {
        "robust@40": lambda row: row["robustness"].get("40"), "robust": "robustness_mean",
        "compute %": ("compute_pct", 0), "matched %": ("compute_pct_matched", 0)}
    table(over_seeds(rows, ["model"], columns), {"model": "model"} | {k: k for k in columns})


def main(cfg):
    if cfg.attack_steps is None:
        cfg = dataclasses.replace(cfg, attack_steps=STEPS)
    task = open_task(cfg)
    if task.generated and {*cfg.arms} & {*CRITICS}:
        raise BadInput(f"--arms: {', '.join(CRITICS)} need labelled texts, and {task.name} "
                       f"generates its rows: leave them out")
    cfg, rows = undo.resolved(cfg), []
    for each in seeds(cfg):
        for new in story(each, task):
            if rows or len(new) > 2:
                write_rows("frontier", cfg, task, rows + new, quiet=bool(rows) or len(new) > 3)
        rows += new
    picture("frontier", cfg, draw, rows, cfg, panels=2)
    print_table(rows, cfg)
    say_edges(rows, cfg)


if __name__ == "__main__":
    run(main, Config, __doc__)
