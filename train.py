"""The training loop, checkpoints and command line of every script, and the pretraining story.

    python train.py                        base (retain + forget) and filtered (retain only)
    python train.py --task=language --steps=300
    torchrun --nproc_per_node=2 train.py   the same batches, divided over two processes

fit() is the only loop. A technique hands it a loss function and perhaps a mask.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

import dataclasses
import math
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import data
from engine.disk import take
from engine.hardware import (
    autocast,
    compile_in_place,
    counting_flops,
    eagerly,
    hardware,
    should_compile,
)
from engine.knobs import BadInput, FilePath, Minutes, knob
from engine.optimizers import optimizers
from engine.process import RANK, WORLD, any_process, data_parallel, deferred_signals, run
from engine.report import folder_of, picture, print_stories, table, write_rows
from engine.store import obtain, read, same_knobs
from engine.streams import seed_of, torch_stream
from model import GPT, GPTConfig, write_model


# --- command line: one knob a line ---------------------------------------------------------------
@dataclass
class Basic:
    """Knobs of a run, which every script has."""
    seed: int = knob(0, "of weights, batches, noise; models lie in OUT/TASK/seedN/", 0, 2**31)
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
    block_size: int | None = knob(None, "T, tokens in a row", 8, 2**20)
    n_layer: int | None = knob(None, "blocks", 1, 1000)
    n_head: int | None = knob(None, "attention heads", 1, 2**20)
    n_embd: int | None = knob(None, "C, width of the residual stream", 8, 2**20)

    @classmethod
    def for_task(cls, name):
        """This class and the knobs that a task has of its own: what a command line may name."""
        if issubclass(cls, data.knobs_of(name)):
            return cls
        return dataclasses.make_dataclass(cls.__name__, [], bases=(cls, data.knobs_of(name)))

    @property
    def variant(self):
        """Which variant of its task, where models of each lie in a folder of their own."""
        return getattr(self, getattr(data.module(self.task), "VARIANT", ""), "")


@dataclass
class Seeds:
    """Knobs of a table of several seeds."""
    seeds: int = knob(1, "how many seeds, from --seed on", 1)
    join: list[FilePath] | None = knob(None, "rows that earlier runs wrote for some of these seeds "
                                       "(files NAME.json), which are taken as they are")


@dataclass
class Config(Common):
    batch_size: int | None = knob(None, "rows in a batch", 1, 2**31)
    steps: int | None = knob(None, "pretraining steps of the base", 1)
    filtered_steps: int | None = knob(None, "pretraining steps of the filtered model: enough to "
                                      "be as good as base on retain data", 1)
    lr: float | None = knob(None, "AdamW's rate (the embedding)", 0, 1)
    muon_lr: float | None = knob(None, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)
    name: str = knob("both", "which model to make", choices=["both", "base", "filtered"])


def config_from(cfg, config, shared=Common, **knobs):
    """Another script's Config, with what cfg has of the knobs that both share, and of its task's.
    """
    config = config.for_task(cfg.task)
    names = [f.name for each in (shared, data.knobs_of(cfg.task)) for f in dataclasses.fields(each)]
    return config(**{name: getattr(cfg, name) for name in names if hasattr(cfg, name)} | knobs)


SMALL = dict(n_layer=3, n_head=4, n_embd=128, lr=6e-3, muon_lr=0.02)
STORIES = dict(n_layer=4, n_head=4, n_embd=192, lr=6e-3, muon_lr=0.02, batch_size=8, steps=2400,
               filtered_steps=2400)
SETTINGS = {             # by task (and size): what auto knobs of the model and of pretraining mean
    "arithmetic": SMALL | dict(batch_size=32, steps=1500, filtered_steps=1000),
    "language": SMALL | dict(batch_size=32, steps=1500, filtered_steps=800),
    "tinystories": STORIES,
    "bilingual": STORIES | dict(filtered_steps=1400),
    "instruct": SMALL | dict(batch_size=16, steps=700, filtered_steps=750),
    "pcfg": SMALL | dict(n_embd=64, batch_size=64, steps=800, filtered_steps=600, lr=2e-3),
    "gaming": SMALL | dict(n_layer=2, n_embd=64, batch_size=128, steps=800, filtered_steps=800,
                           lr=2e-3),
    # The model of Cloud et al. 2024 (section 4.2). Base goes about twice through the stories. Base
    # and filtered take 3.5e17 FLOPs, an hour on one H100 at a tenth of its peak. We had no GPU to
    # run this, so that steps and rates are guesses
    ("tinystories", "paper"): dict(n_layer=8, n_head=8, n_embd=512, batch_size=128, steps=32_000,
                                   filtered_steps=26_000, lr=3e-3)}


def fill(cfg, settings, prefix=""):
    """A copy of cfg whose auto knobs have the values that settings (see data.at_size) give for its
    task, and its size. prefix: of a knob's name, where a script has those of another (base_steps).
    """
    values = data.at_size(settings, cfg.task, getattr(cfg, "size", None))
    values = {prefix + k: v for k, v in values.items()}
    return dataclasses.replace(cfg, **{f.name: values[f.name] for f in dataclasses.fields(cfg)
                                       if getattr(cfg, f.name) is None and f.name in values})


def seeds(cfg, rows=()):
    """cfg for each of cfg.seeds seeds, from cfg.seed on, that have no rows yet."""
    there = {row["seed"] for row in rows}
    return [dataclasses.replace(cfg, seed=seed) for seed in range(cfg.seed, cfg.seed + cfg.seeds)
            if seed not in there]


# --- the loop ------------------------------------------------------------------------------------
OVERFLOWS = 20               # in a row, in float16: more are no matter of scale


class Run:
    """All that a run is besides its model: what a checkpoint must hold for the rest of it to be
    the same to the last bit. Batches are functions of the step, so there is no other state.
    """

    def __init__(self, model, cfg, lr, muon_lr, matrices=None, pieces=(), momentum=None):
        self.model, self.cfg = model, cfg
        self.device, dtype, _ = hardware(cfg)
        self.precision = str(dtype).removeprefix("torch.")
        self.autocast = autocast(cfg)           # one for all steps: asking what is there takes time
        self.optimizers, self.leaves = optimizers(model, lr, muon_lr, matrices, pieces, momentum)
        # torch begins at 2^16, where the first steps of most techniques here would overflow
        self.scaler = torch.amp.GradScaler(self.device.type, 2.0**10,
                                           enabled=dtype == torch.float16)
        self.steps = self.skipped = self.flops = 0
        self.cost, self.seconds = None, 0.0     # FLOPs of (a loss with its gradients, an update)
        self.over = self.recorded = False
        self.history, self.since = [], []       # since: [loss, gradient norm] of the last few steps
        self.in_a_row = 0                       # overflows, since a step was taken
        self.saved, self.saved_at, self.saving = 0, time.time(), 0.0

    def record(self):
        return {k: getattr(self, k) for k in ("steps", "skipped", "flops", "seconds", "history")}

    def save(self, checkpoint):
        start = time.time()
        if RANK == 0:
            write_model(checkpoint.path, self.model, checkpoint.made_with, self.record(), run={
                "optimizers": [o.state_dict() for o in self.optimizers],
                "scaler": self.scaler.state_dict(), "cost": self.cost, "skipped": self.skipped,
                "precision": self.precision,
                "since": [x.tolist() for x in self.since], "seconds": self.seconds,
                "over": self.over})
        self.saved, self.saved_at = self.steps, time.time()
        self.saving = self.saved_at - start

    def resume(self, checkpoint):
        """Goes on where a checkpoint's file ends, if there is one and the knobs are the same."""
        if self.cfg.resume is False or not checkpoint.path.exists():
            return
        try:
            model, last = read(checkpoint.path)
            same_knobs(checkpoint.path, last["made_with"], checkpoint.made_with,
                       "; --resume=false starts anew")
        except BadInput:
            if not self.cfg.remake:
                raise
            return
        try:
            run = last["run"]
            for optimizer, state in zip(self.optimizers, run["optimizers"], strict=True):
                optimizer.load_state_dict(state)
                [group["peak"] for group in optimizer.param_groups]        # a KeyError if it lacks
            self.scaler.load_state_dict(run["scaler"])
            self.since = [torch.tensor(x, device=self.device) for x in run["since"]]
            self.over, self.cost, self.skipped, self.seconds = (
                run[k] for k in ("over", "cost", "skipped", "seconds"))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise BadInput(f"{checkpoint.path} is not the checkpoint of a run "
                           f"({type(error).__name__}): --resume=false starts anew") from None
        if RANK == 0 and run.get("precision", self.precision) != self.precision:
            print(f"note: {checkpoint.path} was computed in {run['precision']} and goes on in "
                  f"{self.precision}, which rounds differently")
        self.model.load_state_dict(model.state_dict())
        self.steps, self.flops = last["steps"], last["flops"]
        self.history, self.saved = last["history"], self.steps

    def compile(self, models):
        """Fuses each model's kernels. On a GPU, where small models wait for their launches, a step
        is recorded once and replayed (CUDA graphs)."""
        self.recorded = WORLD == 1 and self.device.type == "cuda"
        for model in models:
            compile_in_place(model, "reduce-overhead" if self.recorded else None)

    def due(self):
        """Whether --save_every has passed; minutes are looked at every tenth step. A large model
        takes long to write, and is saved less often than that."""
        every = self.cfg.save_every
        if isinstance(every, Minutes):
            least = max(60 * every, 20 * self.saving)
            return every and self.steps % 10 == 0 and time.time() - self.saved_at > least
        return every and self.steps % every == 0

    def step(self, loss_fn, model, after_backward, after_step, rate):
        """One step of every optimizer at `rate` of its peak rate. In float16 a step whose gradients
        overflow is not taken: the next call does it again at a smaller scale of the loss.

        The host waits for the device in float16 only, to know whether it overflowed, and where
        loss_fn makes it wait (rollouts do, and so does the gridworld)."""
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
        if self.scaler.is_enabled() and not norm.isfinite() and self.in_a_row < OVERFLOWS:
            self.scaler.update()
            self.model.zero_grad()
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            return
        self.in_a_row = 0
        if after_backward:
            after_backward()
        with count() as update:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        self.model.zero_grad()
        if after_step:
            after_step()
        self.since.append(torch.stack((loss.detach().float(), norm.float())))
        self.steps += 1
        if self.cost is None:
            self.cost = [counter.get_total_flops() * WORLD
                         for counter in (forward_and_backward, update)]

    def spent(self):
        """FLOPs of the steps so far, and of those that overflowed: all but their update."""
        return self.steps * sum(self.cost) + self.skipped * self.cost[0] if self.cost else 0

    def loss(self, name, checkpoint):
        """The mean of the losses in self.since: here the host waits for the device.

        BadInput when a loss or a gradient was not finite, or when the weights no longer are.
        """
        weights = get_total_norm(list(self.model.parameters())).detach()
        seen = torch.stack([*self.since, weights.expand(2)])
        if WORLD > 1:
            dist.all_reduce(seen)
            seen /= WORLD
        *seen, (weights, _) = seen.tolist()
        numbers = [(what, value, self.steps - len(seen) + i + 1) for i, figures in enumerate(seen)
                   for what, value in zip(("the loss", "the gradient's norm"), figures)]
        for what, value, step in [*numbers, ("the weights' norm", weights, self.steps)]:
            if not math.isfinite(value):
                rates = ", ".join(f"{knob}={optimizer.param_groups[0]['lr']:.3g}" for
                                  knob, optimizer in zip(("lr", "muon_lr"), self.optimizers))
                good = (f"the last good checkpoint is {checkpoint.path}, of step {self.saved}"
                        if self.saved else "nothing was saved")
                raise BadInput(f"{name}: {what} is {value} at step {step} with {rates}: try lower "
                               f"rates; {good}")
        return sum(loss for loss, _ in seen) / len(seen)


