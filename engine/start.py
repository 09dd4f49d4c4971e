"""Imported first by every script: what must be so before torch is loaded, which takes seconds.

Threads: between two matrix products OpenMP's threads spin for milliseconds before they sleep. Where
a neighbour wants a core, that takes a third of the speed of a small model or more; to sleep at once
(OMP_WAIT_POLICY=PASSIVE) takes as much on a quiet machine. A short spin is as good as the best of
the two in both: tests/bench.py --only=waiting.
Signals: until run() takes over, Ctrl-C ends a script in one line; there is nothing to lose yet.
"""
import os
import signal
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:                          # the user's own choice stands
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def nothing_is_lost(number, frame):
    name = Path(sys.argv[0]).name
    os.write(2, f"{name}: interrupted before it began; run the same command again\n".encode())
    os._exit(128 + number)


def is_a_script():
    """Whether a script of this checkout is being run, rather than imported by something else. A
    lesson of the workshop counts as something else: run() never takes over there."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    folders = Path(script).resolve().parents if script else ()
    return Path(__file__).parent.parent in folders[:2] and folders[0].name != "workshop"


if is_a_script():
    # Where stdout or stderr is closed, the next file to be opened would get its number, and with it
    # what libraries print there.
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(opened)
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(each, nothing_is_lost)
