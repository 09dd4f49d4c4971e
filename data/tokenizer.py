"""Byte-level byte-pair encoding (Sennrich et al. 2016) trained on a task's text, run by tiktoken.

    encoding = train([text, ...], vocab_size=1024)     -> tiktoken.Encoding
    save(encoding, path); encoding = load(path)        JSON, never pickle

train() counts the words, lays them out as one chain of bytes, and then merges the most frequent
pair of neighbours again and again. The counts of the pairs are kept up to date: a merge looks only
at the places where its pair stands. Digits stand alone in PATTERN, so they never merge, neither
with each other nor with a space.
"""
import base64
import heapq
import json
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import tiktoken

# One pattern, written so that Python's re (training) and tiktoken's Rust (encoding) read it alike:
# a word with its leading space | punctuation with its leading space | one digit | white space.
PUNCTUATION = r"!-/:-@\[-`{-~«»„“”‘’‚…–—"
PATTERN = rf" ?[^\s\d{PUNCTUATION}]+| ?[{PUNCTUATION}]+|\d|\s+(?!\S)|\s+"
END = "<|endoftext|>"                        # closes every document: a story, an equation
# Merges are learned from at most this many bytes: those of the most frequent words, each word once
# and with one byte for its STOP. 10 MB of English and 10 MB of Russian stories have 490,000 such
# bytes together. The limit is for text without spaces, where nearly every sentence is a new word.
TRAINING_BYTES = 2**19
STOP, GONE = -1, -2                          # places of a chain that hold no token: see Chain


class Chain(NamedTuple):
    """Different words as one chain of symbols, with a STOP around each of them.

    The words "ab" (3 times in the text) and "c" (once):

        place     0     1  2  3     4  5
        symbol    STOP  a  b  STOP  c  STOP
        weight    0     3  3  3     1  1

    symbol          a token's rank, STOP, or GONE: a merge has joined it to the symbol on its left
    weight          how often the place's word stands in the text
    before, after   the places of the left and of the right neighbour, past any that are GONE

    In a chain, a merge costs the same in a long word as in a short one. That matters in languages
    without spaces, where a word may have thousands of bytes.
    """
    symbol: list
    weight: list
    before: list
    after: list


def lay_out(words):
    """The Chain of a Counter of words, the most frequent first. It ends at TRAINING_BYTES."""
    symbol, weight = [STOP], [0]
    for word, n in words.most_common():
        symbol += word.encode()[:TRAINING_BYTES - len(symbol)]
        symbol.append(STOP)
        weight += [n] * (len(symbol) - len(weight))
        if len(symbol) > TRAINING_BYTES:
            break
    return Chain(symbol, weight, list(range(-1, len(symbol) - 1)), list(range(1, len(symbol) + 1)))


def find_pairs(chain):
    """(counts, places) of all pairs of neighbours in a chain that is not yet merged.

    counts   {pair: how often the text holds it}
    places   {pair: list of the places where it begins}
    """
    places = defaultdict(list)
    for place, pair in enumerate(zip(chain.symbol, chain.symbol[1:])):
        if STOP not in pair:
            places[pair].append(place)
    counts = Counter({pair: sum(chain.weight[i] for i in at) for pair, at in places.items()})
    return counts, places


def pop_most_frequent(heap, counts):
    """The pair with the highest count, of equals the smaller one; None when no pair is left.

    heap   entries (-count, pair). A count may have fallen since its entry was made. Such an entry
           is too high, so it goes back with the count that holds now. No entry is ever too low.
    """
    while heap:
        n, pair = heapq.heappop(heap)
        if counts[pair] == -n:
            return pair
        if counts[pair]:
            heapq.heappush(heap, (-counts[pair], pair))
    return None


