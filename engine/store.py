"""Models on disk, each with everything that it was made with. Missing models are made.

    model, record = obtain("base", cfg, task, made_with, make)
    model, saved = load(path_of("base", cfg), task)

A seed's models are in OUT/TASK/seedN/, or in OUT/TASK/VARIANT/seedN/ if the task has variants.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from engine.disk import digest
from engine.knobs import BadInput
from engine.process import RANK
from model import read_model, write_model


@dataclass
class Checkpoint:
    """Where fit() keeps a run's state until the model is made: <name>.resume.pt."""
    path: Path
    made_with: dict


def models_of(cfg):
    """The folder of a seed's models."""
    return Path(cfg.out) / cfg.task / getattr(cfg, "variant", "") / f"seed{cfg.seed}"


def path_of(name, cfg):
    """The path of a model with this name. A name that ends in .pt is a path already."""
    return Path(name) if name.endswith(".pt") else models_of(cfg) / f"{name}.pt"


def identity(made_with):
    """Twelve hex digits that identify everything a model was made with."""
    return digest(made_with)[:12]


def read(path, device="cpu"):
    try:
        return read_model(path, device)
    except ValueError as error:
        raise BadInput(str(error)) from None


WAYS_OUT = ": --remake=true makes it again, another --out keeps both"


def same_knobs(path, was, now, other=WAYS_OUT):
    """Raises BadInput if a file was made with other knobs than this run asks for."""
    for key in now | was:
        if was.get(key) != now.get(key):
            raise BadInput(f"{path} was made with {key}={was.get(key)}, this run asks for "
                           f"{key}={now.get(key)}{other}")


def load(path, task):
    """(model, its record). Raises BadInput if the file is missing, damaged, or of another task."""
    model, saved = read(path, task.device)
    made_with = saved["made_with"]
    if made_with["task"] != task.name:
        raise BadInput(f"{path} was trained on {made_with['task']}, not on {task.name}: choose "
                       f"another --model, --task or --out")
    if made_with["data"] != task.data_id or model.config.vocab_size != task.vocab_size:
        raise BadInput(f"{path} was trained on other data of {task.name} (other text or "
                       f"vocabulary){WAYS_OUT}")
    return model, saved


def obtain(name, cfg, task, made_with, make, quiet=False):
    """The model called `name`: read from disk, or made and saved if it is missing.

    made_with    everything that its weights depend on. Raises BadInput if the file was made with
                 something else or is damaged. With cfg.remake, the model is made again instead,
                 and the file is replaced once the new model is complete
    make(checkpoint)   -> (model, record of fit). The Checkpoint is for fit(), which continues where
                 a stopped run of the same model ended
    quiet        prints nothing, for the many models that take only seconds to make
    """
    path = path_of(name, cfg)
    made_with = json.loads(json.dumps({"task": task.name, "data": task.data_id} | made_with))
    checkpoint = Checkpoint(path.with_suffix(".resume.pt"), made_with)
    if path.exists():
        try:
            model, saved = load(path, task)
            same_knobs(path, saved["made_with"], made_with)
            if RANK == 0:
                checkpoint.path.unlink(missing_ok=True)
            return model, saved
        except BadInput:
            if not cfg.remake:
                raise
    goes_on = checkpoint.path.exists() and cfg.resume is not False and not cfg.remake
    if not quiet:
        print(f"{name}: " + (f"going on from {checkpoint.path}" if goes_on else
                           f"making {path}"))
    model, record = make(checkpoint)
    if RANK == 0:
        write_model(path, model, made_with, record)
        checkpoint.path.unlink(missing_ok=True)
    return model, {"made_with": made_with} | record