def fit(model, loss_fn, cfg, steps, lr, muon_lr=0.0, *, name="fit", decay=0.0, warmup=0, tokens=0,
        frozen=(), evaluate=None, evaluate_at=(), stop=None, after_backward=None, after_step=None,
        matrices=None, pieces=(), momentum=None, beside=lambda: 0, alike=1, checkpoint=None):
    """Trains model in place: the one loop of every technique.

    loss_fn(model, step)   a scalar loss; it draws its own batch, a function of the step
    steps, lr, muon_lr     how many steps, at most; peak rates of AdamW and Muon (see optimizers)
    decay                  share of the steps, at the end, over which the rates fall to zero
    warmup                 the first steps, over which the rates rise from zero
    tokens                 tokens a step, for the progress bar
    frozen                 other models that loss_fn calls (a teacher): compiled with this one
    evaluate()             figures (a dict) to keep in the history, at the steps in evaluate_at (a
                           set or a range) and at the last
    stop(figures)          ends the run when it says so, after an evaluation
    after_backward()       may change gradients (masks); after_step() may restore parameters
    matrices               which Muon trains (None: those of model.blocks)
    pieces                 [(matrix, index)]: views that Muon takes for matrices of their own, so
                           that the gradients of one do not reach another
    momentum               if given, SGD with this momentum trains what AdamW would train
    beside()               FLOPs spent so far outside of the steps: rollouts made now and then
    alike                  how many runs of this kind a script makes, which share what is compiled
    checkpoint             a Checkpoint: where to save one, and go on from if there is one
    returns                {"steps", "skipped", "flops", "seconds", "history": [{"step", "loss",
                           "flops", ..}]}. Skipped: how often gradients overflowed in float16.
                           FLOPs are those of every matrix product that went into the model: of a
                           loss (what it generates and frozen models included) and its gradients, of
                           Muon's orthogonalisation, and beside(); but of no evaluations. Those of a
                           step are counted in the first
    raises                 BadInput when the loss, a gradient or the weights are no longer finite;
                           KeyboardInterrupt after SIGINT or SIGTERM, its checkpoint saved
    """
    if steps is None or lr is None:
        raise BadInput(f"{name}: no steps and rates are set for this task: give them")
    at = Run(model, cfg, lr, muon_lr, matrices, pieces, momentum)
    if checkpoint:
        at.resume(checkpoint)
    trained = data_parallel(model) if WORLD > 1 else model
    compiled, start = False, time.time() - at.seconds
    with deferred_signals() as signals, tqdm(total=steps, initial=at.steps, desc=name, unit="step",
                                     leave=False, mininterval=0.5, disable=RANK > 0) as bar:
        while not at.over:
            rate = min(1.0, (steps - at.steps) / (decay * steps)) if decay else 1.0
            rate = min(rate, (at.steps + 1) / warmup) if warmup else rate
            if at.cost and not compiled:                 # the first step is counted, eagerly
                compiled = True
                if should_compile(cfg, alike * steps, alike * steps * sum(at.cost) / WORLD):
                    at.compile([model, *frozen])
            before = at.steps
            at.step(loss_fn, trained, after_backward, after_step, rate)
            if at.steps == before:                       # it overflowed
                continue
            bar.update()
            at.over, tenth = at.steps == steps, at.steps % 10 == 0
            written = at.over or at.steps in evaluate_at
            save = checkpoint and at.due()
            if not (written or tenth or save or signals and WORLD == 1):
                continue
            loss = at.loss(name, checkpoint)
            if written or tenth:
                at.since = []
            at.flops = at.spent() + beside()
            rate = bar.format_dict["rate"]
            bar.set_postfix_str(f"loss {loss:.3f}" + (f" {tokens * rate:,.0f} tokens/s"
                                                      if tokens and rate else ""), refresh=False)
            if written:
                at.history.append({"step": at.steps, "loss": loss, "flops": at.flops}
                                  | evaluated(cfg, evaluate))
                at.over = at.over or bool(stop and stop(at.history[-1]))
            at.seconds = time.time() - start
            ended = signals if WORLD == 1 else tenth and any_process(bool(signals), at.device)
            if checkpoint and (ended or save and not at.over):
                at.save(checkpoint)
            if ended:
                raise KeyboardInterrupt(
                    f"{name}: stopped after step {at.steps} of {steps}, " + (
                        f"saved in {checkpoint.path}; run the same command again"
                        + " without --resume=false" * (cfg.resume is False) + " to go on"
                        if checkpoint else "which are lost; what was complete is kept"),
                    (signals or [signal.SIGTERM])[0])
    for each in (model, *frozen):
        each._compiled_call_impl = None         # undoes .compile(), for which torch has no function
    return at.record()


