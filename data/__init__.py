"""Tasks. data.load(name) gives a Task: a tokenizer, batches, and a judge.

A task is a file in this folder. Its text is on disk, or each batch is generated on request.
Every task's file has
  SETTINGS              settings of its text: {name: dict(block_size=.., least_block_size=..,
                        vocab_size=.., aligned=whether rows begin where a text does)}. A
                        technique's settings for a task are in the technique's file. If the task
                        has a knob `size`, a size may have settings of its own: see at_size
  Knobs                 optional: a dataclass of the knobs that shape its text
  VARIANT               optional: the name of a knob whose values have separate folders of models
  score(model, task, domains, part, finer)   what a model knows: see Task.score
  higher_is_better      whether a larger score means more knowledge (accuracy) or less (loss)
  check(name, knobs)    optional: raises BadInput for knobs with impossible values
  answer_mask(task, idx, targets)   optional: (B, n) bool, which targets are answers, for a probe
A task with text on disk also has
  documents(name, folder, **knobs)   ({split: list of str}, a dict of facts to keep)
  EXTRA                 optional: names of further splits to fine-tune on
  tokenizer(knobs)      optional: its tokenizer; without it, one is trained on its text
A task about a pretrained model also has
  base(task)            (model, record): the model, which train.py then need not make. There is no
                        filtered model
A task that generates its batches also has
  encoding(block_size)  its tokenizer
  batch(task, split, size, step, seed, part)   see Task.batch
Files in data/<task>/ or data/<task>-<size>/: tokenizer.json, a .bin of uint16 tokens for each
split (memory-mapped, so that it may be larger than memory), and meta.json with checksums.

A batch is cut from one of three parts of the data:
  train   what models learn from
  val     held out; used to decide something in training: when to stop, which rate, which step
  test    held out; used for reported figures
The first half of each held-out file is val, and the second half is test.
"""
import copy
import hashlib
import importlib
import json
import sys
from bisect import bisect_left, bisect_right
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import tokenizer
from engine.disk import digest, fingerprint, locked, remove_leftovers, sha256, write
from engine.hardware import to_device
from engine.knobs import BadInput
from engine.streams import allot, seed_of, stream

TASKS = {"arithmetic": "arithmetic", "language": "language", "tinystories": "tinystories",
         "bilingual": "tinystories", "instruct": "instruct", "pcfg": "pcfg",
         "gaming": "gaming", "quiz": "quiz"}                                   # name -> file
SPLITS = ("retain_train", "retain_val", "forget_train", "forget_val")
SOURCES = ("source", "source2", "text", "model")
FOLDER = Path(__file__).parent
RESIDENT = 4 << 30           # bytes: data up to this size is kept on the GPU, if there is one


def module(name):
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return importlib.import_module(f"data.{TASKS[name]}")


def starts_pretrained(name):
    """Whether a task's base is a pretrained model."""
    return hasattr(module(name), "base")


def at_size(settings, name, size=None):
    """What a table of settings, {task or (task, size): {knob: value}}, has for a task: its entry,
    and over this the entry for the size, if there is one."""
    return settings.get(name, {}) | settings.get((name, size), {})


@dataclass
class NoKnobs:
    """Knobs of this task."""


def knobs_of(name):
    """The dataclass of a task's own knobs."""
    return getattr(module(name), "Knobs", NoKnobs)


class Piece(NamedTuple):
    """A part of a split: a domain's texts between two positions, each a share of the whole."""
    domain: str
    begin: float = 0
    end: float = 1


def splits_of(mod):
    """The splits that a task's module has on disk: SPLITS and those of its EXTRA."""
    return SPLITS + tuple(f"{name}_train" for name in getattr(mod, "EXTRA", ()))


