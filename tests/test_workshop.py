"""The workshop: what each check says of stubs, of wrong answers and of solutions; its notebooks."""
import functools
import http.server
import json
import shutil
import sys
import threading
from types import SimpleNamespace

import pytest

import route
from workshop import build, lesson
from workshop.lesson import Wrong

jupytext = pytest.importorskip("jupytext", reason="the workshop needs jupytext")
START = (build.HERE / "start.py").read_text(encoding="utf-8")


def names(master):
    return master.stem


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Lessons run with the least sizes, in a folder of their own."""
    monkeypatch.setattr(lesson, "SIZE", "test")
    monkeypatch.setattr(route, "forget_part", route.forget_part)   # lesson 2 puts its own there
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("master", build.MASTERS, ids=names)
def test_checks_tell_right_from_wrong(master, tiny):
    """A master from top to bottom. Each check refuses the stub and, with a message of its own, each
    of two or more wrong answers; it takes the solution."""
    scope, seen = {"__name__": "lesson"}, {"exercise": 0, "check": 0, "mistakes": 0}

    def refuse(judge, *wrong):
        said = []
        for answer in wrong:
            with pytest.raises(Wrong) as error:
                lesson.check(judge, answer)
            said.append(str(error.value))
        assert len(set(said)) == len(said) >= 2, said
        for message in said:
            assert "not written" not in message and "failed with" not in message, message
            assert len(message) > 20, message

    for cell in build.cells_of(master):
        tags = build.tags(cell)
        kind, = tags & {*seen} or {None}
        if cell.cell_type != "code" or "start" in tags:
            continue
        if kind == "exercise":
            stub = build.stub(cell.source)
            assert "NotImplementedError" in stub
            solution = cell.source
            exec(compile(stub, master.name, "exec"), scope)
        elif kind == "check":
            with pytest.raises(Wrong, match="not written yet"):
                exec(compile(cell.source, master.name, "exec"), scope)
            exec(compile(solution, master.name, "exec"), scope)
            exec(compile(cell.source, master.name, "exec"), scope)
        else:
            scope["mistakes"] = refuse
            exec(compile(cell.source, master.name, "exec"), scope)
        if kind:
            seen[kind] += 1
    assert 4 <= seen["exercise"] <= 6 and len(set(seen.values())) == 1, seen


def test_check_says_what_is_wrong():
    def judge(answer):
        """All is well."""
        lesson.close(answer(), [1.0, 2.0], "these are not 1 and 2")

    for answer, message in ((lambda: None, "is a return missing"),
                            (lambda: [1.0], r"shape is \(1,\) and should be \(2,\)"),
                            (lambda: [1.0, float("nan")], "not finite"),
                            (lambda: [1.0, 3.0], "these are not 1 and 2"),
                            (lambda: 1 / 0, "failed with ZeroDivisionError"),
                            ([].pop, "failed with IndexError")):
        with pytest.raises(Wrong, match=message):
            lesson.check(judge, answer)
    lesson.check(judge, lambda: [1.0, 2.0])
    with pytest.raises(RuntimeError, match="judge takes <lambda> for right"):
        lesson.mistakes(judge, lambda: [1.0, 2.0])


def test_notebooks_are_those_of_the_masters():
    """If this fails: python -m workshop.build"""
    built = build.notebooks()
    assert {path for folder in ("exercises", "solutions")
            for path in (build.HERE / folder).glob("*.ipynb")} == {*built}
    for path, text in built.items():
        there, made = (json.loads(book)["cells"] for book in (path.read_text("utf-8"), text))
        assert there == made, path.name


@pytest.mark.parametrize("master", build.MASTERS, ids=names)
def test_exercises_do_not_show_solutions(master):
    exercises, solutions = (json.loads(build.notebook(master, solved)) for solved in (False, True))
    told = "".join(line for cell in exercises["cells"] for line in cell["source"])
    for cell in build.cells_of(master):
        if build.tags(cell) & build.ONLY_SOLUTIONS:
            assert cell.source not in told
        if "exercise" in build.tags(cell):
            for solution in build.SOLUTION.finditer(cell.source + "\n"):
                assert "\n".join(solution[0].split("\n")[1:-2]) not in told
    for book in (exercises, solutions):
        source = ["".join(cell["source"]) for cell in book["cells"]]
        assert "### " not in "".join(source).replace("#### ", ""), "a marker is left"
        assert source[1] == START.rstrip("\n"), "the first code cell finds the project"
        assert len({cell["id"] for cell in book["cells"]}) == len(source)


# --- the first cell ------------------------------------------------------------------------------
@pytest.fixture
def away(tmp_path, monkeypatch):
    """(a folder away from any checkout, which is the current one; the archive of a project)."""
    project, here = tmp_path / "made" / "project-main", tmp_path / "notebooks"
    (project / "workshop").mkdir(parents=True)
    here.mkdir()
    (project / "model.py").touch()
    archive = shutil.make_archive(str(tmp_path / "project"), "zip", project.parent)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return here, archive


def start(project=""):
    scope = {"__name__": "__main__"}
    exec(START.replace('PROJECT = ""', f"PROJECT = {project!r}"), scope)
    return scope["ROOT"]


def test_the_first_cell_finds_the_checkout_around_it(monkeypatch):
    monkeypatch.chdir(build.HERE / "exercises")
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert start() == build.HERE.parent and sys.path[0] == str(build.HERE.parent)


def test_the_first_cell_takes_an_archive_and_finds_it_again(away):
    here, archive = away
    root = start(archive)
    assert root == here / "nanoUnlearn" / "project-main" and (root / "model.py").exists()
    assert start() == root                                   # after a restart of the notebook


def test_the_first_cell_takes_an_address(away):
    here, archive = away
    folder = http.server.SimpleHTTPRequestHandler
    handler = functools.partial(folder, directory=here.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = start(f"http://127.0.0.1:{server.server_port}/project.zip")
        server.shutdown()
    assert root == here / "nanoUnlearn" / "project-main"


def test_the_first_cell_takes_an_upload_on_colab(away, monkeypatch):
    here, archive = away
    colab = SimpleNamespace(files=SimpleNamespace(upload=lambda: {archive: b""}))
    monkeypatch.setitem(sys.modules, "google", SimpleNamespace(colab=colab))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    assert start() == here / "nanoUnlearn" / "project-main"


def test_the_first_cell_says_what_to_do(away, tmp_path):
    with pytest.raises(FileNotFoundError, match="set PROJECT"):
        start()
    wrong = shutil.make_archive(str(tmp_path / "wrong"), "zip", away[0].parent / "made" /
                                "project-main" / "workshop")
    with pytest.raises(FileNotFoundError, match="wrong.zip does not hold one"):
        start(wrong)
