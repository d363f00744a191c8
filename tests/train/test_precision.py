from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import CheckpointError, InputError, TrainingError
from edgeqat.train.precision import computing_in, in_float32
from edgeqat.train.state import TrainingState
from models import SmallNet, shake

IMAGE = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGE[:8], torch.arange(8) % 10), (IMAGE[8:], torch.arange(8) % 10)]


class Recorder(nn.Module):
    """What a model's convolution gives in training, and what reaches the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inside = nn.Conv2d(3, 4, 3), []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        self.inside.append(y.dtype)
        return {"scores": y.flatten(1)[:, :10], "index": y.flatten(1).argmax(1)}


@pytest.mark.parametrize(("precision", "inside"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_layers_compute_in_the_precision_and_losses_in_float32(precision: str, inside: torch.dtype) -> None:
    model, seen = Recorder(), []

    def loss(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        seen.extend(value.dtype for value in outputs.values())
        return nn.functional.cross_entropy(outputs["scores"], targets)

    eq.fit(model, BATCHES, epochs=1, lr=0.01, loss=loss, precision=precision)
    assert set(model.inside) == {inside}
    assert seen == [torch.float32, torch.int64] * 2
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
def test_a_simulation_trained_in_bfloat16_learns_and_keeps_its_grids_in_float32(batch_norm: str) -> None:
    torch.manual_seed(0)
    learned = eq.QConfig(eq.ActivationConfig(learned=True), eq.WeightConfig(bits=4, learned=True))
    sim = eq.calibrate(
        eq.prepare(shake(SmallNet()).eval(), IMAGE, qconfig_mapping=learned, batch_norm=batch_norm), [IMAGE]
    )
    teacher = copy.deepcopy(SmallNet())
    history = eq.fit(
        sim,
        BATCHES,
        epochs=12,
        lr=0.02,
        max_grad_norm=1.0,
        precision="bf16-mixed",
        aids=eq.QatAids(eq.Distillation(teacher, weight=0.1), eq.Oscillation(), eq.Ema(decay=0.5)),
        validation_batches=BATCHES,
    )
    assert history.epochs[-1].loss < history.epochs[0].loss
    state = sim.state_dict().values()
    assert all(tensor.dtype != torch.bfloat16 for tensor in state)
    program = eq.convert(sim.eval())
    with sim.exact("onnxruntime/x86") as exact:
        assert torch.equal(exact(IMAGE), eq.reference(program, IMAGE, "onnxruntime/x86"))


def test_bfloat16_gradients_are_near_those_of_float32() -> None:
    """Eight bits of significand: relative rounding of 2**-9 a value, averaged over many of them."""
    torch.manual_seed(0)
    model, gradients = shake(SmallNet()).eval(), []
    for precision in ("32-true", "bf16-mixed"):
        model.zero_grad()
        with computing_in(precision, model):
            outputs = in_float32(model(IMAGE))
        nn.functional.cross_entropy(outputs, torch.arange(16) % 10).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert not torch.equal(*gradients)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 0.05


def test_an_autocast_around_training_in_float32_is_left_alone() -> None:
    model = Recorder()
    with torch.autocast("cpu", torch.bfloat16), computing_in("32-true", model):
        assert model(IMAGE)["scores"].dtype == torch.bfloat16


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match=r"found the precision 'fp16', wanted one of 32-true, bf16-mixed"):
        eq.fit(SmallNet(), BATCHES, epochs=1, lr=0.01, precision="fp16")


def test_training_goes_on_in_the_precision_that_it_began_in() -> None:
    states: list[TrainingState] = []
    eq.fit(SmallNet(), BATCHES, epochs=2, lr=0.01, precision="bf16-mixed", on_checkpoint=states.append)
    with pytest.raises(CheckpointError, match="made with precision bf16-mixed, this training has 32-true"):
        eq.fit(SmallNet(), BATCHES, epochs=2, lr=0.01, start=states[0])


def test_nan_is_traced_in_the_precision_in_which_it_came_up() -> None:
    """Finite in float32, infinite in bfloat16: 3.3895e38 is its largest number, 3.4028e38 float32's."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 2, bias=False)
            with torch.no_grad():
                self.layer.weight.fill_(3.4e38)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    batches = [(torch.ones(2, 1), torch.tensor([0, 1]))]
    with pytest.raises(TrainingError, match="not finite is that of layer"):
        eq.fit(Large(), batches, epochs=1, lr=0.0, precision="bf16-mixed")
