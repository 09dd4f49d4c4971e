"""Gradient routing: decide during training which parameters learn from which data.

    python route.py                          unlearning by ablation, against filtering, under
                                             labels for all, half and a tenth of the forget data
    python route.py --with_posthoc=true      beside MaxEnt, RMU and UNDO, given the same labels
    python route.py --experiment=steer       one token's prediction through one residual dimension
    python route.py --experiment=digits      an autoencoder with a half of the code for each half of
                                             the digits; --source=mnist or a folder
    python route.py --experiment=gridworld   a reinforcement learner, few of whose ends are labelled

Post-hoc unlearning looks for a skill when it is everywhere. Routing puts the skill, while it is
learned, where it can be cut out (Cloud et al. 2024; SGTM: Shilov et al. 2025).
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)
import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import undo
import unlearn
from data import digits as handwritten
from data import gridworld as grid
from data.gridworld import CELLS, DIAMOND, DISCOUNT, GHOST, HORIZON, NOTHING
from data.knobs import BadInput, knob
from data.process import RANK, WORLD
from data.report import figure, mean_sd, table, write_rows
from data.streams import seed_of, stream, torch_stream
from eval import Attack, attacked, relearn, say_edges
from model import GPT, cross_entropy
from train import (
    autocast,
    counting_flops,
    figures,
    fill,
    fit,
    hardware,
    identity,
    new_model,
    obtain,
    open_task,
    run,
    seeds,
)

METHODS = ("base", "filtered", "era", "sgtm", "demix", "expanded")


@dataclass
class Config(Attack):
    experiment: str = knob("language", "which story",
                           choices=["language", "steer", "digits", "gridworld"])
    task: str | None = knob(None, "what to learn and to forget (auto: language)",
                            choices=["language", "tinystories", "bilingual"])
    seeds: int | None = knob(None, "how many seeds, from --seed on (auto: 1; gridworld 2)", 1)
    steps: int | None = knob(None, "training steps, the same for every method", 1)
    batch_size: int | None = knob(None, "rows in a batch", 2, 2**31)
    lr: float | None = knob(None, "AdamW's rate", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    methods: list[str] = knob(list(METHODS), "language: which, in this order", choices=METHODS)
    label_fractions: list[float] = knob([1.0, 0.5, 0.1], "language: shares of the forget data that "
                                        "the labeller finds", 0.001, 1)
    false_positives: float = knob(0.0, "language: share of the retain data that the labeller takes "
                                  "for forget data", 0, 0.9)
    retain_labels: float | None = knob(None, "language: share of the retain data labelled retain, "
                                       "which SGTM needs; others take all that is not labelled "
                                       "forget (auto: as of the forget data; the paper: 0.25)",
                                       0.001, 1)
    forget_heads: int = knob(1, "sgtm: attention heads a block for the forget data", 0)
    forget_units: int = knob(64, "sgtm: MLP units a block for the forget data", 0)
    expand: int = knob(64, "era, expanded: MLP units added to a block", 1)
    off_target: float = knob(-2.0, "era: gradient weight of forget tokens on the original units "
                             "(-0.75 in the paper, which is too little in three blocks)", -10, 1)
    l1: float = knob(1e-4, "era: weight of the L1 norm of MLP activations", 0)
    coherence_steps: int = knob(4, "language: steps on 64 retain rows after ablation, best kept", 0)
    token: list[str] | None = knob(None, "steer: the token, or tokens, as text with the space")
    push: float = knob(2.0, "steer: how far, at most, in mean lengths of the residual", 0)
    ablations: bool = knob(False, "digits: all ten settings of the paper's appendix")
    width: int | None = knob(None, "digits, gridworld: of the first hidden layer (digits: 2048 in "
                             "the paper)", 8)
    oversight: list[float] = knob([0.03, 0.1], "gridworld: shares of terminal squares whose end is "
                                  "labelled", 0.001, 1)
    with_posthoc: bool = knob(False, "language: maxent, rmu and undo, too, on the same labels")
    alphas: list[float] = knob([0.6], "with_posthoc: UNDO's noise", 0, 1)


# --- masks: the whole idea ------------------------------------------------------------------------
def route(h, m):
    """h, the same to the last bit, but its gradient is multiplied by m: m h + (1 - m) stop(h).

    1 lets the gradient through, 0 stops it, a negative weight turns it round: what lies before h
    learns to do without. m broadcasts to h (Cloud et al. 2024, section 3).
    """
    still = h.detach()
    return still + m * (h - still)


class Hold:
    """Masks on parameters, for fit(): entries that are held in a step get no gradient, and neither
    momentum nor weight decay moves them (Shilov et al. 2025, section 3; in their code both do).

    A loss function sets .held, [(parameter, bool mask)], at every step, and once .pieces, if Muon
    is to take parts of matrices for matrices of their own (see fit).
    """

    def __init__(self):
        self.held, self.pieces = [], []

    @torch.no_grad()
    def after_backward(self):
        self.before = [p.clone() for p, _ in self.held]
        for p, mask in self.held:
            p.grad.masked_fill_(mask, 0)

    @torch.no_grad()
    def after_step(self):
        for (p, mask), before in zip(self.held, self.before):
            p.copy_(torch.where(mask, before, p))


def forget_part(model, heads, units):
    """Views of the weights that are for forget data alone: each block's last heads and units."""
    n, m = model.config.n_head, model.config.n_units
    return [w for block in model.blocks
            for w in (*block.head(slice(n - heads, n)), *block.units(slice(m - units, m)))]


def pieces(model, heads, units):
    """[(matrix, index)]: the blocks' matrices in rectangles of which each belongs to the forget
    part, or to the retain part; of qkv, to one of q, k and v."""
    C, n, m = model.config.n_embd, model.config.n_head, model.config.n_units
    every, own, rest = slice(None), slice(m - units, m), slice(m - units)
    found, cut = [], C - heads * C // n
    for block in model.blocks:
        qkv, proj, up, down = (layer.weight for layer in (
            block.attn.qkv, block.attn.proj, block.mlp.up, block.mlp.down))
        if heads:
            found += [(qkv, slice(begin + a, begin + b)) for begin in (0, C, 2 * C)
                      for a, b in ((0, cut), (cut, C))]
            found += [(proj, (every, slice(cut))), (proj, (every, slice(cut, C)))]
        if units:
            found += [(up, rest), (up, own), (down, (every, rest)), (down, (every, own))]
    return found


