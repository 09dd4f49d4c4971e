"""What a run meets on other people's machines: consoles, environments, paths, stray files."""
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from test_scripts import ROOT, SCRIPTS

import recontext
import route
import train
import undo
from data.tinystories import FOREST, mention
from engine.disk import OURS, remove_leftovers, write
from engine.knobs import BadInput, FilePath, command_line
from engine.process import Console, launched
from engine.report import draw_stories, mean_sd, picture, table, write_rows

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
    path = picture("story", cfg, lambda ax: ax.plot([1, 2],
                                                    [1, 2] if fault != "drawing" else [1, 2, 3]))
    assert path is None, "a notebook would show the picture of an earlier run"
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("picture: none, ") and not err, out
    assert "pip install" not in out and (tmp_path / cfg.task / "story.json").exists()
    assert not (tmp_path / cfg.task / "story.png").is_file()


def told_in(tmp_path, stories, capsys, topic=mention(FOREST)):
    """The axes of a picture that shows stories over two other panels."""
    pytest.importorskip("matplotlib")
    kept = []

    def draw(axes):
        axes[2].figure.suptitle("What models tell")
        draw_stories(axes[2:], stories, topic)
        kept.extend(axes[2:])

    with warnings.catch_warnings():
        warnings.simplefilter("error")                     # such as a sign that the face lacks
        picture("undo", train.Config(out=str(tmp_path)), draw, panels=2, above=len(stories))
    assert "picture: none" not in capsys.readouterr().out and len(kept) == len(stories)
    kept[0].figure.figure.set_dpi(130)                     # extents are asked as they were saved
    kept[0].figure.figure.draw_without_rendering()
    return kept


def lines_of(ax):
    """[(a line's plain letters, its bold ones)], with blanks where the others are."""
    lines = {}
    for text in ax.texts:
        lines.setdefault(text.xyann, {})[text.get_weight() == "bold"] = text.get_text()
    return [(lines[at][False], lines[at][True]) for at in sorted(lines, key=lambda at: -at[1])]


def read(ax):
    """The lines as a reader sees them."""
    for plain, bold in lines_of(ax):
        assert len(plain) == len(bold) and all(" " in pair for pair in zip(plain, bold))
    return ["".join(map(max, zip(*line))) for line in lines_of(ax)]


WALK = ("The tree-house stood in a FOREST, by the street. Trees (one tree, two trees) fell;\n\n"
        "the forestry of Treetop: 'Woodland!' It cost $\\frac$. ") * 2 + "Woods, a tree."


def test_forget_words_are_marked(tmp_path, capsys):
    """Against a brute force: what is no letter becomes a space, then whole words are compared."""
    stories = {"a": WALK, "empty": "", "b": WALK.replace("tree", "cat")}
    for ax in told_in(tmp_path, stories, capsys):
        found, told = [], stories[ax.get_title(loc="left")]
        for line, (_, bold) in zip(read(ax), lines_of(ax)):
            expected = "".join(c if c.isalpha() else " " for c in line)
            for word in expected.split():
                if word.lower() not in FOREST:
                    expected = f" {expected} ".replace(f" {word} ", f" {' ' * len(word)} ")[1:-1]
            assert bold == expected
            found += bold.split()
        assert " ".join(read(ax)) == " ".join(told.split())
        assert found == mention(FOREST).findall(told)
    plain, bold = ({text.get_color() for text in ax.texts if (text.get_weight() == "bold") == yes}
                   for yes in (False, True))
    assert len(plain) == len(bold) == 1 and plain != bold


def test_bold_letters_stand_in_the_gaps(tmp_path, capsys):
    """A line is as wide in bold letters as in plain ones, whatever signs are in it."""
    odd = "e\u0301 tree\u0301 \u65e5\u672c \U0001f600 \x07\xad \ufb01 Лес ёлка tree, “Tree”. "
    [ax] = told_in(tmp_path, {"odd": odd}, capsys)
    [line], (plain, bold) = read(ax), ax.texts
    assert len(line) == len(odd.rstrip()) and line.count("\ufffd") == 7 and "Лес ёлка" in line
    widths = []
    for text in (plain, bold):
        assert text.get_window_extent().x0 == plain.get_window_extent().x0
        text.set_text("x" * len(line))
        widths.append(text.get_window_extent().width)
        text.set_text(line)
        widths.append(text.get_window_extent().width)
    assert max(widths) - min(widths) < 2                                                  # pixels


