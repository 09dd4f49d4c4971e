"""Post-hoc unlearning: make a trained model forget. Each method is one loss function.

    python unlearn.py                              MaxEnt, then the relearning attack
    python unlearn.py --method=graddiff --lr=sweep
    python unlearn.py --method=sam --around=npo    npo, made to forget in a flat place
    python unlearn.py --method=all --seeds=3       every method in one table

Every method suppresses the skill, but a few steps of relearning bring it back. This is the finding
to see here (Lee et al. 2025, section 3). undo.py makes the forgetting last.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import math
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from engine.hardware import autocast
from engine.knobs import BadInput, knob
from engine.process import WORLD, run
from engine.report import (
    curves,
    draw_relearning,
    joined,
    picture,
    print_models,
    print_stories,
    say_edges,
    words_of,
    write_rows,
)
from engine.store import identity, obtain
from engine.streams import seed_of, torch_stream
from eval import AfterBase, attacked, fill_attack, foundation, foundations, relearn
from train import Seeds, fill, fit, open_task, seeds

# What auto knobs stand for, by method and task; a fifth is a knob of the method's own. Those of
# arithmetic are from experiments/sweep.py, one rule for all methods. MaxEnt's are older: see
# docs/frontier.md
METHOD_KNOBS = "steps", "lr", "retain_weight", "batch_size"
TUNED = {
    "maxent":   {"arithmetic": (80, 5e-4, 50.0, 32), "language": (40, 1e-3, 20.0, 32),
                 "tinystories": (220, 1.2e-3, 20.0, 16), "instruct": (40, 1e-3, 20.0, 32),
                 "pcfg": (40, 3e-4, 1.0, 64), "quiz": (20, 3e-5, 3.0, 8)},
    "graddiff": {"arithmetic": (65, 9e-4, 55.0, 32), "language": (40, 1e-3, 3.0, 32),
                 "tinystories": (120, 5e-4, 5.0, 16), "instruct": (40, 1e-3, 3.0, 32),
                 "pcfg": (40, 3e-4, 3.0, 64), "quiz": (40, 1e-5, 5.0, 8)},
    "npo":      {"arithmetic": (100, 3.5e-4, 4.0, 32, dict(beta=0.12)), "quiz": (60, 1e-5, 3.0, 8)},
    "simnpo":   {"arithmetic": (80, 1.3e-3, 1.5, 32, dict(beta=1.2)),
                 "quiz": (40, 1.5e-5, 5.0, 8, dict(beta=0.3))},
    "undial":   {"arithmetic": (65, 9e-4, 55.0, 32, dict(gamma=29.0)), "quiz": (30, 1e-5, 5.0, 8)},
    "sam":      {"arithmetic": (50, 1.2e-4, 30.0, 32, dict(rho=0.35)), "quiz": (20, 3e-5, 3.0, 8)},
    "repnoise": {"arithmetic": (80, 1e-3, 20.0, 32), "quiz": (50, 1e-5, 5.0, 8)},
    "tar":      {"arithmetic": (100, 1.7e-4, 200.0, 32), "quiz": (10, 1e-5, 5.0, 8)},
    "rmu":      {"arithmetic": (50, 1.2e-4, 30.0, 32, dict(steer=2.8)),
                 "language": (60, 1e-3, 1.0, 32), "tinystories": (120, 1e-3, 50.0, 16),
                 "instruct": (60, 1e-3, 1.0, 32), "pcfg": (60, 1e-3, 1.0, 64),
                 "quiz": (40, 3e-5, 300.0, 8)},
    "oracle":   {"arithmetic": (100, 1e-3, None, 32), "language": (150, 1e-3, None, 32),
                 "tinystories": (150, 1e-3, None, 8), "instruct": (150, 1e-3, None, 16),
                 "pcfg": (100, 1e-3, None, 64)},
    "finetune": {"arithmetic": (60, 1e-3, None, 32), "language": (60, 1e-3, None, 32),
                 "tinystories": (60, 1e-3, None, 16), "instruct": (60, 1e-3, None, 32),
                 "pcfg": (200, 3e-4, None, 128), "quiz": (40, 1e-5, None, 8)}}
ALIKE = {"bilingual": "tinystories", "gaming": "pcfg"}
# The knobs of a method's own, on every other task.
OWN = {"npo": dict(beta=0.1), "simnpo": dict(beta=2.5, gamma=0.0), "undial": dict(gamma=10.0),
       "tar": dict(after="maxent"), "rmu": dict(steer=4.0), "sam": dict(rho=0.5),
       "repnoise": dict(mmd=5.0)}


def settings(method, task):
    """{knob: value}: what a method's auto knobs stand for on a task."""
    by_task = TUNED[method]
    tuned = by_task.get(ALIKE.get(task, task), by_task["arithmetic"])
    return OWN.get(method, {}) | dict(zip(METHOD_KNOBS, tuned)) | dict(*tuned[4:])


