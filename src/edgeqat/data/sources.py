"""Where images come from: `load` turns a source's name into four fixed, disjoint splits of uint8 tensors.

    digits      scikit-learn's 8x8 handwritten digits, which need no download
    cifar10     the hub's uoft-cs/cifar10, through the datasets library
    a folder    local train-*.parquet and test-*.parquet in the hub's layout: an image column `img` or `image`
                holding {bytes, path}, and an integer column `label`

Splits depend on the source and on calibration_n, never on a training seed. Validation is drawn first, so it
is the same for every calibration_n; the rest of the source's training split is calibration, then train.

Everything is decoded once, into memory: at 32x32 a training epoch is bound by the model, not by JPEG.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from edgeqat.errors import DataError

__all__ = ["Dataset", "Split", "load"]

SPLIT_SEED = 2015
"""Decides who is in which split, for every source; changing it makes all published numbers incomparable."""

DIGITS_TEST_N = 600
VALIDATION_SHARE = 10
"""One training image in this many is set aside for validation, up to VALIDATION_LIMIT."""
VALIDATION_LIMIT = 2000
CHANNELS = 3

CIFAR10_HUB = "uoft-cs/cifar10"
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
HALF = (0.5, 0.5, 0.5)
"""Default mean and std of digits: maps 0..255 to -1..1, so black and white are the ends of the input grid."""

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMN = "label"
READ_BATCH = 1000
EIGHT_BIT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
"""Pillow modes that convert to RGB faithfully; it clips 16-bit and float images to 255 without a word."""


_Pixels: TypeAlias = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, decoded and in memory.

    Attributes:
        images: uint8 [N, C, H, W].
        labels: int64 [N], each the index of a name in `Dataset.labels`.

    Raises:
        DataError: a tensor has another type or shape, or the two differ in length.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4:
            raise DataError(f"images are {_describe(self.images)}, wanted uint8 [N, C, H, W]")
        if self.labels.dtype != torch.int64 or self.labels.ndim != 1:
            raise DataError(f"labels are {_describe(self.labels)}, wanted int64 [N]")
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images have {len(self.labels)} labels, wanted one each")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """A copy of the samples at `indices` (int64 [M]), in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four disjoint splits and how to normalise them.

    Attributes:
        source: The name or path it was loaded from, as given.
        train, calibration, validation, test: What is fitted, what seeds activation ranges, what training is
            watched on, and what is reported.
        mean, std: Per channel, of images in 0..1.
        labels: The class names, by label.
    """

    source: str
    train: Split
    calibration: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Source:
    """A source as read, before anything is set aside; mean and std are its defaults."""

    training: Split
    test: Split
    labels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load(
    source: str,
    *,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    calibration_n: int,
    base_dir: Path | None = None,
) -> Dataset:
    """Reads a source and splits it.

    Args:
        source: `digits`, `cifar10`, or a folder of *.parquet (see the module's docstring).
        image_size: Side of the square RGB images returned; others are resized bilinearly, without regard to
            their aspect ratio.
        mean: Per channel, of images in 0..1. None: the source's own. For digits 0.5, for cifar10 the figures
            everyone uses, for a folder those measured over its whole training split.
        std: As `mean`.
        calibration_n: How many training images to set aside for calibration.
        base_dir: What a relative folder is relative to; None: the working directory.

    Raises:
        DataError: the source is unknown, missing, unreadable, empty, of one class or has labels out of range;
            or the other arguments do not fit it.
    """
    if image_size < 1:
        raise DataError(f"data.image_size is {image_size}, wanted at least 1")
    if calibration_n < 1:
        raise DataError(f"data.calibration_n is {calibration_n}, wanted at least 1")
    chosen_mean = None if mean is None else _per_channel("data.mean", mean)
    chosen_std = None if std is None else _per_channel("data.std", std)
    if source == "digits":
        read = _read_digits(image_size)
    elif source == "cifar10":
        read = _read_cifar10(image_size)
    else:
        read = _read_folder(source, _find_folder(source, base_dir), image_size)

    classes = len(read.labels)
    _check_split(f"{source}: the training split", read.training, classes)
    _check_split(f"{source}: the test split", read.test, classes)
    train, calibration, validation = _carve(source, read.training, calibration_n)
    final_mean = read.mean if chosen_mean is None else chosen_mean
    final_std = read.std if chosen_std is None else chosen_std
    if min(final_std) <= 0:
        raise DataError(f"data.std is {list(final_std)}, wanted figures above 0; give data.std")
    return Dataset(source, train, calibration, validation, read.test, final_mean, final_std, read.labels)


def _read_digits(image_size: int) -> _Source:
    """Upsamples the 8x8 digits (0..16) to RGB; the test split is stratified by class."""
    from sklearn.datasets import load_digits  # heavy, and not needed by the other sources

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images, view = _allocate(len(pixels), image_size)
    for index, image in enumerate(pixels):
        view[index] = _to_rgb(Image.fromarray(image), image_size)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    whole = Split(images, labels)

    # Evenly spaced picks from a class by class list give every class its share, to within one image.
    order = _permutation(len(whole))
    by_class = order[np.argsort(digits.target[order], kind="stable")]
    picks = np.arange(DIGITS_TEST_N) * len(whole) // DIGITS_TEST_N
    in_test = np.zeros(len(whole), dtype=bool)
    in_test[by_class[picks]] = True
    training = whole.take(torch.from_numpy(np.flatnonzero(~in_test)))
    test = whole.take(torch.from_numpy(np.flatnonzero(in_test)))
    return _Source(training, test, tuple(str(name) for name in digits.target_names), HALF, HALF)


def _read_cifar10(image_size: int) -> _Source:
    """Downloads CIFAR-10, or takes it from the datasets library's cache."""
    import datasets  # heavy: a second on its own

    try:
        both = datasets.load_dataset(CIFAR10_HUB)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"the hub's {CIFAR10_HUB} cannot be read ({_first_line(error)}); without a network, set "
            "data.source to a local folder holding its train-*.parquet and test-*.parquet"
        ) from error
    training, names = _decode_table("cifar10's train", both["train"], len(both["train"]), image_size)
    test, _ = _decode_table("cifar10's test", both["test"], len(both["test"]), image_size)
    return _Source(training, test, _label_names("cifar10", names, training), CIFAR10_MEAN, CIFAR10_STD)


