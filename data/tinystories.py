"""Real stories: TinyStories with and without forests, or English beside a second language.

    tinystories   forget: stories with the words tree(s), forest(s) or woodland(s), as in gradient
                  routing (Cloud et al. 2024); retain: the others
    bilingual     retain: English stories (--source); forget: another language's (--source2)

A source is a path or URL of a UTF-8 file of stories, a line <|endoftext|> between them. Without
--source the English stories are TinyStories (Eldan and Li 2023) from their public home.
"""
import codecs
import hashlib
import math
import os
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import BadInput, sha256
from data.tokenizer import END

SETTINGS = {name: dict(
    block_size=128,          # T: most of a story, which is 160 to 200 tokens long
    n_layer=4, n_head=4, n_embd=192, vocab_size=4096,
    batch_size=32, steps=1000) for name in ("tinystories", "bilingual")}
KNOBS = {"source": None,     # a path or URL; None: HOME
         "source2": None,    # bilingual only: the stories to forget
         "stories": 100_000}     # the most to take from a source
higher_is_better = False     # the score is a loss: nats per token

FOREST = re.compile(r"\b(trees?|forests?|woodlands?)\b", re.IGNORECASE)
FEWEST = 20                  # stories: with fewer there is nothing to learn

# TinyStories' validation file (22.5 MB, 27,630 stories) is plenty for a small model: we hold out
# stories of our own. Its training file (2.2 GB, 2.7 million stories) has the same address but for
#   TinyStoriesV2-GPT4-train.txt
#   #sha256=6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443
# Both checksums are on record in several public repositories that downloaded this commit; the
# validation file's is there given as the hub's own Git LFS id.
HOME = ("https://huggingface.co/datasets/roneneldan/TinyStories/resolve/"
        "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStoriesV2-GPT4-valid.txt"
        "#sha256=6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d")


# --- the task ------------------------------------------------------------------------------------
def documents(name, folder, source, source2, stories):
    """Whole stories, split by story; none is in two splits. Facts: how many stories and bytes."""
    if stories < FEWEST:
        raise BadInput(f"--stories={stories} is too few to learn from: give {FEWEST} or more")
    if name == "bilingual" and source2 is None:
        raise BadInput("bilingual needs --source2=PATH_OR_URL, stories in the language to forget "
                       f"(UTF-8, a line {END} between them)")
    if name == "tinystories" and source2 is not None:
        raise BadInput("--source2 means nothing to the task tinystories: bilingual takes it")
    english = take(source or HOME, folder, "source", stories)
    if name == "bilingual":
        known = set(english)
        domains = {"retain": english, "forget": [story for story in
                   take(source2, folder, "source2", stories) if story not in known]}
    else:
        domains = {"retain": [story for story in english if not FOREST.search(story)],
                   "forget": [story for story in english if FOREST.search(story)]}
    texts = {}
    for domain, told in domains.items():
        if len(told) < 2:                                  # one to train on, one to hold out
            raise BadInput(f"{source2 or source or HOME} holds {len(told)} stories to {domain}: "
                           "give 2 or more " + ("with and 2 without tree, forest or woodland"
                           if source2 is None else "that are not in the other source"))
        texts[f"{domain}_train"], texts[f"{domain}_val"] = split(told)
    return texts, {"stories": {s: len(told) for s, told in texts.items()},
                   "bytes": {s: sum(len(t.encode()) for t in told) for s, told in texts.items()}}


