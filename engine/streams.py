"""Random numbers: every use has a stream of its own, named by a text and some numbers.

    stream("rows", "retain", seed, step)     numpy.random.Generator
    torch_stream("weights", "base", seed)    torch.Generator, on the CPU or another device
    text_stream("exam", "+")                 random.Random
    seed_of("relearn", seed)                 an int: the seed of all that serves another purpose

Streams of different names or numbers are independent: each is seeded by a SHA-256 of all of them.
(Seeds made by adding, or numpy's lists of integers, whose trailing zeros do not count, collide.)
Nothing else in this project seeds a generator; where two runs are to share numbers, they name the
same stream, and the docstring there says so.
"""
import hashlib
import json
import random

import numpy as np
import torch


def key(name, *numbers):
    """256 bits that stand for a name and numbers (or further names)."""
    return int.from_bytes(hashlib.sha256(json.dumps([name, *numbers]).encode()).digest(), "big")


def seed_of(name, *numbers):
    """63 bits of key()."""
    return key(name, *numbers) >> 193


def stream(name, *numbers):
    return np.random.default_rng(key(name, *numbers))


def torch_stream(name, *numbers, device="cpu"):
    """On a CPU torch uses 32 bits of a seed: among a thousand streams the chance that any two are
    the same is 1 in 8,600."""
    return torch.Generator(device).manual_seed(seed_of(name, *numbers))


def text_stream(name, *numbers):
    return random.Random(key(name, *numbers))


def allot(shares, size, rng):
    """How many of `size` rows each of some shares (they need not add up to 1) gets: (k,) int64.

    One random number moves all borders (systematic sampling), so that the numbers add up to size,
    none is off by 1 or more, and their mean is each share exactly, however small.
    """
    borders = np.cumsum(shares)
    borders = np.floor(borders[:-1] / borders[-1] * size + rng.random())
    return np.diff(np.minimum(borders, size), prepend=0, append=size).astype(np.int64)
