"""The results of every story: a table for people, JSON rows for scripts, and a picture."""
import dataclasses
import io
import json
import os
import statistics
import textwrap
import unicodedata
from pathlib import Path

from engine.disk import write
from engine.hardware import hardware
from engine.knobs import BadInput
from engine.process import RANK


def table(rows, columns, digits=2):
    """Prints dicts as one aligned table. columns: {key: header}. digits: decimals of floats; two by
    default, because a score's error is about 0.02. The rows on disk have all digits."""
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


def say_edges(rows, cfg, name="model"):
    """Prints a note if, at the attack's last step, the worst rate is the smallest or largest one
    tried. A rate outside the grid may then be worse. rows have the figures of attacked()."""
    last, edges = str(cfg.attack_steps[-1]), {}
    for row in rows:
        if row["rates"][last] in (min(cfg.lrs), max(cfg.lrs)):
            edges.setdefault(row["rates"][last], {})[row[name]] = None
    if len(cfg.lrs) > 1 and edges:
        print(f"note: after {last} steps the worst rate is at the edge of --lrs: " + "; ".join(
            f"{lr:g} for {', '.join(names)}" for lr, names in edges.items()))


def print_stories(rows, name="model"):
    """Prints two stories that each model told, where rows have some (see data/tinystories.py)."""
    for row in rows:
        for story in row.get("stories", ())[:2]:
            print(textwrap.fill(" ".join(f"{row[name]} tells: {story}".split()), 100,
                                subsequent_indent="  "))


def mean(rows, figure):
    """Mean over rows of a figure, which is a function of a row. None if a row's figure is None."""
    values = [figure(row) for row in rows]
    return None if None in values else statistics.mean(values)


def mean_sd(values, digits=2):
    """"0.89 ±0.05": mean and standard deviation of the values that are not None; no deviation for
    a single value. If some are None, says how many are not: "0.89 ±0.05 (2 of 3)"."""
    there = [v for v in values if v is not None]
    if not there:
        return None
    spread = f" ±{statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.{digits}f}{spread}{missing}"


def mean_steps(most):
    """For over_seeds: mean and spread of the steps until something was reached. Gives "> 800" if
    `most` (800) steps were not enough in some run."""
    return lambda steps: f"> {most}" if None in steps else mean_sd(steps, 0)


def how_many(came_true):
    """"2/3" if two of the three values that are not None are true."""
    known = [yes for yes in came_true if yes is not None]
    return f"{sum(known)}/{len(known)}" if known else None


def over_seeds(rows, keys, figures):
    """A table's lines from rows of several seeds. There is one line for each combination of values
    that the rows have under `keys`, in order. It has each figure's mean and spread (see mean_sd).

    figures   {column: figure}. A figure is a key of a row or a function of a row. It may also be a
              pair of that and either the number of digits (default: 2) or a function of all values
    """
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = []
    for values, group in groups.items():
        line = dict(zip(keys, values))
        for column, figure in figures.items():
            figure, how = figure if isinstance(figure, tuple) else (figure, 2)
            values = [figure(row) if callable(figure) else row.get(figure) for row in group]
            line[column] = how(values) if callable(how) else mean_sd(values, how)
        lines.append(line)
    return lines