def merge(chain, pair, new, places):
    """Writes the symbol `new` over a pair, wherever it stands in the chain.

    places    where the pair may begin, in any order; places that have changed since are skipped
    returns   what changed: a list of (old pair, new pair, the places where the new one begins).
              Merging b c into X turns a b c d into a X d: there (a, b) became (a, X), and (c, d)
              became (X, d).
    """
    symbol, _, before, after = chain
    first, second = pair
    left, right = defaultdict(list), defaultdict(list)   # neighbour -> where its new pair begins
    for i in sorted(places):                             # from left to right: "aaa" becomes aa, a
        j = after[i]
        if symbol[i] != first or symbol[j] != second:    # a merge has taken one of the two since
            continue
        h, k = before[i], after[j]                       # four neighbours: h, the pair i and j, k
        symbol[i], symbol[j], after[i], before[k] = new, GONE, k, i
        left[symbol[h]].append(h)
        right[symbol[k]].append(i)
    changes = [((x, first), (x, new), at) for x, at in left.items() if x != STOP]
    changes += [((second, y), (new, y), at) for y, at in right.items() if y != STOP]
    return changes


def train(texts, vocab_size, name="task", progress=None):
    """Trains on an iterable of strings until the vocabulary holds vocab_size tokens.

    The vocabulary is 256 bytes, then the merges, then END as the last id. Text that offers fewer
    merges gives a smaller vocabulary. Of pairs that are equally frequent the smaller one goes
    first, so that the result is reproducible.

    progress   makes a progress bar from a total (tqdm)
    Raises ValueError when vocab_size is below 257.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and {END} need at least 257")
    words = Counter()
    for text in texts:
        words.update(re.findall(PATTERN, text.replace(END, "")))
    chain = lay_out(words)
    counts, places = find_pairs(chain)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    tokens = [bytes([b]) for b in range(256)]            # in rank order
    rank = {token: i for i, token in enumerate(tokens)}
    bar = progress(total=vocab_size - 257) if progress else None
    while len(tokens) < vocab_size - 1 and (pair := pop_most_frequent(heap, counts)):
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in rank:             # two pairs can spell one token: "ab"+"c" and "a"+"bc"
            rank[token] = len(tokens)
            tokens.append(token)
            if bar:
                bar.update()
        for old, new, at in merge(chain, pair, rank[token], places.pop(pair)):
            n = sum(chain.weight[i] for i in at)
            counts[old] -= n
            counts[new] += n
            places[new] += at
            if counts[new]:
                heapq.heappush(heap, (-counts[new], new))
        counts[pair] = 0                  # last: where a pair overlaps itself ("aaa"), it is in old
    if bar:
        bar.close()
    return encoding(tokens, name)


def encoding(tokens, name, pattern=PATTERN, special=None):
    """The tiktoken.Encoding of tokens, a list of byte strings in the order of their ids; None where
    an id is special. special: {special token: its id}; None: END alone, which is the last id."""
    ranks = {token: i for i, token in enumerate(tokens) if token is not None}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens=special or {END: len(tokens)})


def save(enc, path):
    """Writes the name, the pattern and the tokens (in base 64, in the order of their ids) as JSON.
    END is left out if it is the last id; else all special tokens are written beside the others."""
    special = {token: enc.encode_single_token(token) for token in sorted(enc.special_tokens_set)}
    taken, last = {*special.values()}, enc.n_vocab - 1
    alone = special == {END: last}
    tokens = [None if i in taken else base64.b64encode(enc.decode_single_token_bytes(i)).decode()
              for i in range(last if alone else enc.n_vocab)]
    saved = {"name": enc.name, "pattern": enc._pat_str, "tokens": tokens}
    path.write_text(json.dumps(saved if alone else saved | {"special": special}))


def load(path):
    """The tiktoken.Encoding that save() wrote. Raises ValueError when the file is another one."""
    try:
        saved = json.loads(path.read_text())
        if saved["pattern"] != PATTERN and "special" not in saved:
            raise ValueError("another splitting pattern")
        tokens = [token if token is None else base64.b64decode(token, validate=True)
                  for token in saved["tokens"]]
        return encoding(tokens, saved["name"], saved["pattern"], saved.get("special"))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer of this project: {error}") from None
