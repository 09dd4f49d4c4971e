"""Stories: their domain, their split, whole or not; sources that are no use; downloads that fail.

The only network is a server on 127.0.0.1, in a thread, which misbehaves as each test asks.
"""
import functools
import hashlib
import math
import os
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import data
import eval as judges
import route
import train
import undo
import unlearn
from data import BadInput, tinystories
from data.download import download
from data.tinystories import FOREST
from data.tokenizer import END
from engine.knobs import command_line
from engine.streams import seed_of
from model import GPT, GPTConfig

torch.set_num_threads(1)
BOTH = "retain", "forget"


def tell(n, seed=0, words="cat dog sun ran sat big red hat the a tree forest".split()):
    rng = random.Random(seed)
    return [f"Story {i}: " + " ".join(rng.choices(words[:10] if i % 3 else words, k=40)) + "."
            for i in range(n)]


# every third may speak of red things and of hats
HATS = tell(300, words="cat dog sun ran sat big the a or on red hat".split())


def save(path, stories):
    path.write_text("".join(f"{s}\n{END}\n" for s in stories), encoding="utf-8")
    return str(path)


# --- the task ------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", [
    "The street was long.", "Three trees.", "He sat by the TREE!", "The Forest's edge", "a-tree-b",
    "forestry and reforest", "woodlands", "Woodland,", "treetop", "\"Tree\"", "wood land", "entree",
    "trees", "forests;", "treehouse", "(forest)", "a tree\nfell", "", "woods", "the forested hill"])
def test_forest_words(text):
    """Against a brute force: what is no letter becomes a space, then whole words are compared."""
    words = "".join(c.lower() if c.isalpha() else " " for c in text).split()
    expected = any(w in words for w in "tree trees forest forests woodland woodlands".split())
    assert bool(tinystories.mention(FOREST).search(text)) == expected


def test_documents_split_by_story(tmp_path):
    stories = tell(300)
    source = save(tmp_path / "s.txt", stories + stories[:50])                     # 50 told twice
    given = "tinystories", tmp_path, source, None, 1000, FOREST
    texts, facts = documents = tinystories.documents(*given)
    assert documents == tinystories.documents(*given)
    assert sorted(s for split in texts.values() for s in split) == sorted(stories)
    for split, told in texts.items():
        assert told and all(("forget" in split) == bool(re.search("tree|forest", s)) for s in told)
    assert facts["stories"] == {split: len(told) for split, told in texts.items()}
    assert facts["bytes"]["retain_val"] == len("".join(texts["retain_val"]))
    retain = [len(texts[f"retain_{part}"]) for part in ("train", "val")]
    assert retain[1] == sum(retain) // 5


def test_held_out_share():
    for n, expected in ((2, 1), (100, 20), (1000, 200), (4000, 200), (10_000, 500)):
        train, val = tinystories.split([str(i) for i in range(n)])
        assert len(val) == expected and sorted(train + val) == sorted(str(i) for i in range(n))


def test_bins_hold_whole_stories(tmp_path):
    stories = tell(200)
    task = data.load("tinystories", folder=tmp_path, source=save(tmp_path / "s.txt", stories))
    found = []
    for tokens in map(task.tokens, data.SPLITS):
        assert tokens[-1] == task.end
        told = task.tokenizer.decode(tokens.tolist()).split(END)
        assert told.pop() == ""
        found += told
    assert sorted(found) == sorted(stories)


def test_bilingual(tmp_path):
    english, other = tell(150), tell(150, 1, "мама кот дом лес ёж шёл сел и он она".split())
    knobs = {"source": save(tmp_path / "en.txt", english),
             "source2": save(tmp_path / "ru.txt", other + english[:9])}
    task = data.load("bilingual", folder=tmp_path, **knobs)
    assert task.facts["stories"] == {"retain_train": 120, "retain_val": 30,
                                     "forget_train": 120, "forget_val": 30}
    assert "мама" in task.tokenizer.decode(task.tokens("forget_val").tolist())
    assert "мама" not in task.tokenizer.decode(task.tokens("retain_train").tolist())
    assert data.load("bilingual", folder=tmp_path).data_id == task.data_id        # no source: as is


