"""An autoencoder whose code has one half for the digits 0-4 and one for 5-9 (Cloud et al. 2024,
section 4.1).

    python -m experiments.digits                                 on digits that this program draws
    python -m experiments.digits --source=mnist --seeds=3        on MNIST
    python -m experiments.digits --ablations=true                the paper's ten settings

0-4 train the top half of the code only, and 5-9 train the bottom half only. Each half has a decoder
that is trained on it alone. This decoder, called its certificate, shows what the half contains.
"""
import engine.start  # noqa: F401, I001  (before torch is loaded)

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from torch import nn

from data.digits import load
from engine.disk import take
from engine.hardware import autocast, hardware, to_device
from engine.knobs import BadInput, FilePath, knob, means_nothing
from engine.process import RANK, WORLD, run
from engine.report import folder_of, over_seeds, picture, table, write_rows
from engine.streams import stream, torch_stream
from model import mlp
from route import route
from train import Basic, fit


@dataclass
class Config(Basic):
    task: ClassVar[str] = "digits"
    source: FilePath | None = knob(None, "mnist, or a folder or URL with its four files (auto: "
                                   "digits that this program draws)")
    data_dir: FilePath | None = knob(None, "folder for downloads (auto: data/ of this project)")
    seeds: int = knob(1, "how many seeds, from --seed on", 1)
    ablations: bool = knob(False, "all ten settings of the paper's appendix")
    # The paper has width 2048 and 5,900 steps. Muon and more L1 make up for the difference.
    width: int = knob(256, "width of the first hidden layer (2048 in the paper)", 8)
    steps: int = knob(1200, "training steps", 1)
    batch_size: int = knob(256, "images in a batch", 2, 2**31)
    lr: float = knob(1e-2, "AdamW's rate", 0, 1)
    muon_lr: float = knob(0.05, "Muon's rate (the blocks' matrices); 0: AdamW for all", 0, 1)


DECAY = 5e-5                 # weight decay, as in the paper. Without it, the code shrinks while the
                             # decoder grows, and L1 on the code has no effect
SETTING = dict(
    routed=True,             # 0-4 train the top half of the code only, 5-9 the bottom half only
    also=False,              # 0-4 also train the bottom half
    learns=("0-4", "5-9"),   # what the autoencoder learns to reconstruct
    l1=(5e-3, 5e-3),         # weights of the top and the bottom half's L1 norms (paper: 3e-3)
    correlation=0.1,         # weight of the mean |correlation| across the halves
    decoders=1)              # 2: one for 0-4, one for 5-9
FREE = dict(l1=(0, 0), correlation=0)
ABLATIONS = {                # the paper's ten (appendix); the first three run by default
    "routed": {},
    "no routing": dict(routed=False),
    "only 5-9, L1": dict(routed=False, learns=("5-9",), l1=(1e-3, 1e-3), correlation=0),
    "routed, bottom on 0-9": dict(also=True, l1=(5e-3, 2e-2)),
    "routed, two decoders": dict(decoders=2),
    "routed, no correlation penalty": dict(correlation=0),
    "routed, no penalties": FREE,
    "routed, no penalties, two decoders": FREE | dict(decoders=2),
    "no routing, no penalties": FREE | dict(routed=False),
    "only 5-9, no penalties": FREE | dict(routed=False, learns=("5-9",))}


class Autoencoder(nn.Module):
    """784 - width - width/4 - 32 and back. setting: SETTING with the changes of an ABLATIONS row.
    """

    def __init__(self, setting, width):
        super().__init__()
        self.setting, back = setting, (width // 4, width, 784)
        self.encoder = mlp(*back[::-1], 32, bias=False)
        self.decoders = nn.ModuleList(mlp(32, *back) for _ in range(setting.decoders))
        # these decode the image from the top half of the code alone, and from the bottom half
        self.certificates = nn.ModuleList(mlp(16, *back) for _ in range(2))

    def matrices(self):
        """The matrices for Muon: all but the one that makes the code. Muon would mix its halves."""
        return [p for part in (self.encoder[:-1], *self.decoders, *self.certificates)
                for p in part.parameters() if p.ndim == 2]

    def forward(self, x, low):
        """Code (B, 32), reconstruction (B, 784), and the certificates' two reconstructions, from
        the top half and from the bottom half.

        x      images (B, 784), pixels from -1 to 1
        low    (B, 1) bool: whether the digit is 0-4
        """
        code = h = self.encoder(x)
        if self.setting.routed:
            m = torch.cat([low.expand(-1, 16), (~low | self.setting.also).expand(-1, 16)], 1)
            h = route(code, m.to(code.dtype))
        out = self.decoders[0](h)
        if self.setting.decoders == 2:
            out = torch.where(low, out, self.decoders[1](h))
        return code, out, *(decode(half) for decode, half in
                            zip(self.certificates, code.detach().chunk(2, 1)))


def cross_correlation(code):
    """Mean |correlation|, over images, of each number in the code's top half with each in the
    bottom half. code: (B, 32)."""
    z = (code - code.mean(0)) / (code.std(0, correction=0) + 1e-6)
    top, bottom = z.chunk(2, 1)
    return (top.T @ bottom / len(code)).abs().mean()


def split_loss(model, s, x, low):
    """The sum of the absolute errors on 0-4 and on 5-9 (means over pixels and images), penalties on
    the code, the certificates' errors, and weight decay (Cloud et al. 2024, section 4.1). The
    penalties apply to the code before routing. The certificates' errors train the certificates
    only. s is the model's setting.
    """
    code, out, top, bottom = model(x, low)
    code, loss = code.float(), (top - x).abs().mean() + (bottom - x).abs().mean()
    for group in s.learns:
        which = (low if group == "0-4" else ~low).float()
        loss = loss + ((out - x).abs().mean(1, keepdim=True) * which
                       ).sum() / which.sum().clamp(min=1)
    loss = loss + sum(w * h.abs().sum(1).mean() for w, h in zip(s.l1, code.chunk(2, 1)))
    if s.correlation:
        loss = loss + s.correlation * cross_correlation(code)
    return loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())


