"""Generates a small data set in ImageNet's layout: JPEGs of coloured shapes, of differing sizes, from a seed.

    python tools/imagenet_stand_in.py OUT --classes 8 --train 40 --val 10 --layout folder
    edgeqat run imagenet-mobilenetv2 --set data.source=OUT --set 'model.args={num_classes: 8}' ...

It stands in for the real thing where only the way of the data is looked at: no accuracy on it means anything.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

Layout = Literal["folder", "tar", "parquet"]
LAYOUTS: tuple[Layout, ...] = ("folder", "tar", "parquet")
SHAPES = ("ellipse", "rectangle", "triangle", "cross")
SHARD = 10_000
"""Samples of a shard."""

Sample = tuple[str, bytes, int]
"""Its name, JPEG and class."""


def main() -> None:
    """Writes the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--train", type=int, default=40, help="images a class")
    parser.add_argument("--val", type=int, default=10, help="images a class")
    parser.add_argument("--side", type=int, default=256, help="mean side of an image")
    parser.add_argument("--shard", type=int, default=SHARD, help="images a shard")
    parser.add_argument("--layout", choices=LAYOUTS, default="folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for part, n in (("train", options.train), ("val", options.val)):
        samples = draw(part, options.classes, n, options.side, options.seed)
        write(options.out, part, samples, options.classes, options.layout, options.shard)


def class_name(label: int) -> str:
    """What the folder of a class is called, in the form of ImageNet's synsets."""
    return f"n{label:08d}"


def draw(part: str, classes: int, per_class: int, side: int, seed: int) -> Iterator[Sample]:
    """All samples of a part; a class follows on a class at every sample, as in shards that were shuffled."""
    for number in range(per_class):
        for label in range(classes):
            rng = np.random.default_rng([seed, part == "train", label, number])
            yield f"{class_name(label)}_{number}", _jpeg(rng, label, classes, side), label


def write(out: Path, part: str, samples: Iterator[Sample], classes: int, layout: Layout, shard: int = SHARD) -> None:
    """Writes a part in a layout."""
    out.mkdir(parents=True, exist_ok=True)
    if layout == "folder":
        for name, data, label in samples:
            folder = out / part / class_name(label)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.jpg").write_bytes(data)
        return
    for number, chunk in enumerate(_chunks(samples, shard)):
        if layout == "tar":
            _write_tar(out / f"{part}-{number:05d}.tar", chunk)
        else:
            _write_parquet(out / f"{part}-{number:05d}.parquet", chunk, classes)


def _chunks(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    chunk: list[Sample] = []
    for sample in samples:
        chunk.append(sample)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _write_tar(path: Path, samples: list[Sample]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data, label in samples:
            for member, content in ((f"{name}.jpg", data), (f"{name}.cls", str(label).encode())):
                entry = tarfile.TarInfo(member)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def _write_parquet(path: Path, samples: list[Sample], classes: int) -> None:
    import datasets

    names = [class_name(label) for label in range(classes)]
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": data, "path": f"{name}.jpg"} for name, data, _ in samples],
            "label": [label for _, _, label in samples],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}),
    )
    table.to_parquet(str(path))


def _jpeg(rng: np.random.Generator, label: int, classes: int, side: int) -> bytes:
    """A shape on a dim background; shape and hue are the class's, place and size are random."""
    width, height = (max(8, round(side * factor)) for factor in rng.uniform(0.75, 1.25, 2))
    image = Image.new("RGB", (width, height), tuple(rng.integers(0, 60, 3).tolist()))
    hue = round(255 * label / classes)
    colour = Image.new("HSV", (1, 1), (hue, 220, int(rng.integers(170, 256)))).convert("RGB").getpixel((0, 0))
    radius = rng.uniform(0.2, 0.35) * min(width, height)
    x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
    box = (x - radius, y - radius, x + radius, y + radius)
    canvas, shape = ImageDraw.Draw(image), SHAPES[label % len(SHAPES)]
    if shape == "ellipse":
        canvas.ellipse(box, fill=colour)
    elif shape == "rectangle":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(x, box[1]), (box[2], box[3]), (box[0], box[3])], fill=colour)
    else:
        canvas.rectangle((x - radius / 3, box[1], x + radius / 3, box[3]), fill=colour)
        canvas.rectangle((box[0], y - radius / 3, box[2], y + radius / 3), fill=colour)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return written.getvalue()


if __name__ == "__main__":
    main()
