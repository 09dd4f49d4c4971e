"""The quiz: what a pretrained model knows, against slow counts, and scripts that make it forget."""
import dataclasses
import json
import math

import pytest
import torch
from test_pretrained import random_weights, write_folder, write_gguf
from test_scripts import UNDO, UNLEARN, Home

import data
import undo
import unlearn
from data import pretrained, quiz
from engine.knobs import BadInput
from engine.streams import torch_stream
from model import read_model, write_model

STORIES = "<|endoftext|>".join(f"Once there was a bear with {i} trees. The end was there."
                               for i in range(60))


def lines(n=40):
    """Questions of all domains and both forms, some of them in several phrasings."""
    own = [{"question": [f"The hat of {i} is", f"{i} has the hat"], "answers": [f"x{i}", "y", "zz"],
            "right": 0, "domain": "forget"} for i in range(n)]
    own += [{"question": f"{i} + 1 =", "answers": ["no", str(i + 1)], "right": 1,
             "domain": "retain"} for i in range(n)]
    own += [{"question": f"The cat of {i} is", "answers": ["a", "bb"], "right": 0, "domain": "near"}
            for i in range(3)]
    return [json.dumps(q) for q in own]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{"model", "text", "source", "data_dir"}: paths."""
    folder = tmp_path_factory.mktemp("quiz")
    (folder / "stories.txt").write_text(STORIES)
    (folder / "questions.jsonl").write_text("\n".join(lines()))
    write_folder(folder / "tiny")
    return {"model": str(folder / "tiny"), "text": str(folder / "stories.txt"),
            "source": str(folder / "questions.jsonl"), "folder": folder / "data"}


@pytest.fixture(scope="module")
def asked(files):
    return data.load("quiz", **files)


@pytest.fixture(scope="module")
def model(asked):
    return quiz.base(asked)[0]


# --- questions -----------------------------------------------------------------------------------
def test_embedded_questions():
    questions, domains = quiz.embedded(), {}
    assert questions == quiz.embedded()
    for q in questions:
        domains.setdefault(q["domain"], []).append(q)
        assert len(set(q["answers"])) == 4 and all(q["answers"]) and q["right"] == 0
        assert not any("{}" in phrasing for phrasing in q["question"])
        # an answer that stands in its question would not be a fact
        assert q["answers"][0].lower() not in q["question"][0].lower().split()
    assert len(domains["forget"]) >= 150 and len(domains["retain"]) >= 80
    assert len(domains["near"]) >= 40
    everything = [q["question"][0] for q in questions]
    assert len(set(everything)) == len(everything)                           # no fact twice
    answers = {q["question"][0]: q["answers"][0] for q in questions}
    assert answers["The capital of France is"] == "Paris" and answers["A baby duck is called a"] \
        == "duckling" and answers["The opposite of hot is"] == "cold"


def test_phrasings_for_scoring_are_in_no_text(asked):
    """Of several phrasings the last is held out; the only one serves for both."""
    for q in quiz.embedded():
        assert quiz.training(q) + quiz.for_scoring(q) == q["question"] or q["domain"] == "near"
    alone = asked.facts["questions"]["retain"][0]
    assert quiz.training(alone) == quiz.for_scoring(alone) == alone["question"]
    text = asked.tokenizer.decode(asked.tokens("forget_train").tolist())
    assert "The hat of 3 is x3." in text and "has the hat" not in text
    held_out = asked.tokenizer.decode(asked.tokens("forget_val").tolist())
    assert "3 has the hat x3." in held_out and "The hat of" not in held_out


def test_other_files_of_questions(tmp_path):
    """WMDP's and MMLU's fields are read as they are; a domain comes from the file's place."""
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, (
        {"question": " Which? ", "choices": ["a", "b", "c", "d"], "answer": 2},
        {"question": "What?", "subject": "law", "choices": ["a", "b"], "answer": "B"}))) + "\n\n")
    first, second = quiz.read_questions(path, "retain")
    assert first == {"question": ["Question: Which?\nAnswer:"], "answers": ["a", "b", "c", "d"],
                     "right": 2, "domain": "retain"}
    assert (second["right"], second["domain"]) == (1, "retain")
    said = {"question": "What is\u2028on two lines?", "choices": ["a", "b"], "answer": 0}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(said, ensure_ascii=False).encode() + b"\r\n")
    [only] = quiz.read_questions(path, "retain")                      # as Windows writes files
    assert only["question"] == ["Question: What is\u2028on two lines?\nAnswer:"]


