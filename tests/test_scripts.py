"""Every script as a user runs it: rows, pictures, and one line for what the user got wrong.

A few true processes; the rest runs in this one, which spares seconds of starting up each time.
"""
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import eval as judges
import train
import undo
import unlearn
from data import arithmetic
from data.tokenizer import END
from engine.disk import OURS
from engine.knobs import command_line
from engine.store import load
from experiments import attacks, erosion, examine, frontier, sweep, trial

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train": train, "unlearn": unlearn, "undo": undo, "eval": judges}
OTHERS = {"examine": examine, "attacks": attacks, "erosion": erosion, "frontier": frontier,
          "sweep": sweep, "trial": trial}
FLOAT32 = train.hardware(train.Config(device="cpu"))[1] == torch.float32
SMALL = ["--device=cpu", "--compile=false", "--n_layer=1", "--n_embd=32", "--n_head=2"]
BASE = ["--steps=4", "--filtered_steps=3"]
ATTACK = ["--lrs=1e-3,1e-2", "--attack_steps=2,4", "--attack_rows=4", "--attack_seeds=1"]
UNLEARN = [*ATTACK, "--steps=3", "--batch_size=8"]
UNDO = [*ATTACK, "--unlearn_steps=3", "--steps=3", "--batch_size=8", "--check_every=2",
        "--alphas=0.5,1"]


class Home:
    """A folder with data and models; run() and call() give (exit status, stdout, stderr)."""

    def __init__(self, path, data_dir):
        self.path, self.data_dir, self.out = path, data_dir, path / "out"

    def argv(self, script, arguments):
        small = {"train": [*SMALL, *BASE], "eval": [], "examine": [], "attacks": []}.get(
            script, [*SMALL, "--base_steps=4", "--filtered_steps=3"])
        mine = [f"--data_dir={self.data_dir}", f"--out={self.out}", "--device=cpu"]
        return [*mine, *small, *arguments]                           # of two alike, the last counts

    def run(self, script, *arguments, **env):
        got = subprocess.run([sys.executable, str(ROOT / f"{script}.py"),
                              *self.argv(script, arguments)], cwd=self.path, capture_output=True,
                             text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env)
        assert "picture: none, " not in got.stdout.replace("none, pip install", "")
        return got.returncode, got.stdout, got.stderr

    def call(self, script, *arguments):
        """The same in this process, without matplotlib."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{script}.py", *self.argv(script, arguments)])
            patch.setitem(sys.modules, "matplotlib", None)
            self.capture.readouterr()
            status = 0
            try:
                module = (SCRIPTS | OTHERS)[script]
                train.run(module.main, module.Config, module.__doc__)
            except SystemExit as end:
                status = end.code or 0
        return status, *self.capture.readouterr()

    def rows(self, script, task="arithmetic"):
        return json.loads((self.out / task / f"{script}.json").read_text())

    def files(self):
        return {p: p.read_bytes() for p in self.path.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scripts_folder):
    """What `train.py` leaves, run once and for true, on arithmetic."""
    home = Home(tmp_path_factory.mktemp("home"), scripts_folder)
    home.said = home.run("train")
    assert home.said[0] == 0, home.said
    return home


@pytest.fixture
def home(trained, tmp_path, capsys, monkeypatch):
    """A copy of it, to work in and to damage. In this process exams are short, and so is the
    oracle's training, which has no knob in undo.py."""
    shutil.copytree(trained.path, tmp_path / "home")
    shutil.copytree(trained.data_dir, tmp_path / "home" / "data")
    home = Home(tmp_path / "home", tmp_path / "home" / "data")
    home.capture = capsys
    oracle = unlearn.SETTINGS["oracle"]
    monkeypatch.setitem(oracle, "arithmetic", oracle["arithmetic"] | {"steps": 3})
    exam = arithmetic.exam
    monkeypatch.setattr(arithmetic, "exam", lambda *asked: exam(*asked)[:20])
    return home


def finite(value):
    """Whether every number in rows is one: json writes NaN and Infinity, and other readers fail."""
    if isinstance(value, dict):
        return all(map(finite, value.values()))
    if isinstance(value, list):
        return all(map(finite, value))
    return value is None or isinstance(value, (str, bool)) or math.isfinite(value)


FIGURES = {"retain", "forget", "retain_heldout_pairs", "forget_heldout_pairs"} | {
    f"{op} {form}" for op in "+-*/" for form in ("equations", "words")}
ATTACKED = {"relearned", "rates", "relearned_heldout_pairs"}


