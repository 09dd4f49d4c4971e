"""Models on disk, with all that they were made with; missing ones are made.

    model, record = obtain("base", cfg, task, made_with, make)
    model, saved = load(path_of("base", cfg), task)

A seed's models lie in OUT/TASK/seedN/; where a task has variants, in OUT/TASK/VARIANT/seedN/.
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
    """Where fit() leaves a run's state: <name>.resume.pt, until the model is made."""
    path: Path
    made_with: dict


def models_of(cfg):
    """The folder of a seed's models."""
    return Path(cfg.out) / cfg.task / getattr(cfg, "variant", "") / f"seed{cfg.seed}"


def path_of(name, cfg):
    """Of a model by its name (a path that ends in .pt stands for itself)."""
    return Path(name) if name.endswith(".pt") else models_of(cfg) / f"{name}.pt"


def identity(made_with):
    """Twelve hex digits that stand for everything that went into a model."""
    return digest(made_with)[:12]


def read(path, device="cpu"):
    try:
        return read_model(path, device)
    except ValueError as error:
        raise BadInput(str(error)) from None


WAYS_OUT = ": --remake=true makes it again, another --out keeps both"


def same_knobs(path, was, now, other=WAYS_OUT):
    """BadInput where what a file was made with is not what this run asks for."""
    for key in now | was:
        if was.get(key) != now.get(key):
            raise BadInput(f"{path} was made with {key}={was.get(key)}, this run asks for "
                           f"{key}={now.get(key)}{other}")


def load(path, task):
    """(model, the dict saved). BadInput when the file is missing, damaged, or of another task."""
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
    """The model called `name`: from disk, or made and saved if it is missing.

    made_with    everything its weights depend on. A file made with anything else, or damaged, is
                 BadInput; with cfg.remake it is made again, and replaced when the new one is whole
    make(checkpoint)   -> (model, record of fit); the Checkpoint is for fit(), which goes on where a
                 stopped run of the same model ended
    quiet        says nothing: for models of seconds, made by the dozen
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