class Task:
    """A task whose files, if it has any, are on disk and complete.

    name, settings, higher_is_better       see the module's docstring
    tokenizer                              tiktoken.Encoding; task.end is the id that ends a text
    block_size                             T, tokens in a row of a batch
    data_id                                a fingerprint of the data, stored with every model
    """

    def __init__(self, name, folder, meta, block_size=None, device="cpu"):
        self.name, self.module, self.device = name, module(name), torch.device(device)
        self.folder, self.meta = folder, meta
        self.settings = at_size(self.module.SETTINGS, name, meta["made_with"].get("size"))
        self.splits = splits_of(self.module)
        self.higher_is_better = self.module.higher_is_better
        self.block_size = block_size or self.settings["block_size"]
        self.made_with, self.facts = meta["made_with"], meta["facts"]
        self.data_id = hashlib.sha256(json.dumps(meta["files"] or meta).encode()).hexdigest()[:12]
        self.shard = (0, 1)
        self.generated = folder is None
        self.pretrained = starts_pretrained(name)
        self.tokenizer = (self.module.encoding(self.block_size) if self.generated else
                          tokenizer.load(folder / "tokenizer.json"))
        self.vocab_size, self.end = self.tokenizer.n_vocab, self.tokenizer.eot_token
        if not self.generated:
            self.open(folder)

    def open(self, folder):
        """Opens the files and finds where their rows may begin."""
        self.files = {s: open(folder / f"{s}.bin", "rb") for s in self.splits}
        sizes, T = {s: len(self.tokens(s)) for s in self.splits}, self.block_size
        for split, size in sizes.items():
            check_length(self.name, split, size, T)
        self.starts = {s: np.flatnonzero(self.tokens(s)[:-T] == self.end) if
                       self.settings.get("aligned") else range(sizes[s] - T) for s in self.splits}
        # {(file, part): (first, end)}: the indices into starts that a part's rows may use. No row
        # of val reaches into test
        self.range = {(s, "train"): (0, len(self.starts[s])) for s in self.splits}
        for s in self.splits:
            if s.endswith("_val"):
                middle, at = sizes[s] // 2, self.starts[s]
                self.range[s, "val"] = 0, bisect_left(at, middle - T)
                self.range[s, "test"] = bisect_left(at, middle), len(at)
        for (split, part), (first, last) in self.range.items():
            if first >= last:
                raise BadInput(f"{self.name}: no row of {T} tokens begins with a text in {split}"
                               f"{f', {part}' * (part != 'train')}: give a longer --source or a "
                               f"smaller --block_size")
        self.forget_share = sizes["forget_train"] / (sizes["retain_train"] + sizes["forget_train"])
        self.pieces = {name: [Piece(name)] for name in (
            "retain", "forget", *getattr(self.module, "EXTRA", ()))}        # {split: its pieces}
        self.pieces["all"] = [Piece("retain"), Piece("forget")]
        self.true_pieces, self.by_label = self.pieces, ("train", "val")     # see labelled()
        self.resident = {}
        if self.device.type == "cuda" and 2 * sum(sizes.values()) <= RESIDENT:
            self.move_to_device()

    def with_rows_of(self, block_size):
        """This task, with rows of block_size tokens."""
        if block_size == self.block_size:
            return self
        return Task(self.name, self.folder, self.meta, block_size, self.device)

    def tokens(self, split):
        """A split's tokens, (N,) uint16. They are mapped anew each time, because pages that were
        read stay in memory for as long as their mapping exists."""
        return np.memmap(self.files[split], np.uint16, mode="r")

    def move_to_device(self):
        """Copies the data to the device. Batches are then cut there, without copying any rows."""
        self.resident = {s: torch.from_numpy(self.tokens(s).view(np.int16).copy()).to(self.device)
                         for s in self.splits}
        self.columns = torch.arange(self.block_size + 1, device=self.device)

    def labelled(self, fraction, false_positives=0.0, sure=1.0):
        """A copy of this task whose splits follow the labels of an imperfect labeller.

        fraction          share of the forget texts that are labelled forget (recall)
        false_positives   share of the retain texts that are wrongly labelled forget
        sure              share of the retain texts that are labelled retain (at most the rest)

        Its splits are forget (labelled forget), retain (all others, which filtering keeps), sure
        (labelled retain), unlabelled (no label), and all. Texts are in random order on disk, so
        each label covers a contiguous part of a file. The parts train and val follow the labels,
        and the part test follows the truth.
        """
        view, sure = copy.copy(self), min(sure, 1 - false_positives)
        hits, misses = Piece("forget", 0, fraction), Piece("forget", fraction, 1)
        view.pieces = self.pieces | {
            "forget": [hits, Piece("retain", 0, false_positives)],
            "retain": [misses, Piece("retain", false_positives, 1)],
            "sure": [Piece("retain", 1 - sure, 1)],
            "unlabelled": [misses, Piece("retain", false_positives, 1 - sure)]}
        return view

    def first_texts(self, n):
        """A copy of this task whose forget split is the first n texts of it, or all if there are
        fewer: what an attacker with little data has."""
        if self.generated:
            raise BadInput(f"--attack_few={n}: {self.name} generates its rows and has no texts")
        view, starts = copy.copy(self), self.starts["forget_train"]
        ends = np.flatnonzero(self.tokens("forget_train") == self.end)
        last = bisect_right(starts, ends[min(n, len(ends)) - 1] - self.block_size)
        view.pieces = self.pieces | {"forget": [Piece("forget", 0, max(last, 1) / len(starts))]}
        return view

    def shares(self, split):
        """For each piece of a split, its share of all training tokens."""
        of = {"forget": self.forget_share, "retain": 1 - self.forget_share}
        return [of[piece.domain] * (piece.end - piece.begin) for piece in self.pieces[split]]

    def counts(self, split):
        """How often each token occurs in the training text of a split, (V,) int64."""
        counts = np.zeros(self.vocab_size, np.int64)
        for domain, begin, end in self.pieces[split]:
            tokens = self.tokens(f"{domain}_train")
            some = tokens[round(begin * len(tokens)):round(end * len(tokens))]
            counts += np.bincount(some, minlength=self.vocab_size)
        return torch.from_numpy(counts)

    def batch(self, split, size, step, seed, part="train"):
        """Inputs and next-token targets, int64 (B, T) each; a function of its arguments alone.

        If only the last n tokens of a row are to be learned, the targets are those, (B, n).
        split   retain | forget | all, a split of labelled(), or one of the task's EXTRA; or several
                splits as {split: share of the rows}. A row never mixes domains. The number of rows
                from each is drawn, with the right mean for any share and size (see streams.allot).
                If settings["aligned"], rows begin where a text does, so that a question never
                comes without its facts
        part    train | val | test
        If several processes train together, self.shard is (rank, number of processes). Each gets
        every world-th row of a training batch. The first of these rows changes with every step.
        """
        first, world = self.turn(step) if part == "train" else (0, 1)
        if size % world:
            raise BadInput(f"a batch of {size} rows does not divide over {world} processes: "
                           f"choose another --batch_size")
        if isinstance(split, dict):
            drawn = [self.undivided(name, n, step, seed, part)
                     for name, n in zip(split, self.sizes(split, size, step, seed)) if n]
            idx, targets = (torch.cat(pieces) for pieces in zip(*drawn))
        else:
            idx, targets = self.undivided(split, size, step, seed, part)
        return idx[first::world], targets[first::world]

    def turn(self, step):
        """(first row of a batch that this process gets, number of processes). The first row changes
        with the step, because rows are sorted by split: a process must not always get the same."""
        rank, world = self.shard
        return (rank + step) % world, world

    def sizes(self, shares, size, step, seed):
        """The number of rows from each split in batch(shares, ..), over all processes."""
        return allot(list(shares.values()), size, stream("sizes", *shares, seed, step))

    def origins(self, shares, size, step, seed):
        """(B,) int64: the split of each row of batch(shares, ..), as its index in shares."""
        first, world = self.turn(step)
        which = np.repeat(np.arange(len(shares)), self.sizes(shares, size, step, seed))
        return to_device(torch.from_numpy(which[first::world]), self.device)

    def undivided(self, split, size, step, seed, part):
        """A batch of one split, before it is divided over processes."""
        if self.generated:
            return self.module.batch(self, split, size, step, seed, part)
        pieces = (self.pieces if part in self.by_label else self.true_pieces)[split]
        sizes = [size]
        if len(pieces) > 1:
            sizes = allot(self.shares(split), size, stream("pieces", split, seed, step))
        rows = torch.cat([self.rows(piece, n, part, stream("rows", split, i, part, seed, step))
                          for i, (piece, n) in enumerate(zip(pieces, sizes)) if n])
        return rows[:, :-1], rows[:, 1:]

    def rows(self, piece, size, part, rng):
        """(size, T + 1) int64: rows of tokens, drawn from a piece, in the part train, val or test.
        """
        split = f"{piece.domain}_{'train' if part == 'train' else 'val'}"
        tokens = self.resident[split] if self.resident else self.tokens(split)
        first, last = self.range[split, part]
        first, last = (round(first + share * (last - first)) for share in piece[1:])
        if first == last:
            raise BadInput(f"{self.name}: no row of {split} begins between its shares "
                           f"{piece.begin:g} and {piece.end:g}: give more text or other label "
                           f"fractions")
        start = rng.integers(first, last, size)
        if self.settings.get("aligned"):
            start = self.starts[split][start]
        if not self.resident:
            rows = tokens[start[:, None] + np.arange(self.block_size + 1)].astype(np.int64)
            return to_device(torch.from_numpy(rows), self.device)
        start = to_device(torch.from_numpy(start), self.device)
        rows = tokens[start[:, None] + self.columns]
        return rows.long() & 0xFFFF                       # turns int16 back into uint16's values

    def knows_more(self, score, other):
        """Whether a score shows more knowledge than another."""
        return score > other if self.higher_is_better else score < other

    def within(self, score, reference, share):
        """Whether a score is worse than a reference score by at most this share of it. Worse means
        less knowledge."""
        if self.higher_is_better:
            return score >= (1 - share) * reference
        return score <= (1 + share) * reference

    @torch.no_grad()
    def loss(self, model, domain, rows=128, part="test", **how):
        """Mean loss in nats per token on held-out rows of a domain, the same rows in every call.

        how   further arguments for the model: criterion, hook
        """
        size = min(rows, 32)
        n = rows // size
        # sum at once: a recorded step (CUDA graphs) overwrites the loss that it returned before
        return (sum(model(*self.batch(domain, size, i, seed_of("held out"), part), **how)
                    for i in range(n)) / n).item()

    def score(self, model, domains=("retain", "forget"), part="test", finer=False):
        """{"retain": .., "forget": ..} on fixed held-out data, the same for every model.

        part    test: for reports. There may be further figures, named forget_.. and retain_..
                val: for decisions in training, on fewer and different examples; not reported,
                     but by eval.relearn_few, whose figure was published so
        finer   adds finer figures, which take longer
        """
        return self.module.score(model, self, domains, part, finer)


