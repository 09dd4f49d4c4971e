"""Byte-pair encoding against a brute force, and Python's splitting of words against tiktoken's."""
import json
import random
import re
import sys
from collections import Counter

import pytest

from data import arithmetic, tokenizer
from data.tokenizer import END, PATTERN

ENGLISH = ("The cat's hat isn't here - she said: \"Where?!\" (nobody knew...)\n\n\tOnce upon a"
           " time,  there   were 3 bears,42 trees & 1,000 stars.  \n  x=y+z; a_b #1 50% a@b.org ")
RUSSIAN = ("Жил-был у бабушки «серенький» козлик… Съешь ещё этих мягких французских булок — да "
           "выпей же чаю! „Ёлка“ №7, 12 шагов,\nвот так.\r\n\r\n  Конец ")
SPACES = ["a b", "a  b", "a   b ", " \n ", "\n\n\na", "a \n b", "\ta\t\tb",
          "a\u00a0b \u2003c\u3000", "a\r\nb", "\u2028a\u2029", "  .  !", " 1  2", "1 \n2", "", " "]
ODD = ["naïve café", "日本語の文", "😀👩‍👩‍👧 ok😀", "٣ arabic ١٢", "x² ½ Ⅷ", "a\u200bb", "e\u0301",
       "don’t ‘quote’ –—", "[]{}()<>^`~\\|/@", "«»„“”‘’‚…–—", "A1b2 C3", "-5 +5 1+1=2"]
TEXTS = [ENGLISH, RUSSIAN, *SPACES, *ODD]


@pytest.fixture(scope="module")
def lessons():
    """Arithmetic texts, as a task would train on."""
    texts, _ = arithmetic.documents("arithmetic", None, 0.5, 0.04, 100)
    return texts["retain_train"][:120] + texts["forget_train"][:120]


@pytest.fixture(scope="module")
def trained(lessons):
    return tokenizer.train(lessons, 420)


def spelt(enc):
    return [enc.decode_single_token_bytes(i) for i in range(enc.n_vocab - 1)]


# --- training ------------------------------------------------------------------------------------
def brute_force(texts, vocab_size):
    """The tokens in rank order: all pairs are counted again for every merge. The most frequent pair
    goes first, of those the smaller one. Two pairs may spell one token: it keeps its first rank."""
    words = Counter(w for text in texts for w in re.findall(PATTERN, text))
    words = [(list(w.encode()), n) for w, n in words.items()]
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < vocab_size - 1:
        pairs = Counter()
        for word, n in words:
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        both = vocabulary[best[0]] + vocabulary[best[1]]
        if both not in vocabulary:
            vocabulary.append(both)
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [vocabulary.index(both)]
                i += 1
    return vocabulary


def test_against_brute_force(lessons, trained):
    assert trained.n_vocab == 420
    assert spelt(trained) == brute_force(lessons, 420)


@pytest.mark.parametrize("seed", range(12))
def test_against_brute_force_on_few_letters(seed):
    """Overlaps ("aaaa"), ties, and merges until nothing is left to merge."""
    rng = random.Random(seed)
    texts = [" ".join("".join(rng.choices("abc"[:2 + seed % 2], k=rng.randint(1, 9)))
                      for _ in range(15)) for _ in range(3)] + ["aaaa aaaaa aaaaaaa"] * (seed % 3)
    for vocab_size in (260, 275, 2000):
        enc = tokenizer.train(texts, vocab_size)
        assert spelt(enc) == brute_force(texts, vocab_size)
        assert enc.n_vocab <= vocab_size


@pytest.mark.parametrize("letters", ["ab", "我们的一是不了"])
def test_against_brute_force_on_long_words(letters):
    """Languages without spaces: few words, of hundreds of letters, each letter several bytes."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(letters, k=rng.randint(100, 400))) for _ in range(4)]
    assert spelt(tokenizer.train(texts, 330)) == brute_force(texts, 330)


def work(text, vocab_size=300):
    """Lines of tokenizer.py that training runs on a text: a measure of time without noise."""
    count = 0

    def line(frame, event, arg):
        nonlocal count
        count += event == "line"
        return line

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: line if frame.f_code.co_filename == tokenizer.__file__ else None)
    try:
        tokenizer.train([text], vocab_size)
    finally:
        sys.settrace(before)
    return count


def test_a_long_word_costs_no_more_than_short_ones():
    """Work grows as the text does, with and without spaces in it."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=8)) for _ in range(1500)]
    short, half, whole = work(" ".join(words)), work("".join(words[:750])), work("".join(words))
    assert whole < 1.5 * short and whole < 2.2 * half


def test_only_so_many_words_teach(monkeypatch):
    """The most frequent: what is rare in a text of too many words merges nothing."""
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", 20)
    learned = spelt(tokenizer.train(["xy " * 9 + "pqpqpqpq " * 2 + "lmlmlmlmlmlmlmlm" * 3], 300))
    assert b"xy" in learned and b"pq" in learned and not [t for t in learned[256:] if b"ml" in t]