@torch.no_grad()
def ablate(model, heads, units):
    """Removes the forget part for good."""
    for w in forget_part(model, heads, units):
        w.zero_()


def silence(heads=None, units=None):
    """A model's hook that multiplies what heads (.., nh, 1) or MLP units (.., n_units) say."""
    def hook(site, i, h):
        mask = {"heads": heads, "units": units}.get(site)
        return h if mask is None else h * mask.to(h.dtype)

    return hook


# --- methods: each gives the loss function of one training run ------------------------------------
# `task` is Task.labelled(): its splits are what the labeller says. hold is for fit(). Methods of
# one seed are compared in pairs: they begin from the same weights where their sizes are the same,
# and draw the rows of a split from the same stream.

def rows_of(cfg):
    """The seed of all batches that route.py trains on."""
    return seed_of("route", cfg.seed)


def base(model, task, cfg, hold):
    """Learns from everything. So does `expanded`, the control: as wide as era, nothing routed."""
    return lambda model, step: model(*task.batch("all", cfg.batch_size, step, rows_of(cfg)))


def filtered(model, task, cfg, hold):
    """Learns from what is not labelled forget."""
    return lambda model, step: model(*task.batch("retain", cfg.batch_size, step, rows_of(cfg)))


def mixed(task, cfg, step):
    """(idx, targets, which rows are labelled forget: (B, 1) bool), as often as in the data."""
    share = sum(task.shares("forget"))
    which = {"forget": share, "retain": 1 - share}, cfg.batch_size, step, rows_of(cfg)
    return *task.batch(*which), task.origins(*which)[:, None] == 0


def era(model, task, cfg, hold):
    """Expand, route, ablate (Cloud et al. 2024, section 4.2): MLP units are added, and tokens of
    forget texts train them with weight 1, the original units with cfg.off_target.

    A token as frequent in retain texts as in forget texts keeps weight 1 everywhere: w = 1 -
    sigmoid(r - 1/r - 4), r = its frequency in forget over retain texts (the paper's appendix; there
    by the truth, here by the labels). cfg.l1 times the L1 norm of activations asks for sparse ones.
    """
    forget, retain = (task.counts(split) + 1.0 for split in ("forget", "retain"))
    r = (forget / forget.sum()) / (retain / retain.sum())
    w = 1 - torch.sigmoid(r - 1 / r - 4)
    weight = (w + (1 - w) * cfg.off_target).float().to(task.device)                     # (V,)
    new = torch.arange(model.config.n_units, device=task.device) >= 4 * model.config.n_embd

    def loss_fn(model, step):
        idx, targets, forget = mixed(task, cfg, step)
        m = torch.where(forget, weight[targets], 1.0)[:, :, None]                       # (B, T, 1)
        norms = []

        def hook(site, i, h):
            if site != "units":
                return h
            norms.append(h.abs().sum(-1).mean())
            return route(h, torch.where(new, 1.0, m).to(h.dtype))

        return model(idx, targets, hook=hook) + cfg.l1 * sum(norms)

    return loss_fn


def sgtm(model, task, cfg, hold):
    """Selective gradient masking (Shilov et al. 2025): every step sees one kind of data. Forget:
    the retain parameters are held. Labelled retain: the forget parameters are silenced and held.
    Unlabelled: nothing is masked, and what looks like forget data is absorbed by the forget part.
    Embeddings learn from all. Muon must take the parts for matrices of their own (pieces): it
    orthogonalises a matrix as a whole, momentum and all, so that what the forget part has learned
    would steer the retain part in every step that follows.
    """
    part = cfg.forget_heads, cfg.forget_units
    hold.pieces = pieces(model, *part)
    marked = GPT(model.config).to(task.device)
    with torch.no_grad():
        for p in marked.parameters():
            p.zero_()
        for w in forget_part(marked, *part):
            w.fill_(1)
    masks = [(p, mark > 0) for p, mark in zip(model.blocks.parameters(),
                                              marked.blocks.parameters())]
    held = {"forget": [(p, ~mask) for p, mask in masks], "sure": masks, "unlabelled": []}
    heads, units = (torch.arange(n, device=task.device) < n - own for n, own in
                    zip((model.config.n_head, model.config.n_units), part))
    quiet = silence(heads[:, None], units)
    shares = np.array([sum(task.shares(kind)) for kind in held])

    def loss_fn(model, step):
        kind = list(held)[stream("kind of step", cfg.seed, step).choice(3, p=shares / shares.sum())]
        hold.held = held[kind]
        return model(*task.batch(kind, cfg.batch_size, step, rows_of(cfg)),
                     hook=quiet if kind == "sure" else None)

    return loss_fn


def experts(model, device):
    """DEMix's hooks: the first half of each MLP is for retain data, the second for forget data."""
    second = torch.arange(model.config.n_units, device=device) >= 4 * model.config.n_embd
    return {"retain": ~second, "forget": second}


def demix(model, task, cfg, hold):
    """An MLP for each domain, chosen by the label (Gururangan et al. 2021); one is dropped."""
    of = experts(model, task.device)

    def loss_fn(model, step):
        idx, targets, forget = mixed(task, cfg, step)
        units = torch.where(forget[:, :, None], of["forget"], of["retain"])      # (B, 1, n_units)
        return model(idx, targets, hook=silence(units=units))

    return loss_fn


LOSSES = {"base": base, "expanded": base, "filtered": filtered, "era": era, "sgtm": sgtm,
          "demix": demix}
NO_LABELS = ("base", "expanded")         # the same model at every label fraction


def check_part(cfg):
    """BadInput where nothing would be left of the model, or nothing be routed."""
    if "sgtm" in cfg.methods:
        for knob, own, all_ in (("forget_heads", cfg.forget_heads, cfg.n_head),
                                ("forget_units", cfg.forget_units, 4 * cfg.n_embd)):
            if own >= all_:
                raise BadInput(f"--{knob}={own} leaves nothing of a block's {all_} for the retain "
                               f"data")
        if not cfg.forget_heads + cfg.forget_units:
            raise BadInput("--forget_heads=0 and --forget_units=0: give the forget data a part")


