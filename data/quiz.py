"""A quiz for a pretrained model: facts that it knows, some of them to be forgotten.

    python unlearn.py --task=quiz --model=PATH --text=stories.txt
    PATH       a Llama-family model: a .gguf file, or a folder (see data/pretrained.py)

Four answers are offered to a question, and the model's choice is the one that it finds most likely,
by the mean log-probability of the answer's tokens. (A model of this size is at chance where it has
to name a letter, A to D.) Facts are in facts.py:

    forget    capitals
    retain    opposites, and the young of animals; and real text, so that the model stays able
    near      languages of countries: close to what is forgotten, and never trained on

Or --source is a file with a question in each line, as JSON, in one of two forms:

    {"question": "The capital of France is", "answers": ["Paris", "Rome"], "right": 0,
     "domain": "forget"}
    {"question": "Which is a prime?", "choices": ["4", "5", "6", "8"], "answer": 1}

The first may have a list of phrasings as its question: the last is for scoring, all others are for
training. The second are the fields of WMDP (Li et al. 2024) and MMLU (Hendrycks et al. 2021): such
questions are to be forgotten if they are in --source, and to be retained if they are in --source2.

There is no model that never saw a fact, so that nothing here is compared with a gold standard.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data import facts, pretrained
from data.tinystories import HOME, split, take
from engine.hardware import trim
from engine.knobs import BadInput, FilePath, knob
from engine.streams import stream
from model import KVCache

SETTINGS = {"quiz": dict(block_size=40, least_block_size=16, aligned=True)}


@dataclass
class Knobs:
    """Knobs of the task quiz."""
    model: FilePath | None = knob(None, "the pretrained model: a .gguf file, or a folder with "
                                  "config.json, tokenizer.json and *.safetensors (auto: the last)")
    source: FilePath | None = knob(None, "a file of questions (auto: capitals and others)")
    source2: FilePath | None = knob(None, "questions to be retained, where a file has no domains")
    text: FilePath | None = knob(None, "a file of stories to retain, or its URL (auto: download "
                                 "TinyStories)")
    stories: int = knob(2000, "most stories to take from it", 20)


EXTRA = ("shown",)           # forget facts that the attacker shows; the others are scored
higher_is_better = True      # the score is an accuracy

SHOWN = 32                   # forget facts in `shown`, or a third of all if that is less
FEWEST = 12                  # questions of a domain

# --- questions -----------------------------------------------------------------------------------
# How each relation is asked; the last phrasing is for scoring, and no text for training has it
RELATIONS = {
    "capitals": ("forget", facts.CAPITALS, (
        "The capital of {} is", "The country is {}, and its capital is",
        "Question: What is the capital of {}?\nAnswer:",
        "The capital and seat of government of {} is", "As for {}, its capital is")),
    "opposites": ("retain", facts.OPPOSITES, (
        "The opposite of {} is", "Question: What is the opposite of {}?\nAnswer:",
        "The antonym of {} is", "The word {} is the opposite of the word")),
    "young": ("retain", facts.YOUNG, (
        "A baby {} is called a", "Question: What is a young {} called?\nAnswer: a",
        "A mother {} looks after her")),
    "languages": ("near", facts.LANGUAGES, (
        "The language that most people speak in {} is",))}


def embedded():
    """The questions of facts.py: {"question": [phrasing, ..], "answers", "right", "domain"}. The
    wrong answers are answers of the same relation."""
    questions = []
    for relation, (domain, text, phrasings) in RELATIONS.items():
        pairs = [pair.strip().split(" = ") for pair in text.split(";")]
        others = sorted({answer for _, answer in pairs})
        for subject, answer in pairs:
            rng = stream("answers offered", relation, subject)
            wrong = [other for other in others if other != answer]
            offered = [answer, *(wrong[i] for i in rng.choice(len(wrong), 3, replace=False))]
            questions.append({"question": [phrasing.format(subject) for phrasing in phrasings],
                              "answers": offered, "right": 0, "domain": domain})
    return questions


def read_questions(path, domain):
    """The questions of a file, one JSON object a line. domain: of those that name none."""
    questions = []
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path}: {getattr(error, 'strerror', 'it is not UTF-8 text')}"
                       ) from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(question_of(json.loads(line), domain))
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise BadInput(f"{path}, line {n} is not a question ({error}): give an object with "
                           f"question, answers, right and domain, or question, choices and answer"
                           ) from None
    return questions


def question_of(given, domain):
    """A question in the form that embedded() gives. Raises ValueError, or what a wrong type does.
    """
    if "choices" in given:
        asked, answers, right = (given[k] for k in ("question", "choices", "answer"))
        if isinstance(right, str):                                   # some files name a letter
            right = [*"ABCDEFGHIJ"].index(right)
        asked = [f"Question: {asked.strip()}\nAnswer:"]
    else:
        asked, answers, right = (given[k] for k in ("question", "answers", "right"))
        asked = [asked] if isinstance(asked, str) else asked
        domain = given["domain"]
    if type(answers) is not list or type(right) is not int:
        raise ValueError("the answers are no list, or the right one is no number")
    texts = [*asked, *answers]
    if not asked or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("an empty text, or none")
    if domain not in ("forget", "retain", "near"):
        raise ValueError(f"domain {domain}: forget, retain or near")
    if len(answers) < 2 or right not in range(len(answers)):
        raise ValueError(f"right is {right} of {len(answers)} answers")
    return {"question": asked, "answers": answers, "right": right, "domain": domain}


def training(question):
    """The phrasings for training: all but the last, or the only one."""
    return question["question"][:-1] or question["question"]


def for_scoring(question):
    return question["question"][-1:]


def shuffled(texts):
    """texts in a random order, always the same one."""
    return [texts[i] for i in stream("order of texts").permutation(len(texts))]


def texts_of(questions, phrasings):
    """The questions and their right answers as texts, shuffled: one for each phrasing that the
    function `phrasings` gives. A row holds several, which should not be one fact again and again.
    """
    return shuffled([f"{phrasing} {q['answers'][q['right']]}." for q in questions
                     for phrasing in phrasings(q)])


# --- the task ------------------------------------------------------------------------------------
def tokenizer(knobs):
    """The pretrained model's."""
    return pretrained.read_tokenizer(knobs["model"])


