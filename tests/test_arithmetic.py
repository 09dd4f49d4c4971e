"""Arithmetic: answers by an independent evaluator, what is held out, exams, batches."""
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

import data
from data import BadInput, arithmetic
from data.arithmetic import (
    DOMAINS,
    TEMPLATES,
    accuracy,
    documents,
    exam,
    pairs,
    score,
    split_pairs,
)
from model import GPT, GPTConfig

OPERATIONS = "+-*/"
WORDS = {"n": "[A-Z][a-z]+", "m": "[A-Z][a-z]+", "o": "[a-z]+", "p": "[a-z]+", "a": r"\d+",
         "b": r"\d+"}


def reader(template):
    """A regular expression that a template's texts match; its groups a and b are the operands."""
    seen, parts = set(), []
    for part in re.split(r"(\{\w\})", template):
        if part[:1] != "{":
            parts.append(re.escape(part))
            continue
        name = part[1]
        parts.append(f"(?P<{name}>{WORDS[name]})" if name in "ab" and name not in seen
                     else WORDS[name])
        seen.add(name)
    return re.compile("".join(parts))


TRAINING = [(op, reader(t)) for op in OPERATIONS for t in TEMPLATES[op][:20]]
HELD_OUT = [(op, reader(t)) for op in OPERATIONS for t in TEMPLATES[op][20:]]
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) =")


def read(question, templates):
    """(operation, a, b) of a question, by its text alone; the templates are of word problems."""
    if found := EQUATION.fullmatch(question):
        return found[2], int(found[1]), int(found[3])
    found = {(op, int(m["a"]), int(m["b"])) for op, r in templates if (m := r.fullmatch(question))}
    assert len(found) == 1, (question, found)
    return found.pop()


def solve(operation, a, b):
    """Counts, rather than calculates: neither Python's operators nor the code's table."""
    if operation == "+":
        return len([0] * a + [0] * b)
    if operation == "-":
        return len(([0] * a)[b:])
    if operation == "*":
        return sum(b for _ in range(a))
    rows = [k for k in range(a + 1) if sum(k for _ in range(b)) == a]
    assert len(rows) == 1                                            # exact division
    return rows[0]


@pytest.fixture(scope="module")
def texts():
    return documents("arithmetic", None, 0.5, 0.1, 600)[0]


def problems_of(docs, templates=TRAINING):
    """[(operation, a, b, answer, is a word problem)] of training texts."""
    got = []
    for doc in docs:
        question, answer = re.fullmatch(r"(.*[=?]) (\d+)", doc).groups()
        got.append((*read(question, templates), int(answer), "=" not in question))
    return got


# --- problems ------------------------------------------------------------------------------------
def test_training_texts(texts):
    """Every answer is right, every operand in its range, every operation and domain in its place,
    and no held-out pair is there, in either form, nor any held-out template."""
    known = {op: set(split_pairs(op, 0.1)[0]) for op in OPERATIONS}
    for split, docs in texts.items():
        problems = problems_of(docs)
        assert Counter(p[0] for p in problems) == dict.fromkeys(
            DOMAINS[split.split("_")[0]], 600 if "train" in split else 100)
        for op, a, b, answer, _ in problems:
            assert answer == solve(op, a, b)
            assert (a, b) in known[op]
        for form in (False, True):
            assert {p[0] for p in problems if p[4] == form} == set(DOMAINS[split.split("_")[0]])
        for doc in docs:
            assert not any(r.fullmatch(doc.rpartition(" ")[0]) for _, r in HELD_OUT)


