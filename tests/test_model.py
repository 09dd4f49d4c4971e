"""The GPT against a slow one written out in loops; generation, views, files."""
import functools
import hashlib
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import model
import unlearn
from model import GPT, GPTConfig, read_model, sample, write_model

V, T = 70, 24                                     # 70 is no multiple of 64: 58 rows are padding


def lively(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_embd=16, seed=0):
    """A model all of whose weights are random: at initialisation the blocks do nothing."""
    gpt = GPT(GPTConfig(vocab_size, block_size, n_layer, n_head, n_embd))
    generator = torch.Generator().manual_seed(seed)
    for p in gpt.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 1.5 / p.size(1) ** 0.5
    return gpt


def tokens(*shape, seed=0, vocab_size=V):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --- the forward pass ----------------------------------------------------------------------------
def rms(x):
    return x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt()


def turn(x, position):
    """Rotary: channels i and i + half are one complex number, turned by t / 10000^(i/half)."""
    half = len(x) // 2
    speed = torch.tensor([10000.0 ** -(i / half) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * position * speed)
    return torch.cat((turned.real, turned.imag))


def slow_logits(gpt, idx, no_heads=(), no_units=()):
    """One row's logits (T, V) in float64, by the formulas, one position and head at a time.

    no_heads    (layer, head) pairs that write nothing
    no_units    (layer, unit) pairs, likewise
    """
    c, w = gpt.config, {k: v.double() for k, v in gpt.state_dict().items()}
    C, hs = c.n_embd, c.n_embd // c.n_head
    x = [rms(w["wte.weight"][i]) for i in idx]
    for layer in range(c.n_layer):
        W = {k: w[f"blocks.{layer}.{k}.weight"] for k in ("attn.qkv", "attn.proj", "mlp.up",
                                                          "mlp.down")}
        qkv = [W["attn.qkv"] @ rms(row) for row in x]
        new = []
        for t in range(len(x)):
            heads = []
            for h in range(c.n_head):
                def part(s, kind):
                    return qkv[s][kind * C + h * hs:kind * C + (h + 1) * hs]

                q = turn(rms(part(t, 0)), t)
                scores = [math.exp(q @ turn(rms(part(s, 1)), s) / hs ** 0.5) for s in range(t + 1)]
                y = sum(p / sum(scores) * part(s, 2) for s, p in enumerate(scores))
                heads.append(torch.zeros(hs).double() if (layer, h) in no_heads else y)
            new.append(x[t] + W["attn.proj"] @ torch.cat(heads))
        for t, row in enumerate(new):
            units = (W["mlp.up"] @ rms(row)).clamp(min=0) ** 2
            units[[j for at, j in no_units if at == layer]] = 0
            new[t] = row + W["mlp.down"] @ units
        x = new
    return torch.stack([w["wte.weight"][:c.vocab_size] @ rms(row) for row in x])


def close(got, expected, atol=2e-4):
    """float32 against float64: logits here are of size 1 to 10."""
    torch.testing.assert_close(got.double(), expected.double(), atol=atol, rtol=1e-4)


@pytest.mark.parametrize("n_layer,n_head,n_embd", [(1, 1, 8), (2, 2, 16), (2, 4, 16)])
def test_logits_as_written_out(n_layer, n_head, n_embd):
    gpt = lively(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
    idx = tokens(3, 9)
    with torch.no_grad():
        logits = gpt(idx)
    for row, expected in zip(logits, idx):
        close(row, slow_logits(gpt, expected))


def test_no_look_into_the_future():
    gpt, idx = lively(), tokens(2, T)
    with torch.no_grad():
        before = gpt(idx)
        for t in range(T):
            changed = idx.clone()
            changed[:, t] = (idx[:, t] + 1) % V
            after = gpt(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-6, rtol=0)
            assert not torch.allclose(after[:, t], before[:, t], atol=1e-3)


def test_no_gradient_from_the_future():
    gpt, idx = lively(), tokens(1, 12)
    for t in (0, 5, 11):
        stream = gpt.residuals(idx)
        reach, = torch.autograd.grad(gpt.unembed(stream[-1])[0, t].square().sum(), stream[0])
        assert (reach[0, :t + 1].norm(dim=-1) > 0).all() and not reach[0, t + 1:].any()


def test_residuals_are_the_stream():
    gpt, idx = lively(), tokens(2, 7)
    stream = gpt.residuals(idx)
    assert [tuple(x.shape) for x in stream] == [(2, 7, 16)] * 3
    assert torch.equal(gpt.unembed(stream[-1]), gpt(idx))
    embedded = gpt.wte.weight[idx].double()
    close(stream[0], embedded / embedded.square().mean(-1, keepdim=True).sqrt())


def test_padding_of_the_vocabulary_stays_inside():
    gpt, idx = lively(), tokens(2, 9)
    assert gpt.wte.weight.size(0) == 128
    with torch.no_grad():
        before = gpt(idx)
        gpt.wte.weight[V:] = 1e3 * torch.randn(58, 16)               # would win every argmax
        assert torch.equal(gpt(idx), before) and before.shape == (2, 9, V)
    torch.testing.assert_close(before.softmax(-1).sum(-1), torch.ones(2, 9))
    for temperature in (0.0, 1.0):
        assert gpt.generate(idx.tolist(), 12, temperature).max() < V


def test_loss_is_cross_entropy():
    gpt, idx, targets = lively(), tokens(3, 9), tokens(3, 9, seed=1)
    logits = gpt(idx)
    by_hand = -logits.double().log_softmax(-1).gather(-1, targets[..., None]).mean()
    assert gpt(idx, targets).item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert torch.equal(gpt(idx, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_loss_of_the_last_tokens():
    """Where targets are fewer than tokens they are those of the end, and nothing else counts."""
    gpt, teacher, idx = lively(), lively(seed=1), tokens(3, 9)
    targets = tokens(3, 2, seed=1)
    logits = gpt(idx)[:, -2:]
    assert torch.equal(gpt(idx, targets), F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    p, q = (m(idx)[:, -2:].double().log_softmax(-1) for m in (teacher, gpt))
    by_hand = (p.exp() * (p - q)).sum(-1).mean()
    assert unlearn.imitate(gpt, teacher, idx, 2).item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_clones_are_equal_and_apart():
    gpt = lively().double()
    copy, idx = gpt.clone(), tokens(2, 9)
    assert copy.wte.weight.dtype == torch.float64 and torch.equal(copy(idx), gpt(idx))
    copy.blocks[0].mlp.up.weight.data.zero_()
    assert not torch.equal(copy(idx), gpt(idx))


class Widest(TorchDispatchMode):
    """Notes the most elements of a tensor, made inside it, whose rows are as long as a vocabulary.
    """
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.dim() and x.size(-1) >= 1000:
                self.most = max(self.most, x.numel())
        return made


def losses(gpt, teacher, idx, targets):
    yield gpt(idx, targets)
    yield unlearn.imitate(gpt, teacher, idx)
    yield unlearn.objective(gpt, (idx, targets), (idx, targets), None,
                            unlearn.Config(retain_weight=1.0))


@pytest.mark.parametrize("rows", [1, 10, 71])
def test_losses_by_chunks(rows, monkeypatch):
    """As the whole to 1e-5, gradients too, while no more than one chunk of logits is there."""
    gpt, teacher = (lively(vocab_size=1000, seed=s) for s in (0, 1))
    idx, targets = tokens(3, 24, vocab_size=1000), tokens(3, 24, seed=1, vocab_size=1000)

    def measured():
        found = []
        for loss in losses(gpt, teacher, idx, targets):
            gpt.zero_grad()
            loss.backward()
            found.append((loss.detach(), *[p.grad.clone() for p in gpt.parameters()]))
        return found

    with Widest() as whole:
        expected = measured()
    monkeypatch.setattr(model, "LOGITS", rows * 1000 + 500)
    with Widest() as chunks:
        got = measured()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert whole.most == 3 * 24 * 1024                       # 1000 tokens, padded; the embedding
    assert chunks.most == max(rows, 16) * 1024               # itself, transposed, has 16 rows
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("T", [5, 24])
def test_bf16_attention_on_a_cpu(T):
    """Against float64: as near as bfloat16 comes, forward and backward."""
    exact = [x.requires_grad_() for x in torch.randn(3, 2, 3, T, 8, dtype=torch.float64,
                                                     generator=torch.Generator().manual_seed(0))]
    rough = [x.detach().bfloat16().requires_grad_() for x in exact]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True)
    got = model.attend(*rough)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), expected, atol=0.03, rtol=0.03)
    expected.square().sum().backward()
    got.float().square().sum().backward()
    for a, b in zip(rough, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=0.1, rtol=0.05)


# --- initialisation ------------------------------------------------------------------------------
def test_untrained():
    """Loss ln V, and blocks that are the identity: their output projections start at zero."""
    gpt = GPT(GPTConfig(1000, 64, 3, 4, 64))
    idx, targets = tokens(8, 64, vocab_size=1000), tokens(8, 64, seed=1, vocab_size=1000)
    with torch.no_grad():
        assert gpt(idx, targets).item() == pytest.approx(math.log(1000), abs=0.2)
        stream = gpt.residuals(idx)
    assert all(torch.equal(x, stream[0]) for x in stream)


def test_init_weights():
    """A function of the generator alone, with the spreads that its docstring gives."""
    a, b = (GPT(GPTConfig(500, 8, 2, 2, 64)) for _ in range(2))
    a.init_weights(torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    b.init_weights(torch.Generator().manual_seed(3))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert a.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in a.blocks:
        for w in (block.attn.qkv.weight, block.mlp.up.weight):
            assert w.std().item() == pytest.approx(1 / 8, rel=0.05)
            assert w.abs().max().item() == pytest.approx(3 ** 0.5 / 8, rel=0.01)    # uniform
        assert not block.attn.proj.weight.any() and not block.mlp.down.weight.any()
    b.init_weights(torch.Generator().manual_seed(4))
    assert not torch.equal(a.wte.weight, b.wte.weight)
    assert not torch.equal(a.blocks[0].mlp.up.weight, a.blocks[1].mlp.up.weight)


@pytest.mark.parametrize("n_embd,n_head", [(30, 4), (12, 4), (7, 1)])
def test_width_that_heads_cannot_share(n_embd, n_head):
    with pytest.raises(ValueError, match=f"n_embd={n_embd}"):
        GPTConfig(V, n_embd=n_embd, n_head=n_head)


# --- generation ----------------------------------------------------------------------------------
def greedy(gpt, prompt, n):
    """One row, the whole sequence computed anew for every token."""
    row = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            row.append(gpt(torch.tensor([row]))[0, -1].argmax().item())
    return row[len(prompt):]


RAGGED = [tokens(n, seed=n).tolist() for n in (1, 7, 3, 12, 12, 5)]


@pytest.mark.parametrize("seed", range(3))
def test_greedy_with_cache_as_without(seed):
    """Every row of a ragged batch as though it were alone."""
    gpt = lively(seed=seed)
    got = gpt.generate(RAGGED, 12)
    assert got.dtype == torch.int64
    assert got.tolist() == [greedy(gpt, prompt, 12) for prompt in RAGGED]
    assert len(set(map(tuple, got.tolist()))) > 1                    # rows that could be mixed up


def test_several_answers_to_a_prompt():
    """A prompt that is read once is answered as though it stood there several times."""
    gpt, thrice = lively(), [prompt for prompt in RAGGED for _ in range(3)]
    for how in ({}, {"temperature": 1.0, "seed": 5, "stop": 3}):
        assert torch.equal(gpt.generate(RAGGED, 9, samples=3, **how),
                           gpt.generate(thrice, 9, **how))
    sampled = gpt.generate(RAGGED, 9, 1.0, samples=3).view(len(RAGGED), 3, 9)
    assert (sampled[:, 0] != sampled[:, 1]).any()


def test_prompts_as_a_tensor():
    gpt, prompts = lively(), torch.randint(V, (4, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gpt.generate(prompts, 7), gpt.generate(prompts.tolist(), 7))
    for empty in (prompts[:0], prompts[:, :0]):
        with pytest.raises(ValueError, match="at least one prompt"):
            gpt.generate(empty, 1)


def test_sampling_at_the_ends(monkeypatch):
    """What has no probability is never drawn, whatever the random number."""
    probabilities = torch.tensor([[0, 0.25, 0, 0.75, 0, 0]])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999, 3), (1 - 2**-24, 3)):
        monkeypatch.setattr(torch, "rand", lambda *_, u=uniform, **__: torch.tensor([[u]]))
        assert sample(probabilities, None).tolist() == [token]


def test_compiled_decoding(monkeypatch):
    """The same tokens; a step is one graph, the same at every step, so that it is compiled once."""
    gpt = lively()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(gpt.generate(RAGGED, 12, compiled=True), gpt.generate(RAGGED, 12))


def test_generate_in_bfloat16():
    """Under autocast the cache takes what it is given, and most tokens stay the same."""
    gpt = lively()
    with torch.autocast("cpu", torch.bfloat16):
        got = gpt.generate(RAGGED, 1)
    assert (got == gpt.generate(RAGGED, 1)).float().mean() >= 0.5 and got.max() < V


def test_stop_fills_the_row():
    gpt = lively()
    free = gpt.generate(RAGGED, 12)
    stop = free[1, 2].item()
    expected = []
    for row in free.tolist():
        cut = row.index(stop) if stop in row else len(row)
        expected.append(row[:cut] + [stop] * (len(row) - cut))
    got = gpt.generate(RAGGED, 12, stop=stop)
    assert got.tolist() == expected
    assert got[1].tolist() == free[1, :2].tolist() + [stop] * 10
    assert any(stop not in row for row in expected)                  # the others go on


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_sampling_frequencies(temperature):
    """Chi-square of 20,000 draws against the softmax: mean 19, standard deviation 6.2."""
    gpt, n = lively(vocab_size=20), 20_000
    with torch.no_grad():
        p = (gpt(torch.tensor([[3, 1, 4]]))[0, -1].double() / temperature).softmax(-1)
    got = gpt.generate([[3, 1, 4]] * n, 1, temperature, seed=1)[:, 0].bincount(minlength=20)
    likely = p * n > 1
    assert ((got - p * n).square() / (p * n))[likely].sum() < 19 + 5 * 6.2
    assert got[~likely].sum() < 20


def test_seeds():
    gpt = lively()
    draw = lambda seed: gpt.generate(RAGGED, 8, 1.0, seed=seed).tolist()  # noqa: E731
    first = draw(5)
    torch.manual_seed(1)
    assert draw(5) == first != draw(6)
    assert gpt.generate(RAGGED, 8, 0.0, seed=5).tolist() == gpt.generate(RAGGED, 8, 0.0).tolist()


def test_what_does_not_fit():
    gpt = lively()
    assert gpt.generate([[1] * (T - 4)], 4).shape == (1, 4)          # just fits
    for prompts, n in (([[1] * (T - 4)], 5), ([[1], [1] * T], 1), ([], 1), ([[1], []], 1)):
        with pytest.raises(ValueError):
            gpt.generate(prompts, n)
    with pytest.raises(ValueError, match=f"{T + 1}.*{T}"):
        gpt(tokens(1, T + 1))


# --- views ---------------------------------------------------------------------------------------
def without(gpt, view):
    """A copy of the model in which view(copy)'s tensors are zero."""
    copy = GPT(gpt.config)
    copy.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        view(copy).zero_()
    return copy


@pytest.mark.parametrize("layer,h", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_head_without_weights(layer, h):
    """Zeroing what a head writes, or the v it reads, leaves the model without that head."""
    gpt, idx = lively(), tokens(8)
    expected = slow_logits(gpt, idx, no_heads=[(layer, h)])
    for view in (lambda m: m.blocks[layer].head(h)[1], lambda m: m.blocks[layer].head(h)[0][2]):
        with torch.no_grad():
            close(without(gpt, view)(idx[None])[0], expected)
    with torch.no_grad():
        assert not torch.allclose(gpt(idx[None])[0].double(), expected, atol=1e-2)


@pytest.mark.parametrize("side", [0, 1])
def test_units_without_weights(side):
    gpt, idx = lively(), tokens(8)
    expected = slow_logits(gpt, idx, no_units=[(1, j) for j in range(5, 20)])
    with torch.no_grad():
        close(without(gpt, lambda m: m.blocks[1].units(slice(5, 20))[side])(idx[None])[0], expected)
        assert not torch.allclose(gpt(idx[None])[0].double(), expected, atol=1e-2)


def test_views_share_their_storage():
    block = lively(n_head=4).blocks[0]
    reads, writes = block.head(1)
    many_reads, many_writes = block.head(slice(1, 3))
    up, down = block.units(slice(3, 8))
    assert (reads.shape, writes.shape) == ((3, 4, 16), (16, 4))
    assert (many_reads.shape, many_writes.shape) == ((3, 2, 4, 16), (16, 2, 4))
    assert (up.shape, down.shape) == ((5, 16), (16, 5))
    for view, weight in ((reads, block.attn.qkv), (many_reads, block.attn.qkv),
                         (writes, block.attn.proj), (many_writes, block.attn.proj),
                         (up, block.mlp.up), (down, block.mlp.down)):
        assert view.untyped_storage().data_ptr() == weight.weight.untyped_storage().data_ptr()
    assert torch.equal(many_reads[:, 0], reads) and torch.equal(many_writes[:, 0], writes)


# --- files ---------------------------------------------------------------------------------------
RECORD = {"steps": 3, "flops": 12345, "seconds": 0.1, "history": [{"step": 3, "loss": 1.5}]}


def seal(path, body):
    """What write_model does last: the digest, which is no secret."""
    path.write_bytes(body + b"sha256:" + hashlib.sha256(body).digest())
    return path


def sealed(path, content):
    torch.save(content, path)
    return seal(path, path.read_bytes())


def test_round_trip(tmp_path):
    gpt, path, made_with = lively(), tmp_path / "new" / "m.pt", {"task": "t", "lrs": [0.1, 0.2]}
    write_model(path, gpt, made_with, RECORD)
    again, checkpoint = read_model(path)
    assert again.config == gpt.config and checkpoint["made_with"] == made_with
    assert {k: checkpoint[k] for k in ("steps", "flops", "history")} == {
        k: RECORD[k] for k in ("steps", "flops", "history")}
    assert "model" not in checkpoint            # a record must not keep a copy of all weights alive
    for (k, p), (name, q) in zip(gpt.state_dict().items(), again.state_dict().items()):
        assert k == name and torch.equal(p, q)
    assert torch.equal(gpt(tokens(1, 9)), again(tokens(1, 9)))
    assert [p.name for p in path.parent.iterdir()] == ["m.pt"]        # no temporary file is left


def test_damaged_files(tmp_path):
    """Cut short anywhere, or one bit turned over anywhere."""
    path, rng = tmp_path / "m.pt", random.Random(0)
    write_model(path, lively(n_layer=1), {"task": "t"}, RECORD)
    content = path.read_bytes()
    cuts = [content[:n] for n in [0, 1, 38, 39, 40, len(content) - 1]
            + [rng.randrange(len(content)) for _ in range(5)]] + [content + b"\0"]
    for i in list(range(-41, 0, 5)) + [rng.randrange(len(content)) for _ in range(15)]:
        turned = bytearray(content)
        turned[i] ^= 1 << rng.randrange(8)
        cuts.append(bytes(turned))
    for bad in cuts:
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="m.pt is damaged") as error:
            read_model(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="missing"):
        read_model(tmp_path / "none.pt")
    with pytest.raises(ValueError):
        read_model(tmp_path)


class Evil:
    """Unpickled by plain pickle, it creates a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickles_are_not_executed(tmp_path):
    """The seal is no signature: a stranger's file can bear a right one."""
    marker, path = tmp_path / "executed", tmp_path / "m.pt"
    pickle.loads(pickle.dumps(Evil(marker))).close()
    assert marker.exists()                                           # the bait works
    marker.unlink()
    good = {"model": lively().state_dict(), "config": vars(lively().config),
            "made_with": {"task": "t"}, **RECORD}
    for bad in (seal(path, pickle.dumps(Evil(marker))), sealed(path, Evil(marker)),
                sealed(path, good | {"made_with": Evil(marker)})):
        with pytest.raises(ValueError):
            read_model(bad)
    assert not marker.exists()


@pytest.mark.parametrize("case", ["a list", "empty dict", "no config", "unknown key", "no weights",
                                  "other shapes", "no made_with", "bad width", "text", "one byte"])
def test_sealed_but_no_model(case, tmp_path):
    gpt, path = lively(), tmp_path / "m.pt"
    good = {"model": gpt.state_dict(), "config": vars(gpt.config), "made_with": {"task": "t"},
            **RECORD}
    sealed(path, good)
    read_model(path)                                                 # so far, so good
    if case in ("text", "one byte"):
        seal(path, b"no zip file" * 9 if case == "text" else b"x")
    else:
        sealed(path, {"a list": [1, 2], "empty dict": {},
                      "no config": {k: v for k, v in good.items() if k != "config"},
                      "unknown key": good | {"config": good["config"] | {"depth": 3}},
                      "no weights": good | {"model": {}},
                      "other shapes": good | {"config": good["config"] | {"n_embd": 32}},
                      "no made_with": good | {"made_with": {}},
                      "bad width": good | {"config": good["config"] | {"n_embd": 15}}}[case])
    with pytest.raises(ValueError) as error:
        read_model(path)
    assert "\n" not in str(error.value) and "m.pt" in str(error.value)
