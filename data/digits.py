"""Handwritten digits: drawn by this program, or MNIST (LeCun, Cortes and Burges).

    load()                     20,000 drawn digits and 4,000 held out; nothing is downloaded
    load("mnist", folder)      MNIST from its public mirror: 60,000 and 10,000 held out
    load("/path/to/mnist")     a folder with the four idx files, with or without gzip; or the URL
                               of such a folder

A drawn digit consists of a few strokes. The points of the strokes are moved at random. The digit is
then rotated, slanted, stretched and shifted, and drawn with a pen of random width. There are two or
three ways to write each digit.
"""
import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from data.download import download
from engine.knobs import BadInput
from engine.streams import stream

MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# SHA-256 of the .gz files there, recorded in many public repositories that downloaded them
FILES = {
    "train-images-idx3": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"}

# Ways to write each digit. A stroke is a smooth curve through points "xy" (0-9 right, 0-9 down).
GLYPHS = [["50 31 24 26 38 59 78 86 84 71 50", "60 41 34 36 48 59 68 76 74 70 41"],
          ["50 59", "32 50 | 50 59", "60 49"],
          ["22 40 61 73 55 29 | 29 79", "23 40 61 72 46 28 38 49 68 88"],
          ["21 40 61 63 44 | 44 66 77 59 28", "20 70 | 70 44 | 44 66 77 59 38 27"],
          ["30 25 | 25 85 | 62 59", "60 25 | 25 85 | 60 69", "20 23 45 74 | 80 75 69"],
          ["70 30 | 30 24 | 24 53 75 77 59 28", "80 40 34 54 76 58 29"],
          ["70 42 26 38 59 77 65 45 27", "40 34 37 59 77 65 45 37"],
          ["20 80 | 80 49", "20 70 | 70 54 39 | 35 75"],
          ["72 50 32 54 77 59 27 54 72", "50 32 54 72 50 | 54 27 59 87 54"],
          ["73 51 33 45 64 73 | 73 68 59", "71 50 32 44 63 71 | 71 79"]]
SEGMENTS = 4                 # straight pieces between two points of a stroke


def curve(points):
    """(starts, ends) of the straight pieces of a smooth curve (Catmull and Rom) through points.

    points is (n, ..); starts and ends are (SEGMENTS * (n - 1), ..)
    """
    p = np.concatenate([2 * points[:1] - points[1:2], points, 2 * points[-1:] - points[-2:-1]])
    a, b, c, d = p[:-3, None], p[1:-2, None], p[2:-1, None], p[3:, None]
    t = np.linspace(0, 1, SEGMENTS + 1)[:, None]
    whole = (b + t * (c - a) / 2 + t**2 * (a - 2.5 * b + 2 * c - d / 2)
             + t**3 * (1.5 * (b - c) + (d - a) / 2))
    return np.concatenate(whole[:, :-1]), np.concatenate(whole[:, 1:])


def draw(glyph, n, rng):
    """n images of a glyph, uint8 (n, 784), from 0 (paper) to 255 (ink)."""
    strokes = [stroke.split() for stroke in glyph.split("|")]
    points = np.array([[int(xy[0]), int(xy[1])] for s in strokes for xy in s]) / 9 - 0.5
    points = points + rng.normal(0, 0.025, (n, *points.shape))                 # (n, points, 2)
    # one matrix rotates, slants and stretches: about 20 pixels high, leaning a little to the right
    matrix = 20 * (np.array([[1, 0], [-0.15, 1]]) + rng.normal(0, 0.1, (n, 2, 2)))
    points = points @ matrix + 13.5 + rng.normal(0, 0.8, (n, 1, 2))
    # curves are linear in their points, so one matrix gives the curves of all images
    each = np.split(np.eye(points.shape[1]), np.cumsum([len(s) for s in strokes])[:-1])
    starts, ends = (torch.from_numpy(np.concatenate(matrices) @ points).float()
                    for matrices in zip(*map(curve, each)))                # (n, segments, 2) each
    pen, ink = (torch.from_numpy(rng.uniform(*limits, (n, 1))).float()
                for limits in ((0.7, 1.7), (0.8, 1.0)))
    noise = torch.from_numpy(rng.normal(0, 0.03, (n, 784))).float()
    y, x = torch.cartesian_prod(torch.arange(28.), torch.arange(28.)).unbind(1)      # (784,) each
    far = torch.full((n, 784), 1e9)                      # squared distance to the nearest stroke
    for start, end in zip(starts.unbind(1), ends.unbind(1)):                        # (n, 2) each
        length = (end - start).norm(dim=1, keepdim=True)
        (a, b), (dx, dy) = start.T[..., None], ((end - start) / length).T[..., None]
        along, across = dx * (x - a) + dy * (y - b), dy * (x - a) - dx * (y - b)    # (n, 784)
        beyond = along - along.clamp(min=0).minimum(length)
        far = far.minimum(beyond * beyond + across * across)
    grey = ink * (pen + 0.5 - far.sqrt()).clamp(0, 1) + noise
    return (255 * grey.clamp(0, 1)).to(torch.uint8)


def drawn(n, seed=0):
    """n digits in random order, as a function of the seed: images uint8 (n, 784), labels (n,)."""
    rng = stream("digits", seed)
    labels, style = rng.integers(0, 10, n), rng.integers(0, 6, n)    # 6: a multiple of 2 and of 3
    images = torch.zeros(n, 784, dtype=torch.uint8)
    for digit, glyphs in enumerate(GLYPHS):
        for i, glyph in enumerate(glyphs):
            which = np.flatnonzero((labels == digit) & (style % len(glyphs) == i))
            for part in np.array_split(which, len(which) // 200 + 1):    # small parts fit the cache
                images[part] = draw(glyph, len(part), rng)
    return images, torch.from_numpy(labels)


def find(folder, name):
    """The path of an idx file in a folder. Its name may have a dash or a dot, and .gz at its end.
    If no such file is there, the path has the name that MNIST's mirror uses."""
    names = [f"{stem}-ubyte{end}" for end in (".gz", "")
             for stem in (name, name.replace("-idx", ".idx"))]
    return next((folder / each for each in names if (folder / each).exists()), folder / names[0])


def idx(path, sizes):
    """An idx file, with or without gzip, as a uint8 tensor (N, *sizes). Raises BadInput if it is
    damaged or is not such a file."""
    way_out = "delete it and get it again, or choose another --source"
    try:
        content = Path(path).read_bytes()
        if content[:2] == b"\x1f\x8b":                             # a gzip file begins with these
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise BadInput(f"{path} is damaged: {way_out}") from None
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}; --source takes a folder or URL of "
                       "MNIST's four files, or mnist to download them") from None
    header = 4 * (2 + len(sizes))
    magic, n, *rest = struct.unpack(f">{header // 4}I", content[:header].ljust(header, b"\0"))
    if magic != 0x800 + 1 + len(sizes) or rest != list(sizes):
        what = "28x28 images" if sizes else "labels"
        raise BadInput(f"{path} is no idx file of {what}: {way_out}")
    if not n or len(content) - header != n * int(np.prod(sizes)):
        raise BadInput(f"{path} should hold {n} items, but has {len(content)} bytes: {way_out}")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).view(n, *sizes)


