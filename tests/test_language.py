"""The language task: stories checked by a second, text-reading simulator; Velan by its grammar."""
import math
import random
import re

import pytest
import torch

import data
from data import language
from engine.knobs import BadInput
from engine.streams import text_stream
from model import GPT, GPTConfig


def stories(rng, n=300):
    """n stories of a random.Random, or of one with that seed."""
    rng = random.Random(rng) if isinstance(rng, int) else rng
    return [language.story(rng) for _ in range(n)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    data.load("language", folder=folder, stories=200)
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return data.load("language", folder=folder, stories=200)


def untrained(task):
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 2, 2, 32))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


class Oracle(torch.nn.Module):
    """Stands in for a model: it answers from a list, whatever it is asked."""

    def __init__(self, task, right):
        super().__init__()
        self.task, self.right = task, right

    def forward(self, idx, targets):
        return torch.tensor(0.5)

    def generate(self, prompts, max_new_tokens, stop):
        rows = [self.task.tokenizer.encode_ordinary(" " + text) for text in self.right]
        assert len(prompts) == len(rows)
        return torch.tensor([(ids + [stop] * max_new_tokens)[:max_new_tokens] for ids in rows])


# --- the world -----------------------------------------------------------------------------------
def read(text):
    """Follows an English story line by line; asserts that it is possible and rightly answered.

    Written from the sentences alone: the place of a held thing is looked up when it is asked for.
    """
    place, holder, question, answered, kinds = {}, None, None, 0, set()
    for line in re.findall(r"[^.?]+[.?]", text):
        line = line.strip()
        where_thing = lambda thing: place[holder] if holder else place[thing]
        if question:
            kind, noun = question
            there = place[noun] if noun[0].isupper() else where_thing(noun)
            right = f"In {there}." if kind == "where" else f"{holder or 'Nobody'}."
            assert line == right, (line, right, text)
            question, answered = None, answered + 1
            continue
        kinds.add(line.split()[0] if line.endswith("?") else line.split()[1])
        if m := re.fullmatch(r"(?:The )?(\w+) is in (\w+)\.", line):
            place[m[1]] = m[2]
        elif m := re.fullmatch(r"(\w+) goes from (\w+) to (\w+)\.", line):
            assert place[m[1]] == m[2] != m[3]
            place[m[1]] = m[3]
        elif m := re.fullmatch(r"(\w+) takes the (\w+) in (\w+)\.", line):
            assert holder is None and place[m[1]] == place[m[2]] == m[3]
            holder = m[1]
        elif m := re.fullmatch(r"(\w+) drops the (\w+) in (\w+)\.", line):
            assert holder == m[1] and place[m[1]] == m[3]
            holder, place[m[2]] = None, m[3]
        elif m := re.fullmatch(r"(\w+) gives the (\w+) to (\w+) in (\w+)\.", line):
            assert holder == m[1] != m[3] and place[m[1]] == place[m[3]] == m[4]
            holder = m[3]
        elif m := re.fullmatch(r"(?:Where is|Who has) (?:the )?(\w+)\?", line):
            question = ("where" if line.startswith("Where") else "who", m[1])
        else:
            raise AssertionError(f"not a sentence of this English: {line}")
    assert question is None
    return answered, kinds


def test_stories_are_possible_and_rightly_answered():
    kinds = set()
    for sentences in stories(1, 2000):
        answered, seen = read(language.tell(sentences, "english"))
        assert answered == 3
        kinds |= seen
    assert {"goes", "takes", "drops", "gives", "Where", "Who"} <= kinds


def test_the_reader_notices_a_wrong_answer():
    text = language.tell(stories(2, 1)[0], "english")
    last = text.rsplit(" ", 1)[1]
    with pytest.raises(AssertionError):
        read(text[:-len(last)] + "Atlantis.")


def test_what_is_held_goes_along():
    world = language.World(random.Random(0))
    (a, b), thing = world.people, world.thing
    world.place.update({a: "Rome", b: "Paris", thing: "Rome"})
    for event, where, who in ((("take", a, thing, "Rome"), "Rome", a),
                              (("go", a, "Rome", "Paris"), "Paris", a),
                              (("give", a, thing, b, "Paris"), "Paris", b),
                              (("go", a, "Paris", "Cairo"), "Paris", b),
                              (("go", b, "Paris", "London"), "London", b),
                              (("drop", b, thing, "London"), "London", "nobody"),
                              (("go", b, "London", "Rome"), "London", "nobody")):
        assert event in world.possible()[event[0]]
        world.happen(event)
        assert world.answer(("where", thing)) == ("in", where)
        assert world.answer(("who", thing)) == ("this", who)
    assert [world.answer(("where", x)) for x in (a, b)] == [("in", "Cairo"), ("in", "Rome")]


# --- the languages -------------------------------------------------------------------------------
VERBS = {"is": "eli", "go": "bafe", "take": "turo", "drop": "leshu", "give": "suna",
         "where": "eli", "who": "omir"}