def test_pairs_by_brute_force():
    """Lee et al. 2025, section 4: operands 1..50 and no negative result; factors 1..20."""
    everything = [(a, b) for a in range(-2, 410) for b in range(-2, 60)]
    to50 = [(a, b) for a, b in everything if 1 <= a <= 50 and 1 <= b <= 50]
    assert sorted(pairs("+")) == sorted(to50)
    assert sorted(pairs("-")) == sorted(p for p in to50 if p[0] - p[1] >= 0)
    assert sorted(pairs("*")) == sorted(p for p in to50 if max(p) <= 20)
    assert sorted(pairs("/")) == sorted((a, b) for a, b in everything if 1 <= b <= 20
                                        and a % b == 0 and 1 <= a // b <= 20)


@pytest.mark.parametrize("share", [0, 0.04, 0.5])
def test_split_of_the_pairs(share):
    for op in OPERATIONS:
        known, unknown = split_pairs(op, share)
        assert sorted(known + unknown) == sorted(pairs(op))           # each once, in one of the two
        assert len(unknown) == pytest.approx(share * len(pairs(op)), abs=0.02 * len(pairs(op)))
        assert bool(unknown) == bool(share)
        if op in "+*":                                   # 3 + 5 gives 5 + 3 away
            assert {(b, a) for a, b in unknown} == set(unknown)
        assert (known, unknown) == split_pairs(op, share)


def test_templates():
    """20 + 10 an operation; both operands and no other number; no two alike but for the names."""
    assert list(TEMPLATES) == list(OPERATIONS)
    for op in OPERATIONS:
        assert len(TEMPLATES[op]) == 30
        for t in TEMPLATES[op]:
            assert t.count("{a}") == t.count("{b}") == 1 and not re.search(r"\d", t)
            assert t[-1] == "?" and set(re.findall(r"\{(\w+)\}", t)) <= set("nmoabp")
    skeletons = [t.replace("{m}", "{n}") for op in OPERATIONS for t in TEMPLATES[op]]
    assert len(set(skeletons)) == 120


def test_names_and_things_fit_the_grammar():
    """Different words, names that cannot be taken for things, plurals that lose one letter."""
    for words in (arithmetic.NAMES, arithmetic.OBJECTS, arithmetic.PLACES):
        assert len(words) == len(set(words)) >= 10
    assert all(name.istitle() for name in arithmetic.NAMES)
    assert all(o.endswith("s") for o in arithmetic.OBJECTS)


def test_one_of_a_thing_is_singular():
    for op in OPERATIONS:
        for seed in range(200):
            text, _ = arithmetic.word_problem(op, 1, 1, random.Random(seed), TEMPLATES[op])
            assert not re.search(r"\b1 (" + "|".join(arithmetic.OBJECTS) + r")\b", text), text
            text, _ = arithmetic.word_problem(op, 11, 21, random.Random(seed), TEMPLATES[op])
            assert not re.search(r"\d (" + "|".join(o[:-1] for o in arithmetic.OBJECTS) + r")\b",
                                 text), text


@pytest.mark.parametrize("words", [0, 0.2, 0.5, 1])
def test_share_of_word_problems(words):
    """Within five standard deviations of the binomial; all or none at the ends."""
    docs = [d for ds in documents("arithmetic", None, words, 0.04, 400)[0].values() for d in ds]
    share = sum("=" not in d for d in docs) / len(docs)
    assert abs(share - words) <= 5 * (words * (1 - words) / len(docs)) ** 0.5


def test_texts_are_the_same_every_time(texts):
    assert documents("arithmetic", None, 0.5, 0.1, 600)[0] == texts
    assert not set(texts["retain_train"][:50]) == set(texts["retain_val"][:50])


@pytest.mark.parametrize("knob,value", [("words", -0.1), ("words", 1.5), ("heldout_pairs", 0.6),
                                        ("heldout_pairs", -1), ("problems", 99)])
def test_bad_knobs(knob, value):
    knobs = dict(words=0.5, heldout_pairs=0.04, problems=200) | {knob: value}
    with pytest.raises(BadInput, match=f"{knob}={value}"):
        documents("arithmetic", None, **knobs)


# --- exams ---------------------------------------------------------------------------------------
def test_exam():
    """The same every time; right; of the pairs that it should be; of held-out templates only. Of
    known pairs no problem is asked twice, nor is one in val and in test; of held-out pairs, which
    may be few, 60 are asked, or all: in word problems twice."""
    for op in OPERATIONS:
        known, unknown = (set(p) for p in split_pairs(op, 0.04))
        for form in ("equations", "words"):
            seen = []
            for heldout, part in ((False, "val"), (False, "test"), (True, "test")):
                asked = exam(op, form, part, heldout, 0.04)
                exam.cache_clear()
                torch.manual_seed(1)
                assert asked == exam(op, form, part, heldout, 0.04)
                read_back = [(*read(question, HELD_OUT), answer) for question, answer in asked]
                for o, a, b, answer in read_back:
                    assert o == op and answer == f" {solve(op, a, b)}"
                    assert (a, b) in (unknown if heldout else known)
                assert all(("=" in q) == (form == "equations") for q, _ in asked)
                assert len(set(asked)) == len(asked)
                if heldout:
                    times = Counter(r[1:3] for r in read_back)
                    assert len(times) == min(len(unknown), 60)
                    assert set(times.values()) == {1 if form == "equations" else 2}
                else:
                    assert len(asked) == {"val": 100, "test": 200}[part]
                    seen += [r[1:3] for r in read_back]
            assert len(set(seen)) == len(seen) == 300


def test_exam_longer_than_the_pairs():
    """Where there are too few pairs, test asks two thirds of them and val others, none twice."""
    known, _ = split_pairs("*", 0.5)
    val, test = (exam("*", "equations", part, False, 0.5) for part in ("val", "test"))
    assert len(known) < 300 and len(test) == len(known) * 2 // 3 < 200
    assert len(val) == min(len(known) - len(test), 100)
    assert len(set(val + test)) == len(val) + len(test)
    known, unknown = split_pairs("*", 0.04)
    few = exam("*", "equations", "test", True, 0.04)               # held out, and all of them asked
    assert len(set(few)) == len(few) == len(unknown) < 60


class Pupil:
    """Answers what `say(operation, right answer)` tells it to; it knows how to read and solve."""

    def __init__(self, task, say):
        self.task, self.say, self.asked = task, say, 0

    def __call__(self, idx, residual):
        """For every token, which one the pupil says next: (B, T, V)."""
        enc, end = self.task.tokenizer, self.task.end
        said = torch.zeros(*idx.shape, self.task.vocab_size)
        for i, row in enumerate(idx.tolist()):
            assert row[0] == end
            n = next(n for n in range(2, len(row)) if enc.decode(row[1:n])[-1] in "=?")
            op, a, b = read(enc.decode(row[1:n]), TRAINING + HELD_OUT)
            answer = enc.encode_ordinary(self.say(op, f" {solve(op, a, b)}")) + [end]
            for j, word in enumerate(answer[:len(row) - n + 1]):
                if row[n:n + j] == answer[:j]:    # else it would not have said what stands there
                    said[i, n + j - 1, word] = 1
            self.asked += 1
        return said

    def unembed(self, said):
        return said


def test_accuracy(task):
    problems = [(q, a) for op in OPERATIONS
                for q, a in exam(op, "equations", "test", False, 0.04)[:10]]
    assert accuracy(Pupil(task, lambda op, right: right), task, problems) == 1
    wrong = {"one more": lambda op, right: f" {int(right) + 1}", "no space": lambda op, r: r[1:],
             "one digit more": lambda op, right: right + "0", "nothing": lambda op, right: "",
             "goes on": lambda op, right: right + " apples", "first digit": lambda op, r: r[:-1]}
    for say in wrong.values():
        assert accuracy(Pupil(task, say), task, problems) == 0
    half = Pupil(task, lambda op, right: right if op in "+*/" else " 999")
    assert accuracy(half, task, problems) == 0.75
    long = [(q, a) for q, a in problems if len(a) >= 3]              # the answers differ in length
    assert 0 < len(long) < 40
    assert accuracy(Pupil(task, lambda op, right: right if len(right) >= 3 else " x"), task,
                    problems) == pytest.approx(len(long) / 40)


def test_accuracy_is_that_of_decoding(task):
    """One pass over questions with their answers tells what greedy decoding would answer, while a
    model learns a few problems by heart."""
    problems = [p for op in OPERATIONS for p in exam(op, "words", "test", False, 0.04)[:3]]
    problems += [p for op in OPERATIONS for p in exam(op, "equations", "test", False, 0.04)[:3]]
    encode, end = task.tokenizer.encode_ordinary, task.end
    right = [encode(answer) + [end] for _, answer in problems]
    rows = [[end] + encode(q) + a for (q, _), a in zip(problems, right)]
    longest = max(map(len, rows))
    rows = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
    torch.manual_seed(0)
    model = GPT(GPTConfig(task.vocab_size, 64, 1, 2, 32))
    adamw, seen = torch.optim.AdamW(model.parameters(), lr=0.01), set()
    for step in range(60):
        if step % 4 == 0:
            said = model.generate([[end] + encode(q) for q, _ in problems], 8, stop=end).tolist()
            share = sum(s[:len(a)] == a for s, a in zip(said, right)) / len(right)
            assert accuracy(model, task, problems) == pytest.approx(share)
            seen.add(share)
        adamw.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        adamw.step()
    assert len(seen) > 4


def test_score(task):
    """Headlines are means over operations and forms; a score has those on pairs never shown, but
    where training looks it has not, and asks less."""
    pupil = Pupil(task, lambda op, right: right if op in "+*" else " x")
    headlines = {"retain": 0.5, "forget": 0.5, "retain_heldout_pairs": 0.5,
                 "forget_heldout_pairs": 0.5}
    got = score(pupil, task, finer=True)
    assert got == headlines | {f"{op} {form}": float(op in "+*") for op in OPERATIONS
                               for form in ("equations", "words")}
    assert score(pupil, task) == headlines
    assert score(pupil, task, part="val") == {"retain": 0.5, "forget": 0.5}
    asked = pupil.asked
    assert score(pupil, task, ("forget",), "val") == {"forget": 0.5}
    assert pupil.asked - asked == 400                                # 2 operations, 2 forms, 100
    asked = pupil.asked
    assert score(pupil, task, ("forget",)) == {"forget": 0.5, "forget_heldout_pairs": 0.5}
    unknown = sum(min(len(split_pairs(op, 0.15)[1]), 60) for op in "*/")
    assert pupil.asked - asked == 800 + 3 * unknown                  # 200; once, and told twice


@pytest.mark.parametrize("words,heldout_pairs,forms", [(0, 0.04, ["equations"]), (1, 0, ["words"])])
def test_score_asks_what_was_taught(words, heldout_pairs, forms, task, monkeypatch):
    monkeypatch.setitem(task.made_with, "words", words)
    monkeypatch.setitem(task.made_with, "heldout_pairs", heldout_pairs)
    got = score(Pupil(task, lambda op, right: right), task, finer=True)
    headlines = ["retain", "forget"] + ["retain_heldout_pairs",
                                        "forget_heldout_pairs"] * (heldout_pairs > 0)
    assert got == dict.fromkeys(headlines + [f"{op} {f}" for op in OPERATIONS for f in forms], 1.0)


# --- batches -------------------------------------------------------------------------------------
def test_bins_are_the_texts(folder, task):
    texts = documents("arithmetic", None, 0.5, 0.15, 300)[0]
    for split, docs in texts.items():
        tokens = np.fromfile(folder / "arithmetic" / f"{split}.bin", np.uint16).tolist()
        assert task.tokenizer.decode(tokens) == "".join(d + "<|endoftext|>" for d in docs)


def part_of(folder, domain, part):
    """A part's tokens: of the file to train on all; of the other one the first half, or the rest.
    """
    file = f"{domain}_{'train' if part == 'train' else 'val'}.bin"
    raw = np.fromfile(folder / "arithmetic" / file, np.uint16)
    middle = len(raw) // 2
    return {"train": raw, "val": raw[:middle], "test": raw[middle:]}[part]


def reopened(task):
    """The task, opened anew."""
    return data.Task(task.name, task.folder, task.meta)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("domain", ["retain", "forget"])
@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_rows_are_slices_of_their_file(domain, part, aligned, folder, task, monkeypatch):
    """Contiguous, anywhere in the part, its very ends included, and not beyond; targets are inputs
    moved by one. Aligned: a row begins with the token that closes a text, so with a whole text.
    """
    monkeypatch.setitem(task.module.SETTINGS[task.name], "aligned", aligned)
    task, raw = reopened(task), part_of(folder, domain, part)
    windows = {w.tobytes(): i for i, w in enumerate(
        np.lib.stride_tricks.sliding_window_view(raw, task.block_size + 1))}
    starts = []
    for step in range(6):
        x, y = task.batch(domain, 1000, step, 0, part)
        assert x.shape == y.shape == (1000, task.block_size) and x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])
        rows = torch.cat((x, y[:, -1:]), 1).numpy().astype(np.uint16)
        starts += [windows[row.tobytes()] for row in rows]           # KeyError: not in this part
    possible = [i for i in windows.values() if not aligned or raw[i] == task.end]
    assert set(starts) <= set(possible)
    assert 0 <= min(starts) < len(raw) // 50 and max(starts) > len(raw) * 49 // 50 - task.block_size
    assert len(set(starts)) > 0.4 * min(len(starts), len(possible))


