"""Four operations, as equations and as word problems. Retain + and -, forget * and /.

After Lee et al. 2025 (UNDO, section 4): operands 1..50 with results >= 0 for + and -, factors
1..20 and exact division for * and /. Half of the texts are equations ("12 + 5 = 17"), and half are
word problems. Every operation has 20 templates for training. The last 10 in each list below are
used for scoring only.

Some operand pairs never appear in training, in either form. There are only 400 pairs of factors, so
training shows each of the other pairs many times. A score on these tests known facts, whereas a
score on the pairs never shown tests the skill.
"""
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from engine.knobs import BadInput, knob
from engine.streams import text_stream

higher_is_better = True                # a score is greedy accuracy
SETTINGS = {"arithmetic": dict(block_size=64, least_block_size=48, vocab_size=768, aligned=True)}


@dataclass
class Knobs:
    """Knobs of the task arithmetic."""
    words: float = knob(0.5, "share of word problems among the training texts", 0, 1)
    heldout_pairs: float = knob(0.15, "share of operand pairs that training never shows", 0, 0.5)
    problems: int = knob(40_000, "training problems for each operation", 100)


DOMAINS = {"retain": ("+", "-"), "forget": ("*", "/")}
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b,
              "*": lambda a, b: a * b, "/": lambda a, b: a // b}
TRAINING_TEMPLATES = 20

