"""Routes one token's prediction through one residual dimension, which can then steer the model.

    python -m experiments.steer                        " takes" on the language task
    python -m experiments.steer --token=" Rome" --seeds=3

Where the next token is the chosen one, the residual of the middle layers passes gradient through
one dimension only. The model therefore has to predict this token through that dimension (Cloud et
al. 2024, section 4.1.2).
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.hardware import autocast
from engine.knobs import BadInput, knob
from engine.process import run
from engine.report import picture, table, write_rows
from engine.store import obtain
from engine.streams import seed_of
from route import SETTINGS as ROUTE_SETTINGS
from route import recipe, route
from train import SETTINGS, Common, fill, fit, new_model, open_task, seeds


@dataclass
class Config(Common):
    task: str = knob("language", "what to learn", choices=["language", "tinystories", "bilingual"])
    seeds: int = knob(1, "how many seeds, from --seed on", 1)
    steps: int | None = knob(None, "training steps of the routed model and of the control", 1)
    batch_size: int | None = knob(None, "rows in a batch", 2, 2**31)
    lr: float | None = knob(None, "AdamW's rate", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    token: list[str] | None = knob(None, "the token or tokens, as text, with the space before")
    push: float = knob(2.0, "size of the largest push, in mean lengths of the residual", 0)


TOKENS = {"language": {"token": [" takes"]}, "tinystories": {"token": [" forest"]},
          "bilingual": {"token": [" forest"]}}                          # by task
LANE = 0                     # the residual dimension through which the prediction is routed


def steered(name, ids, task, cfg):
    """(model, record), read from disk or made. At positions whose next token is one of ids, the
    residual of the middle layers passes gradient through dimension LANE only (Cloud et al. 2024,
    section 4.1.2).

    name   "routed", or "control" for the same training without the mask. Both start from the same
           weights and see the same rows
    """
    middle = middle_layers(cfg)
    lane = torch.arange(cfg.n_embd, device=task.device) == LANE

    def make(checkpoint):
        model = new_model(cfg, task, "steer")

        def loss_fn(model, step):
            idx, targets = task.batch("all", cfg.batch_size, step, seed_of("steer", cfg.seed))
            m = (lane | ~torch.isin(targets, ids)[:, :, None])                       # (B, T, C)

            def hook(site, i, h):
                return route(h, m.to(h.dtype)) if site == "residual" and i in middle else h

            return model(idx, targets, hook=hook if name == "routed" else None)

        return model, fit(model, loss_fn, cfg, cfg.steps, cfg.lr, cfg.muon_lr, name=name,
                          decay=0.8, tokens=cfg.batch_size * task.block_size, checkpoint=checkpoint)

    made_with = recipe(cfg, task) | ({"token": ids.tolist()} if name == "routed" else {})
    return obtain(f"steer-{name}", cfg, task, made_with, make)


def middle_layers(cfg):
    """The blocks after which the residual is routed. In the paper, these are 6 to 18 of 20."""
    return range(cfg.n_layer // 3, cfg.n_layer - 1)


PUSHES = (-1, -0.5, -0.25, -0.1, 0, 0.1, 0.25, 0.5, 1)          # in units of cfg.push


def measure(model, ids, task, cfg):
    """Measures what dimension LANE does in a model: which tokens' unembedding rows lie along it,
    and how pushing it changes the mean probability of ids over held-out positions (docs/rows.md).
    """
    rows = model.wte.weight[:task.vocab_size].detach().float()
    along = rows[:, LANE] / rows.norm(dim=1)                     # cosine with the dimension, (V,)
    sign = along[ids[along[ids].abs().argmax()]].sign()          # "up" is towards the token
    order = (sign * along).argsort(descending=True)
    idx, targets = task.batch("all", 64, 0, seed_of("held out"), "test")
    layer = middle_layers(cfg)[-1]
    length = model(idx, residual=layer + 1).float().norm(dim=-1).mean()
    up = F.one_hot(torch.tensor(LANE), rows.size(1)).to(task.device) * sign * length * cfg.push

    def pushed(s):
        return lambda site, i, h: (h + s * up.to(h.dtype)
                                   if site == "residual" and i == layer else h)

    def likely(logits, _):
        return logits.softmax(-1)[:, ids].sum()

    def sample(s):
        new = model.generate([[task.end, *idx[0, 1:9].tolist()]], min(24, task.block_size - 9), 1.0,
                             task.end, cfg.seed, hook=pushed(s))[0].tolist()
        return task.tokenizer.decode([i for i in new if i != task.end])

    curve = {s: model(idx, targets, criterion=likely, hook=pushed(s)).item() for s in PUSHES}
    return {"rank": 1 + min((order == i).nonzero().item() for i in ids),
            "neighbours": [task.tokenizer.decode([i]) for i in order[:6].tolist()],
            "prob_down": curve[-1], "prob": curve[0], "prob_up": curve[1],
            "curve": {f"{s * cfg.push:g}": p for s, p in curve.items()},
            "sample_down": sample(-0.1), "sample": sample(0), "sample_up": sample(0.1)}


def main(cfg):
    task = open_task(cfg)
    for settings in (TOKENS, ROUTE_SETTINGS, SETTINGS):
        cfg = fill(cfg, settings)
    if not middle_layers(cfg):
        raise BadInput(f"--n_layer={cfg.n_layer}: steering needs 2 blocks or more")
    ids = []
    for text in cfg.token:
        tokens = task.tokenizer.encode_ordinary(text)
        if len(tokens) != 1:
            raise BadInput(f"--token: {text!r} is {len(tokens)} tokens of this vocabulary: choose "
                           f"a text that is one token (most words have a space before them)")
        ids += tokens
    ids = torch.tensor(ids, device=task.device)
    rows = []
    for each in seeds(cfg):
        for name in ("routed", "control"):
            model, _ = steered(name, ids, task, each)
            with torch.no_grad(), autocast(cfg):
                rows.append({"model": name, "seed": each.seed} | measure(model, ids, task, each))

    def draw(ax):
        for row in rows:
            ax.plot([float(s) for s in row["curve"]], list(row["curve"].values()), marker="o",
                    label=row["model"] if row in rows[:2] else None,
                    color={"routed": "#0072B2", "control": "#D55E00"}[row["model"]])
        ax.set(xlabel="push along one residual dimension (lengths of the residual)",
               ylabel=f"mean probability of {' or '.join(map(repr, cfg.token))}",
               yscale="log", title="One dimension, one token")
        ax.legend()

    write_rows("steer", cfg, task, rows)
    picture("steer", cfg, draw)
    table([row | {"neighbours": " ".join(map(repr, row["neighbours"]))} for row in rows],
          {"model": "model", "seed": "seed", "rank": "rank", "prob_down": f"P pushed -{cfg.push:g}",
           "prob": "P", "prob_up": f"P pushed +{cfg.push:g}",
           "neighbours": "nearest unembedding rows"}, digits=4)
    for row in rows[:2]:
        for key, s in (("sample_down", -0.1), ("sample", 0), ("sample_up", 0.1)):
            print(f"{row['model']}, pushed {s * cfg.push:+g}: {row[key]!r}")


if __name__ == "__main__":
    run(main, Config, __doc__)
