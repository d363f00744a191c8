"""Folders of image files: one subfolder a class, or unlabelled images at any depth.

    cat/ dog/                     classes; a share of each is set aside for the test
    train/cat/ ... test/cat/ ...  the same with a test part, which may also be called val
    any images                    unlabelled, where no labels are needed

Hidden files and folders, and files that are no images, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edgeqat.data.corrupt import Skipped
from edgeqat.data.dataset import Samples, Source, Split
from edgeqat.data.decode import decode_files
from edgeqat.data.readers import FileReader
from edgeqat.data.reading import Reading
from edgeqat.errors import DataError

__all__ = ["describe_parts", "read_folder"]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"})
TRAIN_PART = "train"
TEST_PARTS = ("test", "val", "validation", "valid")
"""What the folder of the test part may be called; the first that is there is taken."""
ALIASES = {"training": "train", "trainset": "train", "testing": "test", "testset": "test", "eval": "val", "dev": "val"}
"""What a part may be called elsewhere: beside another part it is no class."""


def read_folder(source: str, folder: Path, reading: Reading, needs_labels: bool) -> Source:
    """Reads a folder of images, or lists it where images are read when they are needed.

    Args:
        source: How messages call it.
        folder: The folder.
        reading: How images are read.
        needs_labels: Whether subfolders are classes. If not, every image below is a sample without a label.

    Raises:
        DataError: it holds no images or cannot be read, an image cannot be decoded, or its classes do not fit.
    """
    training, test = _parts(source, folder)
    if not needs_labels:
        unlabelled = [(part, _unlabelled(part), None) for part in (training, test) if part is not None]
        return _source(unlabelled, None, reading)
    names = _classes(training)
    if test is not None and _classes(test) != names:
        only = sorted(set(names) ^ set(_classes(test)))
        raise DataError(
            f"{source}: {training.name} and {test.name} have different classes ({', '.join(only)} are in "
            "one of them only), wanted the same subfolders in both"
        )
    listed = [(part, *_labelled(part, names)) for part in (training, test) if part is not None]
    return _source(listed, tuple(names), reading)


def _source(
    listed: Sequence[tuple[Path, list[Path], Tensor | None]], names: tuple[str, ...] | None, reading: Reading
) -> Source:
    """Of one or two parts: their folders, files and labels."""
    skipped = Skipped(str(listed[0][0]), reading.max_corrupt)
    if reading.storage == "stream":
        raise DataError(f"data.storage: stream reads folders of shards, and {listed[0][0]} holds files; use disk")
    splits: list[Samples] = []
    for part, files, labels in listed:
        if reading.storage == "disk":
            splits.append(reading.stored(str(part), FileReader(part, files), labels))
        else:
            images, kept = decode_files(str(part), files, reading.sizing, skipped)
            splits.append(Split(images, None if labels is None else labels[kept]))
    skipped.tell()
    return Source(splits[0], splits[1] if len(splits) > 1 else None, names, sizing=reading.sizing)


def describe_parts(folder: Path) -> str | None:
    """Which parts of a folder are read as what, and which are not read; None where it has no parts."""
    training, test = _parts(str(folder), folder)
    if training == folder:
        return None
    used = {training.name} if test is None else {training.name, test.name}
    unused = sorted(path.name for path in _entries(folder) if path.is_dir() and path.name not in used)
    tested = "a share of it is the test" if test is None else f"{test.name} is the test"
    return f"trained on {training.name}, {tested}" + "".join(f"; {name} is not read" for name in unused)


def _parts(source: str, folder: Path) -> tuple[Path, Path | None]:
    """The folders of the training and the test part; without parts, the folder itself."""
    below = {path.name for path in _entries(folder) if path.is_dir()}
    wanted = {name: ALIASES.get(name.lower(), name.lower()) for name in sorted(below)}
    parts = {TRAIN_PART, *TEST_PARTS}
    wrong = [name for name, part in wanted.items() if name != part and part in parts]
    if wrong and len(below) > 1 and set(wanted.values()) <= parts:
        raise DataError(
            f"{source} holds {' and '.join(wanted)}, wanted class folders, or {TRAIN_PART} and one of "
            f"{', '.join(TEST_PARTS)}; rename {wrong[0]} to {wanted[wrong[0]]}"
        )
    # A class may be called train: it is a part only where every subfolder is one.
    if not below or not below <= {TRAIN_PART, *TEST_PARTS}:
        return folder, None
    if TRAIN_PART not in below:
        raise DataError(
            f"{source} holds {' and '.join(sorted(below))} and no {TRAIN_PART}; add it, or name them apart"
        )
    test = next((name for name in TEST_PARTS if name in below), None)
    return folder / TRAIN_PART, None if test is None else folder / test


def _classes(part: Path) -> list[str]:
    """The names of the class folders, sorted."""
    entries = _entries(part)
    names = [path.name for path in entries if path.is_dir()]
    loose = [path for path in entries if _is_image(path)]
    if loose and names:
        raise DataError(
            f"{part} holds class folders ({names[0]}, ...) and images without a class ({loose[0].name}, ...), "
            "wanted one or the other; move the images"
        )
    if loose:
        raise DataError(
            f"{part} holds {len(loose)} images without labels, wanted one subfolder a class; only train: null with "
            "task.metric: agreement needs none"
        )
    if not names:
        raise DataError(f"{part} holds no images, wanted a subfolder a class with {_wanted()}, or train-*.parquet")
    return names


def _labelled(part: Path, names: Sequence[str]) -> tuple[list[Path], Tensor]:
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        found, own = list(_images(part / name)), _entries(part / name)
        deeper = [path.name for path in own if path.is_dir()]
        if found and deeper and not any(map(_is_image, own)):
            raise DataError(
                f"the class folder {part / name} holds no images but the folders {', '.join(deeper[:3])}, wanted the "
                f"images of the class; move them up, or make {', '.join(deeper[:3])} the class folders"
            )
        if not found:
            raise DataError(f"the class folder {part / name} holds no images, wanted {_wanted()}; fill or remove it")
        files += found
        labels += [label] * len(found)
    return files, torch.tensor(labels)


def _unlabelled(part: Path) -> list[Path]:
    files = list(_images(part))
    if not files:
        raise DataError(f"{part} holds no images, wanted {_wanted()}")
    return files


def _images(folder: Path, inside: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Every image below a folder, in the order of the names; links are followed, `inside` are the folders above."""
    try:
        status = folder.stat()
    except OSError as error:
        raise _unreadable(folder, error) from error
    own = (status.st_dev, status.st_ino)
    if own in inside:
        raise DataError(f"{folder} leads back to a folder that it is in: a loop of symbolic links; remove the link")
    for path in _entries(folder):
        if path.is_dir():
            yield from _images(path, (*inside, own))
        elif _is_image(path):
            yield path


def _entries(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, sorted by name."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> DataError:
    return DataError(f"the folder {folder} cannot be read ({error.strerror or type(error).__name__}); check it")


def _is_image(path: Path) -> bool:
    # A link to nothing counts, so that it is reported; a pipe does not: reading it would wait forever.
    return path.suffix.lower() in SUFFIXES and not path.is_dir() and (path.is_file() or path.is_symlink())


def _wanted() -> str:
    return ", ".join(sorted(SUFFIXES))