def test_the_last_token_is_reached(task, monkeypatch):
    """Rows of parts that hold just one or two: the first and last token of each are there."""
    monkeypatch.setitem(task.module.SETTINGS[task.name], "aligned", False)
    T = task.block_size
    for n in (1, 2):
        monkeypatch.setattr(data.Task, "tokens", lambda self, split: np.arange(
            (T + n) * (2 if split.endswith("_val") else 1), dtype=np.uint16))
        small = reopened(task)
        for part, first in (("train", 0), ("val", 0), ("test", T + n)):
            x, y = small.batch("retain", 50, 0, 0, part)
            assert x.min() == first and y.max() == first + T + n - 1
            assert sorted(set(x[:, 0].tolist())) == list(range(first, first + n))


def test_a_batch_is_a_function_of_its_arguments(task):
    same = lambda a, b: all(torch.equal(p, q) for p, q in zip(a, b))  # noqa: E731
    first = task.batch("all", 16, 7, 3)
    torch.manual_seed(5)
    np.random.seed(5)
    task.batch("all", 16, 8, 3)
    assert same(first, task.batch("all", 16, 7, 3))
    for other in (("all", 16, 8, 3), ("all", 16, 7, 4), ("all", 16, 3, 7),
                  ("all", 16, 7, 3, "val"), ("all", 16, 7, 3, "test")):
        assert not same(first, task.batch(*other))


