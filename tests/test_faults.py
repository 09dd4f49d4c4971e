"""What a run survives: signals, kill -9, full disks, damaged files, numbers that are none, company.

Most scripts run in children forked from a process that has torch loaded: that spares seconds each.
"""
import dataclasses
import hashlib
import io
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_scripts import ROOT, SCRIPTS, Home
from test_train import CFG, rows, tiny, weights

import data
import train
import undo
import unlearn
from data import SPLITS, BadInput, arithmetic
from engine.disk import SEAL, read_sealed, write_sealed
from engine.knobs import Minutes
from engine.store import obtain
from model import read_model
from train import fit

resource = pytest.importorskip("resource")             # where it is missing, so are forks and locks
SIGNALS = signal.SIGINT, signal.SIGTERM


@pytest.fixture(autouse=True)
def terminated():
    """SIGTERM is an exception, as it is in scripts, and ends no test but one."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def bits(model):
    return {k: v.numpy().tobytes() for k, v in weights(model).items()}


def result(path):
    """What must not depend on a run's fate; a finished model holds nothing besides."""
    model, saved = train.read(path)
    assert saved.keys() == {"config", "made_with", "steps", "flops", "history"}
    return bits(model), [saved[k] for k in ("made_with", "steps", "flops", "history")]


def steps(path):
    """At which step a checkpoint stands; 0 where there is none."""
    return train.read(path)[1]["steps"] if path.exists() else 0


def until(there):
    end = time.time() + 60
    while not there():
        assert time.time() < end
        time.sleep(0.002)


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """A cheap one, in place of the exams."""
    return {d: task.loss(model, d, 4, part) for d in domains}


# --- a little run in this process ----------------------------------------------------------------
STEPS = 23
TASK = SimpleNamespace(name="arithmetic", data_id="none", vocab_size=100, device="cpu")


def little(folder, hook=lambda model, step: 0, cfg={}, muon_lr=0.02, **more):
    """obtain()s m.pt, of 23 steps; hook(model, step) is added to the loss, `more` goes to fit()."""
    cfg = dataclasses.replace(CFG, out=str(folder), **cfg)

    def make(checkpoint):
        model = tiny(n_layer=1, n_embd=16)
        knobs = {"decay": 0.5, "evaluate_at": range(0, STEPS, 4), "name": "m",
                 "checkpoint": checkpoint,
                 "evaluate": lambda: {"figure": model(*rows(seed=99)).item()}} | more
        return model, fit(model, lambda m, i: m(*rows(seed=range(STEPS)[i])) + hook(m, i), cfg,
                          STEPS, 0.01, muon_lr, **knobs)

    obtain("m", cfg, TASK, {"muon_lr": muon_lr}, make)
    return result(folder / "arithmetic" / "seed0" / "m.pt")


def begun(*_):
    raise InterruptedError("training began")


def stopped(folder, at, number=signal.SIGINT, **more):
    """The checkpoint of a little run that a signal stops in step `at`."""
    path = folder / "arithmetic" / "seed0" / "m.resume.pt"
    said = f"m: stopped after step {at + 1} of {STEPS}, saved in {path}; run the same command again"
    with pytest.raises(KeyboardInterrupt, match=re.escape(said)) as stop:
        little(folder, lambda _, step: step == at and signal.raise_signal(number) or 0, **more)
    assert stop.value.args[1] == number and steps(path) == at + 1
    assert list(path.parent.iterdir()) == [path]
    return path


def test_resume_in_another_precision_says_so(tmp_path, computing_in, capsys):
    """What is fastest is timed anew by each run, and a busy machine may change its mind."""
    computing_in(torch.bfloat16)
    path = stopped(tmp_path, 3)
    computing_in(torch.float32)
    little(tmp_path)
    said = f"note: {path} was computed in bfloat16 and goes on in float32, which rounds differently"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("muon_lr,ends,stops", [
    (0.0, None, range(STEPS)), (0.02, None, range(STEPS)), (0.02, 12, range(8, 12))])
