"""Gradient routing: decide during training which parameters learn from which data.

    python route.py                          compares unlearning by ablation with filtering, where
                                             all, half or a tenth of the forget data is labelled
    python route.py --with_posthoc=true      adds MaxEnt, GradDiff, RMU and UNDO on the same labels

experiments/ routes a token's prediction (steer), an autoencoder (digits) and a reinforcement
learner (gridworld).

Post-hoc unlearning looks for a skill after it has spread through the model. Routing collects the
skill, during training, in a part that can be cut out (Cloud et al. 2024; SGTM: Shilov et al. 2025).
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import undo
import unlearn
from data import tinystories
from engine.hardware import autocast
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import (
    draw_routing,
    joined,
    over_seeds,
    picture,
    say_edges,
    table,
    words_of,
    write_rows,
)
from engine.store import identity, obtain
from engine.streams import seed_of, stream
from eval import Attack, attacked, fill_attack, relearn
from model import GPT, cross_entropy
from train import Seeds, config_from, evaluated, fill, fit, new_model, open_task, seeds

MOVED = {f"--experiment={name}": f"python -m experiments.{name}"
         for name in ("steer", "digits", "gridworld")}
METHODS = ("base", "filtered", "era", "sgtm", "demix", "expanded")


@dataclass
class Config(Attack, Seeds):
    task: str = knob("language", "what to learn and to forget",
                     choices=["language", "tinystories", "bilingual"])
    steps: int | None = knob(None, "training steps, the same for every method", 1)
    batch_size: int | None = knob(None, "rows in a batch", 2, 2**31)
    lr: float | None = knob(None, "AdamW's rate", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    methods: list[str] = knob(list(METHODS), "methods to compare, in this order", choices=METHODS)
    label_fractions: list[float] = knob([1.0, 0.5, 0.1], "shares of the forget data that "
                                        "the labeller finds", 0.001, 1)
    false_positives: float = knob(0.0, "share of the retain data that is wrongly labelled "
                                  "forget", 0, 0.9)
    retain_labels: float | None = knob(None, "sgtm: share of the retain data that is labelled "
                                       "retain; other methods use all data not labelled forget "
                                       "(auto: the label fraction; 0.25 in the paper)", 0.001, 1)
    forget_heads: int = knob(1, "sgtm: attention heads in each block for the forget data", 0)
    forget_units: int = knob(64, "sgtm: MLP units in each block for the forget data", 0)
    forget_embedding: bool | None = knob(None, "era, sgtm: whether the embedding learns forget "
                                         "data, too, as in the papers")
    expand: int = knob(64, "era, expanded: MLP units added to each block", 1)
    off_target: float = knob(-2.0, "era: gradient weight of forget tokens on the original units "
                             "(-0.75 in the paper, which is too weak for three blocks)", -10, 1)
    off_heads: float | None = knob(None, "era: the same on the attention heads (1: as in the "
                                   "paper, they learn from all tokens alike)", -10, 1)
    l1: float = knob(1e-4, "era: weight of the L1 norm of MLP activations", 0)
    coherence_steps: int = knob(4, "steps on 64 retain rows after ablation; the best is kept", 0)
    with_posthoc: bool = knob(False, "also run maxent, graddiff, rmu and undo on the same "
                                "labels")
    alphas: list[float] = knob([0.6], "with_posthoc: UNDO's noise", 0, 1)


STORIES = dict(steps=1200, batch_size=8, lr=6e-3, muon_lr=0.02, lrs=[1e-3, 3e-3],
               forget_embedding=True, off_heads=1.0)
SETTINGS = {                               # what auto knobs stand for, by task
            "tinystories": STORIES | dict(forget_embedding=False, off_heads=-1.0),
            "bilingual": STORIES,
            "language": STORIES | dict(steps=400, batch_size=32,
                                       attack_steps=[10, 20, 40, 80, 120]),
            # As many steps and rows as in the code of Cloud et al. 2024, whose era has
            # --off_target=-0.75 and expands only the first five of eight blocks
            ("tinystories", "paper"): dict(steps=5000, batch_size=80, lr=3e-3)}


# --- masks: the whole idea ------------------------------------------------------------------------
def route(h, m):
    """h, unchanged to the last bit, but with its gradient multiplied by m: m h + (1 - m) stop(h).

    m = 1 lets the gradient through, m = 0 stops it, and a negative m reverses it, so that the
    layers before h are trained to do worse. m broadcasts to h (Cloud et al. 2024, section 3).
    """
    constant = h.detach()
    return constant + m * (h - constant)


class Frozen:
    """Hooks for fit() that freeze parameters during a step: they get no gradient, and neither
    momentum nor weight decay moves them (Shilov et al. 2025, section 3; in their code both do).

    A loss function sets .masks, [(parameter, bool mask of the frozen entries)], at every step. It
    sets .pieces once, if Muon is to treat parts of a matrix as separate matrices (see fit).
    """

    def __init__(self):
        self.masks, self.pieces = [], []

    @torch.no_grad()
    def after_backward(self):
        self.before = [p.clone() for p, _ in self.masks]
        for p, mask in self.masks:
            p.grad.masked_fill_(mask, 0)

    @torch.no_grad()
    def after_step(self):
        for (p, mask), before in zip(self.masks, self.before):
            p.copy_(torch.where(mask, before, p))


def forget_part(model, heads, units):
    """Views of the weights for forget data alone: those of each block's last heads and units."""
    n, m = model.config.n_head, model.config.n_units
    return [w for block in model.blocks
            for w in (*block.head(slice(n - heads, n)), *block.units(slice(m - units, m)))]