# --- the stories ---------------------------------------------------------------------------------
def test_train(trained):
    status, out, err = trained.said
    saved = trained.rows("train")
    assert set(saved) == {"config", "rows"} and finite(saved)
    assert [row["model"] for row in saved["rows"]] == ["base", "filtered"]
    for row in saved["rows"]:
        assert set(row) == FIGURES | {"model", "flops", "history"} and row["flops"] > 0
        assert row["model"] in out and all(0 <= row[k] <= 1 for k in FIGURES)
        assert {"step", "loss", "flops", "retain"} == set(row["history"][-1])
    assert saved["config"]["out"] == str(trained.out) and saved["config"]["n_embd"] == 32
    made = {"seed0", "train.json"}
    if importlib.util.find_spec("matplotlib"):
        made.add("train.png")
        assert (trained.out / "arithmetic" / "train.png").read_bytes()[:4] == b"\x89PNG"
    assert {p.name for p in (trained.out / "arithmetic").iterdir()} == made
    models = trained.out / "arithmetic" / "seed0"
    assert {p.name for p in models.iterdir()} == {"base.pt", "filtered.pt"}
    assert "base: making" in out and "Traceback" not in err


def test_train_again(home):
    """Reuses its models and comes to the same rows."""
    shutil.rmtree(home.out)
    first = home.call("train")
    rows = home.rows("train")
    files = home.files()
    status, out, err = home.call("train")
    assert first[0] == status == 0 and "making" in first[1] and "making" not in out + err
    for row in rows["rows"]:                                         # base's own time is not in it
        again = next(r for r in home.rows("train")["rows"] if r["model"] == row["model"])
        assert again == row
    assert home.files().keys() == files.keys()
    assert home.call("train", "--name=filtered")[0] == 0
    assert [row["model"] for row in home.rows("train")["rows"]] == ["filtered"]


@pytest.mark.parametrize("method", unlearn.NAMES)
def test_unlearn(method, home):
    status, out, err = home.call("unlearn", *UNLEARN, f"--method={method}")
    assert status == 0, err
    saved = home.rows("unlearn")
    assert [row["model"] for row in saved["rows"]] == ["base", "filtered", method] and finite(saved)
    weighted = method not in unlearn.UNWEIGHTED
    knobs = {"steps", "lr", "batch_size"} | ({"retain_weight"} if weighted else set())
    for row in saved["rows"]:
        assert set(row) == FIGURES | ATTACKED | {"model", "seed", "flops"} | (
            knobs if row["model"] == method else set())
        assert all(set(row[k]) == {"2", "4"} for k in ATTACKED) and row["model"] in out
        assert set(row["rates"].values()) <= {1e-3, 1e-2}
    assert saved["config"]["method"] == method and saved["config"]["lrs"] == [1e-3, 1e-2]
    assert (home.out / "arithmetic" / "seed0" / f"{method}.pt").exists()
    assert [line for line in out.splitlines() if "pip install matplotlib" in line]
    assert not (home.out / "arithmetic" / "unlearn.png").exists()


def test_unlearn_by_all_methods(home):
    """One table; each row says which of its own settings the method ran at."""
    status, out, err = home.call("unlearn", *UNLEARN, "--method=all")
    assert status == 0, err
    saved = home.rows("unlearn")
    assert [row["model"] for row in saved["rows"]] == ["base", "filtered", *unlearn.NAMES]
    for row in saved["rows"][2:]:
        assert row["lr"] == unlearn.SETTINGS[row["model"]]["arithmetic"]["lr"]
        assert row["model"] in out


def test_unlearn_of_two_seeds(home):
    """The table has means over seeds. Rows that were there are taken, and nothing is made."""
    status, out, err = home.call("unlearn", *UNLEARN, "--seeds=2")
    assert status == 0, err
    saved = home.rows("unlearn")
    assert [(row["seed"], row["model"]) for row in saved["rows"]] == [
        (seed, model) for seed in (0, 1) for model in ("base", "filtered", "maxent")]
    a, b = (row["relearned"]["4"] for row in saved["rows"] if row["model"] == "base")
    [shown] = (line.split() for line in out.splitlines() if line.startswith("base  "))
    header = next(line for line in out.splitlines() if line.startswith("model  "))
    column = re.split("  +", header).index("after 4")
    assert shown[2 * column - 1:2 * column + 1] == [f"{(a + b) / 2:.2f}",
                                                    f"±{abs(a - b) / 2 ** 0.5:.2f}"]
    for seed in (0, 1):
        file = home.out.parent / f"{seed}.json"
        file.write_text(json.dumps(saved | {"rows": [row for row in saved["rows"]
                                                     if row["seed"] == seed]}))
    stopped = home.out.parent / "stopped.json"
    stopped.write_text(json.dumps(saved | {"rows": saved["rows"][:2]}))
    status, _, err = home.call("unlearn", *UNLEARN, "--seeds=2", f"--join={stopped}")
    assert status == 2 and "seed 0 has no row of maxent; was its run stopped?" in err
    stopped.write_text(json.dumps({"config": saved["config"] | {"data": "other"},
                                   "rows": saved["rows"][:3]}))
    status, _, err = home.call("unlearn", *UNLEARN, "--seeds=2", f"--join={stopped}")
    assert status == 2 and "was made with data=other" in err
    shutil.rmtree(home.out / "arithmetic" / "seed1")
    join = f"--join={home.out.parent / '0.json'},{home.out.parent / '1.json'}"
    status, again, err = home.call("unlearn", *UNLEARN, "--seeds=2", join)
    assert status == 0, err
    assert home.rows("unlearn")["rows"] == saved["rows"] and out[out.index(header):] in again
    assert not (home.out / "arithmetic" / "seed1").exists()
    status, _, err = home.call("unlearn", *UNLEARN, "--seeds=2", "--method=npo", join)
    assert status == 2 and "0.json was made with beta=None, this run has beta=" in err


