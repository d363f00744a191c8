"""Example inputs, and the one precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import edgeqat as eq
from edgeqat.errors import InputError, ModelError
from edgeqat.graph.capture import capture
from models import SmallNet, Tokens

IMAGE = torch.zeros(2, 3, 8, 8)
PAIRS = TensorDataset(IMAGE, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "found no example inputs"),
        ((3,), "found an example input of type int"),
        (torch.zeros(()), r"found an example input of shape \(\)"),
        (np.zeros((2, 3, 8, 8)), r"of type ndarray, wanted tensors only; pass torch.from_numpy\(array\)$"),
        (DataLoader(PAIRS), r"of type DataLoader, wanted tensors only; .* pass next\(iter\(loader\)\)\[0\], "),
    ],
    ids=["none", "a number", "no batch", "an array", "a loader"],
)
def test_example_inputs_must_be_batches_of_tensors(example: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(SmallNet(), example)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_refused(dtype: torch.dtype) -> None:
    wanted = rf"^found {dtype} parameters \(conv1\.weight\), wanted float32: call model\.float\(\)$"
    with pytest.raises(ModelError, match=wanted):
        eq.plan(SmallNet().to(dtype), IMAGE.to(dtype))
    with pytest.raises(InputError, match=rf"^found {dtype} example inputs, wanted float32: "):
        eq.prepare(SmallNet(), IMAGE.to(dtype))


def test_integers_have_no_such_precision() -> None:
    assert capture(Tokens(), torch.zeros(2, 5, dtype=torch.int64)).signature.leaves[0].dtype == torch.int64


@pytest.mark.parametrize(
    ("example", "found", "way"),
    [
        (next(iter(DataLoader(PAIRS, 2))), r"float32 \[2, 3, 8, 8\], int64 \[2\]", r"next\(iter\(loader\)\)\[0\]"),
        (tuple(next(iter(DataLoader(PAIRS, 2)))), r"float32 \[2, 3, 8, 8\], int64 \[2\]", "found a tuple of 2; of "),
        ([IMAGE] * 4, r"float32 \[2, 3, 8, 8\], .*, \.\.\.: ", "found a list of 4; .* of several batches, pass one$"),
        (IMAGE[0], r"float32 \[3, 8, 8\]", r"of one image pass image\[None\]$"),
        (IMAGE[:, :1], r"float32 \[2, 1, 8, 8\]: .*to have 3 channels, but got 1", "pass a batch of what the model"),
        (IMAGE.to(torch.uint8), r"uint8 \[2, 3, 8, 8\]", r"images\.float\(\) / 255, .* pixels=edgeqat\.Pixels"),
    ],
    ids=["a loader's list", "a pair", "batches", "an image", "channels", "integers"],
)
def test_inputs_that_the_model_does_not_take(example: Any, found: str, way: str) -> None:
    """What is wrong is the call, and no control flow of the model's."""
    with pytest.raises(InputError, match=f"^SmallNet does not take the example inputs, {found}.*{way}") as caught:
        eq.prepare(SmallNet(), example)
    assert "control flow" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_models_that_are_none() -> None:
    scripted: Any = torch.jit.trace(nn.Linear(2, 2), torch.zeros(2, 2))
    others: list[tuple[Any, str]] = [
        (scripted, "found a TopLevelTracedModule, wanted the eager module that it was made of; pass that"),
        (SmallNet, "found the class SmallNet, wanted an nn.Module; pass the model itself"),
        ("net.pt", "found 'net.pt', wanted an nn.Module; pass the model itself"),
        (SmallNet().state_dict(), "found an OrderedDict, wanted an nn.Module; pass the model itself"),
    ]
    for model, message in others:
        with pytest.raises(ModelError) as caught:
            eq.prepare(model, IMAGE)
        assert str(caught.value) == message