@torch.no_grad()
def forget_masks(model, heads, units):
    """[(parameter of the blocks, bool mask of its entries in the forget part)]."""
    marked = GPT(model.config).to(model.wte.weight.device)
    for p in marked.parameters():
        p.zero_()
    for w in forget_part(marked, heads, units):
        w.fill_(1)
    return [(p, mark > 0) for p, mark in zip(model.blocks.parameters(),
                                             marked.blocks.parameters())]


@torch.no_grad()
def ablate(model, heads, units):
    """Removes the forget part."""
    for w in forget_part(model, heads, units):
        w.zero_()


def silence(heads=None, units=None):
    """A model's hook that multiplies what heads or MLP units compute by a mask: heads is
    (.., nh, 1), units (.., n_units)."""
    def hook(site, i, h):
        mask = {"heads": heads, "units": units}.get(site)
        return h if mask is None else h * mask.to(h.dtype)

    return hook


# --- methods: each gives the loss function of one training run ------------------------------------
# `task` is a Task.labelled(), whose splits follow the labels. frozen is for fit(). Methods with the
# same seed can be compared in pairs: models of the same size start from the same weights, and all
# draw the rows of a split from the same stream.

def batch_seed(cfg):
    """The seed of all training batches in route.py."""
    return seed_of("route", cfg.seed)


def base(model, task, cfg, frozen):
    """Learns from all data. So does `expanded`, a control as wide as era but without routing."""
    return lambda model, step: model(*task.batch("all", cfg.batch_size, step, batch_seed(cfg)))


def filtered(model, task, cfg, frozen):
    """Learns from the data that is not labelled forget."""
    return lambda model, step: model(*task.batch("retain", cfg.batch_size, step, batch_seed(cfg)))


def mixed_batch(task, cfg, step):
    """(idx, targets, forget): a batch in which rows labelled forget are as frequent as in the data.
    forget (B, 1) bool marks these rows."""
    share = sum(task.shares("forget"))
    shares, seed = {"forget": share, "retain": 1 - share}, batch_seed(cfg)
    idx, targets = task.batch(shares, cfg.batch_size, step, seed)
    return idx, targets, task.origins(shares, cfg.batch_size, step, seed)[:, None] == 0