TEMPLATES = {
    "+": """\
{n} has {a} {o} and buys {b} more. How many now?
{n} has {a} {o}. {m} gives {n} {b} more. Total?
There are {a} {o} in the {p}. {n} adds {b}. Total?
{n} found {a} {o} on Monday and {b} on Tuesday. In all?
{n} had {a} {o} and {m} had {b}. Together?
The {p} holds {a} {o}. After {b} more arrive, how many?
{n} baked {a} {o} and {m} baked {b}. Together?
{n} counted {a} {o}, then {b} more. Total?
The sum of {a} {o} and {b} {o}?
{m} brings {a} {o} and {n} brings {b}. In all?
{n} collected {a} {o}, later {b} more. Total?
There were {a} {o} in the {p} and {b} more came. How many now?
{n} owns {a} {o} and receives {b} from {m}. How many now?
{n} combines {a} {o} with {b} {o}. In all?
{m} painted {a} {o} and then painted {b} more. Total?
In the {p} are {a} {o}. {m} brings {b} more. How many now?
{n} saved {a} {o} last week and {b} this week. In all?
{n} picked {a} {o} and {m} picked {b}. Total?
Add {b} {o} to {a} {o}. Total?
{n} started with {a} {o} and gained {b}. How many now?
{n} has {a} {o} and receives {b} more. Total?
{m} owns {a} {o} and buys {b} more. How many now?
There are {a} {o} in the {p}. {b} more arrive. In all?
{n} picked {a} {o} on Monday and {b} on Tuesday. Total?
{n} found {a} {o} and {m} found {b}. Together?
{m} counted {a} {o} in the {p}, later {b} more. Total?
{n} has {a} {o}. {m} brings {b} more. How many now?
{n} adds {a} {o} and {b} {o}. Total?
{n} saved {a} {o}, then gained {b} more. In all?
{n} adds {b} {o} to {a} {o}. How many now?""",
    "-": """\
{n} has {a} {o} and loses {b}. How many left?
{n} has {a} {o} and gives {b} to {m}. How many left?
There are {a} {o} in the {p}. {n} takes away {b}. How many remain?
{n} had {a} {o} and ate {b}. How many left?
{n} bought {a} {o} but {b} broke. How many remain?
The {p} held {a} {o}. {m} removed {b}. How many remain?
{n} sold {b} of {a} {o}. How many left?
Out of {a} {o}, {b} were lost. How many remain?
The difference between {a} {o} and {b} {o}?
{m} had {a} {o} and {n} took {b} away. How many left?
{n} has {a} {o} and {m} has {b}. How many fewer?
From {a} {o} in the {p}, {n} used {b}. How many remain?
{n} needs {a} {o} and has {b}. How many missing?
Take away {b} {o} from {a} {o}. How many left?
{n} dropped {b} of {a} {o}. How many left?
{m} had {a} {o} but spent {b}. How many left?
There were {a} {o} in the {p} before {n} used {b}. How many remain?
{n} packed {a} {o} and removed {b}. How many remain?
Of {a} {o} that {n} had, {m} ate {b}. How many left?
{m} must find {a} {o} and found {b}. How many missing?
{n} has {a} {o} and sold {b}. How many left?
There are {a} {o} in the {p}. {m} ate {b}. How many remain?
{m} had {a} {o} and loses {b}. How many remain?
{n} took away {b} of {a} {o}. How many left?
{n} bought {a} {o} but {b} were lost. How many left?
Out of {a} {o} in the {p}, {m} removed {b}. How many remain?
{m} needs {a} {o} and {n} has {b}. How many missing?
{n} had {a} {o} and gives {b} to {m}. How many remain?
From {a} {o}, {n} takes away {b}. How many left?
{m} packed {a} {o} but {b} broke. How many remain?""",
    "*": """\
{n} has {a} boxes with {b} {o} each. How many?
There are {a} rows of {b} {o} in the {p}. How many?
{n} buys {a} bags, each with {b} {o}. How many?
Each of {a} children has {b} {o}. How many?
{n} reads {b} {o} a day for {a} days. How many?
{m} fills {a} boxes. Every box holds {b} {o}. How many?
What is {a} times {b} {o}?
The {p} has {a} shelves of {b} {o}. How many?
{n} makes {a} groups of {b} {o} each. How many?
{n} ships {a} crates of {b} {o}. How many?
For {a} days, {m} draws {b} {o} a day. How many?
{a} friends bring {b} {o} each. How many?
Each row has {b} {o}. There are {a} rows. How many?
If a bag holds {b} {o}, how many {o} in {a} bags?
{n} plants {a} rows, {b} {o} in every row. How many?
{m} packs {b} {o} in each of {a} crates. How many?
Multiply {a} groups by {b} {o}. How many?
{n} has {a} shelves, each with {b} {o}. How many?
Every child gets {b} {o}. How many {o} for {a} children?
{n} earns {b} {o} a week for {a} weeks. How many?
{m} buys {a} boxes with {b} {o} each. How many?
{n} has {a} bags of {b} {o} each. How many?
The {p} has {a} shelves, each with {b} {o}. How many?
Each of {a} friends has {b} {o}. How many?
{m} reads {b} {o} a week for {a} weeks. How many?
Every row holds {b} {o}. How many {o} in {a} rows?
{n} packs {a} crates. Every crate holds {b} {o}. How many?
{n} makes {a} rows of {b} {o}. How many?
{m} earns {b} {o} a day for {a} days. How many?
If a box holds {b} {o}, how many {o} in {a} boxes?""",
    "/": """\
{n} shares {a} {o} among {b} friends. How many each?
{n} puts {a} {o} equally into {b} boxes. How many in a box?
{a} {o} are divided into {b} equal groups. How many in a group?
{n} splits {a} {o} between {b} children. How many each?
{n} arranges {a} {o} in {b} equal rows. How many in a row?
{m} packs {a} {o} equally into {b} bags. How many in a bag?
There are {a} {o} for {b} days. How many per day?
The {p} has {a} {o} on {b} equal shelves. How many on a shelf?
What is {a} {o} divided by {b}?
{n} divides {a} {o} by {b}. How many each?
{m} deals {a} {o} equally to {b} children. How many each?
{a} {o} fill {b} equal crates. How many in a crate?
{n} reads {a} {o} in {b} days. How many per day?
Split {a} {o} into {b} equal parts. How many in a part?
{b} friends share {a} {o}. How many each?
{b} equal bags hold {a} {o}. How many in a bag?
{n} spreads {a} {o} over {b} shelves. How many on a shelf?
In the {p}, {a} {o} stand in {b} equal rows. How many in a row?
{m} deals {a} {o} to {b} players. How many per player?
{n} cuts {a} {o} into {b} equal groups. How many in a group?
{m} shares {a} {o} among {b} children. How many each?
{n} divides {a} {o} into {b} equal groups. How many in a group?
{m} puts {a} {o} equally into {b} bags. How many in a bag?
{b} children share {a} {o}. How many each?
{n} splits {a} {o} between {b} players. How many per player?
{a} {o} fill {b} equal boxes. How many in a box?
{m} spreads {a} {o} over {b} equal rows. How many in a row?
In the {p}, {a} {o} are divided into {b} equal parts. How many in a part?
{n} deals {a} {o} equally to {b} friends. How many each?
{m} packs {a} {o} into {b} equal crates. How many in a crate?"""}
TEMPLATES = {operation: lines.split("\n") for operation, lines in TEMPLATES.items()}

