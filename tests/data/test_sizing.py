"""How images come to their size: in training, on a device, and as a random part."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Generator

from edgeqat.data.augment import find_augmentations
from edgeqat.data.decode import decode
from edgeqat.data.sizing import Sizing, _box, draw_crops
from edgeqat.errors import DataError
from edgeqat.replay.pixels import read_image


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    """Colours that change with the place: red to the right, green downwards."""
    columns, rows = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([columns, rows, np.full_like(rows, 128)], axis=2).astype(np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, kind, quality=95)
    return written.getvalue()


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 90), height=st.integers(1, 90), side=st.integers(1, 40))
def test_a_device_that_follows_the_manifest_sees_the_same_pixels(
    tmp_path_factory: pytest.TempPathFactory, width: int, height: int, side: int
) -> None:
    file = tmp_path_factory.mktemp("images") / "x.png"
    file.write_bytes(picture(width, height))
    for sizing in (Sizing(side), Sizing(side, "center_crop")):
        here = decode("x", file.read_bytes(), sizing)
        assert here.shape == (side, side, 3)
        found = read_image(file, {"channels": 3, "resize": sizing.steps()}, (side, side))
        assert np.array_equal(found, here)


def test_center_crop_keeps_the_aspect_ratio() -> None:
    """Of a picture twice as wide as it is high, the middle: red from a quarter, and a little, to three quarters."""
    pixels = decode("x", picture(512, 256), Sizing(224, "center_crop"))
    assert Sizing(224, "center_crop").shorter == 256
    assert pixels[0, 0, 0] == pytest.approx(255 * (128 + 16) / 512, abs=2)
    assert pixels[0, -1, 0] == pytest.approx(255 * (128 + 240) / 512, abs=2)
    assert pixels[0, 0, 1] == pytest.approx(16, abs=2)
    assert pixels[-1, 0, 1] == pytest.approx(239, abs=2)
    stretched = decode("x", picture(512, 256), Sizing(224))
    assert stretched[0, 0, 0] < 3
    assert stretched[0, -1, 0] > 252


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 400), height=st.integers(1, 400), seed=st.integers(0, 99))
def test_random_parts_lie_within_the_image(width: int, height: int, seed: int) -> None:
    for drawn in draw_crops(8, (0, 0), Generator().manual_seed(seed)).tolist():
        left, top, part_width, part_height = _box(width, height, drawn)
        assert 0 <= left <= left + part_width <= width
        assert 0 <= top <= top + part_height <= height
        assert part_width > 0
        assert part_height > 0


def test_random_parts_have_the_areas_and_ratios_of_imagenet() -> None:
    boxes = [_box(300, 300, drawn) for drawn in draw_crops(2000, (0, 0), Generator().manual_seed(0)).tolist()]
    areas = torch.tensor([w * h / 300**2 for _, _, w, h in boxes])
    ratios = torch.tensor([w / h for _, _, w, h in boxes])
    assert 0.07 < areas.min() < 0.1
    assert areas.max() > 0.95
    assert ratios.min() > 0.74
    assert ratios.max() < 1.35
    assert ratios.log().mean().abs() < 0.02


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_random_part_shows_the_place_that_was_drawn(kind: str) -> None:
    """A JPEG is decoded at a fraction of its size; the part must be the same one."""
    data, sizing = picture(800, 600, kind), Sizing(32)
    for drawn in draw_crops(5, (0, 0), Generator().manual_seed(4)):
        left, top, width, height = _box(800, 600, drawn.tolist())
        pixels = decode("x", data, sizing, drawn)
        assert pixels.shape == (32, 32, 3)
        assert pixels[:, :, 0].mean() == pytest.approx(255 * (left + width / 2) / 800, abs=3)
        assert pixels[:, :, 1].mean() == pytest.approx(255 * (top + height / 2) / 600, abs=3)
        assert np.array_equal(pixels, decode("x", data, sizing, drawn))


def test_what_works_on_encoded_images_comes_first() -> None:
    assert [found.encoded for found in find_augmentations(["random_resized_crop", "flip"])] == [True, False]
    for names in (["flip", "random_resized_crop"], ["random_resized_crop", "random_resized_crop"]):
        with pytest.raises(DataError, match="wanted random_resized_crop first"):
            find_augmentations(names)


def test_opened_images_stay_as_they_are(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(picture(9, 7)))
    first = decode("x", image, Sizing(4))
    assert np.array_equal(decode("x", image, Sizing(4)), first)
