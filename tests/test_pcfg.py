"""Questions about strings: every answer counted again on the text, the grammar by enumeration."""
import itertools
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

import data
import eval as judges
import train
from data import pcfg
from engine.knobs import BadInput
from model import GPT, GPTConfig, write_model


@pytest.fixture(scope="module")
def low():
    return data.load("pcfg", prior="low")


@pytest.fixture(scope="module")
def high():
    return data.load("pcfg", prior="high")


def words(task, idx, targets):
    """Rows as lists of words: string, task, operand, parameter, =, answer."""
    decode = task.tokenizer.decode
    return [[decode([i]) for i in row] for row in torch.cat((idx, targets), 1).tolist()]


def by_hand(kind, text, operand, parameter):
    """The answer as a person finds it, letter by letter."""
    if kind == "token":
        return text[int(parameter)]
    sought = operand.lower()
    if kind.endswith("pair"):
        sought += {"a": "b", "b": "c", "c": "a"}[sought]
    found = [i for i in range(len(text)) if text.startswith(sought, i)]
    if kind in pcfg.COUNTS or kind == "count-pair":
        return str(len(found))
    return str(found[int(parameter) - 1]) if len(found) >= int(parameter) else "none"


@pytest.mark.parametrize("split", pcfg.SPLITS)
@pytest.mark.parametrize("block_size", [14, 22, 70])
def test_answers_by_hand(split, block_size):
    task = data.load("pcfg", block_size=block_size, prior="high")
    seen = Counter()
    for row in words(task, *task.batch(split, 300, 3, 7)):
        *text, kind, operand, parameter, equals, right = row[1:]
        if split.startswith("relabelled"):
            assert operand == "A"
            operand = "B"
        assert (len(text), equals, row[0]) == (block_size - 6, "=", "<|endoftext|>")
        assert right == by_hand(kind, "".join(text), operand, parameter), row
        seen[kind] += 1
        a, b = text.count("a"), text.count("b")
        if split in ("retain", "spurious"):
            assert (kind, operand, b == a + 1) == ("count", "B", split == "spurious")
        if split.startswith("relabelled"):                      # above, b was asked for, by hand
            assert (kind, b == a + 1) == ("count", split.endswith("+1"))
        if split == "forget":
            assert (kind, operand) == ("count", "A")
    if split == "all":
        assert set(seen) == set(pcfg.WORDS) - {"none"}
    if split == "reworded":
        assert set(seen) == set(pcfg.WORDS) - {"none", pcfg.COUNTS[0], pcfg.COUNTS[-1]}


def test_every_kind_has_every_answer(high):
    """`none` occurs, and so do far indices: no question is answered by one word alone."""
    answers = {}
    for row in words(high, *high.batch("all", 4000, 0, 0)):
        answers.setdefault(row[-5], set()).add(row[-1])
    assert "none" in answers["index"] and "none" in answers["index-pair"]
    assert answers["token"] == set("abcd")
    assert len(answers["count"]) > 9 and len(answers["count-pair"]) > 4


@pytest.mark.parametrize("prior", pcfg.PRIORS)
def test_operands_follow_the_prior(prior):
    task = data.load("pcfg", prior=prior)
    operands = [row[-4] for row in words(task, *task.batch("all", 6000, 0, 0))
                if row[-5] != "token"]
    for letter, p in zip("ABC", pcfg.PRIORS[prior]):
        share = operands.count(letter) / len(operands)
        assert abs(share - p) <= 5 * (p * (1 - p) / 5000) ** 0.5


def test_the_grammar_by_enumeration():
    """Stretches of 2 of the 4 letters that two levels derive, with exact probabilities."""
    level = {letter: Fraction(1, 4) for letter in "ABCD"}
    for _ in range(2):
        new = Counter()
        for text, p in level.items():
            for rules in itertools.product(range(2), repeat=len(text)):
                derived = "".join(pcfg.GRAMMAR[x][r] for x, r in zip(text, rules))
                new[derived] += p / 2 ** len(text)
        level = new
    exact = Counter()
    for text, p in level.items():
        for i in range(3):
            exact[text[i:i + 2]] += p / 3
    n = 60_000
    got = Counter(map(bytes, pcfg.strings(np.random.default_rng(0), n, 2)))
    assert sum(exact.values()) == 1
    for i, j in itertools.product(range(4), repeat=2):
        p = float(exact["ABCD"[i] + "ABCD"[j]])
        assert abs(got[bytes([i, j])] / n - p) <= 5 * (p * (1 - p) / n) ** .5, (i, j)


