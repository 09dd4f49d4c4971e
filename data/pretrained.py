"""Reads a pretrained language model of the Llama family (Touvron et al. 2023) from disk.

    model, enc = read(path)          a GPT in float32 and its tiktoken.Encoding
    enc = read_tokenizer(path)       the Encoding alone
    record = facts(path)             what identifies the model

path is a folder of the Hugging Face hub (config.json, tokenizer.json, *.safetensors) or a .gguf
file of llama.cpp; data/checkpoint.py reads their headers. All three functions raise BadInput, one
line, if they cannot use what is there.

A GPT has norms without weights, and as many key heads as query heads. Therefore each norm's weight
w moves into the matrix M behind the norm, because M (w * x) = (M diag(w)) x, and each key-value
head is repeated for the queries that share it. Neither changes the logits. The last norm's weight
stays where it is if the matrix behind it is the embedding, too (a tied model).
"""
import math
import re
from itertools import chain
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import tiktoken
import torch

from data.checkpoint import check, load, read_folder, read_gguf, read_json, reading
from data.tokenizer import END
from engine.knobs import BadInput
from model import GPT, GPTConfig, rotations

CONTEXT = 2048               # the longest block_size that read() gives a model
MOST_UNUSED = 4096           # ids that stand for no token

# Our names, and those (in a folder, in a GGUF file)
SETTINGS = {
    "architecture": ("model_type", "general.architecture"),
    "rope scaling": ("rope_type", "llama.rope.scaling.type"),
    "activation": ("hidden_act", None),
    "vocab_size": ("vocab_size", "llama.vocab_size"),
    "block_size": ("max_position_embeddings", "llama.context_length"),
    "n_layer": ("num_hidden_layers", "llama.block_count"),
    "n_head": ("num_attention_heads", "llama.attention.head_count"),
    "n_embd": ("hidden_size", "llama.embedding_length"),
    "n_units": ("intermediate_size", "llama.feed_forward_length"),
    "n_kv_head": ("num_key_value_heads", "llama.attention.head_count_kv"),
    "rope_base": ("rope_theta", "llama.rope.freq_base"),
    "eps": ("rms_norm_eps", "llama.attention.layer_norm_rms_epsilon"),
}
# The same, and the shape: V vocab_size, C n_embd, U n_units, K n_kv_head * hs
TENSORS = {
    "wte": ("model.embed_tokens", "token_embd", "VC"),
    "norm": ("model.norm", "output_norm", "C"),
    "head": ("lm_head", "output", "VC"),
}
BLOCK_TENSORS = {            # behind "model.layers.0." or "blk.0."
    "attn.norm": ("input_layernorm", "attn_norm", "C"),
    "attn.q": ("self_attn.q_proj", "attn_q", "CC"),
    "attn.k": ("self_attn.k_proj", "attn_k", "KC"),
    "attn.v": ("self_attn.v_proj", "attn_v", "KC"),
    "attn.proj": ("self_attn.o_proj", "attn_output", "CC"),
    "mlp.norm": ("post_attention_layernorm", "ffn_norm", "C"),
    "mlp.gate": ("mlp.gate_proj", "ffn_gate", "UC"),
    "mlp.up": ("mlp.up_proj", "ffn_up", "UC"),
    "mlp.down": ("mlp.down_proj", "ffn_down", "CU"),
}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4                      # kinds of tokens in GGUF

# How a tokenizer cuts text into words. It merges bytes inside a word only
CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
PATTERNS = {
    "gpt-2": CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-2's for the text between two digits, which ends there: hence \p{N} in the look-ahead
    "smollm": CONTRACTION + r"|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "llama-bpe": rf"(?i:{CONTRACTION})" r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True,
              "trim_offsets": True}