def era(model, task, cfg, frozen):
    """Expand, route, ablate (Cloud et al. 2024, section 4.2). MLP units are added to each block.
    Tokens of forget texts train the new units with weight 1, the others with cfg.off_target, and
    the attention heads with cfg.off_heads.

    A token that is as frequent in retain texts as in forget texts keeps weight 1 everywhere: w =
    1 - sigmoid(r - 1/r - 4), with r its frequency in forget texts over that in retain texts (the
    paper's appendix; it uses the truth, we the labels). cfg.l1 weighs the activations' L1 norm.
    Without cfg.forget_embedding, the embeddings of tokens with w < 1/2 stand still: they unembed,
    too, so that a word to be forgotten would live on in its own row.
    """
    forget, retain = (task.counts(split) + 1.0 for split in ("forget", "retain"))
    r = (forget / forget.sum()) / (retain / retain.sum())
    w = 1 - torch.sigmoid(r - 1 / r - 4)
    on_units, on_heads = ((w + (1 - w) * off).float().to(task.device)                   # (V,)
                          for off in (cfg.off_target, cfg.off_heads))
    new = torch.arange(model.config.n_units, device=task.device) >= 4 * model.config.n_embd
    if not cfg.forget_embedding:
        wte = model.wte.weight
        still = F.pad(w < 0.5, (0, len(wte) - len(w))).to(task.device)
        frozen.masks = [(wte, still[:, None].expand_as(wte))]

    def loss_fn(model, step):
        idx, targets, forget = mixed_batch(task, cfg, step)
        m, m_heads = (torch.where(forget, weight[targets], 1.0)[:, :, None]             # (B, T, 1)
                      for weight in (on_units, on_heads))
        norms = []

        def hook(site, i, h):
            if site == "heads" and cfg.off_heads != 1:
                return route(h, m_heads[..., None].to(h.dtype))
            if site != "units":
                return h
            norms.append(h.abs().sum(-1).mean())
            return route(h, torch.where(new, 1.0, m).to(h.dtype))

        return model(idx, targets, hook=hook) + cfg.l1 * sum(norms)

    return loss_fn


def sgtm(model, task, cfg, frozen):
    """Selective gradient masking (Shilov et al. 2025). Every step uses one kind of data:
    forget        the retain parameters are frozen
    sure          labelled retain: the forget parameters are frozen and silenced
    unlabelled    nothing is masked, and the forget part absorbs what resembles forget data
    The embedding learns from all, or from all but forget rows (cfg.forget_embedding: see era). Muon
    must treat the parts as separate matrices (pieces). Otherwise it orthogonalises them together,
    momentum included, so that what the forget part has learned steers every later step of the
    retain part.
    """
    frozen.pieces = model.rectangles(cfg.forget_heads, cfg.forget_units)
    forget_entries = forget_masks(model, cfg.forget_heads, cfg.forget_units)
    retain_entries = [(p, ~mask) for p, mask in forget_entries]
    if not cfg.forget_embedding:
        wte = model.wte.weight
        retain_entries.append((wte, torch.ones_like(wte, dtype=torch.bool)))
    stands_still = {"forget": retain_entries, "sure": forget_entries, "unlabelled": []}
    n, m = model.config.n_head, model.config.n_units
    heads = torch.arange(n, device=task.device) < n - cfg.forget_heads
    units = torch.arange(m, device=task.device) < m - cfg.forget_units
    silent = silence(heads[:, None], units)
    shares = [sum(task.shares(kind)) for kind in stands_still]
    chances = [share / sum(shares) for share in shares]

    def loss_fn(model, step):
        rng = stream("kind of step", cfg.seed, step)
        kind = list(stands_still)[rng.choice(3, p=chances)]
        frozen.masks = stands_still[kind]
        return model(*task.batch(kind, cfg.batch_size, step, batch_seed(cfg)),
                     hook=silent if kind == "sure" else None)

    return loss_fn


