"""Post-hoc unlearning: make a trained model forget. Each method is one loss function.

    python unlearn.py                              MaxEnt, then the relearning attack
    python unlearn.py --method=graddiff --lr=sweep
    python unlearn.py --method=all                 every method in one table

Every method suppresses the skill, but a few steps of relearning bring it back. This is the finding
to see here (Lee et al. 2025, section 3). undo.py makes the forgetting last.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from engine.hardware import autocast
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import (
    draw_relearning,
    picture,
    print_stories,
    say_edges,
    table,
    write_rows,
)
from engine.store import identity, obtain
from engine.streams import seed_of, torch_stream
from eval import AfterBase, attacked, fill_attack, foundations, relearn
from train import fill, fit, open_task

# What auto knobs stand for, by method and task.
METHOD_KNOBS = "steps", "lr", "retain_weight", "batch_size"
TUNED = {
    "maxent":   {"arithmetic": (80, 5e-4, 50.0, 32), "language": (40, 1e-3, 20.0, 32),
                 "tinystories": (220, 1.2e-3, 20.0, 16), "instruct": (40, 1e-3, 20.0, 32),
                 "pcfg": (40, 3e-4, 1.0, 64)},
    "graddiff": {"arithmetic": (40, 5e-4, 50.0, 32), "language": (40, 1e-3, 3.0, 32),
                 "tinystories": (120, 5e-4, 5.0, 16), "instruct": (40, 1e-3, 3.0, 32),
                 "pcfg": (40, 3e-4, 3.0, 64)},
    "rmu":      {"arithmetic": (60, 1e-3, 1.0, 32), "language": (60, 1e-3, 1.0, 32),
                 "tinystories": (120, 1e-3, 50.0, 16), "instruct": (60, 1e-3, 1.0, 32),
                 "pcfg": (60, 1e-3, 1.0, 64)},
    "oracle":   {"arithmetic": (100, 1e-3, None, 32), "language": (150, 1e-3, None, 32),
                 "tinystories": (150, 1e-3, None, 8), "instruct": (150, 1e-3, None, 16),
                 "pcfg": (100, 1e-3, None, 64)},
    "finetune": {"arithmetic": (60, 1e-3, None, 32), "language": (60, 1e-3, None, 32),
                 "tinystories": (60, 1e-3, None, 16), "instruct": (60, 1e-3, None, 32),
                 "pcfg": (200, 3e-4, None, 128)}}
ALIKE = {"bilingual": "tinystories", "gaming": "pcfg"}
SETTINGS = {method: {task: dict(zip(METHOD_KNOBS, by_task[ALIKE.get(task, task)]))
                     for task in (*by_task, *ALIKE)} for method, by_task in TUNED.items()}
# Rates of fine-tuning that have names (large, medium, small), by task.
RATES = {"pcfg": {"L": 1e-3, "M": 3e-4, "S": 1e-4}, "instruct": {"M": 1e-3}}


@dataclass
class Config(AfterBase):
    method: str = knob("maxent", "which loss, or all of them in one table",
                       choices=["maxent", "graddiff", "rmu", "oracle", "finetune", "all"])
    steps: int | None = knob(None, "unlearning steps", 1)
    batch_size: int | None = knob(None, "rows in a batch, half forget and half retain", 2, 2**31)
    lr: float | str | None = knob(None, "AdamW's rate; L, M or S: the task's large, medium or "
                                  "small rate; sweep: the rate that forgets most and keeps the "
                                  "retain score within 2% of base's", 0, 1,
                                  ["sweep", "L", "M", "S"])
    sweep: list[float] = knob([3e-4, 1e-3, 3e-3], "rates that --lr=sweep tries", 0, 1)
    retain_weight: float | None = knob(None, "weight of the retain term, w in the losses", 0)
    layer: int | None = knob(None, "rmu: block whose output is steered (auto: the middle one)", 1)
    mix: float = knob(0.0, "finetune: share of rows from the pretraining mix", 0, 0.9)
    c_tr: float = knob(0.0, "finetune on pcfg: share of the other rows in which the spurious rule "
                       "#b = #a + 1 holds", 0, 1)
    steer: float = knob(4.0, "rmu: length of the steering vector, in units of the residual's", 0)


def kl(teacher_logits, logits):
    """Forward KL(teacher || student) at temperature 1, in nats: the sum over rows of (N, V) logits.
    """
    return F.kl_div(logits.log_softmax(-1), teacher_logits.log_softmax(-1), log_target=True,
                    reduction="sum")


def imitate(model, teacher, idx, n=None):
    """Mean over tokens (B, T) of KL(teacher || model). The teacher gets no gradient.

    n   if given, the mean is over the last n tokens of each row, because the others are no targets

    Only the teacher's last residual is kept. Its logits are computed chunk by chunk, in criterion.
    """
    def criterion(logits, x):
        with torch.no_grad():
            target = teacher.unembed(x).float()
        return kl(target, logits)

    with torch.no_grad():
        x = teacher(idx, residual=-1)
        x = x if n is None else x[:, -n:]
    return model(idx, x, criterion)


def graddiff(model, forget, retain, reference, cfg):
    """Gradient difference: -CE(forget) + w CE(retain) (Liu et al. 2022; Lee et al. 2025, app.)."""
    return -model(*forget) + cfg.retain_weight * model(*retain)


def maxent(model, forget, retain, reference, cfg):
    """Maximum entropy: KL(uniform || p) on forget tokens + w CE(retain) (Lee et al. 2025, app.).

    KL(uniform || p) = -ln V - mean over the vocabulary of ln p.
    """
    def criterion(logits, _):
        return (-math.log(logits.size(-1)) - logits.log_softmax(-1).mean(-1)).sum()

    return model(*forget, criterion) + cfg.retain_weight * model(*retain)


@cache
def steering_vector(size, seed, device):
    """A random direction, (size,), positive in every dimension, of length 1."""
    u = torch.rand(size, generator=torch_stream("steering vector", seed))
    return F.normalize(u, dim=0).to(device)


def rmu(model, forget, retain, reference, cfg):
    """Representation misdirection (Li et al. 2024): |h(forget) - c u|^2 + w |h(retain) - h0|^2.

    h (B, T, C)   the residual after block cfg.layer; h0 is that of the base model
    u             a fixed random unit vector
    c             cfg.steer times the mean length of h0
    Both terms are measured in units of h0's mean length.
    """
    layer = cfg.layer or (reference.config.n_layer + 1) // 2
    u = steering_vector(reference.config.n_embd, cfg.seed, forget[0].device)
    with torch.no_grad():
        h0 = reference(retain[0], residual=layer).float()
        length = h0.norm(dim=-1).mean()
    push = (model(forget[0], residual=layer).float() - cfg.steer * length * u) / length
    stay = (model(retain[0], residual=layer).float() - h0) / length
    return push.square().sum(-1).mean() + cfg.retain_weight * stay.square().sum(-1).mean()


def finetune(model, forget, retain, reference, cfg):
    """CE(retain) alone: a skill that is not practised may fade. For cfg.mix and cfg.c_tr, see
    retain_shares."""
    return model(*retain)


def oracle(model, forget, retain, reference, cfg):
    """KL(filtered || model) on the unlabelled mix. This is the best that training on outputs can
    do: a model that behaves as if it had never seen the data (Lee et al. 2025, section 3).
    """
    return imitate(model, reference, torch.cat((forget[0], retain[0])), forget[1].size(1))


LOSSES = {f.__name__: f for f in (maxent, graddiff, rmu, oracle, finetune)}


def rate(cfg):
    """cfg.lr, with L, M or S replaced by the task's rate. BadInput if the task has no such rate."""
    if cfg.lr not in ("L", "M", "S"):
        return cfg.lr
    named = RATES.get(cfg.task, {})
    if cfg.lr not in named:
        raise BadInput(f"--lr={cfg.lr}: the task {cfg.task} has " + (
            f"only {', '.join(named)}" if named else "no named rates: give a number"))
    return named[cfg.lr]


