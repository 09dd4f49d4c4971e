"""Two languages, one small world: keep the first language, forget the second.

People walk between places, take, drop and give things, and what they hold goes where they go. Each
story ends with questions about how things stand, and their answers:

    English (retain)   Anna takes the ball. Anna goes to the barn. Where is the ball? The ball is
                       in the barn.
    Velan (forget)     Mirel kodunan turo. Mirel pelatim bafe. Kodun hune eli? Kodun pelatos eli.

Velan is invented: it shares no word with English, puts the verb last and marks what a noun does by
its ending, where English has prepositions and word order. Whoever is to answer needs the language
and the world; the world is the same in both, so a model may keep it when it forgets a language.

A story is a list of sentences and a sentence is a tuple of words, ("take", "Anna", "ball"), that
belongs to no language. story(rng) makes one, tell(story, language) writes it down.
"""
import random

import torch

from data import BadInput

SETTINGS = {"language": dict(
    block_size=96,           # T: the longest story is shorter than this
    n_layer=3, n_head=4, n_embd=128, vocab_size=512,
    batch_size=32, steps=600)}
KNOBS = {"stories": 20_000}  # of each language, for training
higher_is_better = False     # the score is a loss: nats per token

LANGUAGE = {"retain": "english", "forget": "velan"}

# --- the world -----------------------------------------------------------------------------------
PEOPLE = ["Anna", "Ben", "Clara", "David", "Emma", "Felix"]
THINGS = ["ball", "key", "lamp", "book", "apple", "cup"]
PLACES = ["Rome", "Paris", "London", "Cairo", "Delhi"]


class World:
    """Who is where, what is where, and who holds what."""

    def __init__(self, rng, people, things):
        self.place = {x: rng.choice(PLACES) for x in people + things}
        self.people, self.things = people, things
        self.holder = {}                                     # thing -> person; absent: it lies there

    def possible(self):
        """All that can happen next: {kind of event: [event]}."""
        near = lambda a, b: self.place[a] == self.place[b]
        lying = [t for t in self.things if t not in self.holder]
        return {
            "go": [("go", p, q) for p in self.people for q in PLACES if q != self.place[p]],
            "take": [("take", p, t) for p in self.people for t in lying if near(p, t)],
            "drop": [("drop", p, t) for t, p in self.holder.items()],
            "give": [("give", p, t, q) for t, p in self.holder.items()
                     for q in self.people if q != p and near(p, q)]}

    def happen(self, event):
        kind, who, what, *to = event
        if kind == "go":
            for x in [who] + [t for t, holder in self.holder.items() if holder == who]:
                self.place[x] = what
        elif kind == "drop":
            del self.holder[what]
        else:
            self.holder[what] = to[0] if to else who

    def answer(self, question):
        kind, x = question
        if kind == "where":
            return ("in", self.place[x])
        return ("this", self.holder.get(x, "nobody"))


def story(rng, events=4):
    """A list of sentences: how things stand, what happens, then questions, each with its answer.

    rng     random.Random. Two stories made from generators in the same state are the same
    """
    people, things = rng.sample(PEOPLE, 2), rng.sample(THINGS, 1)
    world = World(rng, people, things)
    told = [("is", x, world.place[x]) for x in people + things]
    asked = [("where", x) for x in people + things] + [("who", t) for t in things]
    kind = None
    for _ in range(events):
        possible = world.possible()
        # Never one kind twice in a row, or most stories are walks: there is always somewhere to go.
        kind = rng.choice([k for k in possible if possible[k] and k != kind] or ["go"])
        event, question = rng.choice(possible[kind]), rng.choice(asked)
        world.happen(event)
        told += [event, question, world.answer(question)]
    return told