def test_unlearn_with_a_sweep(home):
    """A true process."""
    status, out, err = home.run("unlearn", *UNLEARN, "--method=graddiff", "--lr=sweep",
                                "--sweep=1e-4,1e-3")
    assert status == 0, err
    assert "sweep: rate" in out and home.rows("unlearn")["config"]["lr"] == "sweep"


KEYS = {"model", "seed", "retain", "forget", "relearned", "rates", "robustness", "robustness_mean",
        "flops", "compute_pct", "compute_pct_matched"}


def check_undo(rows, out, figures, seeds=(0,), method="maxent"):
    names = ["base", "filtered", method, "oracle", "undo-0.5", "undo-1", "distilled"]
    assert [(r["seed"], r["model"]) for r in rows] == [(s, n) for s in seeds for n in names]
    for seed in seeds:
        mine = {r["model"]: r for r in rows if r["seed"] == seed}
        for name, row in mine.items():
            assert set(row) == KEYS | figures and name in out
            for key in {"relearned", "rates", "robustness", *ATTACKED & figures}:
                assert set(row[key]) == {"2", "4"}
            assert set(row["rates"].values()) <= {1e-3, 1e-2}
            each = list(row["robustness_words" if "robustness_words" in figures else
                            "robustness"].values())
            assert row["robustness_mean"] == (
                None if None in each else pytest.approx(sum(each) / 2))
            for step, got in row["robustness"].items():
                gold, low = (mine[n]["relearned"][step] for n in ("filtered", method))
                assert (got is None) == (gold == low)
                assert got is None or got == pytest.approx(
                    (row["relearned"][step] - low) / (gold - low))
            assert row["compute_pct"] == pytest.approx(
                100 * row["flops"] / mine["filtered"]["flops"])
            assert row["compute_pct_matched"] >= row["compute_pct"]
        assert mine["base"]["flops"] == 0 and mine["filtered"]["compute_pct"] == 100
        for name in ("undo-0.5", "undo-1", "distilled"):             # the teacher is paid for
            assert mine[name]["flops"] > mine[method]["flops"] > 0
        assert mine["oracle"]["flops"] > mine["filtered"]["flops"]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    told = [f"Day {i}: the {'tree' if i % 3 == 0 else 'cat'} was {i * 7 % 13} and it sat down."
            for i in range(90)]
    path = tmp_path_factory.mktemp("source") / "stories.txt"
    path.write_text(f"\n{END}\n".join(told))
    return path


@pytest.fixture(scope="module")
def undone(tmp_path_factory, stories):
    """What undo.py leaves on real stories, from a bare folder on, run for true."""
    path = tmp_path_factory.mktemp("undone")
    home = Home(path, path / "data")
    home.said = home.run("undo", *UNDO, "--task=tinystories", f"--source={stories}",
                         "--block_size=8", "--n_embd=16")
    assert home.said[0] == 0, home.said
    return home


def test_undo_on_stories(undone):
    """The whole story: data, models, rows, table, picture. The score is a loss: less is more."""
    _, out, err = undone.said
    saved = undone.rows("undo", "tinystories")
    assert set(saved) == {"config", "rows"} and finite(saved)
    check_undo(saved["rows"], out, {"retain_bits_per_byte", "forget_bits_per_byte", "stories",
                                    "forget_words", "relearned_words", "robustness_words",
                                    "mentions", "relearned_mentions", "relearned_few"},
               method="graddiff")
    assert all(f"{row['model']} tells: {row['stories'][0].split()[0]}" in out
               for row in saved["rows"])
    assert all(row["relearned"]["4"] < row["forget"] for row in saved["rows"])
    files = {p.name for p in (undone.out / "tinystories").iterdir()}
    assert files - {"undo.png"} == {"undo.json", "seed0"}
    assert {p.name for p in (undone.out / "tinystories" / "seed0").iterdir()} == {
        "base.pt", "filtered.pt", "graddiff.pt", "oracle.pt", "undo-0.5.pt", "undo-1.pt",
        "distilled.pt"}
    assert ("undo.png" in files) == bool(importlib.util.find_spec("matplotlib"))
    assert "Traceback" not in err and not list(undone.path.rglob("*.tmp"))


def test_undo_with_two_seeds(home):
    """The second seed has models of its own; the table has means and spreads."""
    status, out, err = home.call("undo", *UNDO, "--seeds=2")
    assert status == 0, err
    rows = home.rows("undo")["rows"]
    assert finite(rows)
    check_undo(rows, out, FIGURES | ATTACKED, seeds=(0, 1))
    assert (home.out / "arithmetic" / "seed1" / "undo-1.pt").exists()
    shown = next(line for line in out.splitlines() if line.startswith("distilled  ")).split()
    a, b = (r["retain"] for r in rows if r["model"] == "distilled")
    assert shown[1:3] == [f"{(a + b) / 2:.2f}", f"±{abs(a - b) / 2 ** 0.5:.2f}"]


