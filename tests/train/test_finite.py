"""NaN and infinity in training, traced to the sample, layer, parameter, gradient or loss that they come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Split
from edgeqat.errors import DataError, InputError, TrainingError
from models import SmallNet, shake

NAN = float("nan")
LABELS = torch.arange(8) % 10


def images(seed: int = 0, n: int = 8) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def refusal(model: nn.Module, batches: Any, error: type[InputError], **settings: Any) -> str:
    """Its message; the model must have the weights from before the step that was not taken."""
    with pytest.raises(error) as caught:
        eq.fit(model, batches, epochs=2, lr=0.01, **settings)
    return str(caught.value)


def simulation() -> eq.SimulatedModel:
    return eq.calibrate(eq.prepare(shake(SmallNet()).eval(), images()[:2]), [images()])


@pytest.mark.parametrize("make", [lambda: shake(SmallNet()), simulation], ids=["float", "qat"])
def test_a_sample_that_holds_nan_is_named_and_the_step_is_not_taken(make: Callable[[], nn.Module]) -> None:
    bad = images(1)
    bad[5, 2, 0, 0] = NAN
    model = make()
    after: list[dict[str, Tensor]] = []

    def keep(_: float) -> None:
        after[:] = [{name: p.detach().clone() for name, p in model.named_parameters()}]

    message = refusal(model, [(images(), LABELS), (bad, LABELS)], DataError, on_step=keep)
    assert message == "epoch 1, step 2: the input of sample 5 of the batch is NaN or infinite; clean the data"
    assert all(torch.equal(p, after[0][name]) for name, p in model.named_parameters())


def test_a_shuffled_sample_has_its_number_in_the_data_set() -> None:
    data = images(n=64)
    data[37, 0, 3, 3] = float("inf")
    batches = Batches(Split(data, torch.arange(64) % 10), batch_size=8, mean=None, std=None, shuffle=True, seed=3)
    message = refusal(shake(SmallNet()), batches, DataError)
    assert "the input of training sample 37 is NaN or infinite" in message
    batches.set_epoch(0)
    step = next(i for i in range(8) if 37 in batches.samples_of(i).tolist())
    assert message.startswith(f"epoch 1, step {step + 1}: ")


def test_a_target_that_is_nan() -> None:
    targets = torch.zeros(8, 10)
    targets[3, 1] = NAN
    message = refusal(shake(SmallNet()), [(images(), targets)], DataError, loss="mse")
    assert "the target of sample 3 of the batch is NaN or infinite" in message


class Overflows(nn.Module):
    """Its middle layer's output is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def test_the_first_layer_whose_output_is_infinite_is_named() -> None:
    model = Overflows()
    with torch.no_grad():
        model.middle.weight.fill_(3e38)
    message = refusal(model, [(torch.ones(3, 4), torch.tensor([0, 1, 0]))], TrainingError)
    assert message.startswith("epoch 1, step 1: the loss is ")
    assert "the first output that is not finite is that of middle; lower the learning rate" in message


def test_the_first_layer_of_a_simulation_is_named() -> None:
    model = simulation()
    with torch.no_grad():
        dict(model.named_parameters())["fc.bias"].fill_(float("inf"))
    message = refusal(model, [(images(), LABELS)], TrainingError)
    assert "the loss is nan" in message or "the loss is inf" in message
    assert "that of fc" in message


def test_a_parameter_that_was_lost_before_is_named() -> None:
    """A step whose update overflowed, here by weight decay: the next step finds it, or the end of the epoch."""
    batch = (torch.ones(3, 4), torch.zeros(3, 2))
    found = [refusal(nn.Linear(4, 2), [batch] * n, TrainingError, loss="l1", weight_decay=1e38) for n in (3, 2)]
    assert "epoch 1, step 3: the loss is " in found[0]
    assert "weight is not finite since an earlier step" in found[0]
    assert found[1].startswith("epoch 1: weight is not finite after its last step; ")


def test_a_gradient_that_is_nan_under_a_finite_loss() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).abs().sqrt()

    message = refusal(Root(), [(torch.ones(3, 2), torch.zeros(3, 2))], TrainingError, loss="mse")
    assert message == (
        "epoch 1, step 1: the loss is finite, but the gradient of scale is not; "
        "lower the learning rate, or bound the gradient norm"
    )


def test_a_loss_that_is_nan_by_itself() -> None:
    def broken(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets) * NAN

    message = refusal(shake(SmallNet()), [(images(), LABELS)], TrainingError, loss=broken)
    assert "the loss is nan, though every layer's output is finite: it comes from the loss itself" in message


def test_a_buffer_that_always_held_infinity_is_none_of_it() -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, -float("inf")]))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.mask

    history = eq.fit(Masked(), [(torch.ones(3, 4), torch.tensor([0, 1, 0]))], epochs=2, lr=0.01)
    assert len(history.epochs) == 2
