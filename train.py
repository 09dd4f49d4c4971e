"""The training loop, checkpoints and command line of every script, and the pretraining story.

    python train.py                        base (retain + forget) and filtered (retain only)
    python train.py --task=language --steps=300
    torchrun --nproc_per_node=2 train.py   the same batches, divided over two processes

fit() is the only loop. A technique hands it a loss function and perhaps a mask.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import math
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import data
from data import gaming
from engine.disk import alone, remove_leftovers
from engine.hardware import autocast, counting_flops, hardware, should_compile
from engine.knobs import BadInput, FilePath, Minutes, knob
from engine.process import RANK, WORLD, anywhere, patience, run, together
from engine.report import picture, table, write_rows
from engine.store import obtain, read, same_knobs
from engine.streams import seed_of, torch_stream
from model import GPT, GPTConfig, write_model


# --- command line: one knob a line ---------------------------------------------------------------
@dataclass
class Basic:
    """Knobs of a run, which every script has."""
    seed: int = knob(0, "weights, batches and noise are functions of it", 0, 2**31)
    device: str = knob("auto", "auto takes the best there is",
                       choices=["auto", "cuda", "mps", "cpu"])
    compile: bool | None = knob(None, "torch.compile; auto: on CUDA, and where it pays on a CPU")
    out: FilePath = knob("out", "models, rows and pictures go to OUT/TASK/")
    save_every: int | Minutes = knob(Minutes("1m"), "between checkpoints of a run: steps (500) or "
                                     "minutes (1m); 0: none", 0)
    resume: bool | None = knob(None, "go on from a stopped run's checkpoint; auto: where there is "
                               "one; false: start anew")
    remake: bool = knob(False, "make models again whose files were made with other knobs")


@dataclass
class Common(Basic):
    """Knobs of the task and of the model."""
    task: str = knob("arithmetic", "what to learn and to forget", choices=list(data.TASKS))
    data_dir: FilePath | None = knob(None, "where tokenised text is kept (auto: data/ of this "
                                     "checkout)")
    source: FilePath | None = knob(None, "real stories: a file or URL (auto: download TinyStories)")
    source2: FilePath | None = knob(None, "bilingual: file or URL of the language to forget")
    stories: int | None = knob(None, "most stories to take from a source", 20)
    words: float | None = knob(None, "arithmetic: share of word problems", 0, 1)
    heldout_pairs: float | None = knob(None, "arithmetic: share of operand pairs never shown",
                                        0, 0.5)
    prior: str | None = knob(None, "pcfg: how often pretraining asks for a, b and c",
                             choices=["low", "medium", "high"])
    env: str | None = knob(None, "gaming: which environment", choices=list(gaming.ENVIRONMENTS))
    hack_rates: list[float] | None = knob(None, "gaming: how often pretraining games under "
                                          "discouraging, neutral, encouraging phrases", 0, 1)
    block_size: int | None = knob(None, "T, tokens in a row", 8, 2**20)
    n_layer: int | None = knob(None, "blocks", 1, 1000)
    n_head: int | None = knob(None, "attention heads", 1, 2**20)
    n_embd: int | None = knob(None, "C, width of the residual stream", 8, 2**20)


@dataclass
class Config(Common):
    batch_size: int | None = knob(None, "rows in a batch", 1, 2**31)
    steps: int | None = knob(None, "pretraining steps of the base", 1)
    filtered_steps: int | None = knob(None, "pretraining steps of the filtered model: enough to "
                                      "be as good as base on retain data", 1)
    lr: float | None = knob(None, "AdamW's rate (the embedding)", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    name: str = knob("both", "which model to make", choices=["both", "base", "filtered"])


def common(cfg):
    """The knobs that all scripts share, to build another script's Config from."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Common)}


def fill(cfg, task, section, prefix=""):
    """A copy of cfg in which auto knobs have the task's own values for the section.

    prefix   of the knobs' names, where a script has those of another: base_steps, unlearn_lr
    """
    own = {prefix + k: v for k, v in task.settings.get(section, {}).items()}
    return dataclasses.replace(cfg, **{f.name: own[f.name] for f in dataclasses.fields(cfg)
                                       if getattr(cfg, f.name) is None and f.name in own})


def seeds(cfg):
    """cfg once for each seed; the later ones' models live in OUT/TASK/seedN."""
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        out = cfg.out if seed == cfg.seed else f"{cfg.out}/{cfg.task}/seed{seed}"
        yield dataclasses.replace(cfg, seed=seed, out=out)