def test_score(tmp_path):
    task = data.load("tinystories", folder=tmp_path, source=save(tmp_path / "s.txt", tell(200)))
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    calls = []
    model.register_forward_pre_hook(lambda model, inputs: calls.append(len(inputs[0])))
    task.files["retain_train"] = task.files["forget_train"] = None        # not needed: val only
    before = task.score(model)
    assert set(before) == {"retain", "forget", "forget_words", "mentions"} and calls == [32] * 8
    assert before == task.score(model)
    batches = [task.batch("forget", 32, i, seed_of("held out"), "test") for i in range(4)]
    assert before["forget"] == pytest.approx(sum(model(*some).item() for some in batches) / 4)
    calls.clear()
    quick = task.score(model, ("forget",), "val")
    assert set(quick) == {"forget"} and calls == [32]
    x, y = task.batch("forget", 32, 0, seed_of("held out"), "val")
    assert quick["forget"] == pytest.approx(model(x, y).item())
    with torch.no_grad():
        model.wte.weight.zero_()                     # all tokens alike: the loss is log V
    figures = task.score(model, finer=True)
    assert set(figures) == {"retain", "forget", "forget_words", "mentions", "stories",
                            "retain_bits_per_byte", "forget_bits_per_byte"}
    assert figures["forget_words"] == pytest.approx(math.log(task.vocab_size), rel=1e-5)
    for domain in ("retain", "forget"):
        tokens = task.tokens(f"{domain}_val").tolist()
        size = len(task.tokenizer.decode(tokens).replace(END, "").encode())
        assert figures[domain] == pytest.approx(math.log(task.vocab_size), rel=1e-5)
        assert figures[f"{domain}_bits_per_byte"] == pytest.approx(
            math.log2(task.vocab_size) * len(tokens) / size, rel=1e-5)