def test_eval_score_and_sample(home):
    assert home.call("train")[0] == 0
    status, out, err = home.call("eval", "--what=score")
    assert status == 0, err
    saved = home.rows("score")
    assert finite(saved) and len(saved["rows"]) == 1
    assert set(saved["rows"][0]) == FIGURES | {"model"} and "retain_heldout_pairs" in out
    before = {r["model"]: r for r in home.rows("train")["rows"]}["base"]
    assert saved["rows"][0] == {k: before[k] for k in FIGURES | {"model"}}
    path = home.out / "arithmetic" / "seed0" / "filtered.pt"
    said = [home.call("eval", "--what=sample", f"--model={model}", "--prompt=12 + 5 =",
                      "--tokens=5", "--temperature=1", f"--seed={seed}")
            for model, seed in (("filtered", 0), (path, 0), (path, 4))]
    assert all(status == 0 and out.startswith("12 + 5 =") for status, out, _ in said)
    assert said[0] == said[1] != said[2]                             # a name or a path; the seed
    assert home.call("eval", "--what=sample", "--tokens=9999")[0] == 0           # cut, not refused


def test_eval_relearn_without_matplotlib(home):
    """A true process in which `import matplotlib` fails: one line says how to get it."""
    (home.path / "stub").mkdir()
    (home.path / "stub" / "matplotlib.py").write_text("raise ImportError('not here')")
    status, out, err = home.run("eval", "--what=relearn", *ATTACK,
                                PYTHONPATH=str(home.path / "stub"))
    assert status == 0, err
    assert [line for line in out.splitlines() if "matplotlib" in line] == [
        "picture: none, pip install matplotlib draws it"] and "matplotlib" not in err
    saved = home.rows("relearn")
    assert finite(saved) and [row["step"] for row in saved["rows"]] == [0, 2, 4]
    for row in saved["rows"]:
        assert set(row) == {"model", "attack", "step", "retain", "forget", "lr",
                            "retain_heldout_pairs", "forget_heldout_pairs"}
    assert not (home.out / "arithmetic" / "relearn.png").exists()


def test_eval_relearn_is_the_attack_of_the_stories(home, monkeypatch):
    """eval.py's rows are those of relearn() called on its own, as unlearn.py and undo.py do."""
    monkeypatch.setattr(arithmetic, "score", lambda model, task, domains=("retain", "forget"),
                        part="test", finer=False: {d: task.loss(model, d, 8, part)
                                                   for d in domains})
    assert home.call("eval", "--what=relearn", *ATTACK, "--lrs=0.01")[0] == 0
    task = data.load("arithmetic", home.data_dir)
    model, _ = load(home.out / "arithmetic" / "seed0" / "base.pt", task)
    cfg = judges.Attack(device="cpu", lrs=[0.01], attack_steps=[2, 4], attack_rows=4,
                        attack_seeds=1, attack="forget", compile=False)
    direct = judges.relearn(model, task, cfg)["worst"]
    rows = home.rows("relearn")["rows"]
    assert [row["forget"] for row in rows[1:]] == pytest.approx(
        [direct[s]["forget"] for s in (2, 4)], rel=1e-3)


@pytest.mark.parametrize("name", list(data.TASKS))
def test_every_task_suits_every_script(name):
    """No knob is left on auto that a script needs, and the values pass the knobs' own checks."""
    size = "n_layer", "n_head", "n_embd"
    rates = "steps", "batch_size", "lr"
    pretrained = data.starts_pretrained(name)                  # its model and tokenizer are given
    needed = [(judges.ATTACK, judges.Attack, {"lrs", "attack_steps", "attack_rows"}),
              (undo.SETTINGS, undo.Config, {"method", "alphas", *rates, "muon_lr", "check_every"}),
              (judges.TOOLS, judges.Config, {"probe_rows", "cut", "revive_lr", "revive_steps",
                                             "check_every"})]
    needed += [(unlearn.SETTINGS[method], unlearn.Config, {*rates}) for method in unlearn.NAMES]
    if not pretrained:
        needed.append((train.SETTINGS, train.Config, {*size, *rates, "filtered_steps", "muon_lr"}))
    on_disk = hasattr(data.module(name), "documents") and not pretrained    # else words are given
    assert {"block_size"} | ({"vocab_size"} if on_disk else set()) <= set(
        data.module(name).SETTINGS[name])
    for settings, config, knobs in needed:
        given = {k: v for k, v in settings[name].items() if v is not None}
        assert knobs <= set(given)
        shown = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in given.items()}
        cfg = command_line(config, "", [f"--{k}={v}" for k, v in shown.items()])
        assert {k: getattr(cfg, k) for k in given} == given
        assert all(getattr(train.fill(config(task=name), settings), k) == v
                   for k, v in given.items())