def experts(model, device):
    """DEMix's MLP units by domain, {domain: (n_units,) bool}: the first half is for retain."""
    second = torch.arange(model.config.n_units, device=device) >= 4 * model.config.n_embd
    return {"retain": ~second, "forget": second}


def demix(model, task, cfg, frozen):
    """Each domain has an MLP, chosen by the label; forget's is removed (Gururangan et al. 2021)."""
    of = experts(model, task.device)

    def loss_fn(model, step):
        idx, targets, forget = mixed_batch(task, cfg, step)
        units = torch.where(forget[:, :, None], of["forget"], of["retain"])      # (B, 1, n_units)
        return model(idx, targets, hook=silence(units=units))

    return loss_fn


LOSSES = {"base": base, "expanded": base, "filtered": filtered, "era": era, "sgtm": sgtm,
          "demix": demix}
NO_LABELS = ("base", "expanded")         # these models are the same at every label fraction


def check_part(cfg):
    """BadInput if the forget part would be a whole block, or empty."""
    if "sgtm" in cfg.methods:
        for name, size in (("forget_heads", cfg.n_head), ("forget_units", 4 * cfg.n_embd)):
            if getattr(cfg, name) >= size:
                raise BadInput(f"--{name}={getattr(cfg, name)} leaves nothing of a block's {size} "
                               f"for the retain data")
        if not cfg.forget_heads + cfg.forget_units:
            raise BadInput("--forget_heads=0 and --forget_units=0: give the forget data a part")


def part_of(method, cfg):
    """(heads, MLP units) of each block that ablation removes."""
    return {"era": (0, cfg.expand), "expanded": (0, cfg.expand), "demix": (0, 4 * cfg.n_embd),
            "sgtm": (cfg.forget_heads, cfg.forget_units)}.get(method, (0, 0))