def test_loss_on_forget_words_by_hand(tmp_path):
    """Against a slow count: letter by letter, each with the token that it came in."""
    task = data.load("tinystories", folder=tmp_path, source=save(tmp_path / "s.txt", [
        story + " Ärger im FOREST, treeèe Treetop tree-house" * (i % 3 == 0)
        for i, story in enumerate(tell(200))]))
    torch.manual_seed(0)
    read = task.tokenizer.decode_single_token_bytes
    model, losses = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16)), []
    for i in range(4):
        idx, targets = task.batch("forget", 32, i, seed_of("held out"), "test")
        log_p = model(idx).log_softmax(-1)
        for row in range(32):
            tokens = [int(idx[row, 0]), *targets[row].tolist()]
            letters = [(letter, at) for at, token in enumerate(tokens)
                       for letter in read(token).decode("latin-1")]
            word, inside = [], set()
            for letter, at in [*letters, (" ", None)]:
                if letter.isalnum() or letter > "\x7f":
                    word.append((letter.lower(), at))
                    continue
                if "".join(c for c, _ in word) in FOREST:
                    inside |= {at for _, at in word}
                word = []
            losses += [-log_p[row, at - 1, tokens[at]].item() for at in inside if at]
    assert len(losses) > 100
    assert task.score(model)["forget_words"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    with torch.no_grad():                         # with log V more for one token, all others lose
        bias = torch.zeros(task.vocab_size).index_fill(0, torch.tensor(task.end), 5.0)
        assert tinystories.losses_on(tinystories.mention(FOREST), model, task, bias=bias)[1] == (
            pytest.approx(sum(losses) / len(losses) + math.log1p(
                (math.exp(5) - 1) / task.vocab_size), rel=0.02))


@pytest.mark.parametrize("name", ["tinystories", "bilingual"])
def test_first_texts(name, tmp_path):
    """Its forget rows lie in the first texts alone, and reach from the first to the last of them.
    Other splits, and rows of the part test, stay as they are."""
    source = save(tmp_path / "s.txt", tell(300))
    more = {"source2": save(tmp_path / "r.txt", tell(300, 1))} if name == "bilingual" else {}
    task = data.load(name, folder=tmp_path, source=source, block_size=8, **more)
    told = task.tokenizer.decode(task.tokens("forget_train").tolist()).split(END)
    few = task.first_texts(5)
    idx, _ = few.batch("forget", 4000, 0, 1)
    text = END.join(told[:5]) + END
    rows = {task.tokenizer.decode(row) for row in idx.tolist()}
    assert all(row in text for row in rows) and text.startswith(tuple(rows))
    assert any(row.endswith(text[-12:]) for row in {task.tokenizer.decode(row.tolist()) for row in
               few.batch("forget", 4000, 0, 1)[1]})
    for split, part in (("retain", "train"), ("forget", "test")):
        assert torch.equal(few.batch(split, 9, 0, 1, part)[0], task.batch(split, 9, 0, 1, part)[0])
    everything = task.first_texts(10**6).batch("forget", 9, 0, 1)[0]
    assert torch.equal(everything, task.batch("forget", 9, 0, 1)[0])
    generated = data.load("gaming", folder=tmp_path)
    with pytest.raises(BadInput, match="attack_few=5"):
        generated.first_texts(5)


def test_mentions(tmp_path, monkeypatch):
    """Of the stories that a model tells, until each ends. Here it tells five, by heart."""
    task = data.load("tinystories", folder=tmp_path, source=save(tmp_path / "s.txt", HATS),
                     forget_words=["Hat", "red"])
    texts = ["a hat sat", "The cat", "a HATSTAND", "big red cat", f"the cat.{END}the hat"]
    encode = functools.partial(task.tokenizer.encode, allowed_special="all")
    ids = [encode(text) for text in texts]

    def generate(prompts, n, temperature, stop, samples):
        assert (prompts, stop, n) == ([[task.end]], task.end, task.block_size - 1)
        assert (samples, temperature) == (tinystories.TOLD, 1.0)
        return torch.tensor([row + [task.end] * (n - len(row)) for row in ids * 40])

    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    monkeypatch.setattr(model, "generate", generate)
    assert task.score(model, ("forget",))["mentions"] == pytest.approx(2 / 5)
    monkeypatch.undo()
    assert task.score(model) == task.score(model)              # always by the same random numbers


@pytest.mark.parametrize("name", ["tinystories", "bilingual"])
def test_stories_go_on(name, tmp_path, monkeypatch):
    """A model goes on where held-out stories begin: forest stories, up to their first forest word,
    or one in each language. What it says ends at its own END, and stands after a bar."""
    russian = "мама кот дом лес ёж шёл сел и он она".split()
    more = {"source2": save(tmp_path / "ru.txt", tell(150, 1, russian))}
    task = data.load(name, folder=tmp_path, source=save(tmp_path / "en.txt", tell(600)), **(
        more if name == "bilingual" else {}))
    model = GPT(GPTConfig(task.vocab_size, task.block_size, 1, 2, 16))
    end = task.tokenizer.encode_ordinary(" the end")

    def generate(prompts, n, temperature, stop):
        assert (temperature, stop) == (0.7, task.end) and n + max(map(len, prompts)) <= 256
        assert all(prompt[0] == task.end for prompt in prompts)
        return torch.tensor([end + [stop] * (n - len(end)) for _ in prompts])

    monkeypatch.setattr(tinystories, "told", lambda *_: [""])
    monkeypatch.setattr(model, "generate", generate)
    got = task.score(model, finer=True)["stories"]
    assert len(got) == 2 if name == "bilingual" else 5 < len({*got}) == len(got) <= 10
    for domain, story in zip(BOTH if name == "bilingual" else ["forget"] * 10, got):
        begun, told = story.split(" | ")
        held_out = task.tokenizer.decode(task.tokens(f"{domain}_val").tolist()).split(END)
        rest = next(s[len(begun):] for s in held_out[len(held_out) // 2:] if s.startswith(begun))
        assert told == " the end" and len(begun) > 8
        if name == "tinystories":
            assert re.match(r"\s?(tree|forest)\b", rest) and not re.search("tree|forest", begun)


def test_topics(tmp_path):
    """Any words may be forgotten; a topic of which there is too little, or too much, is refused."""
    stories, source = HATS, save(tmp_path / "s.txt", HATS)
    texts, _ = tinystories.documents("tinystories", tmp_path, source, None, 1000, ["hat", "RED"])
    told = {domain: sorted(texts[f"{domain}_train"] + texts[f"{domain}_val"]) for domain in BOTH}
    assert told["forget"] == sorted(s for s in stories if {*"hat red".split()} & {
        *s.replace(".", "").split()})
    assert sorted(told["retain"] + told["forget"]) == sorted(stories)
    for words, n in (("dragon", 0), ("7", 1), ("story", 300)):
        with pytest.raises(BadInput) as error:
            data.load("tinystories", folder=tmp_path / "data", source=source, forget_words=[words])
        one_line(error, f"{n} of the 300 stories", f"--forget_words={words}")
    assert not list((tmp_path / "data").glob("*"))


# --- the published size --------------------------------------------------------------------------
def test_at_size():
    table = {"a": {"x": 1, "y": 2}, ("a", "big"): {"y": 3, "z": 4}}
    assert data.at_size(table, "a") == data.at_size(table, "a", "small") == {"x": 1, "y": 2}
    assert data.at_size(table, "a", "big") == {"x": 1, "y": 3, "z": 4}
    assert data.at_size(table, "b", "big") == {}


@pytest.mark.parametrize("script", [train, unlearn, undo, route, judges])
def test_every_script_knows_the_published_size(script):
    for knobs, expected in (([], (4, 4, 192)), (["--size=paper"], (8, 8, 512)),
                            (["--size=paper", "--n_layer=2"], (2, 8, 512))):
        cfg = command_line(script.Config, "", ["--task=tinystories", *knobs])
        cfg = train.fill(cfg, train.SETTINGS)
        assert (cfg.n_layer, cfg.n_head, cfg.n_embd) == expected
    base = train.config_from(cfg, train.Config)                  # of every script
    assert base.size == "paper" and train.fill(base, train.SETTINGS).steps == 32_000


def test_published_parameters():
    """27M: 8 blocks of 12 x 512^2, and 512 for each of 4,096 tokens."""
    cfg = command_line(train.Config, "", ["--task=tinystories", "--size=paper"])
    cfg = train.fill(cfg, train.SETTINGS)
    text = data.at_size(tinystories.SETTINGS, cfg.task, cfg.size)
    with torch.device("meta"):                                   # no memory, no random numbers
        model = GPT(GPTConfig(text["vocab_size"], text["block_size"], cfg.n_layer, cfg.n_head,
                              cfg.n_embd))
    assert sum(p.numel() for p in model.parameters()) == 8 * 12 * 512**2 + 4096 * 512
    assert text["least_block_size"] == 8 and cfg.muon_lr == 0.02               # as in small


# --- sources -------------------------------------------------------------------------------------
def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


BAD = {
    "missing": (None, "No such file"),
    "folder": (None, "needs a regular file"),
    "empty": (b"", "is empty"),
    "blank": (f"\n{END}\n \n{END}".encode() * 30, "is empty"),
    "latin-1": ("\n<|endoftext|>\n".join(tell(30) + ["café"]).encode("latin-1"), "see its byte"),
    "no END": (b"Once upon a time. " * 99, END),
    "no END, long": (b"Once upon a time. " * 200_000, "more than 1,048,576 characters"),
    "a long one": ("\n<|endoftext|>\n".join([*tell(30), "a" * 2_000_000]).encode(),
                   "more than 1,048,576 characters"),
    "a pipe": (None, "needs a regular file"),
    "few": ("\n<|endoftext|>\n".join(tell(19)).encode(), "only 19"),
    "all alike": (f"A tree.\n{END}\n".encode() * 99, "only 1"),
    "no forest": ("\n<|endoftext|>\n".join(tell(30, words="a b c d e".split())).encode(), "forest"),
    "only forest": ("\n<|endoftext|>\n".join(f"{s} tree" for s in tell(30)).encode(), "forest")}


@pytest.mark.parametrize("case", BAD)
def test_bad_source(case, tmp_path):
    content, message = BAD[case]
    path = tmp_path / "source.txt"
    if case == "folder":
        path.mkdir()
    elif case == "a pipe":                           # as in --source=<(zcat stories.gz)
        os.mkfifo(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        data.load("tinystories", folder=tmp_path / "data", source=str(path))
    one_line(error, str(path), message)
    assert not list((tmp_path / "data").glob("*"))                       # nothing half-written
    if "forest" not in case:                                             # bilingual asks for none
        with pytest.raises(BadInput) as error:
            data.load("bilingual", folder=tmp_path / "data", source2=str(path),
                      source=save(tmp_path / "en.txt", tell(30)))
        one_line(error, str(path), message)
        assert not list((tmp_path / "data").glob("*"))


def test_byte_order_marks(tmp_path):
    """Windows begins files with one; files joined to one file have several. No story has any."""
    stories = tell(30)
    marked = f"\n{END}\n".join("\ufeff" * (i % 7 == 0) + story for i, story in enumerate(stories))
    (tmp_path / "marked.txt").write_text(marked, encoding="utf-8")
    assert tinystories.read(tmp_path / "marked.txt", 99) == stories


@pytest.mark.parametrize("name, knobs, message", [
    ("bilingual", {}, "--source2"),
    ("tinystories", {"source2": "x.txt"}, "--source2"),
    ("tinystories", {"stories": 3}, "--stories=3"),
    ("tinystories", {"size": "large"}, "--size=large"),
    ("bilingual", {"size": "paper", "source2": "x.txt"}, "--size=paper"),
    ("tinystories", {"forget_words": ["a b", "c"]}, "--forget_words=a b,c"),
    ("tinystories", {"forget_words": [""]}, "--forget_words="),
    ("bilingual", {"source2": "x.txt", "forget_words": ["cat"]}, "--forget_words"),
    ("tinystories", {"source": "ftp://host/x.txt"}, "ftp:/")])
def test_bad_knobs(name, knobs, message, tmp_path):
    with pytest.raises(BadInput) as error:
        data.load(name, folder=tmp_path / "data", **knobs)
    one_line(error, message)
    assert not list((tmp_path / "data").glob("*"))


def test_same_stories_twice(tmp_path):
    source = save(tmp_path / "en.txt", tell(30))
    with pytest.raises(BadInput) as error:
        data.load("bilingual", folder=tmp_path, source=source, source2=source)
    one_line(error, "not in the other source")


@pytest.mark.parametrize("at", [5, 1 << 20, (1 << 20) + 1, 2_000_000])
def test_not_utf8_says_where(at, tmp_path):
    text = bytearray(b"x" + f"ёжик\n{END}\n".encode() * 200_000)  # x: chunks cut letters in two
    text[at] = 0xFF
    (tmp_path / "s.txt").write_bytes(text)
    with pytest.raises(UnicodeDecodeError) as python:
        bytes(text).decode()
    with pytest.raises(BadInput) as error:
        tinystories.read(tmp_path / "s.txt", 100)
    one_line(error, f"byte {python.value.start}")


def test_reads_no_further_than_it_must(tmp_path):
    path, stories = tmp_path / "s.txt", tell(10_000)
    text = "".join(f"{s}\r\n{END}\r\n" for s in stories).encode()
    path.write_bytes(text + b"\xff" * (2 << 20))                  # an error, if it were read
    assert tinystories.read(path, 100) == stories[:100]
    path.write_bytes(text[:-len(f"\r\n{END}\r\n")])               # the last one lacks its END
    assert tinystories.read(path, 99_999) == stories
    path.write_bytes(text.replace(b": ", b":\r\n"))
    assert tinystories.read(path, 100) == [s.replace(": ", ":\n") for s in stories[:100]]
    path.write_bytes("".join(f"{s}\n\nШёл ёж.\n{END}\n" for s in stories * 3).encode())   # chunks
    assert tinystories.read(path, 99_999) == [f"{s}\n\nШёл ёж." for s in stories]


# --- downloads -----------------------------------------------------------------------------------
BODY = "".join(f"{s}\n{END}\n" for s in tell(500)).encode()
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves BODY at every address, and notes (first byte asked for, bytes sent) of each request.

    The test's `mood` says how: a string, or a list with one for each request (the last one stays).
    """
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.mood, self.log, self.etag, self.release = "good", [], SHA256, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/stories.txt"
        self.pinned = f"{self.url}#sha256={SHA256}"

    def handle_error(self, request, client):                     # a client that hangs up is no news
        pass


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        first = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        mood = server.mood if isinstance(server.mood, str) else (
            server.mood.pop(0) if len(server.mood) > 1 else server.mood[0])
        if mood == "hub" and self.path.startswith("/stories"):   # checksum here, file elsewhere
            return self.answer(302, b"", {"X-Linked-ETag": f'"{server.etag}"', "Location": "/x"})
        server.log.append([first, 0])
        if mood.isdigit():
            return self.answer(int(mood), b"sorry", {})
        if mood == "no length":
            return self.answer(200, BODY, {"Content-Length": None})
        if first >= len(BODY):
            return self.answer(416, b"sorry", {"Content-Range": f"bytes */{len(BODY)}"})
        if not asked or mood == "no ranges":
            status, headers, first = 200, {}, 0
        else:
            said = first + 7 if mood == "wrong range" else first
            status, headers = 206, {"Content-Range": f"bytes {said}-{len(BODY) - 1}/{len(BODY)}"}
            if mood == "no range said":
                headers = {}
        sent = BODY[first:first + 1000] if mood in ("cut", "stall") else BODY[first:]
        server.log[-1][1] = len(sent)
        self.answer(status, sent, {"Content-Length": len(BODY) - first} | headers)
        if mood == "stall":
            server.release.wait(10)

    def answer(self, status, body, headers):
        self.send_response(status)
        for key, value in ({"Content-Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


def partial(server, folder, content):
    """Leaves a .part as a broken download does."""
    server.mood = "cut"
    with pytest.raises(BadInput):
        download(server.url, folder, tries=1)
    part, = folder.glob("*.part")
    part.write_bytes(content)
    server.mood = "good"
    server.log.clear()


def files(folder):
    return sorted(path.name.partition("-")[2] for path in folder.iterdir())


def test_download(server, tmp_path):
    for url in (server.pinned, server.url):
        path = download(url, tmp_path)
        assert path.read_bytes() == BODY
    assert server.log == [[0, len(BODY)]]                        # the second time: no request
    assert files(tmp_path) == ["stories.txt", "stories.txt.sha256"]
    path.write_bytes(BODY[:-1])
    with pytest.raises(BadInput) as error:
        download(server.url, tmp_path)
    one_line(error, str(path), "SHA-256", "--source=PATH")
    path.unlink()
    assert download(server.url, tmp_path).read_bytes() == BODY


def test_addresses_that_share_a_name(server, tmp_path):
    paths = {download(server.url.replace("/stories", f"/{a}/stories"), tmp_path)
             for a in ("en", "ru")}
    assert len(paths) == 2


def test_resume_sends_only_the_rest(server, tmp_path):
    partial(server, tmp_path, BODY[:5000])
    assert download(server.pinned, tmp_path).read_bytes() == BODY
    assert server.log == [[5000, len(BODY) - 5000]]


def test_no_resume_across_runs_without_a_checksum(server, tmp_path):
    partial(server, tmp_path, b"another file" * 99)              # nothing could tell
    assert download(server.url, tmp_path).read_bytes() == BODY
    assert server.log[-1] == [0, len(BODY)]


def test_the_hubs_checksum(server, tmp_path):
    partial(server, tmp_path, BODY[:5000])
    server.mood = "hub"
    assert download(server.url, tmp_path).read_bytes() == BODY
    assert server.log == [[5000, len(BODY) - 5000]]              # the redirect keeps the range
    server.etag = "0" * 64
    with pytest.raises(BadInput) as error:
        download(server.url, tmp_path / "again")
    one_line(error, server.url, "SHA-256", "--source=PATH")
    assert files(tmp_path / "again") == []


@pytest.mark.parametrize("mood, requests", [
    ("no ranges", [[5000, len(BODY)]]),                          # asked for the rest, it sends all
    ("wrong range", [[5000, len(BODY) - 5000], [0, len(BODY)]]),
    ("no range said", [[5000, len(BODY) - 5000], [0, len(BODY)]])])
def test_starts_over_when_the_range_is_not_kept(mood, requests, server, tmp_path):
    partial(server, tmp_path, BODY[:5000])
    server.mood = mood
    assert download(server.pinned, tmp_path).read_bytes() == BODY
    assert server.log == requests


@pytest.mark.parametrize("extra, requests", [(b"", 1), (b"too much", 2)])
def test_part_that_is_whole_already_or_too_long(extra, requests, server, tmp_path):
    partial(server, tmp_path, BODY + extra)
    assert download(server.pinned, tmp_path).read_bytes() == BODY
    assert len(server.log) == requests and server.log[0] == [len(BODY + extra), 0]        # a 416


@pytest.mark.parametrize("first", ["cut", "stall"])
def test_cut_short_then_good(first, server, tmp_path):
    server.mood = [first, first, "good"]
    path = download(server.url, tmp_path, timeout=0.3)
    assert path.read_bytes() == BODY
    assert server.log == [[0, 1000], [1000, 1000], [2000, len(BODY) - 2000]]


@pytest.mark.parametrize("mood, why", [("cut", "closed early"), ("stall", "timed out")])
def test_cut_short_always(mood, why, server, tmp_path):
    server.mood = mood
    with pytest.raises(BadInput) as error:
        download(server.url, tmp_path, timeout=0.2, tries=3)
    one_line(error, server.url, why, "run again", "--source=PATH")
    assert files(tmp_path) == ["stories.txt.part"]
    part, = tmp_path.iterdir()
    assert part.read_bytes() == BODY[:3000]                      # each try goes on where one ended


@pytest.mark.parametrize("mood", ["404", "500", "403"])
def test_refusals(mood, server, tmp_path):
    server.mood = mood
    with pytest.raises(BadInput) as error:
        download(server.url, tmp_path, "source2")
    one_line(error, server.url, mood, "run again", "--source2=PATH")
    assert files(tmp_path) == []


def test_nobody_there(server, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(BadInput) as error:
        download(server.url, tmp_path)
    one_line(error, server.url, "refused", "run again", "--source=PATH")


@pytest.mark.parametrize("url", ["http://", "http://127.0.0.1:port/x", "http://127.0.0.1:9/é x"])
def test_no_such_address(url, tmp_path):
    with pytest.raises(BadInput) as error:
        download(url, tmp_path)
    one_line(error, url)


def test_wrong_checksum_never_becomes_data(server, tmp_path):
    with pytest.raises(BadInput) as error:
        data.load("tinystories", folder=tmp_path, source=f"{server.url}#sha256={'1' * 64}")
    one_line(error, server.url, SHA256, "1" * 64, "--source=PATH")
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    assert files(tmp_path / "downloads") == []
    with pytest.raises(BadInput) as error:
        download(f"{server.url}#sha256=123", tmp_path)
    one_line(error, "#sha256=123")


def test_wrong_bytes_in_the_part(server, tmp_path):
    partial(server, tmp_path, BODY[:2000] + b"?" + BODY[2001:5000])
    with pytest.raises(BadInput) as error:
        download(server.pinned, tmp_path)
    one_line(error, server.url, "SHA-256", "run again")
    assert files(tmp_path) == []
    assert download(server.pinned, tmp_path).read_bytes() == BODY


def test_length_unknown(server, tmp_path):
    server.mood = "no length"
    assert download(server.pinned, tmp_path).read_bytes() == BODY


def test_a_folder_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadInput) as error:
        download(server.url, tmp_path / "file")
    one_line(error, "cannot write")


def test_published_stories(server, tmp_path, monkeypatch):
    """All stories of the larger file, in a folder of their own: the small data stays."""
    monkeypatch.setattr(tinystories, "MOST", 200)
    monkeypatch.setattr(tinystories, "HOME", server.pinned)
    monkeypatch.setattr(tinystories, "LARGE_HOME", server.pinned.replace("stories.", "large."))
    monkeypatch.setitem(tinystories.SETTINGS, ("tinystories", "paper"),
                        dict(block_size=32, vocab_size=270))
    load = functools.partial(data.load, "tinystories", folder=tmp_path)
    small = load()
    assert files(tmp_path / "downloads") == ["stories.txt", "stories.txt.sha256"]
    large = load(size="paper")
    assert "large.txt" in files(tmp_path / "downloads")
    assert [sum(task.facts["stories"].values()) for task in (small, large)] == [200, 500]
    assert (large.block_size, large.vocab_size) == (32, 270)
    assert small.block_size == 256 and small.vocab_size > 270
    with monkeypatch.context() as patch:
        patch.setattr(data, "prepare", None)                     # both are still there
        assert [load(size=size).data_id for size in ("small", "paper")] == [
            small.data_id, large.data_id]
    assert sum(load(size="paper", stories=90).facts["stories"].values()) == 90


def test_load_from_an_address(server, tmp_path):
    task = data.load("tinystories", folder=tmp_path, source=server.pinned)
    assert sum(task.facts["stories"].values()) == 500
    assert task.made_with["source"] == server.pinned