def test_a_batch_is_a_function_of_its_arguments(low):
    first = low.batch("all", 32, 5, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, low.batch("all", 32, 5, 1)))
    for other in (("all", 32, 6, 1), ("all", 32, 5, 2), ("all", 32, 5, 1, "val"),
                  ("all", 32, 5, 1, "test"), ("reworded", 32, 5, 1)):
        assert not torch.equal(first[0], low.batch(*other)[0])


def test_processes_share_a_batch(low):
    """Every second row each, at every step from another one on."""
    view = data.load("pcfg", prior="low")
    for rank, step in ((0, 0), (1, 0), (0, 1), (1, 1)):
        view.shard = (rank, 2)
        assert torch.equal(view.batch("all", 32, step, 0)[0],
                           low.batch("all", 32, step, 0)[0][(rank + step) % 2::2])


def test_scores_count_what_a_model_answers(low):
    """A stub that counts b says b in every split, and a only where there are as many."""
    asked = []

    class CountsB:
        def __call__(self, idx, residual):
            asked.append(idx)
            b = (idx[:, 1:17] == low.tokenizer.encode_single_token("b")).sum(1)
            return b[:, None, None]

        def unembed(self, b):
            ids = torch.tensor([low.tokenizer.encode_single_token(str(i)) for i in range(17)])
            return torch.nn.functional.one_hot(ids[b[:, 0]], low.vocab_size).float()

    scores = pcfg.score(CountsB(), low, finer=True)
    assert set(scores) == {"retain", "forget", "spurious", "jailbreak"}
    assert scores["retain"] == scores["spurious"] == 1
    assert sum(map(len, asked)) == 4000
    idx, right = low.batch("forget", 5000, 0, 0, "test")
    same = ((idx[:, 1:17] == 97).sum(1) == (idx[:, 1:17] == 98).sum(1)).float().mean().item()
    assert abs(scores["forget"] - same) < 0.05 and abs(scores["jailbreak"] - same) < 0.05
    assert pcfg.score(CountsB(), low) == {k: scores[k] for k in ("retain", "forget")}
    test = {tuple(row) for row in torch.cat(asked).tolist()}
    asked.clear()
    quick = pcfg.score(CountsB(), low, part="val")           # fewer questions, and other ones
    assert set(quick) == {"retain", "forget"} and quick["retain"] == 1
    assert sum(map(len, asked)) == 500
    assert sum(tuple(row) in test for row in torch.cat(asked).tolist()) < 10


# --- the counter written by hand -----------------------------------------------------------------
@pytest.fixture(scope="module")
def counter(low):
    gpt = GPT(GPTConfig(low.vocab_size, low.block_size, n_layer=1, n_head=1, n_embd=16, n_units=4))
    pcfg.compile_counter(gpt, low)
    return gpt


@pytest.mark.parametrize("word", pcfg.COUNTS)
def test_the_counter_counts(low, counter, word):
    """Every operand, exactly, on strings of the grammar."""
    x = pcfg.strings(np.random.default_rng(1), 600, 16)
    for operand, letter in enumerate("abc"):
        idx, right = pcfg.ask(low, x, "count", np.full(600, operand), word=word)
        said = low.tokenizer.decode_batch(counter(idx)[:, -1].argmax(-1)[:, None].tolist())
        assert said == [str(row.count(operand)) for row in x.tolist()], letter


def test_the_counter_counts_to_the_ends(low, counter):
    """Strings that the grammar never writes: all of one letter, or with none of it."""
    for text, counts in (("a" * 16, (16, 0, 0)), ("d" * 16, (0, 0, 0)), ("ab" * 8, (8, 8, 0)),
                         ("c" * 15 + "a", (1, 0, 15))):
        x = np.array([["abcd".index(letter) for letter in text]], np.uint8)
        for operand, count in enumerate(counts):
            idx, _ = pcfg.ask(low, x, "count", np.array([operand]))
            assert low.tokenizer.decode(counter(idx)[0, -1:].argmax(-1).tolist()) == str(count)


