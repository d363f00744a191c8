"""Decoding one image, and knowing beforehand what fits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from parquet_folders import SIZE, encode, noise

from edgeqat.data.decode import bytes_of_cell, decode, require_memory
from edgeqat.data.sizing import Sizing
from edgeqat.errors import DataError
from edgeqat.machine import available_memory


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say how much memory is free")
def test_free_memory_is_part_of_all_memory() -> None:
    free = available_memory()
    assert free is not None
    assert 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_fits_and_what_cannot() -> None:
    require_memory("a little", 1000)
    with pytest.raises(DataError, match=r"^a lot needs 2e\+09 GB in memory, but .* GB are free; lower data"):
        require_memory("a lot", 10**18)


def test_a_cell_may_name_a_file(tmp_path: Path) -> None:
    pixels = noise(1, 0)[0]
    (tmp_path / "x.png").write_bytes(encode(pixels))
    assert np.array_equal(
        decode("x", bytes_of_cell("x", {"bytes": None, "path": str(tmp_path / "x.png")}), Sizing(SIZE)), pixels
    )


def test_modes_of_more_than_8_bits_are_refused() -> None:
    with pytest.raises(DataError, match="x has Pillow mode I;16, wanted 8 bits a channel; convert it"):
        decode("x", encode(np.full((8, 8), 40000, np.uint16)), Sizing(SIZE))
