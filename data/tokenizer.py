"""Byte-level byte-pair encoding (Sennrich et al. 2016) trained on a task's text, run by tiktoken.

    encoding = train([text, ...], vocab_size=1024)     -> tiktoken.Encoding
    save(encoding, path); encoding = load(path)        JSON, never pickle

Training counts words once, then keeps counts of adjacent pairs up to date: a merge touches only the
places where the pair stands. Digits stand alone in PATTERN, so they never merge, with each other or
with a space.
"""
import base64
import heapq
import json
import re
from collections import Counter, defaultdict

import tiktoken

# One pattern, written so that Python's re (training) and tiktoken's Rust (encoding) read it alike:
# a word with its leading space | punctuation with its leading space | one digit | white space.
PUNCTUATION = r"!-/:-@\[-`{-~«»„“”‘’‚…–—"
PATTERN = rf" ?[^\s\d{PUNCTUATION}]+| ?[{PUNCTUATION}]+|\d|\s+(?!\S)|\s+"
END = "<|endoftext|>"                        # closes every document: a story, an equation
# Bytes of different words, the most frequent first, to learn merges from. 10 MB of English and 10
# of Russian stories have 490,000 together; without spaces between words every sentence is new.
ENOUGH = 2**19


def train(texts, vocab_size, name="task", progress=None):
    """Trains on an iterable of strings until the vocabulary holds vocab_size tokens.

    256 bytes, then the merges, then END as the last id. Merges are learned from the most frequent
    words (see ENOUGH). Text that offers fewer merges gives a smaller vocabulary. Ties go to the
    smaller pair, so that the result is reproducible. `progress` makes a bar from a total (tqdm).
    Raises ValueError when vocab_size is below 257.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and {END} need at least 257")
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text.replace(END, "")))
    # All words in one chain of symbols, STOP between them: a merge joins two links. That costs the
    # same in a long word as in a short one: without spaces a word has thousands of bytes.
    STOP, GONE = -1, -2
    symbol, weight = [STOP], [0]
    for word, n in counts.most_common():
        symbol += word.encode()[:ENOUGH - len(symbol)]
        symbol.append(STOP)
        weight += [n] * (len(symbol) - len(weight))
        if len(symbol) > ENOUGH:
            break
    before, after = list(range(-1, len(symbol) - 1)), list(range(1, len(symbol) + 1))

    pairs, where = Counter(), defaultdict(list)      # pair -> count; where it begins, or once began
    for i, pair in enumerate(zip(symbol, symbol[1:])):
        where[pair].append(i)
    for pair in list(where):
        if STOP in pair:
            del where[pair]
        else:
            pairs[pair] = sum(weight[i] for i in where[pair])
    heap = [(-n, pair) for pair, n in pairs.items()]      # counts may have fallen since: see below
    heapq.heapify(heap)

    spell = [bytes([b]) for b in range(256)]                  # rank -> token
    ids = {token: rank for rank, token in enumerate(spell)}
    bar = progress(total=vocab_size - 257) if progress else None
    while heap and len(ids) < vocab_size - 1:
        n, (a, b) = heapq.heappop(heap)
        if pairs[a, b] != -n:
            if pairs[a, b]:
                heapq.heappush(heap, (-pairs[a, b], (a, b)))
            continue
        spelt = spell[a] + spell[b]
        new = ids.get(spelt)          # two pairs can spell one token: "ab"+"c" and "a"+"bc"
        if new is None:
            new = ids[spelt] = len(ids)
            spell.append(spelt)
            if bar:
                bar.update()
        left, right = defaultdict(list), defaultdict(list)    # neighbour -> where they meet
        for i in sorted(where.pop((a, b))):                   # from left to right: "aaa" is aa, a
            j = after[i]
            if symbol[i] != a or symbol[j] != b:              # it went into a merge since
                continue
            h, k = before[i], after[j]
            symbol[i], symbol[j], after[i], before[k] = new, GONE, k, i
            left[symbol[h]].append(h)
            right[symbol[k]].append(i)
        changes = [((x, a), (x, new), at) for x, at in left.items() if x != STOP]
        changes += [((b, y), (new, y), at) for y, at in right.items() if y != STOP]
        for was, now, at in changes:
            n = sum(weight[i] for i in at)
            pairs[was] -= n
            pairs[now] += n
            where[now] += at
        del pairs[a, b]
        for now in {now for _, now, _ in changes if pairs[now]}:
            heapq.heappush(heap, (-pairs[now], now))
    if bar:
        bar.close()
    return encoding(spell, name)


def encoding(tokens, name, pattern=PATTERN):
    """The tiktoken.Encoding of a list of byte strings in rank order; END gets the next id."""
    return tiktoken.Encoding(name, pat_str=pattern, special_tokens={END: len(tokens)},
                             mergeable_ranks={token: rank for rank, token in enumerate(tokens)})


def save(enc, path):
    tokens = [base64.b64encode(enc.decode_single_token_bytes(i)).decode()
              for i in range(enc.n_vocab - 1)]
    path.write_text(json.dumps({"name": enc.name, "pattern": PATTERN, "tokens": tokens}))


def load(path):
    """Raises ValueError when the file is no tokenizer of this project's."""
    try:
        saved = json.loads(path.read_text())
        if saved["pattern"] != PATTERN:
            raise ValueError("another splitting pattern")
        tokens = [base64.b64decode(token, validate=True) for token in saved["tokens"]]
        return encoding(tokens, saved["name"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer of this project: {error}") from None