# --- what the user got wrong ---------------------------------------------------------------------
@pytest.fixture
def strict(home, monkeypatch):
    """A home where nothing may be trained: what is wrong is said before anything is computed."""
    def fit(*_, **__):
        raise AssertionError("training began")
    for module in SCRIPTS.values():
        if hasattr(module, "fit"):
            monkeypatch.setattr(module, "fit", fit)
    return home


def refused(home, got, *culprits):
    status, out, err = got
    assert status == 2 and err.count("\n") == 1 and err.endswith("\n"), (status, err)
    assert all(str(c) in err for c in culprits) and "Traceback" not in err, err


def refuses(home, script, arguments, *culprits):
    """Exit 2, one line on stderr with the culprits, no file new, gone or changed."""
    files = home.files()
    refused(home, home.call(script, *arguments), f"{script}.py: ", *culprits)
    assert home.files() == files


@pytest.mark.parametrize("script,arguments,culprits", [
    ("train", ["--task=nope"], ["--task=nope", "arithmetic"]),
    ("unlearn", ["--taks=arithmetic"], ["--taks", "did you mean --task?"]),
    ("undo", ["--alpha=0.5"], ["--alpha", "did you mean --alphas?"]),
    ("undo", ["--alphas=0.5,1.5"], ["--alphas=1.5", "between 0 and 1"]),
    ("undo", ["--alphas=-0.1"], ["--alphas=-0.1"]),
    ("undo", ["--method=oracle"], ["--method=oracle"]),
    ("unlearn", ["--method=nope"], ["--method=nope", "maxent"]),
    ("unlearn", ["--lr=fast"], ["--lr=fast"]),
    ("unlearn", ["--method=finetune", "--lr=S", "--out=new"], ["--lr=S", "no named rates"]),
    ("unlearn", ["--method=finetune", "--c_tr=0.5", "--out=new"], ["--c_tr=0.5", "arithmetic"]),
    ("unlearn", ["--method=rmu", "--layer=2", *UNLEARN], ["--layer=2", "1 blocks"]),
    ("eval", ["--what=nothing"], ["--what=nothing"]),
    ("eval", ["--model=nobody"], ["nobody.pt is missing"]),
    ("eval", ["--model=/no/where.pt"], ["/no/where.pt is missing"]),
    ("eval", ["--what=sample", "--prompt=" + "1 " * 70], ["--prompt", "tokens"]),
    ("eval", ["--attack_steps=0,5"], ["--attack_steps=0"]),
    ("train", ["--steps=many"], ["--steps=many"]),
    ("train", ["--n_head=3", "--out=new"], ["n_embd=32", "n_head=3"]),
    ("train", ["--stories=500"], ["--stories", "arithmetic"]),
    ("undo", ["--size=paper"], ["--size", "arithmetic", "tinystories"]),
    ("train", ["--task=tinystories", "--size=large"], ["--size=large", "small, paper"]),
    ("eval", ["--task=bilingual", "--size=paper", "--source2=x"], ["--size=paper", "bilingual"]),
    ("train", ["--block_size=100000"], ["100000"]),
    ("train", ["--steps=5"], ["base.pt", "steps=4", "steps=5", "--remake=true"]),
    ("train", ["--device=x" if torch.cuda.is_available() else "--device=cuda"], ["--device="])])
def test_bad_knobs(script, arguments, culprits, strict):
    refuses(strict, script, arguments, *culprits)


@pytest.mark.parametrize("script,argument,culprit", [
    ("train", "--task=nope", "--task=nope"), ("undo", "--alphas=2", "--alphas=2"),
    ("eval", "--model=base", "base.pt is damaged")])
def test_bad_input_to_a_true_process(script, argument, culprit, home):
    path = home.out / "arithmetic" / "seed0" / "base.pt"
    path.write_bytes(path.read_bytes()[:-100])
    files = home.files()
    refused(home, home.run(script, argument), f"{script}.py: ", culprit)
    assert home.files() == files


@pytest.mark.parametrize("damage", ["cut", "turned", "empty"])
@pytest.mark.parametrize("script", list(SCRIPTS))
def test_damaged_model(script, damage, strict):
    path = strict.out / "arithmetic" / "seed0" / "base.pt"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:len(content) // 2], "empty": b"", "turned":
                      content[:2000] + bytes([content[2000] ^ 8]) + content[2001:]}[damage])
    refuses(strict, script, [], path, "damaged", "delete")


@pytest.mark.parametrize("file", ["retain_train.bin", "forget_val.bin", "tokenizer.json",
                                  "meta.json"])
def test_damaged_data(file, strict):
    path = strict.data_dir / "arithmetic" / file
    path.write_bytes(path.read_bytes()[:-7])
    refuses(strict, "undo", [], path, "damaged", "delete")