def test_end_is_the_last_id_and_never_part_of_text(lessons):
    enc = tokenizer.train(lessons[:20] + [END * 50], 300)
    assert spelt(enc) == spelt(tokenizer.train(lessons[:20], 300))
    assert enc.encode(END, allowed_special="all") == [299] == [enc.n_vocab - 1]
    assert 299 not in enc.encode_ordinary(END) and enc.decode(enc.encode_ordinary(END)) == END


def test_smallest_and_too_small(lessons):
    assert spelt(tokenizer.train(lessons, 257)) == [bytes([b]) for b in range(256)]
    assert tokenizer.train([], 1000).n_vocab == 257
    with pytest.raises(ValueError, match="256"):
        tokenizer.train(lessons, 256)


def test_digits_never_merge(trained):
    """In English, Russian and Arabic numbers alike; nor does a digit take in a space."""
    numbers = tokenizer.train(["12 123 1 2 3 1212 x12 ٣٣ ٣٣ 12.12"] * 50, 400)
    for enc in (trained, numbers):
        assert not [t for t in spelt(enc) if len(t) > 1 and re.search(rb"\d", t)]
        assert [enc.decode([i]) for i in enc.encode_ordinary(" 120=")][:4] == [" ", "1", "2", "0"]
    assert not [t for t in spelt(numbers) if len(t) > 2 and "٣".encode() in t]


# --- encoding ------------------------------------------------------------------------------------
def test_round_trip_of_any_bytes(trained):
    rng = random.Random(0)
    for n in (0, 1, 2, 50, 2000):
        raw = rng.randbytes(n)                                       # hardly ever valid UTF-8
        ids = trained._encode_bytes(raw)
        assert trained.decode_bytes(ids) == raw
        text = raw.decode("latin-1")
        assert trained.decode(trained.encode_ordinary(text)) == text
    for text in TEXTS:
        assert trained.decode(trained.encode_ordinary(text)) == text
    assert [trained.decode_single_token_bytes(b) for b in range(256)] == [
        bytes([b]) for b in range(256)]


def merge_by_hand(word, rank):
    """Joins, again and again, the first of the adjacent pairs that spell the earliest token."""
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        pairs = enumerate(zip(parts, parts[1:]))
        best, i = min((rank.get(a + b, 1 << 30), i) for i, (a, b) in pairs)
        if best == 1 << 30:
            break
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return [rank[part] for part in parts]


def test_tiktoken_merges_as_trained(lessons, trained):
    rank = {token: i for i, token in enumerate(spelt(trained))}
    words = {w for text in lessons for w in re.findall(PATTERN, text)}
    assert len(words) > 100
    for word in words:
        assert trained.encode_ordinary(word) == merge_by_hand(word.encode(), rank), word


@pytest.mark.parametrize("text", TEXTS)
def test_tiktoken_splits_as_python(text, trained):
    """In a vocabulary of all pieces, and of all pieces joined, tokens show where tiktoken cuts."""
    pieces = re.findall(PATTERN, text)
    assert "".join(pieces) == text
    known = {p.encode() for p in pieces} | {(p + q).encode() for p, q in zip(pieces, pieces[1:])}
    enc = tokenizer.encoding([bytes([b]) for b in range(256)]
                             + sorted(t for t in known if len(t) > 1), "pieces")
    assert enc.decode_tokens_bytes(enc.encode_ordinary(text)) == [p.encode() for p in pieces]
    assert trained.encode_ordinary(text) == [i for p in pieces for i in trained.encode_ordinary(p)]


def test_what_the_pieces_are():
    """A word with its space, punctuation with its space, one digit, white space."""
    assert re.findall(PATTERN, 'Go to 12 "big" trees,now!?\n\n Да.') == [
        "Go", " to", " ", "1", "2", ' "', "big", '"', " trees", ",", "now", "!?", "\n\n", " Да",
        "."]


# --- files ---------------------------------------------------------------------------------------
def test_save_and_load(tmp_path, trained):
    tokenizer.save(trained, tmp_path / "t.json")
    again = tokenizer.load(tmp_path / "t.json")
    assert spelt(again) == spelt(trained) and again.n_vocab == trained.n_vocab
    for text in TEXTS:
        assert again.encode_ordinary(text) == trained.encode_ordinary(text)
    assert again.encode(END, allowed_special="all") == [again.n_vocab - 1]


def test_damaged_file(tmp_path, trained):
    path = tmp_path / "t.json"
    tokenizer.save(trained, path)
    text = path.read_text()
    saved = json.loads(text)
    for bad in ("", "{", text[:-1], text[:len(text) // 2], "[]", "null", "3", "{}",
                json.dumps(saved | {"pattern": r"\w+"}), json.dumps(saved | {"tokens": None}),
                json.dumps(saved | {"tokens": [7]}),
                json.dumps(saved | {"tokens": ["not base 64!"]}),
                json.dumps({k: v for k, v in saved.items() if k != "tokens"})):
        path.write_text(bad)
        with pytest.raises(ValueError, match="t.json"):
            tokenizer.load(path)
    path.write_bytes(b"\xff\xfe" + text.encode())
    with pytest.raises(ValueError, match="t.json"):
        tokenizer.load(path)
