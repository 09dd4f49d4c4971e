"""Pretrained models from disk: tiny random Llamas, written here, against a Llama in a few lines."""
import copy
import json
import math
import random
import struct
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import regex
import torch

from data import pretrained
from data.checkpoint import FORMATS, dequantise
from data.tokenizer import END
from engine.knobs import BadInput

V, C, L, NH, KV, U, HS = 330, 64, 2, 4, 2, 96, 16          # V is no multiple of 64: 54 padding rows
PAIRS = [("self_attn.q_proj", "attn_q", (C, C)), ("self_attn.k_proj", "attn_k", (KV * HS, C)),
         ("self_attn.v_proj", "attn_v", (KV * HS, C)), ("self_attn.o_proj", "attn_output", (C, C)),
         ("mlp.gate_proj", "ffn_gate", (U, C)), ("mlp.up_proj", "ffn_up", (U, C)),
         ("mlp.down_proj", "ffn_down", (C, U)), ("input_layernorm", "attn_norm", (C,)),
         ("post_attention_layernorm", "ffn_norm", (C,))]
GGUF_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
              "model.norm.weight": "output_norm.weight"} | {
    f"model.layers.{i}.{a}.weight": f"blk.{i}.{b}.weight" for i in range(L) for a, b, _ in PAIRS}
GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30, "Q4_K": 12}


def random_weights(seed=0, tied=True):
    """{name in safetensors: float32}. Norms are far from 1."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (V, C), "model.norm": (C,)} | {
        f"model.layers.{i}.{name}": shape for i in range(L) for name, _, shape in PAIRS}
    if not tied:
        shapes["lm_head"] = (V, C)
    return {f"{name}.weight": (rng.uniform(-0.5, 2, shape) if "norm" in name else
                               rng.normal(0, 1.5 / shape[-1]**0.5, shape)).astype(np.float32)
            for name, shape in shapes.items()}


# --- a tokenizer ---------------------------------------------------------------------------------
LETTER, spare = {}, 256                                    # GPT-2's alphabet: {byte: character}
for b in range(256):
    plain = chr(b).isprintable() and b != 32
    LETTER[b], spare = (chr(b), spare) if plain else (chr(spare), spare + 1)
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXT = ("The cat's hat isn't here; the other hat is there, THE END.\n\n\tOnce upon a time,  there "
        "  were 3 bears, 42 trees & 1,000 stars in the 20 trees.  \n  x=y+z; the_b #1 50% \r\n\r\n "
        "Жил-был у бабушки серенький козлик… 😀👩‍👩‍👧 日本語 x² ½ Ⅷ ١٢ e\u0301 \u00a0\u2003 1  ")


def words(pattern, text):
    """How the three kinds of tokenizers cut a text."""
    if pattern == "smollm":                      # digits first, and each rest on its own
        parts = regex.split(r"(\p{N})", text)
        return [w for i, part in enumerate(parts) for w in (
            [part] if i % 2 else GPT2.findall(part))]
    return regex.findall(LLAMA3, text) if pattern == "llama-bpe" else GPT2.findall(text)


def apply(pair, word):
    """A word, a list of texts, in which the pair is merged everywhere."""
    out = []
    for x in word:
        if out and (out[-1], x) == pair:
            out[-1] += x
        else:
            out.append(x)
    return out


def spell(word):
    return [LETTER[b] for b in word.encode()]


def train(pattern, n=60):
    """The first n merges: of the most frequent pair, again and again."""
    chain, merges = [spell(w) for w in words(pattern, TEXT)], []
    for _ in range(n):
        counts = Counter(pair for word in chain for pair in zip(word, word[1:]))
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        chain = [apply(merges[-1], word) for word in chain]
    return merges


SPECIAL = [END, "<|im_start|>", "<|im_end|>"]              # ids 0, 1 and 2, then the 256 bytes
MERGES = {pattern: train(pattern) for pattern in ("gpt-2", "smollm", "llama-bpe")}


def vocabulary(pattern):
    """Token texts in the order of ids. Id 5, behind the special ones and two bytes, is unused."""
    tokens = [*SPECIAL, *LETTER.values(), *("".join(pair) for pair in MERGES[pattern])]
    return tokens[:5] + ["[PAD5]"] + tokens[5:]


def slow_ids(pattern, text):
    ids = {token: i for i, token in enumerate(vocabulary(pattern))}
    out = []
    for word in map(spell, words(pattern, text)):
        for pair in MERGES[pattern]:
            word = apply(pair, word)
        out += [ids[token] for token in word]
    return out


# --- writing files -------------------------------------------------------------------------------
def write_safetensors(path, tensors):
    """tensors: {name: (format, shape, bytes)}"""
    header, body = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, shape, raw) in tensors.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body),
                                                                        len(body) + len(raw)]}
        body += raw
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + body)


def gguf_string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(x):
    if isinstance(x, list):
        of_strings = isinstance(x[0], str)
        return struct.pack("<IIQ", 9, 8 if of_strings else 5, len(x)) + b"".join(
            gguf_string(s) if of_strings else struct.pack("<i", s) for s in x)
    if isinstance(x, str):
        return struct.pack("<I", 8) + gguf_string(x)
    if isinstance(x, bool):
        return struct.pack("<I?", 7, x)
    return struct.pack("<If", 6, x) if isinstance(x, float) else struct.pack("<II", 4, x)


def gguf_bytes(settings, tensors, version=3):
    """tensors: {name: (GGML type, shape, bytes)}"""
    align = settings.get("general.alignment", 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings))
    head += b"".join(gguf_string(key) + gguf_value(x) for key, x in settings.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        head += gguf_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1],
                                                kind, len(body))
        body += raw + bytes(-len(raw) % align)
    return head + bytes(-len(head) % align) + body


def encode(kind, w):
    """The bytes of a float32 array in a format."""
    w = np.ascontiguousarray(w)
    if kind in ("F32", "F16"):
        return w.astype("<f4" if kind == "F32" else "<f2").tobytes()
    if kind == "BF16":
        return torch.from_numpy(w).bfloat16().view(torch.int16).numpy().tobytes()
    out = b""
    for block in w.reshape(-1, 32).astype(np.float64):
        low, high = block.min(), block.max()
        if kind == "Q8_0":
            d = np.float16(abs(block).max() / 127)
            out += d.tobytes() + np.rint(block / d).clip(-127, 127).astype(np.int8).tobytes()
            continue
        d, m = ((high - low) / 15, low) if kind == "Q4_1" else (abs(block).max() / 7, 0)
        d, m = np.float16(d), np.float16(m)
        q = np.rint((block - m) / d + (8 if kind == "Q4_0" else 0)).clip(0, 15).astype(np.uint8)
        out += d.tobytes() + (m.tobytes() if kind == "Q4_1" else b"")
        out += (q[:16] | q[16:] << 4).tobytes()
    return out


def slow_values(kind, raw):
    """Dequantises one number after the other, by llama.cpp's description of the formats."""
    if kind == "BF16":
        return [struct.unpack("<f", b"\0\0" + raw[i:i + 2])[0] for i in range(0, len(raw), 2)]
    if kind in ("F32", "F16"):
        return [x for x, in struct.iter_unpack("<f" if kind == "F32" else "<e", raw)]
    values, size = [], FORMATS[kind][1]
    for at in range(0, len(raw), size):
        block = raw[at:at + size]
        d, m = np.float32(struct.unpack("<e", block[:2])[0]), np.float32(0)
        if kind == "Q4_1":
            m = np.float32(struct.unpack("<e", block[2:4])[0])
        for i in range(32):
            if kind == "Q8_0":
                q, = struct.unpack("<b", block[2 + i:3 + i])
            else:
                q = block[-16 + i % 16] // (1 if i < 16 else 16) % 16 - (8 if kind == "Q4_0" else 0)
            values.append(d * np.float32(q) + m)
    return values