def retain_shares(cfg, task):
    """{split: share} of the rows that a method retains. All are from the split retain, except for
    finetune: it can mix in other data, and rows in which a spurious rule holds (Jain et al. 2023,
    section 4)."""
    mix, c_tr = (cfg.mix, cfg.c_tr) if cfg.method == "finetune" else (0, 0)
    if c_tr and task.name != "pcfg":
        raise BadInput(f"--c_tr={c_tr:g} means nothing to the task {task.name}: only pcfg has the "
                       f"spurious rule")
    shares = {"retain": (1 - mix) * (1 - c_tr), "spurious": (1 - mix) * c_tr, "all": mix}
    return {split: share for split, share in shares.items() if share}


def sweep(cfg, task, base, attempt):
    """(model, record) of the best attempt(lr). It has the highest forget loss among those that keep
    the retain score within 2% of base's; if none does, among all.

    The record's FLOPs are the sum over all attempts.
    """
    with autocast(cfg):
        retain = task.score(base, ("retain",), "val")["retain"]
    tried = []
    for lr in cfg.sweep:
        model, record = attempt(lr)              # outside autocast, because fit() sets its own
        kept = task.within(record["history"][-1]["retain"], retain, 0.02)
        with autocast(cfg):
            tried.append((kept, task.loss(model, "forget", 64, "val"), lr, model, record))
    kept, forget_loss, lr, model, record = max(tried, key=lambda t: t[:2])
    print(f"sweep: rate {lr:g}, forget loss {forget_loss:.2f}" + (
        "" if kept else "; no rate kept the retain score within 2% of base's"))
    return model, record | {"flops": sum(t[-1]["flops"] for t in tried)}