SETTINGS = {method: {task: settings(method, task) for task in (*TUNED["maxent"], *ALIKE)}
            for method in TUNED}
# Rates of fine-tuning that have names (large, medium, small), by task.
RATES = {"pcfg": {"L": 1e-3, "M": 3e-4, "S": 1e-4}, "instruct": {"M": 1e-3}}
NAMES = [*TUNED]
FROM_BASE = [name for name in NAMES if name != "oracle"]       # these need no filtered model


@dataclass
class Config(AfterBase, Seeds):
    method: str = knob("maxent", "which loss, or all of them in one table",
                       choices=[*NAMES, "all"])
    steps: int | None = knob(None, "unlearning steps", 1)
    batch_size: int | None = knob(None, "rows in a batch, half forget and half retain", 2, 2**31)
    lr: float | str | None = knob(None, "AdamW's rate; L, M or S: the task's large, medium or "
                                  "small rate; sweep: the rate that forgets most and keeps the "
                                  "retain score within 2% of base's", 0, 1,
                                  ["sweep", "L", "M", "S"])
    sweep: list[float] = knob([3e-4, 1e-3, 3e-3], "rates that --lr=sweep tries", 0, 1)
    retain_weight: float | None = knob(None, "weight of the retain term, w", 0)
    after: str | None = knob(None, "start from base unlearned by this method (auto: none; tar: "
                             "maxent)", choices=NAMES)
    layer: int | None = knob(None, "rmu, tar: block whose output is steered, or kept (auto: the "
                             "middle one)", 1)
    steer: float | None = knob(None, "rmu: length of the steering vector, in units of the "
                               "residual's", 0)
    beta: float | None = knob(None, "npo, simnpo: b, how soon a forgotten row counts less", 1e-6)
    gamma: float | None = knob(None, "simnpo: margin g; undial: how far the true token's logit is "
                               "lowered")
    around: str = knob("maxent", "sam: the method whose forget term is made flat",
                       choices=["maxent", "graddiff", "npo", "simnpo", "undial", "rmu",
                                "repnoise"])
    rho: float | None = knob(None, "sam: how far away the gradient is taken", 0)
    mmd: float | None = knob(None, "repnoise: weight of the distance from noise, m", 0)
    inner_steps: int = knob(8, "tar: steps of the simulated attack", 0, 1000)
    inner_lrs: list[float] = knob([3e-4, 1e-3, 3e-3], "tar: its rates, in turns", 0, 1)
    mix: float = knob(0.0, "finetune: share of rows from the pretraining mix", 0, 0.9)
    c_tr: float = knob(0.0, "finetune on pcfg: share of the other rows in which the spurious rule "
                       "#b = #a + 1 holds", 0, 1)


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


# --- methods -------------------------------------------------------------------------------------
# What each does to forget rows f, a function (model, f, reference, cfg, step) -> scalar to be
# minimised. Rows are (inputs (B, T), targets); the reference is the model that unlearning starts
# from. To it, w times a retain term is added: CE(r), the cross-entropy of retain rows r, unless
# METHODS below names another. pi is the model and pi0 the reference.

def graddiff(model, forget, reference, cfg, step):
    """Gradient difference: -CE(f) (Liu et al. 2022; Lee et al. 2025, app.)."""
    return -model(*forget)


def maxent(model, forget, reference, cfg, step):
    """Maximum entropy: KL(uniform || pi) on forget tokens (Lee et al. 2025, app.).

    KL(uniform || pi) = -ln V - mean over the vocabulary of ln pi.
    """
    def criterion(logits, _):
        return (-math.log(logits.size(-1)) - logits.log_softmax(-1).mean(-1)).sum()

    return model(*forget, criterion)


def log_likelihood(model, idx, targets):
    """(B,): log pi of each row, in nats, which is the *sum* over its targets."""
    logits = model(idx)[:, -targets.size(1):].float()
    return -F.cross_entropy(logits.mT, targets, reduction="none").sum(1)