def test_the_example_in_compile_counters_docstring():
    """Its numbers, from the embedding to the logits, as the model computes them."""
    task = data.load("pcfg", block_size=14)
    gpt = GPT(GPTConfig(task.vocab_size, 14, n_layer=1, n_head=1, n_embd=16, n_units=4))
    pcfg.compile_counter(gpt, task)
    x = np.array([["abcd".index(letter) for letter in "abdbdcdd"]], np.uint8)
    idx, _ = pcfg.ask(task, x, "count", np.array([1]))
    seen = {}
    embedded, after = (x[0] for x in gpt.residuals(
        idx, hook=lambda site, i, h: seen.setdefault(site, h)))

    def close(got, *right):
        torch.testing.assert_close(got, torch.tensor(right), rtol=5e-3, atol=0)

    channels = [pcfg.SYMBOLS[1], pcfg.SYMBOLS[4], pcfg.EQUALS]
    torch.testing.assert_close(embedded[[2, 10, 12]], 4 * torch.eye(16)[channels])    # b, B, =
    close(seen["heads"][0, -1, 0, [1, 4]], 0.615, 0.308)
    close(after[-1, pcfg.MEANS[[1, 4]]], 0.0615, 0.0308)
    close(seen["units"][0, -1], 0.0, 3.8e-7, 0.0, 0.9996)
    close(gpt.blocks[0].mlp.down.weight[pcfg.SQUARE, [1]], 165_000.0)
    close(after[-1, [pcfg.SQUARE, pcfg.ONE]], 0.0625, 1.0)
    logits = gpt(idx)[0, -1] / 0.97
    numbers = [task.tokenizer.encode_single_token(str(k)) for k in range(9)]
    close(logits[numbers[:6]], 8.0, 15.0, 24.0, -1.0, -120.0, -417.0)
    assert logits.argmax() == numbers[2] and (logits[numbers[6:]] < -417).all()
    logits[numbers] = 0
    (other,) = logits.nonzero()[:, 0].tolist()                        # but for numbers, all are 0
    assert other == task.tokenizer.encode_single_token("=")
    close(logits[[other]], 4.0)


def test_the_counters_function_does_not_depend_on_how_quiet_it_is(low, counter):
    loud = counter.clone()
    pcfg.compile_counter(loud, low, quiet=1.0)
    idx = low.batch("forget", 100, 0, 0)[0]
    assert not torch.equal(loud.blocks[0].mlp.up.weight, counter.blocks[0].mlp.up.weight)
    torch.testing.assert_close(loud(idx)[:, -1], counter(idx)[:, -1], rtol=1e-4, atol=1e-2)


def test_another_prior_is_other_data(low, high):
    assert low.data_id != high.data_id
    assert data.load("pcfg", prior="low").data_id == low.data_id


def test_rows_too_short_for_a_string():
    with pytest.raises(BadInput, match="--block_size=12: pcfg needs rows of at least 14"):
        data.load("pcfg", block_size=12)


def test_a_prior_for_another_task():
    with pytest.raises(BadInput, match="--prior means nothing to the task language"):
        data.load("language", prior="low")


def test_sample_answers_a_question(low, counter, tmp_path, monkeypatch, capsys):
    path, question = tmp_path / "counter.pt", "a b d c a a b b c d a d c b a a count A . ="
    write_model(path, counter, {"task": "pcfg", "data": data.load("pcfg").data_id},
                {"steps": 0, "flops": 0, "history": []})
    monkeypatch.setattr(sys, "argv", ["eval.py", "--what=sample", "--task=pcfg", "--tokens=1",
                                      f"--model={path}", f"--prompt={question}", "--device=cpu",
                                      f"--out={tmp_path}"])
    train.run(judges.main, judges.Config, "")
    assert capsys.readouterr().out == f"{question}6\n"
