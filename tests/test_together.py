"""Two processes by torchrun (gloo, on the CPU) against one: the same batches, the same result."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data import BadInput
from engine.disk import read_sealed

ROOT = Path(__file__).parent.parent
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = ["--device=cpu", "--compile=false", "--n_layer=2", "--n_embd=32", "--n_head=2"]
UNDO = [*SMALL, "--base_steps=24", "--filtered_steps=12", "--attack_steps=2,4", "--attack_rows=4",
        "--attack_seeds=1", "--lrs=1e-3,1e-2", "--unlearn_steps=3", "--steps=12", "--muon_lr=0",
        "--batch_size=8", "--check_every=4", "--alphas=0.5",
        "--method=rmu"]                                  # RMU leaves a block without gradients
BASE = [*SMALL, "--steps=24", "--name=base", "--save_every=5"]
DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train, undo, unlearn
from data import arithmetic
from engine import hardware
torch.set_num_threads(1)
for room in (hardware, train):                                                # float32: comparable
    room.hardware = lambda cfg: (torch.device("cpu"), torch.float32, None)
exam = arithmetic.exam
arithmetic.exam = lambda *asked: exam(*asked)[:10]
unlearn.SETTINGS["oracle"]["arithmetic"]["steps"] = 6
rank, how = os.environ.get("RANK", "0"), os.environ.get("DIE")
step = train.Run.step
def fragile(self, *rest):
    if rank == "1" and self.steps == 15 and how == "error":
        raise ZeroDivisionError("this rank had enough")
    if rank == "1" and self.steps == 15 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == "1" and self.steps == 15 and how == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    step(self, *rest)
    norms.append(self.since[-1][1].item())
    if len(norms) == 12:
        open(f"norms{{os.environ.get('WORLD_SIZE', 1)}}-{{rank}}.json", "w").write(str(norms))
norms, train.Run.step = [], fragile
story = undo if sys.argv.pop(1) == "undo" else train
train.run(story.main, story.Config, "")
"""


def run(folder, scripts_folder, out, story, arguments, launcher=(), **env):
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    return subprocess.run(
        [sys.executable, *launcher, str(driver), story, f"--data_dir={scripts_folder}",
         f"--out={folder / out}", *arguments], cwd=folder, capture_output=True, text=True,
        timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def apart(a, b):
    """Largest relative distance of two models' matrices. They drift: where a gradient is all but
    zero, AdamW divides it by nearly nothing."""
    return max(((a["model"][k] - w).norm() / w.norm()).item() for k, w in b["model"].items())


@pytest.fixture(scope="module")
def alone(tmp_path_factory, scripts_folder):
    """What one process makes."""
    folder = tmp_path_factory.mktemp("together")
    done = run(folder, scripts_folder, "one", "undo", UNDO)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_are_as_one(alone, scripts_folder):
    """Every model of undo.py: weights, history, cost and rows; one table, one writer."""
    folder, one = alone
    two = run(folder, scripts_folder, "two", "undo", UNDO, TORCHRUN)
    assert two.returncode == 0, two.stderr
    assert "Warning" not in two.stderr.replace("OMP_NUM_THREADS", "")
    assert two.stdout.replace("/two/", "/one/").splitlines()[0] == one.stdout.splitlines()[0]
    assert len(two.stdout.splitlines()) == len(one.stdout.splitlines())
    norms = [json.loads((folder / f"norms{who}.json").read_text()) for who in ("1-0", "2-0", "2-1")]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5) and norms[1] == norms[2]
    assert norms[0] == pytest.approx(norms[1], rel=5e-4)       # Muon rounds to bfloat16: they drift
    names = sorted(p.name for p in (folder / "one" / "arithmetic" / "seed0").glob("*.pt"))
    assert len(names) == 6 and not list((folder / "two").rglob("*.tmp"))
    for name in names:
        a, b = (read_sealed(folder / out / "arithmetic" / "seed0" / name) for out in ("one", "two"))
        assert a["made_with"].keys() == b["made_with"].keys() and a["steps"] == b["steps"]
        assert b["flops"] >= a["flops"]            # what both do is counted twice, for it is spent
        assert apart(a, b) < 0.1
        assert [h["step"] for h in a["history"]] == [h["step"] for h in b["history"]]
        tolerance = 1e-4 if name in ("base.pt", "filtered.pt") else 0.02    # drift adds up
        for before, after in zip(a["history"], b["history"]):
            assert after["loss"] == pytest.approx(before["loss"], rel=tolerance)
    rows = [json.loads((folder / out / "arithmetic" / "undo.json").read_text())["rows"]
            for out in ("one", "two")]
    assert [r["model"] for r in rows[0]] == [r["model"] for r in rows[1]]


def test_each_gets_its_rows(task):
    """Together the processes see the batch of one, each row once; held-out rows are not divided.
    Whose the first row is goes round from step to step."""
    whole = [task.batch("all", 12, step, 0) for step in range(4)]
    held_out = {part: task.batch("retain", 4, 3, 0, part)[0] for part in ("val", "test")}
    shares = []
    try:
        for rank in range(3):
            task.shard = (rank, 3)
            shares.append([task.batch("all", 12, step, 0) for step in range(4)])
            for part, rows in held_out.items():
                assert torch.equal(task.batch("retain", 4, 3, 0, part)[0], rows)
        with pytest.raises(BadInput, match="13 rows .* 3 processes"):
            task.batch("all", 13, 3, 0)
    finally:
        task.shard = (0, 1)
    for step, batch in enumerate(whole):
        first = [shares[(i - step) % 3][step] for i in range(3)]      # who has rows 0, 1 and 2
        for side in (0, 1):
            assert torch.equal(torch.stack([s[side] for s in first], 1).flatten(0, 1), batch[side])


@pytest.mark.parametrize("how,said", [("error", "this rank had enough"), ("kill", "SIGKILL"),
                                      ("signal", "stopped after step 20")])
def test_one_that_ends_ends_all(how, said, alone, scripts_folder):
    """With its error; the checkpoint before is whole, and one process alone goes on from it."""
    folder, _ = alone
    died = run(folder, scripts_folder, how, "train", BASE, TORCHRUN, DIE=how)
    assert died.returncode != 0 and said in died.stderr, died.stderr
    kept = folder / how / "arithmetic" / "seed0" / "base.resume.pt"
    assert read_sealed(kept)["steps"] == (20 if how == "signal" else 15)
    assert not kept.with_name("base.pt").exists()
    if how == "kill":
        again = run(folder, scripts_folder, how, "train", BASE)
        assert again.returncode == 0 and f"going on from {kept}" in again.stdout, again.stderr
        a, b = (read_sealed(folder / out / "arithmetic" / "seed0" / "base.pt")
                for out in ("one", how))
        assert apart(a, b) < 0.1
