from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgeqat.data.batches import Batches, normalise
from edgeqat.data.dataset import Split
from edgeqat.errors import DataError

MEAN = (0.5, 0.25, 0.125)
STD = (0.5, 0.25, 2.0)


def make_split(n: int = 10) -> Split:
    """Each sample's label is its index."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(n))


def epoch(batches: Batches, number: int = 0) -> tuple[Tensor, Tensor]:
    batches.set_epoch(number)
    pairs = list(batches)
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_normalise_by_hand() -> None:
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    got = normalise(pixels, MEAN, STD)
    assert got.dtype == torch.float32
    # (0 - 0.5) / 0.5, (1 - 0.25) / 0.25, (0.2 - 0.125) / 2
    assert got.flatten().tolist() == pytest.approx([-1.0, 3.0, 0.0375], abs=1e-7)


def test_plain_batches_are_the_split_in_order() -> None:
    split = make_split()
    batches = Batches(split, batch_size=4, mean=MEAN, std=STD)
    pairs = list(batches)
    assert len(batches) == len(pairs) == 3
    assert [len(y) for _, y in pairs] == [4, 4, 2]
    inputs, targets = epoch(batches)
    assert targets.dtype == torch.int64
    assert torch.equal(targets, split.targets)
    assert torch.equal(inputs, normalise(split.inputs, MEAN, STD))


def test_inputs_are_the_batches_without_targets() -> None:
    batches = Batches(make_split(), batch_size=3, mean=MEAN, std=STD, shuffle=True, augment=("flip",))
    inputs = batches.inputs()
    assert len(inputs) == len(batches) == 4
    for _ in range(2):  # a view can be iterated again, and follows set_epoch
        batches.set_epoch(_)
        for x, (y, _targets) in zip(inputs, batches, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize(("n", "size", "lengths"), [(10, 4, [4, 4]), (8, 4, [4, 4]), (4, 4, [4])])
def test_drop_last(n: int, size: int, lengths: list[int]) -> None:
    batches = Batches(make_split(n), batch_size=size, mean=MEAN, std=STD, drop_last=True)
    assert [len(y) for _, y in batches] == lengths
    assert len(batches) == len(lengths)


def test_shuffling_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    split = make_split(50)
    orders = set()
    for seed in range(3):
        batches = Batches(split, batch_size=8, mean=MEAN, std=STD, shuffle=True, seed=seed)
        for number in range(3):
            inputs, targets = epoch(batches, number)
            assert torch.equal(inputs, normalise(split.inputs[targets], MEAN, STD))
            assert sorted(targets.tolist()) == list(range(50))
            orders.add(tuple(targets.tolist()))
    assert len(orders) == 9, "(seed, epoch) pairs must not share an order: seed 0's epoch 1 is not seed 1's epoch 0"


def test_resumed_run_sees_the_same_data() -> None:
    split = make_split(20)

    def make() -> Batches:
        return Batches(split, batch_size=8, mean=MEAN, std=STD, augment=("crop", "flip"), shuffle=True, seed=3)

    uninterrupted = make()
    for number in range(2):
        epoch(uninterrupted, number)
    next(iter(uninterrupted))  # an iteration given up half-way leaves no trace
    torch.manual_seed(5)
    first, resumed = epoch(uninterrupted, 2), epoch(make(), 2)
    assert torch.equal(first[0], resumed[0])
    assert torch.equal(first[1], resumed[1])
    assert not torch.equal(first[0], epoch(make(), 1)[0])


def test_iterating_does_not_advance_the_epoch() -> None:
    batches = Batches(make_split(20), batch_size=8, mean=MEAN, std=STD, augment=("crop",), shuffle=True)
    for (x, _), (y, _) in zip(batches, batches, strict=True):
        assert torch.equal(x, y)


def test_augmentation_moves_pixels_before_normalisation() -> None:
    """The border a crop brings in is black, so it holds -mean / std."""
    split = Split(torch.full((64, 3, 16, 16), 255, dtype=torch.uint8), torch.zeros(64, dtype=torch.int64))
    inputs, _ = epoch(Batches(split, batch_size=64, mean=MEAN, std=STD, augment=("crop",)))
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert set(inputs[:, channel].unique().tolist()) == {-mean / std, (1 - mean) / std}


def test_split_stays_as_it_was() -> None:
    split = make_split()
    before = split.inputs.clone()
    for x, y in Batches(split, batch_size=10, mean=MEAN, std=STD):
        x.zero_()
        y.zero_()
    assert torch.equal(split.inputs, before)
    assert torch.equal(split.targets, torch.arange(10))


def test_float_inputs_stay_as_they_are() -> None:
    inputs = torch.randn(10, 5)
    pairs = list(Batches(Split(inputs, None), batch_size=4, mean=None, std=None))
    assert torch.equal(torch.cat([x for x, _ in pairs]), inputs)
    assert [y for _, y in pairs] == [None, None, None]


def test_structures_keep_their_form_and_their_samples_together() -> None:
    images, state = make_split().inputs, torch.arange(10.0)[:, None]
    targets = {"box": torch.arange(40.0).reshape(10, 4), "class": (torch.arange(10),)}
    split = Split({"x": images, "state": (state,)}, targets)
    seen = []
    for x, y in Batches(split, batch_size=4, mean=MEAN, std=STD, shuffle=True, seed=1):
        chosen = y["class"][0]
        assert torch.equal(x["state"][0][:, 0], chosen.float())
        assert torch.equal(x["x"], normalise(images[chosen], MEAN, STD))
        assert torch.equal(y["box"][:, 0], 4.0 * chosen)
        seen += chosen.tolist()
    assert sorted(seen) == list(range(10))
    assert seen != list(range(10))


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (Split(torch.zeros(10, 3, 16, 16), torch.arange(10)), "one tensor of uint8 images, and these inputs are no"),
        (Split((make_split().inputs,), torch.arange(10)), "one tensor of uint8 images, and these inputs are no such"),
        (Split(make_split().inputs, torch.zeros(10, 16, 16)), "targets that are no classes might have to move with"),
    ],
    ids=["float", "tuple", "masks"],
)
def test_augmentation_of_what_cannot_be_augmented(split: Split, words: str) -> None:
    with pytest.raises(DataError, match=f"data.augment moves .*{words}"):
        Batches(split, batch_size=4, mean=MEAN, std=STD, augment=("flip",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mean": None}, "images have no mean and std"),
        ({"batch_size": 0}, "batch_size is 0, wanted at least 1"),
        ({"seed": -1}, "seed is -1, wanted at least 0"),
        ({"augment": ("mixup",)}, "'mixup', wanted names among"),
        ({"mean": (0.5,)}, "1 means and 3 stds for images of 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, "wanted figures above 0"),
        ({"batch_size": 11, "drop_last": True}, "10 samples make no batch of 11"),
    ],
)
def test_bad_arguments(change: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"batch_size": 4, "mean": MEAN, "std": STD}
    with pytest.raises(DataError, match=words):
        Batches(make_split(), **(arguments | change))


def test_empty_split_and_negative_epoch() -> None:
    with pytest.raises(DataError, match="0 samples make no batch of 4"):
        Batches(make_split(0), batch_size=4, mean=MEAN, std=STD)
    with pytest.raises(DataError, match="epoch is -1"):
        Batches(make_split(), batch_size=4, mean=MEAN, std=STD).set_epoch(-1)


def test_large_seeds() -> None:
    batches = Batches(make_split(), batch_size=10, mean=MEAN, std=STD, shuffle=True, seed=2**64 + 1)
    assert sorted(epoch(batches)[1].tolist()) == list(range(10))
    assert len(batches) == math.ceil(10 / 10)