def part_of(method, cfg):
    """(heads, MLP units) of each block that ablation removes."""
    return {"era": (0, cfg.expand), "expanded": (0, cfg.expand), "demix": (0, 4 * cfg.n_embd),
            "sgtm": (cfg.forget_heads, cfg.forget_units)}.get(method, (0, 0))


# --- language: unlearning by ablation -------------------------------------------------------------
def calibrated(model, task, cfg, hooks=None):
    """{"retain", "forget"}: held-out losses (nats per token) once the logits are calibrated, and
    the same {"retain_raw", "forget_raw"} as the model stands. hooks: {domain: the model's hook}.

    A model that never saw a language is sure that it will not occur; its loss there, far above
    ln(vocabulary), measures that. So a bias on the logits, one number a token, is trained on as
    many rows of both domains: what is still lost on the forget data is not known. (Shilov et al.
    2025, section 4, let retain count 100 times; then a model that knows both languages, and needs
    no calibration, is moved, too: its bias says that the forget language hardly occurs.)
    """
    hooks, seen, losses = hooks or {}, [], {}
    with torch.no_grad(), autocast(cfg):
        for domain in ("retain", "forget"):
            idx, targets = task.whole(domain, 64, 0, seed_of("calibrate"), "train")
            x = model.residuals(idx, hook=hooks.get(domain))[-1]
            seen.append((model.unembed(x).float().flatten(0, 1), targets.flatten()))
    bias = torch.zeros(task.vocab_size, device=task.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        retain, forget = (F.cross_entropy(logits + bias, targets) for logits, targets in seen)
        loss = retain + forget
        loss.backward()
        return loss

    def criterion(logits, targets):
        return cross_entropy(logits + bias.detach(), targets)

    optimizer.step(closure)
    with autocast(cfg):
        for domain in ("retain", "forget"):
            how = {"hook": hooks.get(domain)}
            losses[domain] = task.loss(model, domain, **how, criterion=criterion)
            losses[f"{domain}_raw"] = task.loss(model, domain, **how)
    return losses


def cohere(model, task, cfg, name):
    """A copy, fine-tuned on 64 rows labelled retain up to the step that is best on held-out rows
    labelled so, which are not reported: mends what ablation unsettled (Cloud et al. 2024, section
    4.2)."""
    copy, kept = model.clone(), []
    rows = task.batch("sure", 64, 0, seed_of("cohere", cfg.seed))

    def keep():
        kept.append({k: v.clone() for k, v in copy.state_dict().items()})

    def evaluate():
        return {"retain": task.loss(copy, "sure", 32, "val")}

    keep()
    losses = [figures(cfg, evaluate)]
    if cfg.coherence_steps:
        losses += fit(copy, lambda model, step: model(*rows), cfg, cfg.coherence_steps, 1e-3,
                      name=f"cohere {name}", evaluate=evaluate, after_step=keep,
                      evaluate_at=range(cfg.coherence_steps))["history"]
    best = min(range(len(losses)), key=lambda step: losses[step]["retain"])
    copy.load_state_dict(kept[best])
    return copy


def recipe(cfg, task):
    """What the weights of every language model here depend on."""
    return {k: getattr(cfg, k) for k in ("seed", "n_layer", "n_head", "n_embd", "batch_size", "lr",
                                         "muon_lr", "steps")} | {"block_size": task.block_size}


def name_of(method, fraction):
    return f"route-{method}" + f"-{100 * fraction:g}" * (method not in NO_LABELS)


def trained(method, fraction, task, cfg):
    """(model, record) of a method under labels for a fraction of the forget data, from disk or
    made. Every method sees as many tokens."""
    own = {"era": ("expand", "off_target", "l1"), "expanded": ("expand",),
           "sgtm": ("forget_heads", "forget_units")}.get(method, ())
    made_with = recipe(cfg, task) | {k: getattr(cfg, k) for k in own} | {"method": method}
    name = name_of(method, fraction)
    if method not in NO_LABELS:
        made_with |= {"label_fraction": fraction, "false_positives": cfg.false_positives}
    if method == "sgtm":
        made_with["retain_labels"] = cfg.retain_labels or fraction

    def make(keep):
        extra = 0 if method == "sgtm" else part_of(method, cfg)[1]
        model, hold = new_model(cfg, task, "route", extra), Hold()
        loss_fn = LOSSES[method](model, task, cfg, hold)
        record = fit(model, loss_fn, cfg, cfg.steps, cfg.lr,
                     cfg.muon_lr, name=name, decay=0.8, keep=keep,
                     tokens=cfg.batch_size * task.block_size,
                     after_backward=hold.after_backward, after_step=hold.after_step,
                     pieces=hold.pieces)
        return model, record

    return obtain(name, cfg, task, made_with, make)


def examine(model, task, labelled, cfg, method, fraction, part=(0, 0), hooks=None, record=None):
    """One row: losses before and after ablation, after fine-tuning, and under attack; all by the
    truth but for the fine-tuning, whose rows are labelled retain. What is left of a routed model
    (record: its training's) is kept as NAME-ablated.pt, for eval.py to look into."""
    before = calibrated(model, task, cfg, hooks)
    ablate(model, *part)
    after = calibrated(model, task, cfg) if any(part) else before
    if any(part):
        tuned, _ = obtain(f"{name_of(method, fraction)}-ablated", cfg, task, {
            "routed": identity(record["made_with"]), "coherence_steps": cfg.coherence_steps},
            lambda keep: (cohere(model, labelled, cfg, method), record))
    else:
        tuned = cohere(model, labelled, cfg, method)
    finetuned = calibrated(tuned, task, cfg)
    worst = relearn(tuned, task, cfg, method)["worst"]
    return {"method": method, "label_fraction": fraction, "seed": cfg.seed,
            "retain_before": before["retain"], "retain": after["retain"],
            "retain_finetuned": finetuned["retain"], "forget_before": before["forget"],
            "forget": after["forget"], "forget_finetuned": finetuned["forget"],
            "retain_raw": after["retain_raw"], "forget_raw": after["forget_raw"]} | attacked(worst)


def posthoc(fraction, truth, task, cfg, base):
    """Rows of MaxEnt, RMU and UNDO from route.py's base, under the same labels: what is labelled
    forget is unlearned, what is not is retained, and UNDO distils on everything."""
    labels = {"label_fraction": fraction, "false_positives": cfg.false_positives}
    model, record = base
    record = record | {"made_with": record["made_with"] | labels}
    out = f"{cfg.out}/{cfg.task}/labels-{100 * fraction:g}"
    given = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Attack)} | {"out": out}
    rows = []
    for method in ("maxent", "rmu"):
        own = unlearn.resolved(unlearn.Config(**given), truth, method)
        rows.append((method, unlearn.unlearn(own, task, model, record)))
    own = fill(undo.Config(**given, alphas=cfg.alphas), truth, "undo")
    own = unlearn.resolved(own, truth, own.method, "unlearn_")
    teacher = unlearn.unlearn(unlearn.Config(**given, method=own.method, lr=own.unlearn_lr,
                                             steps=own.unlearn_steps), task, model, record)
    for alpha in own.alphas:
        rows.append((f"undo-{alpha:g}", undo.undo(alpha, own, task, *teacher)))
    return [examine(model, truth, task, cfg, name, fraction) for name, (model, _) in rows]


