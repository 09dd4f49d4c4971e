"""data/digits.py and the split autoencoder: against bytes, and numpy, and gradients by hand."""
import gzip
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import digits
from engine.knobs import BadInput
from experiments.digits import (
    ABLATIONS,
    DECAY,
    SETTING,
    Autoencoder,
    cross_correlation,
    judge,
    split_loss,
)
from route import route


def idx(array):
    """An idx file's bytes, by hand: 0, 0, 8 (unsigned bytes), dimensions; sizes; the items."""
    return (bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            + array.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path):
    """MNIST's four files, with seven and three random digits."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        for kind, items in (("images-idx3", rng.integers(0, 256, (n, 28, 28))),
                            ("labels-idx1", rng.integers(0, 10, n))):
            (tmp_path / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(items)))
    return tmp_path


def batch(n=64, seed=0):
    """Images of noise, pixels -1 to 1; the first half are 0-4."""
    x = torch.rand(n, 784, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return x, torch.arange(n)[:, None] < n // 2


def make(name, seed=0, width=32):
    torch.manual_seed(seed)
    return Autoencoder(SimpleNamespace(**SETTING | ABLATIONS[name]), width)


def test_idx_files_are_read_as_written(folder):
    for (images, labels), part in zip(digits.load(str(folder)), ("train", "t10k")):
        raw = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())
        assert images.dtype == torch.uint8 and images.shape == (len(labels), 784)
        assert images.numpy().tobytes() == raw[16:]
        raw = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())
        assert labels.tolist() == list(raw[8:])


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"


@pytest.mark.parametrize("file, damage, says", [
    (IMAGES, lambda b: None, "cannot read"),
    (IMAGES, lambda b: b[:len(b) // 2], "damaged"),
    (IMAGES, lambda b: b[:15] + b"\xff" + b[16:], "damaged"),
    (IMAGES, lambda b: b"", "no idx file"),
    (IMAGES, lambda b: b"<html>not found</html>", "no idx file of 28x28 images"),
    (IMAGES, lambda b: gzip.compress(idx(np.zeros((7, 14, 14)))), "no idx file of 28x28"),
    (IMAGES, lambda b: gzip.compress(idx(np.zeros(7))), "no idx file of 28x28"),
    (IMAGES, lambda b: gzip.compress(gzip.decompress(b)[:-1]), "should hold 7 items"),
    (IMAGES, lambda b: gzip.compress(idx(np.zeros((6, 28, 28)))), "6 images"),
    (IMAGES, lambda b: gzip.compress(idx(np.zeros((0, 28, 28)))), "should hold 0 items"),
    (LABELS, lambda b: gzip.compress(idx(np.zeros((7, 28, 28)))), "no idx file of labels"),
    (LABELS, lambda b: gzip.compress(idx(np.full(7, 10))), "labels of 0-9"),
    (LABELS, lambda b: gzip.compress(gzip.decompress(b)[:3]), "no idx file of labels"),
    (LABELS, lambda b: gzip.compress(gzip.decompress(b)[:8]), "should hold 7 items")])
def test_bad_files_are_one_line(folder, file, damage, says):
    path = folder / file
    damaged = damage(path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    with pytest.raises(BadInput, match=says) as error:
        digits.load(str(folder))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dot, packed", [(False, False), (True, False), (True, True)])
def test_files_by_any_of_their_names(dot, packed, folder):
    """Downloads are called name-idx3-ubyte.gz; some browsers unpack them, some copies have a dot.
    """
    before = digits.load(str(folder))
    for path in list(folder.iterdir()):
        content = path.read_bytes()
        path.unlink()
        name = path.name.replace("-idx", ".idx") if dot else path.name
        (folder / (name if packed else name.removesuffix(".gz"))).write_bytes(
            content if packed else gzip.decompress(content))
    for whole, again in zip(before, digits.load(str(folder))):
        assert all(torch.equal(a, b) for a, b in zip(whole, again))


@pytest.mark.parametrize("source", ["/no/such/folder", ""])
def test_bad_sources_are_one_line(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="--source") as error:
        digits.load(source)
    assert "\n" not in str(error.value)


def test_downloads_come_from_the_mirror_with_their_checksums(folder, monkeypatch):
    asked = []

    def fake(url, where):
        asked.append(url)
        return folder / url.partition("#")[0].rpartition("/")[2]

    monkeypatch.setattr(digits, "download", fake)
    assert len(digits.load("mnist", folder)[0][0]) == 7
    assert asked == [f"{digits.MNIST}{f}-ubyte.gz#sha256={sha}" for f, sha in digits.FILES.items()]
    asked.clear()
    digits.load("https://example.com/other", folder)
    assert asked == [f"https://example.com/other/{f}-ubyte.gz" for f in digits.FILES]


def test_drawn_digits_are_a_function_of_the_seed():
    (a, b), (c, d), (e, f) = digits.drawn(300, 5), digits.drawn(300, 5), digits.drawn(300, 6)
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(b, f) and not torch.equal(a, e)
    assert a.dtype == torch.uint8 and a.shape == (300, 784) and set(b.tolist()) == set(range(10))


def test_drawn_digits_can_be_told_apart():
    """Ridge regression on the pixels, in closed form."""
    (x, y), (x_val, y_val) = digits.drawn(3000, 1), digits.drawn(1000, 2)
    x, x_val = (torch.cat([z.double() / 255, torch.ones(len(z), 1).double()], 1)
                for z in (x, x_val))
    targets = torch.eye(10, dtype=torch.float64)[y]
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(785), x.T @ targets)
    assert ((x_val @ weights).argmax(1) == y_val).double().mean() > 0.9


def test_route_scales_gradients_only():
    h, m = torch.randn(5, 4, requires_grad=True), torch.tensor([0., 1., 0.5, -1.])
    routed = route(h, m)
    assert torch.equal(routed[:, [0, 1]], h[:, [0, 1]])
    torch.testing.assert_close(routed, h)
    routed.sum().backward()
    assert torch.equal(h.grad, m.expand(5, 4))


@pytest.mark.parametrize("name", [n for n in ABLATIONS if (SETTING | ABLATIONS[n])["routed"]])
def test_reconstructions_train_only_their_half(name):
    """The encoder's last rows 0-15 make the top half of the code, rows 16-31 the bottom."""
    model = make(name)
    x, low = batch()
    for group, own in ((low[:, 0], slice(0, 16)), (~low[:, 0], slice(16, 32))):
        model.zero_grad()
        model(x[group], low[group])[1].square().sum().backward()
        grad = model.encoder[-1].weight.grad
        other = slice(16, 32) if own.start == 0 else slice(0, 16)
        assert (grad[own] != 0).any(1).all()
        both = "also" in ABLATIONS[name] and own.start == 0
        assert (grad[other] != 0).any() if both else (grad[other] == 0).all()


