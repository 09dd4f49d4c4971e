"""What a run computes on: the device, its precision, whether to compile; and what it costs."""
import ctypes
import gc
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from functools import cache

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from engine.knobs import BadInput
from engine.process import LOCAL_RANK

say_once = cache(print)


@cache
def multiplies_bf16(device):
    """Whether products of matrices are faster in bfloat16 than in float32 on a device.

    GPUs from capability 8.0 on have matrix units for it. On a CPU, instructions for bfloat16 say
    little: products took 0.4 to 2 times as long as in float32. So a few are tried (20 ms).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    seconds = {}
    for dtype in 5 * (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        start = time.perf_counter()
        x @ x
        seconds[dtype] = min(time.perf_counter() - start, seconds.get(dtype, math.inf))
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def hardware(cfg):
    """(device, dtype, may compile), from this table. dtype is what autocast computes in; whether
    compiling pays is for should_compile to say.

    device   which                      dtype                        may compile
    cuda     capability >= 8.0          bfloat16                     yes
    cuda     older, such as Colab's T4  float16, gradients scaled    yes
    mps      Apple                      float32                      no
    cpu      bfloat16 is faster         bfloat16                     yes
    cpu      others                     float32                      yes
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    kind = next(k for k in there if there[k]) if cfg.device == "auto" else cfg.device
    if not there[kind]:
        raise BadInput(f"--device={kind}: this machine, or this build of torch, has none; "
                       f"try --device=auto")
    if kind == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
        device = torch.device(kind, LOCAL_RANK)
        return device, torch.bfloat16 if multiplies_bf16(device) else torch.float16, True
    device = torch.device(kind)
    return device, torch.bfloat16 if multiplies_bf16(device) else torch.float32, kind == "cpu"


def autocast(cfg, **how):
    device, dtype, _ = hardware(cfg)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, **how)


# Compiling a kind of step takes 5 to 30 seconds. On a CPU it then takes half the time, which goes
# with its FLOPs; on a GPU a small step waits for its launches, some 10 ms, whatever it computes.
WORTH_COMPILING = {"cpu": 5e12, "cuda": 2000}               # FLOPs; steps


def should_compile(cfg, steps, flops):
    """Whether fit() compiles a kind of step, of which a script takes so many, of so many FLOPs in
    all; says once why not."""
    if cfg.compile is False:
        return False
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    device, _, may = hardware(cfg)
    if device.type == "cpu" and not compiler:
        if cfg.compile:
            raise BadInput("--compile=true needs a C++ compiler on a CPU, and there is none (g++)")
        say_once("compile: off, no C++ compiler")
        return False
    pays = device.type in WORTH_COMPILING and (
        flops if device.type == "cpu" else steps) >= WORTH_COMPILING[device.type]
    if may and not pays and not cfg.compile:
        say_once("compile: off where runs are too short to pay for it")
    return bool(cfg.compile or may and pays)


def make_room():
    """Lets torch compile for every model and technique of a process. It counts what it compiled by
    the code that was compiled, GPT.forward say, whose ninth kind would run uncompiled."""
    import torch._dynamo  # noqa: I001  (takes a second)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if torch.__version__ < "2.13":                           # there it breaks at chunks of logits
        torch._dynamo.config.optimize_ddp = False


def compile_in_place(model, mode=None):
    """model.compile(). On a CPU its kernels then add in a fixed order: without that, two threads
    add an embedding's gradients in the order in which they come, and no run can be repeated."""
    make_room()
    if next(model.parameters()).device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False           # which costs time
    model.compile(dynamic=False, mode=mode)


def compiled(function):
    make_room()
    return torch.compile(function, dynamic=False, fullgraph=True)


def eagerly():
    """A context in which compiled models run as they are written: scores have shapes of their own,
    and are few."""
    return (torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules
            else nullcontext())


def to_device(x, device):
    """x (a tensor on the CPU) on a device; the host does not wait until a GPU has it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def trim():
    """Gives freed memory back to the system: what is only in cycles of references, too, and what
    glibc keeps, in pieces that a large model's next tensors do not fit."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):                    # another C library
        pass


def counting_flops():
    """Counts the FLOPs of every matrix product inside it: .get_total_flops()."""
    # torch counts attention's on a GPU only; the shapes are those of q, k and v
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
           lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
           lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
    return FlopCounterMode(display=False, custom_mapping=cpu)