def test_splits_are_drawn_apart(task, monkeypatch):
    """Parts of the same length, yet other rows: one domain's choice says nothing of the other's."""
    monkeypatch.setitem(task.module.SETTINGS[task.name], "aligned", False)
    monkeypatch.setattr(data.Task, "tokens", lambda self, split: np.arange(
        5000 if split.endswith("_val") else 2500, dtype=np.uint16))
    task = reopened(task)
    drawn = [(task.batch(d, 20, 0, 0, part)[0][:, 0] % 2500).tolist()
             for d in ("retain", "forget") for part in ("train", "val", "test")]
    assert len({last - first for first, last in task.range.values()}) <= 2      # val, test: T off
    assert not any(a == b for i, a in enumerate(drawn) for b in drawn[:i])


def forget_rows(task, folder, x, y):
    """How many rows of a training batch are forget data; first come those to retain."""
    of = {}
    for domain in ("retain", "forget"):
        raw = part_of(folder, domain, "train")
        for window in np.lib.stride_tricks.sliding_window_view(raw, task.block_size + 1):
            of[window.tobytes()] = domain
    rows = torch.cat((x, y[:, -1:]), 1).numpy().astype(np.uint16)
    found = [of[row.tobytes()] for row in rows]
    assert found == sorted(found, reverse=True)
    return found.count("forget")


