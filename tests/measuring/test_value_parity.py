from __future__ import annotations

import torch

from edgeqat.measuring.value_parity import ValueParity, ValueTally


def test_errors_are_counted_with_their_sign_over_all_batches() -> None:
    tally = ValueTally({"a": "conv", "b": "add", "never": "seen"})
    expected = torch.tensor([[0.0, 255.0, 7.0]])
    tally.add({"a": torch.tensor([[255, 0, 7]], dtype=torch.uint8), "b": expected}, {"a": expected, "b": expected})
    tally.add({"a": expected + 1, "b": expected}, {"a": expected, "b": expected})
    a, b = tally.values()
    assert a == ValueParity("a", "conv", {-255: 1, 0: 1, 1: 3, 255: 1})
    assert (a.n, a.bit_identical, a.max_error_steps) == (6, 1 / 6, 255.0)
    assert (b.op, b.histogram, b.bit_identical, b.max_error_steps) == ("add", {0: 6}, 1.0, 0.0)