@pytest.mark.parametrize("line, says", [
    ("{", "line 2"), ("[]", "line 2"), ("3", "line 2"), ('{"question": "x"}', "answers"),
    ('{"question": "x", "answers": ["a", "b"], "right": 2, "domain": "forget"}', "right is 2"),
    ('{"question": "x", "answers": ["a", "b"], "right": -1, "domain": "forget"}', "right is -1"),
    ('{"question": "x", "answers": ["a"], "right": 0, "domain": "forget"}', "of 1 answers"),
    ('{"question": "x", "answers": ["a", "b"], "right": 0, "domain": "both"}', "domain both"),
    ('{"question": [], "answers": ["a", "b"], "right": 0, "domain": "near"}', "empty"),
    ('{"question": "x", "answers": ["a", " "], "right": 0, "domain": "near"}', "empty"),
    ('{"question": "x", "choices": ["a", "b"], "answer": "K"}', "line 2"),
    ('{"question": "x", "choices": ["a", "b"], "answer": ""}', "line 2"),         # no letter
    ('{"question": "x", "choices": ["a", "b", "c"], "answer": "BC"}', "line 2"),
    ('{"question": "x", "choices": ["a", "b"], "answer": 1.0}', "no number"),
    ('{"question": "x", "choices": "ab", "answer": 1}', "no list"),
    ('{"question": 3, "choices": ["a", "b"], "answer": 0}', "line 2")])
def test_lines_that_are_no_questions(tmp_path, line, says):
    path = tmp_path / "q.jsonl"
    path.write_text(lines()[0] + "\n" + line)
    with pytest.raises(BadInput, match="line 2") as caught:
        quiz.read_questions(path, "forget")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change, says", [
    ({"model": None}, "--model=PATH"), ({"model": "nowhere.gguf"}, "nowhere.gguf"),
    ({"source": "nowhere.jsonl"}, "nowhere.jsonl"), ({"text": "nowhere.txt"}, "nowhere.txt"),
    ({"source": "few"}, "domain forget: give 12"), ({"block_size": 8}, "at least 16")])
def test_what_the_quiz_needs(files, tmp_path, change, says):
    (tmp_path / "few").write_text("\n".join(lines(5)))
    change = {k: str(tmp_path / "few") if v == "few" else v for k, v in change.items()}
    with pytest.raises(BadInput, match=says):
        data.load("quiz", **files | {"folder": tmp_path / "data"} | change)
    assert not list((tmp_path / "data").glob("quiz/*.bin"))                # nothing half-written


def test_questions_longer_than_a_row_or_than_the_model_reads(files, asked, model, tmp_path):
    """Their answers would be cut off."""
    long = [json.dumps({"question": f"{i}: " + "which one is it? " * 9, "choices": ["a", "b"],
                        "answer": 0}) for i in range(40)]
    (tmp_path / "long").write_text("\n".join(long[:30] + lines()))
    task = data.load("quiz", **files | {"source": str(tmp_path / "long"),
                                        "folder": tmp_path / "data"})
    with pytest.raises(BadInput, match="% of the questions to forget are longer than a row of 40"):
        quiz.base(task)
    with pytest.raises(BadInput, match="this model reads .*: leave such questions out"):
        quiz.mean_log_probabilities(model, asked, [{"question": ["x y " * 900], "answers": ["a"]}],
                                    quiz.for_scoring)
    with pytest.raises(BadInput, match="this model reads"):
        quiz.greedy(model, asked, [{"question": ["x y " * 900], "answers": ["a"], "right": 0}])


