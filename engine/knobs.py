"""A command line from a dataclass. A knob is a field with a default, a reason and a range.

    @dataclass
    class Config:
        lr: float = knob(1e-3, "why this matters", low=0, high=1)

    cfg = command_line(Config, "what --help says first")
--help groups knobs by class, under the first sentence of the class's docstring. A knob's annotation
is its type: int, float, str, FilePath, bool, list[...], or `... | None`. The command line writes
None as auto, which means the task's own choice.
"""
import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import typing
from dataclasses import field


class BadInput(Exception):
    """Some input of the user cannot be used. The message is one line: the problem and a way out."""


def knob(default, why, low=None, high=None, choices=None):
    """A dataclass field with a reason and a range. None is shown as auto, the task's own choice."""
    about = {"why": why, "low": low, "high": high, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=about)
    return field(default=default, metadata=about)


def means_nothing(cfg, names, why):
    """BadInput if one of these knobs was given, which a script inherits and has no use for."""
    usual = type(cfg)()
    for name in names:
        if getattr(cfg, name) != getattr(usual, name):
            raise BadInput(f"--{name} means nothing here: {why}")


class Minutes(float):
    """A time in minutes, written with its unit, for example 5m."""

    def __new__(cls, value):
        if isinstance(value, str):
            if not value.endswith("m"):
                raise ValueError
            value = value[:-1]
        return super().__new__(cls, value)

    def __str__(self):
        return f"{float(self):g}m"


class FilePath(str):
    """A path, in which a leading ~ is replaced by the user's home. URLs and names of models stay
    unchanged."""

    def __new__(cls, value):
        return super().__new__(cls, os.path.expanduser(value))


def convert(text, kind):
    """Converts a command-line string to kind: a type, kind | None, or list[kind]. Raises ValueError
    if it cannot."""
    if isinstance(kind, types.UnionType):                 # the first that fits, in float | str
        if text == "auto":
            return None
        for option in typing.get_args(kind):
            try:
                return convert(text, option)
            except (ValueError, TypeError):
                pass
        raise ValueError
    if typing.get_origin(kind) is list:
        return [convert(part, typing.get_args(kind)[0]) for part in text.split(",")]
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    value = kind(text)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def show(value):
    """A value as it is written on a command line: the inverse of convert."""
    if isinstance(value, list):
        return ",".join(map(show, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "auto" if value is None else str(value)


def check(name, value, choices, low, high):
    """Raises BadInput if a knob's value, or one in its list, is outside its choices or range."""
    for v in value if isinstance(value, list) else [value]:
        if choices and isinstance(v, str) and v not in choices:
            raise BadInput(f"--{name}={v}: choose from {', '.join(choices)}")
        if isinstance(v, (int, float)) and not (
                (low is None or v >= low) and (high is None or v <= high)):
            limits = f"at least {low}" if high is None else f"between {low} and {high}"
            raise BadInput(f"--{name}={v} must be {limits}")


def command_line(config, story, argv=None, moved={}):
    """Parses --knob=value (or --knob value) into a `config` dataclass. Raises BadInput for unknown
    knobs and bad values.

    moved   {"--knob=value": the command that replaces it}
    """
    any_task = config
    if hasattr(config, "for_task"):                     # a task may have knobs of its own
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--task", nargs="?", default=config().task)
        chosen = first.parse_known_args(argv)[0].task
        choices = config.__dataclass_fields__["task"].metadata["choices"]
        check("task", chosen, choices, None, None)
        config = config.for_task(chosen)
    asked = " ".join(sys.argv[1:] if argv is None else argv).replace("=", " ") + " "
    for old, new in moved.items():
        if old.replace("=", " ") + " " in asked:
            raise BadInput(f"{old} is a script of its own now: {new}")
    kinds = typing.get_type_hints(config)
    names = {kind: re.sub(r"<class '|'>|engine\.knobs\.", "", str(kind)) for kind in kinds.values()}
    parser = argparse.ArgumentParser(
        description=story, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        usage="%(prog)s [--knob=value ..]", formatter_class=lambda prog: (
            argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=100)))
    classes = config.__mro__[:-1]                                         # its own knobs first
    owner = {name: each for each in classes[::-1] for name in vars(each).get("__annotations__", ())}
    groups = {each: parser.add_argument_group(
        each.__doc__.partition(".")[0] if each.__doc__.startswith("Knobs of") else
        "Knobs of this script") for each in classes if each in owner.values()}
    about = {}
    for f in dataclasses.fields(config):
        if not f.metadata:                              # set by the script, not by the user
            continue
        about[f.name] = dict(f.metadata)
        why, choices = about[f.name].pop("why"), about[f.name]["choices"]
        default = getattr(config(), f.name)
        text = f"{why}{' (' + ' | '.join(choices) + ')' if choices else ''} [{show(default)}]"
        kind = names[kinds[f.name]].split(" |")[0]
        flag = {"nargs": "?", "const": "true"} if kind == "bool" else {}      # --grid: --grid=true
        groups[owner[f.name]].add_argument(f"--{f.name}", metavar=kind,
                                           help=text.replace("%", "%%"), **flag)

    def refuse(message):
        raise BadInput(message)

    parser.error = refuse
    given, unknown = parser.parse_known_args(argv)
    for text in unknown:
        name = text.lstrip("-").split("=")[0]
        near = difflib.get_close_matches(name, about, 1)
        tasks = [task for task in about.get("task", {}).get("choices") or () if any(
            f.name == name and f.metadata for f in dataclasses.fields(any_task.for_task(task)))]
        if tasks:
            raise BadInput(f"--{name} is no knob of the task {chosen}, but of "
                           f"{', '.join(tasks)}: choose one with --task")
        raise BadInput(f"unknown knob {text!r}" + (f": did you mean --{near[0]}?" if near
                                                   else "; --help lists them"))
    values = {}
    for name, text in vars(given).items():
        try:
            values[name] = convert(text, kinds[name])
        except ValueError:
            raise BadInput(f"--{name}={text} is not a {names[kinds[name]]}") from None
        check(name, values[name], **about[name])
    return config(**values)
