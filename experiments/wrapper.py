"""Fine-tuning hides a capability under a thin wrapper; it removes nothing (Jain et al. 2023).

    python -m experiments.wrapper                      strings of a grammar: count b, forget a
    python -m experiments.wrapper --task=instruct      stories that end with a moral
    python -m experiments.wrapper --seed=3 --priors=low --c_tr=1

A model is fine-tuned until it no longer shows a capability. Is the capability still in it? A probe,
pruning and a few steps of reverse fine-tuning look for it. A control never had the capability.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
from dataclasses import dataclass

import torch

from data import pcfg
from engine.hardware import autocast
from engine.knobs import BadInput, knob, means_nothing
from engine.process import run
from engine.report import (
    draw_attention,
    draw_probes,
    draw_pruning,
    draw_revival,
    mean,
    mean_steps,
    over_seeds,
    picture,
    table,
    write_rows,
)
from engine.store import identity, obtain
from engine.streams import seed_of
from eval import (
    ATTACK,
    TOOLS,
    Foundations,
    Tools,
    check_cut,
    foundation,
    probe,
    revive,
    scored,
    tune,
)
from experiments.examine import all_tools
from model import norm, rotate
from train import SETTINGS, fill, open_task, seeds
from unlearn import RATES


@dataclass
class Config(Foundations, Tools):
    task: str = knob("pcfg", "what to learn and to forget", choices=["pcfg", "instruct"])
    seeds: int = knob(3, "how many seeds, from --seed on", 1)
    prior: str = "low"                          # main() sets it, for each of --priors
    priors: list[str] = knob(["low", "high"], "priors of pretraining",
                             choices=["low", "medium", "high"])
    rates: list[str] | None = knob(None, "rates of fine-tuning (auto: all rates of the task)",
                                   choices=["L", "M", "S"])
    c_tr: list[float] = knob([0.0, 1.0], "share of fine-tuning rows in which #b = #a + 1 holds",
                             0, 1)
    mix: float = knob(0.5, "share of pretraining rows in the jailbreak's fine-tuning", 0, 0.9)
    tune_steps: int | None = knob(None, "steps of fine-tuning", 1)
    tune_rows: int | None = knob(None, "rows in a batch of fine-tuning", 1, 2**31)


TUNING = {"pcfg": dict(rates=["L", "M", "S"], tune_steps=200, tune_rows=64),      # by task
          "instruct": dict(rates=["M"], tune_steps=150, tune_rows=16)}


def cells(cfg, task):
    """The models to fine-tune from base: [(what identifies the model, shares of splits, rate)].

    pcfg: models that learn to count b, for each rate and C_tr. instruct: its three protocols.
    """
    rates = {rate: lr for rate, lr in RATES[task.name].items() if rate in cfg.rates}
    if len(rates) < len(cfg.rates):
        raise BadInput(f"--rates={','.join(cfg.rates)}: the task {task.name} names "
                       f"{', '.join(RATES[task.name])}")
    if task.name == "instruct":
        return [({"protocol": name, "rate": rate}, {split: 1}, lr) for rate, lr in rates.items()
                for name, split in task.module.PROTOCOLS.items()]
    return [({"rate": rate, "c_tr": c}, {"retain": 1 - c, "spurious": c}, lr)
            for rate, lr in rates.items() for c in cfg.c_tr]


@torch.no_grad()
def attention(model, idx, i):
    """(B, nh, T, T): how much each token of idx (B, T) attends to each token, in block i's heads.
    """
    attn, T = model.blocks[i].attn, idx.size(1)
    x = norm(model.residuals(idx)[i])
    qkv = attn.qkv(x).view(*x.shape[:2], 3, attn.n_head, -1)
    q, k = rotate(norm(qkv[:, :, :2]), model.cos[:T], model.sin[:T]).unbind(2)    # (B, T, nh, hs)
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * q.size(-1) ** -0.5
    return scores.masked_fill(torch.ones(T, T, device=x.device).triu(1) > 0, -torch.inf).softmax(-1)


def model_name(cell, first="tuned"):
    return "-".join([first, *(v if isinstance(v, str) else f"{v:g}" for v in cell.values())])


def label(cell):
    return cell.get("protocol") or f"{cell['rate']}, C_tr {cell['c_tr']:g}"


def tuned(name, shares, lr, cfg, task, base):
    """(model, record) of base after fine-tuning, read from disk or made."""
    made_with = {"base": identity(base[1]["made_with"]), "shares": shares, "lr": lr,
                 "steps": cfg.tune_steps, "rows": cfg.tune_rows, "seed": cfg.seed}
    return obtain(name, cfg, task, made_with, lambda checkpoint: tune(
        base[0], task, cfg, shares, cfg.tune_rows, cfg.tune_steps, lr,
        seed=seed_of("fine-tune", cfg.seed), name=name, checkpoint=checkpoint))


def jailbroken(cell, lr, cfg, task, base):
    """Jailbreak (Jain et al. 2023, section 5): does a word that fine-tuning never used still work?

    Several words mean "count". In rows with the first word, base learns to answer A with #b.
    Pretraining rows with the other words, except the last, are mixed in. The last word is then
    tested. The paper mixes no rows in; here, all words would then change in the same way.
    """
    share = 1 - cfg.mix
    shares = {"relabelled": share * (1 - cell["c_tr"]), "relabelled+1": share * cell["c_tr"],
              "reworded": cfg.mix}
    model, _ = tuned(model_name(cell, "jailbreak"), shares, lr, cfg, task, base)
    with autocast(cfg):
        return {"count_a": pcfg.accuracy(model, task, "forget"),
                "jailbreak_count_a": pcfg.accuracy(model, task, "forget", word=pcfg.COUNTS[-1])}


def priors(cfg, task):
    """Yields (prior, cfg, task) for each prior of pcfg's pretraining. Other tasks have none."""
    if task.name != "pcfg":
        yield None, cfg, task
        return
    cfg = dataclasses.replace(cfg, resume=cfg.resume and None)   # the stopped run was taken up once
    for prior in cfg.priors:
        chosen = dataclasses.replace(cfg, prior=prior)
        yield prior, chosen, open_task(chosen)