def _find_folder(source: str, base_dir: Path | None) -> Path:
    """The folder `source` means; whatever is not a folder is refused here, names not known included."""
    folder = Path(source).expanduser()
    if base_dir is not None:
        folder = base_dir / folder  # an absolute folder wins over base_dir
    if not folder.is_dir():
        raise DataError(
            f"data.source {source!r} is not digits, cifar10 or an existing folder (looked for {folder}); "
            "other hub names come in a later version: until then, download theirs as *.parquet"
        )
    return folder


def _read_folder(source: str, folder: Path, image_size: int) -> _Source:
    """Reads train-*.parquet and test-*.parquet, shards in the order of their names."""
    import datasets  # heavy: a second on its own

    read: dict[str, tuple[Split, tuple[str, ...] | None]] = {}
    for part in ("train", "test"):
        files = sorted(folder.glob(f"{part}-*.parquet"))
        if not files:
            raise DataError(
                f"data.source {source!r} holds no {part}-*.parquet (looked in {folder}), wanted "
                "train-*.parquet and test-*.parquet; folders of images come in a later version"
            )
        what = f"{source}: {part}-*.parquet"
        rows = {str(file): _count_rows(file) for file in files}
        filled = [file for file, n in rows.items() if n > 0]  # the library cannot read an empty shard
        if not filled:
            raise DataError(f"{what} holds no rows, wanted images of at least two classes")
        # Not load_dataset, which reports local files to the hub's download counter; streaming, because else
        # the library copies them to its cache; and a cache of our own, because it leaves a lock file there.
        try:
            with tempfile.TemporaryDirectory() as cache:
                table = datasets.Dataset.from_parquet(filled, part, cache_dir=cache, streaming=True)
                read[part] = _decode_table(what, table, sum(rows.values()), image_size)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{what} cannot be read ({_first_line(error)}); fetch it again") from error
    (training, names), (test, test_names) = read["train"], read["test"]
    if names is not None and test_names is not None and names != test_names:
        raise DataError(f"{source}: train and test have different label names, wanted the same in one order")
    labels = _label_names(source, names, training)
    return _Source(training, test, labels, *_statistics(training.images))


def _count_rows(file: Path) -> int:
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is not readable as Parquet ({_first_line(error)}); fetch it again") from error


def _decode_table(what: str, table: Any, rows: int, image_size: int) -> tuple[Split, tuple[str, ...] | None]:
    """Decodes a table of the hub's layout; also gives the label names when the table carries them.

    Args:
        what: How messages call the table.
        table: A datasets.Dataset or IterableDataset, which have no types.
        rows: How many rows it has.
        image_size: Side of the images wanted.
    """
    import datasets

    columns = table.features
    image_column = next((name for name in IMAGE_COLUMNS if name in columns), None)
    if image_column is None or LABEL_COLUMN not in columns:
        raise DataError(f"{what} has columns {', '.join(columns)}, wanted img or image, and label")
    if isinstance(columns[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))

    images, view = _allocate(rows, image_size)
    labels: list[object] = []
    for batch in table.iter(batch_size=READ_BATCH):
        for cell, label in zip(batch[image_column], batch[LABEL_COLUMN], strict=True):
            view[len(labels)] = _decode(f"{what}: image {len(labels)}", cell, image_size)
            labels.append(label)
    numbers = np.asarray(labels)
    if numbers.dtype.kind not in "iu":
        raise DataError(f"{what} has {numbers.dtype} labels such as {labels[0]!r}, wanted integers")
    names = columns[LABEL_COLUMN]
    known = tuple(names.names) if isinstance(names, datasets.ClassLabel) else None
    return Split(images, torch.from_numpy(numbers.astype(np.int64))), known