PRE_TOKENIZERS = {                                                       # in tokenizer.json
    "gpt-2": [BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    "llama-bpe": [{"type": "Split", "pattern": {"Regex": PATTERNS["llama-bpe"]},
                   "behavior": "Isolated", "invert": False}, BYTE_LEVEL | {"use_regex": False}],
}


class Checkpoint(NamedTuple):
    """A model whose weights are still on disk."""
    name: str
    config: GPTConfig
    n_kv_head: int
    tensors: dict            # {"wte", "norm", "0.attn.norm", ..: Tensor}; no "head": it is tied
    is_gguf: bool


# --- the model -----------------------------------------------------------------------------------
def examine(path):
    """The Checkpoint at a path. Its tensors have the right shapes and are inside their files."""
    is_gguf = not path.is_dir()
    about, found = read_gguf(path) if is_gguf else read_folder(path)
    rope = about.get("rope_parameters") or about.get("rope_scaling") or {}
    about = about | rope | {"rope_type": rope.get("rope_type", rope.get("type"))}
    about.setdefault("llama.vocab_size", len(about.get("tokenizer.ggml.tokens", ())))
    config, n_kv_head = configure({ours: about.get(names[is_gguf])
                                   for ours, names in SETTINGS.items()})
    tensors, may_be_tied = {}, about.get("tie_word_embeddings", is_gguf)
    for ours, name, shape in layout(config, n_kv_head, is_gguf):
        if name in found:
            tensors[ours] = check(name, found.pop(name), shape)
        elif ours != "head" or not may_be_tied:
            raise ValueError(f"it has no tensor {name}")
    # What is left would change the logits. Only the angles that old files store would not
    if left := [name for name in found if not name.endswith("rotary_emb.inv_freq")]:
        raise ValueError(f"a plain Llama has no tensor {left[0][:99]!r}: biases, experts and scaled"
                         f" rotary positions cannot be read")
    name = str(about.get("general.name", path.absolute().name))
    config.tied = config.gain = "head" not in tensors
    return Checkpoint(name, config, n_kv_head, tensors, is_gguf)


def configure(about):
    """(GPTConfig, n_kv_head) from the values of SETTINGS, None for those that a file leaves out."""
    for name, right in {"architecture": ["llama"], "activation": [None, "silu"],
                        "rope scaling": [None, "none", "default"]}.items():
        if (value := about.pop(name)) not in right:
            raise ValueError(f"its {name} is {short(value)}, and only {right[-1]!r} can be read")
    for name, default in {"n_kv_head": about["n_head"], "rope_base": 10000.0}.items():
        about[name] = default if about[name] is None else about[name]
    for name, n in about.items():
        kinds = (int, float) if name in ("rope_base", "eps") else (int,)
        if type(n) not in kinds or not 0 < n < 2**31:
            raise ValueError(f"its {name} is {short(n)}")
    n_kv_head = about.pop("n_kv_head")
    if about["n_head"] % n_kv_head:
        raise ValueError(f"{n_kv_head} key-value heads do not divide {about['n_head']} heads")
    about["block_size"] = min(about["block_size"], CONTEXT)
    return GPTConfig(**about, qk_norm=False, norm_wte=False, gated=True), n_kv_head


def layout(config, n_kv_head, is_gguf):
    """Yields (our name, the file's name, shape) of every tensor."""
    width = {"V": config.vocab_size, "C": config.n_embd, "U": config.n_units,
             "K": config.n_embd // config.n_head * n_kv_head}
    blocks = ((BLOCK_TENSORS, f"{i}.", f"{'blk' if is_gguf else 'model.layers'}.{i}.")
              for i in range(config.n_layer))
    for table, ours, theirs in chain([(TENSORS, "", "")], blocks):
        for name, (*names, shape) in table.items():
            yield ours + name, f"{theirs}{names[is_gguf]}.weight", tuple(width[x] for x in shape)


def weights(checkpoint):
    """Yields (name, tensor) of a GPT's state_dict, one at a time."""
    _, config, _, tensors, is_gguf = checkpoint
    C, n_head, hs = config.n_embd, config.n_head, config.n_embd // config.n_head

    def get(name):
        return load(tensors[name])

    def heads(name):
        """(nh, hs, C), of (n_kv_head, hs, C) for keys and values"""
        w = get(name).view(-1, hs, C)
        if is_gguf and not name.endswith("v"):    # GGUF rotates neighbours, we i and i + hs/2
            w = w.view(-1, hs // 2, 2, C).transpose(1, 2).reshape(-1, hs, C)
        return w.repeat_interleave(n_head // len(w), 0)

    def padded(w):
        return torch.cat((w, w.new_zeros(-len(w) % 64, C)))

    yield "wte.weight", padded(get("wte"))
    if config.tied:
        yield "gain", get("norm")
    else:
        yield "head.weight", padded(get("head")) * get("norm")
    for i in range(config.n_layer):
        qkv = torch.stack([heads(f"{i}.attn.{x}") for x in "qkv"])             # (3, nh, hs, C)
        yield f"blocks.{i}.attn.qkv.weight", qkv.view(3 * C, C) * get(f"{i}.attn.norm")
        yield f"blocks.{i}.attn.proj.weight", get(f"{i}.attn.proj")
        for x in ("up", "gate"):
            yield f"blocks.{i}.mlp.{x}.weight", get(f"{i}.mlp.{x}") * get(f"{i}.mlp.norm")
        yield f"blocks.{i}.mlp.down.weight", get(f"{i}.mlp.down")


def free_memory():
    """Bytes of memory that Linux can give without swapping; infinity on other systems."""
    try:
        return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf


def read(path):
    """(model, enc): a GPT in float32 whose block_size is the file's, but at most CONTEXT; and the
    tiktoken.Encoding that read_tokenizer gives."""
    path = Path(path)
    with reading(path):
        checkpoint, enc = examine(path), read_tokenizer(path)
        config = checkpoint.config
        if enc.n_vocab > config.vocab_size:
            raise ValueError(f"its tokenizer has {enc.n_vocab} tokens, but the model only "
                             f"{config.vocab_size}")
        with torch.device("meta"):                # random weights would cost more time than reading
            model = GPT(config)
        needed, free = 4 * sum(p.numel() for p in model.parameters()), free_memory()
        if needed > free:
            raise BadInput(f"{path} needs {needed / 1e9:.1f} GB in float32, but {free / 1e9:.1f} GB"
                           f" of memory are free: choose a smaller model")
        model.load_state_dict(dict(weights(checkpoint)), assign=True)
        for name, table in rotations(config).items():
            setattr(model, name, table)
    return model, enc


def facts(path):
    """A dict of what identifies a model: its name, sizes, and its weights' files with their bytes.
    """
    path = Path(path)
    with reading(path):
        name, config, n_kv_head, tensors, _ = examine(path)
        return {"name": name, "n_layer": config.n_layer, "n_head": config.n_head,
                "n_kv_head": n_kv_head, "n_embd": config.n_embd, "vocab_size": config.vocab_size,
                "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
                "files": {file.name: file.stat().st_size
                          for file in sorted({tensor.file for tensor in tensors.values()})}}


def is_pretrained(name):
    """Whether a command line means a pretrained model's file or folder, not the name of ours."""
    return name.endswith(".gguf") or Path(name).is_dir()


# --- the tokenizer -------------------------------------------------------------------------------
def read_tokenizer(path):
    """The tiktoken.Encoding of a model, without reading weights. Its ids are the model's, and END
    (eot_token) separates documents, whatever the file calls that token. A text's characters for
    whose bytes the vocabulary has no token (in SmolLM2, a few control codes) are dropped."""
    path = Path(path)
    with reading(path):
        return encoding(path.absolute().name,
                        *(folder_tokens if path.is_dir() else gguf_tokens)(path))


def folder_tokens(path):
    """(pattern, tokens {text: id}, special {text: id}, merges [(text, text)], id of the end, number
    of ids)"""
    about, settings = read_json(path / "tokenizer.json"), read_json(path / "config.json")
    bpe, pre = about["model"], about["pre_tokenizer"]
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or about.get("normalizer"):
        raise ValueError("its tokenizer is not byte-level BPE (perhaps SentencePiece)")
    parts = [BYTE_LEVEL | part | {"trim_offsets": True} if part["type"] == "ByteLevel" else part
             for part in (pre["pretokenizers"] if pre["type"] == "Sequence" else [pre])]
    pattern = next((name for name, known in PRE_TOKENIZERS.items() if known == parts), parts)
    special = {token["content"]: token["id"] for token in about["added_tokens"]}
    tokens = {text: i for text, i in bpe["vocab"].items() if text not in special}
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in bpe["merges"]]
    return (pattern, tokens, special, merges, settings.get("eos_token_id"),
            settings.get("vocab_size"))


def gguf_tokens(path):
    """As folder_tokens."""
    about = read_gguf(path)[0]
    pattern, model, texts, kinds, merges, end = (about.get(f"tokenizer.ggml.{key}") for key in (
        "pre", "model", "tokens", "token_type", "merges", "eos_token_id"))
    if model != "gpt2":
        raise ValueError(f"its tokenizer is {'SentencePiece' if model == 'llama' else short(model)}"
                         f", not byte-level BPE")
    tokens, special = ({text: i for i, (text, kind) in enumerate(zip(texts, kinds))
                        if kind in those} for those in ([NORMAL], [UNKNOWN, CONTROL, USER_DEFINED]))
    return (pattern, tokens, special, [pair.split(" ") for pair in merges], end,
            about.get("llama.vocab_size", len(texts)))


def encoding(name, pattern, tokens, special, merges, end, n_vocab):
    """The tiktoken.Encoding of what folder_tokens gives.

    Of all neighbours that spell a token, tiktoken merges those first whose token has the smallest
    id. Therefore the merges must be in the order of ids, and must make every token that tiktoken
    could make.
    """
    if pattern not in list(PATTERNS):
        raise ValueError(f"its pre-tokenizer is {short(pattern)}, not one of "
                         f"{', '.join(PATTERNS)}")
    ids = [*tokens.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids) or len(set(ids)) < len(ids):
        raise ValueError("the ids of its tokens are not different whole numbers")
    if type(n_vocab) is not int or n_vocab > len(ids) + MOST_UNUSED:
        raise ValueError(f"its vocabulary has {short(n_vocab)} ids, its tokenizer {len(ids)}")
    made = {a + b: tokens.get(a + b, -1) for a, b in merges}
    unmade = (text for text in tokens.keys() - made.keys()
              if any(text[:i] in tokens and text[i:] in tokens for i in range(1, len(text))))
    if -1 in made.values() or [*made.values()] != sorted(made.values()) or any(unmade):
        raise ValueError("the ids of its tokens are not in the order of its merges")
    # In these files, a byte that is no printable character stands as one of Ā, ā, .. (GPT-2)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printable))
    byte = dict(zip(map(chr, [*printable, *range(256, 256 + len(others))]), printable + others))
    if odd := [text for text in tokens if not byte.keys() >= set(text)]:
        raise ValueError(f"its token {short(odd[0])} is not made of bytes as in byte-level BPE")
    ranks = {bytes(byte[c] for c in text): i for text, i in tokens.items()}
    absent = ""                              # tiktoken panics at a byte without a token
    for b in {*range(0xf5)} - {0xc0, 0xc1} - {text[0] for text in ranks if len(text) == 1}:
        if 0xf1 <= b <= 0xf3:                                        # begins one of 2^18 characters
            absent += rf"\x{{{b - 0xf0 << 18:x}}}-\x{{{(b - 0xef << 18) - 1:x}}}"
        elif b < 9 or 13 < b < 32:
            absent += rf"\x{{{b:x}}}"
        else:
            raise ValueError(f"its tokenizer has no token for the byte {b}")
    end = next((special[text] for text in (END, "<|end_of_text|>") if text in special),
               end[0] if isinstance(end, list) else end)
    if end not in special.values():
        raise ValueError("it does not say which token ends a text")
    # What the model can say must have a text: it may have more ids than the tokenizer
    special |= {f"<|unused {i}|>": i for i in sorted({*range(n_vocab)} - {*ids})}
    return tiktoken.Encoding(name, mergeable_ranks=ranks, special_tokens=special | {END: end},
                             pat_str=PATTERNS[pattern].replace(r"\p{N}]", rf"\p{{N}}{absent}]"))
