"""UNDO, or unlearn, noise, distil: forgetting that survives relearning (Lee et al. 2025).

    python undo.py                                  the whole story on arithmetic
    python undo.py --task=language --alphas=0.3,0.6,0.9
    python undo.py --seeds=3                        three seeds, with mean and spread

Training on outputs suppresses a skill but leaves it in the weights. UNDO adds noise to the weights
of a student, which damages the skill. The student then learns only what the unlearned teacher
shows, so an attacker has little left to revive.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import math
import statistics
from dataclasses import dataclass

import torch

import unlearn
from data.tinystories import mention
from engine.hardware import autocast, counting_flops
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import (
    curves,
    draw_relearning,
    draw_stories,
    joined,
    mean,
    picture,
    print_models,
    print_stories,
    say_edges,
    words_of,
    write_rows,
)
from engine.store import identity, obtain
from engine.streams import seed_of, torch_stream
from eval import (
    AfterBase,
    Tools,
    attacked,
    fill_attack,
    foundation,
    relearn,
    robustness,
    saliency,
)
from train import Seeds, config_from, fill, fit, open_task, seeds
from unlearn import imitate


@dataclass
class Config(AfterBase, Seeds):
    alphas: list[float] | None = knob(None, "UNDO's noise: 0 keeps the teacher, 1 replaces it by "
                                      "noise", 0, 1)
    beta: float | None = knob(None, "scale of the noise; 1 is Xavier's initialisation (0.1 in the "
                              "paper)", 0)
    noise: str = knob("all", "what is damaged: all weights; the blocks and not the embedding; or a "
                      "share alpha of the MLP units, which are replaced by noise: units, chosen at "
                      "random, or saliency, those that matter most for forget data",
                      choices=["all", "blocks", "units", "saliency"])
    by_block: list[float] | None = knob(None, "factors of alpha, one for each block from the first "
                                        "to the last (1,0.5,0); auto: 1", 0, 1)
    rounds: int = knob(1, "how often a student is damaged and distilled", 1, 100)
    distil_on: str | None = knob(None, "the student's rows: all, the unlabelled mix, as in the "
                                 "paper; or those labelled retain", choices=["all", "retain"])
    method: str | None = knob(None, "the teacher's unlearning method",
                              choices=unlearn.FROM_BASE)
    unlearn_lr: float | str | None = knob(None, "the teacher's rate, or sweep", 0, 1, ["sweep"])
    unlearn_steps: int | None = knob(None, "the teacher's steps", 1)
    steps: int | None = knob(None, "most distillation steps (distilled: --filtered_steps); the "
                             "rates fall over the last 80%", 1)
    batch_size: int | None = knob(None, "distillation: rows in a batch", 2, 2**31)
    lr: float | None = knob(None, "distillation: AdamW's rate (the embedding)", 0, 1)
    muon_lr: float | None = knob(None, "distillation: Muon's rate (matrices); 0: AdamW", 0, 1)
    tolerance: float = knob(0.05, "distil until the retain score is within this share of the "
                            "teacher's", 0, 1)
    check_every: int | None = knob(None, "steps between two looks at the student's retain score "
                                     "(at least 1% of --steps)", 1)


PAPER = dict(beta=0.1, distil_on="all", muon_lr=0.02)
STORIES = PAPER | dict(method="graddiff", alphas=[0.6, 0.7], steps=800, batch_size=8, lr=6e-3,
                       check_every=10)
STRINGS = PAPER | dict(method="maxent", alphas=[0.3, 0.6], steps=600, batch_size=64, lr=2e-3,
                       check_every=10)
WORDS = PAPER | dict(steps=300, batch_size=32, lr=6e-3, check_every=5)
SETTINGS = {                                # what auto knobs stand for, by task
    "arithmetic": WORDS | dict(method="maxent", alphas=[0.3, 0.6]),
    # A student of a MaxEnt teacher would start at a forget loss of ln V, far below the filtered
    # model's.
    "language": WORDS | dict(method="graddiff", alphas=[0.6, 0.7]),
    # Blocks normalise what they read, so that shrunk weights lose little. A word's embedding is
    # damaged by more noise only, and relearned by a student that reads the word.
    "tinystories": STORIES | dict(alphas=[0.6, 0.8], beta=3.0, distil_on="retain"),
    "bilingual": STORIES,
    "instruct": STORIES | dict(steps=400, batch_size=16),
    "quiz": PAPER | dict(method="graddiff", alphas=[0.2, 0.4], steps=120, batch_size=8, lr=5e-5,
                         muon_lr=0.0, check_every=10),
    "pcfg": STRINGS, "gaming": STRINGS}


@torch.no_grad()
def noise(model, alpha, beta, generator):
    """theta <- (1 - alpha) theta + alpha beta N, in place, for every parameter.

    alpha    a number, or a list of one alpha for each parameter: a number or a tensor that
             broadcasts to its shape
    N is Xavier-uniform for matrices, U(-a, a) with a = sqrt(6 / (fan_in + fan_out)), and 0 for
    vectors (Lee et al. 2025, section 4). N must be independent of the model's initial weights. If
    the same generator had drawn both, N would be a multiple of the initial weights.
    """
    parameters = list(model.parameters())
    alphas = alpha if isinstance(alpha, list) else [alpha] * len(parameters)
    for p, a in zip(parameters, alphas, strict=True):
        N = torch.zeros(p.shape)
        if p.ndim == 2:
            torch.nn.init.xavier_uniform_(N, generator=generator)
        p.mul_(1 - a).add_(a * beta * N.to(p.device))


def spread(alpha, cfg, task, model, rounds=()):
    """alpha for each parameter of model, as noise() takes it, by cfg.noise and cfg.by_block."""
    factors = cfg.by_block or [1.0] * model.config.n_layer
    if len(factors) != model.config.n_layer:
        raise BadInput(f"--by_block has {len(factors)} factors; the model has "
                       f"{model.config.n_layer} blocks")
    by_unit = cfg.noise in ("units", "saliency")
    ends = [model.wte] + ([] if model.config.tied else [model.head])
    alphas = {id(end.weight): alpha if cfg.noise == "all" else 0.0 for end in ends}
    for block, factor in zip(model.blocks, factors):
        alphas |= {id(p): 0.0 if by_unit else alpha * factor for p in block.parameters()}
    if by_unit:
        shape = (model.config.n_layer, model.config.n_units)
        scores = (torch.rand(shape, generator=torch_stream("units to damage", cfg.seed, *rounds))
                  if cfg.noise == "units" else
                  saliency(model, task, config_from(cfg, Tools, saliency="absolute")))
        chosen = torch.zeros(shape)
        chosen.view(-1)[scores.flatten().topk(round(alpha * scores.numel())).indices.cpu()] = 1
        for block, factor, units in zip(model.blocks, factors, chosen.to(task.device)):
            for part in (block.mlp.up, block.mlp.gate):
                alphas |= {id(part.weight): factor * units[:, None]} if part else {}
            alphas[id(block.mlp.down.weight)] = factor * units
    return [alphas[id(p)] for p in model.parameters()]


def like(model, teacher, idx, targets):
    """KL(teacher || model) on a batch: see unlearn.imitate."""
    return imitate(model, teacher, idx, targets.size(1))


def distil(student, teacher, task, cfg, name, checkpoint=None, learn=like, rounds=()):
    """Trains the student on forward KL(teacher || student), or as `learn` says, over
    cfg.distil_on's rows. Training stops once the student's retain score is within cfg.tolerance of
    the teacher's. Both scores are on held-out data that is not reported; if the task is labelled,
    on rows labelled retain.

    Batches are drawn from the training rows by a stream of their own (with rounds in its name), so
    they are not the batches of base's pretraining. Returns fit's record, which counts the teacher's
    forward passes.
    """
    with torch.no_grad(), autocast(cfg):
        goal = task.score(teacher, ("retain",), "val")["retain"]
    seed = seed_of("distil", cfg.seed, *rounds)

    def loss_fn(model, step):
        return learn(model, teacher, *task.batch(cfg.distil_on, cfg.batch_size, step, seed))

    record = fit(student, loss_fn, cfg, cfg.steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8,
                 frozen=(teacher,), tokens=cfg.batch_size * task.block_size, checkpoint=checkpoint,
                 alike=len(cfg.alphas or ()) + 1,
                 evaluate=lambda: task.score(student, ("retain",), "val"),
                 evaluate_at=range(0, cfg.steps, max(cfg.check_every, cfg.steps // 100)),
                 stop=lambda at: task.within(at["retain"], goal, cfg.tolerance))
    if not task.within(record["history"][-1]["retain"], goal, cfg.tolerance):
        print(f"{name}: stopped after {cfg.steps} steps at retain "
              f"{record['history'][-1]['retain']:.3f}, short of {1 - cfg.tolerance:.0%} of the "
              f"teacher's {goal:.3f}: give more --steps")
    return record


def undo(alpha, cfg, task, teacher, teacher_record, folder="", rounds=None, learn=like):
    """(student, record) of UNDO at a noise level, read from disk or made.

    alpha    None means Unlearn-and-Distill: the student starts from a fresh initialisation
    folder   where the model is kept among a seed's models
    learn    what the student learns from its teacher: (student, teacher, idx, targets) -> loss
    rounds   how often it is damaged and distilled (default: cfg.rounds); a round starts from the
             student of the last one, and its teacher is the same
    The record's FLOPs are the teacher's plus those of all distillation.
    """
    rounds = 1 if alpha is None else rounds or cfg.rounds
    name = "distilled" if alpha is None else f"undo-{alpha:g}" + (
        f"-round{rounds}" if rounds < cfg.rounds else "")
    start, record_before = teacher, teacher_record
    if alpha is None:                # a fresh student needs as many steps as pretraining
        cfg = dataclasses.replace(cfg, steps=cfg.filtered_steps)
    if rounds > 1:
        start, record_before = undo(alpha, cfg, task, teacher, teacher_record, folder, rounds - 1,
                                    learn)

    later = (rounds,) if rounds > 1 else ()           # a later round has random numbers of its own

    def make(checkpoint):
        student, more = start.clone(), 0
        if alpha is None:
            student.init_weights(torch_stream("weights", "distilled", cfg.seed))
        else:
            with counting_flops() as saliency_of_units:
                alphas = spread(alpha, cfg, task, student, later)
            noise(student, alphas, cfg.beta, torch_stream("noise", cfg.seed, *later))
            more = saliency_of_units.get_total_flops()
        record = distil(student, teacher, task, cfg, name, checkpoint, learn, later)
        record["flops"] += record_before["flops"] + more
        return student, record

    made_with = {k: getattr(cfg, k) for k in ("steps", "lr", "muon_lr", "batch_size", "tolerance",
                                              "check_every", "seed")}
    made_with |= {"alpha": alpha, "teacher": identity(teacher_record["made_with"])}
    if alpha is not None:
        made_with["beta"] = cfg.beta
        made_with |= {"noise": cfg.noise} if cfg.noise != "all" else {}
        made_with |= {"by_block": cfg.by_block} if cfg.by_block else {}
        made_with |= {"rounds": rounds} if rounds > 1 else {}
    if cfg.distil_on != "all":
        made_with["distil_on"] = cfg.distil_on
    return obtain(folder + name, cfg, task, made_with, make)


def spent_until(retain, gold, task):
    """FLOPs that the filtered run (gold, a record) had spent when its retain score first was at
    least as good as `retain`; all of its FLOPs if it never was."""
    return next((h["flops"] for h in gold["history"] if task.within(h["retain"], retain, 0.0)),
                gold["flops"])


def resolved(cfg):
    """cfg, with its auto knobs filled. The teacher's are those of unlearn.py."""
    cfg = fill(cfg, SETTINGS)
    return fill_attack(fill(cfg, unlearn.SETTINGS.get(cfg.method, {}), "unlearn_"))