def evaluated(cfg, evaluate):
    """What evaluate() returns: computed by the first process, the same dict in every one."""
    answer = [None]
    if evaluate and RANK == 0:
        with torch.no_grad(), autocast(cfg), eagerly():
            answer = [evaluate()]
    if WORLD > 1:
        dist.broadcast_object_list(answer)
    return answer[0] or {}


# --- the pretraining story -----------------------------------------------------------------------
def open_task(cfg, writes=True):
    """The task that cfg names. writes: takes OUT/TASK/, so that no other run writes there."""
    names = [f.name for f in dataclasses.fields(data.knobs_of(cfg.task))]
    knobs = {name: getattr(cfg, name, None) for name in names}
    for first in (True, False):                     # one process makes the data, if any must
        if first == (RANK == 0):
            task = data.load(cfg.task, cfg.data_dir, cfg.block_size, hardware(cfg)[0], **knobs)
        if WORLD > 1:
            dist.barrier()
    task.shard = (RANK, WORLD)
    folder = folder_of(cfg)                         # a bad --out is noticed now, not after training
    if writes and RANK == 0:
        take(folder)
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
    if task.pretrained:
        if name != "base":
            raise BadInput(f"{task.name} starts from a pretrained model: what it would be without "
                           f"the data to be forgotten is not known, and there is no {name}")
        for knob in ("n_layer", "n_head", "n_embd"):
            if getattr(cfg, knob) is not None:
                raise BadInput(f"--{knob} means nothing to the task {task.name}: the pretrained "
                               f"model has its own size")
        return task.module.base(task)
    cfg = fill(cfg, SETTINGS)
    split = "all" if name == "base" else "retain"
    seed = seed_of(f"pretrain {name}", cfg.seed)

    def loss_fn(model, step):
        return model(*task.batch(split, cfg.batch_size, step, seed))

    return from_scratch(name, loss_fn, cfg, task, cfg.steps if name == "base" else
                        cfg.filtered_steps, split=split)


def from_scratch(name, loss_fn, cfg, task, steps, **made_with):
    """(model, record): a new model, trained for so many steps; read from disk or made. made_with:
    what loss_fn depends on beside cfg's model, batch size and rates."""
    made_with |= {k: getattr(cfg, k) for k in ("seed", "n_layer", "n_head", "n_embd", "batch_size",
                                               "lr", "muon_lr")}
    made_with |= {"block_size": task.block_size, "steps": steps}

    def make(checkpoint):
        model = new_model(cfg, task, name)
        record = fit(model, loss_fn, cfg, steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8,
                     tokens=cfg.batch_size * task.block_size, checkpoint=checkpoint,
                     evaluate_at=range(0, steps, max(steps // 40, 1)),
                     evaluate=lambda: task.score(model, ("retain",), "val"))
        return model, record

    return obtain(name, cfg, task, made_with, make)


def main(cfg):
    task = open_task(cfg)
    cfg = fill(cfg, SETTINGS)
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
    table(rows, {k: k for k in rows[0] if k not in ("flops", "history", "stories")})
    print_stories(rows)


if __name__ == "__main__":
    run(main, Config, __doc__)