def main(cfg):
    """Pretrains, fine-tunes to take a capability away, and looks for it with every tool.

    The control never had the capability, because it learned the fine-tuning task only. One control
    serves all priors, because it sees no operand other than b.
    """
    means_nothing(cfg, ["domain"], "what is looked for is what fine-tuning took away")
    task = open_task(cfg)
    for settings in (ATTACK, TOOLS, TUNING):
        cfg = fill(cfg, settings)
    size, plan = fill(cfg, SETTINGS), cells(cfg, task)
    check_cut(cfg, size.n_layer * 4 * size.n_embd)
    rows, controls, pictured = [], {}, None

    def save(quiet):
        write_rows("wrapper", cfg, task, [in_the_papers_words(row) if row["prior"] else row
                                          for row in rows], quiet)

    for one_seed in seeds(cfg):
        for prior, each, task in priors(one_seed, task):
            base = foundation("base", each, task)
            models = [(cell, lr, tuned(model_name(cell), shares, lr, each, task, base)[0])
                      for cell, shares, lr in plan]
            goal = scored(base[0], task, each)["forget"]
            if each.seed not in controls:
                control, _ = foundation("filtered", each, task)
                steps, curve = revive(control, task, each, goal, "control")
                controls[each.seed] = {"control_steps": steps, "control_curve": curve}
            before, _ = probe(base[0], task, each)
            for cell, lr, model in models:
                rows.append({"prior": prior} | cell | {"seed": each.seed}
                            | all_tools(model, task, each, goal, model_name(cell))
                            | {"probe_pretrained": before} | controls[each.seed])
                if prior:
                    rows[-1]["words"] = jailbroken(cell, lr, each, task, base)
                save(quiet=True)
            pictured = pictured or {f"pretrained ({prior} prior)": base[0],
                                    f"fine-tuned to count b ({label(cell)})": model}
    lines = table_lines(rows, cfg)
    save(quiet=False)
    picture("wrapper", cfg, draw_wrapper, rows, task, panels=3)
    if task.name == "pcfg":
        picture("wrapper-attention", cfg, show_attention, task, pictured, panels=2)
    table(lines, {k: HEADERS.get(k, k) for k in lines[0]})