def load(source=None, folder=None):
    """(images, labels) to train on and (images, labels) held out: uint8 (N, 784) and int64 (N,).

    source   None: draws the digits; mnist, a folder or a URL: see above
    folder   downloads are kept in its subfolder downloads/ (default: data/ of this checkout)
    Raises BadInput, one line, if a source cannot be used.
    """
    if source is None:
        return drawn(20_000, seed=0), drawn(4_000, seed=1)
    url = MNIST if source == "mnist" else source if "://" in source else None
    if url:
        sums = [f"#sha256={sha}" if url == MNIST else "" for sha in FILES.values()]
        paths = [download(f"{url.rstrip('/')}/{name}-ubyte.gz{sha}", Path(folder or
                          Path(__file__).parent) / "downloads") for name, sha in zip(FILES, sums)]
    else:
        paths = [find(Path(source).expanduser(), name) for name in FILES]
    parts = []
    for images, labels in (paths[:2], paths[2:]):
        x, y = idx(images, (28, 28)), idx(labels, ())
        if len(x) != len(y) or not len(x) or y.max() > 9:
            raise BadInput(f"{images} has {len(x)} images and {labels} has {len(y)} labels: give "
                           "files that belong together, with labels of 0-9")
        parts.append((x.flatten(1), y.long()))
    return parts