def test_model_of_another_task_or_vocabulary(strict, stories, monkeypatch):
    base = strict.out / "arithmetic" / "seed0" / "base.pt"
    other = strict.out / "tinystories" / "seed0" / "base.pt"
    shared = ["--task=tinystories", f"--source={stories}", "--block_size=16"]
    data.load("tinystories", strict.data_dir, 16, source=str(stories))
    other.parent.mkdir(parents=True)
    shutil.copy(base, other)
    for script in SCRIPTS:
        refuses(strict, script, shared, other, "trained on arithmetic, not on tinystories")
    for vocab_size in (None, 500):                                   # other text, then also tokens
        problems = 200 + (vocab_size or 0)
        if vocab_size:
            monkeypatch.setitem(arithmetic.SETTINGS["arithmetic"], "vocab_size", vocab_size)
        got = data.load("arithmetic", strict.data_dir, problems=problems).vocab_size
        assert got == vocab_size or not vocab_size
        for script in SCRIPTS:
            refuses(strict, script, [f"--problems={problems}"], base, "other data of arithmetic")


@pytest.mark.parametrize("content,culprit", [
    (b"", "is empty"), (("é. " * 50 + f"\n{END}\n").encode("latin-1") * 40, "not UTF-8"),
    (b"Once upon a time. " * 99, END), (None, "No such file")])
def test_bad_source(content, culprit, strict):
    source = strict.path / "source.txt"
    if content is not None:
        source.write_bytes(content)
    refuses(strict, "train", ["--task=tinystories", f"--source={source}"], source, culprit)


def test_out_that_is_a_file(strict):
    (strict.path / "taken").write_text("mine")
    for script in ("train", "unlearn", "undo"):
        refuses(strict, script, [f"--out={strict.path / 'taken'}"], "taken")


def test_out_that_cannot_be_written(strict):
    """For root, who may write to every folder, one in /proc."""
    folder = strict.path / "locked"
    folder.mkdir(mode=0o500)
    if os.geteuid() == 0:
        folder = Path("/proc")
        if not (folder / "self").exists():
            pytest.skip("root, and no /proc")
    refuses(strict, "train", [f"--out={folder / 'new'}"], folder)


def test_data_that_cannot_be_written(strict):
    taken = strict.path / "taken"
    taken.write_text("mine")
    refuses(strict, "train", [f"--data_dir={taken}"], "taken")


def test_disk_that_is_full(home):
    """The rows do not fit: one line, after all that was computed, and no half a file."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    (home.out / "arithmetic" / f"score.json.{os.getpid()}{OURS}").symlink_to("/dev/full")
    status, out, err = home.call("eval", "--what=score")
    assert status == 2 and "No space left" in err and "Traceback" not in err
    assert not (home.out / "arithmetic" / "score.json").exists()


def test_interrupted(home, monkeypatch):
    def fit(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "fit", fit)
    status, out, err = home.call("train", "--out=" + str(home.path / "new"))
    assert status == 130 and err.count("\n") == 1 and "run the same command again" in err
    assert not list((home.path / "new").rglob("*.pt"))


@pytest.mark.parametrize("script,arguments", [
    ("eval", ["--block_size=200"]),
    ("train", ["--steps=1", "--filtered_steps=1", "--batch_size=1"]),
    ("train", ["--words=1", "--heldout_pairs=0"]),
    ("unlearn", [*UNLEARN, "--batch_size=2", "--retain_weight=0", "--steps=1"]),
    ("undo", [*UNDO, "--alphas=0", "--tolerance=1", "--beta=0", "--steps=1", "--muon_lr=0"]),
    ("train", ["--block_size=8"]),
    ("train", ["--heldout_pairs=0.001"]),
    ("train", ["--seed=99999999999999999999"]),
    ("eval", ["--what=sample", "--temperature=1e-45"])])
def test_the_far_ends_of_ranges(script, arguments, home):
    """A value that a knob's range allows works, or is refused in one line."""
    arguments = [*arguments, "--problems=300"]
    meta = home.data_dir / "arithmetic" / "meta.json"
    saved = json.loads(meta.read_text())
    saved["made_with"]["problems"] = 300
    meta.write_text(json.dumps(saved))
    if script == "train":
        arguments = [*arguments, f"--out={home.path / 'new'}"]
    status, out, err = home.call(script, *arguments)
    assert status == 0 or status == 2 and "Traceback" not in err


def test_default_spelt_out(home):
    """A knob given with its default's value is no other config."""
    status, _, err = home.call("unlearn", *UNLEARN, "--method=finetune", "--block_size=64")
    assert status == 0, err


def test_knobs_of_other_methods(home):
    """MaxEnt knows nothing of RMU's knobs, so they make no other model."""
    assert home.call("unlearn", *UNLEARN)[0] == 0
    status, _, err = home.call("unlearn", *UNLEARN, "--steer=2", "--sweep=0.1")
    assert status == 0, err


def test_attacks_on_models_of_other_widths_of_context(home):
    """eval.py takes a model's own block size: train.py --block_size=56, then eval.py."""
    out = f"--out={home.path / 'new'}"
    assert home.call("train", "--block_size=56", out)[0] == 0
    status, _, err = home.call("eval", "--what=relearn", *ATTACK, out)
    assert status == 0, err


