"""Where data comes from: `load` turns a source's name into four fixed, disjoint splits.

    digits                scikit-learn's 8x8 handwritten digits, which need no download
    cifar10               the hub's uoft-cs/cifar10, through the datasets library
    a folder              of image files, of train-*.tar, or a local data set of the datasets library (*.parquet,
                          save_to_disk)
    file.py:callable      the user's own code, or module:callable
    anything else         a name of the datasets library's hub

A folder that exists wins over callables and hub names.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from edgeqat.callables import is_callable_name
from edgeqat.data.dataset import Dataset, Samples, Source, Split
from edgeqat.data.decode import allocate
from edgeqat.data.folders import read_folder
from edgeqat.data.loading import IN_PROCESS, Loading
from edgeqat.data.reading import Reading, Storage
from edgeqat.data.returned import read_callable
from edgeqat.data.sizing import Resize, Sizing
from edgeqat.data.splitting import carve, check_classes, hold_out
from edgeqat.data.tables import CIFAR10_HUB, CIFAR10_MEAN, CIFAR10_STD, is_table_folder, read_hub, read_table_folder
from edgeqat.data.tars import is_tar_folder, read_tar_folder
from edgeqat.errors import DataError
from edgeqat.recipe import expanded, is_dataset_name

__all__ = ["has_own_shape", "load"]

DIGITS_TEST_N = 600
HALF = (0.5, 0.5, 0.5)
"""Default mean and std of digits: maps 0..255 to -1..1, so black and white are the ends of the input grid."""


def load(
    source: str,
    *,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    calibration_n: int,
    base_dir: Path | None = None,
    needs_labels: bool = True,
    resize: Resize = "stretch",
    storage: Storage = "memory",
    shuffle_buffer: int = 10_000,
    max_corrupt: int = 0,
    loading: Loading = IN_PROCESS,
) -> Dataset:
    """Reads a source and splits it.

    Args:
        source: See the module's docstring.
        image_size: Side of the square RGB images returned. What a callable returns in memory is not resized.
        mean: Per channel, of images in 0..1. None: the source's own. For digits 0.5, for cifar10 the figures
            everyone uses, else those measured over train, calibration and validation. Float inputs have none.
        std: As `mean`.
        calibration_n: How many training samples to set aside for calibration.
        base_dir: What a relative folder is relative to; None: the working directory.
        needs_labels: Whether samples without labels are refused.
        resize: How images come to their size, bilinearly: see `Sizing`.
        storage: Whether train and test are held in memory, or read when they are needed: in any order from a disk,
            or shard by shard as a stream. Calibration and validation are held in memory.
        shuffle_buffer: How many samples of a stream are held, undecoded, to draw the next ones from.
        max_corrupt: How many samples that cannot be read may be skipped, in a load or an epoch.
        loading: Who decodes what is looked through now.

    Raises:
        DataError: the source is unknown, missing, unreadable, empty, of one class or has labels out of range;
            or the other arguments do not fit it.
        ModelError: a callable cannot be imported.
    """
    if image_size < 1:
        raise DataError(f"data.image_size is {image_size}, wanted at least 1")
    if calibration_n < 1:
        raise DataError(f"data.calibration_n is {calibration_n}, wanted at least 1")
    try:
        reading = Reading(Sizing(image_size, resize), storage, shuffle_buffer, max_corrupt, loading)
        read = _read(source, reading, base_dir, needs_labels)
    except OSError as error:  # a folder above that may not be entered, a name that is too long
        place = source if error.filename is None else error.filename
        raise DataError(f"data.source: {place} cannot be read ({error.strerror or error}); check it") from error
    if needs_labels and read.training.targets is None:
        raise DataError(
            f"{source} has no labels, which training and every metric but agreement need; "
            "set train: null and task.metric: agreement, or give labels"
        )
    labels = _check_labels(source, read)
    train, calibration, validation, test = carve(source, read, calibration_n)
    test = test.checked(loading)  # every variant is judged on the same samples, each of them once
    check_classes(f"{source}: the test split", test, 0 if labels is None else len(labels))
    chosen_mean, chosen_std = _normalisation(source, read, (train, calibration, validation), mean, std)
    return Dataset(source, train, calibration, validation, test, chosen_mean, chosen_std, labels, read.sizing)


def has_own_shape(source: str) -> bool:
    """Whether the shape of a source's inputs is known only once it is read."""
    return is_callable_name(source) and not Path(source).is_dir()