def print_models(rows, cfg):
    """Prints the table of unlearn.py and undo.py (see docs/rows.md): a line for each model, with
    the mean and spread over seeds of those figures that the rows have."""
    words, steps = words_of(rows[0]), [str(step) for step in cfg.attack_steps]
    near, last = min(steps, key=lambda step: abs(int(step) - 40)), steps[-1]
    columns = {                                      # (key, step of the attack or None): header
        ("retain", None): "retain", ("forget", None): "forget", ("forget_words", None): "words",
        **{(f"relearned{words}", step): f"after {step}" for step in steps[-4:]},
        ("forget_heldout_pairs", None): "unseen",
        ("relearned_heldout_pairs", last): f"after {last}",
        ("mentions", None): "mentions", ("relearned_mentions", near): f"after {near}",
        ("relearned_few", None): "few", ("forget_shown", None): "shown",
        ("relearned_shown", last): f"after {last}", ("forget_asked", None): "asked",
        ("near", None): "near", ("text_loss", None): "text", ("tokens", None): "tokens",
        (f"robustness{words}", near): f"robust@{near}", ("robustness_mean", None): "robust",
        ("compute_pct", None): "compute %", ("compute_pct_matched", None): "matched %"}
    columns = {at: header for at, header in columns.items() if at[0] in rows[0]}
    lines = over_seeds(rows, ["model"], {(key, step): (
        lambda row, key=key, step=step: row[key][step] if step else row[key],
        0 if key.startswith(("tokens", "compute")) else 2) for key, step in columns})
    table(lines, {"model": "model"} | columns)


def folder_of(cfg):
    """OUT/TASK/, the folder for rows and pictures, which is made if it is missing. Raises BadInput
    if it is not writable."""
    folder = Path(cfg.out) / cfg.task
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise BadInput(f"--out={cfg.out}: cannot write in {folder}")
    return folder


def write_rows(script, cfg, task, rows, quiet=False):
    """OUT/TASK/SCRIPT.json: {"config", "rows"}; auto knobs as they were resolved.

    task    what the knobs left to it; None for experiments without text
    quiet   says nothing: the file was there, and has more rows now
    """
    if RANK:
        return
    path = folder_of(cfg) / f"{script}.json"
    config = dataclasses.asdict(cfg)
    if task:
        config |= {"block_size": task.block_size, "data": task.data_id, "device": task.device.type,
                   "precision": str(hardware(cfg)[1])[len("torch."):]}
        config |= {k: v for k, v in task.made_with.items() if config.get(k, 0) is None}
    write(path, json.dumps({"config": config, "rows": rows}, indent=1).encode())
    if not quiet:
        print(f"rows: {path}")


# Knobs in which runs of one table may differ: they choose rows, name files, or do not shape rows
APART = {"seed", "seeds", "methods", "arms", "label_shares", "label_fractions", "with_posthoc",
         "join", "out", "data_dir", "source", "source2", "text", "model", "device", "compile",
         "save_every", "resume", "remake"}


def joined(cfg, task, complete=True):
    """Rows that runs of the same script with the same knobs and data wrote for other seeds, methods
    or label fractions: those of the files cfg.join. Raises BadInput for a file that has no rows,
    was made with other knobs or data, or has a row that an earlier file has.

    complete    what a seed must have, or BadInput: a list of models; True, the rows that other
                seeds of these files have; False, anything
    """
    def which(row):
        return [row.get(k) for k in ("seed", "model", "method", "label_fraction")]

    mine = dataclasses.asdict(cfg) | {"block_size": task.block_size, "data": task.data_id} | {
        k: v for k, v in task.made_with.items() if getattr(cfg, k, 0) is None}
    rows, mine = [], json.loads(json.dumps(mine))
    for file in cfg.join or ():
        try:
            saved = json.loads(Path(file).read_text(encoding="utf-8"))
            config, new = saved["config"], saved["rows"]
            differ = sorted(k for k in config if k in mine and k not in APART and
                            config[k] != mine[k])
            keys, its = [which(row) for row in new], sorted({row["seed"] for row in new})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise BadInput(f"--join={file}: not rows of this script ({type(error).__name__})"
                           ) from None
        if differ:
            key = differ[0]
            raise BadInput(f"--join={file} was made with {key}={config[key]}, this run has "
                           f"{key}={mine[key]}")
        if again := [k for k in keys if k in [which(row) for row in rows]]:
            raise BadInput(f"--join={file}: another file has the row of seed " + ", ".join(
                str(part) for part in again[0] if part is not None) + ", too")
        for seed in its:
            if seed not in range(cfg.seed, cfg.seed + cfg.seeds):
                raise BadInput(f"--join={file} has seed {seed}, which is none of this table's: "
                               f"give --seeds")
        rows += new
    made = {}
    for row in rows:
        made.setdefault(row["seed"], {})[str(which(row)[1:])] = row.get("model")
    for seed, there in made.items() if complete else ():
        if complete is not True and (lacks := [n for n in complete if n not in there.values()]):
            raise BadInput(f"--join: seed {seed} has no row of {', '.join(lacks)}; was its run "
                           f"stopped?")
        if complete is True and there.keys() != max(made.values(), key=len).keys():
            raise BadInput(f"--join: seed {seed} has fewer rows than others; was its run stopped?")
    return rows


