"""Random numbers: every use has its own stream, named by a text and some numbers.

    stream("rows", "retain", seed, step)     numpy.random.Generator
    torch_stream("weights", "base", seed)    torch.Generator, on the CPU or another device
    text_stream("exam", "+")                 random.Random
    seed_of("relearn", seed)                 an int, to pass on as the seed for a purpose

Streams with different names or numbers are independent, because each is seeded by a SHA-256 of its
name and numbers. (Seeds made by addition can collide. So can numpy's lists of integers, because
their trailing zeros do not count.) Nothing else in this project seeds a generator. If two runs
should share numbers, they name the same stream, and the docstring there says so.
"""
import hashlib
import json
import random

import numpy as np
import torch


def key(name, *numbers):
    """256 bits that identify a name and numbers (or further names)."""
    return int.from_bytes(hashlib.sha256(json.dumps([name, *numbers]).encode()).digest(), "big")


def seed_of(name, *numbers):
    """63 bits of key()."""
    return key(name, *numbers) >> 193


def stream(name, *numbers):
    return np.random.default_rng(key(name, *numbers))


def torch_stream(name, *numbers, device="cpu"):
    """On a CPU, torch uses only 32 bits of a seed. Among a thousand streams, the chance that any
    two are the same is 1 in 8,600."""
    return torch.Generator(device).manual_seed(seed_of(name, *numbers))


def text_stream(name, *numbers):
    return random.Random(key(name, *numbers))


def allot(shares, size, rng):
    """(k,) int64: how many of `size` rows each of k shares gets. Shares need not add up to 1.

    One random number shifts all borders (systematic sampling). The numbers of rows add up to size,
    each differs from its exact share by less than 1, and its mean is exactly that share.
    """
    borders = np.cumsum(shares)
    borders = np.floor(borders[:-1] / borders[-1] * size + rng.random())
    return np.diff(np.minimum(borders, size), prepend=0, append=size).astype(np.int64)