def test_a_tie_counts_as_a_guess(asked, monkeypatch):
    questions = [{"right": right, "answers": [0] * 4} for right in (0, 1, 2, 3)]
    found = torch.tensor([[-1.0, -1, -2, -3], [-1, -2, -3, -4], [-3, -2, -1, -1], [-1, -1, -1, -1]])
    monkeypatch.setattr(quiz, "mean_log_probabilities", lambda *_: list(found))
    assert quiz.cloze(None, asked, questions) == (1 / 2 + 0 + 1 / 2 + 1 / 4) / 4


def test_another_model_of_the_same_name(files, tmp_path):
    """A moved model is the same one, and keeps what was unlearned from it; another one with the
    same name and sizes is not."""
    (tmp_path / "here").mkdir()
    path = write_folder(tmp_path / "here" / "tiny")
    ask = files | {"folder": tmp_path / "data"}
    first = quiz.base(data.load("quiz", **ask | {"model": str(path)}))[1]["made_with"]
    (tmp_path / "there").mkdir()
    moved = path.rename(tmp_path / "there" / "tiny")
    task = data.load("quiz", **ask | {"model": str(moved)})
    assert quiz.base(task)[1]["made_with"] == first and task.made_with["model"] == str(moved)
    write_folder(path, random_weights(1))
    other = quiz.base(data.load("quiz", **ask | {"model": str(path)}))[1]["made_with"]
    assert {k for k in other if other[k] != first[k]} == {"pretrained"}


def test_a_matrix_that_unembeds_is_damaged_too(files, asked, model, tmp_path):
    path = write_folder(tmp_path / "untied", random_weights(tied=False),
                        config={"tie_word_embeddings": False})
    untied, _ = pretrained.read(path)
    cfg = undo.Config.for_task("quiz")(task="quiz", noise="all")
    assert undo.spread(0.5, cfg, asked, untied) == [0.5] * len(list(untied.parameters()))
    alphas = undo.spread(0.5, dataclasses.replace(cfg, noise="blocks"), asked, untied)
    still = {id(untied.wte.weight), id(untied.head.weight), id(untied.gain)}
    assert [a == 0 for a in alphas] == [id(p) in still for p in untied.parameters()]


# --- the task ------------------------------------------------------------------------------------
def test_what_is_shown_is_not_scored(asked):
    """The attacker's facts, those of val and those of test share none; every fact is unlearned."""
    parts = {part: quiz.judged(asked, part) for part in ("val", "test")}
    key = lambda some: {q["question"][0] for q in some}  # noqa: E731
    shown = key(parts["test"]["forget_shown"])
    forget = [shown, key(parts["val"]["forget"]), key(parts["test"]["forget"])]
    assert len(shown) == 13 and sum(map(len, forget)) == 40 == len(set.union(*forget))
    retain = [key(parts[part]["retain"]) for part in parts]
    assert sum(map(len, retain)) == 40 == len(set.union(*retain)) and min(map(len, retain))
    every = key(asked.facts["questions"]["forget"])
    idx, targets = asked.batch("shown", 400, 0, 0)
    told = {name: asked.tokenizer.decode(tokens.tolist()) for name, tokens in (
        ("shown", asked.tokens("shown_train")), ("forget", asked.tokens("forget_train")),
        ("rows", torch.cat((idx[:, :1], targets), 1).flatten()))}
    taught = {name: {q for q in every if q + " x" in text} for name, text in told.items()}
    assert taught["shown"] == shown >= taught["rows"] and len(taught["rows"]) > 10
    assert taught["forget"] == every


def test_half_of_what_is_retained_is_real_text(asked):
    texts = asked.tokenizer.decode(asked.tokens("retain_train").tolist()).split("<|endoftext|>")
    texts = [text for text in texts if text]
    assert sum(text.startswith("Once") for text in texts) * 2 == len(texts)
    val = asked.tokenizer.decode(asked.tokens("retain_val").tolist()).split("<|endoftext|>")
    assert not {*val} & {*texts} - {""}