def words_of(row):
    """The end of the keys of a row's figures that tell forgetting best: "_words" where the task
    scores the words to be forgotten (its stories are ordinary but for these), else ""."""
    return "_words" if "forget_words" in row else ""


# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLE = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False}


def picture(name, cfg, draw, *given, panels=None, above=0, quiet=False):
    """Saves OUT/TASK/NAME.png, which draw(ax, *given) draws; draw(axes, *given) on several panels.
    Where that cannot be (no matplotlib, a full disk, anything else), one line says so: the rows
    are there. Returns the picture's path, or None where there is none.

    above   how many narrow panels stand in a row over the others (see draw_stories). They are the
            last of the axes
    """
    if RANK:
        return None
    os.environ["MPLBACKEND"] = "agg"                  # Colab sets a backend that may be missing
    try:
        import matplotlib
        from matplotlib.figure import Figure
        cycle = matplotlib.cycler(linestyle=["-", "-."]) * matplotlib.cycler(color=COLOURS)
        with matplotlib.rc_context(STYLE | {"axes.prop_cycle": cycle}):
            size, over = 4.8, 3.95 if above else 0                                      # inches
            whole = Figure(figsize=(6.5 * (panels or 1), size + over), layout="constrained")
            # parts are laid out by themselves: the legends below do not move the stories
            parts = whole.subfigures(2, height_ratios=(over, size)) if above else [whole]
            axes = [*parts[-1].subplots(1, panels or 1, squeeze=False)[0]]
            if above:
                axes += [*parts[0].subplots(1, above, squeeze=False,
                                            gridspec_kw={"wspace": 0.03})[0]]
            draw(axes if panels else axes[0], *given)
            path, image = folder_of(cfg) / f"{name}.png", io.BytesIO()
            whole.savefig(image, dpi=130)
        write(path, image.getvalue())
        said = str(path)
    except Exception as error:
        path = None
        said = "none, " + ("pip install matplotlib draws it" if isinstance(error, ImportError) else
                           f"{type(error).__name__}: {error}".partition("\n")[0])
    if not quiet:
        print(f"picture: {said}")
    return path


# --- pictures that several stories draw ----------------------------------------------------------
def curves(rows, before="forget", after="relearned"):
    """{model: {step of the attack: score}}, the mean over seeds; at 0, the score before it."""
    models = {}
    for row in rows:
        models.setdefault(row["model"], []).append(row)
    return {name: {0: mean(some, lambda row: row[before])} | {
        int(step): mean(some, lambda row, step=step: row[after][step]) for step in some[0][after]}
        for name, some in models.items()}


def draw_relearning(ax, task, curves, unseen={}):
    """Draws the worst-case forget score against attack steps. curves: {name: {step: score}}.
    unseen: the same for data that neither training nor the attack shows, drawn dotted."""
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


def draw_matrix(ax, names, columns, figures, ends, task):
    """Draws forget scores as a heat map with its figures: red where the skill is there, blue where
    it is not. figures: for each name, a score for each column; ends: the colours' lowest and
    highest score."""
    image = ax.imshow(figures, aspect="auto", vmin=ends[0], vmax=ends[1],
                      cmap="RdYlBu_r" if task.higher_is_better else "RdYlBu")
    ax.grid(False)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(names)), names, fontsize=9 if len(names) < 16 else 7)
    for i, line in enumerate(figures):
        for j, score in enumerate(line):
            pale = 0.15 < image.norm(score) < 0.85
            ax.text(j, i, f"{score:.2f}", ha="center", va="center", fontsize=7,
                    color="black" if pale else "white")


