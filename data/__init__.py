"""Tasks. data.load(name) gives a Task: a tokenizer, batches, and a judge.

A task is a file in this folder. Its text lies on disk, or is made as it is asked for. It has
  SETTINGS              what suits it: model size, steps, rates (for knobs set to auto)
  KNOBS                 the load() arguments that shape its text, with their defaults
  score(model, task, domains, quick) what a model knows: {"retain": .., "forget": .., finer figures}
  higher_is_better      whether a larger score is more knowledge (accuracy) or less (loss)
  check(knobs)          if it has any that need it: BadInput for values that cannot be
and, on disk,
  documents(name, folder, **knobs)   its text, a list of str a split, and facts to remember (a dict)
  EXTRA                 names of splits to fine-tune on besides retain and forget, if it has any
or, made as it is asked for,
  encoding(block_size)  its tokenizer
  batch(task, split, size, step, seed, part)   see Task.batch
On disk, data/<task>/: tokenizer.json, one .bin of uint16 tokens a split, meta.json with checksums.
The .bin files are memory-mapped: they may be larger than memory.
"""
import copy
import hashlib
import importlib
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import tokenizer
from data.disk import alone, digest, remove_leftovers, sha256, write
from data.knobs import BadInput

TASKS = {"arithmetic": "arithmetic", "language": "language", "tinystories": "tinystories",
         "bilingual": "tinystories", "instruct": "instruct", "pcfg": "pcfg",
         "gaming": "gaming"}                                                   # name -> file
SPLITS = ("retain_train", "retain_val", "forget_train", "forget_val")
FOLDER = Path(__file__).parent
RESIDENT = 4 << 30           # bytes: on a GPU, data up to this size is kept there


def module(name):
    if name not in TASKS:
        raise BadInput(f"unknown task {name!r}: choose from {', '.join(TASKS)}")
    return importlib.import_module(f"data.{TASKS[name]}")


def splits_of(mod):
    """The splits that a task's module has on disk: SPLITS, and what it has to train on besides."""
    return SPLITS + tuple(f"{name}_train" for name in getattr(mod, "EXTRA", ()))