NAMES = """Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam
Tina Victor Wendy Yusuf Zoe Amir Bella Carlos Diana Erik""".split()
OBJECTS = """apples pears plums lemons cookies muffins pencils books stamps coins marbles shells
stones buttons beads flowers eggs carrots onions tickets cards stickers balloons candles cups plates
spoons bottles letters leaves""".split()
SINGULAR = {"leaves": "leaf"}
PLACES = "kitchen garden shop school basket garage library market barn cellar attic drawer".split()


def pairs(operation):
    """Every operand pair (a, b) of an operation, in a fixed order."""
    if operation in "+-":
        return [(a, b) for a in range(1, 51) for b in range(1, 51) if operation == "+" or a >= b]
    factors = [(a, b) for a in range(1, 21) for b in range(1, 21)]
    return factors if operation == "*" else [(a * b, b) for a, b in factors]


def split_pairs(operation, heldout_pairs):
    """(pairs for training, pairs never trained on), split with a fixed seed.

    A pair of + or * stays with its mirror, because 5 + 3 tells the answer to 3 + 5.
    """
    mirrored = {}                                        # {pair: it and its mirror}
    for a, b in pairs(operation):
        same = (min(a, b), max(a, b)) if operation in "+*" else (a, b)
        mirrored.setdefault(same, []).append((a, b))
    shuffled = list(mirrored.values())
    text_stream("pairs", operation).shuffle(shuffled)
    n = max(round(heldout_pairs * len(shuffled)), heldout_pairs > 0)
    known = [pair for group in shuffled[n:] for pair in group]
    unknown = [pair for group in shuffled[:n] for pair in group]
    return known, unknown


def equation(operation, a, b):
    """(question, answer), for example ("12 + 5 =", " 17")."""
    return f"{a} {operation} {b} =", f" {OPERATIONS[operation](a, b)}"


def word_problem(operation, a, b, rng, templates):
    """(question, answer), with a random template, two names, an object and a place."""
    (n, m), o = rng.sample(NAMES, 2), rng.choice(OBJECTS)
    text = rng.choice(templates).format(n=n, m=m, o=o, p=rng.choice(PLACES), a=a, b=b)
    text = (" " + text).replace(f" 1 {o}", f" 1 {SINGULAR.get(o, o[:-1])}")[1:]
    return text, f" {OPERATIONS[operation](a, b)}"