def draw_stories(axes, stories, topic=None):
    """Writes a story in each of the axes, which stand in one row. It ends with "…" where the panel
    ends, or if the model was stopped within a sentence.

    stories   {title: text}; a title may have two lines
    topic     a compiled regular expression. What it matches is bold and orange
    """
    from matplotlib.font_manager import findfont, get_font
    known = get_font(findfont("monospace:bold")).get_charmap()
    size, leading, margin = 11, 14, 7              # points: letters, from line to line, at the edge
    part = axes[0].figure
    width, height = (72 * pixels / part.dpi for pixels in (part.bbox.width, part.bbox.height))
    # less 3% for gaps; a letter's width is 0.602 of its size. Titles take 60 points
    columns = int((0.97 * width / len(axes) - 2 * margin) / (0.602 * size))
    most = int((height - 60 - 2 * margin) / leading)
    for ax, (title, story) in zip(axes, stories.items()):
        ax.set_title(title, fontsize=size, loc="left")
        ax.set(xticks=[], yticks=[], facecolor="#F3F3F3")
        ax.spines[:].set_visible(False)
        story = " ".join(story.split())
        story += "…" * story[-1:].isalnum()
        lines = textwrap.wrap(story, columns, max_lines=most, placeholder=" …",
                              break_on_hyphens=False)
        found = topic.finditer("\n".join(lines)) if topic else ()
        marked = {i for match in found for i in range(*match.span())}
        at = 0                                                         # where the line begins
        for i, line in enumerate(lines):
            # any other sign might be wider or narrower than a column
            drawn = [c if ord(c) in known and unicodedata.category(c)[0] in "LNPSZ" else "\ufffd"
                     for c in line]
            # Two texts, each with blanks where the other one has letters. They fit into each other
            # because in a monospaced face bold letters are as wide as others.
            for bold in (False, True):
                text = [c if (at + j in marked) == bold else " " for j, c in enumerate(drawn)]
                ax.annotate("".join(text), (0, 1), (margin, -margin - leading * (i + 0.75)),
                            "axes fraction", "offset points", family="monospace", fontsize=size,
                            parse_math=False, in_layout=False,
                            **dict(weight="bold", color=COLOURS[1]) if bold else {})
            at += len(line) + 1


def measure(task):
    return "accuracy" if task.higher_is_better else "loss (nats per token)"


def scale(task):
    return "linear" if task.higher_is_better else "log"


def draw_probes(ax, probes, chance):
    """Draws accuracies against blocks. probes: {name: [accuracy by block]}."""
    for name, found in probes.items():
        ax.plot(range(1, len(found) + 1), found, marker="o", markersize=4, label=name)
    ax.axhline(chance, color="grey", linestyle=":", label="commonest answer")
    ax.set(xlabel="block", ylabel="accuracy of a linear probe", xticks=range(1, len(found) + 1),
           ylim=(0, 1.02), title="Linear probes")
    ax.legend(fontsize=9)


def draw_pruning(ax, task, pruned, domain):
    """Draws scores against neurons cut. pruned: {name: {K: scores}}. Dotted: random neurons."""
    for name, found in pruned.items():
        line, = ax.plot(list(found), [at[domain] for at in found.values()], marker="o",
                        markersize=4, label=name)
        ax.plot(list(found), [at[f"random_{domain}"] for at in found.values()], linestyle=":",
                color=line.get_color())
    ax.set(xlabel="MLP neurons cut out (dotted: at random)", ylabel=f"{domain} {measure(task)}",
           title="Score after cutting neurons", yscale=scale(task))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))                # room for the names
    ax.legend(fontsize=9, ncols=2, loc="upper left")