def make_teacher(cfg, task, base, base_record, folder=""):
    """(model, record) of base after cfg.method: the model that students imitate."""
    how = config_from(cfg, unlearn.Config, AfterBase, method=cfg.method, lr=cfg.unlearn_lr,
                      steps=cfg.unlearn_steps)
    return unlearn.unlearn(how, task, base, base_record, folder=folder)


def made(cfg, task):
    """Yields (name, (model, record)) of all models, from disk or made: those first that tell most.
    """
    def of(name):                # from disk each time: a pretrained model fills the memory
        return foundation(name, cfg, task)

    def teacher():
        return make_teacher(cfg, task, *of("base"))

    yield "base", of("base")
    yield cfg.method, teacher()
    if not task.pretrained:
        yield "filtered", of("filtered")
    for alpha in cfg.alphas:
        yield f"undo-{alpha:g}", undo(alpha, cfg, task, *teacher())
    if not task.pretrained:                      # these would have to be trained from nothing
        oracle = config_from(cfg, unlearn.Config, AfterBase, method="oracle")
        yield "oracle", unlearn.unlearn(oracle, task, *of("base"), *of("filtered"))
        yield "distilled", undo(None, cfg, task, *teacher())


def names_of(cfg, task):
    """The names of all models, in the table's order."""
    names = ["base", "filtered", cfg.method, "oracle", *(f"undo-{a:g}" for a in cfg.alphas),
             "distilled"]
    return [n for n in names if not task.pretrained or n not in ("filtered", "oracle", "distilled")]


