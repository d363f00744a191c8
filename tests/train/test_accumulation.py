"""Fabric with one device trains as no Fabric does; a batch in parts as a whole one."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric

import edgeqat as eq
from edgeqat.errors import InputError
from edgeqat.train.steps import _parts
from models import SmallNet, shake

IMAGES = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[:16], torch.arange(16) % 10), (IMAGES[16:], torch.arange(8) % 10)]


@pytest.fixture(scope="module")
def calibrated() -> eq.SimulatedModel:
    torch.manual_seed(0)
    return eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGES[:2]), [IMAGES])


def trained(
    sim: eq.SimulatedModel, fabric: Fabric | None = None, accumulate: int = 1
) -> tuple[object, eq.SimulatedModel]:
    own = copy.deepcopy(sim)
    history = eq.fit(
        own, BATCHES, epochs=2, lr=0.01, validation_batches=BATCHES, fabric=fabric, accumulate=accumulate, seed=3
    )
    return [(e.loss, e.metric) for e in history.epochs], own


def test_one_device_of_fabric_is_no_other_training(calibrated: eq.SimulatedModel) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    plain, through = trained(calibrated), trained(calibrated, fabric)
    assert plain[0] == through[0]
    for name, tensor in plain[1].state_dict().items():
        assert torch.equal(tensor, through[1].state_dict()[name]), name


def test_parts_that_hold_a_whole_batch_change_nothing(calibrated: eq.SimulatedModel) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    eq.fit(whole, BATCHES, epochs=1, lr=0.1)
    eq.fit(parts, BATCHES, epochs=1, lr=0.1, accumulate=5)  # 16 samples in parts of 3 and 4, 8 of 1 and 2
    torch.testing.assert_close(parts[1].weight, whole[1].weight, rtol=1e-5, atol=1e-6)
    odd = [(IMAGES[:4], torch.zeros(3, dtype=torch.int64))]
    with pytest.raises(
        InputError, match="^found a tensor of length 3 in a batch of 4 samples, which accumulate cannot"
    ):
        eq.fit(model, odd, epochs=1, lr=0.1, accumulate=2)
    with pytest.raises(InputError, match="^found accumulate 0, wanted 1 or more$"):
        eq.fit(model, BATCHES, epochs=1, lr=0.1, accumulate=0)


@given(n=st.integers(1, 40), wanted=st.integers(1, 50))
def test_parts_hold_every_sample_once_in_order(n: int, wanted: int) -> None:
    inputs = {"left": torch.arange(n), "right": torch.arange(n, 2 * n)}
    found = list(_parts(inputs, (torch.arange(n), "a word"), wanted))
    assert len(found) == min(n, wanted)
    assert torch.equal(torch.cat([part["left"] for part, _, _ in found]), inputs["left"])
    assert torch.equal(torch.cat([targets[0] for _, targets, _ in found]), torch.arange(n))
    sizes = [len(part["right"]) for part, _, _ in found]
    assert max(sizes) - min(sizes) <= 1
    assert [share for _, _, share in found] == pytest.approx([size / n for size in sizes])
    assert all(targets[1] == "a word" for _, targets, _ in found)