def summary(rows, cfg):
    """One dict a method and label fraction, ready for the table: mean over seeds, +- deviation."""
    lines = []
    for method, fraction in dict.fromkeys((r["method"], r["label_fraction"]) for r in rows):
        if method in NO_LABELS and fraction != cfg.label_fractions[0]:
            continue
        same = [r | {f"after {step}": loss for step, loss in r["relearned"].items()}
                for r in rows if (r["method"], r["label_fraction"]) == (method, fraction)]
        lines.append({"method": method, "labels": "any" if method in NO_LABELS else
                      f"{fraction:.0%}"} | {k: mean_sd([r[k] for r in same], 2)
                                                 for k in same[0] if "_" in k or " " in k
                                                 or k in ("retain", "forget")})
    return lines


def draw_language(axes, rows, cfg):
    """What ablation leaves, by label fraction; what it costs; and who withstands the attack."""
    def mean(method, fraction, figure):
        return np.mean([figure(r) for r in rows
                        if (r["method"], r["label_fraction"]) == (method, fraction)])

    fractions = sorted(cfg.label_fractions)
    style = {}
    for r in rows:                            # dotted: no labels; dashed: after the fact
        style[r["method"]] = {"marker": "o", "markersize": 4, "linestyle":
                              ":" if r["method"] in NO_LABELS else
                              "-" if r["method"] in METHODS else "--"}
    for ax, key, label in ((axes[0], "forget", "forget loss (higher: more is gone)"),
                           (axes[1], "retain", "retain loss (lower is better)")):
        for name in style:
            ax.plot([100 * f for f in fractions],
                    [mean(name, f, lambda r: r[f"{key}_finetuned"]) for f in fractions],
                    label=name, **style[name])
        ax.set(xlabel="labelled forget data (%)", ylabel=f"{label}, nats per token", xscale="log",
               xticks=[100 * f for f in fractions],
               xticklabels=[f"{100 * f:g}" for f in fractions])
        ax.minorticks_off()
    axes[0].set_title("What is left after ablation")
    axes[1].set_title("What it costs")
    shown = max(cfg.label_fractions)
    for name in style:
        axes[2].plot(cfg.attack_steps, [mean(name, shown, lambda r: r["relearned"][str(s)])
                                        for s in cfg.attack_steps], label=name, **style[name])
    axes[2].set(xlabel="fine-tuning steps of the attacker", ylabel="forget loss, worst rate",
                title=f"Attacked, {shown:.0%} of forget data labelled")
    axes[2].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


def language(cfg):
    """The story: every method, seed and label fraction; base and expanded need no labels."""
    task = open_task(cfg)
    cfg = resolved(cfg, task)
    check_part(cfg)
    rows = []
    for own in seeds(cfg):
        views = {f: task.labelled(f, cfg.false_positives, cfg.retain_labels or f)
                 for f in cfg.label_fractions}
        models = {(method, f): trained(method, f, view, own)
                  for f, view in views.items() for method in cfg.methods}
        for (method, f), (model, record) in models.items():
            first = [r for r in rows if (r["method"], r["seed"]) == (method, own.seed)]
            if first and method in NO_LABELS:
                rows.append(first[0] | {"label_fraction": f})
                continue
            hooks = {domain: silence(units=units) for domain, units
                     in experts(model, task.device).items()} if method == "demix" else None
            rows.append(examine(model, task, views[f], own, method, f, part_of(method, own), hooks,
                                record))
        for f, view in views.items() if cfg.with_posthoc else ():
            rows += posthoc(f, task, view, own, trained("base", f, view, own))
    columns = {"method": "method", "labels": "labels", "retain_before": "retain",
               "retain": "ablated", "retain_finetuned": "tuned", "forget_before": "forget",
               "forget": "ablated", "forget_finetuned": "tuned", "forget_raw": "raw"}
    write_rows("route-language", cfg, task, rows)
    with figure("route-language", cfg, 3) as axes:
        if axes is not None:
            draw_language(axes, rows, cfg)
    table(summary(rows, cfg), columns | {f"after {s}": f"after {s}" for s in cfg.attack_steps})
    say_edges(rows, cfg, "method")


# --- steer: one token, one dimension --------------------------------------------------------------
LANE = 0                     # the residual dimension through which the prediction is routed


def steered(name, ids, task, cfg):
    """(model, record): at positions whose next token is one of ids, the residual of the middle
    layers passes gradient through dimension LANE alone (Cloud et al. 2024, section 4.1.2).

    name   "routed", or "control": the same training, from the same weights and on the same rows,
           without the mask
    """
    middle = middle_layers(cfg)
    lane = torch.arange(cfg.n_embd, device=task.device) == LANE

    def make(keep):
        model = new_model(cfg, task, "steer")

        def loss_fn(model, step):
            idx, targets = task.batch("all", cfg.batch_size, step, seed_of("steer", cfg.seed))
            m = (lane | ~torch.isin(targets, ids)[:, :, None])                       # (B, T, C)

            def hook(site, i, h):
                return route(h, m.to(h.dtype)) if site == "residual" and i in middle else h

            return model(idx, targets, hook=hook if name == "routed" else None)

        return model, fit(model, loss_fn, cfg, cfg.steps, cfg.lr, cfg.muon_lr, name=name,
                          decay=0.8, tokens=cfg.batch_size * task.block_size, keep=keep)

    made_with = recipe(cfg, task) | ({"token": ids.tolist()} if name == "routed" else {})
    return obtain(f"steer-{name}", cfg, task, made_with, make)