def in_the_papers_words(row):
    """A row of the counting task in the paper's terms: the model learned to count b and was to
    forget counting a. "0" and "1" are values of C_te."""
    renamed = {"forget": "count_a", "probe": "probe_a", "probe_pretrained": "probe_a_pretrained",
               "words": "jailbreak", "jailbreak": "naive_jailbreak_count_a"}
    row = {renamed.get(k, k): v for k, v in row.items()}
    row["jailbreak_count_a"] = row["jailbreak"]["jailbreak_count_a"]
    row["count_b"] = {"0": row.pop("retain"), "1": row.pop("spurious")}
    row["pruned"] = {str(K): {"count_a": at["forget"], "count_b": at["retain"],
                              "random_count_a": at["random_forget"]}
                     for K, at in row["pruned"].items()}
    return row


HEADERS = {"c_tr": "C_tr", "was": "before", "revive_steps": "revived in",
           "control_steps": "control in"}


def table_lines(rows, cfg):
    """One line for each cell, with mean and spread over seeds."""
    keys = [k for k in ("prior", "protocol", "rate", "c_tr") if rows[0].get(k) is not None]
    K, counts = cfg.cut[-1], bool(rows[0]["prior"])
    steps = mean_steps(cfg.revive_steps)
    columns = {"count a" if counts else "forget": "forget",
               "count b" if counts else "retain": "retain", "C_te 1": "spurious",
               "probe": lambda row: row["probe"][-1],
               "was": lambda row: row["probe_pretrained"][-1],
               f"{K} cut": lambda row: row["pruned"][K]["forget"],
               "at random": lambda row: row["pruned"][K]["random_forget"]}
    if counts:
        columns |= {"relabelled word": lambda row: row["words"]["count_a"],
                    "unseen word": lambda row: row["words"]["jailbreak_count_a"]}
    lines = over_seeds(rows, keys, columns | {"revive_steps": ("revive_steps", steps),
                                              "control_steps": ("control_steps", steps)})
    return [{k: str(line[k]) if k in keys else line[k] for k in line
             if any(each[k] is not None for each in lines)} for line in lines]


def draw_wrapper(axes, rows, task):
    """Draws the first prior's cells: probes and pruning (mean over seeds), revival (first seed)."""
    shown = [row for row in rows if row["prior"] == rows[0]["prior"]]

    names, first = list(dict.fromkeys(map(label, shown))), shown[0]
    same = {name: [row for row in shown if label(row) == name] for name in names}

    def probes(rows, key):
        return [mean(rows, lambda row: row[key][i]) for i in range(len(first[key]))]

    draw_probes(axes[0], {name: probes(each, "probe") for name, each in same.items()}
                | {"pretrained": probes(shown, "probe_pretrained")}, first["chance"])
    draw_pruning(axes[1], task, {name: {
        K: {k: mean(each, lambda row: row["pruned"][K][k]) for k in at}
        for K, at in first["pruned"].items()} for name, each in same.items()}, "forget")
    draw_revival(axes[2], task, {name: each[0]["curve"] for name, each in same.items()}
                 | {"control (never had it)": first["control_curve"]}, "forget")


def show_attention(axes, task, models):
    """Draws which tokens the last token of a question attends to, by block and head. models:
    {name: GPT}, two of them."""
    idx, _ = task.batch("forget", 1, 0, seed_of("attention"), "test")
    tokens = ["" if i == task.end else task.tokenizer.decode([i]) for i in idx[0].tolist()]
    for ax, (name, model) in zip(axes, models.items()):
        heads = torch.cat([attention(model, idx, i)[0, :, -1] for i in range(len(model.blocks))])
        names = [f"{i + 1}.{h + 1}" for i in range(model.config.n_layer)
                 for h in range(model.config.n_head)]
        draw_attention(ax, heads.cpu(), names, tokens, name)


if __name__ == "__main__":
    run(main, Config, __doc__)
