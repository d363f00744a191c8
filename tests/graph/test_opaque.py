"""Submodules that torch.export cannot look into, kept in float as a whole on request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import QuantStub

import edgeqat as eq
from edgeqat.errors import CaptureError, EdgeqatError
from edgeqat.graph.opaque import OPAQUE_REASON
from edgeqat.pipeline import plan_recipe
from edgeqat.recipe import load_recipe
from models import DataDependent

IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Gate(nn.Module):
    """Control flow that depends on data: what is large is squashed."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 1.0:
            x = torch.tanh(x)
        return self.conv(x)


class InNumpy(nn.Module):
    """Nothing but NumPy can say what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.cbrt(x.detach().numpy()))


class Doubling(torch.autograd.Function):
    """Passes its gradient on three times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) != 0.0 else x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


class OwnGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubling.apply(x)


class Between(nn.Module):
    """A conv on either side of something."""

    def __init__(self, middle: nn.Module, channels: int = 4) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 3), middle, nn.Conv2d(channels, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(F.relu(self.first(x))))


def quantized(model: nn.Module, opaque: list[str], target: str = "torchscript") -> eq.SimulatedModel:
    """A calibrated simulation, in eval mode."""
    sim = eq.prepare(model.eval(), IMAGE, target=target, opaque=opaque)
    return eq.calibrate(sim, [IMAGE, 20 * IMAGE]).eval()


@pytest.mark.parametrize("opaque", ["middle", "Gate"], ids=["by name", "by class"])
def test_both_branches_are_simulated_trained_and_lowered(opaque: str, tmp_path: Path) -> None:
    model = Between(Gate())
    sim = quantized(model, [opaque])
    (origin,) = sim.plan.program.float_origins()
    assert (origin.module, origin.type, origin.reason) == ("middle", "Gate", OPAQUE_REASON)
    assert {name for name, _ in sim.named_parameters()} == {name for name, _ in model.named_parameters()}
    before = sim.get_parameter("middle.conv.weight").detach().clone()
    optimizer = torch.optim.SGD(sim.parameters(), lr=0.01)
    sim.train()(IMAGE).square().mean().backward()
    optimizer.step()
    assert not torch.equal(sim.get_parameter("middle.conv.weight"), before)
    program = eq.convert(sim.eval())
    artifact = eq.lower(program, "torchscript", tmp_path / "artifact")
    small, large = IMAGE, 20 * IMAGE
    hidden = [F.relu(model.first(x)).mean() for x in (small, large)]
    assert hidden[0] < 1.0 < hidden[1]  # so that each branch is taken
    for batch in (small, large, small[:1]):
        assert torch.equal(artifact.run(batch), eq.reference(program, batch, "torchscript"))
        # A step is the most that float32 rounding in the float island moves a value by.
        step = float(program.grid_of("last").filled()[0])
        assert (sim(batch) - eq.reference(program, batch, "torchscript")).abs().max() <= step
    assert eq.verify(artifact, program, [small, large]).bit_identical == 1.0
    back = sim.to_float()
    assert torch.equal(back.get_parameter("middle.conv.weight"), sim.get_parameter("middle.conv.weight"))
    assert isinstance(back.get_submodule("middle"), Gate)


def test_the_modules_own_gradient_flows() -> None:
    sim = eq.prepare(Between(OwnGradient()), IMAGE, opaque=["middle"])
    sim(IMAGE).sum().backward()
    reference = Between(OwnGradient())
    reference.load_state_dict(sim.to_float().state_dict())
    reference(IMAGE).sum().backward()
    found = sim.get_parameter("first.weight").grad
    assert found is not None and reference.first.weight.grad is not None
    # In phase "float" the same ops run, but sums may be taken in another order.
    assert torch.allclose(found, reference.first.weight.grad, rtol=1e-5, atol=1e-6)


class Windows(nn.Module):
    """[N, C, 6, 6] to four windows a sample, and their maxima as integers; the count of windows follows the batch."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = x.reshape(len(x), x.shape[1], 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, x.shape[1], 3, 3)
        parts = parts if parts.sum() > 0 else -parts
        return parts, parts.flatten(1).argmax(1)


class InWindows(nn.Module):
    """Calls an opaque module that gives two tensors, twice; what follows reads the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.windows, self.head = nn.Conv2d(3, 4, 3), Windows(), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.conv(x)
        parts, best = self.windows(x)
        again, _ = self.windows(x * 2)
        return {"map": self.head(parts + again).reshape(x.shape[0], 4, 2), "best": best.reshape(x.shape[0], 4)}