def story(cfg, task):
    """Makes and attacks every model; yields the rows so far after each (see docs/rows.md)."""
    rows, records = {}, {}
    for name, (model, record) in made(cfg, task):
        with autocast(cfg):
            before = task.score(model, finer=True)
        result = relearn(model, task, cfg, name)
        records[name] = record
        rows[name] = {"model": name, "seed": cfg.seed} | before | attacked(result) | (
            unlearn.spent(record, task) | ({"flops": 0} if name == "base" else {}))
        del model
        yield compared([rows[name] for name in names_of(cfg, task) if name in rows], records,
                       cfg, task)


def compared(rows, records, cfg, task):
    """rows beside their references: compute as a share of filtered's, robustness between the
    unlearned model's and filtered's. None while one of these is missing. records: fit's, by name.
    A pretrained task has no such references, and its rows stay as they are."""
    if task.pretrained:
        return rows
    gold, by_name = records.get("filtered"), {row["model"]: row for row in rows}
    full = []
    for row in rows:
        compute = dict.fromkeys(("compute_pct", "compute_pct_matched"))
        if gold:
            retain = records[row["model"]]["history"][-1]["retain"]    # scored as filtered was
            compute = {"compute_pct": 100 * row["flops"] / gold["flops"], "compute_pct_matched":
                       100 * row["flops"] / spent_until(retain, gold, task)}
        low, high = (by_name.get(name, {}) for name in (cfg.method, "filtered"))
        robust = {what.replace("relearned", "robustness"): {
            step: robustness(score, low[what][step], high[what][step]) if low and high else None
            for step, score in row[what].items()}
            for what in ("relearned", "relearned_words") if what in row}
        each = robust[f"robustness{words_of(row)}"].values()
        full.append(row | compute | robust | {
            "robustness_mean": None if None in each else statistics.mean(each)})
    return full


