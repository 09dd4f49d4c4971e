"""Real stories: TinyStories with and without forests, or English and a second language.

    tinystories   forget: stories with one of --forget_words, by default tree(s), forest(s) and
                  woodland(s), as in gradient routing (Cloud et al. 2024); retain: all others
    bilingual     retain: English stories (--source); forget: another language's (--source2)

A source is the path or URL of a UTF-8 file of stories, with a line <|endoftext|> between them.
Without --source, the English stories are TinyStories (Eldan and Li 2023), which are downloaded:
the validation file, or with --size=paper the training file, which is a hundred times as large.
"""
import codecs
import math
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.download import download
from data.tokenizer import END
from engine.knobs import BadInput, FilePath, knob
from engine.streams import seed_of, stream

SETTINGS = {name: dict(block_size=256, least_block_size=8, vocab_size=2048)     # a whole story
            for name in ("tinystories", "bilingual")}
SETTINGS["tinystories", "paper"] = dict(vocab_size=4096)
SIZES = ("small", "paper")   # paper: of Cloud et al. 2024, see docs/tasks.md
FOREST = ("tree", "trees", "forest", "forests", "woodland", "woodlands")
TOLD = 200                   # stories that a model tells, to see how many mention a forget word
SHOWN = 10                   # and how many it goes on with, to be read
MOST = 100_000               # stories; --size=paper takes all that its source has


@dataclass
class Knobs:
    """Knobs of real stories."""
    size: str = knob("small", "tinystories: paper is gradient routing's published model and "
                     "TinyStories' training file, for a GPU", choices=SIZES)
    source: FilePath | None = knob(None, "a file of stories, or its URL (auto: download "
                                   "TinyStories)")
    source2: FilePath | None = knob(None, "bilingual: the same for the language to forget")
    stories: int | None = knob(None, f"most stories to take from a source (auto: {MOST:,}; with "
                               "--size=paper all)", 20)
    forget_words: list[str] = knob(list(FOREST), "tinystories: stories with one of these words are "
                                   "to be forgotten")


higher_is_better = False     # the score is a loss: nats per token

FEWEST = 20                  # stories; fewer are too few to learn from
LONGEST = 1 << 20            # characters of a story; a longer text is a file without ENDs

# TinyStories' validation file (22.5 MB, 27,630 stories) is enough for a small model. The training
# file (2.2 GB, 2.7 million stories) is for --size=paper. We hold out stories from either ourselves.
# Both checksums are recorded in several public repositories that downloaded this commit. There, the
# checksum of the validation file is given as the hub's Git LFS id.
HUB = ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
       "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-")
HOME = (f"{HUB}valid.txt"
        "#sha256=6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")
LARGE_HOME = (f"{HUB}train.txt"
              "#sha256=6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443")


# --- the task ------------------------------------------------------------------------------------
def check(name, knobs):
    if knobs["size"] not in SIZES:
        raise BadInput(f"--size={knobs['size']}: choose from {', '.join(SIZES)}")
    if name == "bilingual" and knobs["size"] != "small":
        raise BadInput(f"--size={knobs['size']} means nothing to the task bilingual: tinystories "
                       f"takes it")
    if knobs["stories"] is not None and knobs["stories"] < FEWEST:
        raise BadInput(f"--stories={knobs['stories']} is too few to learn from: give {FEWEST} or "
                       f"more")
    if name == "tinystories" and knobs["source2"] is not None:
        raise BadInput("--source2 means nothing to the task tinystories: bilingual takes it")
    if name == "bilingual" and knobs["forget_words"] != list(FOREST):
        raise BadInput("--forget_words means nothing to the task bilingual: it forgets a language")
    if not all(re.fullmatch(r"\w+(['-]\w+)*", word) for word in knobs["forget_words"]):
        raise BadInput(f"--forget_words={','.join(knobs['forget_words'])}: give words of letters, "
                       f"with commas between them")


def mention(words):
    """A regular expression for any of some words, in small letters or capitals. A word counts if
    it stands by itself: "tree" is in neither "trees" nor "street"."""
    return re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)


