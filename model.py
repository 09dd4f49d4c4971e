"""A small modern GPT in one file. It knows nothing of tasks or techniques.

RMSNorm without weights, rotary positions, QK-norm, fused QKV, ReLU^2 MLP, zero-initialised output
projections, tied embeddings, no biases.

Three plain ways in, for the scripts that look inside:
  model.residuals(idx)         the residual stream after the embedding and after every block
  model.blocks[i].head(h)      views of one attention head's weights
  model.blocks[i].units(js)    views of some MLP units' weights
"""
import hashlib
import io
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import write


@dataclass
class GPTConfig:
    vocab_size: int          # as the tokenizer counts it; padded to a multiple of 64 inside only
    block_size: int = 64     # T: the longest sequence, prompt and answer together
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128        # C: width of the residual stream

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of 2 * n_head "
                             f"(n_head={self.n_head}): rotary positions turn pairs of channels")


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn channel pairs of x (B, T, nh, hs) by their angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k = rotate(norm(q), cos, sin), rotate(norm(k), cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                     # (B, nh, T, hs)
        if x.device.type == "cpu":             # where the backward of bf16 attention is 3x slower
            q, k, v = q.float(), k.float(), v.float()
        mask = None
        if cache is not None:
            k, v, mask = cache.append(self, k, v)                            # (B, nh, S, hs)
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attn(norm(x), cos, sin, cache)
        return x + self.mlp(norm(x))

    def head(self, h):
        """Views of head h's weights: what it reads, (3, hs, C) for q, k and v, and writes, (C, hs).

        h is an int or a slice (then (3, n, hs, C) and (C, n, hs)).
        """
        C, n = self.attn.proj.in_features, self.attn.n_head
        return (self.attn.qkv.weight.view(3, n, C // n, C)[:, h],
                self.attn.proj.weight.view(C, n, C // n)[:, h])

    def units(self, js):
        """Views of MLP units js (a slice): what they read, (n, C), and what they write, (C, n)."""
        return self.mlp.up.weight[js], self.mlp.down.weight[:, js]


class KVCache:
    """Keys and values of every layer, for B rows of at most S tokens, allocated at first use.

    Ragged prompts are padded on the left, so that all rows stand at the same column; `pad` (B,)
    says how many columns of each row are padding. Rotary attention sees only distances, so a row's
    columns serve as its positions.
    """

    def __init__(self, S, pad):
        self.kv = {}                                   # layer -> (2, B, nh, S, hs)
        self.pad, self.length = pad, 0
        self.columns = torch.arange(S, device=pad.device)

    def start(self, T):
        """Makes room for T more columns; returns their positions and builds the attention mask."""
        rows = self.columns[self.length:self.length + T]
        seen = self.columns <= rows[:, None]                                  # (T, S): no future
        real = self.columns >= self.pad[:, None, None]                      # (B, 1, S): no padding
        itself = self.columns == rows[:, None]         # a padding row sees itself: no empty softmax
        self.mask = ((seen & real) | itself)[:, None]                         # (B, 1, T, S)
        self.length += T
        return rows

    def append(self, layer, k, v):
        T = k.size(2)
        if layer not in self.kv:
            B, nh, _, hs = k.shape
            self.kv[layer] = k.new_zeros(2, B, nh, len(self.columns), hs)
        kv = self.kv[layer]
        kv[:, :, :, self.length - T:self.length] = torch.stack((k, v))
        return kv[0], kv[1], self.mask


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding((config.vocab_size + 63) // 64 * 64, config.n_embd)   # and output
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        half = config.n_embd // config.n_head // 2
        speed = 10000.0 ** -(torch.arange(half) / half)
        angle = torch.outer(torch.arange(config.block_size), speed)
        self.register_buffer("cos", angle.cos()[:, None], persistent=False)           # (T, 1, hs/2)
        self.register_buffer("sin", angle.sin()[:, None], persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed=None):
        """wte normal(0, .02); qkv and up uniform with std 1/sqrt(C); proj and down zero.

        With both output projections at zero every block starts as the identity.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.wte.weight.copy_(0.02 * torch.randn(self.wte.weight.shape, generator=generator))
        for block in self.blocks:
            for w in (block.attn.qkv.weight, block.mlp.up.weight):
                bound = (3 / w.size(1)) ** 0.5
                w.copy_(bound * (2 * torch.rand(w.shape, generator=generator) - 1))
            for w in (block.attn.proj.weight, block.mlp.down.weight):
                w.zero_()

    def residuals(self, idx, cache=None):
        """The residual stream (B, T, C) after the embedding and after each block: n_layer + 1."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens in a row, but block_size is {self.config.block_size}")
        at = slice(0, T) if cache is None else cache.start(T)
        cos, sin = self.cos[at], self.sin[at]
        stream = [norm(self.wte(idx))]
        for block in self.blocks:
            stream.append(block(stream[-1], cos, sin, cache))
        return stream

    def unembed(self, x):
        """Logits (..., vocab_size) of a residual (..., C); the vocabulary's padding is cut off."""
        return F.linear(norm(x), self.wte.weight)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V), or with targets (B, T) the mean loss in nats."""
        logits = self.unembed(self.residuals(idx, cache)[-1])
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=0.0, stop=None, seed=0):
        """Continues every prompt, all rows at once, with a KV cache.

        prompts         list of B non-empty lists of token ids, of any lengths
        temperature     0 is greedy; 1 samples from the model's own distribution
        stop            token id: a row that emits it is filled with it from there on
        returns         (B, max_new_tokens) int64
        raises          ValueError when the longest prompt and the answer exceed block_size
        """
        if not prompts or not all(len(p) for p in prompts):
            raise ValueError("generate needs at least one prompt, and no empty ones")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        B, longest = len(prompts), max(len(p) for p in prompts)
        if longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"prompt of {longest} and answer of {max_new_tokens} tokens do not "
                             f"fit block_size {self.config.block_size}")
        device = self.wte.weight.device
        pad = torch.tensor([longest - len(p) for p in prompts], device=device)
        idx = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        cache = KVCache(longest + max_new_tokens, pad)
        generator = torch.Generator(device).manual_seed(seed)
        done = torch.zeros(B, dtype=torch.bool, device=device)
        out = []
        for _ in range(max_new_tokens):
            x = self.residuals(idx, cache)[-1][:, -1]          # only the last column is unembedded
            logits = self.unembed(x).float()                                            # (B, V)
            if temperature < 1e-3:                     # so near to greedy that dividing overflows
                new = logits.argmax(-1)
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1,
                                        generator=generator)[:, 0]
            if stop is not None:
                new = torch.where(done, stop, new)
                done |= new == stop
            out.append(new)
            idx = new[:, None]
        return torch.stack(out, 1)


SEAL = b"sha256:"            # a model file is what torch.save writes, then SEAL and its digest


def write_model(path, model, made_with, record):
    """Weights, config, steps, history and cost (of fit) to a file; all or nothing."""
    buffer = io.BytesIO()
    torch.save({"model": {k: v.detach().cpu() for k, v in model.state_dict().items()},
                "config": asdict(model.config), "made_with": made_with,
                **{k: record[k] for k in ("steps", "flops", "history")}}, buffer)
    body = buffer.getvalue()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(path, body + SEAL + hashlib.sha256(body).digest())


def read_model(path, device="cpu"):
    """(GPT, the dict that write_model wrote). ValueError, in one line, if it is no such file."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing: train.py, unlearn.py and undo.py make models")
    content = Path(path).read_bytes()
    cut = len(content) - len(SEAL) - 32
    if cut <= 0 or content[cut:] != SEAL + hashlib.sha256(content[:cut]).digest():
        raise ValueError(f"{path} is damaged (its checksum does not fit): delete it to make it "
                         f"again")
    try:
        checkpoint = torch.load(io.BytesIO(content[:cut]), map_location=device, weights_only=True)
        model = GPT(GPTConfig(**checkpoint["config"])).to(device)
        model.load_state_dict(checkpoint["model"])
        checkpoint["made_with"]["task"]
    except (pickle.UnpicklingError, RuntimeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model of this project "
                         f"({type(error).__name__})") from None
    return model, checkpoint