def unlearn(cfg, task, base, base_record, filtered=None, filtered_record=None, folder=""):
    """(model, record) of base after cfg.method, read from disk or made. The oracle needs the
    filtered model.

    folder   where the model is kept among a seed's models, for example "labels-50/"
    The record's FLOPs are those spent after pretraining base. The oracle's include the filtered
    model's.
    """
    cfg = fill(cfg, SETTINGS.get(cfg.method, {}))
    if cfg.layer and cfg.layer > base.config.n_layer:
        raise BadInput(f"--layer={cfg.layer}: the model has {base.config.n_layer} blocks")
    cfg = dataclasses.replace(cfg, lr=rate(cfg))
    reference = filtered if cfg.method == "oracle" else base
    half, shares = max(cfg.batch_size // 2, 1), retain_shares(cfg, task)
    seed = seed_of(f"unlearn by {cfg.method}", cfg.seed)

    def loss_fn(model, step):
        forget = task.batch("forget", half, step, seed)
        retain = task.batch(shares, half, step, seed)
        return LOSSES[cfg.method](model, forget, retain, reference, cfg)

    def attempt(lr, checkpoint=None):
        model = base.clone()
        record = fit(model, loss_fn, cfg, cfg.steps, lr, name=f"{cfg.method} {lr:g}", decay=0.5,
                     tokens=2 * half * task.block_size, frozen=(reference,),
                     evaluate=lambda: task.score(model, part="val"), checkpoint=checkpoint)
        return model, record

    def make(checkpoint):
        if cfg.lr == "sweep":
            model, record = sweep(cfg, task, base, attempt)
        else:
            model, record = attempt(cfg.lr, checkpoint)
        if cfg.method == "oracle":
            record["flops"] += filtered_record["flops"]
        return model, record

    used = ["method", "steps", "lr", "batch_size", "seed"]
    used += ["sweep"] * (cfg.lr == "sweep") + ["layer", "steer"] * (cfg.method == "rmu")
    used += ["retain_weight"] * (cfg.method in ("maxent", "graddiff", "rmu"))
    made_with = {k: getattr(cfg, k) for k in used}
    if set(shares) != {"retain"}:
        made_with["shares"] = shares
    made_with["base"] = identity(base_record["made_with"])
    if cfg.method == "oracle":
        made_with["filtered"] = identity(filtered_record["made_with"])
    return obtain(folder + cfg.method, cfg, task, made_with, make)


def resolved(cfg, method):
    """cfg for one method, with its auto knobs filled."""
    return fill_attack(fill(dataclasses.replace(cfg, method=method), SETTINGS.get(method, {})))


def main(cfg):
    task = open_task(cfg)
    given = [resolved(cfg, m) for m in (LOSSES if cfg.method == "all" else [cfg.method])]
    for each in given:                           # reports wrong input before anything is made
        rate(each)
        retain_shares(each, task)
    base, filtered = foundations(given[0], task)
    models = {"base": (*base, {}), "filtered": (*filtered, {})}
    for each in given:
        knobs = {k: getattr(each, k) for k in ("steps", "lr", "batch_size", "retain_weight")
                 if getattr(each, k) is not None}
        models[each.method] = (*unlearn(each, task, *base, *filtered), knobs)
    rows = []
    for name, (model, record, knobs) in models.items():
        with autocast(cfg):
            before = task.score(model, finer=True)
        result = relearn(model, task, given[0], name)
        rows.append({"model": name} | before | {"flops": record["flops"]} | attacked(result)
                    | knobs)
    flat = [row | row["relearned"] | {"unseen": row.get("relearned_heldout_pairs", {}).get(
        str(given[0].attack_steps[-1]))} for row in rows]
    write_rows("unlearn", cfg if cfg.method == "all" else given[0], task, rows)
    picture("unlearn", cfg, draw_relearning, task, {row["model"]: {0: row["forget"]} | {
        int(step): score for step, score in row["relearned"].items()} for row in rows})
    table(flat, {"model": "model", "retain": "retain", "forget": "forget"}
          | {str(step): f"after {step}" for step in given[0].attack_steps}
          | ({"forget_heldout_pairs": "unseen", "unseen": f"after {given[0].attack_steps[-1]}"}
             if flat[0]["unseen"] is not None else {})
          | {k: header for k, header in (("forget_words", "words"), ("mentions", "mentions"),
                                         ("relearned_few", "few")) if k in flat[0]})
    say_edges(rows, given[0])
    print_stories(rows)


if __name__ == "__main__":
    run(main, Config, __doc__)