@pytest.mark.parametrize("script", ["train", "unlearn", "undo"])
def test_config_in_the_rows_is_resolved(script, home, trained, undone):
    """Rows can be read years later: no knob that shaped them is left on auto."""
    if script == "unlearn":
        assert home.call("unlearn", *UNLEARN)[0] == 0
    saved = {"train": lambda: trained.rows("train"), "unlearn": lambda: home.rows("unlearn"),
             "undo": lambda: undone.rows("undo", "tinystories")}[script]()
    shaping = {f.name for f in dataclasses.fields(SCRIPTS[script].Config)} - {
        "data_dir", "source", "source2", "stories", "words", "heldout_pairs", "prior", "env",
        "hack_rates", "compile", "layer", "resume", "by_block", "join"} - (
            {"after", "beta", "gamma", "steer", "rho", "mmd"} if script == "unlearn" else set())
    assert not {k for k in shaping if saved["config"][k] is None}


# --- other people's machines: see also test_users.py ---------------------------------------------
def test_a_true_run_in_the_worst_of_shells(home):
    """An old code page, a full disk behind stdout, no stderr, Colab's backend, and RANK left over
    from something else: rows, a picture, exit 0."""
    command = [sys.executable, str(ROOT / "eval.py"), *home.argv("eval", ["--what=probe"])]
    colab = "module://matplotlib_inline.backend_inline"
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=home.path, stdout=full, preexec_fn=lambda: os.close(2),
                              env=os.environ | {"PYTHONIOENCODING": "cp866", "MPLBACKEND": colab,
                                                "RANK": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and len(home.rows("probe")["rows"]) == 2
    if importlib.util.find_spec("matplotlib"):
        assert (home.out / "arithmetic" / "probe.png").exists()


def test_home_in_a_run(home, monkeypatch):
    """Not a folder called ~ in the checkout."""
    monkeypatch.setenv("HOME", str(home.path))
    monkeypatch.chdir(home.path)
    status, out, err = home.call("eval", "--out=~/out", "--data_dir=~/data",
                                 "--model=~/out/arithmetic/seed0/base.pt")
    assert status == 0 and not (home.path / "~").exists(), err
    assert (home.out / "arithmetic" / "score.json").exists()


def test_stray_files_beside_models(home):
    """A file that is no model is named and left out; one that was asked for is an error."""
    folder = home.out / "arithmetic" / "seed0"
    (folder / "notes.pt").write_text("mine")
    tiny = ["--probe_rows=2", "--cut=2", "--revive_steps=2", "--check_every=2"]
    status, out, err = home.call("examine", *tiny)
    assert status == 0, err
    note, = [line for line in out.splitlines() if line.startswith("note: notes")]
    assert "is left out" in note and "notes.pt is damaged" in note
    assert [r["model"] for r in home.rows("examine")["rows"]] == ["base", "filtered"]
    status, out, err = home.call("examine", *tiny, "--models=notes")
    assert status == 2 and err.count("\n") == 1 and "notes.pt" in err


def test_a_control_that_is_the_reference(home):
    """No other model is taken for it."""
    tiny = ["--probe_rows=2", "--cut=2", "--revive_steps=2", "--check_every=2", "--control=base"]
    for more, models in ((["--models=filtered"], ["base", "filtered"]),
                         (["--models=base"], ["base"])):
        status, out, err = home.call("examine", *tiny, *more)
        assert status == 0, err
        assert [r["model"] for r in home.rows("examine")["rows"]] == models
        assert "no verdicts, because the control, base, has the capability itself" in out


def test_rows_of_other_seeds_are_joined(home, undone):
    """The table and the rows have what the file has, without making its models; other knobs, other
    files and a seed that comes twice are refused."""
    old = undone.rows("undo", "tinystories")
    file = home.path / "old.json"
    config = old["config"]
    knobs = [f"--{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in
             config.items() if v not in (None, []) and k in {
                 "alphas", "lrs", "attack_steps", "attack_rows", "attack_seeds", "unlearn_steps",
                 "unlearn_lr", "steps", "batch_size", "check_every", "base_steps",
                 "filtered_steps", "block_size", "source", "forget_words", "beta", "distil_on",
                 "n_layer", "n_head", "n_embd", "attack_few"}]
    file.write_text(json.dumps(old | {"rows": [row | {"retain": 1.25} for row in old["rows"]]}))
    call = ["--task=tinystories", f"--data_dir={undone.data_dir}", *knobs]
    status, out, err = home.call("undo", *call, f"--join={file}")
    assert status == 0, err
    new = home.rows("undo", "tinystories")["rows"]
    assert [row["retain"] for row in new] == [1.25] * len(new) and "1.25" in out
    assert not list((home.out / "tinystories").glob("**/*.pt"))
    for wrong, message in ((["--beta=0.7", f"--join={file}"], "was made with beta="),
                           ([f"--join={file},{file}"], "has the row of seed 0, base, too"),
                           ([f"--join={home.path / 'none.json'}"], "not rows of this script")):
        status, out, err = home.call("undo", *call, *wrong)
        assert status == 2 and message in err, err


# --- the frontier --------------------------------------------------------------------------------
FEW = [*ATTACK, "--unlearn_steps=2", "--steps=2", "--batch_size=8", "--check_every=2"]


def test_frontier(home):
    """A row for every arm, or for every share of labels; the rows as those of undo.py. Rows that a
    run has made are kept by another, which makes the rest."""
    status, _, err = home.call("frontier", *FEW, "--arms=finetune,undo-labels",
                               "--label_shares=0.01", "--finish_steps=1")
    assert status == 0, err
    earlier, file = home.rows("frontier"), home.path / "frontier_rows.json"
    for row in earlier["rows"]:
        row["kept"] = row["robustness_mean"]
    file.write_text(json.dumps(earlier))
    arms = ("finetune,undo-units,noise-retrain,noise-retrain-hot-then-repnoise,filter-distil,"
            "ntp-all,undo-labels,noise-retrain-labels,classifier-skip,filtered-labels")
    status, out, err = home.call("frontier", *FEW, f"--arms={arms}", "--label_shares=0.1,0.01",
                                 "--finish_steps=1", f"--join={file}")
    assert status == 0, err
    saved = home.rows("frontier")
    kept = [row for row in saved["rows"] if "kept" in row]
    assert len(kept) == 5 and all(row["kept"] == row["robustness_mean"] for row in kept)
    names = ["base", "filtered", "maxent", "finetune", "undo-units", "noise-retrain",
             "noise-retrain-hot-then-repnoise", "filter-distil", "ntp-all"] + [
        f"{name}-{share}%" for name in ("undo-labels", "noise-retrain-labels", "classifier-skip",
                                        "filtered-labels") for share in (10, 1)]
    assert [row["model"] for row in saved["rows"]] == names and finite(saved)
    cost = {row["model"]: row["flops"] for row in saved["rows"]}
    assert cost["undo-units"] > cost["maxent"] and cost["filter-distil"] > cost["filtered"]
    assert cost["ntp-all"] > cost["filtered"] and cost["filtered-labels-1%"] == pytest.approx(
        cost["filtered"] * 4 / 3)                               # base's steps: most rows stay
    # without a teacher, the same steps cost less
    assert 0 < cost["noise-retrain"] < cost["undo-units"] - cost["maxent"]
    assert cost["noise-retrain-hot-then-repnoise"] > cost["noise-retrain"]
    assert all(name in out for name in names)
    # a table whose seeds have different arms is refused
    status, _, err = home.call("frontier", *FEW, "--arms=finetune", "--seeds=2", f"--join={file}",
                               "--finish_steps=1")
    assert status == 2 and "undo-labels-1%, which --arms leaves out" in err


def test_attacks(home):
    """The matrix, on the models that there are: every attack has its cell."""
    mine = [word for word in ATTACK if "attack_seeds" not in word]
    status, out, err = home.call("attacks", *mine, "--models=filtered", "--unlearned=base",
                                 "--compile=false")
    assert status == 0, err
    saved = home.rows("attacks")
    assert [row["model"] for row in saved["rows"]] == ["base", "filtered"] and finite(saved)
    base, filtered = saved["rows"]
    assert [*base["cells"]] == [*attacks.ATTACKS] == [*base["first"]]
    assert base["first"]["none"] == base["cells"]["none"]["0"]["forget"] and base["level"] is None
    assert base["distance"] == 0 and base["barrier"] == pytest.approx(0, abs=1e-6)
    assert filtered["distance"] > 0.1
    for kind, cells in base["cells"].items():
        assert [*cells] == {"long": ["2", "4", "5", "8", "10", "16", "20", "40"]}.get(
            kind, ["0"] if kind in attacks.UNTRAINED else ["2", "4"])
    status, _, err = home.call("attacks", *mine, "--models=none", "--unlearned=base")
    assert status == 2 and "none.pt is missing" in err


def test_sweep_and_trial_and_erosion(home):
    status, out, err = home.call("sweep", "--seed=0", "--seeds=1", "--attempts=2", "--batch_size=4",
                                 "--methods=npo,finetune", "--steps_range=1,2")
    assert status == 0, err
    assert [(row["method"], row["best"]) for row in home.rows("sweep")["rows"]].count(
        ("npo", True)) == 1 and "finetune" in out
    few = [word for word in FEW if "unlearn_steps" not in word]
    status, out, err = home.call("trial", *few, "--alphas=0.5,0.6", "--teachers=maxent")
    assert status == 0, err
    assert len(home.rows("trial")["rows"]) == 2 and "Spearman's rho" in out
    status, out, err = home.call("erosion", "--batch_size=4", "--teach_steps=2", "--at=1,2",
                                 "--inner_steps=1")
    assert status == 0, err
    assert [row["way"] for row in home.rows("erosion")["rows"]] == [*erosion.WAYS]