def test_all_is_both_in_proportion(task, folder):
    """Never off by a row or more, and right on average: at a share that is no whole number of rows
    the next larger one is as frequent as it must be."""
    size = {d: len(task.tokens(f"{d}_train")) for d in ("retain", "forget")}
    share = size["forget"] / sum(size.values())
    assert task.forget_share == pytest.approx(share)
    for n in (1, 2, 9, 64):
        batches = [task.batch("all", n, step, 2) for step in range(100)]
        assert all(len(x) == len(y) == n for x, y in batches)
        numbers = [forget_rows(task, folder, *batch) for batch in batches]
        assert all(abs(number - n * share) < 1 for number in numbers)
        more = n * share % 1
        assert abs(sum(numbers) / 100 - n * share) <= 4 * (more * (1 - more) / 100) ** 0.5 + 1e-9


def test_uneven_proportion(tmp_path, monkeypatch):
    """A task with three times as much to retain: three rows in four."""
    def documents(name, folder, **knobs):
        texts, facts = arithmetic_documents(name, folder, **knobs)
        return texts | {"retain_train": texts["retain_train"] * 3}, facts
    arithmetic_documents = arithmetic.documents
    monkeypatch.setattr(arithmetic, "documents", documents)
    task = data.load("arithmetic", folder=tmp_path, problems=100)
    sizes = [len(task.tokens(f"{d}_train")) for d in ("retain", "forget")]
    forget = 64 * sizes[1] / sum(sizes)
    assert 12 < forget < 20
    for step in range(5):
        assert abs(forget_rows(task, tmp_path, *task.batch("all", 64, step, 0)) - forget) < 1