# --- the loop ------------------------------------------------------------------------------------
def optimizers(model, lr, muon_lr, pieces=()):
    """(Muon for the blocks' matrices and AdamW for the rest, or AdamW for all if muon_lr is 0;
    [(leaf, matrix, piece)]: what Muon takes for matrices of their own, see fit).
    """
    blocks = [p for p in model.blocks.parameters() if p.ndim == 2] if muon_lr else []
    inside, apart = {id(p) for p in blocks}, {id(p) for p, _ in pieces}
    rest = [p for p in model.parameters() if id(p) not in inside]
    assert len(blocks) + len(rest) == len(list(model.parameters()))
    made = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0,
                              fused=rest[0].device.type in ("cuda", "cpu"))]
    leaves = [(torch.nn.Parameter(p.detach()[at]), p, at) for p, at in pieces if id(p) in inside]
    assert sum(leaf.numel() for leaf, *_ in leaves) == sum(
        p.numel() for p in blocks if id(p) in apart)                       # each entry once
    if blocks:
        made.append(torch.optim.Muon([p for p in blocks if id(p) not in apart]
                                     + [leaf for leaf, *_ in leaves],
                                     lr=muon_lr, momentum=0.9, weight_decay=0.0))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made, leaves


class Run:
    """All that a run is besides its model: what a checkpoint must hold for the rest of it to be
    the same to the last bit. Batches are functions of the step, so there is no other state.
    """

    def __init__(self, model, cfg, lr, muon_lr, pieces=()):
        self.model, self.cfg = model, cfg
        self.device, dtype, _ = hardware(cfg)
        self.autocast = autocast(cfg)           # one for all steps: asking what is there takes time
        self.optimizers, self.leaves = optimizers(model, lr, muon_lr, pieces)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.steps = self.skipped = self.flops = 0
        self.cost = None                        # FLOPs of (a loss with its gradients, an update)
        self.over = self.recorded = False
        self.seconds = 0.0
        # since: [loss, gradient norm, whether it was skipped] of each of the last few steps
        self.history, self.since = [], []
        self.saved, self.saved_at = 0, time.time()

    def record(self):
        return {k: getattr(self, k) for k in ("steps", "skipped", "flops", "seconds", "history")}

    def save(self, keep):
        if RANK == 0:
            write_model(keep.path, self.model, keep.made_with, self.record(), run={
                "optimizers": [o.state_dict() for o in self.optimizers],
                "scaler": self.scaler.state_dict(), "cost": self.cost, "skipped": self.skipped,
                "since": [x.tolist() for x in self.since], "seconds": self.seconds,
                "over": self.over})
        self.saved, self.saved_at = self.steps, time.time()

    def resume(self, keep):
        """Goes on where keep's file ends, if there is one and the knobs are the same."""
        if self.cfg.resume is False or not keep.path.exists():
            return
        try:
            model, checkpoint = read(keep.path)
            same_knobs(keep.path, checkpoint["made_with"], keep.made_with,
                       "; --resume=false starts anew")
        except BadInput:
            if not self.cfg.remake:
                raise
            return
        try:
            run = checkpoint["run"]
            for optimizer, state in zip(self.optimizers, run["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.scaler.load_state_dict(run["scaler"])
            self.since = [torch.tensor(x, device=self.device) for x in run["since"]]
            self.over, self.cost, self.skipped, self.seconds = (
                run[k] for k in ("over", "cost", "skipped", "seconds"))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BadInput(f"{keep.path} is not the checkpoint of a run ({type(error).__name__}): "
                           f"--resume=false starts anew") from None
        self.model.load_state_dict(model.state_dict())
        self.steps, self.flops = checkpoint["steps"], checkpoint["flops"]
        self.history, self.saved = checkpoint["history"], self.steps

    def compile(self, models):
        """Fuses each model's kernels. On a GPU, where small models wait for their launches, a step
        is recorded once and replayed (CUDA graphs)."""
        self.recorded = WORLD == 1 and self.device.type == "cuda"
        for model in models:
            model.compile(dynamic=False, mode="reduce-overhead" if self.recorded else None)

    def due(self):
        """Whether --save_every has passed; minutes are looked at every tenth step."""
        every = self.cfg.save_every
        if isinstance(every, Minutes):
            return every and self.steps % 10 == 0 and time.time() - self.saved_at > 60 * every
        return every and self.steps % every == 0

    def step(self, loss_fn, model, after_backward, after_step, rate):
        """One step of every optimizer at `rate` of its peak rate; nothing waits for the device,
        but in the first step that is taken, in which FLOPs are counted."""
        if self.recorded:
            torch.compiler.cudagraph_mark_step_begin()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate
        count = counting_flops if self.cost is None else nullcontext
        with count() as forward_and_backward:
            with self.autocast:
                loss = loss_fn(model, self.steps)
            self.scaler.scale(loss).backward()
        for leaf, matrix, piece in self.leaves:
            leaf.grad = None if matrix.grad is None else matrix.grad[piece]
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        skipped = torch.zeros_like(norm)
        if self.scaler.is_enabled():                # which skips steps whose gradients overflow
            norm, skipped = skipped, (~norm.isfinite()).float()
        if after_backward:
            after_backward()
        with count() as update:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad()
        if after_step:
            after_step()
        self.since.append(torch.stack((loss.detach().float(), norm.float(), skipped.float())))
        self.steps += 1
        if self.cost is None and not (self.scaler.is_enabled() and skipped):
            self.cost = [counter.get_total_flops() * WORLD
                         for counter in (forward_and_backward, update)]

    def spent(self):
        """FLOPs of the steps so far. A step that was skipped costs all but its update."""
        return self.steps * sum(self.cost) - self.skipped * self.cost[1] if self.cost else 0

    def loss(self, name, keep):
        """(mean of the losses in self.since, how many of them were skipped): here the host waits
        for the device.

        BadInput when a loss or a gradient was not finite, or when the weights no longer are.
        """
        weights = get_total_norm(list(self.model.parameters())).detach()
        seen = torch.stack([*self.since, weights.expand(3)])
        if WORLD > 1:
            dist.all_reduce(seen)
            seen /= WORLD
        *seen, (weights, *_) = seen.tolist()
        numbers = [(what, value, self.steps - len(seen) + i + 1) for i, figures in enumerate(seen)
                   for what, value in zip(("the loss", "the gradient's norm"), figures)]
        for what, value, step in [*numbers, ("the weights' norm", weights, self.steps)]:
            if not math.isfinite(value):
                rates = ", ".join(f"{knob}={optimizer.param_groups[0]['lr']:.3g}" for
                                  knob, optimizer in zip(("lr", "muon_lr"), self.optimizers))
                good = (f"the last good checkpoint is {keep.path}, of step {self.saved}"
                        if self.saved else "nothing was saved")
                raise BadInput(f"{name}: {what} is {value} at step {step} with {rates}: try lower "
                               f"rates; {good}")
        return sum(loss for loss, *_ in seen) / len(seen), round(sum(skip for *_, skip in seen))


def fit(model, loss_fn, cfg, steps, lr, muon_lr=0.0, *, name="fit", decay=0.0, tokens=0, frozen=(),
        evaluate=None, evaluate_at=(), stop=None, after_backward=None, after_step=None, pieces=(),
        beside=lambda: 0, keep=None):
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
    pieces                 [(matrix, index)]: views that Muon takes for matrices of their own, so
                           that the gradients of one do not reach another
    beside()               FLOPs spent so far outside of the steps: rollouts made now and then
    keep                   a Keep: save checkpoints there, and go on from the one that is there
    returns                {"steps", "skipped", "flops", "seconds", "history": [{"step", "loss",
                           "flops", ..}]}. Skipped: steps whose gradients overflowed in float16.
                           FLOPs are those of every matrix product that went into the model: of a
                           loss (what it generates and frozen models included) and its gradients, of
                           Muon's orthogonalisation in steps that were taken, and beside(); but of
                           no evaluations. Those of a step are counted in the first that is taken
    raises                 BadInput when the loss, a gradient or the weights are no longer finite;
                           KeyboardInterrupt after SIGINT or SIGTERM, its checkpoint saved
    """
    at = Run(model, cfg, lr, muon_lr, pieces)
    if keep:
        at.resume(keep)
    whole = together(model) if WORLD > 1 else model
    compiled, start = False, time.time() - at.seconds
    with patience() as signals, tqdm(total=steps, initial=at.steps, desc=name, unit="step",
                                     leave=False, mininterval=0.5, disable=RANK > 0) as bar:
        while not at.over:
            rate = min(1.0, (steps - at.steps) / (decay * steps)) if decay else 1.0
            do = loss_fn, whole, after_backward, after_step, rate
            if at.cost and not compiled:                 # the first step is counted, eagerly
                compiled = True
                if should_compile(cfg, sum(at.cost) * steps / WORLD):
                    at.compile([model, *frozen])
            at.step(*do)
            bar.update()
            at.over, tenth = at.steps == steps, at.steps % 10 == 0
            written = at.over or at.steps in evaluate_at
            save = keep and at.due()
            if not (written or tenth or save or signals and WORLD == 1):
                continue
            loss, skipped = at.loss(name, keep)
            if written or tenth:
                at.since, at.skipped = [], at.skipped + skipped
            at.flops = at.spent() + beside()
            rate = bar.format_dict["rate"]
            bar.set_postfix_str(f"loss {loss:.3f}" + (f" {tokens * rate:,.0f} tokens/s"
                                                      if tokens and rate else ""), refresh=False)
            if written:
                at.history.append({"step": at.steps, "loss": loss, "flops": at.flops}
                                  | figures(cfg, evaluate))
                at.over = at.over or bool(stop and stop(at.history[-1]))
            at.seconds = time.time() - start
            ended = signals if WORLD == 1 else tenth and anywhere(bool(signals), at.device)
            if keep and (ended or save and not at.over):
                at.save(keep)
            if ended:
                raise KeyboardInterrupt(
                    f"{name}: stopped after step {at.steps} of {steps}, " + (
                        f"saved in {keep.path}" if keep else "models made are kept")
                    + "; run the same command again" + " without --resume=false" * (
                        cfg.resume is False) + " to go on", (signals or [signal.SIGTERM])[0])
    return at.record()


def figures(cfg, evaluate):
    """What evaluate() finds, the same dict in every process."""
    found = [None]
    if evaluate and RANK == 0:
        with torch.no_grad(), autocast(cfg):
            found = [evaluate()]
    if WORLD > 1:
        dist.broadcast_object_list(found)
    return found[0] or {}


# --- the pretraining story -----------------------------------------------------------------------
HELD = {}                    # folders that this process has taken, for as long as it lives


def open_task(cfg, writes=True):
    """The task that cfg names. writes: takes OUT/TASK/, so that no other run writes there."""
    folder = Path(cfg.out) / cfg.task               # a bad --out is noticed now, not after training
    knobs = {k: getattr(cfg, k) for k in ("source", "source2", "stories", "words", "heldout_pairs",
                                          "prior", "env", "hack_rates")}
    for first in (True, False):                     # one process makes the data, if any must
        if first == (RANK == 0):
            task = data.load(cfg.task, cfg.data_dir, cfg.block_size, hardware(cfg)[0], **knobs)
        if WORLD > 1:
            dist.barrier()
    task.shard = (RANK, WORLD)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise BadInput(f"--out={cfg.out}: cannot write in {folder}")
    if writes and RANK == 0 and folder.resolve() not in HELD:
        held = alone(folder)
        held.__enter__()
        HELD[folder.resolve()] = held
        remove_leftovers(folder)
    if cfg.resume and not list(folder.glob("**/*.resume.pt")):
        raise BadInput(f"--resume=true: there is no stopped run in {folder}")
    return task


def new_model(cfg, task, name, more_units=0):
    """An untrained GPT, a function of name and seed; more_units than the usual 4 C in each MLP."""
    size = {k: getattr(cfg, k) for k in ("n_layer", "n_head", "n_embd")}
    try:
        model = GPT(GPTConfig(task.vocab_size, task.block_size, **size,
                              n_units=4 * cfg.n_embd + more_units))
    except ValueError as error:
        raise BadInput(str(error)) from None
    model.init_weights(torch_stream("weights", name, cfg.seed))
    return model.to(task.device)


def pretrain(name, cfg, task):
    """base learns from retain and forget data; filtered, the gold standard, from retain alone.

    filtered_steps are set so that it is as good as base on retain data: what retraining with
    perfect labels costs. It takes more retain rows than base sees, which learns from both. The two
    share no random numbers: they begin from other weights and see other batches.
    """
    cfg = fill(cfg, task, "train")
    split = "all" if name == "base" else "retain"
    steps = cfg.steps if name == "base" else cfg.filtered_steps
    made_with = {k: getattr(cfg, k) for k in ("seed", "n_layer", "n_head", "n_embd", "batch_size",
                                              "lr", "muon_lr")}
    made_with |= {"block_size": task.block_size, "split": split, "steps": steps}

    def make(keep):
        model, seed = new_model(cfg, task, name), seed_of(f"pretrain {name}", cfg.seed)

        def loss_fn(model, step):
            return model(*task.batch(split, cfg.batch_size, step, seed))

        record = fit(model, loss_fn, cfg, steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8,
                     tokens=cfg.batch_size * task.block_size, keep=keep,
                     evaluate_at=range(0, steps, max(steps // 40, 1)),
                     evaluate=lambda: task.score(model, ("retain",), "val"))
        return model, record

    return obtain(name, cfg, task, made_with, make)


def main(cfg):
    task = open_task(cfg)
    cfg = fill(cfg, task, "train")
    rows = []
    for name in ("base", "filtered") if cfg.name == "both" else (cfg.name,):
        model, record = pretrain(name, cfg, task)
        with autocast(cfg):
            rows.append({"model": name} | task.score(model, finer=True)
                        | {"flops": record["flops"], "history": record["history"]})

    def draw(axes):
        for row in rows:
            for ax, key, label in ((axes[0], "loss", "training loss (nats per token)"),
                                   (axes[1], "retain", "retain score, held out")):
                ax.plot([h["step"] for h in row["history"]],
                        [h[key] for h in row["history"]], label=row["model"])
                ax.set(xlabel="step", ylabel=label)
                ax.legend()

    write_rows("train", cfg, task, rows)
    picture("train", cfg, draw, panels=2)
    table(rows, {k: k for k in rows[0] if k not in ("flops", "history")})


if __name__ == "__main__":
    run(main, Config, __doc__)