def test_resume_is_exact(muon_lr, ends, stops, tmp_path):
    """Stopped in any step, the last ones too, or in several: the same to the last bit."""
    more = {"muon_lr": muon_lr, "stop": lambda at: at["step"] == ends}
    whole = little(tmp_path / "whole", **more)
    assert whole[1][1] == (ends or STEPS)
    for i, chosen in enumerate([*([at] for at in stops), [stops[0], stops[1], stops[-1]]]):
        for j, at in enumerate(chosen):
            path = stopped(tmp_path / str(i), at, SIGNALS[(i + j) % 2], **more)
        ran = []
        assert little(tmp_path / str(i), lambda _, step: ran.append(step) or 0, **more) == whole
        assert ran == list(range(chosen[-1] + 1, whole[1][1])) and not path.exists()


def test_a_signal_during_the_last_score(tmp_path):
    """It is not lost: what comes after this run must not begin."""
    seen = []

    def evaluate():
        seen.append(1)
        return len(seen) == 6 and signal.raise_signal(signal.SIGINT) or {}

    with pytest.raises(KeyboardInterrupt):
        little(tmp_path, evaluate=evaluate)
    assert little(tmp_path, evaluate=dict) == little(tmp_path / "whole", evaluate=dict)


def test_a_second_signal_ends_at_once(tmp_path):
    """Python runs a handler a little later than the signal, and two signals that come before that
    as one: each is waited for. A shell starts its background jobs with SIGINT ignored: not here."""
    def twice(model, step):
        first = signal.getsignal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        while signal.getsignal(signal.SIGINT) is first:
            time.sleep(0.001)
        signal.raise_signal(signal.SIGINT)
        for _ in range(1000):
            time.sleep(0.001)
        raise AssertionError("nothing ended it")

    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as stop:
            little(tmp_path, twice)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert not stop.value.args and not list(tmp_path.rglob("*.*"))


