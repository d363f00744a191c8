from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from edgeqat.data.augment import AUGMENTATIONS, augment, crop, find_augmentations, flip
from edgeqat.errors import DataError

IN_MEMORY = sorted(name for name, found in AUGMENTATIONS.items() if not found.encoded)


def images(n: int, height: int = 32, width: int = 32) -> Tensor:
    generator = Generator().manual_seed(7)
    return torch.randint(1, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    """The slow way: out[y, x] = image[y + dy, x + dx], zero outside."""
    out = torch.zeros_like(image)
    height, width = image.shape[1:]
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[:, y, x] = image[:, y + dy, x + dx]
    return out


def offsets(original: Tensor, cropped: Tensor) -> list[tuple[int, int]]:
    """The one shift in -1..1 squared (images of side 8 to 15) that explains each cropped image."""
    found = []
    for before, after in zip(original, cropped, strict=True):
        fits = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if torch.equal(shifted(before, dy, dx), after)]
        assert len(fits) == 1
        found.append(fits[0])
    return found


def test_crop_shifts_each_image_by_its_own_offset() -> None:
    original = images(64, 8, 9)
    found = offsets(original, crop(original, Generator().manual_seed(0)))
    assert set(found) == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_crop_moves_up_to_four_pixels_at_32() -> None:
    """A white image shows its offset as the black rows and columns that moved in."""
    white = torch.full((500, 3, 32, 32), 255, dtype=torch.uint8)
    cropped = crop(white, Generator().manual_seed(0))
    rows = (cropped[:, 0] > 0).any(2).sum(1)
    columns = (cropped[:, 0] > 0).any(1).sum(1)
    assert set(rows.tolist()) == set(columns.tolist()) == {28, 29, 30, 31, 32}
    # Of the 9 offsets one leaves all 32 rows: 500 / 9 = 56 images, standard deviation 7.
    assert 20 < int((rows == 32).sum()) < 92


def test_flip_mirrors_about_half() -> None:
    original = images(400, 4, 4)
    flipped = flip(original, Generator().manual_seed(0))
    mirrored = [torch.equal(after, before.flip(2)) for before, after in zip(original, flipped, strict=True)]
    kept = [torch.equal(after, before) for before, after in zip(original, flipped, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250  # 200, standard deviation 10


@pytest.mark.parametrize("name", IN_MEMORY)
def test_generator_decides_everything(name: str) -> None:
    original = images(32)
    kept = original.clone()
    once = augment(original, [name], Generator().manual_seed(3))
    torch.manual_seed(12)
    again = augment(original, [name], Generator().manual_seed(3))
    other = augment(original, [name], Generator().manual_seed(4))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert torch.equal(original, kept), "the images given must not change"
    assert once.dtype == torch.uint8
    assert once.shape == original.shape
    assert once.is_contiguous()


@pytest.mark.parametrize("name", IN_MEMORY)
def test_empty_batch_and_tiny_images(name: str) -> None:
    assert augment(images(0), [name], Generator()).shape == (0, 3, 32, 32)
    assert augment(images(2, 1, 1), [name], Generator()).equal(images(2, 1, 1))


def test_augment_applies_in_order() -> None:
    original = images(16)
    generator = Generator().manual_seed(5)
    expected = flip(crop(original, generator), generator)
    assert torch.equal(augment(original, ["crop", "flip"], Generator().manual_seed(5)), expected)
    assert augment(original, [], Generator()) is original


def test_unknown_name() -> None:
    with pytest.raises(DataError, match="'cutout', wanted names among crop, flip, random_resized_crop"):
        find_augmentations(["crop", "cutout"])