CONFIG = {"model_type": "llama", "hidden_act": "silu", "hidden_size": C, "intermediate_size": U,
          "num_hidden_layers": L, "num_attention_heads": NH, "num_key_value_heads": KV,
          "vocab_size": V, "max_position_embeddings": 8192, "rms_norm_eps": 1e-3,
          "rope_theta": 500.0, "rope_scaling": None, "tie_word_embeddings": True,
          "attention_bias": False, "eos_token_id": 2}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
PRE_TOKENIZERS = {
    "gpt-2": BYTE_LEVEL | {"use_regex": True},
    "smollm": {"type": "Sequence", "pretokenizers": [
        {"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
        BYTE_LEVEL | {"use_regex": False}]}}
SETTINGS = {"general.architecture": "llama", "general.name": "Tiny", "llama.context_length": 8192,
            "llama.embedding_length": C, "llama.feed_forward_length": U, "llama.block_count": L,
            "llama.attention.head_count": NH, "llama.attention.head_count_kv": KV,
            "llama.attention.layer_norm_rms_epsilon": 1e-3, "llama.rope.freq_base": 500.0,
            "llama.vocab_size": V, "tokenizer.ggml.add_bos_token": False,
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.eos_token_id": 2}


def tokenizer_json(pattern="smollm"):
    tokens = {token: i for i, token in enumerate(vocabulary(pattern)) if token != "[PAD5]"}
    return {"normalizer": None, "pre_tokenizer": copy.deepcopy(PRE_TOKENIZERS[pattern]),
            "added_tokens": [{"id": i, "content": token} for i, token in enumerate(SPECIAL)],
            "model": {"type": "BPE", "byte_fallback": False, "vocab": tokens,
                      "merges": [" ".join(pair) for pair in MERGES[pattern]]}}


def write_folder(path, weights=None, kind="F32", files=1, config={}, tokenizer=None, more={}):
    """more: further tensors, or others in place of these"""
    path.mkdir()
    tensors = {name: (kind, list(w.shape), encode(kind, w))
               for name, w in (weights or random_weights()).items()} | more
    tensors = list(tensors.items())
    for i in range(files):
        write_safetensors(path / f"model-{i}.safetensors", dict(tensors[i::files]))
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer or tokenizer_json()))
    return path