def test_the_model_is_remembered(asked, files, tmp_path):
    """Without --model, the last one is used; its text is not made again. Another model's is."""
    again = data.load("quiz", files["folder"])
    assert again.made_with["model"] == str(pretrained.Path(files["model"]).resolve())
    assert again.data_id == asked.data_id and again.end == asked.end == 0
    other = write_gguf(tmp_path / "other.gguf", random_weights(1))
    moved = data.load("quiz", tmp_path / "data", **{k: v for k, v in files.items()
                                                    if k != "folder"} | {"model": str(other)})
    assert moved.facts["pretrained"]["files"].keys() == {"other.gguf"}
    weights = pretrained.Path(files["model"]) / "model-0.safetensors"
    before = weights.read_bytes()
    try:
        weights.write_bytes(before[:-4] + b"\0\0\0\0")
        assert data.load("quiz", files["folder"]).made_with != again.made_with
    finally:
        weights.write_bytes(before)
        data.load("quiz", **files)


# --- scores --------------------------------------------------------------------------------------
@torch.no_grad()
def slow_mean(model, task, begun, answer):
    """One answer, without padding and batches."""
    a = [task.end] + task.tokenizer.encode_ordinary(begun)
    b = task.tokenizer.encode_ordinary(" " + answer)
    row = model(torch.tensor([a + b]))[0].double().log_softmax(-1)
    return sum(row[len(a) - 1 + i, token].item() for i, token in enumerate(b)) / len(b)


def test_scores_against_slow_counts(asked, model):
    got = asked.score(model, finer=True)
    parts, phrased = quiz.judged(asked, "test"), {}
    for name, some in parts.items():
        phrased[name] = [(q, q["question"][-1]) for q in some]
    phrased["forget_asked"] = [(q, q["question"][0]) for q in parts["forget"]]
    for name, some in phrased.items():
        right = 0
        for q, begun in some:
            means = [slow_mean(model, asked, begun, answer) for answer in q["answers"]]
            right += means.index(max(means)) == q["right"]
        assert got[name] == right / len(some), name
    assert got["text_loss"] == pytest.approx(asked.loss(model, "retain", 64))
    val = asked.score(model, part="val")
    assert val.keys() == {"retain", "forget"}
    assert val["retain"] == pytest.approx(math.exp(-asked.loss(model, "retain", 32, "val")))
    assert asked.score(model, ("forget",)).keys() == {"forget", "forget_shown"}


def test_greedy_answers(asked, model):
    """One token at a time, without a cache; an answer counts if what is said begins with it."""
    enc, said = asked.tokenizer, []
    questions = asked.facts["questions"]["retain"]
    longest = max(len(enc.encode_ordinary(f" {q['answers'][1]}")) for q in questions)
    with torch.no_grad():
        for q in questions:
            row = [asked.end] + enc.encode_ordinary(q["question"][-1])
            new = []
            for _ in range(longest):
                new.append(model(torch.tensor([row + new]))[0, -1].argmax().item())
            said.append(enc.decode(new).strip())
    assert all(said)
    for q, text in zip(questions[::2], said[::2]):                    # half of them become right
        q["answers"][1] = text[:1].upper()
    try:
        expected = sum(text.lower().startswith(q["answers"][1].lower())
                       for q, text in zip(questions, said)) / len(questions)
        assert expected >= 0.5
        assert quiz.greedy(model, asked, questions) == expected
    finally:
        for i, q in enumerate(questions):
            q["answers"][1] = str(int(q["question"][0].split()[0]) + 1)


# --- the model -----------------------------------------------------------------------------------
def test_a_pretrained_model_on_disk(asked, model, tmp_path):
    """A tied Llama is written and read as any model, and its copy computes the same."""
    idx = asked.batch("forget", 2, 0, 0)[0]
    write_model(tmp_path / "m.pt", model, {"task": "quiz"}, {"steps": 0, "flops": 0, "history": []})
    read, _ = read_model(tmp_path / "m.pt")
    assert read.config == model.config and read.config.tied and read.config.gain
    for other in (read, model.clone()):
        assert torch.equal(other(idx), model(idx))
        assert other.gain.data_ptr() != model.gain.data_ptr()