def draw_revival(ax, task, curves, domain):
    """Draws scores against steps. curves: {name: {step: score}}. Controls are dashed."""
    for name, points in curves.items():
        style = dict(color="black", linestyle="--") if name.startswith("control") else {}
        ax.plot(list(points), list(points.values()), label=name, **style)
    ax.set(xlabel="steps of reverse fine-tuning", ylabel=f"{domain} {measure(task)}",
           title="Score during reverse fine-tuning", yscale=scale(task))
    ax.legend(fontsize=9)


def draw_routing(axes, rows, fractions, attack_steps, dotted=(), dashed=()):
    """Draws losses after ablation against the label fraction, and relearning curves at the largest
    fraction. `dotted` and `dashed` name the methods with such lines; dotted ones use no labels."""
    def rows_of(method, fraction):
        return [row for row in rows if row["method"] == method and (
            method in dotted or row["label_fraction"] == fraction)]

    def of(method, fraction, figure):
        return mean(rows_of(method, fraction), figure)

    def fractions_of(method):
        return [f for f in fractions if rows_of(method, f)]

    style = {name: {"marker": "o", "markersize": 4, "linestyle": ":" if name in dotted else
                    "--" if name in dashed else "-"} for name in [row["method"] for row in rows]}
    words = words_of(rows[0])
    forget = "loss on forget words" if words else "forget loss"
    for ax, key, label in ((axes[0], f"forget{words}", f"{forget} (higher: more is gone)"),
                           (axes[1], "retain", "retain loss (lower is better)")):
        for name in style:
            ax.plot([100 * f for f in fractions_of(name)],
                    [of(name, f, lambda row: row[f"{key}_finetuned"]) for f in fractions_of(name)],
                    label=name, **style[name])
        ax.set(xlabel="labelled forget data (%)", ylabel=f"{label}, nats per token", xscale="log",
               xticks=[100 * f for f in fractions],
               xticklabels=[f"{100 * f:g}" for f in fractions])
        ax.minorticks_off()
    axes[0].set_title(f"{forget.capitalize()} after ablation")
    axes[1].set_title("Retain loss after ablation")
    most = fractions[-1]
    for name in style:
        if not rows_of(name, most):
            continue
        axes[2].plot(attack_steps, [of(name, most, lambda row: row[f"relearned{words}"][str(step)])
                                    for step in attack_steps], label=name, **style[name])
    axes[2].set(xlabel="fine-tuning steps of the attacker", ylabel=f"{forget}, worst rate",
                title=f"Relearning curves, {most:.0%} of forget data labelled")
    axes[2].legend(*axes[0].get_legend_handles_labels(), fontsize=9, loc="center left",
                   bbox_to_anchor=(1, 0.5))


def draw_attention(ax, heads, names, tokens, title):
    """Draws the attention of the last of these tokens, one line for each head. heads: (number of
    heads, T)."""
    ax.imshow(heads, aspect="auto", cmap="Blues", vmin=0, vmax=0.6)
    ax.set(xticks=range(len(tokens)), xticklabels=tokens, yticks=range(len(names)),
           yticklabels=names, xlabel="tokens of a question", ylabel="block.head", title=title)
    ax.tick_params(labelsize=9)
    ax.tick_params(axis="x", rotation=90)
    ax.grid(False)


def draw_grid(ax, hacks, contexts, before, title):
    """Draws a grid of hack rates. hacks[i][j] is the rate after generating under context i and
    training under context j. White is the rate before training."""
    change = [[(x - before) / (before if x < before else 1 - before) for x in row] for row in hacks]
    ax.imshow(change, cmap="RdBu_r", vmin=-1.3, vmax=1.3)
    for i, row in enumerate(hacks):
        for j, x in enumerate(row):
            ax.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=16)
    ax.set(xticks=range(len(contexts)), xticklabels=contexts, yticks=range(len(contexts)),
           yticklabels=contexts, xlabel="training prompt", ylabel="generation prompt",
           title=f"{title}\nP(hack), neutral prompt; pretrained {before:.2f}")
    ax.grid(False)