def documents(name, folder, words, heldout_pairs, problems):
    """Training and validation texts; see data/__init__.py."""
    for name, value, most in (("words", words, 1), ("heldout_pairs", heldout_pairs, 0.5)):
        if not 0 <= value <= most:
            raise BadInput(f"--{name}={value} must lie between 0 and {most}")
    if problems < 100:
        raise BadInput(f"--problems={problems} must be at least 100")
    texts = {}
    for domain, operations in DOMAINS.items():
        for part, n in (("train", problems), ("val", max(problems // 20, 100))):
            rng = text_stream("problems", domain, part)
            docs = []
            for operation in operations:
                known = split_pairs(operation, heldout_pairs)[0]
                seen = TEMPLATES[operation][:TRAINING_TEMPLATES]
                for _ in range(n):
                    a, b = rng.choice(known)
                    question, answer = (
                        word_problem(operation, a, b, rng, seen)
                        if rng.random() < words else equation(operation, a, b))
                    docs.append(question + answer)
            rng.shuffle(docs)
            texts[f"{domain}_{part}"] = docs
    return texts, {}


EXAM = {"val": 100, "test": 200}        # most problems in each form and operation
NEW = 60                                # the same for pairs never shown; twice as many in words


@cache
def exam(operation, form, part, heldout, heldout_pairs):
    """The fixed, distinct (question, answer) problems of an operation. val and test share none.

    form      equations | words (with templates that training never shows)
    heldout   True: operand pairs that training never shows; False: those that it shows
    """
    rng = text_stream("exam", operation, form, heldout)
    pool = split_pairs(operation, heldout_pairs)[heldout]
    pool = rng.sample(pool, len(pool))
    n = min(EXAM["test"], len(pool) * 2 // 3)
    chosen = pool[:n] if part == "test" else pool[n:n + EXAM["val"]]
    if heldout:                          # * and / have few: each one makes two word problems
        chosen = pool[:NEW] * (1 if form == "equations" else 2)
    unseen = TEMPLATES[operation][TRAINING_TEMPLATES:]
    return [equation(operation, a, b) if form == "equations"
            else word_problem(operation, a, b, rng, unseen) for a, b in chosen]


@torch.no_grad()
def accuracy(model, task, problems, before=()):
    """Share of the (question, answer) problems that greedy decoding answers exactly. before: tokens
    that come before each question, such as solved examples.

    It does so if each token of an answer, and the end after it, is the likeliest one after the
    question and the right tokens before it. One pass over all questions with their answers tells.
    """
    encode, end = task.tokenizer.encode_ordinary, task.end
    asked = [[*before, end] + encode(question) for question, _ in problems]
    rows = [q + encode(answer) + [end] for q, (_, answer) in zip(asked, problems)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=task.device)
    begin, stop = (torch.tensor([[len(x) - 1] for x in xs], device=task.device)
                   for xs in (asked, rows))
    column = torch.arange(longest - 1, device=task.device)
    idx, targets, answers = tokens[:, :-1], tokens[:, 1:], (begin <= column) & (column < stop)
    said = model.unembed(model(idx, residual=-1)[answers]).argmax(-1)
    wrong = torch.zeros_like(answers).masked_scatter(answers, said != targets[answers])
    return 1 - wrong.any(1).float().mean().item()


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """Greedy accuracy, 0..1. "retain" and "forget" are means over a domain's operations and forms,
    on operand pairs that training shows. "retain_heldout_pairs" and "forget_heldout_pairs" are the
    same on pairs that training never shows (part test only). finer: also one figure for each
    operation and form, "+ equations", "+ words", ...
    """
    words, heldout_pairs = task.made_with["words"], task.made_with["heldout_pairs"]
    forms = ["equations"] * (words < 1) + ["words"] * (words > 0)
    figures = {}
    for domain in domains:
        for heldout in (False, True):
            if heldout and (part == "val" or not heldout_pairs):
                continue
            got = {f"{operation} {form}": accuracy(model, task, exam(
                operation, form, part, heldout, heldout_pairs))
                for operation in DOMAINS[domain] for form in forms}
            if finer and not heldout:
                figures |= got
            figures[domain + "_heldout_pairs" * heldout] = sum(got.values()) / len(got)
    return figures


def answer_mask(task, idx, targets):
    """(B, T) bool: which targets are an answer's digits. These are the digits after which only
    digits follow until the end of the text."""
    enc, targets = task.tokenizer, targets.cpu().numpy()
    digits = np.isin(targets, [enc.encode_single_token(str(i)) for i in range(10)])
    found = np.zeros_like(digits)
    follows = np.zeros(len(targets), bool)                # whether an answer continues to the right
    for t in reversed(range(targets.shape[1])):
        found[:, t] = follows & digits[:, t]
        follows = found[:, t] | (targets[:, t] == task.end)
    return torch.from_numpy(found).to(task.device)