@pytest.mark.parametrize("panels", [2, 3, 4])
def test_long_stories_end_in_their_panel(panels, tmp_path, capsys):
    long = f"{'Wim' * 30} met Mom in the tree-house. " + "Wim ate ice-cream there. " * 100
    some = {f"{i}: UNDO\n23.5% of stories mention a forget word": long for i in range(panels)}
    for ax in told_in(tmp_path, some, capsys):
        frame, title = ax.get_window_extent(), ax._left_title.get_window_extent()
        for text in ax.texts:
            if text.get_text().strip():
                box = text.get_window_extent()
                assert frame.x0 < box.x0 and box.x1 < frame.x1
                assert frame.y0 < box.y0 and box.y1 < frame.y1
        assert frame.x0 <= title.x0 and title.x1 <= frame.x1
        lines = read(ax)
        assert lines[-1].endswith(" …") and long.replace(" ", "").startswith(
            "".join(lines).replace(" ", "")[:-1])
        assert not any(line.endswith("-") for line in lines)
        assert box.y0 - frame.y0 < 2 * box.height                        # no room is left unused
        assert frame.width > 0.96 * ax.figure.bbox.width / panels


def test_a_story_that_stops_within_a_sentence(tmp_path, capsys):
    ends = {"Tim ran.": "Tim ran.", 'He said, "No!"': 'He said, "No!"', "Tim ra": "Tim ra…",
            "in a tree": "in a tree…"}
    axes = told_in(tmp_path, dict(zip(ends, ends)), capsys)
    assert [read(ax) for ax in axes] == [[end] for end in ends.values()]


STORIES = {"base": ["A dog.", "Two trees.", "A tree."], "filtered": ["No.", "A cat.", "A sun."],
           "graddiff": ["A hat.", "A dog.", "Forest!"], "undo-0.2": ["No.", "No.", "No."],
           "undo-0.5": ["A big dog.", "A street.", "A car."]}


@pytest.mark.parametrize("shown, marked, titles", [
    ("stories and mentions", ["tree", "Forest", "", ""], [
        "base (before unlearning)\n23.5% of stories mention a forget word",
        "graddiff (unlearned)\n0.5% of stories mention a forget word",
        "UNDO, alpha 0.5\n0% of stories mention a forget word",
        "filtered (gold standard)\n100% of stories mention a forget word"]),
    ("stories", [""] * 4, ["base (before unlearning)", "graddiff (unlearned)", "UNDO, alpha 0.5",
                           "filtered (gold standard)"]),
    ("nothing", [], [])])
def test_what_the_picture_of_undo_shows(shown, marked, titles, tmp_path, capsys, monkeypatch):
    """Stories are those of the first seed: with forget words, without them, or none at all."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    share = {"base": 0.235, "graddiff": 0.005, "undo-0.5": 0.0, "filtered": 1.0}
    cfg = undo.Config(out=str(tmp_path), method="graddiff", alphas=[0.2, 0.5], attack_steps=[1])
    rows = [{"model": name, "seed": seed, "forget": 3.0, "relearned": {"1": 2.0}, "compute_pct": 9,
             "robustness_mean": 0.5, "mentions": share.get(name, 0.7) if seed == 0 else 0.9,
             "stories": told if seed == 0 else ["A tree at night."] * 3}
            for seed in (0, 1) for name, told in STORIES.items()]
    for row in rows:
        for key in {"stories", "mentions"} - set(shown.split()):
            del row[key]
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *given, **named: (
        figures.append(self), save(self, *given, **named)))
    monkeypatch.setattr(undo, "open_task", lambda cfg: SimpleNamespace(
        name="any", higher_is_better=False, block_size=8, data_id="", pretrained=False,
        made_with={"forget_words": FOREST}))
    monkeypatch.setattr(undo, "resolved", lambda cfg: cfg)
    monkeypatch.setattr(undo, "seeds", lambda cfg, rows: [cfg])
    monkeypatch.setattr(undo, "story", lambda cfg, task: [rows])
    for quiet in ("write_rows", "print_models", "say_edges", "print_stories"):
        monkeypatch.setattr(undo, quiet, lambda *_, **__: None)
    undo.main(cfg)
    assert "picture: none" not in capsys.readouterr().out
    [figure] = figures
    below, above = figure.axes[:2], figure.axes[2:]
    assert [ax.get_title() for ax in below] == ["Relearning curves under attack",
                                                "Robustness against compute"]
    assert figure.get_figheight() == (4.8 if shown == "nothing" else 4.8 + 3.95)
    assert [ax.get_title(loc="left") for ax in above] == titles
    assert [" ".join(bold.strip() for _, bold in lines_of(ax)) for ax in above] == marked
    expected = {"stories and mentions": ["A tree.", "Forest!", "A car.", "A sun."],    # the third
                "stories": ["A dog.", "A hat.", "A big dog.", "No."], "nothing": []}[shown]
    assert [" ".join(read(ax)) for ax in above] == expected


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