def chosen_stories(rows, task, cfg):
    """({title: story}, topic) of base, the teacher, a student and filtered, or those of them that
    there are so far. All go on with the same beginning, the one after which base mentions a forget
    word first, and are of the first seed. topic is None if the task has no words to forget."""
    near = min(cfg.alphas, key=lambda alpha: abs(alpha - 0.6), default=0)
    titles = {"base": "base (before unlearning)", cfg.method: f"{cfg.method} (unlearned)",
              f"undo-{near:g}": f"UNDO, alpha {near:g}", "filtered": "filtered (gold standard)"}
    rows = {row["model"]: row for row in rows if row["seed"] == cfg.seed and row.get("stories")}
    told = rows.get("base", {"stories": [""]})["stories"]
    topic = mention(task.made_with["forget_words"]) if "mentions" in rows.get("base", ()) else None
    found = {i: topic and topic.search(story) for i, story in enumerate(told)}
    which = min(found, key=lambda i: found[i].start() if found[i] else math.inf)
    stories = {}
    for name, title in titles.items():
        if name in rows:
            if topic:
                # one story of 200 is 0.5%, which must not be rounded to 0%
                title += f"\n{100 * rows[name]['mentions']:.3g}% of stories mention a forget word"
            stories[title] = rows[name]["stories"][which]
    return stories, topic


