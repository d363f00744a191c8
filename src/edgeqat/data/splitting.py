"""Who is in which split. It depends on the source and on calibration_n, never on a training seed.

Validation is drawn first, so that it is the same for every calibration_n; the rest of the training part is
calibration, then train. A source without a test part gives up one sample in five of every class for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from edgeqat.data.dataset import Samples, Source, Split
from edgeqat.errors import DataError

__all__ = ["carve", "check_classes", "hold_out", "with_test"]

SPLIT_SEED = 2015
"""Decides who is in which split, for every source; changing it makes all published numbers incomparable."""

VALIDATION_SHARE = 10
"""One training sample in this many is set aside for validation, up to VALIDATION_LIMIT."""
VALIDATION_LIMIT = 2000
TEST_SHARE = 5
"""One sample in this many is set aside for the test, where a source has no test part."""


def hold_out(whole: Samples, n: int) -> tuple[Samples, Samples]:
    """Sets n samples aside, each class giving its share to within one sample: (the rest, those n)."""
    order = _permutation(len(whole))
    if whole.classes is not None:
        order = order[np.argsort(whole.classes.numpy()[order], kind="stable")]
    # Evenly spaced picks from a class by class list give every class its share.
    picks = np.arange(n) * len(whole) // n
    chosen = np.zeros(len(whole), dtype=bool)
    chosen[order[picks]] = True
    rest, test = np.flatnonzero(~chosen), np.flatnonzero(chosen)
    return whole.subset(torch.from_numpy(rest)), whole.subset(torch.from_numpy(test))


def with_test(name: str, read: Source) -> tuple[Source, Samples]:
    """The source and its test part, set aside from its training part where it has none of its own.

    Raises:
        DataError: there are too few samples.
    """
    if read.test is not None:
        return read, read.test
    n = len(read.training) // TEST_SHARE
    if n == 0:
        raise DataError(f"{name} has {len(read.training)} samples and no test part, wanted at least {TEST_SHARE}")
    rest, test = hold_out(read.training, n)
    return replace(read, training=rest, test=test), test


def carve(name: str, read: Source, calibration_n: int) -> tuple[Samples, Split, Split, Samples]:
    """The four splits of a source: (train, calibration, validation, test).

    Without labels nothing is trained: validation is empty, and without a test part everything that is not
    calibration is the test.

    Raises:
        DataError: there are too few samples for calibration_n, or a split has one class only.
    """
    if read.training.targets is None:
        return _carve_unlabelled(name, read, calibration_n)
    read, test = with_test(name, read)
    training, n = read.training, len(read.training)
    validation_n = min(n // VALIDATION_SHARE, VALIDATION_LIMIT)
    if validation_n == 0:
        raise DataError(f"{name}: {n} training samples, wanted at least {VALIDATION_SHARE}; add some")
    if calibration_n >= n - validation_n:
        raise DataError(
            f"data.calibration_n is {calibration_n}, but {name} has {n} training samples, {validation_n} of "
            "them set aside for validation, and some must be left to train on; lower it"
        )
    order = torch.from_numpy(_permutation(n))
    validation = training.take(order[:validation_n])
    calibration = training.take(order[validation_n : validation_n + calibration_n])
    train = training.subset(order[validation_n + calibration_n :])
    if train.classes is not None and train.classes.min() == train.classes.max():
        raise DataError(f"{name}: the {len(train)} samples left to train on have one class; lower calibration_n")
    return train, calibration, validation, test


def _carve_unlabelled(name: str, read: Source, calibration_n: int) -> tuple[Samples, Split, Split, Samples]:
    n, none = len(read.training), torch.zeros(0, dtype=torch.int64)
    order = torch.from_numpy(_permutation(n))
    chosen, rest = order[:calibration_n], order[calibration_n:].sort().values
    needed = calibration_n if read.test is not None else calibration_n + 1
    if n < needed:
        left = "" if read.test is not None else ", and some must be left to evaluate"
        raise DataError(f"data.calibration_n is {calibration_n}, but {name} has {n} samples{left}; lower it")
    training, calibration, empty = read.training, read.training.take(chosen), read.training.take(none)
    if read.test is None:
        return empty, calibration, empty, training.subset(rest)
    return training.subset(rest), calibration, empty, read.test


def check_classes(what: str, split: Samples, n: int) -> None:
    """Refuses classes outside 0..n-1, an empty split and a split of one class.

    Raises:
        DataError: as said; `what` names the split.
    """
    if split.classes is None:
        return
    if len(split) == 0:
        raise DataError(f"{what} is empty, wanted samples of at least two classes")
    low, high = int(split.classes.min()), int(split.classes.max())
    if low < 0 or high >= n:
        raise DataError(f"{what} has labels {low} to {high}, wanted 0 to {n - 1}; fix the labels")
    if low == high:
        raise DataError(f"{what} has samples of one class only (label {low}), wanted at least two")


def _permutation(n: int) -> npt.NDArray[np.int64]:
    # The legacy generator: NumPy has frozen its stream, so splits survive upgrades.
    return np.random.RandomState(SPLIT_SEED).permutation(n).astype(np.int64)
