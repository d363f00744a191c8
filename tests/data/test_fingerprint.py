from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeqat.data.dataset import Dataset, Split
from edgeqat.data.fingerprint import fingerprint
from edgeqat.data.sources import load


def digits() -> Dataset:
    return load("digits", image_size=8, mean=None, std=None, calibration_n=16)


DATA = digits()


def with_train(inputs: Any, targets: Any) -> Dataset:
    return replace(DATA, train=Split(inputs, targets))


def test_the_same_data_has_the_same_fingerprint() -> None:
    assert fingerprint(digits()) == fingerprint(DATA)
    assert len(fingerprint(DATA)) == 64


def changed() -> dict[str, Dataset]:
    x, y = DATA.train.inputs.clone(), DATA.train.targets.clone()
    pixel, label = x.clone(), y.clone()
    pixel[3, 0, 1, 1] ^= 1
    label[5] = (label[5] + 1) % 10
    order = torch.arange(len(x)).flip(0)
    return {
        "pixel": with_train(pixel, y),
        "label": with_train(x, label),
        "order": with_train(x[order], y[order]),
        "dtype": with_train(x, y.int()),
        "fewer": with_train(x[:-1], y[:-1]),
        "structure": with_train((x,), y),
        "mean": replace(DATA, mean=(0.5, 0.5, 0.4)),
        "labels": replace(DATA, labels=("zero", *DATA.labels[1:])),  # type: ignore[index]
        "test": replace(DATA, test=DATA.calibration),
    }


@pytest.mark.parametrize("what", list(changed()))
def test_whatever_changes_changes_it(what: str) -> None:
    assert fingerprint(changed()[what]) != fingerprint(DATA)


LEAVES = st.one_of(st.integers(), st.text(max_size=3), st.none(), st.booleans(), st.floats(allow_nan=False))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner))


@given(VALUES, VALUES)
def test_two_structures_never_share_one(one: Any, other: Any) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (repr(one) == repr(other))