def npo(model, forget, reference, cfg, step):
    """Negative preference optimization: -(2/b) log sigmoid(-b log(pi(f) / pi0(f))), where pi(f) is
    the likelihood of a whole row and b is cfg.beta (Zhang et al. 2024, arXiv 2404.05868).

    It is gradient ascent in which a row counts less the more it is forgotten. For b -> 0 all rows
    count alike, and ascent never ends.
    """
    with torch.no_grad():
        before = log_likelihood(reference, *forget)
    ratio = log_likelihood(model, *forget) - before
    return -2 / cfg.beta * F.logsigmoid(-cfg.beta * ratio).mean()


def simnpo(model, forget, reference, cfg, step):
    """Simple NPO: -(2/b) log sigmoid(-(b/T) log pi(f) - g), with b = cfg.beta and g = cfg.gamma
    (Fan et al. 2024, arXiv 2410.07163). It needs no reference, and a row counts by its mean loss a
    token, so that long rows count as much as short ones."""
    per_token = log_likelihood(model, *forget) / forget[1].size(1)
    return -2 / cfg.beta * F.logsigmoid(-cfg.beta * per_token - cfg.gamma).mean()


def undial(model, forget, reference, cfg, step):
    """Self-distillation with adjusted logits: KL(softmax(z0 - g onehot(target)) || pi), where z0
    are the reference's logits and g is cfg.gamma (Dong et al. 2024, arXiv 2402.10052). Only the
    true token is lowered; all others keep their order."""
    idx, targets = forget
    with torch.no_grad():
        wanted = reference(idx)[:, -targets.size(1):].float()
        wanted = wanted - cfg.gamma * F.one_hot(targets, wanted.size(-1))
    return model(idx, wanted, lambda logits, wanted: kl(wanted, logits))


@cache
def steering_vector(size, seed, device):
    """A random direction, (size,), positive in every dimension, of length 1."""
    u = torch.rand(size, generator=torch_stream("steering vector", seed))
    return F.normalize(u, dim=0).to(device)


def in_the_middle(model, reference, rows, cfg):
    """(h, h0, length): the residuals (B, T, C) of model and reference after block cfg.layer, and
    h0's mean length."""
    layer = cfg.layer or (reference.config.n_layer + 1) // 2
    with torch.no_grad():
        h0 = reference(rows[0], residual=layer).float()
    return model(rows[0], residual=layer).float(), h0, h0.norm(dim=-1).mean()


def rmu(model, forget, reference, cfg, step):
    """Representation misdirection: |h - c u|^2 in units of h0's mean length, where u is a fixed
    random unit vector and c is cfg.steer times that length (Li et al. 2024, arXiv 2403.03218)."""
    h, _, length = in_the_middle(model, reference, forget, cfg)
    u = steering_vector(h.size(-1), cfg.seed, h.device)
    return (h / length - cfg.steer * u).square().sum(-1).mean()


def stay(model, retain, reference, cfg):
    """rmu's retain term: |h - h0|^2 in units of h0's mean length."""
    h, h0, length = in_the_middle(model, reference, retain, cfg)
    return ((h - h0) / length).square().sum(-1).mean()


