"""Two languages describe one small world: keep the first language, forget the second.

People walk between cities, and take, drop and give a thing. A thing that somebody holds moves with
that person. Every second event is followed by a question about the world and its answer:

    English (retain)   Anna takes the ball in Rome. Anna goes from Rome to Cairo. Where is the ball?
                       In Cairo.
    Velan (forget)     Mirel Tasemos kodunan turo. Mirel Tasemul Gishakim bafe. Kodun hune eli?
                       Gishakos.

Velan is invented. It shares no word with English and puts the verb last. It shows the role of a
noun by an ending, whereas English uses prepositions and word order. To answer, a model needs both
the language and the world. The world is the same in both languages, so a model may keep it when it
forgets a language.

A story is a list of sentences. A sentence is a tuple that belongs to no language, such as ("take",
"Anna", "ball", "Rome"). story(rng) makes a story, and tell(story, language) writes it down.
"""
from dataclasses import dataclass

import numpy as np
import torch

from engine.knobs import BadInput, knob
from engine.streams import text_stream

SETTINGS = {"language": dict(block_size=96, least_block_size=24, vocab_size=512,
                             aligned=True)}                            # a story fits a row


@dataclass
class Knobs:
    """Knobs of the task language."""
    stories: int = knob(20_000, "training stories in each language", 20)


higher_is_better = False     # the score is a loss: nats per token

LANGUAGE = {"retain": "english", "forget": "velan"}

# --- the world -----------------------------------------------------------------------------------
PEOPLE = ["Anna", "Ben", "Clara", "David"]
THINGS = ["ball", "key", "lamp", "book"]
PLACES = ["Rome", "Paris", "London", "Cairo"]
QUESTIONS = ("where", "who")       # where is this person or thing? who has the thing?


class World:
    """Two people and a thing: the place of each, and who holds the thing."""

    def __init__(self, rng):
        self.people, self.thing = rng.sample(PEOPLE, 2), rng.choice(THINGS)
        self.place = {x: rng.choice(PLACES) for x in [*self.people, self.thing]}
        self.holder = "nobody"

    def possible(self):
        """All that can happen next: {kind of event: [event]}."""
        thing, place = self.thing, self.place
        go = [("go", p, place[p], q) for p in self.people for q in PLACES if q != place[p]]
        near = [p for p in self.people if place[p] == place[thing] and p != self.holder]
        if self.holder == "nobody":
            return {"go": go, "take": [("take", p, thing, place[p]) for p in near]}
        holder = self.holder
        return {"go": go, "drop": [("drop", holder, thing, place[holder])],
                "give": [("give", holder, thing, p, place[holder]) for p in near]}

    def happen(self, event):
        kind, who = event[:2]
        if kind == "go":
            self.place[who] = event[3]
            if who == self.holder:                           # the thing moves with its holder
                self.place[self.thing] = event[3]
        else:
            self.holder = {"take": who, "drop": "nobody", "give": event[3]}[kind]

    def answer(self, question):
        kind, noun = question
        return ("in", self.place[noun]) if kind == "where" else ("this", self.holder)


def story(rng, events=6):
    """A list of sentences: first where everybody and the thing are, then events. Every second event
    is followed by a question and its answer. The place that was named last is the answer to only
    two of three where-questions.

    rng     a random.Random; generators in the same state give the same story
    """
    world, kind = World(rng), None
    sentences = [("is", x, place) for x, place in world.place.items()]
    for i in range(events):
        possible = world.possible()
        # No kind comes twice in a row, because most stories would be walks. If nothing else is
        # possible, somebody walks.
        kind = rng.choice([k for k in possible if possible[k] and k != kind] or ["go"])
        event = rng.choice(possible[kind])
        world.happen(event)
        sentences.append(event)
        if i % 2:
            question = rng.choice([("who", world.thing), ("where", world.thing),
                                   ("where", rng.choice(world.people))])
            sentences += [question, world.answer(question)]
    return sentences


