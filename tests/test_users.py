"""What a run meets on other people's machines: consoles, environments, paths, stray files."""
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_scripts import ROOT, SCRIPTS

import recontext
import route
import train
from engine.disk import OURS, remove_leftovers, write
from engine.knobs import BadInput, FilePath, command_line
from engine.process import Console, launched
from engine.report import mean_sd, picture, table, write_rows

ALL = SCRIPTS | {"route": route, "recontext": recontext}


# --- consoles ------------------------------------------------------------------------------------
def tell(cfg):
    """A story in small: a table of a mean and its spread, rows."""
    table([{"model": "base", "score": mean_sd([0.8, 0.9], 2)}], {"model": "", "score": "score"})
    (cfg.path / "rows").touch()


def told(path, monkeypatch, stdout, stderr=None):
    """The exit status of a story that is told to these streams."""
    monkeypatch.setattr(sys, "argv", ["story.py"])
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    config = dataclasses.make_dataclass("Config", [])
    train.run(lambda cfg: tell(SimpleNamespace(path=path)), config, "A story.")
    assert (path / "rows").exists() and sys.stdout is stdout and sys.stderr is stderr


@pytest.mark.parametrize("encoding", ["cp866", "ascii", "cp1252", "utf-8"])
def test_what_a_console_cannot_show(encoding, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    told(tmp_path, monkeypatch, stdout)
    shown = "±" if encoding in ("cp1252", "utf-8") else "?"
    assert f"0.85 {shown}0.07" in stdout.buffer.getvalue().decode(encoding)
    print("a stray byte: \udcff", file=Console(stdout), flush=True)
    assert b"a stray byte: ?" in stdout.buffer.getvalue()


def closed_pipe():
    reads, writes = os.pipe()
    os.close(reads)
    return open(writes, "w")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("broken", [
    closed_pipe, closed, lambda: None, lambda: open("/dev/full", "w"),
    lambda: open("/dev/full", "w", buffering=1)])
def test_nobody_reads_on(broken, tmp_path, monkeypatch):
    """Nor does Python complain when it flushes at its end what is left in a buffer."""
    stdout, stderr = broken(), broken()
    told(tmp_path, monkeypatch, stdout, stderr)
    monkeypatch.undo()
    for stream in (stdout, stderr):
        if stream:
            stream.close()


# --- pictures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["drawing", "saving", "importing"])
def test_pictures_that_cannot_be(fault, tmp_path, monkeypatch, capsys):
    """One line; rows are there, and no half a picture."""
    pytest.importorskip("matplotlib")
    import matplotlib
    cfg = train.Config(out=str(tmp_path))
    (tmp_path / cfg.task).mkdir()
    write_rows("story", cfg, None, [{"model": "base"}])
    if fault == "saving":
        (tmp_path / cfg.task / "story.png").mkdir()
    if fault == "importing":
        monkeypatch.setattr(matplotlib, "rc_context", lambda *_: [][0])
    picture("story", cfg, lambda ax: ax.plot([1, 2], [1, 2] if fault != "drawing" else [1, 2, 3]))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("picture: none, ") and not err, out
    assert "pip install" not in out and (tmp_path / cfg.task / "story.json").exists()
    assert not (tmp_path / cfg.task / "story.png").is_file()


# --- environments --------------------------------------------------------------------------------
WHOLE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
         "MASTER_PORT": "29500"}