def _read(source: str, reading: Reading, base_dir: Path | None, needs_labels: bool) -> Source:
    if source == "digits":
        if reading.storage != "memory":
            raise DataError(f"data.storage is {reading.storage}, and digits come from memory; set it to memory")
        return _read_digits(reading.sizing)
    if source == "cifar10":
        advice = "without a network, set data.source to a local folder holding its train-*.parquet and test-*.parquet"
        cifar10 = read_hub("cifar10", CIFAR10_HUB, reading, advice)
        return replace(cifar10, mean=CIFAR10_MEAN, std=CIFAR10_STD)
    folder = expanded(source)
    if base_dir is not None:
        folder = base_dir / folder  # an absolute folder wins over base_dir
    if source and folder.is_dir():
        if is_table_folder(folder):
            return read_table_folder(source, folder, reading)
        if is_tar_folder(folder):
            return read_tar_folder(source, folder, reading)
        return read_folder(source, folder, reading, needs_labels)
    if is_callable_name(source):
        return read_callable(source, reading)
    if folder.exists() or not is_dataset_name(source):
        raise DataError(
            f"data.source {source!r} is not digits, cifar10, a folder (looked for {folder}), a callable or the "
            "name of a data set on the hub; check it"
        )
    near = _near(folder)
    if near is not None:
        raise DataError(
            f"data.source: found no folder {source!r}; did you mean {near}? A data set of the hub is called org/name"
        )
    return read_hub(source, source, reading, f"nor is there a folder {folder}; give one that exists")


def _near(folder: Path) -> str | None:
    """The folder beside one that is not there whose name is much like it."""
    beside = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.75)
    return f"{folder.with_name(near[0])}" if near else None


def _read_digits(sizing: Sizing) -> Source:
    """Upsamples the 8x8 digits (0..16) to RGB; the test split is stratified by class."""
    from sklearn.datasets import load_digits  # heavy, and not needed by the other sources

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images, view = allocate("digits", len(pixels), sizing.side)
    for index, image in enumerate(pixels):
        view[index] = sizing.apply(Image.fromarray(image))
    whole = Split(images, torch.from_numpy(digits.target.astype(np.int64)))
    training, test = hold_out(whole, DIGITS_TEST_N)
    return Source(training, test, tuple(str(name) for name in digits.target_names), HALF, HALF, sizing)


def _check_labels(source: str, read: Source) -> tuple[str, ...] | None:
    """The class names: the source's own, else the numbers 0 to the largest training label."""
    classes = read.training.classes
    if classes is None:
        return read.labels
    if len(classes) == 0:
        raise DataError(f"{source}: the training split is empty, wanted samples of at least two classes")
    labels, highest = read.labels, int(classes.max())
    if labels is None:
        if highest >= len(classes):
            raise DataError(f"{source}: label {highest} among {len(classes)} samples, wanted labels 0, 1, 2, ...")
        labels = tuple(str(label) for label in range(highest + 1))
    check_classes(f"{source}: the training split", read.training, len(labels))
    return labels


def _normalisation(
    source: str,
    read: Source,
    training: Sequence[Samples],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std: those given, else the source's own, else those of `training`; None for float inputs."""
    # Messages name whose figures they are: the recipe's key, or what the source gave.
    mean_name = f"{source} returned a mean that" if mean is None else "data.mean"
    std_name = f"{source} returned a std that" if std is None else "data.std"
    mean = read.mean if mean is None else mean
    std = read.std if std is None else std
    images = [image for split in training for image in split.image_inputs]
    if not images:
        for name, values in ((mean_name, mean), (std_name, std)):
            if values is not None:
                found = list(values)
                raise DataError(f"{name} is {found}, but float32 inputs are used as they are; set it to null")
        return None, None
    channels = images[0].shape[1]
    if mean is None or std is None:
        if any(image.shape[1] != channels for image in images):
            raise DataError("inputs have images of different channel counts; give them as normalised float32")
        measured_mean, measured_std = _statistics(images)
        std_name = f"{source}: the std of the training images" if std is None else std_name
        mean = measured_mean if mean is None else mean
        std = measured_std if std is None else std
    chosen_mean, chosen_std = _per_channel(mean_name, mean, channels), _per_channel(std_name, std, channels)
    if min(chosen_std) <= 0:
        raise DataError(f"{std_name} is {list(chosen_std)}, wanted figures above 0; give data.std")
    return chosen_mean, chosen_std


def _per_channel(name: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    if len(values) != channels or not all(math.isfinite(value) for value in values):
        raise DataError(f"{name} is {list(values)}, wanted {channels} finite numbers, one per channel")
    return tuple(float(value) for value in values)


def _statistics(inputs: Sequence[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel of images / 255, from exact integer counts: the same on every machine."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(inputs[0].shape[1]):
        counts = sum(images[:, channel].reshape(-1).bincount(minlength=256) for images in inputs)
        assert isinstance(counts, Tensor)
        share = counts.double() / counts.sum()
        mean = (share * levels).sum()
        means.append(float(mean))
        stds.append(float((share * (levels - mean) ** 2).sum().sqrt()))
    return tuple(means), tuple(stds)
