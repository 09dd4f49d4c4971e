"""The training loop, checkpoints and command line of every script, and the pretraining story.

    python train.py                        base (retain + forget) and filtered (retain only)
    python train.py --task=language --steps=300

fit() is the only loop. A technique hands it a loss function and perhaps a mask.
"""
import ctypes
import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from tqdm import tqdm

import data
from data.knobs import BadInput, command_line, knob
from data.report import figure, table, write_rows
from model import GPT, GPTConfig, read_model, write_model

say_once = cache(print)

# ---------------------------------------------------------------------------------------------
# command line: one knob a line

@dataclass
class Common:
    """Knobs that every script has."""
    task: str = knob("arithmetic", "what to learn and to forget", choices=list(data.TASKS))
    seed: int = knob(0, "weights, batches and noise are functions of it", 0, 2**31)
    device: str = knob("auto", "auto takes the best there is",
                       choices=["auto", "cuda", "mps", "cpu"])
    compile: bool | None = knob(None, "torch.compile; auto: on CUDA, and where it pays on a CPU")
    out: str = knob("out", "models, rows and pictures go to OUT/TASK/")
    data_dir: str | None = knob(None, "where tokenised text is kept (auto: data/ of this checkout)")
    source: str | None = knob(None, "real stories: a file or URL (auto: download TinyStories)")
    source2: str | None = knob(None, "bilingual: file or URL of the language to forget")
    stories: int | None = knob(None, "most stories to take from a source", 20)
    words: float | None = knob(None, "arithmetic: share of word problems", 0, 1)
    heldout_pairs: float | None = knob(None, "arithmetic: share of operand pairs never shown",
                                        0, 0.5)
    block_size: int | None = knob(None, "T, tokens in a row", 8)
    n_layer: int | None = knob(None, "blocks", 1)
    n_head: int | None = knob(None, "attention heads", 1)
    n_embd: int | None = knob(None, "C, width of the residual stream", 8)


@dataclass
class Config(Common):
    batch_size: int | None = knob(None, "rows in a batch", 1)
    steps: int | None = knob(None, "pretraining steps of the base", 1)
    filtered_steps: int | None = knob(None, "pretraining steps of the filtered model: enough to "
                                      "be as good as base on retain data", 1)
    lr: float | None = knob(None, "AdamW's rate (the embedding)", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    name: str = knob("both", "which model to make", choices=["both", "base", "filtered"])


def run(main, config, story):
    """A script's entry: command line, main(cfg); what the user got wrong is one line and exit 2."""
    keep_memory()
    try:
        main(command_line(config, story))
    except (BadInput, OSError) as error:
        sys.exit(complain(error, 2))
    except KeyboardInterrupt:
        sys.exit(complain("interrupted; models made are kept, run the same command again", 130))


def keep_memory():
    """Tells glibc to keep what is freed. A step's tensors of some MB are otherwise given back to
    the kernel, which hands out zeroed pages again at the next step: 15% of a small CPU step.
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


def common(cfg):
    """The knobs that all scripts share, to build another script's Config from."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Common)}


def fill(cfg, task, section, prefix=""):
    """A copy of cfg in which auto knobs have the task's own values for the section.

    prefix   of the knobs' names, where a script has those of another: base_steps, unlearn_lr
    """
    own = {prefix + k: v for k, v in task.settings[section].items()}
    return dataclasses.replace(cfg, **{f.name: own[f.name] for f in dataclasses.fields(cfg)
                                       if getattr(cfg, f.name) is None and f.name in own})


# ---------------------------------------------------------------------------------------------
# device


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
        return torch.device(kind), torch.bfloat16 if modern else torch.float16, True
    if kind == "mps":
        return torch.device(kind), torch.float32, False
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return torch.device(kind), torch.bfloat16 if bf16 else torch.float32, None


def autocast(cfg):
    device, dtype, _ = hardware(cfg)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


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


# ---------------------------------------------------------------------------------------------
# the loop


# torch counts attention's FLOPs on a GPU only; the shapes are those of q, k and v
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)}


