"""Example inputs, and the one precision."""

from __future__ import annotations

import pytest
import torch

import edgeqat as eq
from edgeqat.errors import InputError, ModelError
from edgeqat.graph.capture import capture
from models import SmallNet, Tokens

IMAGE = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((), "found no example inputs"),
        ((3,), "found an example input of type int"),
        (torch.zeros(()), r"found an example input of shape \(\)"),
    ],
    ids=["none", "a number", "no batch"],
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
