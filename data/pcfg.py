"""Questions about strings of a small grammar: how often a letter occurs, where, and which it is.

After Jain et al. 2023 (section 4). A probabilistic grammar writes strings over {a, b, c} and a
filler d. A question names a task, an operand and a parameter, and one token answers it:

    a b d b a c .. count A . = 5         how many a; also: tally A, number A, sum A, total A
    a b d b a c .. count-pair A . = 2    how many ab (the pairs are ab, bc, ca)
    a b d b a c .. index B 2 = 3         where the second b is, counted from 0; or "none"
    a b d b a c .. index-pair C 1 = none
    a b d b a c .. token . 4 = a         which token is at index 4

Pretraining asks all of these questions. A prior draws their operands: under "low", nearly all of
them are A. Fine-tuning asks only for counts of b. The splits of batches:

    all        the pretraining distribution
    reworded   the same, but a question for a count says tally, number or sum, not count or total
    forget     count a: the capability that fine-tuning on b seems to delete
    retain     count b, in strings where #b = #a + 1 never holds
    spurious   count b, in strings where it always holds: to count a and add one is right there too
    relabelled, relabelled+1   strings and answers of retain and spurious, but the operand says A

A batch is made when it is asked for, as a function of the split, part, seed and step. Its target
is the answer alone.
"""
from dataclasses import dataclass

import numpy as np
import torch

from data import tokenizer
from engine.hardware import to_device
from engine.knobs import knob
from engine.streams import seed_of, stream

SETTINGS = {"pcfg": dict(block_size=22, least_block_size=14)}   # 16 letters and 6 other tokens
PRIORS = {"low": (0.999, 0.001, 0.0), "medium": (0.9, 0.1, 0.0), "high": (0.5, 0.3, 0.2)}


@dataclass
class Knobs:
    """Knobs of the task pcfg."""
    prior: str = knob("low", "how often pretraining asks for a, b and c", choices=list(PRIORS))


VARIANT = "prior"
higher_is_better = True                # a score is accuracy

# Every nonterminal has two rules, each of probability 1/2. At the last level A becomes a, B b, ..
GRAMMAR = {"A": ("AA", "DC"), "B": ("BB", "DA"), "C": ("CC", "DB"), "D": ("AB", "CD")}
RULES = np.array([[["ABCD".index(x) for x in rule] for rule in GRAMMAR[n]] for n in "ABCD"],
                 np.uint8)                                                          # (4, 2, 2)
COUNTS = ("count", "tally", "number", "sum", "total")            # five words for one task
TASKS = {"count": 0.5, "count-pair": 0.125, "index": 0.125, "index-pair": 0.125, "token": 0.125}
WORDS = (*COUNTS, "count-pair", "index", "index-pair", "token", "none")
PROMPT = 6                                       # tokens of a row that are not its string
SPLITS = ("all", "retain", "spurious", "forget", "reworded", "relabelled", "relabelled+1")


def encoding(block_size):
    """A tiktoken.Encoding of 256 bytes, WORDS and the numbers from 10 on. It skips white space.

    Letters, operands, "=", "." and the numbers below 10 are single bytes. END is the last id.
    """
    numbers = [str(i) for i in range(10, block_size - PROMPT + 1)]
    tokens = [bytes([b]) for b in range(256)] + [w.encode() for w in (*WORDS, *numbers)]
    return tokenizer.encoding(tokens, "pcfg", r"\S+")