def optimizers(model, lr, muon_lr):
    """Muon for the blocks' matrices and AdamW for the rest, or AdamW for all if muon_lr is 0."""
    blocks = list(model.blocks.parameters()) if muon_lr else []
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    assert len(blocks) + len(rest) == len(list(model.parameters()))
    made = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                              fused=rest[0].device.type in ("cuda", "cpu"))]
    if blocks:
        made.append(torch.optim.Muon(blocks, lr=muon_lr, momentum=0.9, weight_decay=0.0))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def fit(model, loss_fn, cfg, steps, lr, muon_lr=0.0, *, name="fit", decay=0.0, tokens=0, frozen=(),
        evaluate=None, evaluate_at=(), stop=None, after_backward=None, after_step=None):
    """Trains model in place: the one loop of every technique.

    loss_fn(model, step)   a scalar loss; it draws its own batch, a function of the step
    steps, lr, muon_lr     how many steps, at most; peak rates of AdamW and Muon (see optimizers)
    decay                  share of the steps, at the end, over which the rates fall to zero
    tokens                 tokens a step, for the progress bar
    frozen                 other models that loss_fn calls (a teacher): compiled with this one
    evaluate()             figures (a dict) to keep in the history, at the steps in evaluate_at (a
                           set or a range) and at the last
    stop(figures)          ends the run when it says so, after an evaluation
    after_backward()       may change gradients (masks); after_step() may restore parameters
    returns                {"steps", "flops", "seconds", "history": [{"step", "loss", ..}]}; flops
                           count every matrix product of a step: forward, backward, frozen models,
                           and Muon's orthogonalisation, but no evaluations
    raises                 BadInput when the loss is no longer finite
    """
    device, dtype, _ = hardware(cfg)
    made = optimizers(model, lr, muon_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def one_step(step):
        rate = min(1.0, (steps - step) / (decay * steps)) if decay else 1.0
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        with autocast(cfg):
            loss = loss_fn(model, step)
        scaler.scale(loss).backward()
        for optimizer in made:
            scaler.unscale_(optimizer)
        if after_backward:
            after_backward()
        for optimizer in made:
            scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        if after_step:
            after_step()
        return loss.detach()

    def figures():
        if not evaluate:
            return {}
        with torch.no_grad(), autocast(cfg):
            return evaluate()

    history, flops, since, start = [], 0, [], time.time()
    bar = tqdm(total=steps, desc=name, unit="step", leave=False, mininterval=0.5)
    for step in range(steps):
        if step == 0:                          # counted once, eagerly: every step costs the same
            with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
                since.append(one_step(step))
            per_step = counter.get_total_flops()
            if should_compile(cfg, per_step * steps):
                for m in (model, *frozen):
                    m.compile(dynamic=False)
        else:
            since.append(one_step(step))
        flops += per_step
        bar.update()
        last = step == steps - 1
        due = step + 1 in evaluate_at
        if last or due or (step + 1) % 10 == 0:
            loss = torch.stack(since).mean().item()      # the one wait for the device
            since = []
            if not math.isfinite(loss):
                raise BadInput(f"{name}: the loss is {loss} at step {step + 1} with lr={lr:g}, "
                               f"muon_lr={muon_lr:g}: try lower rates; nothing was saved")
            rate = bar.format_dict["rate"]
            bar.set_postfix_str(f"loss {loss:.3f}" + (f" {tokens * rate:,.0f} tokens/s"
                                                      if tokens and rate else ""), refresh=False)
            if last or due:
                history.append({"step": step + 1, "loss": loss, "flops": flops} | figures())
                if stop and stop(history[-1]):
                    break
    bar.close()
    return {"steps": step + 1, "flops": flops, "seconds": time.time() - start, "history": history}


# ---------------------------------------------------------------------------------------------
# models on disk: OUT/TASK/NAME.pt


def path_of(name, cfg):
    return Path(name) if name.endswith(".pt") else Path(cfg.out) / cfg.task / f"{name}.pt"


def identity(made_with):
    """Twelve hex digits that stand for everything that went into a model."""
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:12]


def load(path, task):
    """(model, checkpoint dict). BadInput when the file is missing, damaged, or of another task."""
    try:
        model, checkpoint = read_model(path, task.device)
    except ValueError as error:
        raise BadInput(str(error)) from None
    made_with = checkpoint["made_with"]
    if made_with["task"] != task.name:
        raise BadInput(f"{path} was trained on {made_with['task']}, not on {task.name}: choose "
                       f"another --model, --task or --out")
    if made_with["data"] != task.data_id or model.config.vocab_size != task.vocab_size:
        raise BadInput(f"{path} was trained on other data of {task.name} (other text or "
                       f"vocabulary): delete it to make it again, or choose another --out")
    return model, checkpoint