def split(stories):
    """(train, val): 5% held out, or 200 stories where that is no more than a fifth of them."""
    order = np.random.default_rng(0).permutation(len(stories))
    held_out = max(1, len(stories) // 20, min(200, len(stories) // 5))
    return [stories[i] for i in order[held_out:]], [stories[i] for i in order[:held_out]]


def score(model, task, domains=("retain", "forget"), quick=False):
    """Loss in nats per token on held-out rows; unless quick, also in bits per byte of text.

    {"retain": loss, "forget": loss, "retain_bits_per_byte": .., "forget_bits_per_byte": ..}
    Tokens of two languages differ in length, bytes less so; END counts as a token and has no bytes.
    """
    training = model.training
    model.eval()
    figures = {domain: loss(model, task, domain, 32 if quick else 256) for domain in domains}
    if not quick:
        for domain in domains:
            tokens, size = len(task.tokens[f"{domain}_val"]), task.facts["bytes"][f"{domain}_val"]
            figures[f"{domain}_bits_per_byte"] = figures[domain] / math.log(2) * tokens / size
    model.train(training)
    return figures


@torch.no_grad()
def loss(model, task, domain, rows):
    """Mean loss in nats per token over `rows` held-out rows, the same ones at every call."""
    batches = (task.batch(domain, 32, step, seed=0, part="val") for step in range(rows // 32))
    return torch.stack([model(x, y) for x, y in batches]).mean().item()


# --- sources -------------------------------------------------------------------------------------
def take(source, folder, knob, most):
    """The stories of a path or a URL; downloads lie beside the tasks' folders, for all to share."""
    if not source.startswith(("http://", "https://")):
        return read(Path(source).expanduser(), most)
    path = download(source, Path(folder).parent / "downloads", knob)
    try:
        return read(path, most)
    except BadInput as error:
        raise BadInput(f"{error} (it came from {source}; delete it to download it again)") from None


def read(path, most):
    """The first `most` different stories of a file, in its order; BadInput when it has too few."""
    found, seen = {}, 0                                    # a dict: a set that keeps the order
    try:
        for text in between_ends(path):
            seen += 1
            if text := text.replace("\r\n", "\n").strip():
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
    """Yields the texts between the ENDs of a file, which may be far larger than memory."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, at = "", 0
    with open(path, "rb") as f:
        while True:
            chunk = f.read(1 << 20)
            begun = len(decoder.getstate()[0])             # bytes of a character cut by the chunk
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
            if len(rest) > 1 << 20:
                raise BadInput(f"{path} holds no stories: there is no line {END} in the million "
                               f"characters before byte {at}")


# --- downloads -----------------------------------------------------------------------------------
def download(url, folder, knob="source", timeout=30, tries=5):
    """The path in `folder` of the file at `url`, downloaded unless it is there already.

    url      may end in #sha256=HEX, the checksum that the file must have. Without it the one that
             the hub names counts; other servers name none, and only the size can be checked
    knob     the command-line knob that takes a local copy instead: for the messages
    timeout  seconds without a byte, after which a connection counts as stalled
    Until it is whole and checked, a file is called .part, and the next call goes on where it ends.
    From then on it is held against the checksum beside it, .sha256. Raises BadInput, one line.
    """
    url, _, expected = url.partition("#sha256=")
    if expected and not re.fullmatch("[0-9a-f]{64}", expected):
        raise BadInput(f"#sha256={expected} is no checksum: give 64 digits of 0-9 and a-f")
    name = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2])
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"   # two hosts may share a name
    path, part, record = (Path(folder) / (name + end) for end in ("", ".part", ".sha256"))
    ways_out = f"run again to go on, or, with no network, give --{knob}=PATH to a local copy"
    try:
        if path.exists():
            expected = expected or (record.read_text() if record.exists() else "")
            if expected not in ("", sha256(path)):
                raise BadInput(f"{path} does not have the SHA-256 it should: delete it to download "
                               f"{url} again, or give --{knob}=PATH to a local copy")
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        expected = fetch(url, part, expected, ways_out, timeout, tries)
        arrived = sha256(part)
        if expected not in ("", arrived):
            part.unlink()
            raise BadInput(f"{url} gave a wrong or damaged file, thrown away: its SHA-256 is "
                           f"{arrived}, not {expected}; {ways_out}")
        record.write_text(arrived)
        os.replace(part, path)
        return path
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def fetch(url, part, expected, ways_out, timeout, tries):
    """Fills the file `part` with all that `url` holds; returns the SHA-256 it should have or ""."""
    redirects = Redirects()
    opener = urllib.request.build_opener(redirects)
    for attempt in range(tries):
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "nanoUnlearn"} | ({"Range": f"bytes={have}-"} if have else {})
        try:
            answer = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        except (OSError, HTTPException, ValueError) as error:
            if getattr(error, "code", None) != 416:        # 416: no bytes there. Are ours all?
                raise BadInput(f"cannot download {url}: {error}; {ways_out}") from None
            answer = error
        with answer:
            expected = expected or redirects.sha256
            start, total = extent(answer)
            # Start over unless these are the bytes after ours, and unless a checksum will tell
            # whether what an earlier run left us belongs to the same file.
            if start not in (0, have) or (start and not expected and not attempt):
                part.unlink(missing_ok=True)
                cut = "the server sends other bytes than it is asked for"
                continue
            cut = None if answer.status == 416 else receive(answer, part, start, total)
        if part.stat().st_size == total or (total is None and not cut):
            return expected
    raise BadInput(f"cannot download {url}: {cut or 'the connection closed early'}, {tries} times; "
                   f"{ways_out}")


def extent(answer):
    """(first, total): where in the file an answer's body begins, how long the file is.

    None, None when it is a part, but does not say which; total is None when the length is unknown.
    """
    if answer.status in (206, 416):
        said = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", answer.headers["Content-Range"] or "")
        return (int(said[1] or said[2]), int(said[2])) if said else (None, None)
    length = answer.headers["Content-Length"]
    return 0, int(length) if length else None


def receive(answer, part, start, total):
    """Writes an answer's body to `part` from byte `start` on; returns what error cut it short."""
    with (open(part, "ab" if start else "wb") as f, tqdm(
            total=total, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar):
        while True:
            try:
                chunk = answer.read1(1 << 16)
            except (OSError, HTTPException) as error:
                return error
            if not chunk:
                return None
            f.write(chunk)
            bar.update(len(chunk))


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and notes a large file's SHA-256, which the Hugging Face hub names in its
    first answer only, in the header X-Linked-ETag, before it points to the storage of the file."""
    sha256 = ""

    def redirect_request(self, request, body, code, message, headers, url):
        if said := re.fullmatch(r'"([0-9a-f]{64})"', headers.get("X-Linked-ETag", "")):
            self.sha256 = said[1]
        return super().redirect_request(request, body, code, message, headers, url)