def documents(name, folder, source, source2, stories, forget_words, size="small"):
    """(texts, facts): see data/__init__.py. A text is a whole story, and none is in two splits.
    Facts: the numbers of stories and of bytes in each split."""
    if name == "bilingual" and source2 is None:
        raise BadInput("bilingual needs --source2=PATH_OR_URL: stories in the language to forget "
                       f"(UTF-8, with a line {END} between them)")
    source = source or (LARGE_HOME if size == "paper" else HOME)
    if stories is None and size == "small":
        stories = MOST
    english = take(source, folder, "source", stories)
    if name == "bilingual":
        known = set(english)
        domains = {"retain": english, "forget": [story for story in
                   take(source2, folder, "source2", stories) if story not in known]}
        if len(domains["forget"]) < 2:                       # one to train on, one to hold out
            raise BadInput(f"{source2} holds {len(domains['forget'])} stories that are not in the "
                           f"other source: give 2 or more")
    else:
        topic, domains = mention(forget_words), {"retain": [], "forget": []}
        for story in english:
            domains["forget" if topic.search(story) else "retain"].append(story)
        if min(map(len, domains.values())) < FEWEST:
            raise BadInput(f"{len(domains['forget']):,} of the {len(english):,} stories in "
                           f"{source} have one of --forget_words={','.join(forget_words)}, "
                           f"the others have none: {FEWEST} or more must be of either kind")
    texts = {}
    for domain, some in domains.items():
        texts[f"{domain}_train"], texts[f"{domain}_val"] = split(some)
    return texts, {"stories": {s: len(some) for s, some in texts.items()},
                   "bytes": {s: sum(len(t.encode()) for t in some) for s, some in texts.items()}}