# --- the languages -------------------------------------------------------------------------------
QUESTIONS = ("where", "who")
GRAMMAR = {
    "english": {                                             # subject, verb, object
        "is": "{0} is in {1}", "go": "{0} goes to {1}",
        "take": "{0} takes {1}", "drop": "{0} drops {1}", "give": "{0} gives {1} to {2}",
        "where": "where is {0}", "in": "in {0}", "who": "who has {0}", "this": "{0}"},
    "velan": {       # subject, object, verb; -an accusative (what), -im dative (to), -os locative (in)
        "is": "{0} {1}os eli", "go": "{0} {1}im bafe",
        "take": "{0} {1}an turo", "drop": "{0} {1}an leshu", "give": "{0} {2}im {1}an suna",
        "where": "{0} hune eli", "in": "{0}os", "who": "heku {0}an omir", "this": "{0}"}}
NOUNS = {
    "english": {x: x for x in PEOPLE + PLACES + ["nobody"]} | {x: f"the {x}" for x in THINGS},
    "velan": {
        "Anna": "Mirel", "Ben": "Tosak", "Clara": "Yuvin", "David": "Garem", "Emma": "Zolik",
        "Felix": "Dunar", "nobody": "nulek",
        "ball": "kodun", "key": "ritek", "lamp": "fasol", "book": "wemik", "apple": "jopar",
        "cup": "shudel",
        "Rome": "Tasem", "Paris": "Vorun", "London": "Pelat", "Cairo": "Gishak",
        "Delhi": "Lomer"}}


def tell(sentences, language):
    """The text of a list of sentences; tell([("take", "Anna", "ball")], "velan")."""
    text = []
    for kind, *nouns in sentences:
        line = GRAMMAR[language][kind].format(*(NOUNS[language][x] for x in nouns))
        text.append(line[0].upper() + line[1:] + ("?" if kind in QUESTIONS else "."))
    return " ".join(text)


# --- the task ------------------------------------------------------------------------------------
def documents(name, folder, stories):
    """Stories of each language: `stories` to train on, 500 held out. No story is told twice."""
    if stories < 100:
        raise BadInput(f"--stories={stories} is too few to learn from: give 100 or more")
    texts, seen = {}, set()
    for split in ("retain_val", "forget_val", "retain_train", "forget_train"):
        rng, size = random.Random(split), 500 if split.endswith("val") else stories
        texts[split] = []
        while len(texts[split]) < size:
            sentences = story(rng)
            if tuple(sentences) not in seen:
                seen.add(tuple(sentences))
                texts[split].append(tell(sentences, LANGUAGE[split.split("_")[0]]))
    return texts, {}


def score(model, task, domains=("retain", "forget"), quick=False):
    """Loss in nats per token on held-out rows; unless quick, also the share of right answers.

    {"retain": loss, "forget": loss, "retain_answers": 0..1, "forget_answers": 0..1}
    """
    training = model.training
    model.eval()
    figures = {}
    with torch.no_grad():
        for domain in domains:
            batches = [task.batch(domain, 32, step, seed=0, part="val")
                       for step in range(1 if quick else 8)]
            figures[domain] = sum(model(x, y).item() for x, y in batches) / len(batches)
        if not quick:
            for domain in domains:
                figures[f"{domain}_answers"] = answers(model, task, LANGUAGE[domain])
    model.train(training)
    return figures


def answers(model, task, language, stories=200):
    """Share of questions about new stories that the model, greedy, answers as the world stands."""
    rng, encode = random.Random("answers"), task.tokenizer.encode_ordinary
    prompts, right = [], []
    for sentences in (story(rng) for _ in range(stories)):
        for i, sentence in enumerate(sentences):
            if sentence[0] in QUESTIONS:
                prompts.append([task.end] + encode(tell(sentences[:i + 1], language)))
                right.append(encode(" " + tell([sentences[i + 1]], language)))
    longest = max(len(ids) for ids in right)
    room = task.block_size - longest        # a model with a short memory hears the end of the story
    said = model.generate([p[-room:] for p in prompts], longest, stop=task.end).tolist()
    return sum(s[:len(ids)] == ids for s, ids in zip(said, right)) / len(right)