def test_checkpoints_come_as_asked(tmp_path, monkeypatch):
    """By steps; by minutes, which are looked at every tenth step; none at all."""
    clock, tens = SimpleNamespace(), [s // 10 * 10 for s in range(STEPS)]
    monkeypatch.setattr(train, "time", SimpleNamespace(time=lambda: clock.now))
    for every, start, seconds, expected in [
            (5, 0, 0, [s // 5 * 5 for s in range(STEPS)]), (1, 0, 0, list(range(STEPS))),
            (Minutes("1m"), 0, 7, tens), (Minutes("1m"), 0, 4, [0] * 20 + [20] * 3),
            (Minutes("1m"), -30, 4, [0] * 10 + [10] * 13), (Minutes("0m"), 0, 99, [0] * STEPS),
            (0, 0, 99, [0] * STEPS)]:
        folder, saved, clock.now = tmp_path / f"{every} {start} {seconds}", [], start

        def hook(model, step):
            saved.append(steps(folder / "arithmetic" / "seed0" / "m.resume.pt"))
            clock.now = step * seconds
            return 0

        little(folder, hook, {"save_every": every})
        assert saved == expected, every


def test_checkpoint_of_other_knobs(tmp_path):
    path, first = stopped(tmp_path, 7), []
    before = path.read_bytes()
    with pytest.raises(BadInput, match=f"^{path} was .*muon_lr=0.02, this run asks for muon_lr=0.01"
                       "; --resume=false starts anew$"):
        little(tmp_path, begun, muon_lr=0.01)
    assert path.read_bytes() == before
    little(tmp_path, lambda _, step: first.append(step) or 0, {"resume": False}, muon_lr=0.01)
    assert first == list(range(STEPS)) and not path.exists()


def test_remake(tmp_path):
    """A model of other knobs is made again when that is asked for; until the new one is whole, the
    old file stays. One of the same knobs is not."""
    first, path, ran = little(tmp_path), tmp_path / "arithmetic" / "seed0" / "m.pt", []
    with pytest.raises(BadInput, match="muon_lr=0.01: --remake=true makes it again, another --out"):
        little(tmp_path, begun, muon_lr=0.01)
    before = path.read_bytes()
    assert little(tmp_path, begun, {"remake": True}) == first          # nothing to be made
    more = {"remake": True, "save_every": 5}
    with pytest.raises(KeyboardInterrupt):
        little(tmp_path, lambda _, step: step == 7 and signal.raise_signal(signal.SIGINT) or 0,
               more, muon_lr=0.01)
    assert path.read_bytes() == before and steps(path.with_suffix(".resume.pt")) == 8
    second = little(tmp_path, lambda _, step: ran.append(step) or 0, more, muon_lr=0.01)
    assert ran == list(range(8, STEPS)) and second == little(tmp_path / "other", muon_lr=0.01)
    assert second != first and list(path.parent.iterdir()) == [path]
    path.write_bytes(path.read_bytes()[:-9])                           # damaged: likewise
    assert little(tmp_path, cfg=more, muon_lr=0.01) == second


def test_remake_beside_the_checkpoint_of_other_knobs(tmp_path):
    ran, _ = [], stopped(tmp_path, 7)
    little(tmp_path, lambda _, step: ran.append(step) or 0, {"remake": True}, muon_lr=0.01)
    assert ran == list(range(STEPS))


@pytest.mark.parametrize("story", ["oracle", "maxent", 0.5, None])
def test_stories_resume(story, task, tmp_path, monkeypatch):
    """unlearn()'s methods and undo()'s students; what a teacher cost is counted once."""
    monkeypatch.setattr(arithmetic, "score", score)
    draw, ran, record = data.Task.batch, [], {"made_with": {}, "flops": 10**9}

    def batch(task, split, size, step, *rest):
        if not rest[1:] and step not in ran[-1:]:                    # a new step of training
            ran.append(step)
            ran == [0, 1, 2] and signal.raise_signal(signal.SIGTERM)
        return draw(task, split, size, step, *rest)

    def tell(out):
        base, gold = (tiny(seed, task.vocab_size, 64, 1, 16) for seed in (0, 1))
        shared = dict(device="cpu", compile=False, out=str(tmp_path / out), batch_size=4, lr=0.01)
        if isinstance(story, str):
            cfg = unlearn.Config(**shared, steps=5, method=story)
            model, made = unlearn.unlearn(cfg, task, base, record, gold, record)
        else:
            cfg = undo.Config(**shared, steps=5, filtered_steps=6, check_every=4, muon_lr=0.02,
                              beta=0.1, distil_on="all")
            model, made = undo.undo(story, cfg, task, base, record)
        return bits(model), [made[k] for k in ("made_with", "steps", "flops", "history")]

    whole = tell("whole")
    monkeypatch.setattr(data.Task, "batch", batch)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
        tell("stopped")
    assert tell("stopped") == whole and ran == list(range(whole[1][1]))


@pytest.mark.parametrize("culprit,at,kept", [
    ("loss", 0, 0), ("loss", 4, 0), ("loss", 13, 10), ("loss", 22, 20), ("gradient's", 0, 0),
    ("gradient's", 14, 10), ("gradient's", 22, 20), ("weights'", 14, 10), ("weights'", 22, 20)])
def test_numbers_that_are_none(culprit, at, kept, tmp_path):
    """One line names the step, the rates and the checkpoint, which is older, and good."""
    now, path = SimpleNamespace(), tmp_path / "arithmetic" / "seed0" / "m.resume.pt"

    def hook(model, step):
        now.model, now.step = model, step
        flat = (model.wte.weight.sum() * 0).sqrt()                       # its gradient is inf * 0
        return {"loss": math.nan, "gradient's": flat}.get(culprit, 0) if step == at else 0

    def after_step():
        if culprit == "weights'" and now.step == at:
            now.model.wte.weight.data[0, 0] = math.inf

    with pytest.raises(BadInput) as error:
        little(tmp_path, hook, {"save_every": 5}, after_step=after_step)
    assert re.fullmatch(
        rf"m: the {culprit}( norm)? is (nan|inf) at step {at + 1} with lr=[.\d]+, muon_lr=[.\d]+: "
        "try lower rates; " + (f"the last good checkpoint is {path}, of step {kept}" if kept else
                               "nothing was saved"), str(error.value))
    assert steps(path) == kept and not (path.parent / "m.pt").exists()
    assert not kept or all(w.isfinite().all() for w in weights(train.read(path)[0]).values())


def test_the_checkpoint_of_another_run_is_not_the_last_good_one(tmp_path):
    stopped(tmp_path, 7)
    with pytest.raises(BadInput, match="nothing was saved"):
        little(tmp_path, lambda *_: math.nan, {"resume": False})


# --- scripts in children -------------------------------------------------------------------------
KNOBS = "--name=base", "--steps=30", "--save_every=10", "--batch_size=4"


def perform(said, script, argv, faults):
    """In a child: a script as a user runs it, what it says in files. faults[step] is code that runs
    in that step of training, faults["first"] before all."""
    for fd in 1, 2:
        os.dup2(os.open(f"{said}{fd}", os.O_WRONLY | os.O_CREAT), fd)
    sys.argv, sys.modules["matplotlib"] = [f"{script}.py", *argv], None
    draw, arithmetic.score = data.Task.batch, score

    def batch(task, split, size, step, *rest):
        if not rest[1:]:                                             # of training
            exec(faults.get(step, ""), globals())
        return draw(task, split, size, step, *rest)

    data.Task.batch = batch
    exec(faults.get("first", ""), globals())
    train.run(SCRIPTS[script].main, SCRIPTS[script].Config, "A story.")


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def lines(err):
    """stderr without bars."""
    return [x for x in re.split("[\r\n]", err) if x.strip() and "%|" not in x]


class Nest(Home):
    """A Home whose scripts run in children of the nursery."""

    def __init__(self, path, data_dir, nursery):
        super().__init__(path, data_dir)
        self.nursery, self.folder = nursery, self.out / "arithmetic" / "seed0"
        self.base, self.kept = self.folder / "base.pt", self.folder / "base.resume.pt"
        path.mkdir(exist_ok=True)

    def start(self, *arguments, script="train", faults={}):
        said = self.path / f"said {time.time_ns()} "
        child = self.nursery.Process(target=perform, daemon=True, args=(
            said, script, self.argv(script, arguments), faults))
        child.start()
        child.said = said
        return child

    def end(self, child):
        """(exit status, lines on stderr)"""
        child.join(60)
        return child.exitcode, lines(Path(f"{child.said}2").read_text())

    def train(self, *arguments, **more):
        return self.end(self.start(*KNOBS, *arguments, **more))

    def goes_on(self, plain):
        """The same command again comes to what it would have come to."""
        child = self.start(*KNOBS)
        assert self.end(child) == (0, []) and result(self.base) == plain
        assert "base: going on from" in Path(f"{child.said}1").read_text()
        assert not self.kept.exists() and not list(self.folder.glob("*.tmp"))


@pytest.fixture(scope="module")
def nursery():
    """Forks children from a process that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        context.Process(target=int).start()
    return context


@pytest.fixture
def nest(tmp_path, scripts_folder, nursery):
    return Nest(tmp_path, scripts_folder, nursery)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, scripts_folder, nursery):
    """What KNOBS come to when nothing happens."""
    nest = Nest(tmp_path_factory.mktemp("plain"), scripts_folder, nursery)
    assert nest.train() == (0, []) and not nest.kept.exists()
    return result(nest.base)


def test_signals_to_a_true_process(nest, capsys):
    """Stopped by each signal, and then undisturbed: as though it had never been stopped."""
    more = "--name=base", "--steps=200", "--save_every=10", "--batch_size=4"
    for number in SIGNALS:
        before = steps(nest.kept)
        with subprocess.Popen([sys.executable, str(ROOT / "train.py"), *nest.argv("train", more)],
                              cwd=nest.path, text=True, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
                              ) as process:
            until(lambda: steps(nest.kept) > before)
            process.send_signal(number)
            said, = lines(process.communicate(timeout=60)[1])
        assert process.returncode == 128 + number
        assert said.startswith(f"train.py: base: stopped after step {steps(nest.kept)} of 200, "
                               f"saved in {nest.kept}; run the same command again")
    whole = Nest(nest.path / "whole", nest.data_dir, nest.nursery)
    nest.capture = whole.capture = capsys
    assert nest.call("train", *more)[0] == whole.call("train", *more)[0] == 0
    assert result(nest.base) == result(whole.base) and not nest.kept.exists()
    status, _, err = whole.call("train", *more, "--resume=true")
    assert status == 2 and err.count("\n") == 1 and "there is no stopped run in" in err


# --- kill -9 -------------------------------------------------------------------------------------
def test_twenty_kills(nest):
    """Wherever a run is killed, what is on disk loads and never goes back."""
    more = "--name=base", "--steps=200", "--save_every=1", "--batch_size=4"
    slow = "os.fsync = lambda fd, fsync=os.fsync: time.sleep(0.04) or fsync(fd)"
    rng, at, halves = random.Random(0), 0, 0
    for _ in range(20):
        child, before = nest.start(*more, faults={"first": slow}), at
        until(lambda: steps(nest.kept) > before)
        time.sleep(rng.uniform(0, 0.15))
        child.kill()
        assert nest.end(child)[0] == -signal.SIGKILL and not nest.base.exists()
        halves += len(list(nest.folder.glob("*.tmp")))
        at = steps(nest.kept)
        assert at > before
    assert halves >= 3                                               # in the middle of a write
    whole = Nest(nest.path / "whole", nest.data_dir, nest.nursery)
    assert nest.end(nest.start(*more)) == whole.end(whole.start(
        *more, "--save_every=0")) == (0, [])
    assert result(nest.base) == result(whole.base)
    assert {p.name for p in nest.folder.iterdir()} == {p.name for p in whole.folder.iterdir()}


def test_killed_after_the_last_write(nest, plain):
    """The model is whole; its checkpoint, of no more use, does not stay for ever."""
    assert nest.train(faults={29: "Path.unlink = die"})[0] == -signal.SIGKILL
    assert nest.kept.exists() and result(nest.base) == plain
    assert nest.train() == (0, []) and not nest.kept.exists() and result(nest.base) == plain


# --- too little disk, too little memory ----------------------------------------------------------
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))"
NO_MORE = "raise RuntimeError('DefaultCPUAllocator: can not allocate memory: you tried to')"


@pytest.mark.parametrize("at,fault,kept,said", [
    (15, FULL, 10, "cannot write .*/base.resume.pt: .*; the one there is untouched"),
    (29, FULL, 20, "cannot write .*/base.pt: [^;]*"), (29, "os.fsync = die", 20, None),
    (15, "raise MemoryError", 10, "out of memory: .*"), (15, NO_MORE, 10, "out of memory: .*"),
    (15, "raise torch.OutOfMemoryError('CUDA out of memory. Tried to')", 10, "out of memory: .*")])
def test_faults_in_the_middle(at, fault, kept, said, nest, plain):
    """One line; the checkpoint before stays and serves; half a file is none, and is removed."""
    status, err = nest.train(faults={at: fault})
    assert status == (2 if said else -signal.SIGKILL) and len(err) == bool(said), err
    assert not said or re.fullmatch(f"train.py: {said}", err[0]), err
    assert steps(nest.kept) == kept and not nest.base.exists()
    assert len(list(nest.folder.glob("*.tmp"))) == (not said)
    nest.goes_on(plain)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory may be promised and not held")
@pytest.mark.parametrize("argument", ["--n_embd=32768", "--batch_size=2000000000"])
def test_knobs_that_need_too_much_memory(argument, nest):
    """More than 4 GB, where there is no more."""
    status, err = nest.train(argument, faults={"first": "resource.setrlimit(resource.RLIMIT_AS, ("
                             "int(open('/proc/self/statm').read().split()[0]) * resource."
                             "getpagesize() + (4 << 30), resource.RLIM_INFINITY))"})
    assert status == 2 and len(err) == 1 and "train.py: out of memory: a smaller" in err[0], err
    assert not nest.folder.exists()


def test_errors_that_only_mention_memory(nest):
    """A fault of the program's own is shown as one."""
    status, err = nest.train(faults={3: "raise RuntimeError('an illegal memory access was seen')"})
    assert status == 1 and any("Traceback" in line for line in err)
    assert "out of memory" not in "".join(err)


def test_folder_that_cannot_be_written(tmp_path):
    """Root may write everywhere, but in /proc."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    for locked in [folder] * (os.geteuid() != 0) + [Path("/proc")] * Path("/proc/self").exists():
        with pytest.raises(BadInput, match=f"^cannot write {locked}/m.pt: [^\n]*$"):
            write_sealed(locked / "m.pt", {})
        assert not list(locked.glob("m.pt*"))


# --- two at once ---------------------------------------------------------------------------------
@pytest.mark.parametrize("killed", [False, True])
def test_two_runs_in_one_folder(killed, nest, plain):
    """The second is refused, an eval.py is not; a lock dies with its run."""
    there, go = nest.path / "there", nest.path / "go"
    first = nest.start(*KNOBS, faults={15: f"Path({str(there)!r}).touch(); "
                                           f"until(Path({str(go)!r}).exists)"})
    until(there.exists)
    before = nest.kept.read_bytes()
    status, err = nest.train()
    assert status == 2 and len(err) == 1
    assert f"another run is at work in {nest.folder.parent}: " in err[0]
    assert list(nest.folder.iterdir()) == [nest.kept] and nest.kept.read_bytes() == before
    shutil.copy(nest.kept, nest.folder / "half.pt")
    assert nest.end(nest.start("--model=half", script="eval")) == (0, [])
    if killed:
        first.kill()
        assert nest.end(first)[0] == -signal.SIGKILL
        nest.goes_on(plain)
    else:
        go.touch()
        assert nest.end(first) == (0, []) and result(nest.base) == plain


def make_data(said, folder, both):
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    both.wait(60)
    data.load("arithmetic", folder=folder, problems=300)


def test_two_runs_make_the_same_data(nursery, tmp_path):
    """One makes it, the other waits for it and reads it."""
    both, folder = nursery.Barrier(2), tmp_path / "data"
    children = [nursery.Process(target=make_data, args=(tmp_path / name, folder, both))
                for name in "ab"]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0]
    assert sum((tmp_path / name).read_text().count("making arithmetic") for name in "ab") == 1
    data.load("arithmetic", folder=folder, problems=300)
    assert {p.name for p in (folder / "arithmetic").iterdir()} == {
        "meta.json", "tokenizer.json", *(f"{s}.bin" for s in SPLITS)}


# --- damaged files -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What is in the checkpoint of a little run that was stopped."""
    return stopped(tmp_path_factory.mktemp("stopped"), 7).read_bytes()


@pytest.fixture
def place(tmp_path):
    """Where a little run looks for its checkpoint."""
    (tmp_path / "arithmetic" / "seed0").mkdir(parents=True)
    return tmp_path / "arithmetic" / "seed0" / "m.resume.pt"


@pytest.mark.parametrize("name", ["m.pt", "m.resume.pt", "forget_train.bin", "tokenizer.json"])
def test_any_damage_is_seen(name, checkpoint, folder, tmp_path):
    """One bit turned, a tail cut off or added: refused by name, and nothing begins."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "arithmetic" / ("seed0" if name.endswith(".pt") else "") / name
    path.parent.mkdir(exist_ok=True)
    rng = random.Random(name)
    content = path.read_bytes() if path.exists() else checkpoint
    bad = [content + b"\0", content * 2, *(content[:-cut] for cut in [*range(1, 50), len(content),
                                           *rng.sample(range(50, len(content)), 50)])]
    for at in rng.sample(range(len(content)), 300):
        bad.append(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:])
    for each in bad:
        path.write_bytes(each)
        with pytest.raises(BadInput, match=f"^{path} is damaged[^\n]*$"):
            if name.startswith("m."):
                little(tmp_path, begun)
            data.load("arithmetic", folder=tmp_path, problems=300)
        assert path.read_bytes() == each


def mutant(content, rng):
    """A copy, some bytes turned, replaced, deleted, inserted, doubled, moved or cut."""
    at, other = rng.randrange(len(content)), rng.randrange(len(content))
    n = rng.choice((1, 1, 2, 4, 16, 64))
    new, rest = rng.choice([
        (bytes([content[at] ^ 1 << rng.randrange(8)]), at + 1), (rng.randbytes(n), at + n),
        (b"", at + n), (rng.randbytes(n), at), (content[at:at + n], at),
        (content[other:other + n], at + n), (b"", len(content))])
    return content[:at] + new + content[rest:]


@pytest.mark.parametrize("file", ["m.resume.pt", "meta.json"])
def test_mutants(file, checkpoint, folder, tmp_path):
    """Refused in one line, or what is read is what was written."""
    meta, rng, path = folder / "arithmetic" / "meta.json", random.Random(0), tmp_path / file
    content = meta.read_bytes() if file == "meta.json" else checkpoint
    right = data.read_meta(meta.parent)
    for _ in range(1000):
        path.write_bytes(mutant(content, rng))
        try:
            assert data.read_meta(tmp_path) == right if file == "meta.json" else (
                read_model(path)[1]["steps"] == 8)
        except (ValueError, BadInput) as said:
            assert re.fullmatch(f"{path} is damaged[^\n]*", str(said))


def sealed(body):
    return body + SEAL + hashlib.sha256(body).digest()


def refused(path):
    """Whether a little run will not go on from its checkpoint, for a reason of one line."""
    try:
        little(path.parents[2], begun)
    except InterruptedError:
        return False
    except BadInput as said:
        assert re.fullmatch(f"{path} [^\n]*", str(said))
        return True


def test_mutants_under_a_right_checksum(checkpoint, place):
    """Which anyone can compute. Half of them have a whole archive round a mutant pickle."""
    body, rng, seen = checkpoint[:-len(sealed(b""))], random.Random(0), set()
    assert sealed(body) == checkpoint
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for i in range(300):
        bad, packed = mutant(body, rng), io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, part in parts.items():
                if name.endswith("data.pkl"):
                    part = mutant(part, rng) if i % 4 == 1 else part[:rng.randrange(len(part))]
                archive.writestr(name, part)
        place.write_bytes(sealed(packed.getvalue() if i % 2 else bad))
        seen.add(refused(place))
    assert seen == {True, False}


@pytest.mark.parametrize("key,value", [
    ("run", None), ("config", {"vocab_size": 100, "n_head": 0}), ("config", {"vocab_size": 10**30}),
    ("made_with", None), ("history", None), ("model", {}), ("run", {"optimizers": [{}]})])
def test_files_of_another_shape(key, value, checkpoint, place):
    """A right checksum, but a part is gone (None), or is not what it should be."""
    place.write_bytes(checkpoint)
    write_sealed(place, {k: v for k, v in (read_sealed(place) | {key: value}).items()
                         if v is not None})
    assert refused(place)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["m.pt", "m.resume.pt"])
def test_evil_pickles_are_not_run(name, checkpoint, place):
    """A right checksum lends no trust."""
    marker, path = place.parent / "struck", place.with_name(name)
    path.write_bytes(checkpoint)
    write_sealed(path, read_sealed(path) | {"history": [Evil(marker)]})
    torch.load(io.BytesIO(path.read_bytes()[:-len(sealed(b""))]), weights_only=False)
    marker.rmdir()                                         # so it does strike where it is trusted
    with pytest.raises(BadInput, match=f"^{path} is not a file of this project"):
        little(place.parents[2], begun)
    assert not marker.exists()
