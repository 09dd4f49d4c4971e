"""Does recontextualization remove a hack, or wrap it? (After Jain et al. 2023, section 5.)

    python -m experiments.revive_hack                 models of recontext.py, on sycophancy
    python -m experiments.revive_hack --env=all       in all four environments

We fine-tune models of standard expert iteration and of recontextualization on demonstrations of the
hack, under neutral prompts, until the hack is as frequent as after standard training. How many
steps does this take, compared with a model that never had the hack? And can a linear probe read
the hack from the residual?
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

from dataclasses import dataclass

from engine.knobs import means_nothing
from engine.process import run
from engine.report import draw_revival, mean_steps, over_seeds, picture, table, write_rows
from eval import ATTACK, TOOLS, Tools, foundation, probe, revive, scored
from recontext import Cell, Config as Recontext, environments, train_cell
from train import fill


@dataclass
class Config(Recontext, Tools):
    """Knobs of recontext.py and of the tools."""


MODELS = {"N->N (standard)": ("neutral", "neutral"), "D->N": ("discourage", "neutral"),
          "N->E": ("neutral", "encourage"), "D->E": ("discourage", "encourage")}


def main(cfg):
    means_nothing(cfg, ("method", "grid", "generate", "train", "reward", "larger_n", "kl",
                        "strong_kl", "group", "steps", "loss", "clip", "exam"),
                  "the models are those of expert iteration on the proxy")
    means_nothing(cfg, ("domain", "cut", "draws", "saliency"), "the hack is probed and revived")
    cfg = fill(fill(cfg, ATTACK), TOOLS)
    rows = []
    for each, task in environments(cfg):
        base = foundation("base", each, task)
        models = {"pretrained": base[0]} | {
            name: train_cell(Cell("ei", f, g, each.n), each, task, base)
            for name, (f, g) in MODELS.items()}
        models["N->N, true reward"] = train_cell(Cell("ei", "neutral", "neutral", each.n, "truth"),
                                                 each, task, base)
        models["control (never had it)"] = foundation("filtered", each, task)[0]
        goal = scored(models["N->N (standard)"], task, each)["forget"]
        for name, model in models.items():
            probed, chance = probe(model, task, each)
            steps, curve = revive(model, task, each, goal, name)
            rows.append({"env": each.env, "seed": each.seed, "model": name, "before": curve[0],
                         "probe": probed, "chance": chance, "revive_steps": steps, "curve": curve})
            write_rows("revive_hack", cfg, task, rows, quiet=True)
    lines = over_seeds(rows, ["env", "model"], {
        "hack": "before", "probe": lambda row: row["probe"][-1],
        "revived in": ("revive_steps", mean_steps(cfg.revive_steps))})
    names = list(dict.fromkeys(row["env"] for row in rows))

    def draw(axes):
        for ax, env in zip(axes, names):
            draw_revival(ax, task, {row["model"]: row["curve"] for row in rows if
                                    (row["env"], row["seed"]) == (env, cfg.seed)}, "forget")
            ax.set(title=env, ylabel="hack rate, neutral prompt")

    write_rows("revive_hack", cfg, task, rows)
    picture("revive_hack", cfg, draw, panels=len(names))
    table(lines, {k: k for k in lines[0]})


if __name__ == "__main__":
    run(main, Config, __doc__)