def mmd2(x, y):
    """Squared maximum mean discrepancy of two samples (n, C), (m, C) under the Gaussian kernel
    exp(-|a - b|^2 / s), where s is the median of |a - b|^2 between some of each (Gretton et al.
    2012).
    """
    def apart(a, b):
        return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)

    def k(a, b):
        return (-apart(a, b) / bandwidth).exp().mean()

    with torch.autocast(x.device.type, enabled=False):     # differences of large numbers
        some = slice(None, None, max(len(x) // 64, 1))        # of all rows and positions
        bandwidth = apart(x.detach()[some], y[some]).median()
        return k(x, x) + k(y, y) - 2 * k(x, y)


def repnoise(model, forget, reference, cfg, step):
    """Representation noising: m MMD^2 - log CE(f), where MMD^2, a mean over blocks, compares the
    residuals of forget tokens with noise N(0, 1), and m is cfg.mmd (Rosati et al. 2024, arXiv
    2405.14577). --mmd=0 leaves its ascent alone."""
    blocks = []

    def keep(site, i, h):
        if site == "residual":
            blocks.append(h)
        return h

    loss = -model(*forget, hook=keep).log()
    if cfg.mmd:
        generator = torch_stream("noise of repnoise", cfg.seed, step)
        noise = torch.randn(blocks[0].flatten(0, 1).shape, generator=generator).to(loss.device)
        loss = loss + cfg.mmd * sum(mmd2(h.flatten(0, 1).float(), noise)
                                    for h in blocks) / len(blocks)
    return loss


# The next two take their gradient where the model is not. fit() wants a loss at theta, of which it
# takes the gradient itself: with_gradient() makes one of a gradient from elsewhere.
@contextmanager
def excursion(model):
    """Gives model's parameters, to be moved in place, and a function to call after each move; at
    the end they are where they were. Autocast keeps low-precision copies of weights, which it must
    be told to forget."""
    parameters = list(model.parameters())
    here = [p.detach().clone() for p in parameters]
    try:
        yield parameters, torch.clear_autocast_cache
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, here)
        torch.clear_autocast_cache()


def gradient(loss, parameters):
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


def with_gradient(value, parameters, gradients):
    """A scalar that has this value and these gradients, however they were found."""
    return value.detach() + sum(((p - p.detach()) * g).sum()
                                for p, g in zip(parameters, gradients))


def sam(model, forget, reference, cfg, step):
    """Sharpness-aware minimisation of another method's L, that of cfg.around: the gradient of L at
    theta + rho g / |g|, where g is its gradient at theta and rho is cfg.rho (Fan et al. 2025, arXiv
    2502.05374). What is forgotten in a flat place should take longer to come back."""
    term = METHODS[cfg.around][0]
    with excursion(model) as (parameters, moved):
        loss = term(model, forget, reference, cfg, step)
        g = gradient(loss, parameters)
        length = torch.stack(torch._foreach_norm(g)).norm().clamp(min=1e-12)
        with torch.no_grad():
            torch._foreach_add_(parameters, torch._foreach_mul(g, cfg.rho / length))
        moved()
        g = gradient(term(model, forget, reference, cfg, step), parameters)
    return with_gradient(loss, parameters, g)


def looking_ahead(model, batches, lr, loss):
    """A scalar that has the value and the gradients of loss() at the weights to which one AdamW
    step on each of the batches leads: first-order meta-learning (Nichol et al. 2018)."""
    with excursion(model) as (parameters, moved):
        trainer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        for rows in batches:
            for p, g in zip(parameters, gradient(model(*rows), parameters)):
                p.grad = g
            trainer.step()
            moved()
        trainer.zero_grad()
        value = loss()
        g = gradient(value, parameters)
    return with_gradient(value, parameters, g)


def tar(model, forget, reference, cfg, step):
    """Tamper-resistant: maxent's loss on some of the forget rows, after an attack of
    cfg.inner_steps AdamW steps on others (Tamirisa et al. 2024, arXiv 2408.00761). The attack's
    rate is one of cfg.inner_lrs, in turns.

    forget holds inner_steps + 1 batches, mixed so that each has the same share of every split.
    """
    rest, *attack = [[x[i::cfg.inner_steps + 1] for x in forget]
                     for i in range(cfg.inner_steps + 1)]
    return looking_ahead(model, attack, cfg.inner_lrs[step % len(cfg.inner_lrs)],
                         lambda: maxent(model, rest, reference, cfg, step))


def near(model, retain, reference, cfg):
    """tar's retain term: CE(r), and the residuals stay near those of the model it started from."""
    return model(*retain) + stay(model, retain, reference, cfg)


def oracle(model, forget, reference, cfg, step=0):
    """KL(filtered || pi), on forget rows and as the retain term: the best that training on outputs
    can do, a model that behaves as if it had never seen the data (Lee et al. 2025, section 3). Here
    the reference is the filtered model."""
    return imitate(model, reference, forget[0], forget[1].size(1))


def finetune(model, forget, reference, cfg, step):
    """Nothing, so that only the retain term trains: a skill that is not practised may fade. For
    cfg.mix and cfg.c_tr, see retain_shares."""
    return 0.0


def practise(model, retain, reference, cfg):
    """The usual retain term: CE(r)."""
    return model(*retain)


UNWEIGHTED = "oracle", "finetune"                                  # their w is 1
KEEPS = {"rmu": stay, "tar": near, "oracle": oracle}
METHODS = {f.__name__: (f, KEEPS.get(f.__name__, practise)) for f in (
    maxent, graddiff, npo, simnpo, undial, rmu, sam, repnoise, tar, oracle, finetune)}


def objective(model, forget, retain, reference, cfg, step=0):
    """The loss of cfg.method: its forget term, and w times its retain term."""
    forgets, keeps = METHODS[cfg.method]
    if cfg.method == "sam":
        keeps = METHODS[cfg.around][1]
    w = 1.0 if cfg.method in UNWEIGHTED else cfg.retain_weight
    return (forgets(model, forget, reference, cfg, step)
            + w * keeps(model, retain, reference, cfg))


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
        try:
            model, record = attempt(lr)          # outside autocast, because fit() sets its own
        except BadInput as error:                # it diverged
            print(f"sweep: {error}")
            continue
        kept = task.within(record["history"][-1]["retain"], retain, 0.02)
        with autocast(cfg):
            tried.append((kept, task.loss(model, "forget", 64, "val"), lr, model, record))
    if not tried:
        raise BadInput("--lr=sweep: no rate ended well, give others (--sweep)")
    kept, forget_loss, lr, model, record = max(tried, key=lambda t: t[:2])
    print(f"sweep: rate {lr:g}, forget loss {forget_loss:.2f}" + (
        "" if kept else "; no rate kept the retain score within 2% of base's"))
    return model, record | {"flops": sum(t[-1]["flops"] for t in tried)}


# The knobs that a method's model depends on, besides those that all have.
DEPENDS = {"rmu": ("layer", "steer"), "npo": ("beta",), "simnpo": ("beta", "gamma"),
           "undial": ("gamma",), "sam": ("around", "rho"), "repnoise": ("mmd",),
           "tar": ("layer", "inner_steps", "inner_lrs")}


def depends(cfg):
    """The names of the knobs that a model unlearned by cfg.method depends on."""
    names = ["method", "steps", "lr", "batch_size", "seed", *DEPENDS.get(cfg.method, ())]
    names += ["sweep"] * (cfg.lr == "sweep") + ["after"] * bool(cfg.after)
    names += ["retain_weight"] * (cfg.method not in UNWEIGHTED)
    return names + list(DEPENDS.get(cfg.around, ())) * (cfg.method == "sam")


def check(cfg, base):
    """BadInput for what cfg.method cannot do to base."""
    if lacks := [k for k in METHOD_KNOBS if getattr(cfg, k) is None
                 and (k != "retain_weight" or cfg.method not in UNWEIGHTED)]:
        raise BadInput(f"{cfg.method} has no settings of its own for {cfg.task}: give "
                       + ", ".join(f"--{k}" for k in lacks))
    if cfg.layer and cfg.layer > base.config.n_layer:
        raise BadInput(f"--layer={cfg.layer}: the model has {base.config.n_layer} blocks")
    if WORLD > 1 and cfg.method in ("sam", "tar"):
        raise BadInput(f"--method={cfg.method} runs in one process: its inner gradients are not "
                       f"averaged over several")
    if cfg.after == cfg.method:
        raise BadInput(f"--after={cfg.after}: the same as --method; give more --steps instead")


def unlearn(cfg, task, base, base_record, filtered=None, filtered_record=None, folder="", alike=1):
    """(model, record) of base after cfg.method, read from disk or made. The oracle needs the
    filtered model.

    folder   where the model is kept among a seed's models, for example "labels-50/"
    alike    how many models a script makes by this method, which share what is compiled
    The record's FLOPs are those spent after pretraining base. Those of cfg.after are included, and
    the oracle's include the filtered model's. A model of cfg.after is made with its own settings
    and is kept as first-NAME.
    """
    cfg = fill(cfg, SETTINGS.get(cfg.method, {}))
    if cfg.method == "sam":
        its = SETTINGS[cfg.around].get(cfg.task, {})
        cfg = dataclasses.replace(cfg, **{k: its.get(k) for k in DEPENDS.get(cfg.around, ())
                                          if getattr(cfg, k) is None})
    check(cfg, base)
    cfg = dataclasses.replace(cfg, lr=rate(cfg))
    before = 0
    if cfg.after:
        first = dataclasses.replace(cfg, method=cfg.after, after="", **dict.fromkeys(
            (*METHOD_KNOBS, "beta", "gamma")))
        base, base_record = unlearn(first, task, base, base_record, filtered, filtered_record,
                                    folder + "first-")
        before = base_record["flops"]
    if cfg.method == "oracle":
        before += filtered_record["flops"]
    reference = filtered if cfg.method == "oracle" else base
    half, shares = max(cfg.batch_size // 2, 1), retain_shares(cfg, task)
    more = 1 + cfg.inner_steps * (cfg.method == "tar")          # batches of forget rows a step
    seed = seed_of(f"unlearn by {cfg.method}", cfg.seed)

    def loss_fn(model, step):
        forget = task.batch("forget", half * more, step, seed)
        retain = task.batch(shares, half, step, seed)
        return objective(model, forget, retain, reference, cfg, step)

    def attempt(lr, checkpoint=None):
        model = base.clone()
        record = fit(model, loss_fn, cfg, cfg.steps, lr, name=f"{cfg.method} {lr:g}", decay=0.5,
                     tokens=(1 + more) * half * task.block_size, frozen=(reference,), alike=alike,
                     evaluate=lambda: task.score(model, part="val"), checkpoint=checkpoint)
        return model, record

    def make(checkpoint):
        if cfg.lr == "sweep":
            model, record = sweep(cfg, task, base, attempt)
        else:
            model, record = attempt(cfg.lr, checkpoint)
        return model, record | {"flops": record["flops"] + before}

    made_with = {k: getattr(cfg, k) for k in depends(cfg)}
    if set(shares) != {"retain"}:
        made_with["shares"] = shares
    made_with["base"] = identity(base_record["made_with"])
    if cfg.method == "oracle":
        made_with["filtered"] = identity(filtered_record["made_with"])
    return obtain(folder + cfg.method, cfg, task, made_with, make)


def spent(record, task):
    """{"flops"}: of a model's record; with "tokens" for a pretrained task, where there is no
    filtered run to compare with: how many tokens of pretraining have cost as much."""
    each = task.facts.get("flops_per_token")
    return {"flops": record["flops"]} | ({"tokens": record["flops"] / each} if each else {})


def resolved(cfg, method):
    """cfg for one method, with its auto knobs filled."""
    return fill_attack(fill(dataclasses.replace(cfg, method=method), SETTINGS.get(method, {})))


def story(given, task):
    """Yields the rows of one seed: base's, filtered's, and that of each cfg in given."""
    def every():                     # one at a time, from disk: a pretrained model fills the memory
        model, record = foundation("base", given[0], task)
        for each in given:
            check(each, model)
        yield "base", model, record, {}
        del model
        if not task.pretrained:
            yield "filtered", *foundation("filtered", given[0], task), {}
        for each in given:
            yield each.method, *unlearn(each, task, *sum(foundations(each, task), ())), {
                k: getattr(each, k) for k in METHOD_KNOBS if getattr(each, k) is not None}

    for name, model, record, knobs in every():
        with autocast(given[0]):
            before = task.score(model, finer=True)
        result = relearn(model, task, given[0], name)
        del model
        yield ({"model": name, "seed": given[0].seed} | before | spent(record, task)
               | attacked(result) | knobs)


def main(cfg):
    task = open_task(cfg)
    names = FROM_BASE if task.pretrained else NAMES
    if "oracle" in (cfg.method, cfg.after) and task.pretrained:
        raise BadInput(f"the oracle imitates a filtered model, and {task.name} has none")
    given = [resolved(cfg, m) for m in (names if cfg.method == "all" else [cfg.method])]
    for each in given:                           # reports wrong input before anything is made
        rate(each)
        retain_shares(each, task)
    cfg = fill_attack(cfg) if cfg.method == "all" else given[0]
    rows = joined(cfg, task, ["base", *["filtered"] * (not task.pretrained),
                              *(how.method for how in given)])
    if not (to_make := seeds(cfg, rows)):
        write_rows("unlearn", cfg, task, rows)
    for each in to_make:
        for row in story([dataclasses.replace(how, seed=each.seed) for how in given], task):
            rows.append(row)
            write_rows("unlearn", cfg, task, rows, quiet=len(rows) > 1)
    words = words_of(rows[0])
    picture("unlearn", cfg, draw_relearning, task, curves(rows, f"forget{words}",
                                                          f"relearned{words}"))
    print_models(rows, cfg)
    say_edges(rows, cfg)
    print_stories([row for row in rows if row["seed"] == cfg.seed])


if __name__ == "__main__":
    run(main, Config, __doc__)
