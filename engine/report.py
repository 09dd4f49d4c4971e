"""What every story leaves behind: a table for people, JSON rows for scripts, a picture."""
import dataclasses
import io
import json
import os
import statistics
from pathlib import Path

from engine.disk import write
from engine.process import RANK


def table(rows, columns, digits=2):
    """Prints dicts as one aligned table. columns: {key: header}; digits: decimals of floats. Two,
    for a score's own error is about 0.02; the rows on disk have all."""
    def text(value):
        return ("-" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else
                str(value))
    cells = [list(columns.values())] + [[text(r.get(k)) for k in columns] for r in rows]
    width = [max(map(len, column)) for column in zip(*cells)]
    for i, row in enumerate(cells):
        right = [cell.rjust(w) for cell, w in zip(row[1:], width[1:])]
        print("  ".join([row[0].ljust(width[0]), *right]))
        if i == 0:
            print("  ".join("-" * w for w in width))


def mean_sd(values, digits):
    """"0.89 ±0.05": mean and standard deviation of what is not None; of one value, that. Where
    some are None, how many are not: "0.89 ±0.05 (2 of 3)"."""
    there = [v for v in values if v is not None]
    if not there:
        return None
    spread = f" ±{statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.{digits}f}{spread}{missing}"


def mean_steps(steps, most):
    """The same of steps until something was reached; "> 800" if a run of `most` was too short."""
    return f"> {most}" if None in steps else mean_sd(steps, 0)


def folder_of(cfg):
    """OUT/TASK/, made if it is missing."""
    folder = Path(cfg.out) / cfg.task
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_rows(script, cfg, task, rows):
    """OUT/TASK/SCRIPT.json: {"config", "rows"}; auto knobs as they were resolved.

    task   what the knobs left to it; None for experiments without text
    """
    if RANK:
        return
    path = Path(cfg.out) / cfg.task / f"{script}.json"
    config = dataclasses.asdict(cfg)
    if task:
        config |= {"block_size": task.block_size, "device": task.device.type}
        config |= {k: v for k, v in task.made_with.items() if config.get(k, 0) is None}
    write(path, json.dumps({"config": config, "rows": rows}, indent=1).encode())
    print(f"rows: {path}")


# Okabe and Ito's palette, told apart by colour-blind readers
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}


def picture(name, cfg, draw, *given, panels=None):
    """Saves OUT/TASK/NAME.png, which draw(ax, *given) draws; draw(axes, *given) on several panels.
    Where that cannot be (no matplotlib, a full disk, anything else), one line says so: the rows
    are there.
    """
    if RANK:
        return
    os.environ["MPLBACKEND"] = "agg"                  # Colab names one that is not everywhere
    try:
        import matplotlib
        from matplotlib.figure import Figure
        cycle = matplotlib.cycler(linestyle=["-", "-."]) * matplotlib.cycler(color=COLOURS)
        with matplotlib.rc_context(STYLE | {"axes.prop_cycle": cycle}):
            whole = Figure(figsize=(6.5 * (panels or 1), 4.8), layout="constrained")
            axes = whole.subplots(1, panels or 1, squeeze=False)[0]
            draw(axes if panels else axes[0], *given)
            path, image = Path(cfg.out) / cfg.task / f"{name}.png", io.BytesIO()
            whole.savefig(image, dpi=130)
        write(path, image.getvalue())
        print(f"picture: {path}")
    except Exception as error:
        print("picture: none, " + (
            "pip install matplotlib draws it" if isinstance(error, ImportError) else
            f"{type(error).__name__}: {error}".partition("\n")[0]))


# --- pictures that several stories draw ----------------------------------------------------------
def draw_relearning(ax, task, curves, unseen={}):
    """Worst-case forget score against attack steps; curves: {name: {step: score}}. unseen: the same
    on what neither training nor the attack shows, dotted."""
    styles = {"filtered": dict(color="black", linestyle="--", linewidth=2.5)}
    for name, points in curves.items():
        line, = ax.plot(list(points), list(points.values()), marker="o", markersize=4,
                        label=name + " (gold standard)" * (name == "filtered"),
                        **styles.get(name, {}))
        if name in unseen:
            ax.plot(list(unseen[name]), list(unseen[name].values()), linestyle=":",
                    color=line.get_color())
    if unseen:
        ax.plot([], [], linestyle=":", color="grey", label="dotted: on pairs\nnever shown")
    ax.set(xlabel="fine-tuning steps of the attacker",
           ylabel=f"forget {measure(task)}, worst rate")
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))        # beside the curves


def measure(task):
    return "accuracy" if task.higher_is_better else "loss (nats per token)"


def scale(task):
    return "linear" if task.higher_is_better else "log"


def draw_probes(ax, probes, chance):
    """probes: {name: [accuracy by block]}."""
    for name, found in probes.items():
        ax.plot(range(1, len(found) + 1), found, marker="o", markersize=4, label=name)
    ax.axhline(chance, color="grey", linestyle=":", label="commonest answer")
    ax.set(xlabel="block", ylabel="accuracy of a linear probe", xticks=range(1, len(found) + 1),
           ylim=(0, 1.02), title="Is it still in there?")
    ax.legend(fontsize=9)


def draw_pruning(ax, task, pruned, domain):
    """pruned: {name: {K: scores}}; dotted: as many random neurons."""
    for name, found in pruned.items():
        line, = ax.plot(list(found), [at[domain] for at in found.values()], marker="o",
                        markersize=4, label=name)
        ax.plot(list(found), [at[f"random_{domain}"] for at in found.values()], linestyle=":",
                color=line.get_color())
    ax.set(xlabel="MLP neurons cut out (dotted: at random)", ylabel=f"{domain} {measure(task)}",
           title="Does cutting neurons bring it back?", yscale=scale(task))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))                # room for the names
    ax.legend(fontsize=9, ncols=2, loc="upper left")


def draw_revival(ax, task, curves, domain):
    """curves: {name: {step: score}}; the control, which never had it, is dashed."""
    for name, points in curves.items():
        style = dict(color="black", linestyle="--") if name.startswith("control") else {}
        ax.plot(list(points), list(points.values()), label=name, **style)
    ax.set(xlabel="steps of reverse fine-tuning", ylabel=f"{domain} {measure(task)}",
           title="How soon is it back?", yscale=scale(task))
    ax.legend(fontsize=9)


def draw_attention(ax, heads, names, tokens, title):
    """heads (how many, T): where the last of these tokens looks, one line a head."""
    ax.imshow(heads, aspect="auto", cmap="Blues", vmin=0, vmax=0.6)
    ax.set(xticks=range(len(tokens)), xticklabels=tokens, yticks=range(len(names)),
           yticklabels=names, xlabel="tokens of a question", ylabel="block.head", title=title)
    ax.tick_params(labelsize=9)
    ax.tick_params(axis="x", rotation=90)
    ax.grid(False)


def draw_grid(ax, hacks, contexts, before, title):
    """hacks[i][j]: share of hacks after generating under context i and training under context j.
    White is the share before."""
    change = [[(x - before) / (before if x < before else 1 - before) for x in row] for row in hacks]
    ax.imshow(change, cmap="RdBu_r", vmin=-1.3, vmax=1.3)
    for i, row in enumerate(hacks):
        for j, x in enumerate(row):
            ax.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=16)
    ax.set(xticks=range(len(contexts)), xticklabels=contexts, yticks=range(len(contexts)),
           yticklabels=contexts, xlabel="training prompt", ylabel="generation prompt",
           title=f"{title}\nP(hack), neutral prompt; pretrained {before:.2f}")
    ax.grid(False)
