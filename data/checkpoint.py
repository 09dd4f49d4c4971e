"""Model files without pickle: safetensors, with its config.json, and GGUF of llama.cpp.

    with reading(path):
        settings, tensors = read_gguf(path)            or read_folder(path)
        w = load(check(name, tensors[name], shape))    float32, dequantised

Files come from strangers. Nothing in them is executed, and their sizes are compared with what the
file can hold before anything is allocated.
"""
import json
import math
import operator
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np
import torch

from engine.knobs import BadInput

# (values, bytes) of the smallest piece of a tensor
FORMATS = {"F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18),
           "Q4_1": (32, 20)}
GGUF_FORMATS = ("F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K "
                "IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M "
                "BF16").split()
GGUF_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
                10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9


class Tensor(NamedTuple):
    """Where a tensor is. `size`, in bytes, is None if the file does not say it."""
    file: Path
    format: str
    shape: tuple
    begin: int
    size: int | None


@contextmanager
def reading(path):
    """Whatever a bad file makes Python raise becomes BadInput."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror or error}; give a .gguf file, or a "
                       f"folder with config.json, tokenizer.json and *.safetensors") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError,
            ValueError) as error:
        why = str(error) if isinstance(error, ValueError) else repr(error)
        raise BadInput(f"cannot use {path}: {why[:300]}; choose another model, or download it "
                       f"again if it is damaged") from None


def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_bytes()))


def read_safetensors(path):
    """{name: Tensor}"""
    with reading(path), open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > path.stat().st_size - 8:
            raise ValueError("it ends inside its header")
        tensors = {}
        for name, about in json.loads(f.read(length)).items():
            if name != "__metadata__":
                begin, end = map(operator.index, about["data_offsets"])
                if begin < 0:
                    raise ValueError(f"its tensor {name[:99]!r} begins inside the header")
                tensors[name] = Tensor(path, about["dtype"], tuple(about["shape"]),
                                       8 + length + begin, end - begin)
        return tensors


def read_folder(path):
    """(settings, {name: Tensor}) of a folder with config.json and *.safetensors."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        new = read_safetensors(file)
        if both := tensors.keys() & new:
            raise ValueError(f"two of its *.safetensors hold a tensor {min(both)[:99]!r}")
        tensors |= new
    return read_json(path / "config.json"), tensors


def read_gguf(path):
    """(settings, {name: Tensor})"""
    size = path.stat().st_size
    with open(path, "rb") as f:
        def take(n):
            if n > size - f.tell():
                raise ValueError("it ends inside its header")
            return f.read(n)

        def integer(n_bytes):
            return int.from_bytes(take(n_bytes), "little")

        def string():
            return take(integer(8)).decode()

        def numbers(kind, n):
            dtype = np.dtype(GGUF_NUMBERS[kind])
            return np.frombuffer(take(n * dtype.itemsize), dtype)

        def value(kind):
            if kind == STRING:
                return string()
            if kind != ARRAY:
                return numbers(kind, 1)[0].item()
            kind, n = integer(4), integer(8)
            return [string() for _ in range(n)] if kind == STRING else numbers(kind, n)

        if f.read(4) != b"GGUF":
            raise ValueError("it is neither a folder nor a GGUF file")
        if (version := integer(4)) not in (2, 3):
            raise ValueError(f"it is GGUF of version {version}, not 2 or 3, or is big endian")
        n_tensors, n_settings = integer(8), integer(8)
        about = {string(): value(integer(4)) for _ in range(n_settings)}
        tensors = {}
        for _ in range(n_tensors):
            name, shape = string(), numbers(10, integer(4)).tolist()[::-1]      # innermost first
            kind, offset = integer(4), integer(8)
            kind = GGUF_FORMATS[kind] if kind < len(GGUF_FORMATS) else f"GGML type {kind}"
            tensors[name] = Tensor(path, kind, tuple(shape), offset, None)
        align = about.get("general.alignment", 32)
        begin = -(-f.tell() // align) * align
    return about, {name: t._replace(begin=begin + t.begin) for name, t in tensors.items()}


def check(name, tensor, shape):
    """The Tensor, with its size, if it has this shape and is inside its file."""
    if tensor.format not in FORMATS:
        raise ValueError(f"its tensor {name} is in {short(tensor.format)}, and only "
                         f"{', '.join(FORMATS)} can be read")
    values, n_bytes = FORMATS[tensor.format]
    if tensor.shape != shape or shape[-1] % values:
        raise ValueError(f"its tensor {name} in {tensor.format} has the shape "
                         f"{short(tensor.shape)} instead of {shape}")
    size = math.prod(shape) // values * n_bytes
    if tensor.size not in (None, size):
        raise ValueError(f"its tensor {name} has {tensor.size} bytes instead of {size}")
    if not 0 <= tensor.begin <= tensor.file.stat().st_size - size:
        raise ValueError(f"its tensor {name} is not inside {tensor.file.name}, which may be cut")
    return tensor._replace(size=size)


@np.errstate(invalid="ignore", over="ignore")               # load() finds what is not finite
def dequantise(kind, raw):
    """float32 values, in one row, of a tensor's bytes (uint8). A block of 32 quantised values has a
    scale d and perhaps an offset m, both in F16, and whole numbers q: its values are d q + m."""
    if kind in ("F32", "F16"):
        return raw.view("<f4" if kind == "F32" else "<f2").astype(np.float32)
    if kind == "BF16":                                                 # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    blocks = raw.reshape(-1, FORMATS[kind][1])
    d = blocks[:, :2].view("<f2").astype(np.float32)                   # (n, 1)
    if kind == "Q8_0":
        return (d * blocks[:, 2:].view(np.int8)).reshape(-1)
    q = np.concatenate((blocks[:, -16:] & 15, blocks[:, -16:] >> 4), axis=1)           # (n, 32)
    if kind == "Q4_0":
        return (d * (q.view(np.int8) - 8)).reshape(-1)
    return (d * q + blocks[:, 2:4].view("<f2").astype(np.float32)).reshape(-1)         # Q4_1


def load(tensor):
    """A checked Tensor's values, float32."""
    file, kind, shape, begin, size = tensor
    w = torch.from_numpy(dequantise(kind, np.memmap(file, np.uint8, "r", begin, size))).view(shape)
    if not w.sum().isfinite():
        raise ValueError(f"it is damaged: a tensor of shape {shape} is not finite")
    return w