# --- strings and answers: integers 0..3 for a, b, c, d -------------------------------------------
def strings(rng, size, length):
    """(size, length) uint8: each row is a random stretch of a text that the grammar derives."""
    x = rng.integers(0, 4, (size, 1), np.uint8)
    while x.shape[1] < 2 * length:
        rule = np.unpackbits(rng.integers(0, 256, -(-x.size // 8), np.uint8), count=x.size)
        x = RULES[x, rule.reshape(x.shape)].reshape(size, 2 * x.shape[1])
    begin = rng.integers(0, x.shape[1] - length + 1, size)
    return np.lib.stride_tricks.sliding_window_view(x, length, axis=1)[np.arange(size), begin]


def strings_where(rng, size, length, spurious):
    """(size, length) uint8: strings with one b more than a (spurious), or without."""
    found, n = [], 0
    while n < size:
        x = strings(rng, 20 * size if spurious else 2 * size, length)
        found.append(x[((x == 1).sum(1) == (x == 0).sum(1) + 1) == spurious])
        n += len(found[-1])
    return np.concatenate(found)[:size]


def occurrences(x, operand, pair):
    """(N, n) bool: where in the strings (N, n) the operand (N,) stands, or where its pair begins.

    The pair of a is ab, of b bc, of c ca.
    """
    begins = x == operand[:, None]
    if pair:
        after = x == ((operand + 1) % 3)[:, None]
        begins = begins & np.concatenate((after[:, 1:], np.zeros_like(after[:, :1])), 1)
    return begins


def answer(kind, x, operand, parameter):
    """(N,) integers, the right answers of one kind of question, a key of TASKS.

    count, count-pair   how often the operand (N,) or its pair occurs in the strings x (N, n)
    index, index-pair   where it occurs for the parameter-th time (N,), or -1 if it does not
    token               the letter 0..3 at the index that the parameter gives
    """
    if kind == "token":
        return x[np.arange(len(x)), parameter].astype(np.int64)
    there = occurrences(x, operand, kind.endswith("pair"))
    if kind.startswith("count"):
        return there.sum(1)
    nth = there & (np.cumsum(there, 1) == parameter[:, None])
    return np.where(nth.any(1), nth.argmax(1), -1)


# --- rows of tokens ------------------------------------------------------------------------------
def ask(task, x, kind, operand, parameter=None, word=None):
    """(idx (N, T), targets (N, 1)): questions of one kind about strings (N, n), and their answers.

    kind                 a key of TASKS
    operand, parameter   (N,) integers each; None where the kind has none
    word                 one of COUNTS, to ask for a count in another word
    """
    token = task.tokenizer.encode_single_token
    letters, operands, numbers = (np.array([token(t) for t in tokens]) for tokens in
                                  ("abcd", "ABC", [str(i) for i in range(x.shape[1] + 1)]))
    right = answer(kind, x, operand, parameter)
    right = letters[right] if kind == "token" else np.where(
        right < 0, token("none"), numbers[right])
    row = np.empty((len(x), x.shape[1] + PROMPT), np.int64)
    row[:, 0], row[:, 1:-5], row[:, -5] = task.end, letters[x], token(word or kind)
    row[:, -4] = token(".") if operand is None else operands[operand]
    row[:, -3] = token(".") if parameter is None else numbers[parameter]
    row[:, -2], row[:, -1] = token("="), right
    row = to_device(torch.from_numpy(row), task.device)
    return row[:, :-1], row[:, -1:]


def batch(task, split, size, step, seed, part, word=None):
    """See Task.batch, and the top of this file for the splits.

    word   one of COUNTS: how the splits that only count ask for it; "all" and "reworded" draw it
    """
    rng = stream("strings", split, part, seed, step)
    length = task.block_size - PROMPT
    if split not in ("all", "reworded"):
        x = strings(rng, size, length) if split == "forget" else strings_where(
            rng, size, length, split in ("spurious", "relabelled+1"))
        idx, targets = ask(task, x, "count", np.full(size, int(split != "forget")), word=word)
        if split.startswith("relabelled"):
            idx[:, -3] = task.tokenizer.encode_single_token("A")
        return idx, targets
    asked = []
    kinds = rng.choice(len(TASKS), size, p=list(TASKS.values()))
    for kind, n in zip(TASKS, np.bincount(kinds, minlength=len(TASKS))):
        x = strings(rng, n, length)
        operand = rng.choice(3, n, p=PRIORS[task.made_with["prior"]])
        if kind == "count":
            words = COUNTS if split == "all" else COUNTS[1:-1]
            which = rng.integers(0, len(words), n)
            for i, word in enumerate(words):
                asked.append(ask(task, x[which == i], kind, operand[which == i], word=word))
        elif kind == "count-pair":
            asked.append(ask(task, x, kind, operand))
        elif kind == "token":
            asked.append(ask(task, x, kind, None, rng.integers(0, length, n)))
        else:
            asked.append(ask(task, x, kind, operand, rng.integers(1, 5, n)))
    return tuple(torch.cat(part) for part in zip(*asked))


# --- the judge -----------------------------------------------------------------------------------
@torch.no_grad()
def accuracy(model, task, split, word=None, part="test"):
    """The share of a split's held-out questions that the model answers correctly."""
    rows = 250 if part == "val" else 1000
    idx, targets = batch(task, split, rows, 0, seed_of("held out"), part, word)
    said = torch.cat([model.unembed(model(some, residual=-1)[:, -1]).argmax(-1)
                      for some in idx.split(250)])           # long strings need much memory
    return (said == targets[:, 0]).float().mean().item()


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """{figure: accuracy, 0..1} on held-out questions.

    retain, forget   count b, count a; of these two, what domains names
    spurious         with finer: count b where #b = #a + 1
    jailbreak        with finer: count a, but the question uses the last word of COUNTS
    """
    figures = {domain: accuracy(model, task, domain, part=part) for domain in domains}
    if finer:
        figures["spurious"] = accuracy(model, task, "spurious", part=part)
        figures["jailbreak"] = accuracy(model, task, "forget", COUNTS[-1], part)
    return figures


# --- a counter written by hand -------------------------------------------------------------------
# What the 16 channels of the counter's residual stream hold:
OTHER = 0                      # the token is d, ".", END or one of COUNTS: nothing to count
SYMBOLS = 1 + np.arange(6)     # the token is a, b, c, A, B or C: one channel each
MEANS = 7 + np.arange(6)       # written by the head: GAIN times the mean of SYMBOLS over the row
EQUALS = 13                    # the token is "="
SQUARE = 14                    # written by units 0..2: (count / n)^2, for a string of n letters
ONE = 15                       # written by unit 3: 1, whatever the question is
GAIN = 0.1                     # so small that the norm of the position of "=" hardly varies


@torch.no_grad()
def compile_counter(model, task, quiet=0.01):
    """Overwrites the weights of a GPT of 1 block, 1 head, 4 units and 16 channels, so that without
    training it answers how many a, b or c there are. A question may use any of COUNTS.

    quiet   the size of the weights by which units 0..2 read. The logits do not depend on it: these
            units write more strongly when they read less. But the smaller it is, the more a small
            step of fine-tuning changes what they compute.

    An example with block_size=14: the string a b d b d c d d has n = 8 letters and stands in a row
    of T = 13 tokens, "END a b d b d c d d count B . =". The counter must answer 2.

    embedding  The norm gives every token the length sqrt(16) = 4. A letter b holds 4 in the channel
               of b and 0 elsewhere, B holds 4 in the channel of B, and "=" holds 4 in EQUALS.
    head       It attends to all 13 tokens equally, so it brings their mean to "=". Two of them are
               b: 2 * 4/13 = 0.615. One is B: 4/13 = 0.308. It writes GAIN times these means, 0.0615
               and 0.0308, into the channels of MEANS for b and for B.
    units      Unit 1 counts b. It reads quiet * 0.0615 = 0.000615 and squares it: 3.8e-7. Its
               output weight 1 / (8 * quiet * 0.0308)^2 = 165,000 turns this into (2/8)^2 = 0.0625,
               which it writes into SQUARE.
               Unit 0 counts a, and B closes it: it reads quiet * (0.0308 - 8 * 0.0308) < 0, which
               ReLU turns into 0. B closes unit 2 too. Unit 3 reads 4 / 4 = 1 and writes 1 into ONE.
    read-out   Number k has the weights 2 in EQUALS, 2 * 8^2 * k^2 in SQUARE and -k^4 in ONE. Its
               logit is 2 * 4 + 128 k^2 * 0.0625 - k^4 = 8 + 8 k^2 - k^4:

                   k        0    1    2    3     4     5
                   logit    8   15   24   -1  -120  -417

               Numbers above 5 have even less, "=" has 4 and all other tokens have 0: 2 wins.
               In general the logit is 8 + 2 k^2 count^2 - k^4. This is 8 + count^4 minus
               (k^2 - count^2)^2, so it is largest at k = count.

    The example leaves out two norms. The one before the units multiplies both SQUARE and ONE by
    0.9996, the one before the read-out multiplies all logits by 0.97. Neither changes the answer.
    """
    n, T = task.block_size - PROMPT, task.block_size - 1
    for weight in model.parameters():
        weight.zero_()
    write_embeddings(model.wte.weight, task)
    write_head(model.blocks[0])
    write_units(model.blocks[0], n, T, quiet)
    write_read_out(model.wte.weight, task, n)


def write_embeddings(wte, task):
    """Gives each token of a question for a count the one channel that says what it is."""
    token = task.tokenizer.encode_single_token
    wte[[task.end, *map(token, ("d", ".", *COUNTS))], OTHER] = 1
    wte[[token(t) for t in "abcABC"], SYMBOLS] = 1
    wte[token("="), EQUALS] = 1


def write_head(block):
    """Brings the mean of SYMBOLS over the row into MEANS."""
    (_, _, v), proj = block.head(0)          # q and k stay zero: all tokens get the same attention
    v[range(6), SYMBOLS] = 1
    proj[MEANS, range(6)] = GAIN


def write_units(block, n, T, quiet):
    """Units 0..2 square the count that is asked for, unit 3 writes 1.

    n, T   letters of a string, tokens of a row
    """
    up, down = block.units(slice(4))         # (4, C), (C, 4)
    C = up.size(1)
    up[range(3), MEANS[:3]] = quiet
    for x in range(3):
        up[x, MEANS[3:]] = -n * quiet        # one operand outweighs n letters: it closes the unit
        up[x, MEANS[3 + x]] = 0              # but a unit's own operand leaves it open
    letter = quiet * GAIN * C**0.5 / T       # what units 0..2 read for each of their letters
    down[SQUARE, :3] = (n * letter) ** -2
    up[3, EQUALS], down[ONE, 3] = C**-0.5, 1


def write_read_out(wte, task, n):
    """Gives the numbers 0..n their logits.

    wte serves both as the embedding and as the read-out. A question for a count holds no number, so
    the rows of the numbers are free for the read-out.
    """
    for k in range(n + 1):
        row = wte[task.tokenizer.encode_single_token(str(k))]
        row[[SQUARE, ONE]] = row.new_tensor([2 * k**2 * n**2, -k**4])
        row[EQUALS] = 2                      # "=" has 1 there, and would win against 0 otherwise