def _decode(what: str, cell: object, image_size: int) -> _Pixels:
    """Pixels of one cell, {bytes, path} or plain bytes: uint8 [image_size, image_size, 3]."""
    data = cell.get("bytes") if isinstance(cell, Mapping) else cell
    if not isinstance(data, bytes):
        raise DataError(f"{what} holds no bytes, wanted an encoded image in {{bytes, path}}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in EIGHT_BIT_MODES:
                raise DataError(f"{what} has Pillow mode {image.mode}, wanted 8 bits a channel; convert it")
            return _to_rgb(image, image_size)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{what} cannot be decoded, wanted PNG, JPEG or the like; replace it") from error


def _allocate(n: int, image_size: int) -> tuple[Tensor, _Pixels]:
    """uint8 [n, 3, S, S], and a view of it as [n, S, S, 3], which is how Pillow gives pixels."""
    images = torch.empty(n, CHANNELS, image_size, image_size, dtype=torch.uint8)
    return images, images.numpy().transpose(0, 2, 3, 1)


def _to_rgb(image: Image.Image, image_size: int) -> _Pixels:
    """uint8 [image_size, image_size, 3]; bilinear, and averaging when it shrinks."""
    rgb = image.convert("RGB")
    if rgb.size != (image_size, image_size):
        rgb = rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _carve(source: str, training: Split, calibration_n: int) -> tuple[Split, Split, Split]:
    """Sets validation, then calibration images aside: (train, calibration, validation)."""
    n = len(training)
    validation_n = min(n // VALIDATION_SHARE, VALIDATION_LIMIT)
    if validation_n == 0:
        raise DataError(f"{source}: {n} training images, wanted at least {VALIDATION_SHARE}; add some")
    if calibration_n >= n - validation_n:
        raise DataError(
            f"data.calibration_n is {calibration_n}, but {source} has {n} training images, {validation_n} of "
            "them set aside for validation, and some must be left to train on; lower it"
        )
    order = torch.from_numpy(_permutation(n))
    validation = training.take(order[:validation_n])
    calibration = training.take(order[validation_n : validation_n + calibration_n])
    train = training.take(order[validation_n + calibration_n :])
    if train.labels.min() == train.labels.max():
        raise DataError(f"{source}: the {len(train)} images left to train on have one class; lower calibration_n")
    return train, calibration, validation


def _permutation(n: int) -> npt.NDArray[np.int64]:
    # The legacy generator: NumPy has frozen its stream, so splits survive upgrades.
    return np.random.RandomState(SPLIT_SEED).permutation(n).astype(np.int64)


def _check_split(what: str, split: Split, classes: int) -> None:
    if len(split) == 0:
        raise DataError(f"{what} is empty, wanted images of at least two classes")
    low, high = int(split.labels.min()), int(split.labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{what} has labels {low} to {high}, wanted 0 to {classes - 1}; fix the labels")
    if low == high:
        raise DataError(f"{what} has images of one class only (label {low}), wanted at least two")


def _label_names(source: str, names: tuple[str, ...] | None, training: Split) -> tuple[str, ...]:
    """The table's own names, else the numbers 0 to the largest training label."""
    if names is not None:
        return names
    highest = int(training.labels.max())
    if highest >= len(training):
        raise DataError(f"{source}: label {highest} among {len(training)} images, wanted labels 0, 1, 2, ...")
    return tuple(str(label) for label in range(highest + 1))


def _per_channel(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) != CHANNELS or not all(math.isfinite(value) for value in values):
        raise DataError(f"{name} is {list(values)}, wanted {CHANNELS} numbers, one per RGB channel")
    return tuple(float(value) for value in values)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of images / 255, from exact integer counts: the same on every machine."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in images.unbind(1):
        share = channel.reshape(-1).bincount(minlength=256).double() / channel.numel()
        mean = (share * levels).sum()
        means.append(float(mean))
        stds.append(float((share * (levels - mean) ** 2).sum().sqrt()))
    return tuple(means), tuple(stds)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