class Task:
    """A task whose files, if it has any, are on disk and whole.

    name, settings, higher_is_better       see the module's docstring
    tokenizer                              tiktoken.Encoding; task.end is the id that closes a text
    block_size                             T, tokens in a row of a batch
    data_id                                a fingerprint: models remember which data they saw
    """

    def __init__(self, name, folder, meta, block_size=None, device="cpu"):
        self.name, self.module, self.device = name, module(name), torch.device(device)
        self.settings, self.splits = self.module.SETTINGS[name], splits_of(self.module)
        self.higher_is_better = self.module.higher_is_better
        self.block_size = block_size or self.settings["block_size"]
        self.made_with, self.facts = meta["made_with"], meta["facts"]
        self.data_id = hashlib.sha256(json.dumps(meta["files"] or meta).encode()).hexdigest()[:12]
        self.shard = (0, 1)
        self.generated = folder is None
        self.tokenizer = (self.module.encoding(self.block_size) if self.generated else
                          tokenizer.load(folder / "tokenizer.json"))
        self.vocab_size, self.end = self.tokenizer.n_vocab, self.tokenizer.n_vocab - 1
        if not self.generated:
            self.open(folder)

    def open(self, folder):
        """Maps the files, and finds where their texts begin."""
        self.files = {s: open(folder / f"{s}.bin", "rb") for s in self.splits}
        sizes = {s: len(self.tokens(s)) for s in self.splits}
        for split, size in sizes.items():
            enough(self.name, split, size, self.block_size)
        self.starts = {s: np.flatnonzero(self.tokens(s)[:-self.block_size] == self.end)
                       for s in self.splits} if self.settings.get("aligned") else {}
        for split, starts in self.starts.items():
            enough(self.name, split, self.block_size + len(starts), self.block_size)
        self.forget_share = sizes["forget_train"] / (sizes["retain_train"] + sizes["forget_train"])
        self.pools = {"retain": [("retain", 0, 1)], "forget": [("forget", 0, 1)],
                      "all": [("retain", 0, 1), ("forget", 0, 1)]} | {      # see labelled()
                          name: [(name, 0, 1)] for name in getattr(self.module, "EXTRA", ())}
        self.resident = {}
        if self.device.type == "cuda" and 2 * sum(sizes.values()) <= RESIDENT:
            self.keep_on_device()

    def tokens(self, split):
        """A split's tokens, (N,) uint16. Mapped anew each time: pages once read would stay in
        memory for as long as the mapping does."""
        return np.memmap(self.files[split], np.uint16, mode="r")

    def keep_on_device(self):
        """From now on batches are cut out on the device, which waits for no copy of rows."""
        self.resident = {s: torch.from_numpy(self.tokens(s).view(np.int16).copy()).to(self.device)
                         for s in self.splits}
        self.columns = torch.arange(self.block_size + 1, device=self.device)

    def labelled(self, fraction, false_positives=0.0, sure=1.0):
        """This task as an imperfect labeller sees it: a copy whose training batches go by labels.

        fraction          share of the forget texts that are labelled forget (recall)
        false_positives   share of the retain texts that are labelled forget, too
        sure              share of the retain texts that are labelled retain, of those left
        Its splits are then forget (so labelled), retain (all others: what filtering keeps), sure
        (labelled retain), unlabelled (neither), and all. Texts are in random order on disk, so that
        a label is a stretch of a file. Held-out batches and scores go by the truth, as ever.
        """
        view, wrong, sure = copy.copy(self), false_positives, min(sure, 1 - false_positives)
        view.pools = self.pools | {
            "forget": [("forget", 0, fraction), ("retain", 0, wrong)],
            "retain": [("forget", fraction, 1), ("retain", wrong, 1)],
            "sure": [("retain", 1 - sure, 1)],
            "unlabelled": [("forget", fraction, 1), ("retain", wrong, 1 - sure)]}
        return view

    def shares(self, split):
        """How much of all training tokens each piece of a split holds."""
        return [(self.forget_share if domain == "forget" else 1 - self.forget_share) * (end - begin)
                for domain, begin, end in self.pools[split]]

    def counts(self, split):
        """How often each token occurs in the training text of a split, (V,) int64."""
        counts = np.zeros(self.vocab_size, np.int64)
        for domain, begin, end in self.pools[split]:
            tokens = self.tokens(f"{domain}_train")
            piece = tokens[round(begin * len(tokens)):round(end * len(tokens))]
            counts += np.bincount(piece, minlength=self.vocab_size)
        return torch.from_numpy(counts)

    def batch(self, split, size, step, seed, part="train"):
        """Inputs and next-token targets, int64 (B, T) each; a function of its arguments alone.

        Where only the last n tokens of a row are to be learned, targets are (B, n): theirs.
        split   retain | forget | all, one of labelled()'s or of the task's EXTRA. A row never mixes
                domains; in `all` the first rows are retain, the rest forget, in the proportion of
                the data. Rows of short texts (settings["aligned"]) begin where a text does: no
                question without its facts.
        part    train | val
        Where several processes train together, self.shard = (rank, how many) of them, each gets
        every so manieth row of a training batch.
        """
        rank, world = self.shard if part == "train" else (0, 1)
        if size % world:
            raise BadInput(f"a batch of {size} rows does not divide over {world} processes: "
                           f"choose another --batch_size")
        if self.generated:
            idx, targets = self.module.batch(self, split, size, step, seed, part)
            return idx[rank::world], targets[rank::world]
        pieces, sizes = [(split, 0, 1)], [size]
        if split == "all":
            forget = round(size * self.forget_share)
            pieces, sizes = self.pools[split], [size - forget, forget]
        elif part == "train":
            pieces, shares = self.pools[split], np.array(self.shares(split))
            sizes = np.random.default_rng((seed, step)).multinomial(size, shares / shares.sum())
        rows = torch.cat([self.rows(f"{domain}_{part}", n, step, seed, *stretch)
                          for (domain, *stretch), n in zip(pieces, sizes) if n])[rank::world]
        return rows[:, :-1], rows[:, 1:]

    def rows(self, split, size, step, seed, begin=0, end=1):
        """(size, T + 1) tokens of a split, int64, from the stretch of it between two shares."""
        T, tokens = self.block_size, self.resident[split] if self.resident else self.tokens(split)
        rng = np.random.default_rng((seed, step, self.splits.index(split)))
        starts = self.starts.get(split, range(len(tokens) - T))
        first, last = round(begin * len(starts)), round(end * len(starts))
        if first == last:
            raise BadInput(f"{self.name}: no row of {split} begins in its share {begin:g} to "
                           f"{end:g}: give more text or other label fractions")
        start = rng.integers(first, last, size)
        if self.starts:
            start = self.starts[split][start]
        if not self.resident:
            rows = tokens[start[:, None] + np.arange(T + 1)].astype(np.int64)
            return torch.from_numpy(rows).to(self.device)
        start = torch.from_numpy(start)
        if self.device.type == "cuda":
            start = start.pin_memory().to(self.device, non_blocking=True)
        rows = tokens[start[:, None] + self.columns]
        return rows.long() & 0xFFFF                       # back from int16 to uint16's values

    @torch.no_grad()
    def loss(self, model, domain, rows=64, **how):
        """Mean loss in nats per token over the same held-out rows of a domain every time.

        how   what else the model is called with: a criterion, a hook
        """
        size = min(rows, 32)
        n = rows // size
        # summed as they come: a recorded step (CUDA graphs) overwrites what it gave before
        return (sum(model(*self.batch(domain, size, i, 0, "val"), **how)
                    for i in range(n)) / n).item()

    def score(self, model, domains=("retain", "forget"), quick=False):
        """{"retain": .., "forget": .., finer figures} on fixed held-out data.

        quick   fewer examples and the two headline figures only: for use while training
        """
        return self.module.score(model, self, domains, quick)