def check_length(name, split, tokens, block_size):
    least = 2 * block_size + 2 if split.endswith("_val") else block_size + 1     # val and test
    if tokens < least:
        raise BadInput(f"{name}: {split} holds {tokens} tokens, too few for rows of {block_size}: "
                       f"give a longer --source or a smaller --block_size")


def load(name, folder=None, block_size=None, device="cpu", **knobs):
    """The Task called `name`. Makes its data first if it is missing or was made with other knobs.

    folder   the folder that has <name>/ or <name>-<size>/ in it (default: the folder of this file)
    knobs    the task's knobs (see Knobs in its file); None means the knob's default
    Raises BadInput for an unknown task or knob and for damaged files.
    """
    mod = module(name)
    defaults = asdict(knobs_of(name)())
    for knob in knobs:
        if knob not in defaults and knobs[knob] is not None:
            raise BadInput(f"--{knob} means nothing to the task {name}"
                           + (f", which has {', '.join(defaults)}" if defaults else ""))
    asked = {"code": code_of(mod)}
    asked |= {k: default if knobs.get(k) is None else knobs[k] for k, default in defaults.items()}
    if hasattr(mod, "check"):
        mod.check(name, asked)
    size = asked.get("size")
    least = at_size(mod.SETTINGS, name, size)["least_block_size"]
    if block_size and block_size < least:
        raise BadInput(f"--block_size={block_size}: {name} needs rows of at least {least} tokens")
    if not hasattr(mod, "documents"):
        return Task(name, None, {"made_with": asked, "facts": {}, "files": {}}, block_size, device)
    # a size with settings of its own has a folder of its own: large data takes long to make
    folder = Path(folder or FOLDER) / (f"{name}-{size}" if (name, size) in mod.SETTINGS else name)
    for knob in SOURCES:
        if asked.get(knob) == "":
            raise BadInput(f"--{knob} is empty: give a path or a URL")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, wait=True):             # waits while another run makes data there
        meta = read_meta(folder)
        sources = {knob: what_it_is(knob, asked, meta) for knob in SOURCES if knob in defaults}
        for knob in sorted(sources.keys() - {"model"}):            # a model has to be given once
            if knobs.get(knob) is None and asked[knob] is not None:
                print(f"data: --{knob}={asked[knob]}, as before (without {folder} it would be the "
                      f"default)")
        if not meta or differ(meta["made_with"], asked):
            meta = prepare(name, folder, asked, sources, block_size)
        elif (meta["made_with"], meta.get("sources", {})) != (asked, sources):
            meta |= {"made_with": asked, "sources": sources}   # moved or rewritten: the same bytes
            write_meta(folder, meta)
        for file, facts in meta["files"].items():
            if sha256(folder / file) != facts["sha256"]:
                raise BadInput(f"{folder / file} is damaged (its checksum does not fit): "
                               f"delete the folder {folder} to make it again")
        return Task(name, folder, meta, block_size, device)


