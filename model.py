"""A small modern GPT in one file. It knows nothing of tasks or techniques.

RMSNorm without weights, rotary positions, QK-norm, fused QKV, ReLU^2 MLP, zero-initialised output
projections, tied embeddings, no biases. By the last flags of GPTConfig it is a model of the Llama
family (Touvron et al. 2023): data/pretrained.py reads such models from disk.

Four plain ways in, for the scripts that look inside:
  model.residuals(idx)         the residual stream after the embedding and after every block
  model.blocks[i].head(h)      views of one attention head's weights
  model.blocks[i].units(js)    views of some MLP units' weights
  model(idx, hook=hook)        hook(site, i, h) receives h, which block i computed at a site, and
                               returns what the model uses in its place. The sites are "heads"
                               (B, T, nh, hs) before proj, "units" (B, T, n_units) before down, and
                               "residual" (B, T, C) after the block
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

from engine.disk import read_sealed, write_sealed
from engine.hardware import compiled as compiled_step
from engine.streams import torch_stream

LOGITS = 2**24          # most logits in memory at once (64 MB in float32); a loss works in chunks


@dataclass
class GPTConfig:
    vocab_size: int          # the tokenizer's; the model pads it to a multiple of 64 internally
    block_size: int = 64     # T: the longest sequence, prompt and answer together
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128        # C: width of the residual stream
    n_units: int = 0         # MLP units in a block; 0: 4 C
    rope_base: float = 10000.0
    qk_norm: bool = True     # queries and keys are normalised
    norm_wte: bool = True    # so is the embedding
    gated: bool = False      # MLP units are silu(gate x) (up x) instead of relu(up x)^2
    tied: bool = True        # the embedding also unembeds
    gain: bool = False       # the last norm has a weight, a constant; the others' are in matrices
    eps: float | None = None     # of RMSNorm; None: the smallest step of the type

    def __post_init__(self):
        self.n_units = self.n_units or 4 * self.n_embd
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of 2 * n_head "
                             f"(n_head={self.n_head}): rotary positions turn pairs of channels")


def cross_entropy(logits, targets):
    """The sum over rows, in nats: logits (N, V) in float32, targets (N,) token ids."""
    return F.cross_entropy(logits, targets, reduction="sum")


def norm(x, eps=None):
    return F.rms_norm(x, (x.size(-1),), eps=eps)


def rotations(config):
    """{"cos", "sin"}: (T, 1, 1, hs / 2) each, of the angles of rotary positions."""
    half = config.n_embd // config.n_head // 2
    speed = config.rope_base ** -(torch.arange(half) / half)
    angle = torch.outer(torch.arange(config.block_size), speed)[:, None, None]
    return {"cos": angle.cos(), "sin": angle.sin()}


def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021): turn channel pairs of x (B, T, .., hs) by their angle."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


def untouched(site, h):
    """The hook that changes nothing."""
    return h


def attend(q, k, v):
    """Causal attention of (B, nh, T, hs). It is torch's own function, except in bf16 on a CPU.
    There, its backward pass is several times slower than the plain products below. Casting to
    float32 would be more precise, but takes twice as long.
    """
    T = q.size(2)
    if q.device.type != "cpu" or q.dtype == torch.float32 or T > 512:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    future = torch.full((T, T), -torch.inf, dtype=q.dtype).triu(1)
    return (q * q.size(-1) ** -0.5 @ k.transpose(2, 3) + future).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cos, sin, cache=None, hook=untouched):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk = norm(qkv[:, :, :2]) if self.qk_norm else qkv[:, :, :2]
        q, k = rotate(qk, cos, sin).unbind(2)                          # both at once: fewer kernels
        q, k, v = (t.transpose(1, 2) for t in (q, k, qkv[:, :, 2]))          # (B, nh, T, hs)
        dtype = torch.float32 if cache and x.device.type == "cpu" else v.dtype
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if cache is None:
                y = attend(q, k, v)
            else:
                k, v, mask = cache.append(self, k, v)                        # (B, nh, S, hs)
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(hook("heads", y.transpose(1, 2)).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.n_units, bias=False)
        self.down = nn.Linear(config.n_units, config.n_embd, bias=False)
        self.gate = (nn.Linear(config.n_embd, config.n_units, bias=False) if config.gated else
                     None)

    def forward(self, x, hook=untouched):
        h = (F.relu(self.up(x)).square() if self.gate is None else
             F.silu(self.gate(x)) * self.up(x))
        return self.down(hook("units", h))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.eps = config.eps

    def forward(self, x, cos, sin, cache=None, hook=untouched):
        x = x + self.attn(norm(x, self.eps), cos, sin, cache, hook)
        return hook("residual", x + self.mlp(norm(x, self.eps), hook))

    def head(self, h):
        """Views of head h's weights: those that read, (3, hs, C) for q, k and v, and those that
        write, (C, hs).

        h is an int or a slice. For a slice of n heads, the shapes are (3, n, hs, C) and (C, n, hs).
        """
        C, n = self.attn.proj.in_features, self.attn.n_head
        return (self.attn.qkv.weight.view(3, n, C // n, C)[:, h],
                self.attn.proj.weight.view(C, n, C // n)[:, h])

    def units(self, js):
        """Views of the weights of MLP units js (a slice): those that read, (n, C), those that
        write, (C, n), and those of the gate, (n, C), if there is one."""
        gate = () if self.mlp.gate is None else (self.mlp.gate.weight[js],)
        return self.mlp.up.weight[js], self.mlp.down.weight[:, js], *gate


class KVCache:
    """Keys and values of every layer, for B rows of at most S tokens, allocated at first use.

    Prompts of different lengths are padded on the left, so that all rows end at the same column;
    `pad` (B,) says how many columns of each row are padding. Rotary attention depends on distances
    only, so a row's columns serve as its positions.

    The number of filled columns is a tensor, and a compiled step looks at all S columns. A compiler
    therefore sees the same computation at every step of decoding. An eager step looks at the filled
    columns only.
    """

    def __init__(self, S, pad):
        self.kv = {}                                   # layer -> (2, B, nh, S, hs)
        self.columns = torch.arange(S, device=pad.device)
        self.pad, self.filled = pad[:, None, None], 0
        self.end = torch.zeros((), dtype=torch.int64, device=pad.device)

    def start(self, T):
        """Makes room for T more columns, builds the attention mask, returns their positions."""
        columns = self.columns
        if not torch.compiler.is_compiling():
            self.filled += T
            columns = columns[:self.filled]
        self.rows = self.end + self.columns[:T]
        seen = columns <= self.rows[:, None]                                  # (T, S): no future
        itself = columns == self.rows[:, None]   # padding attends to itself: its softmax is defined
        mask = torch.where((seen & (columns >= self.pad)) | itself, 0.0, -torch.inf)  # (B, T, S)
        self.mask = mask[:, None]                                             # (B, 1, T, S)
        self.end = self.end + T
        return self.rows

    def append(self, layer, k, v):
        if layer not in self.kv:
            B, nh, _, hs = k.shape
            self.kv[layer] = k.new_zeros(2, B, nh, len(self.columns), hs)
        kv = self.kv[layer]
        kv.index_copy_(3, self.rows, torch.stack((k, v)))
        k, v = kv[:, :, :, :self.mask.size(-1)]
        return k, v, self.mask.to(k.dtype)

    def repeat(self, n):
        """Copies every row n times, or row i n[i] times; the copies stand next to each other."""
        self.kv = {layer: kv.repeat_interleave(n, 1) for layer, kv in self.kv.items()}
        self.pad = self.pad.repeat_interleave(n, 0)


def sample(probabilities, generator):
    """(B,) token ids from (B, V), by inversion. This draws one number for each row, whereas
    torch.multinomial draws one for each token of the vocabulary."""
    reached = probabilities.cumsum(-1)
    uniform = torch.rand(len(reached), 1, generator=generator, device=reached.device)
    new = torch.searchsorted(reached, uniform * reached[:, -1:], right=True)[:, 0]
    return new.clamp(max=reached.size(-1) - 1)          # rounding may put the number past the end


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        padded = (config.vocab_size + 63) // 64 * 64
        self.wte = nn.Embedding(padded, config.n_embd)                    # and output, if tied
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.head = None if config.tied else nn.Linear(config.n_embd, padded, bias=False)
        self.register_buffer("gain", torch.ones(config.n_embd) if config.gain else None)
        for name, table in rotations(config).items():
            self.register_buffer(name, table, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Draws all weights from a torch.Generator (None: from torch's global generator).

        wte, head       normal(0, .02)
        qkv, up, gate   uniform, with standard deviation 1/sqrt(C)
        proj, down      zero, so that every block starts as the identity
        """
        for name, w in self.named_parameters():
            part = name.split(".")[-2]
            if part in ("wte", "head"):
                w.copy_(0.02 * torch.randn(w.shape, generator=generator))
            elif part in ("proj", "down"):
                w.zero_()
            else:
                bound = (3 / w.size(1)) ** 0.5
                w.copy_(bound * (2 * torch.rand(w.shape, generator=generator) - 1))

    def clone(self):
        """A new model with a copy of these weights."""
        copy = GPT(self.config).to(self.wte.weight)
        copy.load_state_dict(self.state_dict())
        return copy

    def rectangles(self, heads, units):
        """[(matrix, index)]: pieces of the blocks' matrices. Each matrix is cut where the block's
        last `heads` heads or its last `units` MLP units begin. qkv is also cut into q, k and v."""
        C, m = self.config.n_embd, self.config.n_units
        every, cut = slice(None), C - heads * C // self.config.n_head
        found = []
        for block in self.blocks:
            qkv, proj = block.attn.qkv.weight, block.attn.proj.weight
            up, down = block.mlp.up.weight, block.mlp.down.weight
            for a, b in ((0, cut), (cut, C)) if heads else ():
                found += [(qkv, slice(begin + a, begin + b)) for begin in (0, C, 2 * C)]
                found.append((proj, (every, slice(a, b))))
            for some in (slice(m - units), slice(m - units, m)) if units else ():
                found += [(up, some), (down, (every, some))]
        return found

    def residuals(self, idx, cache=None, hook=None):
        """List of n_layer + 1: the residual (B, T, C) after the embedding and after each block."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens in a row, but block_size is {self.config.block_size}")
        at = slice(0, T) if cache is None else cache.start(T)
        cos, sin = self.cos[at], self.sin[at]
        x = self.wte(idx)
        stream = [norm(x) if self.config.norm_wte else x]
        for i, block in enumerate(self.blocks):
            at = (lambda site, h, i=i: hook(site, i, h)) if hook else untouched
            stream.append(block(stream[-1], cos, sin, cache, at))
        return stream

    def unembed(self, x):
        """Logits (..., vocab_size) of a residual (..., C), without the vocabulary's padding."""
        table, x = self.wte if self.head is None else self.head, norm(x, self.config.eps)
        x = x if self.gain is None else x * self.gain
        return F.linear(x, table.weight)[..., :self.config.vocab_size]

    def forward(self, idx, targets=None, criterion=cross_entropy, cache=None, residual=None,
                hook=None):
        """idx (B, T) int64 -> logits (B, T, V), unless one of these asks for something else:

        targets    (B, T, ...): returns the mean loss over tokens, computed in float32.
                   (B, n, ...) with n < T: the mean is over the last n tokens of each row
        criterion  the loss: a function of (N, V) logits in float32 and (N, ...) targets, which
                   returns the sum over rows
        residual   an index into residuals(): returns that residual, (B, T, C)
        hook       changes what blocks compute: see the top of this file
        """
        stream = self.residuals(idx, cache, hook)
        if residual is not None:
            return stream[residual]
        if targets is None:
            return self.unembed(stream[-1])

        def loss(x, targets):
            return criterion(self.unembed(x).float(), targets)

        x, targets = stream[-1][:, -targets.size(1):].flatten(0, 1), targets.flatten(0, 1)
        rows = max(LOGITS // self.config.vocab_size, 1)
        if len(x) <= rows:
            return loss(x, targets) / len(x)
        # Logits are by far the largest tensor. None are kept: backward recomputes each chunk's
        return sum(checkpoint(loss, *chunk, use_reentrant=False)
                   for chunk in zip(x.split(rows), targets.split(rows))) / len(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=0.0, stop=None, seed=0, compiled=False,
                 hook=None, samples=1):
        """Continues all prompts together, with a KV cache.

        prompts         list of B non-empty lists of token ids, of any lengths; or (B, T) int64
        temperature     0 is greedy; 1 samples from the model's own distribution
        stop            token id; a row that emits it is filled with it from there on
        hook            changes what blocks compute: see the top of this file
        compiled        compile the decoding step; faster for long answers on a GPU (bench.py)
        samples         answers to each prompt; they are next to each other in the result. The
                        prompt is computed only once
        returns         (B * samples, max_new_tokens) int64
        raises          ValueError when the longest prompt and the answer exceed block_size
        """
        lengths = ([prompts.size(1)] * len(prompts) if torch.is_tensor(prompts) else
                   [len(p) for p in prompts])
        if not lengths or not min(lengths):
            raise ValueError("generate needs at least one prompt, and no empty ones")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        B, longest = len(prompts), max(lengths)
        if longest + max_new_tokens > self.config.block_size:
            raise ValueError(f"prompt of {longest} and answer of {max_new_tokens} tokens do not "
                             f"fit block_size {self.config.block_size}")
        device = self.wte.weight.device
        pad = torch.tensor([longest - n for n in lengths], device=device)
        idx = prompts if torch.is_tensor(prompts) else torch.tensor(
            [[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
        cache = KVCache(longest + max_new_tokens, pad)
        generator = torch_stream("tokens", seed, device=device)
        done = torch.zeros(B * samples, dtype=torch.bool, device=device)

        def decode(idx):                                       # unembeds the last column only
            return self.unembed(self.residuals(idx, cache, hook)[-1][:, -1]).float()    # (B, V)

        step = compiled_step(decode) if compiled else decode
        out = []
        for i in range(max_new_tokens):
            if i:
                logits = step(idx)
            else:                                              # the prompt is longer than a step
                logits = decode(idx)
                if samples > 1:
                    logits = logits.repeat_interleave(samples, 0)
                    cache.repeat(samples)
            if temperature < 1e-3:                     # greedy: dividing by less could overflow
                new = logits.argmax(-1)
            else:
                new = sample((logits / temperature).softmax(-1), generator)
            if stop is not None:
                new = torch.where(done, stop, new)
                done |= new == stop
            out.append(new)
            idx = new[:, None]
        return torch.stack(out, 1)


class Stack(nn.Module):
    """K copies of a model that compute together: each operation is one for all of them."""

    def __init__(self, model, K):
        super().__init__()
        self.copies = nn.ModuleList(model.clone() for _ in range(K))

    def forward(self, *batch):
        """Each tensor has the rows of every copy: (K, B, T) for a model's (B, T). Returns the sum
        of the copies' losses, of which each copy's weights get the gradient of their own."""
        weights = {name: torch.stack([copy.get_parameter(name) for copy in self.copies])
                   for name, _ in self.copies[0].named_parameters()}              # (K, ..)
        return vmap(lambda weights, *rows: functional_call(self.copies[0], weights, rows))(
            weights, *batch).sum()


def write_model(path, model, made_with, record, **more):
    """Writes weights, config, and fit's steps, history and FLOPs to a file, all or nothing.

    more   what an unfinished run also needs in order to continue: see train.fit
    """
    write_sealed(path, {
        "model": {k: v.detach().cpu() for k, v in model.state_dict().items()},
        "config": asdict(model.config), "made_with": made_with,
        **{k: record[k] for k in ("steps", "flops", "history")}} | more)


def read_model(path, device="cpu"):
    """(GPT, the rest of the dict that write_model wrote: whoever keeps this record should not keep
    the weights twice). Raises ValueError with a message of one line if the file is missing or is
    not one of ours."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is missing: train.py, unlearn.py and undo.py make models")
    checkpoint = read_sealed(path, device)
    try:
        weights, config = checkpoint.pop("model"), GPTConfig(**checkpoint["config"])
        tensors = 2 - config.tied + config.gain + (4 + config.gated) * config.n_layer
        if (len(weights), weights["wte.weight"].size(1)) != (tensors, config.n_embd):
            raise ValueError                       # fail before a wrong config allocates memory
        model = GPT(config).to(device)
        model.load_state_dict(weights)
        checkpoint["made_with"]["task"], checkpoint["flops"], checkpoint["history"]
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError,
            MemoryError) as error:
        raise ValueError(f"{path} is not a model of this project "
                         f"({type(error).__name__})") from None
    return model, checkpoint


def mlp(*sizes, bias=True):
    """Linear layers with ReLU between them. bias: whether the last layer has a bias."""
    *pairs, last = zip(sizes, sizes[1:])
    return nn.Sequential(*(f for pair in pairs for f in (nn.Linear(*pair), nn.ReLU())),
                         nn.Linear(*last, bias=bias))
