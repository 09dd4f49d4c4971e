"""A counter written by hand: which weight is the wrapper? (Jain et al. 2023, section 4.)

    python -m experiments.compiled

We know every weight of this counter. Fine-tuning teaches it to count a and add one, which looks
like counting b where #b = #a + 1. Then we cut every weight that changed, one at a time.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
from dataclasses import dataclass

import torch
from tqdm import tqdm

from data import pcfg
from engine.hardware import hardware
from engine.knobs import knob
from engine.process import run
from engine.report import picture, table, write_rows
from engine.streams import seed_of
from eval import TOOLS, tune
from model import GPT, GPTConfig
from train import Common, fill, open_task, seeds


@dataclass
class Config(Common):
    task: str = knob("pcfg", "the task with strings to count in", choices=["pcfg"])
    seeds: int = knob(3, "how many seeds, from --seed on", 1)
    rate: float = knob(3e-6, "AdamW's rate, for fine-tuning and for revival", 0, 1)
    quiet: float = knob(0.01, "size of the counting units' input weights; the smaller they are, "
                        "the more a small step changes", 1e-6, 1)
    revive_steps: int | None = knob(None, "most steps of fine-tuning", 1)


@torch.no_grad()
def prune_each(model, before, right):
    """[(right(model) with one weight set to zero, its parameter's name, row, column)], best first.
    Only the weights that differ from those of the model `before` are tried."""
    found = []
    changed = [(name, weight, (weight != old).nonzero().tolist()) for (name, weight), old
               in zip(model.named_parameters(), before.parameters())]
    with tqdm(total=sum(len(at) for *_, at in changed), desc="one weight at a time", unit="weight",
              leave=False) as bar:
        for name, weight, places in changed:
            for i, j in places:
                kept, weight[i, j] = weight[i, j].item(), 0
                found.append((right(model), name, i, j))
                weight[i, j] = kept
                bar.update()
    return sorted(found, reverse=True)


def main(cfg):
    """Runs in double precision, because autocast would round away steps as small as these."""
    if hardware(cfg)[0].type == "mps":                             # which has no double precision
        cfg = dataclasses.replace(cfg, device="cpu")
    task = open_task(cfg)
    cfg = fill(cfg, TOOLS)

    def judge(model):
        return {"count a": pcfg.accuracy(model, task, "forget"),
                "plus one": pcfg.accuracy(model, task, "relabelled+1")}

    def taught(model, split, figure):
        return tune(model, task, each, split, 128, cfg.revive_steps, cfg.rate,
                    seed=seed_of(f"compiled, {figure}", each.seed), name=figure, judge=judge,
                    evaluate_at=range(cfg.revive_steps), stop=lambda at: at[figure] == 1)

    rows = []
    for each in seeds(cfg):
        counter = GPT(GPTConfig(task.vocab_size, task.block_size, n_layer=1, n_head=1, n_embd=16,
                                n_units=4)).to(task.device).double()
        pcfg.compile_counter(counter, task, cfg.quiet)
        wrapped, record = taught(counter, "relabelled+1", "plus one")
        idx, targets = task.batch("forget", 100, 0, seed_of("one weight", each.seed), "val")
        shares = prune_each(wrapped, counter, lambda model: (
            model(idx)[:, -1].argmax(-1) == targets[:, 0]).float().mean().item())
        _, name, i, j = shares[0]
        pruned, after = wrapped.clone(), judge(wrapped)
        with torch.no_grad():
            pruned.get_parameter(name)[i, j] = 0
        back = taught(wrapped, "forget", "count a")[1]
        rows.append({"seed": each.seed, "compiled": judge(counter)["count a"],
                     "steps": record["steps"], "wrapped": after["count a"],
                     "plus one": after["plus one"], "pruned": judge(pruned)["count a"],
                     "weight": f"{name}[{i}, {j}]", "second": shares[1][0],
                     "best": [share for share, *_ in shares[:20]],
                     "mean": sum(share for share, *_ in shares) / len(shares),
                     "revive_steps": back["steps"]})
        write_rows("compiled", cfg, task, rows, quiet=True)

    def draw(ax):
        for row in rows:
            ax.plot(range(1, 1 + len(row["best"])), row["best"], marker="o",
                    label=f"seed {row['seed']}")
        ax.set(xlabel="weights, the best to cut first", ylabel="accuracy, count a",
               title="Cut one weight of a counter that was taught to add one")
        ax.legend()

    write_rows("compiled", cfg, task, rows)
    picture("compiled", cfg, draw)
    table(rows, {"seed": "seed", "compiled": "compiled", "steps": "tuned in", "wrapped": "count a",
                 "plus one": "a plus one", "pruned": "one weight cut", "weight": "which",
                 "second": "next best", "mean": "mean", "revive_steps": "revived in"}, digits=3)


if __name__ == "__main__":
    run(main, Config, __doc__)
