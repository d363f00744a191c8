"""Splits of any structure, and what a device is told of them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeqat.data.dataset import Dataset, Split
from edgeqat.data.sizing import Sizing
from edgeqat.errors import DataError

CLASSES = torch.tensor([5, 6, 7])


def images(n: int = 3, channels: int = 1) -> Tensor:
    return torch.arange(n * channels * 4, dtype=torch.uint8).reshape(n, channels, 2, 2)


def test_take_copies_in_order() -> None:
    split = Split(images(), CLASSES)
    taken = split.take(torch.tensor([2, 0]))
    assert taken.targets.tolist() == [7, 5]
    assert isinstance(taken.inputs, Tensor)
    assert taken.inputs[:, 0, 0, 0].tolist() == [8, 0]
    taken.inputs.zero_()
    assert split.inputs[2, 0, 0, 0] == 8  # type: ignore[call-overload]
    with pytest.raises(dataclasses.FrozenInstanceError):
        split.targets = taken.targets  # type: ignore[misc]


def test_take_reaches_into_structures_and_leaves_no_targets_alone() -> None:
    split = Split({"left": images(), "right": (torch.zeros(3, 4), torch.ones(3))}, None).take(torch.tensor([1]))
    assert split.targets is None
    assert len(split) == 1
    assert [tuple(leaf.shape) for leaf in (split.inputs["left"], *split.inputs["right"])] == [  # type: ignore[index]
        (1, 1, 2, 2),
        (1, 4),
        (1,),
    ]
    boxes = Split(images(), {"box": torch.arange(12.0).reshape(3, 4), "class": CLASSES}).take(torch.tensor([2]))
    assert boxes.targets["box"].tolist() == [[8, 9, 10, 11]]
    assert boxes.targets["class"].tolist() == [7]


@pytest.mark.parametrize(
    ("targets", "found"),
    [(CLASSES, True), (CLASSES.int(), False), (CLASSES[:, None], False), ((CLASSES,), False), (None, False)],
    ids=["int64 [N]", "int32", "2-d", "tuple", "none"],
)
def test_classes_are_int64_of_one_dimension(targets: Any, found: bool) -> None:
    assert (Split(images(), targets).classes is not None) == found


@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (torch.zeros(3, 2, dtype=torch.float64), CLASSES, "inputs are float64 [3, 2], wanted images, uint8"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), CLASSES, "inputs are uint8 [3, 2, 2], wanted images"),
        (torch.tensor(0.0), None, "inputs are float32 [], wanted"),
        ([images()], None, "inputs are a list, wanted a tensor, or a tuple or dict"),
        ((), None, "inputs are a tuple, wanted"),
        ({"left": images(), "right": 5}, None, "inputs['right'] are a int, wanted"),
        ((images(), images(2)), None, "3 inputs have 2 inputs[1], wanted one each"),
        (images(), CLASSES[:2], "3 inputs have 2 targets, wanted one each"),
        (images(), (CLASSES, "x"), "targets[1] are a str, wanted a tensor"),
        (images(), torch.tensor(1), "targets are int64 [], wanted a tensor"),
        (images(), (), "targets are an empty tuple"),
    ],
)
def test_split_refuses(inputs: Any, targets: Any, words: str) -> None:
    with pytest.raises(DataError) as caught:
        Split(inputs, targets)
    assert words in str(caught.value)


def preprocessing(inputs: Any, side: int | None = None, channels: int = 3) -> dict[str, Any]:
    split, figures = Split(inputs, None), (0.5,) * channels
    sizing = None if side is None else Sizing(side)
    return Dataset("x", split, split, split, split, figures, figures, ("a", "b"), sizing).preprocessing()


def test_preprocessing_of_decoded_images() -> None:
    assert preprocessing(images(channels=3), side=2) == {
        "input": "RGB in 0..1",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "layout": "NCHW",
        "resize": {"size": [2, 2], "method": "bilinear"},
        "labels": ["a", "b"],
    }


@pytest.mark.parametrize(
    ("channels", "words"), [(1, "1 channel in 0..1"), (3, "3 channels in 0..1"), (4, "4 channels in 0..1")]
)
def test_preprocessing_of_images_as_they_came(channels: int, words: str) -> None:
    """Their channels may have any order, so nothing is called RGB."""
    found = preprocessing(images(channels=channels), channels=channels)
    assert (found["input"], found["mean"], found["resize"]) == (words, [0.5] * channels, None)


def test_preprocessing_of_several_inputs_has_an_entry_each() -> None:
    found = preprocessing({"x": images(), "state": torch.zeros(3, 4)}, channels=1)
    assert found["labels"] == ["a", "b"]
    assert found["inputs"]["x"]["input"] == "1 channel in 0..1"
    assert found["inputs"]["state"] == {"input": "float32 as given", "layout": None, "resize": None}
