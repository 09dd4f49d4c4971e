"""Byte-level byte-pair encoding (Sennrich et al. 2016) trained on a task's text, run by tiktoken.

    encoding = train([text, ...], vocab_size=1024)     -> tiktoken.Encoding
    save(encoding, path); encoding = load(path)        JSON, never pickle

Training counts words once, then keeps counts of adjacent pairs up to date: a merge touches only the
words that hold the pair. Digits stand alone in PATTERN, so they never merge, with each other or
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


def train(texts, vocab_size, name="task", progress=None):
    """Trains on an iterable of strings until the vocabulary holds vocab_size tokens.

    256 bytes, then the merges, then END as the last id. Text that offers fewer merges gives a
    smaller vocabulary. Ties go to the smaller pair, so that the result is reproducible. `progress`
    makes a bar from a total (tqdm). Raises ValueError when vocab_size is below 257.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and {END} need at least 257")
    counts = Counter()
    for text in texts:
        counts.update(re.findall(PATTERN, text.replace(END, "")))
    words = [list(word.encode()) for word in counts]          # each a list of token ids
    weight = list(counts.values())

    pairs, where = Counter(), defaultdict(set)                # pair -> count, pair -> words with it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += weight[i]
            where[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]         # stale entries are skipped when popped
    heapq.heapify(heap)

    spell = [bytes([b]) for b in range(256)]                  # rank -> token
    ids = {token: rank for rank, token in enumerate(spell)}
    bar = progress(total=vocab_size - 257) if progress else None
    while len(ids) < vocab_size - 1:
        while heap and pairs[heap[0][1]] != -heap[0][0]:
            heapq.heappop(heap)
        if not heap:
            break
        best = heapq.heappop(heap)[1]
        spelt = spell[best[0]] + spell[best[1]]
        new = ids.get(spelt)          # two pairs can spell one token: "ab"+"c" and "a"+"bc"
        if new is None:
            new = ids[spelt] = len(ids)
            spell.append(spelt)
            if bar:
                bar.update()
        changed = set()
        for i in where.pop(best):
            word, n = words[i], weight[i]
            merged, j = [], 0
            while j < len(word):
                if word[j:j + 2] == list(best):
                    merged.append(new)
                    j += 2
                else:
                    merged.append(word[j])
                    j += 1
            for pair in zip(word, word[1:]):
                pairs[pair] -= n
                changed.add(pair)
            for pair in zip(merged, merged[1:]):
                pairs[pair] += n
                where[pair].add(i)
                changed.add(pair)
            words[i] = merged
        for pair in changed:
            if pairs[pair] > 0:
                heapq.heappush(heap, (-pairs[pair], pair))
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