@pytest.mark.parametrize("env, expected", [
    ({}, (0, 1, 0)), ({"RANK": "1"}, (0, 1, 0)), ({"RANK": ""}, (0, 1, 0)),
    ({"WORLD_SIZE": "", "RANK": "2"}, (0, 1, 0)), ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1, 0)),
    (WHOLE, (3, 4, 1)),
    ({"WORLD_SIZE": "4", "RANK": "0"}, "no LOCAL_RANK, no MASTER_ADDR, no MASTER_PORT"),
    (WHOLE | {"RANK": ""}, "no RANK"), (WHOLE | {"RANK": "4"}, "RANK=4"),
    (WHOLE | {"WORLD_SIZE": "many"}, "WORLD_SIZE=many"),
    (WHOLE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"), (WHOLE | {"WORLD_SIZE": "0"}, "RANK=3")])
def test_half_of_torchruns_environment(env, expected, monkeypatch, capsys):
    if isinstance(expected, tuple):
        assert launched(env) == expected
        return
    with pytest.raises(BadInput, match=expected):
        launched(env)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        train.run(None, train.Config, "A story.")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and expected in err


TORCH = """import os, signal, time
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
number = int(os.environ["SIGNAL"])
if number:
    os.kill(os.getpid(), number)
    time.sleep(10)
raise SystemExit
"""


@pytest.fixture
def before_torch(tmp_path):
    """Runs a script until it loads torch, which stands for all that takes seconds to load."""
    (tmp_path / "torch.py").write_text(TORCH)

    def run(script, number=0, **env):
        # a shell starts its background jobs with SIGINT ignored: not here
        return subprocess.run([sys.executable, str(ROOT / f"{script}.py")], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | env | {
                                  "PYTHONPATH": str(tmp_path), "SIGNAL": str(int(number))},
                              preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return run


@pytest.mark.parametrize("script", ALL)
def test_signals_before_it_began(script, before_torch):
    for number in (signal.SIGINT, signal.SIGTERM):
        done = before_torch(script, number)
        assert done.returncode == 128 + number and done.stderr == (
            f"{script}.py: interrupted before it began; run the same command again\n")


def test_threads_spin_shortly_unless_the_user_says_otherwise(before_torch, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert {before_torch(script).stdout for script in ALL} == {"None 10000\n"}
    assert before_torch("train", OMP_WAIT_POLICY="ACTIVE").stdout == "ACTIVE None\n"
    assert before_torch("train", GOMP_SPINCOUNT="7").stdout == "None 7\n"


def test_importing_a_script_takes_no_signals():
    """In a notebook, or here, they are not ours."""
    assert getattr(signal.getsignal(signal.SIGINT), "__module__", "") != "engine.start"


# --- paths and files -----------------------------------------------------------------------------
@pytest.mark.parametrize("script", ALL)
def test_every_path_knows_the_users_home(script, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = ALL[script].Config
    if "tinystories" in config.__dataclass_fields__["task"].metadata["choices"]:
        given = ["--task=tinystories"]
        fields = {f.name for f in dataclasses.fields(config.for_task("tinystories"))}
        assert {"source", "source2"} <= fields
    else:
        given, fields = [], {f.name for f in dataclasses.fields(config)}
    paths = {"out", "data_dir", "source", "source2", "model", "models", "reference", "control"}
    assert {"out", "data_dir"} <= fields & paths
    for name in fields & paths:
        cfg = command_line(config, "", [*given, f"--{name}=~/x"])
        assert getattr(cfg, name) in (f"{tmp_path}/x", [f"{tmp_path}/x"]), name
        assert getattr(command_line(config, "", [*given, f"--{name}=x~/y"]), name) in (
            "x~/y", ["x~/y"])
    assert json.dumps(FilePath("~")) == f'"{tmp_path}"'


def test_only_what_we_wrote_is_removed(tmp_path):
    mine = [tmp_path / "notes" / "draft.tmp", tmp_path / "base.pt.123.tmp", tmp_path / "x.part"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "mine.tmp").mkdir()
    (tmp_path / f"folder{OURS}").mkdir()
    for path in mine:
        path.write_text("mine")
    left = tmp_path / "seed1" / f"base.pt.123{OURS}"
    left.parent.mkdir()
    left.write_text("half")
    remove_leftovers(tmp_path)
    assert all(path.exists() for path in mine) and not left.exists()
    assert (tmp_path / "mine.tmp").is_dir() and (tmp_path / f"folder{OURS}").is_dir()


def test_leftovers_are_called_as_what_is_removed(tmp_path, monkeypatch):
    """What write() leaves when it is killed is what remove_leftovers() knows."""
    monkeypatch.setattr(os, "fsync", lambda fd: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        write(tmp_path / "base.pt", b"whole")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left, = tmp_path.iterdir()
    assert left.name.startswith("base.pt.")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())