def test_several_outputs_and_sizes_that_follow_the_batch(tmp_path: Path) -> None:
    model = InWindows().eval()
    sim = quantized(model, ["Windows"])
    program = eq.convert(sim)
    assert [o.type for o in program.float_origins()].count("Windows") == 2
    artifact = eq.lower(program, "torchscript", tmp_path / "artifact")
    for n in (1, 3, 4):
        expected, found = model(IMAGE[:n]), artifact.run(IMAGE[:n])
        assert {k: (t.shape, t.dtype) for k, t in found.items()} == {
            k: (t.shape, t.dtype) for k, t in expected.items()
        }
    assert eq.verify(artifact, program, [IMAGE]).bit_identical == 1.0


def test_one_that_can_be_exported_after_all_is_lowered_to_onnx(tmp_path: Path) -> None:
    model = Between(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU()))
    program = eq.convert(quantized(model, ["middle"], "onnxruntime"))
    assert [(o.module, o.reason) for o in program.float_origins()] == [("middle", OPAQUE_REASON)]
    artifact = eq.lower(program, "onnxruntime", tmp_path / "artifact")
    assert eq.verify(artifact, program, [IMAGE]).max_error_steps <= 1.0


class Counting(nn.Module):
    """Changes a buffer, even in eval mode, and draws random numbers."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.stub = QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.stub(x) + torch.rand(1) if x.sum() > 0 else x


def test_capturing_leaves_buffers_random_numbers_and_what_is_inside_alone() -> None:
    model = Between(Counting())
    state = torch.get_rng_state()
    sim = eq.prepare(model, IMAGE, opaque=["middle"])
    assert torch.equal(torch.get_rng_state(), state)
    assert sim.get_buffer("middle.calls") == 0.0 and model.get_buffer("middle.calls") == 0.0
    assert isinstance(sim.get_submodule("middle.stub"), QuantStub)
    sim(IMAGE)
    assert sim.get_buffer("middle.calls") == 1.0
    assert model.get_submodule("middle").forward.__func__ is Counting.forward  # type: ignore[attr-defined]


def test_weights_tied_with_an_opaque_module_stay_tied() -> None:
    model = Between(Gate())
    model.middle.conv.weight = nn.Parameter(torch.randn(4, 4, 1, 1))  # type: ignore[union-attr]
    model.last = nn.Conv2d(4, 4, 1)
    model.last.weight = model.middle.conv.weight  # type: ignore[union-attr]
    sim = eq.prepare(model, IMAGE, opaque=["middle"])
    for module in (sim, sim.to_float()):
        assert module.get_parameter("middle.conv.weight") is module.get_parameter("last.weight")


def test_what_cannot_be_exported_is_refused_with_the_submodule_to_keep_opaque() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Gate(), nn.ReLU()))
    with pytest.raises(CaptureError) as refused:
        eq.prepare(model, IMAGE)
    line = str(refused.value)
    assert line.startswith("Sequential cannot be captured at test_opaque.py:") and "\n" not in line
    assert "(if x.mean() > 1.0:)" in line
    assert line.endswith("or branch on shapes; or keep 1.0 (Gate) in float: opaque=['1.0']")
    eq.prepare(model, IMAGE, opaque=["1.0"])


def test_what_cannot_be_exported_itself_is_refused_without_a_submodule() -> None:
    with pytest.raises(CaptureError, match="or branch on shapes$"):
        eq.prepare(DataDependent(), IMAGE)


def test_what_no_file_can_hold_is_refused_by_its_name(tmp_path: Path) -> None:
    for middle, onnx, torchscript in (
        (Gate(), r"torch\.onnx says Could not guard on data-dependent", None),
        (InNumpy(), r"torch\.onnx says \.numpy\(\) is not supported", r"torch\.jit\.script says .*numpy"),
    ):
        name = rf"the opaque middle \({type(middle).__name__}\): "
        program = eq.convert(quantized(Between(middle), ["middle"], "portable"))
        assert torch.isfinite(eq.reference(program, IMAGE)).all()
        with pytest.raises(EdgeqatError, match=f"^ONNX cannot hold {name}{onnx}.*; lower to torchscript, or rewrite"):
            eq.lower(program, "onnxruntime", tmp_path / "onnx")
        if torchscript is not None:
            with pytest.raises(EdgeqatError, match=f"^TorchScript cannot hold {name}{torchscript}.*; rewrite it so"):
                eq.lower(program, "torchscript", tmp_path / "torchscript")
    assert list(tmp_path.iterdir()) == []


class Calls(nn.Module):
    """Calls a module in a way that is given."""

    def __init__(self, inner: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.inner, x)


class Takes(nn.Module):
    """Takes anything; gives what a function says."""

    def __init__(self, gives: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, x: Tensor, other: Any = None) -> Any:
        return self.gives(x)


SUM: Callable[[Tensor], Tensor] = lambda x: x + 1  # noqa: E731


@pytest.mark.parametrize(
    ("gives", "how", "message"),
    [
        (SUM, lambda m, x: m(x, 3), "opaque 'inner' takes Tensor, int, wanted tensors by position; name what holds"),
        (SUM, lambda m, x: m(x, other=x), "opaque 'inner' takes Tensor, dict, wanted tensors by position"),
        (lambda x: x[0], lambda m, x: m([x]), "opaque 'inner' takes list, wanted tensors by position"),
        (
            lambda x: {"a": x},
            lambda m, x: m(x)["a"],
            "opaque 'inner' gives a dict, wanted a tensor or a tuple of them",
        ),
        (lambda x: (x, 1), lambda m, x: m(x)[0], "opaque 'inner' gives a tuple, wanted a tensor or a tuple of them"),
        (SUM, lambda m, x: x, "opaque 'inner' is called 0 times, wanted at least once, however large the batch"),
        (SUM, lambda m, x: m(x) if len(x) == 4 else m(m(x)), "opaque 'inner' is called 1 or 2 times, wanted"),
        (lambda x: torch.zeros(len(x) // 5 + 1), lambda m, x: x * m(x).sum(), "gives sizes that do not follow"),
        (lambda x: [x] * len(x), lambda m, x: m(x)[0], "opaque 'inner' gives 4 or 5 tensors: name what holds it"),
        (
            lambda x: x.reshape(4, -1),
            lambda m, x: m(x),
            "Calls does not run on its example inputs with a batch of 5: ",
        ),
    ],
)
def test_calls_that_cannot_be_kept_opaque(
    gives: Callable[[Tensor], Any], how: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(CaptureError, match=message) as refused:
        eq.plan(Calls(Takes(gives), how), torch.rand(4, 3, 7), opaque=["inner"])
    assert "\n" not in str(refused.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        CaptureError,
        match=r"^found no submodule 'gate' to keep opaque, wanted a dotted name or a class below the model, whose "
        r"children are first, middle, last$",
    ):
        eq.prepare(Between(Gate()), IMAGE, opaque=["gate"])
    with pytest.raises(CaptureError, match=r"^found opaque 'middle', wanted a list of names, such as \['middle'\]$"):
        eq.prepare(Between(Gate()), IMAGE, opaque="middle")


FACTORY = """
import torch
from torch import nn

class Gate(nn.Module):
    def forward(self, x):
        return torch.tanh(x) if x.mean() > 1.0 else x

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), Gate(), nn.Flatten(), nn.LazyLinear(10))
"""


def test_a_recipe_names_them_too(tmp_path: Path) -> None:
    (tmp_path / "gate.py").write_text(FACTORY.replace("nn.LazyLinear(10)", "nn.Linear(4 * 30 * 30, 10)"))
    settings = [f"model.factory={tmp_path}/gate.py:make", "model.args={}", "data.image_size=32"]
    with pytest.raises(CaptureError, match=r"opaque=\['1'\]$"):
        plan_recipe(load_recipe("digits-edge", settings))
    planned = plan_recipe(load_recipe("digits-edge", [*settings, "quantize.opaque=['1']"]))
    assert OPAQUE_REASON in str(planned)
