from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import DataError, InputError, ModelError, PhaseError
from edgeqat.train.loop import Epoch
from models import SmallNet, shake

IMAGE = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(16) % 10
BATCHES = [(IMAGE[:8], torch.arange(8) % 10), (IMAGE[8:], torch.arange(8) % 10)]


def trained(seed: int, optimizer: str = "sgd") -> nn.Module:
    torch.manual_seed(0)
    model = shake(SmallNet())
    eq.fit(model, BATCHES, epochs=2, lr=0.01, optimizer=optimizer, seed=seed)
    return model


def test_a_seed_decides_everything() -> None:
    one, same, other = trained(1), trained(1), trained(2)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
    assert not torch.equal(one.state_dict()["conv1.weight"], other.state_dict()["conv1.weight"])  # dropout


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_loss_falls_and_history_tells(optimizer: str) -> None:
    torch.manual_seed(0)
    told: list[Epoch] = []
    steps: list[int] = []
    history = eq.fit(
        shake(SmallNet()),
        BATCHES,
        epochs=12,
        lr=0.05 if optimizer == "sgd" else 0.01,
        optimizer=optimizer,
        validation_batches=BATCHES,
        on_epoch=told.append,
        on_step=lambda _: steps.append(1),
    )
    assert history.epochs == tuple(told) and len(told) == 12 and len(steps) == 24
    assert told[-1].loss < 0.8 * told[0].loss
    assert told[-1].metric is not None and 0.0 <= told[-1].metric <= 1.0
    assert [e.index for e in told] == list(range(1, 13))


def test_the_learning_rate_follows_a_cosine_to_zero() -> None:
    history = eq.fit(nn.Linear(2, 2), [(torch.ones(1, 2), torch.zeros(1, dtype=torch.long))] * 4, epochs=2, lr=1.0)
    # The last step of epoch k begins at progress (k - 1 + 3/4) / 2.
    expected = [0.5 * (1 + math.cos(math.pi * p)) for p in (0.375, 0.875)]
    assert [e.lr for e in history.epochs] == pytest.approx(expected)


class Epochs:
    """Remembers the epochs it was moved to."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.seen.append(epoch)

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> object:
        return iter(BATCHES)


def test_data_is_moved_to_each_epoch() -> None:
    data = Epochs()
    eq.fit(SmallNet(), data, epochs=3, lr=0.01)  # type: ignore[arg-type]
    assert data.seen == [0, 1, 2]


def test_a_simulation_is_validated_in_exact_mode() -> None:
    """The dequantized simulation would call the model; exact mode runs the integer program instead."""
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGE), [IMAGE])
    calls: list[bool] = []
    original = sim._run

    def counted(*args: object) -> tuple[Tensor, ...]:
        calls.append(sim.training)
        return original(*args)

    sim._run = counted
    eq.fit(sim, BATCHES, epochs=1, lr=0.0, validation_batches=BATCHES, exact="onnxruntime/x86")
    assert calls == [True, True]  # the two training steps and nothing else
    eq.fit(sim, BATCHES, epochs=1, lr=0.0, validation_batches=BATCHES, exact=None)
    assert calls == [True, True, True, True, False, False]


def test_no_epochs_leave_the_model_as_it_is() -> None:
    model = SmallNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert eq.fit(model, BATCHES, epochs=0, lr=0.1).epochs == ()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_custom_loss_is_called() -> None:
    called = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        called.append(outputs.shape)
        return outputs.square().mean()

    eq.fit(SmallNet(), BATCHES, epochs=1, lr=0.01, loss=loss)
    assert called == [(8, 10), (8, 10)]


def test_a_simulation_without_grids_is_not_trained_in_float() -> None:
    """It would train without a word, and fail in convert."""
    sim = eq.prepare(SmallNet().eval(), IMAGE[:2])
    with pytest.raises(PhaseError, match=r"calibrate first: edgeqat.calibrate\(sim, batches\)$"):
        eq.fit(sim, BATCHES, epochs=1, lr=0.01)
    nothing = eq.prepare(SmallNet().eval(), IMAGE[:2], qconfig_mapping=eq.QConfigMapping().set_global(None))
    eq.fit(nothing, BATCHES, epochs=1, lr=0.01)


def poisoned() -> list[tuple[Tensor, Tensor]]:
    return [BATCHES[0], (torch.full_like(IMAGE[8:], float("nan")), BATCHES[1][1])]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"train_batches": poisoned()}, DataError, "epoch 1, step 2: the input of sample 0 of the batch is NaN"),
        ({"train_batches": []}, DataError, "found no training batches"),
        ({"train_batches": iter(BATCHES)}, DataError, "training batches have no length"),
        ({"optimizer": "lion"}, InputError, "found the optimizer 'lion', wanted one of sgd, adamw"),
        ({"loss": "hinge"}, InputError, "found the loss 'hinge', wanted one of cross_entropy, mse"),
        ({"metric": "f1"}, InputError, "found the metric 'f1', wanted one of top1"),
        (
            {"train_batches": [(IMAGE, CLASSES.float())]},
            ModelError,
            r"cross_entropy .* fails: .*; .* targets.long\(\)$",
        ),
        ({"train_batches": [(IMAGE, CLASSES + 4)]}, ModelError, "; found classes 4 to 13, wanted 0 to 9$"),
        ({"loss": lambda o, t: o.detach().sum()}, ModelError, "the loss <lambda> has no gradient"),
    ],
    ids=["nan", "empty", "no length", "optimizer", "loss", "metric", "float classes", "other classes", "no gradient"],
)
def test_bad_input_is_named(settings: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"train_batches": BATCHES, "epochs": 1, "lr": 0.01} | settings
    with pytest.raises(error, match=message):
        eq.fit(SmallNet(), **arguments)  # type: ignore[arg-type]