def split(stories):
    """(train, val). 5% of the stories are held out. If this is less than 200, then 200 are, but at
    most a fifth."""
    order = stream("held-out stories").permutation(len(stories))
    held_out = max(1, len(stories) // 20, min(200, len(stories) // 5))
    return [stories[i] for i in order[held_out:]], [stories[i] for i in order[:held_out]]


def score(model, task, domains=("retain", "forget"), part="test", finer=False):
    """Losses in nats per token on held-out rows; for tinystories, what a reader would look at, too.

    retain, forget                losses, on 128 rows; on 32 for part val
    forget_words                  loss on the tokens of the words to be forgotten, in forget rows
    mentions                      share of TOLD stories that contain such a word: those that the
                                  model tells from nothing at temperature 1, as long as a row
    retain_bits_per_byte, ..      with finer: bits per byte compare two languages better, because
                                  their tokens differ in length. END is a token without bytes
    stories                       with finer: how the model goes on with held-out stories, as texts;
                                  see begun
    """
    topical = task.name == "tinystories" and "forget" in domains and part == "test"
    figures = {domain: task.loss(model, domain, 32 if part == "val" else 128, part)
               for domain in domains if domain == "retain" or not topical}
    if topical:
        topic = mention(task.made_with["forget_words"])
        figures["forget"], figures["forget_words"] = losses_on(topic, model, task)
        figures["mentions"] = sum(bool(topic.search(story)) for story in told(model, task)) / TOLD
    if finer:
        for domain in domains:
            tokens, size = len(task.tokens(f"{domain}_val")), task.facts["bytes"][f"{domain}_val"]
            figures[f"{domain}_bits_per_byte"] = figures[domain] / math.log(2) * tokens / size
        figures["stories"] = continued(model, task, begun(task))
    return figures


def told(model, task):
    """TOLD stories that the model tells from nothing, always by the same random numbers. They end
    after a row's length at the latest."""
    tokens = model.generate([[task.end]], task.block_size - 1, 1.0, task.end, samples=TOLD).tolist()
    return [task.tokenizer.decode(until(task.end, story)) for story in tokens]


def until(end, tokens):
    return tokens[:tokens.index(end)] if end in tokens else tokens


def begun(task):
    """Beginnings of held-out stories, as lists of tokens. tinystories: of SHOWN forest stories,
    each broken off before its first forest word. bilingual: the first eight tokens of a story in
    each language."""
    found, n = [], SHOWN if task.name == "tinystories" else 1
    for domain in ("forget",) if task.name == "tinystories" else ("retain", "forget"):
        tokens, some = task.tokens(f"{domain}_val"), []
        ends = np.flatnonzero(tokens == task.end)
        ends = ends[len(ends) // 2:]                                # the second half is for tests
        for first, last in zip(ends, ends[1:]):
            story = tokens[first:last].tolist()                     # the END before it comes first
            cut = 9 if task.name == "bilingual" else matches(
                mention(task.made_with["forget_words"]), story, task.tokenizer).index(True)
            if 4 < cut < min(48, task.block_size):
                some.append(story[:cut])
            if len(some) == n:
                break
        found += some
    return found


def continued(model, task, beginnings):
    """These stories, each told to its end by the model at temperature 0.7, up to a row's length.
    A bar stands where the model begins."""
    room = task.block_size - max(map(len, beginnings), default=0)
    new = model.generate(beginnings, room, 0.7, task.end).tolist() if beginnings else []
    return [" | ".join(map(task.tokenizer.decode, (old[1:], until(task.end, tokens))))
            for old, tokens in zip(beginnings, new)]


@torch.no_grad()
def losses_on(topic, model, task, batches=4, bias=0.0, hook=None):
    """(mean loss on all targets, mean loss on those that are a part of what `topic`, a compiled
    regular expression, matches), in nats, in held-out rows of the forget domain.

    bias   (V,), added to the logits; hook: see model.py
    """
    def criterion(logits, targets):
        losses = F.cross_entropy(logits + bias, targets[:, 0], reduction="none")
        return torch.stack((losses.sum(), (losses * targets[:, 1]).sum()))

    total, n = 0.0, torch.zeros(2)
    for i in range(batches):
        idx, targets = task.batch("forget", 32, i, seed_of("held out"), "test")
        matched = torch.tensor([matches(topic, row, task.tokenizer) for row in
                                torch.cat((idx[:, :1], targets), 1).tolist()])[:, 1:]
        weighed = torch.stack((targets, matched.to(task.device)), -1)                 # (B, T, 2)
        total += model(idx, weighed, criterion, hook=hook) * targets.numel()
        n += torch.tensor((targets.numel(), matched.sum()))
    return (total.cpu() / n).tolist()


def matches(topic, tokens, enc):
    """For each token, whether it is a part of a match of `topic` in their text."""
    parts = enc.decode_tokens_bytes(tokens)
    ends, found = list(accumulate(map(len, parts))), [False] * len(parts)
    # a row may begin or end within a letter of several bytes
    text = b"".join(parts).decode("utf-8", "surrogateescape")
    for match in topic.finditer(text):
        begin, end = (len(text[:at].encode("utf-8", "surrogateescape")) for at in match.span())
        first, last = bisect_right(ends, begin), bisect_left(ends, end)
        found[first:last + 1] = [True] * (last + 1 - first)
    return found


# --- sources -------------------------------------------------------------------------------------
def take(source, folder, knob, most):
    """The stories of a path or a URL. Downloads are kept beside the tasks' folders, so that all
    tasks share them."""
    if not source.startswith(("http://", "https://")):
        return read(Path(source).expanduser(), most)
    path = download(source, Path(folder).parent / "downloads", knob)
    try:
        return read(path, most)
    except BadInput as error:
        raise BadInput(f"{error} (it came from {source}; delete it to download it again)") from None


def read(path, most):
    """The first `most` (None: all) different stories of a file, in its order. Raises BadInput if it
    has too few."""
    found, seen = {}, 0                                    # a dict: a set that keeps the order
    try:
        for text in between_ends(path):
            seen += 1
            # on Windows, files may begin with a byte-order mark, U+FEFF, which is not text
            if text := text.replace("\r\n", "\n").strip().removeprefix("\ufeff").lstrip():
                found[text] = None
            if len(found) == most:
                break
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    if found and seen == 1:
        raise BadInput(f"{path} holds no stories: there is no line {END} in it")
    if len(found) < FEWEST:
        raise BadInput(f"{path} is empty" if not found else
                       f"{path} has only {len(found)} different stories: give {FEWEST} or more")
    return list(found)


def between_ends(path):
    """Yields the texts between the ENDs of a file. The file may be far larger than memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, at = "", 0
    with open(path, "rb") as f:
        while True:
            chunk = f.read(1 << 20)
            begun = len(decoder.getstate()[0])             # bytes of a character that a chunk cuts
            try:
                rest += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise BadInput(f"{path} is not UTF-8 text: see its byte {at - begun + error.start}"
                               ) from None
            at += len(chunk)
            *whole, rest = rest.split(END)
            yield from whole
            if not chunk:
                yield rest                                 # the last story may lack its END
                return
            if len(rest) > LONGEST:
                raise BadInput(f"{path} holds a text of more than {LONGEST:,} characters, before "
                               f"byte {at:,}: give stories with a line {END} between them")
