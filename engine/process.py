"""A script as a process: how it starts, stops and ends, alone or as one of several processes.

torchrun starts the same script several times. Environment variables tell each process its number.
"""
import ctypes
import os
import re
import signal
import sys
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.knobs import BadInput, command_line


def launched(env):
    """(rank, world, local rank) from torchrun's variables in env. A single process is (0, 1, 0),
    whatever RANK is. Raises BadInput if only some of the variables are set."""
    if env.get("WORLD_SIZE", "") in ("", "1"):
        return 0, 1, 0
    needed = "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"
    said = {name: env.get(name, "") for name in ("WORLD_SIZE", *needed)}
    wrong = [name for name in said if not said[name] or (
        not name.startswith("MASTER_ADDR") and not said[name].isdecimal())]
    if not wrong and int(said["RANK"]) >= int(said["WORLD_SIZE"]):
        wrong = ["RANK"]
    if wrong:
        raise BadInput("torchrun's environment variables are incomplete or wrong: " + ", ".join(
            f"{name}={said[name]}" if said[name] else f"no {name}" for name in wrong)
            + f", with WORLD_SIZE={said['WORLD_SIZE']}; start several processes with torchrun, or "
            "unset WORLD_SIZE for one process")
    return tuple(int(said[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))


# RANK: the number of this process; process 0 reports and writes. WORLD: the number of processes.
# LOCAL_RANK: the number of the GPU, on this machine, that this process uses
try:
    RANK, WORLD, LOCAL_RANK = launched(os.environ)
except BadInput:                                    # run() will report it
    RANK, WORLD, LOCAL_RANK = 0, 1, 0


def run(main, config, story, moved={}):
    """Runs a script: parses the command line and calls main(cfg). A mistake of the user gives one
    line and exit status 2."""
    reuse_memory()
    with consoles():
        perform(main, config, story, moved)


def perform(main, config, story, moved):
    try:
        signal.signal(signal.SIGTERM, end_at_once)
        if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == "engine.start":
            signal.signal(signal.SIGINT, signal.default_int_handler)
        launched(os.environ)
        cfg = command_line(config, story, moved=moved)
        if WORLD > 1:
            dist.init_process_group()
        main(cfg)
    except (BadInput, OSError) as error:
        sys.exit(complain(error, 2))
    except KeyboardInterrupt as stop:
        by, = stop.args[1:] or [signal.SIGINT]
        sys.exit(complain(stop.args[0] if stop.args else "interrupted; models that were made are "
                          "kept, run the same command again", 128 + by))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("(out of|allocate) memory",
                                                                str(error)):
            raise
        sys.exit(complain("out of memory: a smaller --batch_size, --block_size or model needs "
                          "less; the files on disk are complete", 2))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class Console:
    """An output stream that never fails. Characters that it cannot show are replaced. If its pipe
    is closed, its disk is full, or it was closed from the start, the text is lost and the run
    continues.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text):
        return self.attempt("write", text)

    def flush(self):
        self.attempt("flush")

    def attempt(self, what, *given):
        try:
            return getattr(self.stream, what)(*given)
        except (OSError, ValueError):
            # otherwise Python would try to write the rest of the buffer again when it ends
            with suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def consoles():
    """Makes stdout and stderr Consoles. With torchrun, only the first process prints to stdout."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Console(None if RANK else sys.stdout), Console(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def end_at_once(number, frame):
    raise KeyboardInterrupt("terminated; models that were made are kept, run the same command "
                            "again", number)


@contextmanager
def deferred_signals():
    """Inside the `with`, SIGINT and SIGTERM do not end the program. They are appended to the list
    that this yields, so that a step can be finished and saved. A second signal ends the program."""
    asked, before = [], {}

    def ask(number, frame):
        asked.append(number)
        if WORLD == 1:                              # with torchrun, each signal arrives twice
            restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    main = threading.current_thread() is threading.main_thread()      # only it may set handlers
    for number in (signal.SIGINT, signal.SIGTERM) if main else ():
        before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()
    if asked:                                       # a signal that nobody has handled
        signal.raise_signal(asked[0])


def reuse_memory():
    """Tells glibc to keep freed memory. Otherwise a step's tensors of some MB are returned to the
    kernel, which gives out zeroed pages again at the next step. This costs 15% of a small CPU step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):              # not glibc
        return
    mallopt(-3, 32 << 20)                                     # M_MMAP_THRESHOLD, its largest value
    mallopt(-1, 1 << 30)                                      # M_TRIM_THRESHOLD


def complain(message, status):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status


def data_parallel(model):
    """The model, with gradients averaged over all processes while they are computed."""
    with warnings.catch_warnings():                 # torch 2.13 renames the argument
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, static_graph=True)


def any_process(yes, device):
    """Whether `yes` is true in any of the processes."""
    count = torch.tensor(float(yes), device=device)
    dist.all_reduce(count)
    return count.item() > 0