def test_routing_changes_no_bit_of_the_forward_pass():
    routed, plain = make("routed"), make("no routing")
    plain.load_state_dict(routed.state_dict())
    x, low = batch()
    for a, b in zip(routed(x, low), plain(x, low)):
        assert torch.equal(a, b)


def test_without_routing_all_digits_train_both_halves():
    model = make("no routing")
    x, low = batch()
    model(x[low[:, 0]], low[low[:, 0]])[1].sum().backward()
    assert (model.encoder[-1].weight.grad != 0).any(1).all()


def test_cross_correlation_is_numpys():
    code = torch.randn(200, 32).cumsum(1)
    wanted = np.abs(np.corrcoef(code.numpy().T)[:16, 16:]).mean()
    assert cross_correlation(code).item() == pytest.approx(wanted, rel=1e-4)


def test_certificates_never_move_what_they_judge():
    model = make("routed")
    for certified in model(*batch())[2:]:
        certified.sum().backward()
    assert all(p.grad is None for part in (model.encoder, model.decoders)
               for p in part.parameters())
    assert all(p.grad is not None for p in model.certificates.parameters())


def test_autoencoders_of_only_5_9_learn_nothing_from_0_4():
    x, low = batch()
    grads = []
    for change in (0.0, 0.3):
        model = make("only 5-9, no penalties")
        split_loss(model, model.setting, torch.where(low, x - change, x), low).backward()
        grads.append(model.encoder[0].weight.grad)
    assert torch.equal(*grads)


def test_the_loss_is_the_papers(name="routed, bottom on 0-9"):
    """By numpy, in float64, from the model's outputs."""
    model = make(name)
    x, low = batch()
    code, out, *certified = (o.detach().double().numpy() for o in model(x, low))
    x_, low_ = x.double().numpy(), low[:, 0].numpy()
    wanted = sum(np.abs(out - x_)[g].mean() for g in (low_, ~low_))
    wanted += 5e-3 * np.abs(code)[:, :16].sum(1).mean() + 2e-2 * np.abs(code)[:, 16:].sum(1).mean()
    wanted += 0.1 * np.abs(np.corrcoef(code.T)[:16, 16:]).mean()
    wanted += sum(np.abs(c - x_).mean() for c in certified)
    wanted += DECAY / 2 * sum(float((p.detach().double()**2).sum()) for p in model.parameters())
    assert split_loss(model, model.setting, x, low).item() == pytest.approx(wanted, rel=1e-4)
    for only in (low | True, low & False):         # a small batch has none of a group now and then
        assert split_loss(model, model.setting, x, only).isfinite()


@torch.no_grad()
def test_judge_is_mean_squared_error_of_the_bottom_half():
    model = make("routed")
    x, low = batch()
    bottom = model.certificates[1](model.encoder(x)[:, 16:])
    found, off = judge(model, x, low), (bottom - x).double().numpy()
    for key, rows in (("0_4", slice(0, 32)), ("5_9", slice(32, 64))):
        assert found[f"error_{key}"] == pytest.approx((off[rows]**2).mean(), rel=1e-4)
        assert found[f"absolute_{key}"] == pytest.approx(np.abs(off[rows]).mean(), rel=1e-4)
