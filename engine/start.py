"""Imported first by every script: what must be so before torch is loaded, which takes seconds.

Threads: two that spin while they wait for work are slower by half and more where something else
wants their core; tests/bench.py --only=waiting measures it, on a quiet machine and on a busy one.
Signals: until run() takes over, Ctrl-C ends a script in one line; there is nothing to lose yet.
"""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")             # the user's own value stands


def nothing_is_lost(number, frame):
    name = Path(sys.argv[0]).name
    os.write(2, f"{name}: interrupted before it began; run the same command again\n".encode())
    os._exit(128 + number)


def is_a_script():
    """Whether a script of this checkout is being run, rather than imported by something else."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return bool(script) and Path(__file__).parent.parent in Path(script).resolve().parents[:2]


if is_a_script():
    # Where stdout or stderr is closed, the next file to be opened would get its number, and with it
    # what libraries print there.
    while (opened := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(opened)
    for each in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(each) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(each, nothing_is_lost)