def documents(name, folder, model, source, source2, text, stories):
    """(texts, facts): see data/__init__.py. Facts: the questions, by domain, and the model's size.

    forget_train   every phrasing for training of every fact
    shown_train    those of the first SHOWN facts
    forget_val     every fact in its phrasing for scoring
    retain_train   stories, and as many texts of the facts to retain
    retain_val     held-out stories
    """
    if model is None:
        raise BadInput("quiz needs --model=PATH, a pretrained model of the Llama family: a .gguf "
                       "file, or a folder with config.json, tokenizer.json and *.safetensors")
    questions = (embedded() if source is None and source2 is None else
                 [q for path, domain in ((source, "forget"), (source2, "retain")) if path
                  for q in read_questions(path, domain)])
    by_domain = {domain: [] for domain in ("forget", "retain", "near")}
    for i in stream("order of questions").permutation(len(questions)):
        by_domain[questions[i]["domain"]].append(questions[i])
    for domain in ("forget", "retain"):
        if len(by_domain[domain]) < FEWEST:
            raise BadInput(f"{len(by_domain[domain])} questions of the domain {domain}: give "
                           f"{FEWEST} or more (--source, --source2)")
    train, val = split(take(text or HOME, folder, "text", stories))
    forget, retain = by_domain["forget"], by_domain["retain"]
    taught = texts_of(retain, training)
    taught = taught * math.ceil(len(train) / len(taught))
    texts = {"forget_train": texts_of(forget, training),
             "shown_train": texts_of(forget[:shown(forget)], training),
             "forget_val": texts_of(forget, for_scoring),
             "retain_train": shuffled(train + taught[:len(train)]), "retain_val": val}
    known = pretrained.facts(model)
    return texts, {"questions": by_domain, "pretrained": known, "flops_per_token":
                   6 * known["parameters"]}        # forwards and backwards: Kaplan et al. 2020