def code_of(mod):
    """A digest of the task's file and of the tasks' files that it imports from. If one is edited,
    the text is made again. Line endings do not count, because a checkout may change them."""
    files = {mod.__file__} | {sys.modules[f"data.{file}"].__file__ for file in TASKS.values()
                              if f"data.{file}" in sys.modules and any(
                                  getattr(value, "__module__", "") == f"data.{file}"
                                  for value in vars(mod).values())}
    return digest([Path(file).read_text(encoding="utf-8") for file in sorted(files)])


def what_it_is(knob, asked, meta):
    """Completes `asked` for a source that is a local file, with its resolved path and, as
    KNOB_sha256, its content's SHA-256. If the user gave no source, the last one is used. Returns
    the file's fingerprint, or None for a URL or no source."""
    before = meta["made_with"] if meta else {}
    given = asked[knob] is not None
    asked[knob] = asked[knob] if given else before.get(knob)
    if asked[knob] is None or "://" in asked[knob]:
        return None
    path = Path(asked[knob]).expanduser()
    last = meta.get("sources", {}).get(knob) if meta else None
    if given or path.exists():
        last = fingerprint(path, last, knob)
    if last:
        asked[knob] = str(path.resolve())                         # one file has one name
        asked[f"{knob}_sha256"] = last["sha256"]
    return last