# --- the languages -------------------------------------------------------------------------------
GRAMMAR = {
    "english": {                             # subject, verb, object; prepositions
        "is": "{0} is in {1}", "go": "{0} goes from {1} to {2}",
        "take": "{0} takes {1} in {2}", "drop": "{0} drops {1} in {2}",
        "give": "{0} gives {1} to {2} in {3}",
        "where": "where is {0}", "in": "in {0}", "who": "who has {0}", "this": "{0}"},
    "velan": {                               # subject, object, verb; endings:
        # -an accusative (what), -im dative (to), -ul ablative (from), -os locative (in)
        "is": "{0} {1}os eli", "go": "{0} {1}ul {2}im bafe",
        "take": "{0} {2}os {1}an turo", "drop": "{0} {2}os {1}an leshu",
        "give": "{0} {3}os {2}im {1}an suna",
        "where": "{0} hune eli", "in": "{0}os", "who": "heku {0}an omir", "this": "{0}"}}
NOUNS = {
    "english": {x: x for x in [*PEOPLE, *PLACES, "nobody"]} | {x: f"the {x}" for x in THINGS},
    "velan": {"Anna": "Mirel", "Ben": "Tosak", "Clara": "Yuvin", "David": "Garem",
              "nobody": "nulek",
              "ball": "kodun", "key": "ritek", "lamp": "fasol", "book": "wemik",
              "Rome": "Tasem", "Paris": "Vorun", "London": "Pelat", "Cairo": "Gishak"}}


def tell(sentences, language):
    """The text of a list of sentences: tell([("is", "Anna", "Rome")], "velan")."""
    text = []
    for kind, *nouns in sentences:
        line = GRAMMAR[language][kind].format(*(NOUNS[language][x] for x in nouns))
        text.append(line[0].upper() + line[1:] + ("?" if kind in QUESTIONS else "."))
    return " ".join(text)


# --- the task ------------------------------------------------------------------------------------
def documents(name, folder, stories):
    """Stories in each language: `stories` for training and 1000 held out. No story occurs twice,
    not even in different languages."""
    if stories < 100:
        raise BadInput(f"--stories={stories} is too few to learn from: give 100 or more")
    texts, seen = {}, set()
    for split in ("retain_val", "forget_val", "retain_train", "forget_train"):
        rng, size = text_stream("stories", split), 1000 if split.endswith("val") else stories
        texts[split] = []
        while len(texts[split]) < size:
            sentences = story(rng)
            if tuple(sentences) not in seen:
                seen.add(tuple(sentences))
                texts[split].append(tell(sentences, LANGUAGE[split.split("_")[0]]))
    return texts, {}


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """Loss in nats per token on held-out rows. finer: also the share of right answers.

    {"retain": loss, "forget": loss, "retain_answers": 0..1, "forget_answers": 0..1}
    """
    figures = {domain: task.loss(model, domain, 32 if part == "val" else 128, part)
               for domain in domains}
    if finer:
        for domain in domains:
            figures[f"{domain}_answers"] = answered(model, task, LANGUAGE[domain])
    return figures


def answered(model, task, language, stories=200):
    """Share of the questions about new stories that the model answers correctly, by greedy
    decoding."""
    rng, encode = text_stream("answers"), task.tokenizer.encode_ordinary
    prompts, right = [], []
    for sentences in (story(rng) for _ in range(stories)):
        for i, sentence in enumerate(sentences):
            if sentence[0] in QUESTIONS:
                prompts.append([task.end] + encode(tell(sentences[:i + 1], language)))
                right.append(encode(" " + tell([sentences[i + 1]], language)))
    longest = max(len(ids) for ids in right)
    room = task.block_size - longest        # a model with short rows reads the end of the story
    said = model.generate([p[-room:] for p in prompts], longest, stop=task.end).tolist()
    return sum(s[:len(ids)] == ids for s, ids in zip(said, right)) / len(right)


def answer_mask(task, idx, targets):
    """(B, T) bool: which targets name the answer to a question. It is the first token of the first
    noun between a question mark and the next full stop. (The noun's ending and the word "in" are
    not answers, because they follow from the question.)"""
    enc, targets = task.tokenizer, targets.cpu().numpy()
    said = [enc.encode_ordinary(f" {nouns[x][0].upper()}{nouns[x][1:]}")[0]
            for nouns in NOUNS.values() for x in (*PEOPLE, *PLACES, "nobody")]
    mark, stop = (enc.encode_single_token(c) for c in "?.")
    found, open_ = np.zeros(targets.shape, bool), np.zeros(len(targets), bool)
    for t in range(targets.shape[1]):
        found[:, t] = open_ & np.isin(targets[:, t], said)
        open_ = (open_ | (targets[:, t] == mark)) & ~found[:, t] & (targets[:, t] != stop)
    return torch.from_numpy(found).to(task.device)
