"""Does a cheap trial of UNDO tell how the full run would rank?

    python -m experiments.trial                  12 settings: four alphas, three teachers
    python -m experiments.trial --share=0.2

Each setting is distilled twice: until the student is as good as its teacher, and for a tenth of
the compute of the filtered run. Both students are attacked. If the trial ranks the settings as the
full run does (Spearman's rho), it is enough to choose by.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
from dataclasses import dataclass

import numpy as np

import undo
import unlearn
from engine.hardware import autocast
from engine.knobs import knob
from engine.process import run
from engine.report import picture, table, write_rows
from eval import attacked, foundations, relearn
from train import open_task, seeds


@dataclass
class Config(undo.Config):
    alphas: list[float] = knob([0.2, 0.4, 0.6, 0.8], "UNDO's noise", 0, 1)
    teachers: list[str] = knob(["maxent", "graddiff", "npo"], "their unlearning methods",
                               choices=[name for name in unlearn.NAMES if name != "oracle"])
    share: float = knob(0.1, "the compute of a trial's distillation, as a share of the filtered "
                        "run's", 1e-3, 1)


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
    """The rows of a seed: each setting, with its mean robustness after the trial and after all."""
    base, filtered = foundations(cfg, task)
    rows = []

    def judged(name, model):
        with autocast(cfg):
            retain = task.score(model, ("retain",))["retain"]
        return {"retain": retain, "curve": attacked(relearn(model, task, cfg, name))["relearned"]}

    gold = judged("filtered", filtered[0])
    for method in cfg.teachers:
        how = undo.resolved(dataclasses.replace(cfg, method=method, unlearn_lr=None,
                                                unlearn_steps=None))
        teacher = undo.make_teacher(how, task, *base)
        low = judged(method, teacher[0])

        def robustness(curve):
            each = [undo.robustness(curve[s], low["curve"][s], gold["curve"][s]) for s in curve]
            return None if None in each else sum(each) / len(each)

        for alpha in cfg.alphas:
            full = undo.undo(alpha, how, task, *teacher, f"{method}-")
            a_step = (full[1]["flops"] - teacher[1]["flops"]) / full[1]["history"][-1]["step"]
            steps = max(int(cfg.share * filtered[1]["flops"] / a_step), 1)
            short = undo.undo(alpha, dataclasses.replace(how, steps=steps, tolerance=0.0), task,
                              *teacher, f"{method}-trial-")
            row = {"method": method, "alpha": alpha, "seed": cfg.seed}
            for name, (model, record) in (("full", full), ("trial", short)):
                at = judged(f"{name} {method} {alpha:g}", model)
                row |= {f"{name}_retain": at["retain"], f"{name}_relearned": at["curve"],
                        f"{name}_robustness": robustness(at["curve"]),
                        f"{name}_compute_pct": 100 * record["flops"] / filtered[1]["flops"]}
            rows.append(row)
    return rows


def draw(axes, rows, rho):
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        axes[0].plot(*([100 * row[f"{name}_robustness"] for row in mine]
                       for name in ("trial", "full")), "o", label=f"{method} (teacher)")
    axes[0].set(xlabel="robustness after the trial (%)", ylabel="robustness after the full run (%)",
                title=f"Trial and full run, rank correlation {rho:.2f}")
    axes[0].legend(fontsize=9)


def main(cfg):
    task = open_task(cfg)
    cfg, rows = undo.resolved(cfg), []
    for each in seeds(cfg):
        rows += story(each, task)
    write_rows("trial", cfg, task, rows)
    known = [row for row in rows if None not in (row["full_robustness"], row["trial_robustness"])]
    rho = spearman(*([row[f"{name}_robustness"] for row in known] for name in ("trial", "full")))
    if rho is not None:
        picture("trial", cfg, draw, known, rho, panels=1)
    table(rows, {"method": "teacher", "alpha": "alpha", "seed": "seed",
                 "trial_robustness": "robust, trial", "full_robustness": "robust, full",
                 "trial_retain": "retain, trial", "full_retain": "retain, full",
                 "trial_compute_pct": "compute %, trial", "full_compute_pct": "compute %, full"})
    print(f"Spearman's rho: {rho if rho is None else round(rho, 2)}")


if __name__ == "__main__":
    run(main, Config, __doc__)