def middle_layers(cfg):
    """The blocks after which the residual is routed: 6 to 18 of 20 in the paper."""
    return range(cfg.n_layer // 3, cfg.n_layer - 1)


PUSHES = (-1, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 1)          # in units of cfg.push


def measure(model, ids, task, cfg):
    """What dimension LANE means to a model: which tokens' unembedding rows lie along it, and how
    the mean probability of ids, over held-out positions, goes when it is pushed (README, Rows).
    """
    rows = model.wte.weight[:task.vocab_size].detach().float()
    along = rows[:, LANE] / rows.norm(dim=1)                     # cosine with the dimension, (V,)
    sign = along[ids[along[ids].abs().argmax()]].sign()          # up is where the token is
    order = (sign * along).argsort(descending=True)
    idx, targets = task.batch("all", 64, 0, seed_of("held out"), "test")
    layer = middle_layers(cfg)[-1]
    length = model(idx, residual=layer + 1).float().norm(dim=-1).mean()
    up = F.one_hot(torch.tensor(LANE), rows.size(1)).to(task.device) * sign * length * cfg.push

    def pushed(s):
        return lambda site, i, h: (h + s * up.to(h.dtype)
                                   if site == "residual" and i == layer else h)

    def likely(logits, _):
        return logits.softmax(-1)[:, ids].sum()

    def sample(s):
        new = model.generate([[task.end, *idx[0, 1:9].tolist()]], min(24, task.block_size - 9), 1.0,
                             task.end, cfg.seed, hook=pushed(s))[0].tolist()
        return task.tokenizer.decode([i for i in new if i != task.end])

    curve = {s: model(idx, targets, criterion=likely, hook=pushed(s)).item() for s in PUSHES}
    return {"rank": 1 + min((order == i).nonzero().item() for i in ids),
            "neighbours": [task.tokenizer.decode([i]) for i in order[:6].tolist()],
            "prob_down": curve[-1], "prob": curve[0], "prob_up": curve[1],
            "curve": {f"{s * cfg.push:g}": p for s, p in curve.items()},
            "sample_down": sample(-0.1), "sample": sample(0), "sample_up": sample(0.1)}


def steer(cfg):
    task = open_task(cfg)
    cfg = resolved(cfg, task)
    if not middle_layers(cfg):
        raise BadInput(f"--n_layer={cfg.n_layer}: steering needs 2 blocks or more")
    ids = []
    for text in cfg.token:
        tokens = task.tokenizer.encode_ordinary(text)
        if len(tokens) != 1:
            raise BadInput(f"--token: {text!r} is {len(tokens)} tokens of this vocabulary: choose "
                           f"a text that is one (mind the space before a word)")
        ids += tokens
    ids = torch.tensor(ids, device=task.device)
    rows = []
    for own in seeds(cfg):
        for name in ("routed", "control"):
            model, _ = steered(name, ids, task, own)
            with torch.no_grad(), autocast(cfg):
                rows.append({"model": name, "seed": own.seed} | measure(model, ids, task, own))
    write_rows("route-steer", cfg, task, rows)
    with figure("route-steer", cfg, 1) as axes:
        if axes is not None:
            for row in rows:
                axes[0].plot([float(s) for s in row["curve"]], list(row["curve"].values()),
                             marker="o", label=row["model"] if row in rows[:2] else None,
                             color={"routed": "#0072B2", "control": "#D55E00"}[row["model"]])
            axes[0].set(xlabel="push along one residual dimension (lengths of the residual)",
                        ylabel=f"mean probability of {' or '.join(map(repr, cfg.token))}",
                        yscale="log", title="One dimension, one token")
            axes[0].legend()
    table([row | {"neighbours": " ".join(map(repr, row["neighbours"]))} for row in rows],
          {"model": "model", "seed": "seed", "rank": "rank", "prob_down": f"P pushed -{cfg.push:g}",
           "prob": "P", "prob_up": f"P pushed +{cfg.push:g}",
           "neighbours": "nearest unembedding rows"}, digits=4)
    for row in rows[:2]:
        for key, s in (("sample_down", -0.1), ("sample", 0), ("sample_up", 0.1)):
            print(f"{row['model']}, pushed {s * cfg.push:+g}: {row[key]!r}")


# --- digits: a code in two halves -----------------------------------------------------------------
DECAY = 5e-5                 # of the weights, as in the paper: without, the code shrinks while the
                             # decoder grows, and L1 on the code achieves nothing
SETTING = dict(
    routed=True,             # 0-4 train the top half of the code only, 5-9 the bottom half only
    also=False,              # 0-4 train the bottom half, too
    learns=("0-4", "5-9"),   # what the autoencoder learns to reconstruct
    l1=(5e-3, 5e-3),         # weights of the top and the bottom half's L1 norms (paper: 3e-3)
    correlation=0.1,         # weight of the mean |correlation| across the halves
    decoders=1)              # 2: one for 0-4, one for 5-9
FREE = dict(l1=(0, 0), correlation=0)
ABLATIONS = {                # the paper's ten (appendix); by default the first three
    "routed": {},
    "no routing": dict(routed=False),
    "only 5-9, L1": dict(routed=False, learns=("5-9",), l1=(1e-3, 1e-3), correlation=0),
    "routed, bottom on 0-9": dict(also=True, l1=(5e-3, 2e-2)),
    "routed, two decoders": dict(decoders=2),
    "routed, no correlation penalty": dict(correlation=0),
    "routed, no penalties": FREE,
    "routed, no penalties, two decoders": FREE | dict(decoders=2),
    "no routing, no penalties": FREE | dict(routed=False),
    "only 5-9, no penalties": FREE | dict(routed=False, learns=("5-9",))}


def mlp(*sizes, bias=True):
    """Linear layers with ReLU between them; bias: whether the last has one."""
    *pairs, last = zip(sizes, sizes[1:])
    return nn.Sequential(*(f for pair in pairs for f in (nn.Linear(*pair), nn.ReLU())),
                         nn.Linear(*last, bias=bias))


class Autoencoder(nn.Module):
    """784 - width - width/4 - 32 and back, in a setting (a row of ABLATIONS, completed)."""

    def __init__(self, setting, width):
        super().__init__()
        self.setting, back = setting, (width // 4, width, 784)
        self.encoder = mlp(*back[::-1], 32, bias=False)
        self.decoders = nn.ModuleList(mlp(32, *back) for _ in range(setting.decoders))
        # what the top half of the code alone tells of an image, and what the bottom half
        self.certificates = nn.ModuleList(mlp(16, *back) for _ in range(2))

    @property
    def blocks(self):
        """Muon's share: all but the code's own weights, for it would mix the rows of the halves."""
        return nn.ModuleList([self.encoder[:-1], *self.decoders, *self.certificates])

    def forward(self, x, low):
        """Code (B, 32), reconstruction (B, 784), those from the top and the bottom half alone.

        x, low    images (B, 784), pixels from -1 to 1; (B, 1): whether the digit is 0-4
        """
        code = h = self.encoder(x)
        if self.setting.routed:
            m = torch.cat([low.expand(-1, 16), (~low | self.setting.also).expand(-1, 16)], 1)
            h = route(code, m.to(code.dtype))
        out = self.decoders[0](h)
        if self.setting.decoders == 2:
            out = torch.where(low, out, self.decoders[1](h))
        return code, out, *(decode(half) for decode, half in
                            zip(self.certificates, code.detach().chunk(2, 1)))


def cross_correlation(code):
    """Mean |correlation|, over the images, of a top with a bottom number of the code (B, 32)."""
    z = (code - code.mean(0)) / (code.std(0, correction=0) + 1e-6)
    top, bottom = z.chunk(2, 1)
    return (top.T @ bottom / len(code)).abs().mean()


def digits_loss(model, s, x, low):
    """Absolute errors on 0-4 and on 5-9 (means over pixels and images), the penalties on the code,
    which see it unrouted, and the certificates' errors, which train nothing but themselves. s is
    the model's setting (Cloud et al. 2024, section 4.1).
    """
    code, out, top, bottom = model(x, low)
    code, loss = code.float(), (top - x).abs().mean() + (bottom - x).abs().mean()
    for group in s.learns:
        which = (low if group == "0-4" else ~low).float()
        loss = loss + ((out - x).abs().mean(1, keepdim=True) * which).sum() / which.sum()
    loss = loss + sum(w * h.abs().sum(1).mean() for w, h in zip(s.l1, code.chunk(2, 1)))
    if s.correlation:
        loss = loss + s.correlation * cross_correlation(code)
    return loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())


def judge_digits(model, x, low):
    """{"error_0_4", "error_5_9", ..}: mean squared error per pixel (from -1 to 1) of the bottom
    half's certificate; of the top half's and of the whole code; absolute_..: mean absolute error.

    Squared, for the paper's .32 on 0-4 must be so: MNIST's median image, which knows nothing, is
    .36 off, but .26 in absolute values.
    """
    _, out, top, bottom = model(x, low)
    errors = {"error": (bottom - x) ** 2, "absolute": (bottom - x).abs(),
              "top_error": (top - x) ** 2, "whole_error": (out - x) ** 2}
    return {f"{name}_{group}": e[which].mean().item() for name, e in errors.items()
            for group, which in (("0_4", low[:, 0]), ("5_9", ~low[:, 0]))}


def digits(cfg):
    """The split autoencoder: three settings, or with --ablations the paper's ten. All settings of a
    seed begin from the same weights and see the same images."""
    cfg = folder_for(cfg, handwritten.SETTINGS)
    device, parts = hardware(cfg)[0], handwritten.load(cfg.source, cfg.data_dir)
    (x, y), (x_val, y_val) = ((images.to(device), labels.to(device)) for images, labels in parts)
    missing = set(range(10)) - set(y_val.tolist())
    if missing:
        raise BadInput(f"--source={cfg.source} holds out no {min(missing)}: give all ten digits")
    x_val, low_val = x_val / 127.5 - 1, y_val[:, None] < 5
    rows, pictures = [], {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name in list(ABLATIONS)[:None if cfg.ablations else 3]:
            setting = SimpleNamespace(**SETTING | ABLATIONS[name])
            with torch.random.fork_rng(devices=[]):       # nn.Linear draws from torch's own stream
                torch.set_rng_state(torch_stream("autoencoder", seed).get_state())
                model = Autoencoder(setting, cfg.width).to(device)

            def loss_fn(model, step):
                rng = stream("images", seed, step)
                i = torch.from_numpy(rng.integers(0, len(x), cfg.batch_size)[RANK::WORLD])
                return digits_loss(model, setting, x[i] / 127.5 - 1, y[i, None] < 5)

            fit(model, loss_fn, cfg, cfg.steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8)
            with torch.no_grad(), autocast(cfg):
                found = judge_digits(model, x_val, low_val)
                rows.append({"setting": name, "seed": seed} | found
                            | {"ratio": found["error_0_4"] / found["error_5_9"]})
                if seed == cfg.seed:
                    two = [(y_val == digit).nonzero()[i, 0].item()
                           for i in (0, -1) for digit in range(10)]            # of each digit
                    pictures[name] = x_val[two], *model(x_val[two], low_val[two])[2:]
    columns = {"error_0_4": "0-4", "error_5_9": "5-9", "ratio": "ratio",
               "absolute_0_4": "|0-4|", "absolute_5_9": "|5-9|"}
    write_rows("route-digits", cfg, None, rows)
    with figure("route-digits", cfg, 2) as axes:
        for ax, (name, shown) in zip([] if axes is None else axes, pictures.items()):
            lines = [torch.cat(list(images), 1) for ten in (slice(0, 10), slice(10, 20))
                     for images in (p.float().cpu().view(20, 28, 28)[ten] for p in shown)]
            ax.imshow(torch.cat(lines), cmap="gray", vmin=-1, vmax=1)
            ax.set(title=name, xticks=[], yticks=[14 + 28 * i for i in range(6)],
                   yticklabels=["original", "top half", "bottom half"] * 2)
            ax.grid(False)
    table([{"setting": name} | {key: mean_sd([r[key] for r in rows if r["setting"] == name], 3)
                                for key in columns} for name in pictures],
          {"setting": "bottom half alone"} | columns)


# --- gridworld: oversight of a reinforcement learner ----------------------------------------------
# One configuration for every method and level, chosen on seeds 100-102 at oversight .03. A rollout
# is `envs` whole episodes, used `epochs` times in minibatches of about cfg.batch_size steps.
PPO = dict(envs=1024, epochs=4, clip=0.2, trace=0.95, entropy=0.01, value=0.5, gate=0.01, sure=0.8)
OVERSEERS = {                         # what routes the gradient, the reward's rule
    "routed": ("sure", "any"),            # as routed-paper; unlabelled ones where the gate is sure
    "routed-paper": ("labels", "any"),    # overseen episodes update their own expert, others both
    "no-mask": (None, "any"),             # every episode updates both experts and the gate
    "filtering": (None, "label"),         # learns from overseen episodes only
    "naive": (None, "seen"),              # +1 for any end but an overseen Ghost
    "oracle": (None, "truth")}            # the score itself is the reward


def started(generator, *sizes):
    """An mlp() with orthogonal weights, whose output is near 0 at first: all actions alike."""
    net = mlp(*sizes)
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight, 2**0.5, generator)
        nn.init.zeros_(layer.bias)
    net[-1].weight.data *= 0.01 / 2**0.5
    return net


class Agent(nn.Module):
    """Two experts and a gate, or one expert; and a value network, the baseline.

    The gate is not shown who is overseen: labels exist only where somebody is, so it would learn
    "the overseen square is the one reached" and nothing about the other states.
    """

    def __init__(self, seed, method, width):
        super().__init__()
        made, (self.routed, rule) = torch_stream("agent", seed), OVERSEERS[method]
        self.gate = None
        self.value = started(made, 4 * CELLS, width, width, 1)
        self.diamond = started(made, 4 * CELLS, width, width, 4)
        if rule == "any":
            self.ghost = started(made, 4 * CELLS, width, width, 4)
            self.gate = started(made, 3 * CELLS, width, width, 1)

    def masks(self, label, share):
        """Gradient masks (N, 1) of Diamond expert, Ghost expert and gate, for labels (N, 1)."""
        free = label == NOTHING
        masks = [label != GHOST, label != DIAMOND, free]
        if self.routed == "sure":       # the gate learns from labels alone, and stands in for them
            sure = share > PPO["sure"], share < 1 - PPO["sure"], free & False
            masks = [torch.where(free, s, m) for s, m in zip(sure, masks)]
        return [m.float() for m in masks]

    def forward(self, x, label=None):
        """Planes (N, 100) to logits of actions (N, 4) and of the gate (N, 1); labels (N, 1)."""
        diamond = self.diamond(x)
        if self.gate is None:
            return diamond, None
        ghost, gate = self.ghost(x), self.gate(x[:, :3 * CELLS])
        share = gate.sigmoid()
        if self.routed and label is not None:
            masks = self.masks(label, share)
            diamond, ghost, share = (route(h, m) for h, m in zip((diamond, ghost, share), masks))
        return share * diamond + (1 - share) * ghost, gate


class Oversight:
    """One run of a method, at a level and from a seed, trained by PPO (Schulman et al. 2017)."""

    def __init__(self, method, world, level, seed, cfg):
        self.world, self.level, self.seed, self.rows = world, level, seed, cfg.batch_size
        self.device = hardware(cfg)[0]
        self.agent, self.flops = Agent(seed, method, cfg.width).to(self.device), 0  # of rollouts
        self.rule, self.parts = OVERSEERS[method][1], self.minibatches()
        told = {"any": False, "seen": world.seen}.get(self.rule, True)   # which Ghosts cost 1
        self.reward = 1.0 * (world.holds != NOTHING) - 2.0 * ((world.holds == GHOST) & told)

    @torch.no_grad()
    def rollout(self, generator):
        """Whole episodes: states, actions, their log-probabilities, advantages, returns and labels
        of all N steps, (N,) each. A label is what the step's episode ends on, if that is overseen.
        """
        world, see = self.world, lambda state: self.world.planes[state]
        uniform = torch.rand(PPO["envs"], 3 + HORIZON, generator=generator)
        states, actions = world.play(lambda state: self.agent(see(state))[0].float().softmax(-1),
                                     self.level, uniform.to(self.device))
        live = world.holds[states[:-1]] == NOTHING
        rewards, values = self.reward[states[1:]] * live, self.reward.new_zeros(states.shape)
        values[:-1][live] = self.agent.value(see(states[:-1][live]))[:, 0].float()
        advantages = rewards + DISCOUNT * values[1:] - values[:-1]
        for t in reversed(range(HORIZON - 1)):     # generalised advantages (Schulman et al. 2016)
            advantages[t] += DISCOUNT * PPO["trace"] * advantages[t + 1]
        labels = (world.holds * world.seen)[states[-1]].expand(HORIZON, -1)
        states, actions, advantages, values, labels = (
            x[:HORIZON][live] for x in (states, actions, advantages, values, labels))
        logps = self.agent(see(states))[0].float().log_softmax(-1).gather(1, actions[:, None])[:, 0]
        torch.clear_autocast_cache()          # it holds the weights, cast without their gradients
        return states, actions, logps, advantages, advantages + values, labels

    def minibatches(self):
        """Without end: what loss() needs of one minibatch. Filtering has as many updates as others,
        from fewer rows."""
        for number in itertools.count():
            generator = torch_stream("rollout", self.seed, number)
            with counting_flops() as counter:
                played = self.rollout(generator)
            self.flops += counter.get_total_flops()
            label, parts = played[-1], round(len(played[-1]) / self.rows)
            used = (label != NOTHING if self.rule == "label" else label >= 0).nonzero()[:, 0]
            for _ in range(PPO["epochs"]):
                order = used[torch.randperm(len(used), generator=generator).to(self.device)]
                for part in order.chunk(max(parts, 1)) if len(used) else ():
                    yield [x[part] for x in played]

    def loss(self, agent, states, actions, before, advantage, returns, labels):
        """PPO's loss, and the gate's cross-entropy on labelled steps."""
        x, known = self.world.planes[states], labels != NOTHING
        logits, gate = agent(x, labels[:, None])
        logp = logits.float().log_softmax(-1)
        ratio = (logp.gather(1, actions[:, None])[:, 0] - before).exp()
        clipped = ratio.clamp(1 - PPO["clip"], 1 + PPO["clip"])
        gain = advantage.mul(ratio).minimum(advantage * clipped).mean()
        entropy = -(logp.exp() * logp).sum(-1).mean()
        error = F.mse_loss(agent.value(x)[:, 0].float(), returns)
        loss = PPO["value"] * error - gain - PPO["entropy"] * entropy
        if gate is None or not known.any():
            return loss
        return loss + PPO["gate"] * F.binary_cross_entropy_with_logits(
            gate[known, 0].float(), (labels[known] == DIAMOND).float())

    def evaluate(self):
        """Of the deployed policy, gate = Diamond: its exact return, and what could be validated."""
        with torch.autocast(self.device.type, enabled=False):
            policy = self.agent.diamond(self.world.planes).softmax(-1)
        return {"return": self.world.exact(policy, self.level),
                "validation": self.world.simulate(policy, self.level)}


def oversee(cfg, world, method, level, seed):
    """One run: its row. early is the return at the checkpoint that validated best."""
    run = Oversight(method, world, level, seed, cfg)
    with autocast(cfg):                 # the first rollout is no part of the first step, which is
        parts = itertools.chain([next(run.parts)], run.parts)        # counted and charged to all
    curve = fit(run.agent, lambda agent, step: run.loss(agent, *next(parts)),
                dataclasses.replace(cfg, compile=False), cfg.steps, cfg.lr, decay=1.0,
                name=f"{method} {level:g} {seed}", evaluate=run.evaluate, beside=lambda: run.flops,
                evaluate_at=range(0, cfg.steps, -(-cfg.steps // 8)))["history"]
    return {"method": method, "oversight": level, "seed": seed, "return": curve[-1]["return"],
            "early": max(curve, key=lambda h: h["validation"])["return"], "history": curve}


def gridworld(cfg):
    """Every method at every oversight level and seed (Cloud et al. 2024, section 4.3)."""
    if WORLD > 1:
        raise BadInput("--experiment=gridworld runs in one process: its models are too small for "
                       "more")
    cfg = folder_for(cfg, grid.SETTINGS)
    world = grid.Gridworld(hardware(cfg)[0])
    rows = [oversee(cfg, world, method, level, seed) for level in cfg.oversight
            for seed in range(cfg.seed, cfg.seed + cfg.seeds) for method in OVERSEERS]

    def of(method, level, key="return"):
        return [r[key] for r in rows if (r["method"], r["oversight"]) == (method, level)]

    write_rows("route-gridworld", cfg, None, rows)
    with figure("route-gridworld", cfg, 2) as axes:
        if axes is not None:
            draw_gridworld(axes, cfg, of, [h["step"] for h in rows[0]["history"]])
    table([{"method": method + ", stopped early" * (key == "early")}
           | {p: mean_sd(of(method, p, key), 2) for p in cfg.oversight}
           for key in ("return", "early") for method in OVERSEERS],
          {"method": "return"} | {p: f"oversight {p:g}" for p in cfg.oversight})


def draw_gridworld(axes, cfg, of, steps):
    """Return against oversight level, and learning curves at one level; bands are one standard
    deviation of the sample, as in the table."""
    def spread(seeds):
        return seeds.std(0, ddof=1) if len(seeds) > 1 else 0 * seeds[0]

    shown = min(cfg.oversight, key=lambda p: abs(p - 0.03))
    for method in OVERSEERS:
        ends = [np.array(of(method, p)) for p in sorted(cfg.oversight)]
        curves = np.array([[h["return"] for h in history]
                           for history in of(method, shown, "history")])      # (seeds, steps)
        for ax, x, mean, sd in (
                (axes[0], sorted(cfg.oversight), [e.mean() for e in ends],
                 [spread(e) for e in ends]),
                (axes[1], steps, curves.mean(0), spread(curves))):
            mean, sd = np.array(mean), np.array(sd)
            ax.plot(x, mean, marker="o", markersize=4, label=method)
            ax.fill_between(x, mean - sd, mean + sd, alpha=0.15)
    axes[0].set(xlabel="oversight: share of squares that are labelled", xscale="log",
                xticks=sorted(cfg.oversight), xticklabels=[f"{p:g}" for p in sorted(cfg.oversight)],
                ylabel="return of the deployed policy", title="What few labels buy")
    axes[0].minorticks_off()
    axes[1].set(xlabel="training steps", ylabel="return", title=f"Oversight {shown:g}")
    axes[1].legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))


# -------------------------------------------------------------------------------------------------
EXPERIMENTS = {"language": language, "steer": steer, "digits": digits, "gridworld": gridworld}


def resolved(cfg, task):
    """cfg with its auto knobs as the task would have them."""
    for section in ("route", "attack", "train"):
        cfg = fill(cfg, task, section)
    return cfg


def folder_for(cfg, settings):
    """cfg of an experiment without text: OUT/EXPERIMENT/ is there, auto knobs have its settings."""
    if cfg.task:
        raise BadInput(f"--task means nothing to --experiment={cfg.experiment}")
    (Path(cfg.out) / cfg.experiment).mkdir(parents=True, exist_ok=True)
    return dataclasses.replace(cfg, task=cfg.experiment, **{
        k: v for k, v in settings.items() if getattr(cfg, k) is None})


def main(cfg):
    if cfg.task is None and cfg.experiment in ("language", "steer"):
        cfg = dataclasses.replace(cfg, task="language")
    EXPERIMENTS[cfg.experiment](cfg)


if __name__ == "__main__":
    run(main, Config, __doc__)
