"""Does a cheap trial of UNDO tell how the full run would rank?

    python -m experiments.trial                  12 settings: four alphas, three teachers
    python -m experiments.trial --share=0.2

Each setting is distilled twice: until the student is as good as its teacher, and the same for at
most a tenth of the compute of the filtered run. Both students are attacked, and their forget scores
are averaged over the attack's steps. If trials rank the settings as full runs do (Spearman's rho),
they are enough to choose by.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import statistics
from dataclasses import dataclass

import numpy as np

import undo
import unlearn
from engine.hardware import autocast
from engine.knobs import BadInput, knob, means_nothing
from engine.process import run
from engine.report import mean, picture, table, write_rows
from eval import attacked, foundations, relearn
from train import open_task, seeds


@dataclass
class Config(undo.Config):
    alphas: list[float] = knob([0.2, 0.4, 0.6, 0.8], "UNDO's noise", 0, 1)
    teachers: list[str] = knob(["maxent", "graddiff", "npo"], "their unlearning methods",
                               choices=unlearn.FROM_BASE)
    share: float = knob(0.1, "the most compute of a trial's distillation, as a share of the "
                        "filtered run's", 1e-3, 1)


def ranks(values):
    """Ranks from 0 on; equal values share the mean of theirs."""
    values = np.asarray(values, float)
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2


def spearman(x, y):
    """Spearman's rho: the correlation of ranks. None if all values on one side are equal."""
    if len({*x}) < 2 or len({*y}) < 2:
        return None
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1])


def story(cfg, task):
    """The rows of a seed: each setting, with its mean score under attack after trial and full run.
    """
    base, filtered = foundations(cfg, task)
    rows = []
    for method in cfg.teachers:
        how = undo.resolved(dataclasses.replace(cfg, method=method, unlearn_lr=None,
                                                unlearn_steps=None, rounds=1))
        teacher = undo.make_teacher(how, task, *base)
        for alpha in cfg.alphas:
            full = undo.undo(alpha, how, task, *teacher, f"{method}-")
            a_step = (full[1]["flops"] - teacher[1]["flops"]) / full[1]["history"][-1]["step"]
            steps = min(max(int(cfg.share * filtered[1]["flops"] / a_step), 1), how.steps)
            short = undo.undo(alpha, dataclasses.replace(how, steps=steps), task, *teacher,
                              f"{method}-trial-")
            row = {"method": method, "alpha": alpha, "seed": cfg.seed}
            for name, (model, record) in (("full", full), ("trial", short)):
                with autocast(cfg):
                    retain = task.score(model, ("retain",))["retain"]
                under = attacked(relearn(model, task, cfg, f"{name} {method} {alpha:g}"))
                curve = under.get("relearned_words", under["relearned"])
                row |= {f"{name}_retain": retain, f"{name}_relearned": curve,
                        f"{name}_mean": statistics.mean(curve.values()),
                        f"{name}_compute_pct": 100 * record["flops"] / filtered[1]["flops"]}
            rows.append(row)
    return rows


def rank_correlations(rows):
    """{teacher, or "all": Spearman's rho of trial and full run over the settings}, means over
    seeds."""
    settings = {}
    for row in rows:
        settings.setdefault((row["method"], row["alpha"]), []).append(row)
    points = {key: [mean(group, lambda row, k=k: row[f"{k}_mean"]) for k in ("trial", "full")]
              for key, group in settings.items()}
    of = {method: [at for (m, _), at in points.items() if m == method] for method, _ in points}
    return {name: spearman(*zip(*mine)) for name, mine in (of | {"all": points.values()}).items()}


def draw(axes, rows, rho):
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        axes[0].plot(*([row[f"{name}_mean"] for row in mine] for name in ("trial", "full")), "o",
                     label=f"{method} (teacher)")
    axes[0].set(xlabel="forget score under attack, after the trial",
                ylabel="the same after the full run",
                title="Trial and full run"
                      + ("" if rho is None else f", rank correlation {rho:.2f}"))
    axes[0].legend(fontsize=9)


def main(cfg):
    task = open_task(cfg)
    if task.pretrained:
        raise BadInput(f"--task={task.name}: there is no filtered model to compare with")
    means_nothing(cfg, ("method", "unlearn_lr", "unlearn_steps", "rounds", "join"),
                  "give --teachers and --alphas")
    cfg, rows = undo.resolved(cfg), []
    for each in seeds(cfg):
        rows += story(each, task)
        write_rows("trial", cfg, task, rows, quiet=each.seed > cfg.seed)
    rho = rank_correlations(rows)
    picture("trial", cfg, draw, rows, rho["all"], panels=1)
    table(rows, {"method": "teacher", "alpha": "alpha", "seed": "seed",
                 "trial_mean": "attacked, trial", "full_mean": "attacked, full",
                 "trial_retain": "retain, trial", "full_retain": "retain, full",
                 "trial_compute_pct": "compute %, trial", "full_compute_pct": "compute %, full"})
    print("Spearman's rho: " + ", ".join(f"{name} {'-' if r is None else round(r, 2)}"
                                         for name, r in rho.items()))


if __name__ == "__main__":
    run(main, Config, __doc__)