CASES = {                                    # kind -> the ending of each noun, in the tuple's order
    "is": ["", "os"], "go": ["", "ul", "im"], "take": ["", "an", "os"], "drop": ["", "an", "os"],
    "give": ["", "an", "im", "os"], "where": [""], "in": ["os"], "who": ["an"], "this": [""]}


def test_velan_puts_the_verb_last_and_marks_case():
    noun = language.NOUNS["velan"]
    for sentences in stories(3):
        lines = re.findall(r"[^.?]+[.?]", language.tell(sentences, "velan"))
        assert len(lines) == len(sentences)
        for line, (kind, *nouns) in zip(lines, sentences):
            words = line.strip(" .?").split()
            assert line.endswith("?") == (kind in ("where", "who"))
            if kind in VERBS:
                assert words.pop() == VERBS[kind]
            marked = [(noun[x] + ending).lower() for x, ending in zip(nouns, CASES[kind])]
            words = [w.lower() for w in words if w.lower() not in ("hune", "heku")]
            assert sorted(words) == sorted(marked)                   # every noun, in its case
            assert words[0] == marked[0]                             # the subject first
            if kind in ("take", "drop", "give"):
                assert words[-1] == marked[1]                        # the object before the verb


def test_the_languages_share_no_word_and_one_world():
    english, velan = ({w.lower() for s in stories(4)
                       for w in re.findall(r"\w+", language.tell(s, x))}
                      for x in ("english", "velan"))
    assert not english & velan
    names = language.NOUNS
    assert set(names["english"]) == set(names["velan"])
    assert len(set(names["velan"].values())) == len(names["velan"])


def test_velan_tells_all_that_english_tells():
    """Two stories that differ in one language differ in the other."""
    told = stories(5, 1000)
    assert (len({language.tell(s, "english") for s in told})
            == len({language.tell(s, "velan") for s in told}) == len({tuple(s) for s in told}))


# --- the task ------------------------------------------------------------------------------------
def test_documents_are_the_same_every_time_and_no_story_is_told_twice():
    texts, _ = language.documents("language", None, stories=300)
    assert (texts, {}) == language.documents("language", None, stories=300)
    assert {k: len(v) for k, v in texts.items()} == {
        "retain_train": 300, "retain_val": 1000, "forget_train": 300, "forget_val": 1000}
    for domain in ("retain", "forget"):
        both = texts[f"{domain}_train"] + texts[f"{domain}_val"]
        assert len(set(both)) == len(both)
    english = {language.tell(s, "english"): language.tell(s, "velan")
               for s in stories(text_stream("stories", "retain_val"))}
    assert texts["retain_val"][0] in english                         # the split names the stream
    assert not set(english.values()) & set(texts["forget_val"])      # and no translation is there


def test_too_few_stories_are_refused():
    with pytest.raises(BadInput, match="stories=5"):
        language.documents("language", None, stories=5)


def test_a_story_fits_a_row_and_a_word_is_a_token(tmp_path):
    texts, _ = language.documents("language", None, stories=2000)
    enc = data.tokenizer.train(texts["retain_train"] + texts["forget_train"],
                               language.SETTINGS["language"]["vocab_size"])
    words = {w for split in texts.values() for t in split for w in re.findall(r" \w+", t)}
    assert all(len(enc.encode_ordinary(w)) == 1 for w in words)
    longest = max(len(enc.encode_ordinary(t)) for split in texts.values() for t in split)
    assert longest + 1 <= language.SETTINGS["language"]["block_size"]


def test_an_untrained_model_knows_nothing(task):
    model = untrained(task)
    got = task.score(model, finer=True)
    assert set(got) == {"retain", "forget", "retain_answers", "forget_answers"}
    for domain in ("retain", "forget"):
        assert abs(got[domain] - math.log(task.vocab_size)) < 0.25
        assert got[f"{domain}_answers"] < 0.05
    assert got == task.score(model, finer=True)
    assert task.score(model) == {domain: got[domain] for domain in ("retain", "forget")}


def test_score_computes_what_is_asked_and_leaves_the_mode_alone(task):
    model = untrained(task)
    for training in (True, False):
        model.train(training)
        for part in ("val", "test"):
            assert set(task.score(model, ("forget",), part)) == {"forget"}
        assert set(task.score(model, ("retain",), finer=True)) == {"retain", "retain_answers"}
        assert model.training is training


@pytest.mark.parametrize("domain", ["retain", "forget"])
def test_an_oracle_is_always_right_and_a_liar_never(task, domain):
    tongue = language.LANGUAGE[domain]
    told = stories(text_stream("answers"), 200)
    right = [language.tell([s[i + 1]], tongue)
             for s in told for i, sentence in enumerate(s) if sentence[0] in language.QUESTIONS]
    assert task.score(Oracle(task, right), (domain,), finer=True) == {
        domain: 0.5, f"{domain}_answers": 1.0}
    half = [r if i % 2 else "Wrong." for i, r in enumerate(right)]
    assert task.score(Oracle(task, half), (domain,), finer=True)[f"{domain}_answers"] == 0.5


def test_a_short_memory_is_no_error(folder):
    task = data.load("language", folder=folder, stories=200, block_size=24)
    assert task.score(untrained(task), finer=True)["retain_answers"] < 0.2