def differ(a, b):
    """Whether data made with knobs a is not the data that knobs b ask for. Files with the same
    content count as the same, wherever they are."""
    def meant(knobs):
        return {k: v for k, v in knobs.items() if f"{k}_sha256" not in knobs}

    return meant(a) != meant(b)


def read_meta(folder):
    """meta.json as a dict; None if it is missing. Raises BadInput if it is damaged."""
    path = folder / "meta.json"
    if not path.exists():
        return None
    try:
        meta = json.loads(path.read_text())
        if meta.pop("sha256") == digest(meta):
            return meta
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise BadInput(f"{path} is damaged (its checksum does not fit): delete the folder {folder} to "
                   f"make it again")


def write_meta(folder, meta):
    """Writes meta.json, with a checksum of its content."""
    meta = meta | {"sha256": digest(meta)}
    write(folder / "meta.json", json.dumps(meta, indent=1).encode())


def prepare(name, folder, knobs, sources, block_size=None):
    """Makes a task's files in `folder`: text, tokenizer, tokens. meta.json is written last."""
    mod = module(name)
    settings = at_size(mod.SETTINGS, name, knobs.get("size"))
    print(f"data: making {name} in {folder}")
    texts, facts = mod.documents(name, folder, **{k: knobs[k] for k in asdict(knobs_of(name)())})
    splits = splits_of(mod)
    for split in splits:
        if not texts[split]:
            raise BadInput(f"{name}: no text for {split}, give a longer --source")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    train = texts["retain_train"] + texts["forget_train"]
    enc = mod.tokenizer(knobs) if hasattr(mod, "tokenizer") else tokenizer.train(
        train, settings["vocab_size"], name,
        lambda total: tqdm(total=total, desc="tokenizer", unit="merge"))
    if enc.n_vocab > 1 << 16:
        raise BadInput(f"{name}: a vocabulary of {enc.n_vocab:,} tokens, but files of tokens hold "
                       f"ids below {1 << 16:,}: choose another model")
    T = block_size or settings["block_size"]
    for split in splits:                  # before what is there is replaced; a text has its end
        some = texts[split][:2 * T + 2]
        check_length(name, split, sum(len(tokens) // 2 for tokens in pack(enc, some)), T)
    (folder / "meta.json").unlink(missing_ok=True)            # without it, data counts as missing
    tokenizer.save(enc, folder / "tokenizer.json")
    for split in tqdm(splits, desc="tokens", unit="split"):
        write(folder / f"{split}.bin", pack(enc, texts[split]))
    files = {f: {"bytes": (folder / f).stat().st_size, "sha256": sha256(folder / f)}
             for f in ("tokenizer.json", *(f"{s}.bin" for s in splits))}
    meta = {"task": name, "made_with": knobs, "sources": sources, "facts": facts, "files": files}
    write_meta(folder, meta)
    return read_meta(folder)                                  # the same that the next run will read


def pack(enc, docs):
    """Yields the bytes of a .bin: texts as uint16 tokens, with the end token after each text."""
    for i in range(0, len(docs), 10_000):                     # few at once: lists of ints are large
        for ids in enc.encode_ordinary_batch(docs[i:i + 10_000]):
            yield np.array(ids + [enc.eot_token], np.uint16).tobytes()