def write_gguf(path, weights=None, kind="F32", pattern="smollm", settings={}, version=3, more={}):
    """Norms are F32, as in llama.cpp's files."""
    tensors = {}
    for name, w in (weights or random_weights()).items():
        if "q_proj" in name or "k_proj" in name:           # pairs of channels side by side
            heads = len(w) // HS
            w = w.reshape(heads, 2, HS // 2, C).swapaxes(1, 2).reshape(-1, C)
        of = "F32" if "norm" in name else kind
        tensors[GGUF_NAMES[name]] = (GGUF_TYPES[of], w.shape, encode(of, w))
    tokens = vocabulary(pattern)
    about = SETTINGS | {
        "tokenizer.ggml.pre": pattern, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 5] + [1] * (len(tokens) - 6),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES[pattern]]} | settings
    path.write_bytes(gguf_bytes({k: x for k, x in about.items() if x is not None},
                                {k: x for k, x in (tensors | more).items() if x}, version))
    return path


# --- the model -----------------------------------------------------------------------------------
def slow_llama(weights, idx, base=500.0, eps=1e-3):
    """One row's logits (T, V) in float64, by the formulas of Llama: norms with weights, query heads
    that share a key head, one position after the other."""
    w = {name: torch.from_numpy(x).double() for name, x in weights.items()}

    def norm(x, weight):
        return w[weight + ".weight"] * x / (x.square().mean() + eps).sqrt()

    def turn(x, position):                                 # channels i and i + hs/2, as one complex
        angle = torch.tensor([position * base ** (-2 * i / HS) for i in range(HS // 2)]).double()
        turned = torch.complex(x[:HS // 2], x[HS // 2:]) * torch.polar(angle * 0 + 1, angle)
        return torch.cat((turned.real, turned.imag))

    stream = [w["model.embed_tokens.weight"][i] for i in idx]
    for i in range(L):
        at = f"model.layers.{i}."
        q, k, v = ([w[f"{at}self_attn.{p}_proj.weight"] @ norm(x, at + "input_layernorm")
                    for x in stream] for p in "qkv")
        for t in range(len(idx)):
            heads = []
            for h in range(NH):
                mine, shared = slice(h * HS, h * HS + HS), h // (NH // KV) * HS
                shared = slice(shared, shared + HS)
                scores = torch.stack([turn(q[t][mine], t) @ turn(k[s][shared], s) / HS**0.5
                                      for s in range(t + 1)]).softmax(0)
                heads.append(sum(p * v[s][shared] for s, p in enumerate(scores)))
            x = stream[t] + w[at + "self_attn.o_proj.weight"] @ torch.cat(heads)
            inner = norm(x, at + "post_attention_layernorm")
            gate = w[at + "mlp.gate_proj.weight"] @ inner
            units = gate / (1 + (-gate).exp()) * (w[at + "mlp.up_proj.weight"] @ inner)
            stream[t] = x + w[at + "mlp.down_proj.weight"] @ units
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return torch.stack([head @ norm(x, "model.norm") for x in stream])


IDX = torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(path, idx=IDX):
    with torch.no_grad():
        return pretrained.read(path)[0](idx)


def parameters(path):
    return dict(pretrained.read(path)[0].state_dict())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_as_written_out(tmp_path, tied):
    weights = random_weights(tied=tied)
    folder = write_folder(tmp_path / "hf", weights, config={"tie_word_embeddings": tied})
    gguf = write_gguf(tmp_path / "m.gguf", weights)
    expected = torch.stack([slow_llama(weights, row) for row in IDX])
    for path in (folder, gguf):
        torch.testing.assert_close(logits(path).double(), expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 3 and equal(parameters(folder), parameters(gguf))


def test_settings_count(tmp_path):
    """Rope base and epsilon change the logits, as the formulas say."""
    weights = random_weights()
    for i, (base, eps) in enumerate([(10000.0, 1e-3), (500.0, 0.5)]):
        changed = {"rope_theta": base, "rms_norm_eps": eps}
        expected = slow_llama(weights, IDX[0], base, eps)
        got = logits(write_folder(tmp_path / str(i), weights, config=changed), IDX[:1])
        torch.testing.assert_close(got[0].double(), expected, atol=1e-4, rtol=0)
        assert (expected - slow_llama(weights, IDX[0])).abs().max() > 1e-2
    moved = write_folder(tmp_path / "new", weights, config={                # transformers 5
        "rope_theta": None, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}})
    assert torch.equal(logits(moved), logits(write_folder(tmp_path / "old", weights)))


def test_the_model(tmp_path):
    """It can be trained, is padded with zeros, and its context has a limit."""
    path = write_folder(tmp_path / "long")
    model, enc = pretrained.read(str(path))
    c = model.config
    assert (c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd, c.n_units, c.rope_base,
            c.qk_norm, c.norm_wte, c.gated, c.tied, c.eps) == (
        V, 2048, L, NH, C, U, 500.0, False, False, True, True, 1e-3)
    assert not model.wte.weight[V:].any() and model.head is None
    assert model.cos.shape == (2048, 1, 1, HS // 2) and len(model.wte.weight) == 384
    assert all(p.dtype == torch.float32 and p.requires_grad and p.is_contiguous()
               for p in model.parameters())
    model(IDX[:, :-1], IDX[:, 1:]).backward()
    assert all(p.grad is not None for p in model.parameters())
    before = parameters(path)                              # the file is not mapped into the model
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert equal(parameters(path), before)
    assert torch.equal(pretrained.read(path)[0].clone()(IDX), logits(path))
    short = write_folder(tmp_path / "short", config={"max_position_embeddings": 40})
    assert pretrained.read(short)[0].config.block_size == 40


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_types_in_several_files(tmp_path, kind):
    """Like the same numbers in float32 and in one file, bit for bit."""
    weights = random_weights(tied=False)
    rounded = {name: np.array(slow_values(kind, encode(kind, w)), np.float32).reshape(w.shape)
               for name, w in weights.items()}
    how = {"config": {"tie_word_embeddings": False}}
    expected = parameters(write_folder(tmp_path / "one", rounded, **how))
    assert equal(parameters(write_folder(tmp_path / "two", weights, kind, 2, **how)), expected)
    for name in ("input_layernorm", "post_attention_layernorm", "model.norm"):
        for key in weights:                                # norms are F32 in a GGUF file
            weights[key] = rounded[key] if name in key else weights[key]
    assert equal(parameters(write_gguf(tmp_path / "m.gguf", weights, kind)), expected)


@pytest.mark.parametrize("kind,step", [("Q8_0", 1 / 127), ("Q4_0", 1 / 7), ("Q4_1", 1 / 15)])
def test_quantised(tmp_path, kind, step):
    """As dequantised one by one, bit for bit. What was stored is half a step away, or less."""
    weights = random_weights(tied=False)
    rounded = {name: w if "norm" in name else np.array(slow_values(kind, encode(kind, w)),
                                                       np.float32).reshape(w.shape)
               for name, w in weights.items()}
    for name, w in weights.items():
        w, r = w.reshape(-1, 32), rounded[name].reshape(-1, 32)
        size = (w.max(1) - w.min(1) if kind == "Q4_1" else abs(w).max(1))[:, None]
        assert (abs(w - r) <= (0.5 * step + 0.005) * size).all()
        assert "norm" in name or (w != r).any()

    expected = parameters(write_folder(tmp_path / "hf", rounded,
                                       config={"tie_word_embeddings": False}))
    assert equal(parameters(write_gguf(tmp_path / "m.gguf", weights, kind)), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_dequantise_any_bytes(kind):
    raw = np.random.default_rng(1).integers(0, 256, 40 * FORMATS[kind][1], np.uint8)
    got, expected = dequantise(kind, raw), np.array(slow_values(kind, raw.tobytes()), np.float32)
    assert got.dtype == np.float32 and np.array_equal(got, expected, equal_nan=True)


# --- the tokenizer -------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", PRE_TOKENIZERS)
def test_ids_as_by_merges(tmp_path, pattern):
    """From both kinds of files, with unused ids and special tokens before the others."""
    folder = write_folder(tmp_path / "hf", tokenizer=tokenizer_json(pattern))
    rng, letters = random.Random(0), sorted(set(TEXT)) + [" "] * 20 + ["\n", "the", "'s", "12"] * 4
    texts = [TEXT, ""] + ["".join(rng.choices(letters, k=rng.randint(1, 40))) for _ in range(300)]
    for enc in (pretrained.read_tokenizer(folder), pretrained.read_tokenizer(
            write_gguf(tmp_path / "m.gguf", pattern=pattern))):
        for text in texts:
            assert enc.encode_ordinary(text) == slow_ids(pattern, text)
            assert enc.decode(enc.encode_ordinary(text)) == text
        assert len(enc.encode_ordinary(TEXT)) < 0.8 * len(TEXT.encode())
        assert enc.n_vocab == V > len(vocabulary(pattern))              # every id has a text
        assert enc.decode([5, V - 1]) == f"<|unused 5|><|unused {V - 1}|>"
        assert enc.encode("<|im_start|>a<|im_end|>" + END, allowed_special="all") == [
            1, *slow_ids(pattern, "a"), 2, 0]
        assert enc.decode([1, 2, 0]) == "<|im_start|><|im_end|>" + END and enc.eot_token == 0


@pytest.mark.parametrize("pattern", PRE_TOKENIZERS)
def test_words(pattern):
    """Cut as by the tokenizer's own steps, one after the other."""
    rng, letters = random.Random(1), sorted(set(TEXT)) + [*" \t\n.1a"] * 20
    for _ in range(500):
        text = "".join(rng.choices(letters, k=30))
        assert regex.findall(pretrained.PATTERNS[pattern], text) == [
            word for word in words(pattern, text) if word]


def test_merges_of_both_spellings(tmp_path):
    tokenizer = tokenizer_json()
    tokenizer["model"]["merges"] = [list(pair) for pair in MERGES["smollm"]]
    enc = pretrained.read_tokenizer(write_folder(tmp_path / "hf", tokenizer=tokenizer))
    assert enc.encode_ordinary(TEXT) == slow_ids("smollm", TEXT)


@pytest.mark.parametrize("names,eos,end", [
    ([END, "<|a|>", "<|b|>"], 2, 0), (["<|a|>", "<|end_of_text|>", "<|b|>"], 2, 1),
    (["<|a|>", "<|b|>", "</s>"], 2, 2), (["<|a|>", "<|b|>", "</s>"], [1, 2], 1)])
def test_the_end_of_documents(tmp_path, names, eos, end):
    """<|endoftext|>, whatever the file calls it, which also keeps its own name."""
    tokenizer = tokenizer_json()
    tokenizer["added_tokens"] = [{"id": i, "content": name} for i, name in enumerate(names)]
    tokenizer["model"]["vocab"] = {text: i for text, i in tokenizer["model"]["vocab"].items()
                                   if i > 2}
    enc = pretrained.read_tokenizer(write_folder(tmp_path / "hf", tokenizer=tokenizer,
                                                 config={"eos_token_id": eos}))
    assert enc.eot_token == end
    assert enc.encode(END + names[end], allowed_special="all") == [end, end]


def test_characters_without_tokens(tmp_path):
    """SmolLM2 lacks the bytes of some control codes: they are dropped, where tiktoken panics."""
    lost = "\x04\x1d\U00040000\U000bffff"
    for pattern in PRE_TOKENIZERS:
        tokenizer = tokenizer_json(pattern)
        for b in (0x04, 0x1d, 0xf1, 0xf2, 0xc0, 0xff):
            tokenizer["model"]["vocab"].pop(LETTER[b])
        enc = pretrained.read_tokenizer(write_folder(tmp_path / pattern, tokenizer=tokenizer))
        text = "".join(c + rng for c, rng in zip(TEXT, lost * len(TEXT)))
        assert enc.decode(enc.encode_ordinary(text)) == TEXT
        assert enc.encode_ordinary(TEXT) == slow_ids(pattern, TEXT)
        kept = "\x03\U0003ffff\U000c0000\U0010ffff!"
        assert enc.decode(enc.encode_ordinary(kept)) == kept


def test_the_tokenizer_alone(tmp_path):
    """It needs no weights: neither those that are missing, nor those that cannot be read."""
    folder = write_folder(tmp_path / "hf")
    (folder / "model-0.safetensors").unlink()
    assert pretrained.read_tokenizer(folder).eot_token == 0
    more = {"token_embd.weight": (GGUF_TYPES["Q4_K"], (V, C), b"")}
    assert pretrained.read_tokenizer(write_gguf(tmp_path / "m.gguf", more=more)).eot_token == 0


def test_facts(tmp_path):
    weights = random_weights(tied=False)
    folder = write_folder(tmp_path / "hf", weights, "F16", 2, config={"tie_word_embeddings": False})
    gguf = write_gguf(tmp_path / "m.gguf", weights)
    same = {"n_layer": L, "n_head": NH, "n_kv_head": KV, "n_embd": C, "vocab_size": V,
            "parameters": sum(w.size for w in weights.values())}
    for path, name, files in ((folder, "hf", [folder / f"model-{i}.safetensors" for i in (0, 1)]),
                              (gguf, "Tiny", [gguf])):
        about = pretrained.facts(path)
        assert about == same | {"name": name, "files": {f.name: f.stat().st_size for f in files}}
        assert str(tmp_path) not in json.dumps(about)


# --- what cannot be used -------------------------------------------------------------------------
def refused(path, *says):
    """read() raises one line that names the file, says what is wrong and what to do."""
    with pytest.raises(BadInput) as caught:
        pretrained.read(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for part in (path.name, *says):
        assert part in message, message
    assert any(way in message for way in ("choose", "give")), message


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("config,says", [
    ({"model_type": "qwen2"}, "'qwen2'"), ({"model_type": None}, "architecture is None"),
    ({"hidden_act": "gelu"}, "'gelu'"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3'"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0}}, "'yarn'"),
    ({"rope_scaling": "linear"}, "choose"),
    ({"num_attention_heads": 3, "num_key_value_heads": 1}, "n_head=3"),
    ({"num_key_value_heads": 3}, "3 key-value heads"),
    ({"num_key_value_heads": 1}, "self_attn.k_proj"), ({"num_attention_heads": 8}, "k_proj"),
    ({"num_hidden_layers": 10**9}, "layers.2."), ({"num_hidden_layers": 1}, "layers.1."),
    ({"num_hidden_layers": -1}, "n_layer is -1"), ({"hidden_size": "64"}, "n_embd is '64'"),
    ({"hidden_size": 10**30}, "n_embd is 1000"), ({"vocab_size": 300}, "embed_tokens"),
    ({"vocab_size": True}, "vocab_size is True"), ({"intermediate_size": 95}, "mlp.gate_proj"),
    ({"rms_norm_eps": None}, "eps is None"), ({"rms_norm_eps": math.inf}, "eps is inf"),
    ({"rope_theta": -1.0}, "rope_base is -1"), ({"rope_theta": []}, "rope_base is []"),
    ({"max_position_embeddings": 1.5}, "block_size is 1.5"),
    ({"tie_word_embeddings": False}, "no tensor lm_head.weight")])
def test_settings_of_other_models(tmp_path, config, says):
    refused(write_folder(tmp_path / "hf", config=config), says)


@pytest.mark.parametrize("more,says", [
    ({Q: ("F32", [C, C + 1], bytes(4 * C * (C + 1)))}, "(64, 65) instead of (64, 64)"),
    ({Q: ("F32", [128, C], bytes(4 * 128 * C))}, Q),       # head_dim=32
    ({Q: ("F32", [C * C], bytes(4 * C * C))}, Q),
    ({Q: ("F32", [C, C], bytes(4 * C * C - 4))}, "16380 bytes instead of 16384"),
    ({Q: ("F32", [C, C], bytes(4 * C * C + 4))}, "16388 bytes"),
    ({Q: ("F64", [C, C], bytes(8 * C * C))}, "'F64'"), ({Q: (["x"], [C, C], b"")}, "choose"),
    ({Q: ("F8_E4M3", [C, C], bytes(C * C))}, "'F8_E4M3'"),
    ({Q: ("F32", [C, C], np.full(C * C, np.nan, "<f4").tobytes())}, "not finite"),
    ({Q: ("F16", [C, C], b"\0\x7c" * C * C)}, "not finite"),
    ({"model.layers.0.self_attn.q_proj.bias": ("F32", [C], bytes(4 * C))}, "q_proj.bias"),
    ({"model.layers.0.mlp.up_proj.bias": ("F32", [U], bytes(4 * U))}, "up_proj.bias"),
    ({"model.layers.2.mlp.up_proj.weight": ("F32", [U, C], bytes(4 * U * C))}, "layers.2")])
def test_tensors_of_other_models(tmp_path, more, says):
    refused(write_folder(tmp_path / "hf", more=more), says)


def test_angles_in_old_files(tmp_path):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", [HS // 2], bytes(2 * HS))}
    assert equal(parameters(write_folder(tmp_path / "a", more=more)),
                 parameters(write_folder(tmp_path / "b")))


def test_missing_files(tmp_path):
    refused(tmp_path / "nothing", "No such file")
    for name in ("config.json", "tokenizer.json"):
        folder = write_folder(tmp_path / f"no {name}")
        (folder / name).unlink()
        refused(folder, name, "No such file")
        (folder / name).mkdir()
        refused(folder, name, "directory")
    folder = write_folder(tmp_path / "half", files=2)
    (folder / "model-1.safetensors").unlink()
    refused(folder, "no tensor model.")
    (folder / "model-1.safetensors").write_bytes((folder / "model-0.safetensors").read_bytes())
    refused(folder, "two of its *.safetensors")
    (tmp_path / "text").write_text("a text")
    refused(tmp_path / "text", "neither a folder nor a GGUF file")
    (tmp_path / "empty").write_bytes(b"")
    refused(tmp_path / "empty")


def edited(change, pattern="smollm"):
    tokenizer = tokenizer_json(pattern)
    change(tokenizer)
    return tokenizer


def swap_ids(tokenizer):
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


@pytest.mark.parametrize("change,says", [
    (lambda t: t["model"].update(type="Unigram"), "SentencePiece"),
    (lambda t: t["model"].update(byte_fallback=True), "SentencePiece"),
    (lambda t: t.update(normalizer={"type": "NFC"}), "not byte-level BPE"),
    (lambda t: t.update(pre_tokenizer=None), "choose"),
    (lambda t: t.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (lambda t: t.update(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "pre-tokenizer"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "Digits"),
    (lambda t: t["pre_tokenizer"]["pretokenizers"].reverse(), "pre-tokenizer"),
    (swap_ids, "order of its merges"),
    (lambda t: t["model"]["merges"].reverse(), "order of its merges"),
    (lambda t: t["model"]["merges"].pop(7), "order of its merges"),
    (lambda t: t["model"].update(merges=[]), "order of its merges"),
    (lambda t: t["model"]["merges"].append("q q"), "order of its merges"),
    (lambda t: t["model"]["merges"].insert(0, "q q"), "order of its merges"),
    (lambda t: t["model"]["merges"].append("q q q"), "choose"),
    (lambda t: t["model"]["vocab"].pop(LETTER[65]), "byte 65"),
    (lambda t: t["model"]["vocab"].pop(LETTER[10]), "byte 10"),
    (lambda t: t["model"]["vocab"].pop(LETTER[0x90]), "byte 144"),
    (lambda t: t["model"]["vocab"].update({"\u2581the": 329}), "not made of bytes"),
    (lambda t: t["model"]["vocab"].update(a=7), "ids"),
    (lambda t: t["model"]["vocab"].update(a=-1), "ids"),
    (lambda t: t["model"]["vocab"].update(a=2**40), "ids"),
    (lambda t: t["model"]["vocab"].update(a="7"), "ids"),
    (lambda t: t["added_tokens"].append({"id": 330, "content": "<x>"}), "331 tokens"),
    (lambda t: t["added_tokens"].append({"content": "<x>"}), "choose"),
    (lambda t: t.update(added_tokens=[{"id": 329, "content": "<x>"}]), "ends a text"),
    (lambda t: t.pop("model"), "choose")])
def test_other_tokenizers(tmp_path, change, says):
    refused(write_folder(tmp_path / "hf", tokenizer=edited(change)), says)


def test_a_split_that_is_not_llamas(tmp_path):
    other = edited(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
        Regex=r"\p{N}{1,2}|\s+"), "llama-bpe")
    refused(write_folder(tmp_path / "hf", tokenizer=other), "pre-tokenizer")


@pytest.mark.parametrize("settings,more,says", [
    ({"general.architecture": "mamba"}, {}, "'mamba'"),
    ({"general.architecture": None}, {}, "architecture is None"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "'yarn'"),
    ({"llama.block_count": None}, {}, "n_layer is None"),
    ({"llama.attention.head_count": [4, 4]}, {}, "n_head"),
    ({"llama.vocab_size": V - 1}, {}, "token_embd"),
    ({"general.alignment": 0}, {}, "choose"), ({"general.alignment": "x"}, {}, "choose"),
    ({"tokenizer.ggml.model": "llama"}, {}, "SentencePiece"),
    ({"tokenizer.ggml.model": "bert"}, {}, "'bert'"),
    ({"tokenizer.ggml.pre": "qwen2"}, {}, "'qwen2'"), ({"tokenizer.ggml.pre": None}, {}, "None"),
    ({"tokenizer.ggml.merges": None}, {}, "choose"),
    ({"tokenizer.ggml.token_type": [1, 1]}, {}, "choose"),
    ({}, {"rope_freqs.weight": (0, (8,), bytes(32))}, "rope_freqs.weight"),
    ({}, {"blk.0.ffn_up.weight": (12, (U, C), bytes(5000))}, "'Q4_K'"),
    ({}, {"blk.0.ffn_up.weight": (99, (U, C), bytes(5000))}, "'GGML type 99'"),
    ({}, {"blk.0.ffn_up.weight": None}, "no tensor blk.0.ffn_up.weight"),
    ({}, {"blk.0.ffn_up.weight": (8, (C, U), bytes(6528))}, "(64, 96) instead of (96, 64)")])
def test_other_gguf_files(tmp_path, settings, more, says):
    if says == "choose" and "general.alignment" in settings:
        path = write_gguf(tmp_path / "m.gguf", settings={"general.alignment": 64})
        value, other = gguf_value(64), gguf_value(settings["general.alignment"])
        path.write_bytes(path.read_bytes().replace(gguf_string("general.alignment") + value,
                                                   gguf_string("general.alignment") + other))
    else:
        path = write_gguf(tmp_path / "m.gguf", settings=settings, more=more)
    refused(path, says)


@pytest.mark.parametrize("settings,version", [({}, 2), ({"general.alignment": 128}, 3),
                                              ({"llama.vocab_size": None}, 3),
                                              ({"llama.rope.scaling.type": "none"}, 3)])
def test_other_gguf_files_that_are_read(tmp_path, settings, version):
    tokens = vocabulary("smollm")
    tokens += [f"[PAD{i}]" for i in range(len(tokens), V)]               # as many as the model has
    about = {"tokenizer.ggml.tokens": tokens,
             "tokenizer.ggml.token_type": [3, 3, 3, 1, 1] + [
                 5 if token.startswith("[PAD") else 1 for token in tokens[5:]]}
    path = write_gguf(tmp_path / "m.gguf", settings=about | settings, version=version)
    assert equal(parameters(path), parameters(write_gguf(tmp_path / "plain.gguf")))


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_other_versions_of_gguf(tmp_path, version):
    refused(write_gguf(tmp_path / "m.gguf", version=version), "version")


def test_too_large_for_the_memory(tmp_path, monkeypatch):
    assert 1e8 < pretrained.free_memory() < 1e14
    monkeypatch.setattr(pretrained, "free_memory", lambda: 0.1e6)
    refused(write_folder(tmp_path / "hf"), "needs 0.0 GB")
    size = 4 * (384 * C + L * (4 * C * C + 3 * C * U))
    monkeypatch.setattr(pretrained, "free_memory", lambda: size - 1)
    refused(tmp_path / "hf", "memory")
    monkeypatch.setattr(pretrained, "free_memory", lambda: size)
    pretrained.read(tmp_path / "hf")


# --- damage --------------------------------------------------------------------------------------
def survives(path, limit=8e6):
    """A model or BadInput. Headers never take much more memory than the file, which has 0.6 MB."""
    tracemalloc.start()
    try:
        pretrained.facts(path)
        pretrained.read_tokenizer(path)
        assert tracemalloc.get_traced_memory()[1] < limit
        tracemalloc.stop()                                 # building a model is slow when traced
        pretrained.read(path)
        return True
    except BadInput as error:
        assert "\n" not in str(error) and path.name in str(error)
        assert not tracemalloc.is_tracing() or tracemalloc.get_traced_memory()[1] < limit
        return False
    finally:
        tracemalloc.stop()


def damaged(raw, header, n, rng):
    """Cuts the file, and writes over bytes of its header."""
    for i in range(n):
        yield raw[:rng.randrange(header) if i % 2 else rng.randrange(len(raw))]
        bad = bytearray(raw)
        for at in rng.sample(range(header), rng.choice([1, 1, 3])):
            bad[at] = rng.choice([0, 255, *[bad[at] ^ 1 << rng.randrange(8)] * 4])
        yield bytes(bad)


def test_damaged_gguf(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    raw, rng = path.read_bytes(), random.Random(0)
    lists = raw.index(b"tokenizer.ggml.tokens")            # the settings before are the liveliest
    info = raw.index(b"token_embd.weight", lists)
    assert survives(path)
    read = 0
    for header in (raw[:lists], raw[:len(raw) - 120_000]):
        for bad in damaged(raw, len(header), 25, rng):
            path.write_bytes(bad)
            read += survives(path)
    for at in range(info - 8, info + 60):                  # a tensor's name, shape, type, offset
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:])
        read += survives(path)
    for cut in (4, 8, 16, 24, len(raw) - 32, len(raw) - 2000):
        path.write_bytes(raw[:cut])
        assert not survives(path)
    assert 0 < read < 60


def other_values(raw, header, n, rng):
    """Puts other values in the place of numbers in a JSON text, raw[header]."""
    start, places = header.start, list(regex.finditer(rb"\b\d+\b", raw[header]))
    for place in rng.choices(places, k=n):
        other = rng.choice([b"0", b"1", b"-1", b"64", b"9" * 18, b"9" * 5000, b"1e999", b"0.5",
                            b"null", b"true", b'"7"', b"[]", b"{}", b"[[[1]]]"])
        text = raw[header][:place.start()] + other + raw[header][place.end():]
        yield (struct.pack("<Q", len(text)) if start else b"") + text + raw[header.stop:]


def test_damaged_folder(tmp_path):
    folder, rng, read = write_folder(tmp_path / "hf", kind="BF16"), random.Random(0), 0
    for name in ("model-0.safetensors", "config.json", "tokenizer.json"):
        raw = (folder / name).read_bytes()
        start = 0 if name.endswith("json") else 8
        end = start + struct.unpack("<Q", raw[:8])[0] if start else len(raw)
        for bad in [*damaged(raw, end, 20, rng), *other_values(raw, slice(start, end), 15, rng)]:
            (folder / name).write_bytes(bad)
            read += survives(folder)
        for bad in (b"", b"[]", b"{}", b"5", b"\xff" * 9, b"[" * 100_000, b'{"a":' * 100_000,
                    struct.pack("<Q", 100_000) + b"[" * 100_000, struct.pack("<Q", 2) + b"{}",
                    struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2**60) + b"{}",
                    struct.pack("<Q", 2**28) + b"{}", struct.pack("<Q", 2**63) + bytes(9)):
            (folder / name).write_bytes(bad)
            assert not survives(folder)
        (folder / name).write_bytes(raw)
    assert survives(folder) and 0 < read < 30


@pytest.mark.parametrize("offsets", [[-8, 16376], [0, -1], [2**62, 2**62 + 16384], [0.0, 16384.0],
                                     [None, 1], [0], "ab", {}, [10**400, 10**400 + 16384],
                                     [16384, 0], [600_000, 616_384]])
def test_offsets_outside(tmp_path, offsets):
    folder = write_folder(tmp_path / "hf")
    path = folder / "model-0.safetensors"
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    header[Q]["data_offsets"] = offsets
    header = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[end:])
    with pytest.raises(BadInput):
        pretrained.facts(folder)                           # before any weights are read
    assert not survives(folder)


@pytest.mark.parametrize("at,count", [(8, "<Q"), (16, "<Q"), (24, "<Q")])
@pytest.mark.parametrize("n", [2**20, 2**40, 2**63, 2**64 - 1])
def test_counts_outside(tmp_path, at, count, n):
    """Of tensors, of settings, of a string's bytes."""
    path = write_gguf(tmp_path / "m.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw[:at] + struct.pack(count, n) + raw[at + 8:])
    assert not survives(path)
    lists = raw.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    for kind in (8, 0, 12, 9, 77):                         # lists of strings, u8, f64, lists, ?
        path.write_bytes(raw[:lists] + struct.pack("<IQ", kind, n) + raw[lists + 12:])
        assert not survives(path)