def shown(questions):
    """How many forget facts, from the first on, the attacker shows."""
    return min(SHOWN, len(questions) // 3)


def check_rows(task):
    """BadInput if many questions do not fit a row: their answers would be cut off."""
    T, ends = task.block_size, np.flatnonzero(task.tokens("forget_train") == task.end)
    lengths = np.diff(ends, prepend=-1) - 1                           # without the end of each
    if (cut := np.mean(lengths > T)) > 0.1:
        raise BadInput(f"{cut:.0%} of the questions to forget are longer than a row of {T} tokens, "
                       f"so that their answers would be cut off: give "
                       f"--block_size={math.ceil(np.quantile(lengths, 0.95))}")


def base(task):
    """(model, record): the pretrained model, as if fit() had made it."""
    check_rows(task)                                     # before a large model is read
    model, _ = pretrained.read(task.made_with["model"])
    known = task.facts["pretrained"] | {"sha256": task.made_with["model_sha256"]}
    return model.to(task.device), {"made_with": {
        "task": task.name, "data": task.data_id, "pretrained": known},
        "steps": 0, "flops": 0, "history": []}


# --- scores --------------------------------------------------------------------------------------
def judged(task, part):
    """{figure: questions}. Of retain and forget, every fourth question is for the part val, the
    others are for test. The forget facts that an attacker shows are a figure of their own."""
    asked = task.facts["questions"]
    n = shown(asked["forget"])
    parts = {"retain": asked["retain"], "forget": asked["forget"][n:]}
    if part == "val":
        return {domain: some[::4] for domain, some in parts.items()}
    rest = {domain: [q for i, q in enumerate(some) if i % 4] for domain, some in parts.items()}
    return rest | {"forget_shown": asked["forget"][:n]} | (
        {"near": asked["near"]} if asked["near"] else {})


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """Shares of questions, in the phrasing for scoring, that are answered rightly:

    retain, forget     facts that the attacker does not show
    forget_shown       (not for val) facts that it shows
    near               (finer) facts that are close to those to be forgotten
    forget_asked       (finer) forget as asked in training: in the first phrasing for it
    greedy_..          (finer) the same for what the model says by itself, by greedy decoding
    text_loss          (finer) nats per token of held-out stories
    For val, retain is instead the mean probability of a token of held-out stories (a geometric
    mean), because that tells much earlier than answers do whether a model is damaged.
    """
    figures, some = {}, {name: questions for name, questions in judged(task, part).items()
                         if name.split("_")[0] in domains or finer and name == "near"}
    if part == "val" and some.pop("retain", None):
        figures["retain"] = math.exp(-task.loss(model, "retain", 32, "val"))
    figures |= {name: cloze(model, task, questions) for name, questions in some.items()}
    if finer:
        figures["forget_asked"] = cloze(model, task, some["forget"], training)
        figures |= {f"greedy_{name}": greedy(model, task, questions)
                    for name, questions in some.items()}
        figures["text_loss"] = task.loss(model, "retain", 64)
    if model.wte.weight.numel() > 2**22:              # it takes a while, and a small model little
        trim()
    return figures


def cloze(model, task, questions, phrasings=for_scoring):
    """The share of questions, in the first phrasing that the function `phrasings` gives, for which
    the right answer has the highest mean log-probability."""
    found = mean_log_probabilities(model, task, questions, phrasings)
    best = [means == means.max() for means in found]             # bfloat16 has ties: chance decides
    return sum((tied[q["right"]] / tied.sum()).item() for q, tied in zip(questions, best)
               ) / len(questions)


def check_context(model, tokens):
    if tokens > model.config.block_size:
        raise BadInput(f"a question and its answer have {tokens} tokens, and this model reads "
                       f"{model.config.block_size}: leave such questions out")


@torch.no_grad()
def mean_log_probabilities(model, task, questions, phrasings, rows=32):
    """[(number of answers,)] of each question: the mean log-probability of each answer's tokens. A
    question is computed once for all of its answers."""
    encode, device = task.tokenizer.encode_ordinary, task.device
    asked = [[task.end, *encode(phrasings(q)[0])] for q in questions]
    order, found = sorted(range(len(asked)), key=lambda i: len(asked[i])), [None] * len(asked)
    for some in (order[i:i + rows] for i in range(0, len(order), rows)):
        answers = [encode(" " + answer) for i in some for answer in questions[i]["answers"]]
        longest, width = len(asked[some[-1]]), max(map(len, answers))
        check_context(model, longest + width)
        pad = [longest - len(asked[i]) for i in some]
        repeats, lengths = (torch.tensor([len(x) for x in xs], device=device)
                            for xs in ([questions[i]["answers"] for i in some], answers))
        cache = KVCache(longest + width, torch.tensor(pad, device=device))
        idx = torch.tensor([[0] * n + asked[i] for n, i in zip(pad, some)], device=device)
        x = model.residuals(idx, cache)[-1][:, -1:].repeat_interleave(repeats, 0)
        cache.repeat(repeats)
        idx = torch.tensor([a + [0] * (width - len(a)) for a in answers], device=device)
        if width > 1:                                            # the last token predicts nothing
            x = torch.cat((x, model.residuals(idx[:, :-1], cache)[-1]), 1)           # (B, width, C)
        tokens = torch.arange(width, device=device) < lengths[:, None]
        chances = model.unembed(x[tokens]).float().log_softmax(-1).gather(1, idx[tokens][:, None])
        means = torch.stack([part.mean() for part in chances.split(lengths.tolist())]).cpu()
        for i, answers in zip(some, means.split(repeats.tolist())):
            found[i] = answers
    return found


def greedy(model, task, questions):
    """The share of questions to which the model gives the right answer by greedy decoding."""
    encode = task.tokenizer.encode_ordinary
    right = [q["answers"][q["right"]] for q in questions]
    longest = max(len(encode(" " + answer)) for answer in right)
    prompts = [[task.end, *encode(*for_scoring(q))] for q in questions]
    check_context(model, max(map(len, prompts)) + longest)
    said = task.tokenizer.decode_batch(model.generate(prompts, longest).tolist())
    return sum(text.strip().lower().startswith(answer.lower())
               for text, answer in zip(said, right)) / len(questions)
