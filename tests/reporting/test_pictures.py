from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_schema import quantized, report, row

from edgeqat.data.dataset import Split
from edgeqat.reporting.pictures import MOST_PICTURES, flipped, picture_path, write_pictures
from edgeqat.reporting.schema import Changes, FlippedSample, Flips, Gate


def changed(first: int, n: int) -> Changes:
    samples = [FlippedSample(index=first + i, target=None, float_class="a", quantized_class="b") for i in range(n)]
    flips = Flips(right_to_wrong=n, wrong_to_right=0, wrong_to_wrong=0, samples=samples)
    return Changes(flips=flips, largest=None, per_class=None)


def test_each_row_has_its_share_of_the_pictures() -> None:
    rows = [row("float"), quantized("ptq", changes=changed(0, 50)), quantized("qat", changes=changed(48, 50))]
    found = flipped(report(rows, Gate(passed=True, checks=[])))
    assert len(found) == len(set(found)) == MOST_PICTURES
    assert found[:4] == [0, 48, 1, 49]
    assert flipped(report([row("float"), quantized("ptq")], Gate(passed=True, checks=[]))) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_written_as_they_are(tmp_path: Path, channels: int) -> None:
    images = torch.randint(0, 256, (3, channels, 5, 7), dtype=torch.uint8)
    write_pictures(Split(images, None), [2, 0], tmp_path)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["test-0.png", "test-2.png"]
    found = Image.open(io.BytesIO((tmp_path / picture_path(2)).read_bytes()))
    pixels = torch.tensor(list(found.get_flattened_data())).reshape(5, 7, channels)
    assert torch.equal(pixels.permute(2, 0, 1), images[2].long())


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    write_pictures(Split(torch.zeros(1, 3, 640, 320, dtype=torch.uint8), None), [0], tmp_path)
    with Image.open(tmp_path / picture_path(0)) as found:
        assert found.size == (80, 160)


@pytest.mark.parametrize(
    "inputs",
    [torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 4, 4, dtype=torch.uint8), (torch.zeros(2, 4), torch.zeros(2, 4))],
)
def test_what_is_no_image_has_no_picture(tmp_path: Path, inputs: torch.Tensor) -> None:
    write_pictures(Split(inputs, None), [0], tmp_path)
    assert list(tmp_path.iterdir()) == []