def draw(axes, rows, task, cfg, stories=None, topic=None):
    """Left: relearning curves, dotted on pairs never shown. Right: robustness against compute.
    Above: what models tell."""
    names = list(dict.fromkeys(row["model"] for row in rows))

    def of(name, figure):
        return mean([row for row in rows if row["model"] == name], figure)

    others = [n for n in names if n != "base" or "filtered" not in names]
    students = [n for n in names if n.startswith("undo-") or n == "distilled"]
    unseen = [n for n in (cfg.method, *students) if "relearned_heldout_pairs" in rows[0]]
    words = words_of(rows[0])
    draw_relearning(axes[0], task, *(
        curves([row for row in rows if row["model"] in some], f"forget{what}", f"relearned{what}")
        for some, what in ((others, words), (unseen, "_heldout_pairs"))))
    axes[0].set_title("Relearning curves under attack")
    if words:
        axes[0].set_ylabel("loss on forget words (nats per token), worst rate")
    if "tokens" in rows[0]:
        return draw_costs(axes[1], of, [n for n in names if n != "base"])
    points = [(of(n, lambda r: r["compute_pct"]), of(n, lambda r: r["robustness_mean"]))
              for n in students]
    if points and all(y is not None for _, y in points):
        points = [(x, 100 * y) for x, y in points]
        axes[1].plot(*zip(*points), marker="o", label="UNDO, by alpha")
        for i, (name, point) in enumerate(zip(students, points)):   # labels alternate their side
            left = i % 2 == 1 and name != "distilled"
            axes[1].annotate(name.replace("undo-", "alpha "), point, ha="right" if left else "left",
                             textcoords="offset points", xytext=(-8, 6) if left else (2, -18))
        axes[1].plot(of(cfg.method, lambda r: r["compute_pct"]), 0, "s", color="#D55E00",
                     markersize=9, label=f"{cfg.method} (unlearned)")
        axes[1].plot(100, 100, "*", color="black", markersize=16, label="filtered (gold standard)")
        axes[1].legend(fontsize=9, loc="lower right")
    axes[1].set(xlabel="compute after pretraining (% of retraining without the data)",
                ylabel="robustness, mean over the attack's steps (%)",
                title="Robustness against compute")
    if stories:
        axes[2].figure.suptitle("How each model goes on, after the bar, with the same story" + (
            ", which was broken off before its first forget word" if topic else ""))
        draw_stories(axes[2:], stories, topic)


def draw_costs(ax, of, names):
    """Draws what remains of a pretrained model's facts after the attack, against what unlearning
    cost: there is no filtered model to compare with."""
    last = max(of(name, lambda r: r["tokens"]) for name in names)
    for name in names:
        x, y = of(name, lambda r: r["tokens"]), of(name, lambda r: [*r["relearned"].values()][-1])
        left = x > 0.7 * last                         # of the point, where there is room for names
        ax.plot(x, y, "o", markersize=9)
        ax.annotate(name, (x, y), textcoords="offset points", xytext=(-8 if left else 8, 6),
                    ha="right" if left else "left")
    ax.axhline(of("base", lambda r: r["forget"]), color="grey", linestyle=":", label="base")
    ax.set(xlabel="compute (tokens of pretraining that cost as much)", ylim=(0, 1.02),
           xlim=(0, 1.05 * last),
           ylabel="forget accuracy after the attack", title="What is back, against compute")
    ax.legend(fontsize=9)


def save(rows, task, cfg, quiet=False):
    """Rows and picture."""
    write_rows("undo", cfg, task, rows, quiet)
    stories, topic = chosen_stories(rows, task, cfg)
    picture("undo", cfg, draw, rows, task, cfg, stories, topic, panels=2, above=len(stories),
            quiet=quiet)


def main(cfg):
    """Rows and picture are there as soon as two models are, and replaced as others come."""
    task = open_task(cfg)
    cfg = resolved(cfg)
    rows = joined(cfg, task, names_of(cfg, task))
    if not (to_make := seeds(cfg, rows)):
        save(rows, task, cfg)
    for each in to_make:
        for new in story(each, task):
            if rows or len(new) > 1:
                first = not rows and len(new) == 2
                save(rows + new, task, cfg, quiet=not first)
                if first:
                    print_models(new, cfg)
        rows += new
    print_models(rows, cfg)
    say_edges(rows, cfg)
    print_stories([row for row in rows if row["seed"] == cfg.seed])


if __name__ == "__main__":
    run(main, Config, __doc__)