def obtain(name, cfg, task, made_with, make):
    """The model called `name`: from disk, or made and saved if it is missing.

    made_with   everything its weights depend on; a file made with anything else is BadInput
    make()      -> (model, record of fit)
    """
    path = path_of(name, cfg)
    made_with = json.loads(json.dumps({"task": task.name, "data": task.data_id} | made_with))
    if path.exists():
        model, checkpoint = load(path, task)
        for key in made_with | checkpoint["made_with"]:
            was, now = checkpoint["made_with"].get(key), made_with.get(key)
            if was != now:
                raise BadInput(f"{path} was made with {key}={was}, this run asks for {key}={now}: "
                               f"delete it to make it again, or choose another --out")
        return model, checkpoint
    print(f"{name}: making {path}")
    model, record = make()
    write_model(path, model, made_with, record)
    return model, {"made_with": made_with} | record


# ---------------------------------------------------------------------------------------------
# the pretraining story


def open_task(cfg):
    knobs = {k: getattr(cfg, k) for k in ("source", "source2", "stories", "words", "heldout_pairs")}
    task = data.load(cfg.task, cfg.data_dir, cfg.block_size, hardware(cfg)[0], **knobs)
    folder = Path(cfg.out) / cfg.task               # a bad --out is noticed now, not after training
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise BadInput(f"--out={cfg.out}: cannot write in {folder}")
    return task


def new_model(cfg, task):
    """An untrained GPT, a function of the seed."""
    size = {k: getattr(cfg, k) for k in ("n_layer", "n_head", "n_embd")}
    try:
        model = GPT(GPTConfig(task.vocab_size, task.block_size, **size))
    except ValueError as error:
        raise BadInput(str(error)) from None
    model.init_weights(cfg.seed)
    return model.to(task.device)


def pretrain(name, cfg, task):
    """base learns from retain and forget data; filtered, the gold standard, from retain alone.

    filtered_steps are set so that it is as good as base on retain data: what retraining with
    perfect labels costs. It takes more retain rows than base sees, which learns from both.
    """
    cfg = fill(cfg, task, "train")
    split = "all" if name == "base" else "retain"
    steps = cfg.steps if name == "base" else cfg.filtered_steps
    made_with = {k: getattr(cfg, k) for k in ("seed", "n_layer", "n_head", "n_embd", "batch_size",
                                              "lr", "muon_lr")}
    made_with |= {"block_size": task.block_size, "split": split, "steps": steps}

    def make():
        model = new_model(cfg, task)

        def loss_fn(model, step):
            return model(*task.batch(split, cfg.batch_size, step, cfg.seed))

        record = fit(model, loss_fn, cfg, steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8,
                     tokens=cfg.batch_size * task.block_size,
                     evaluate_at=range(0, steps, max(steps // 40, 1)),
                     evaluate=lambda: task.score(model, ("retain",), quick=True))
        return model, record

    return obtain(name, cfg, task, made_with, make)


def main(cfg):
    task = open_task(cfg)
    cfg = fill(cfg, task, "train")
    rows = []
    for name in ("base", "filtered") if cfg.name == "both" else (cfg.name,):
        model, record = pretrain(name, cfg, task)
        with autocast(cfg):
            rows.append({"model": name} | task.score(model)
                        | {"flops": record["flops"], "history": record["history"]})
    table(rows, {k: k for k in rows[0] if k not in ("flops", "history")})
    write_rows("train", cfg, task, rows)
    with figure("train", cfg, 2) as axes:
        if axes is not None:
            for row in rows:
                for ax, key, label in ((axes[0], "loss", "training loss (nats per token)"),
                                       (axes[1], "retain", "retain score, held out")):
                    ax.plot([h["step"] for h in row["history"]],
                            [h[key] for h in row["history"]], label=row["model"])
                    ax.set(xlabel="step", ylabel=label)
                    ax.legend()


if __name__ == "__main__":
    run(main, Config, __doc__)