def enough(name, split, tokens, block_size):
    if tokens <= block_size:
        raise BadInput(f"{name}: {split} holds {tokens} tokens, too few for rows of {block_size}: "
                       f"give a longer --source or a smaller --block_size")


def load(name, folder=None, block_size=None, device="cpu", **knobs):
    """The Task called `name`, its data made first if it is missing or was made with other knobs.

    folder   where data/<name>/ lies (default: beside this file)
    knobs    the task's own (see KNOBS in its file); None means its default
    Raises BadInput for an unknown task or knob, and for files that are damaged.
    """
    mod = module(name)
    for knob in knobs:
        if knob not in mod.KNOBS and knobs[knob] is not None:
            raise BadInput(f"--{knob} means nothing to the task {name}"
                           + (f", which knows {', '.join(mod.KNOBS)}" if mod.KNOBS else ""))
    asked = {"code": sha256(mod.__file__)}                        # edit the task: new text
    asked |= {k: default if knobs.get(k) is None else knobs[k] for k, default in mod.KNOBS.items()}
    if hasattr(mod, "check"):
        mod.check(asked)
    least = mod.SETTINGS[name]["least_block_size"]
    if block_size and block_size < least:
        raise BadInput(f"--block_size={block_size}: {name} needs rows of at least {least} tokens")
    if not hasattr(mod, "documents"):
        return Task(name, None, {"made_with": asked, "facts": {}, "files": {}}, block_size, device)
    folder = Path(folder or FOLDER) / name
    for knob in ("source", "source2"):
        if asked.get(knob) == "":
            raise BadInput(f"--{knob} is empty: give a path or a URL")
        if asked.get(knob) and "://" not in asked[knob]:
            asked[knob] = str(Path(asked[knob]).resolve())        # one file, one name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent, wait=True):             # while another run makes data there, we wait
        meta = read_meta(folder)
        for knob in ("source", "source2"):
            if knob in asked and asked[knob] is None and meta:
                asked[knob] = meta["made_with"].get(knob)         # no source given: the one before
        if not meta or meta["made_with"] != asked:
            meta = prepare(name, folder, asked, block_size)
        for file, facts in meta["files"].items():
            if sha256(folder / file) != facts["sha256"]:
                raise BadInput(f"{folder / file} is damaged (its checksum does not fit): "
                               f"delete the folder {folder} to make it again")
        return Task(name, folder, meta, block_size, device)


def read_meta(folder):
    """meta.json as a dict, None when it is missing; BadInput when it is damaged."""
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
    """meta.json, with the checksum of what it says."""
    meta = meta | {"sha256": digest(meta)}
    write(folder / "meta.json", json.dumps(meta, indent=1).encode())


def prepare(name, folder, knobs, block_size=None):
    """Makes a task's files in `folder`: text, tokenizer, tokens. meta.json comes last."""
    mod = module(name)
    print(f"data: making {name} in {folder}")
    texts, facts = mod.documents(name, folder, **{k: knobs[k] for k in mod.KNOBS})
    splits = splits_of(mod)
    for split in splits:
        if not texts[split]:
            raise BadInput(f"{name}: no text for {split}, give a longer --source")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    train = texts["retain_train"] + texts["forget_train"]
    enc = tokenizer.train(train, mod.SETTINGS[name]["vocab_size"], name,
                          lambda total: tqdm(total=total, desc="tokenizer", unit="merge"))
    (folder / "meta.json").unlink(missing_ok=True)            # from here until the end: no data
    tokenizer.save(enc, folder / "tokenizer.json")
    for split in tqdm(splits, desc="tokens", unit="split"):
        write(folder / f"{split}.bin", pack(enc, texts[split]))
        enough(name, split, (folder / f"{split}.bin").stat().st_size // 2,
               block_size or mod.SETTINGS[name]["block_size"])
    files = {f: {"bytes": (folder / f).stat().st_size, "sha256": sha256(folder / f)}
             for f in ("tokenizer.json", *(f"{s}.bin" for s in splits))}
    meta = {"task": name, "made_with": knobs, "facts": facts, "files": files}
    write_meta(folder, meta)
    return read_meta(folder)                                  # as the next run will see it


def pack(enc, docs):
    """Yields the bytes of a .bin: texts as uint16 tokens, the end token after each."""
    for i in range(0, len(docs), 10_000):                     # lists of ints are large
        for ids in enc.encode_ordinary_batch(docs[i:i + 10_000]):
            yield np.array(ids + [enc.n_vocab - 1], np.uint16).tobytes()
