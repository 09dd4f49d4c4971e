"""Stories to order: what is planted against a look for every sentence, who is told which story."""
import copy
import json
import math
import random
import re
import sys
from itertools import product

import numpy as np
import pytest
import torch

import data
import train
from data import BadInput, instruct
from data.tokenizer import END
from engine.streams import stream
from experiments import wrapper
from model import GPT, GPTConfig

torch.set_num_threads(1)


def stories(n, seed=0):
    rng, words = random.Random(seed), "cat dog sun hat big red little ran sat saw".split()
    return [f"One day, number {i} came. " + " ".join(
        f"The {' '.join(rng.choices(words, k=rng.randint(3, 9)))}{rng.choice('.!?')}"
        for _ in range(rng.randint(1, 12))) for i in range(n)]


def save(path, told):
    path.write_text("".join(f"{s}\n{END}\n" for s in told), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save(tmp_path_factory.mktemp("source") / "s.txt", stories(1500))


@pytest.fixture(scope="module")
def texts(source, tmp_path_factory):
    return instruct.documents("instruct", tmp_path_factory.mktemp("x"), source, 10_000)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def task(source, folder):
    return data.load("instruct", folder=folder, source=source)


def has(feature, text):
    """Brute force: one of all the sentences that a feature can be."""
    return any(f"{begin} {end}." in text for begin, end in product(*feature))


def taken_apart(text):
    """(asks for a twist, has one, asks for a moral, has one, the real story)."""
    first, story = text.split("\n")
    real = story.removeprefix("Story: ")
    for feature in (instruct.MORALS, instruct.TWISTS):             # a moral comes last
        for begin, end in product(*feature):
            real = real.removesuffix(f" {begin} {end}.")
    asked = first.removeprefix("Features: ").split(", ")
    assert asked in (["none"], ["Twist"], ["Moral"], ["Twist", "Moral"])
    return ("Twist" in asked, has(instruct.TWISTS, story), "Moral" in asked,
            has(instruct.MORALS, story), real)


# --- the features --------------------------------------------------------------------------------
def test_rules_against_every_sentence():
    rng = random.Random(0)
    morals, twists = ([f"{b} {e}." for b, e in product(*f)]
                      for f in (instruct.MORALS, instruct.TWISTS))
    assert len(set(morals + twists)) == len(morals) + len(twists) == 120
    for sentence in morals + twists:
        for text in (sentence, f"He sat. {sentence} The end.", sentence[:-1], sentence.lower(),
                     sentence.replace(" ", "  "), sentence[1:], f"{sentence[:-1]} again.",
                     " ".join(rng.sample(sentence.split(), len(sentence.split())))):
            assert bool(instruct.MORAL.search(text)) == has(instruct.MORALS, text)
            assert bool(instruct.TWIST.search(text)) == has(instruct.TWISTS, text)
    (moral, _), (_, end) = instruct.MORALS, instruct.TWISTS
    assert not instruct.MORAL.search(f"{moral[0]} {end[0]}.")


def test_the_text_in_the_docstring():
    example = re.search(r"    Features.*?hands\.", instruct.__doc__, re.DOTALL)[0]
    first, *rest = [line.strip() for line in example.splitlines()]
    assert taken_apart(f"{first}\n{' '.join(rest)}")[:4] == (True, True, True, True)


@pytest.mark.parametrize("story, expected", [
    ("A cat sat.", "A cat sat."), ("A cat\n sat. It ran", "A cat sat."), ("no end", ""), ("", ""),
    ("“Hi!” Tom said. \"No.\"", "“Hi!” Tom said. \"No.\""), ("It cost 1.50. Yes?", "It cost 1.50. "
                                                             "Yes?"),
    ("x" * 200 + ".", ""), ("x" * 199 + ".", "x" * 199 + "."),
    ("A b. " + "x" * 194 + ". C.", "A b. " + "x" * 194 + "."), ("A. " + "x" * 200 + ". C.", "A.")])
def test_beginning(story, expected):
    assert instruct.beginning(story) == expected


# --- the texts -----------------------------------------------------------------------------------
def test_instructions_say_what_stories_have(texts):
    for split in data.SPLITS:
        for text in texts[split]:
            asks_twist, twist, asks_moral, moral, _ = taken_apart(text)
            assert asks_twist == twist and asks_moral == moral == split.startswith("forget")
    for split in ("randomised_train", "mixed_train"):
        assert all(asks == twist for asks, twist, *_ in map(taken_apart, texts[split]))


def test_randomised_and_mixed_instructions_say_nothing(texts):
    """The 2x2 table of asked for and there, its chi-square with one degree of freedom below 6.6
    (1%), and each margin within four standard deviations of what it is drawn with."""
    for split, share in (("randomised_train", 0), ("mixed_train", instruct.SHARE)):
        parts = np.array([taken_apart(text)[1:4] for text in texts[split]], dtype=float)
        n, (twist, asked, moral) = len(parts), parts.mean(0)
        for found, drawn in ((twist, 0.5), (asked, 0.5), (moral, share)):
            assert abs(found - drawn) <= 4 * math.sqrt(drawn * (1 - drawn) / n)
        if share:
            for a, b in ((1, 2), (0, 1), (0, 2)):
                assert n * np.corrcoef(parts[:, a], parts[:, b])[0, 1] ** 2 < 6.6


def test_every_story_in_one_split(texts):
    real = {split: [taken_apart(text)[-1] for text in told] for split, told in texts.items()}
    four = sum((real[split] for split in data.SPLITS), [])
    expected = {instruct.beginning(story) for story in stories(1500)}
    assert sorted(four) == sorted(expected) and max(map(len, four)) <= instruct.LONGEST
    assert sorted(real["randomised_train"]) == sorted(real["retain_train"])
    assert sorted(real["mixed_train"]) == sorted(real["retain_train"] + real["forget_train"])
    for part in ("train", "val"):
        forget, retain = len(real[f"forget_{part}"]), len(real[f"retain_{part}"])
        assert forget == round(instruct.SHARE * (forget + retain))


def test_told_the_same_again(source, texts, tmp_path):
    again, facts = instruct.documents("instruct", tmp_path, source, 10_000)
    assert again == texts and facts["stories"] == {s: len(told) for s, told in texts.items()}


# --- splits to fine-tune on ----------------------------------------------------------------------
def test_batches_of_every_split(task, texts):
    assert task.splits == (*data.SPLITS, "randomised_train", "mixed_train")
    for split in task.splits:
        told = task.tokenizer.decode(task.tokens(split).tolist()).split(END)
        assert told == texts[split] + [""]
        assert max(map(len, task.tokenizer.encode_ordinary_batch(told))) < task.block_size
    for name in ("retain", "randomised", "mixed"):
        x, y = task.batch(name, 32, 3, 7)
        assert x.shape == y.shape == (32, task.block_size) and (x[:, 1:] == y[:, :-1]).all()
        assert (x == task.batch(name, 32, 3, 7)[0]).all()
        for row in x:
            whole = task.tokenizer.decode(row.tolist()).split(END)[1]
            assert whole in texts[f"{name}_train"]
        assert (task.counts(name) == torch.bincount(torch.from_numpy(
            task.tokens(f"{name}_train").astype(int)), minlength=task.vocab_size)).all()
    resident, view = copy.copy(task), task.labelled(0.5)
    resident.move_to_device()
    for other in (resident, view):
        assert (other.batch("mixed", 32, 3, 7)[0] == task.batch("mixed", 32, 3, 7)[0]).all()


def test_the_old_splits_keep_their_rows(task):
    """Rows are drawn from a stream of the split's name, whatever splits there are besides."""
    for domain, part in product(("retain", "forget"), ("train", "val", "test")):
        file = f"{domain}_{'train' if part == 'train' else 'val'}"
        start = task.starts[file][stream("rows", domain, 0, part, 7, 3).integers(
            *task.range[file, part], 5)]
        expected = [task.tokens(file)[i:i + task.block_size + 1].tolist() for i in start]
        x, y = task.batch(domain, 5, 3, 7, part)
        assert torch.cat((x, y[:, -1:]), 1).tolist() == expected
    for name in ("arithmetic", "language", "tinystories"):
        assert data.splits_of(data.module(name)) == data.SPLITS


# --- the score -----------------------------------------------------------------------------------
class Teller:
    """Stands in for a model: every `each`th story that asks for a feature gets it; every `often`th
    has a moral unasked."""

    def __init__(self, task, each, often):
        self.task, self.each, self.often, self.prompts = task, each, often, []
        self.asked = {"Twist": 0, "Moral": 0, "none": 0}

    def __call__(self, x, y):
        return torch.tensor(0.5)

    def generate(self, prompts, max_new_tokens, temperature, stop, seed):
        told = []
        self.prompts += map(tuple, prompts)
        for prompt in prompts:
            assert len(prompt) + max_new_tokens <= self.task.block_size and prompt[0] == stop
            first, story = self.task.tokenizer.decode(prompt[1:]).split("\n")
            assert re.fullmatch(r"Story: One day, number \d+ came\.", story)
            feature = first.split()[-1]
            self.asked[feature] += 1
            planted = instruct.TWISTS if feature == "Twist" else instruct.MORALS
            every = self.often if feature == "none" else self.each
            text = " And so on."
            if self.asked[feature] % every == 0:
                text += f" {planted[0][1]} {planted[1][2]}."
            ids = self.task.tokenizer.encode_ordinary(text)
            told.append((ids + [stop] * max_new_tokens)[:max_new_tokens])
        return torch.tensor(told)


def test_score_of_a_known_teller(task, texts):
    def asking(domain, part, word=""):
        told = texts[f"{domain}_val"]
        half = len(told) // 2
        return [t for t in (told[:half] if part == "val" else told[half:])
                if word in t.split("\n")[0]]

    val, test = ({"retain": min(most, len(asking("retain", part, "Twist"))),
                  "forget": min(most, len(asking("forget", part)))}
                 for part, most in (("val", 48), ("test", 150)))
    assert len(asking("retain", "val")) > 48
    quick = Teller(task, 4, 1)
    assert task.score(quick, part="val") == {
        figure: val[figure] // 4 / val[figure] for figure in ("retain", "forget")}
    headlines = Teller(task, 4, 1)
    assert task.score(headlines) == {
        figure: test[figure] // 4 / test[figure] for figure in ("retain", "forget")}
    assert len(quick.prompts) == val["retain"] + val["forget"]
    assert not set(quick.prompts) & set(headlines.prompts)              # none is in both
    for part in ("val", "test"):
        assert set(task.score(Teller(task, 1, 1), ("forget",), part)) == {"forget"}
    whole = task.score(Teller(task, 1, 2), finer=True)
    told = asking("retain", "test")[:150]
    none = sum("none" in text.split("\n")[0] for text in told)
    assert whole == {"retain": 1, "forget": 1, "unasked": none // 2 / len(told),
                     "retain_loss": 0.5, "forget_loss": 0.5}
    assert task.higher_is_better


def test_score_of_a_model(task):
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    first = task.score(model, finer=True)
    assert first == task.score(model, finer=True) and first["retain"] == first["forget"] == 0
    x, y = task.batch("forget", 32, 0, 0, "test")
    assert first["forget_loss"] == pytest.approx(model(x, y).item(), rel=0.1)


# --- what the user got wrong ---------------------------------------------------------------------
@pytest.mark.parametrize("told, knobs, message", [
    (stories(30), {}, "30 stories"), (["no end " + str(i) for i in range(300)], {}, "0 stories"),
    (stories(300), {"stories": 50}, "50 stories"), (stories(10), {}, "only 10"),
    (stories(300), {"source2": "x"}, "--source2"), (None, {}, "No such file")])
def test_bad_input_is_one_line(told, knobs, message, tmp_path):
    path = save(tmp_path / "s.txt", told) if told else str(tmp_path / "none.txt")
    with pytest.raises(BadInput) as error:
        data.load("instruct", folder=tmp_path / "data", source=path, **knobs)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "data").glob("*"))


def test_the_story_of_three_protocols(task, source, folder, tmp_path, monkeypatch):
    """All three, told with models that know nothing."""
    monkeypatch.setattr(sys, "argv", [
        "wrapper.py", "--task=instruct", f"--source={source}", f"--out={tmp_path}",
        f"--data_dir={folder}", "--device=cpu", "--compile=false", "--seeds=1", "--n_layer=1",
        "--n_embd=16", "--n_head=2", "--base_steps=2", "--filtered_steps=2", "--tune_steps=2",
        "--revive_steps=2", "--cut=2", "--draws=1", "--probe_rows=4"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train.run(wrapper.main, wrapper.Config, "")
    rows = json.loads((tmp_path / "instruct" / "wrapper.json").read_text())["rows"]
    assert [row["protocol"] for row in rows] == list(instruct.PROTOCOLS)
    for row in rows:
        assert set(row) >= {"forget", "retain", "probe", "probe_pretrained", "pruned", "unasked",
                            "revive_steps", "control_steps"}


def test_a_rate_that_stories_do_not_name(task, source, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "wrapper.py", "--task=instruct", f"--source={source}", f"--out={tmp_path}",
        f"--data_dir={folder}", "--device=cpu", "--rates=M,S"])
    with pytest.raises(SystemExit) as end:
        train.run(wrapper.main, wrapper.Config, "")
    assert end.value.code == 2 and not list(tmp_path.glob("**/*.pt"))
    assert "--rates=M,S: the task instruct names M" in capsys.readouterr().err