def judge(model, x, low):
    """Mean errors per pixel (from -1 to 1) on 0-4 and on 5-9:

    error_..          squared error of the bottom half's certificate
    absolute_..       its absolute error
    top_error_..      squared error of the top half's certificate
    whole_error_..    squared error of the whole code's reconstruction

    The paper's .32 on 0-4 must be a squared error. MNIST's median image, which contains no
    information about the digit, has a squared error of .36 and an absolute error of .26.
    """
    _, out, top, bottom = model(x, low)
    errors = {"error": (bottom - x) ** 2, "absolute": (bottom - x).abs(),
              "top_error": (top - x) ** 2, "whole_error": (out - x) ** 2}
    return {f"{name}_{group}": e[which].mean().item() for name, e in errors.items()
            for group, which in (("0_4", low[:, 0]), ("5_9", ~low[:, 0]))}


def main(cfg):
    """All settings with the same seed start from the same weights and see the same images."""
    means_nothing(cfg, ("save_every", "resume", "remake"), "it keeps no models")
    folder = folder_of(cfg)
    if RANK == 0:
        take(folder)
    device, parts = hardware(cfg)[0], load(cfg.source, cfg.data_dir)
    (x, y), (x_val, y_val) = ((images.to(device), labels.to(device)) for images, labels in parts)
    missing = set(range(10)) - set(y_val.tolist())
    if missing:
        raise BadInput(f"--source={cfg.source} holds out no {min(missing)}: its test files need "
                       f"all ten digits")
    x_val, low_val = x_val / 127.5 - 1, y_val[:, None] < 5
    rows, pictures = [], {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        for name in list(ABLATIONS)[:None if cfg.ablations else 3]:
            setting = SimpleNamespace(**SETTING | ABLATIONS[name])
            with torch.random.fork_rng(devices=[]):       # nn.Linear uses torch's global generator
                torch.set_rng_state(torch_stream("autoencoder", seed).get_state())
                model = Autoencoder(setting, cfg.width).to(device)

            def loss_fn(model, step):
                rng = stream("images", seed, step)
                i = rng.integers(0, len(x), cfg.batch_size)[RANK::WORLD]
                i = to_device(torch.from_numpy(i), device)
                return split_loss(model, setting, x[i] / 127.5 - 1, y[i, None] < 5)

            fit(model, loss_fn, cfg, cfg.steps, cfg.lr, cfg.muon_lr, name=name, decay=0.8,
                matrices=model.matrices())
            with torch.no_grad(), autocast(cfg):
                found = judge(model, x_val, low_val)
                rows.append({"setting": name, "seed": seed} | found
                            | {"ratio": found["error_0_4"] / found["error_5_9"]})
                write_rows("digits", cfg, None, rows, quiet=True)
                if seed == cfg.seed:
                    two = [(y_val == digit).nonzero()[i, 0].item()
                           for i in (0, -1) for digit in range(10)]            # two of each digit
                    pictures[name] = x_val[two], *model(x_val[two], low_val[two])[2:]
    columns = {"error_0_4": "0-4", "error_5_9": "5-9", "ratio": "ratio",
               "absolute_0_4": "|0-4|", "absolute_5_9": "|5-9|"}

    def draw(axes):
        for ax, (name, shown) in zip(axes, pictures.items()):
            lines = [torch.cat(list(images), 1) for ten in (slice(0, 10), slice(10, 20))
                     for images in (p.float().cpu().view(20, 28, 28)[ten] for p in shown)]
            ax.imshow(torch.cat(lines), cmap="gray", vmin=-1, vmax=1)
            ax.set(title=name, xticks=[], yticks=[14 + 28 * i for i in range(6)],
                   yticklabels=["original", "top half", "bottom half"] * 2)
            ax.grid(False)

    write_rows("digits", cfg, None, rows)
    picture("digits", cfg, draw, panels=2)
    table(over_seeds(rows, ["setting"], {key: (key, 3) for key in columns}),
          {"setting": "bottom half alone"} | columns)


if __name__ == "__main__":
    run(main, Config, __doc__)
