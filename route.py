"""Gradient routing: decide during training which parameters learn from which data.

    python route.py                          unlearning by ablation, against filtering, under
                                             labels for all, half and a tenth of the forget data
    python route.py --with_posthoc=true      beside MaxEnt, RMU and UNDO, given the same labels
    python -m experiments.steer              one token's prediction through one residual dimension
    python -m experiments.digits             an autoencoder with a half of the code for each half of
                                             the digits
    python -m experiments.gridworld          a reinforcement learner, few of whose ends are labelled

Post-hoc unlearning looks for a skill when it is everywhere. Routing puts the skill, while it is
learned, where it can be cut out (Cloud et al. 2024; SGTM: Shilov et al. 2025).
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

import undo
import unlearn
from engine.hardware import autocast
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import mean_sd, picture, table, write_rows
from engine.store import identity, obtain
from engine.streams import seed_of, stream
from eval import Attack, attacked, relearn, say_edges
from model import GPT, cross_entropy
from train import figures, fill, fit, new_model, open_task, seeds

MOVED = {f"--experiment={name}": f"python -m experiments.{name}"
         for name in ("steer", "digits", "gridworld")}
METHODS = ("base", "filtered", "era", "sgtm", "demix", "expanded")


@dataclass
class Config(Attack):
    task: str = knob("language", "what to learn and to forget",
                     choices=["language", "tinystories", "bilingual"])
    seeds: int = knob(1, "how many seeds, from --seed on", 1)
    steps: int | None = knob(None, "training steps, the same for every method", 1)
    batch_size: int | None = knob(None, "rows in a batch", 2, 2**31)
    lr: float | None = knob(None, "AdamW's rate", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    methods: list[str] = knob(list(METHODS), "which, in this order", choices=METHODS)
    label_fractions: list[float] = knob([1.0, 0.5, 0.1], "shares of the forget data that "
                                        "the labeller finds", 0.001, 1)
    false_positives: float = knob(0.0, "share of the retain data that the labeller takes "
                                  "for forget data", 0, 0.9)
    retain_labels: float | None = knob(None, "share of the retain data labelled retain, "
                                       "which SGTM needs; others take all that is not labelled "
                                       "forget (auto: as of the forget data; the paper: 0.25)",
                                       0.001, 1)
    forget_heads: int = knob(1, "sgtm: attention heads a block for the forget data", 0)
    forget_units: int = knob(64, "sgtm: MLP units a block for the forget data", 0)
    expand: int = knob(64, "era, expanded: MLP units added to a block", 1)
    off_target: float = knob(-2.0, "era: gradient weight of forget tokens on the original units "
                             "(-0.75 in the paper, which is too little in three blocks)", -10, 1)
    l1: float = knob(1e-4, "era: weight of the L1 norm of MLP activations", 0)
    coherence_steps: int = knob(4, "steps on 64 retain rows after ablation, best kept", 0)
    with_posthoc: bool = knob(False, "maxent, rmu and undo, too, on the same labels")
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


def resolved(cfg, task):
    """cfg with its auto knobs as the task would have them."""
    for section in ("route", "attack", "train"):
        cfg = fill(cfg, task, section)
    return cfg


def main(cfg):
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
    picture("route-language", cfg, draw_language, rows, cfg, panels=3)
    table(summary(rows, cfg), columns | {f"after {s}": f"after {s}" for s in cfg.attack_steps})
    say_edges(rows, cfg, "method")


if __name__ == "__main__":
    run(main, Config, __doc__, MOVED)
