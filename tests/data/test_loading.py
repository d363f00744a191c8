"""Workers that decode."""

from __future__ import annotations

from helpers import run_python

FORKED = """
import os, warnings
import numpy as np
from edgeqat.data.loading import Loading, Work, decode_all

def decode(item, crop):
    return np.full((4, 4, 3), item, np.uint8)

words = "os.fork() was called. os.fork() is incompatible with multithreaded code, and JAX is multithreaded"
os.register_at_fork(before=lambda: warnings.warn(words, RuntimeWarning))
works = [Work([2 * i, 2 * i + 1], None) for i in range(3)]
for found in decode_all("train", works, decode, 4, Loading(2, timeout=60)):
    print(found.images[:, 0, 0, 0].tolist())
"""


def test_workers_beside_jax_warn_of_nothing() -> None:
    """LiteRT's converter imports JAX, which warns of every fork."""
    ended = run_python(FORKED)
    assert (ended.code, ended.out, ended.err) == (0, "[0, 1]\n[2, 3]\n[4, 5]\n", ""), ended