def test_units_of_a_gated_mlp(model, asked):
    """A block's views of some units are all that these units are: without them, they say nothing.
    Noise by units reaches the gate, too."""
    idx, js = asked.batch("forget", 2, 0, 0)[0], slice(5, 30)
    silent = torch.ones(model.config.n_units)
    silent[js] = 0
    expected = model(idx, hook=lambda site, i, h: h * silent if (site, i) == ("units", 1) else h)
    for view in range(3):
        copy = model.clone()
        with torch.no_grad():
            copy.blocks[1].units(js)[view].zero_()
        torch.testing.assert_close(copy(idx), expected, atol=1e-4, rtol=1e-4)
    cfg = undo.Config.for_task("quiz")(task="quiz", noise="units")
    alphas = undo.spread(0.5, cfg, asked, model)
    up, gate, down = (next(a for p, a in zip(model.parameters(), alphas) if p is w) for w in (
        model.blocks[0].mlp.up.weight, model.blocks[0].mlp.gate.weight,
        model.blocks[0].mlp.down.weight))
    assert torch.equal(up, gate) and torch.equal(up[:, 0], down) and 0 < up.mean() < 1
    undo.noise(copy := model.clone(), alphas, 0.1, torch_stream("test"))
    kept = (copy.blocks[0].mlp.gate.weight == model.blocks[0].mlp.gate.weight).all(1)
    assert torch.equal(kept, up[:, 0] == 0)


# --- scripts -------------------------------------------------------------------------------------
class QuizHome(Home):
    def argv(self, script, arguments):
        return [f"--data_dir={self.data_dir}", f"--out={self.out}", "--device=cpu", *arguments]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def home(files, asked, folder, capsys):
    home = QuizHome(folder, files["folder"])
    home.capture = capsys
    return home


def given(files):
    return ["--task=quiz", *(f"--{k}={files[k]}" for k in ("model", "text", "source"))]


def test_unlearn_all(home, files):
    """Every method but the oracle; no filtered model; each row says what it cost in tokens."""
    code, out, err = home.call("unlearn", *given(files), *UNLEARN, "--method=all",
                               "--inner_steps=1")
    assert code == 0, err
    rows = json.loads((home.out / "quiz" / "unlearn.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["base", *unlearn.FROM_BASE]
    for row in rows[1:]:
        assert row["tokens"] == pytest.approx(row["flops"] / (6 * sum(
            w.size for w in random_weights().values())))
        assert 0 <= row["near"] <= 1 and row["relearned_shown"].keys() == {"2", "4"}
    assert rows[0]["tokens"] == 0 and "asked" in out and "text" in out


def test_undo_story(home, files):
    code, out, err = home.call("undo", *given(files), *UNDO, "--alphas=0.5", "--remake=true")
    assert code == 0, err
    rows = json.loads((home.out / "quiz" / "undo.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["base", "graddiff", "undo-0.5"]
    assert rows[2]["tokens"] > rows[1]["tokens"] > 0 and "compute %" not in out


@pytest.mark.parametrize("what", ["score", "sample", "probe", "prune", "revive"])
def test_judges(home, files, what):
    """The pretrained model by its path, as base, and an unlearned one."""
    more = ["--what=" + what, "--cut=2,4", "--draws=1", "--probe_rows=2", "--revive_steps=2",
            "--prompt=The hat", "--tokens=3"]
    code, out, err = home.call("eval", *given(files), *more)
    assert code == 0, err
    by_name = home.call("eval", "--task=quiz", "--model=base", *more)
    assert by_name[0] == 0 and by_name[1].split("\n")[-2] == out.split("\n")[-2]


@pytest.mark.parametrize("script, arguments, says", [
    ("train", [], "starts from a pretrained model"), ("unlearn", ["--method=oracle"], "oracle"),
    ("unlearn", ["--task=pcfg", "--attack=shown"], "shown means nothing"),
    ("unlearn", ["--n_layer=3"], "n_layer"), ("unlearn", ["--after=oracle"], "oracle"),
    ("frontier", [], "no filtered model"), ("trial", [], "no filtered model"),
    ("eval", ["--task=pcfg", "--model=/"], " /.pt is missing")])    # folders are for quiz alone
def test_what_a_pretrained_task_has_not(home, files, script, arguments, says):
    task = [] if "--task=pcfg" in arguments else given(files)
    code, _, err = home.call(script, *task, *arguments)
    assert code == 2 and says in err.split("\n")[-2], err
