"""Tunes the methods of unlearn.py by one rule, which is the same for all.

    python -m experiments.sweep                              arithmetic, seeds 100 and 101
    python -m experiments.sweep --methods=npo,simnpo --attempts=24

Every method has the same attempts: its settings in unlearn.py, and then rates, weights and steps
drawn at random, with a factor of 1/4 to 4 on the knob that is the method's own, if it has one. Of
those that keep the retain score within 2% of base's, the one that forgets most is the best (if none
does, the one that keeps most). Forgetting is the forget score on val, to two digits; where that is
the same, the loss on forget rows. Only base is needed.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import statistics
import tempfile
from dataclasses import dataclass

from tqdm import tqdm

import unlearn
from engine.hardware import autocast
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import table, write_rows
from engine.streams import stream
from eval import AfterBase, fill_attack, foundation
from train import config_from, open_task, seeds


@dataclass
class Config(AfterBase):
    seed: int = knob(100, "the first seed: one that no table reports", 0, 2**31)
    seeds: int = knob(2, "how many seeds, from --seed on; their mean decides", 1)
    methods: list[str] = knob(unlearn.FROM_BASE, "methods to tune", choices=unlearn.FROM_BASE)
    attempts: int = knob(12, "how many settings each method tries", 1)
    batch_size: int = knob(32, "rows in a batch, half forget and half retain", 2, 2**31)
    lr_range: list[float] = knob([1e-4, 3e-3], "the least and the largest rate", 0, 1)
    weight_range: list[float] = knob([1.0, 300.0], "the least and the largest retain weight", 1e-9)
    steps_range: list[int] = knob([20, 120], "the fewest and the most steps", 1)


# How strongly a method forgets, by a knob of its own
OWN = {"npo": "beta", "simnpo": "beta", "undial": "gamma", "rmu": "steer", "sam": "rho",
       "repnoise": "mmd"}


def draws(cfg, method):
    """[{knob: value}]: the settings in use, and the attempts, log-uniform in each range. All
    methods have the same random numbers."""
    rng, own = stream("sweep"), stream("sweep", "own")
    now = unlearn.resolved(config_from(cfg, unlearn.Config, AfterBase), method)
    name = OWN.get(method)

    def between(rng, low, high):
        return low * (high / low) ** rng.random()

    return [{k: getattr(now, k) for k in ("lr", "retain_weight", "steps", name) if k}] + [
        {"lr": between(rng, *cfg.lr_range), "retain_weight": between(rng, *cfg.weight_range),
         "steps": round(between(rng, *cfg.steps_range))}
        | ({name: getattr(now, name) * between(own, 1 / 4, 4)} if name else {})
        for _ in range(cfg.attempts)]


def attempt(method, given, each, task, base):
    """{"retain", "forget": val scores, "forget_loss", "flops"} after one setting, on one seed."""
    with tempfile.TemporaryDirectory() as folder:                    # keeps none of the models
        cfg = config_from(each, unlearn.Config, AfterBase, method=method,
                          batch_size=each.batch_size, out=folder, **given)
        model, record = unlearn.unlearn(cfg, task, *base, alike=each.attempts * each.seeds)
    with autocast(each):
        return task.score(model, part="val") | {
            "forget_loss": task.loss(model, "forget", 64, "val"), "flops": record["flops"]}


def best(attempts, retain, task):
    """The index of the best attempt, from [mean figures], and whether it keeps the retain score."""
    def merit(i):
        at, sign = attempts[i], -1 if task.higher_is_better else 1
        if not task.within(at["retain"], retain, 0.02):
            return False, -sign * at["retain"]
        return True, sign * round(at["forget"], 2), at["forget_loss"]

    found = max(range(len(attempts)), key=merit)
    return found, merit(found)[0]


def main(cfg):
    for name in ("lr_range", "weight_range", "steps_range"):
        low, *high = getattr(cfg, name)
        if len(high) != 1 or not 0 < low <= high[0]:
            raise BadInput(f"--{name}: give the least and the largest value, both above 0")
    task = open_task(cfg)
    cfg, rows = fill_attack(cfg), []
    bases = {each.seed: (each, foundation("base", each, task)) for each in seeds(cfg)}
    with autocast(cfg):
        retain = statistics.mean(task.score(model, ("retain",), "val")["retain"]
                                 for _, (model, _) in bases.values())
    for method in cfg.methods:
        tried = []
        for given in tqdm(draws(cfg, method), desc=method, unit="attempt"):
            try:
                got = [attempt(method, given, each, task, base) for each, base in bases.values()]
            except KeyboardInterrupt as stop:               # fit() speaks of a file that is gone
                raise KeyboardInterrupt(f"stopped in {method}; sweep.json has the methods before "
                                        f"it: give --methods for the others, and another --out",
                                        *stop.args[1:]) from None
            except BadInput as error:                         # it diverged, which is a result, too
                tqdm.write(f"{method}: {error}")
                continue
            tried.append(given | {k: statistics.mean(at[k] for at in got) for k in got[0]})
        if not tried:
            print(f"note: {method} is left out: no attempt ended well")
            continue
        chosen, _ = best(tried, retain, task)
        rows += [{"method": method, "best": i == chosen,
                  "kept": task.within(at["retain"], retain, 0.02)} | at
                 for i, at in enumerate(tried)]
        write_rows("sweep", cfg, task, rows, quiet=method != cfg.methods[0])
    print(f"base: retain {retain:.3f} on val")
    table([row | {k: None if row[k] is None else f"{row[k]:.2g}" for k in ("lr", "retain_weight")}
           | {"own": "-" if row["method"] not in OWN else
              f"{OWN[row['method']]} {row[OWN[row['method']]]:.2g}",
              "kept": "yes" if row["kept"] else "no"} for row in rows if row["best"]],
          {"method": "method", "lr": "rate", "retain_weight": "w", "steps": "steps", "own": "own",
           "retain": "retain", "forget": "forget", "forget_loss": "forget loss",
           "kept": "within 2%"})


if __name__ == "__main__":
    run(main, Config, __doc__)
