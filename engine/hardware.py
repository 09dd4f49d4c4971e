"""What a run computes on: the device, its precision, whether to compile; and what it costs."""
import os
import shutil
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


def hardware(cfg):
    """(device, dtype, may compile), from this table. dtype is what autocast computes in.

    device   which                      dtype                        compile
    cuda     capability >= 8.0          bfloat16                     yes
    cuda     older, such as Colab's T4  float16, gradients scaled    yes
    mps      Apple                      float32                      no
    cpu      with bf16 instructions     bfloat16                     if the run is long enough
    cpu      others                     float32                      if the run is long enough
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    kind = next(k for k in there if there[k]) if cfg.device == "auto" else cfg.device
    if not there[kind]:
        raise BadInput(f"--device={kind}: this machine, or this build of torch, has none; "
                       f"try --device=auto")
    if kind == "cuda":
        modern = torch.cuda.get_device_capability() >= (8, 0)
        torch.cuda.set_device(LOCAL_RANK)
        return torch.device(kind, LOCAL_RANK), torch.bfloat16 if modern else torch.float16, True
    if kind == "mps":
        return torch.device(kind), torch.float32, False
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.device(kind), torch.bfloat16 if bf16 else torch.float32, None


def autocast(cfg, **how):
    device, dtype, _ = hardware(cfg)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32, **how)


WORTH_COMPILING = 3e13      # FLOPs: below, a CPU spends more on compiling (20-45 s) than it gains


def should_compile(cfg, flops):
    """Whether fit() compiles a run of so many FLOPs; says once why not."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    device, _, may = hardware(cfg)
    if device.type == "cpu" and cfg.compile and not compiler:
        raise BadInput("--compile=true needs a C++ compiler on a CPU, and there is none (g++)")
    if cfg.compile is not None:
        return cfg.compile
    if may is None:
        may = bool(compiler) and flops >= WORTH_COMPILING
        if not may:
            say_once("compile: off, " + ("runs this short do not pay for it" if compiler
                                         else "no C++ compiler"))
    return may


def counting_flops():
    """Counts the FLOPs of every matrix product inside it: .get_total_flops()."""
    # torch counts attention's on a GPU only; the shapes are those of q, k and v
    cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
           lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
           lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}
    return FlopCounterMode(display=False, custom_mapping=cpu)