# --- language: unlearning by ablation -------------------------------------------------------------
def calibrated_losses(model, task, cfg, hooks=None):
    """{"retain", "forget"}: held-out losses (nats per token) after calibrating the logits, and
    {"retain_raw", "forget_raw"}: those before; "forget_words" on tinystories, calibrated, too.
    hooks: {domain: the model's hook}.

    A model that never saw a language is certain that it will not occur. Its loss there is far above
    ln(vocabulary) and measures that certainty only. So we fit a bias on the logits, one number for
    each token, on equally many rows of both. The loss that remains is missing knowledge. (Shilov
    et al. 2025, section 4, weigh retain 100 times. This also changes a model that knows both
    languages and needs no bias: the fit tells it that the forget language is rare.)
    """
    hooks, samples, losses = hooks or {}, [], {}
    with torch.no_grad(), autocast(cfg):
        for domain in ("retain", "forget"):
            idx, targets = task.undivided(domain, 64, 0, seed_of("calibrate"), "train")
            x = model.residuals(idx, hook=hooks.get(domain))[-1]
            samples.append((model.unembed(x).float().flatten(0, 1), targets.flatten()))
    bias = torch.zeros(task.vocab_size, device=task.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([bias], max_iter=30, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = sum(F.cross_entropy(logits + bias, targets) for logits, targets in samples)
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
        if task.name == "tinystories":
            topic = tinystories.mention(task.made_with["forget_words"])
            _, losses["forget_words"] = tinystories.losses_on(
                topic, model, task, bias=bias.detach(), hook=hooks.get("forget"))
    return losses


def cohere(model, task, cfg, name):
    """A copy, fine-tuned on 64 rows labelled retain, to repair what ablation disturbed (Cloud et
    al. 2024, section 4.2). The step that is best on held-out rows labelled retain is kept; these
    rows are not reported."""
    copy, snapshots = model.clone(), []
    rows = task.batch("sure", 64, 0, seed_of("cohere", cfg.seed))

    def remember():
        snapshots.append({k: v.clone() for k, v in copy.state_dict().items()})

    def evaluate():
        return {"retain": task.loss(copy, "sure", 32, "val")}

    remember()
    losses = [evaluated(cfg, evaluate)]
    if cfg.coherence_steps:
        losses += fit(copy, lambda model, step: model(*rows), cfg, cfg.coherence_steps, 1e-3,
                      name=f"cohere {name}", evaluate=evaluate, after_step=remember,
                      evaluate_at=range(cfg.coherence_steps))["history"]
    best = min(range(len(losses)), key=lambda step: losses[step]["retain"])
    copy.load_state_dict(snapshots[best])
    return copy


def recipe(cfg, task):
    """The knobs that the weights of every model trained here depend on."""
    return {k: getattr(cfg, k) for k in ("seed", "n_layer", "n_head", "n_embd", "batch_size", "lr",
                                         "muon_lr", "steps")} | {"block_size": task.block_size}


def model_name(method, fraction):
    return f"route-{method}" + f"-{100 * fraction:g}" * (method not in NO_LABELS)


def train_by(method, fraction, task, cfg):
    """(model, record) of a method, with labels for a fraction of the forget data, read from disk or
    made. Every method trains on the same number of tokens."""
    knobs = {"era": ("expand", "off_target", "off_heads", "l1"), "expanded": ("expand",),
             "sgtm": ("forget_heads", "forget_units")}.get(method, ())
    made_with = recipe(cfg, task) | {k: getattr(cfg, k) for k in knobs} | {"method": method}
    name = model_name(method, fraction)
    if method not in NO_LABELS:
        made_with |= {"label_fraction": fraction, "false_positives": cfg.false_positives}
    if method in ("era", "sgtm") and not cfg.forget_embedding:
        made_with["forget_embedding"] = False
    if method == "sgtm":
        made_with["retain_labels"] = cfg.retain_labels or fraction

    def make(checkpoint):
        extra = 0 if method == "sgtm" else part_of(method, cfg)[1]
        model, frozen = new_model(cfg, task, "route", extra), Frozen()
        loss_fn = LOSSES[method](model, task, cfg, frozen)
        return model, fit(model, loss_fn, cfg, cfg.steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8,
                          tokens=cfg.batch_size * task.block_size, checkpoint=checkpoint,
                          after_backward=frozen.after_backward, after_step=frozen.after_step,
                          pieces=frozen.pieces)

    return obtain(name, cfg, task, made_with, make)


def judge(model, task, labelled, cfg, method, fraction, part=(0, 0), hooks=None, record=None):
    """One row: losses before and after ablation, after fine-tuning, and under attack. All use the
    true domains, but fine-tuning uses rows labelled retain. A routed model (record: its training's)
    is kept, after this, as NAME-ablated.pt, so that eval.py can examine it."""
    before = calibrated_losses(model, task, cfg, hooks)
    ablate(model, *part)
    after = calibrated_losses(model, task, cfg) if any(part) else before
    if any(part):
        tuned, _ = obtain(f"{model_name(method, fraction)}-ablated", cfg, task, {
            "routed": identity(record["made_with"]), "coherence_steps": cfg.coherence_steps},
            lambda checkpoint: (cohere(model, labelled, cfg, method), record))
    else:
        tuned = cohere(model, labelled, cfg, method)
    finetuned = calibrated_losses(tuned, task, cfg)
    with autocast(cfg):
        finer = task.score(tuned, finer=True) if task.name == "tinystories" else {}
    result = relearn(tuned, task, cfg, method)
    stages = {"_before": before, "": after, "_finetuned": finetuned}
    losses = {f"{k}{stage}": at[k] for k in ("retain", "forget", "forget_words") if k in after
              for stage, at in stages.items()}
    return {"method": method, "label_fraction": fraction, "seed": cfg.seed} | losses | {
        k: after[k] for k in ("retain_raw", "forget_raw")} | {
        k: finer[k] for k in ("mentions", "stories") if k in finer} | attacked(result)


def posthoc(fraction, truth, task, cfg, base):
    """Rows of MaxEnt, GradDiff, RMU and UNDO, which start from route.py's base and use the same
    labels. They unlearn what is labelled forget and retain the rest. UNDO distils as in undo.py."""
    labels = {"label_fraction": fraction, "false_positives": cfg.false_positives}
    (model, record), folder = base, f"labels-{100 * fraction:g}/"
    record = record | {"made_with": record["made_with"] | labels}
    models = {}
    for method in ("maxent", "graddiff", "rmu"):
        post_hoc = unlearn.resolved(config_from(cfg, unlearn.Config, Attack), method)
        models[method], _ = unlearn.unlearn(post_hoc, task, model, record, folder=folder)
    students = undo.resolved(config_from(cfg, undo.Config, Attack, alphas=cfg.alphas))
    teacher = undo.make_teacher(students, task, model, record, folder)
    for alpha in students.alphas:
        models[f"undo-{alpha:g}"], _ = undo.undo(alpha, students, task, *teacher, folder)
    return [judge(model, truth, task, cfg, name, fraction) for name, model in models.items()]


def main(cfg):
    task = open_task(cfg)
    cfg = fill_attack(fill(cfg, SETTINGS))
    check_part(cfg)
    views = {f: task.labelled(f, cfg.false_positives, cfg.retain_labels or f)
             for f in cfg.label_fractions}
    rows = joined(cfg, task)
    for each in seeds(cfg, rows):
        rows += story(each, task, views)
        write_rows("route", cfg, task, rows, quiet=True)
    columns = {"retain_before": "retain", "retain": "ablated", "retain_finetuned": "tuned",
               "forget_before": "forget", "forget": "ablated", "forget_finetuned": "tuned",
               "forget_raw": "raw", "forget_words_before": "words", "forget_words": "ablated",
               "forget_words_finetuned": "tuned", "mentions": "mentions", "relearned_few": "few"}
    columns = {k: header for k, header in columns.items() if k in rows[0]}
    attack = {f"after {step}": lambda row, step=step: row[f"relearned{words_of(row)}"][str(step)]
              for step in cfg.attack_steps}
    lines = over_seeds(rows, ["method", "label_fraction"], dict(zip(columns, columns)) | attack)
    write_rows("route", cfg, task, rows)
    picture("route", cfg, draw_routing, rows, sorted(cfg.label_fractions),
            cfg.attack_steps, NO_LABELS, {row["method"] for row in rows} - {*METHODS}, panels=3)
    table([line | {"labels": "any" if line["method"] in NO_LABELS else
                   f"{line['label_fraction']:.0%}"} for line in lines
           if line["method"] not in NO_LABELS or line["label_fraction"] == cfg.label_fractions[0]],
          {"method": "method", "labels": "labels"} | columns | dict(zip(attack, attack)))
    say_edges(rows, cfg, "method")


def story(cfg, task, views):
    """The rows of every method and label fraction, for one seed. views: {label fraction: the
    labelled task}."""
    rows, no_labels = [], {}                                  # {method: its row, made once}
    models = {(method, f): train_by(method, f, view, cfg)
              for f, view in views.items() for method in cfg.methods}
    for (method, f), (model, record) in models.items():
        if method in no_labels:
            rows.append(no_labels[method] | {"label_fraction": f})
            continue
        hooks = {domain: silence(units=units) for domain, units
                 in experts(model, task.device).items()} if method == "demix" else None
        rows.append(judge(model, task, views[f], cfg, method, f, part_of(method, cfg), hooks,
                          record))
        if method in NO_LABELS:
            no_labels[method] = rows[-1]
    for f, view in views.items() if cfg.with_posthoc else ():
        rows += posthoc(f, task, view, cfg, train_by("base", f, view, cfg))
    return rows


if __name__ == "__main__":
    run(main, Config, __doc__, MOVED)
