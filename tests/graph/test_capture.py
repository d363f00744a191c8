from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from edgeqat.errors import CaptureError, InputError
from edgeqat.graph.capture import CapturedGraph, capture
from edgeqat.zoo import edge_model, edge_model_with_stubs, resnet20
from models import Branches, DataDependent, FixedBatch, SmallNet, shake

IMAGE = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def run(captured: CapturedGraph, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Executes a captured graph as it stands."""
    outputs: tuple[Tensor, ...] = fx.GraphModule(captured.root, captured.graph)(*inputs)
    return outputs


def test_the_graph_computes_what_the_model_does_in_eval_and_with_any_batch() -> None:
    model = shake(SmallNet()).eval()
    captured = capture(model, IMAGE[:1])
    captured.root.eval()
    for n in (1, 3, 4):
        assert torch.equal(run(captured, IMAGE[:n])[0], model(IMAGE[:n]))


def test_train_mode_uses_batch_statistics_and_dropout_again() -> None:
    model = shake(SmallNet()).train()
    captured = capture(model, IMAGE)
    captured.root.train()
    torch.manual_seed(3)
    expected = model(IMAGE)
    torch.manual_seed(3)
    found = run(captured, IMAGE)[0]
    assert torch.equal(found, expected)
    mean = captured.root.get_buffer("bn1.running_mean")
    assert torch.equal(mean, model.bn1.running_mean)  # both moved by the same momentum
    assert not torch.equal(run(captured, IMAGE)[0], expected)  # another dropout mask


def test_batch_norm_keeps_its_own_eps_and_momentum() -> None:
    captured = capture(SmallNet(), IMAGE)
    norm = captured.root.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.eps, norm.momentum) == (1e-3, 0.03)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_itself_is_left_as_it_was(training: bool) -> None:
    model = shake(SmallNet()).train(training)
    model.conv1.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model, IMAGE)
    assert model.training is training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not captured.root.get_parameter("conv1.weight").requires_grad
    assert captured.root.get_parameter("conv2.weight").requires_grad
    assert captured.root.get_parameter("conv2.weight") is not model.conv2.weight


@pytest.mark.parametrize("factory", [SmallNet, edge_model, edge_model_with_stubs, resnet20])
def test_parameters_keep_their_names(factory: type[nn.Module]) -> None:
    model = factory()
    captured = capture(model, torch.zeros(1, 3, 32, 32))
    assert {n for n, _ in captured.root.named_parameters()} == {n for n, _ in model.named_parameters()}


def test_in_place_variants_become_functional_and_origins_name_modules_and_lines() -> None:
    captured = capture(SmallNet(), IMAGE)
    targets = {str(node.target) for node in captured.graph.nodes}
    assert not any("_." in target and "relu_" in target for target in targets), targets
    assert not any("add_" in target for target in targets), targets
    origins = captured.origins.values()
    assert ("conv1", "Conv2d", "aten.conv2d") in {(o.module, o.type, o.aten) for o in origins}
    assert any(o.line.startswith("models.py:") for o in origins)


def test_several_inputs_and_outputs_by_position_and_by_name() -> None:
    model, x = Branches().eval(), IMAGE[:2]
    by_position, by_name = capture(model, (x, x)), capture(model, {"left": x, "right": x})
    for captured in (by_position, by_name):
        for batch in ((x, x + 1), {"right": x + 1, "left": x}):
            found = captured.signature.unflatten(run(captured, *captured.signature.flatten(batch)))
            expected = model(x, x + 1)
            assert set(found) == {"sum", "map"}
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_missing_or_unknown_inputs_are_named() -> None:
    captured = capture(Branches(), (IMAGE, IMAGE))
    with pytest.raises(InputError, match="found inputs .*'other'.*wanted .*'left', 'right'"):
        captured.signature.flatten({"left": IMAGE, "other": IMAGE})


def test_data_dependent_control_flow_is_refused_with_its_line() -> None:
    with pytest.raises(
        CaptureError, match=r"DataDependent cannot be captured at models\.py:\d+ \(if x\.sum\(\) > 0:\)"
    ):
        capture(DataDependent(), IMAGE)


def test_a_fixed_batch_size_is_refused() -> None:
    with pytest.raises(CaptureError, match="FixedBatch cannot be captured.*fixes the batch size"):
        capture(FixedBatch(), IMAGE)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(CaptureError, match="found a function, wanted an nn.Module"):
        capture(lambda x: x, IMAGE)  # type: ignore[arg-type]


class InPlaceSlice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        y[:, 0] = 0.0
        return y


def test_an_in_place_op_without_a_functional_twin_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"found the in-place op .* at test_capture\.py:\d+"):
        capture(InPlaceSlice(), IMAGE)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_by_nothing_leaves_no_op(mode: str) -> None:
    captured = capture(nn.Conv2d(3, 4, 1, padding_mode=mode), IMAGE)
    assert [str(node.target) for node in captured.graph.nodes if node.op == "call_function"] == ["aten.conv2d.default"]


class InPlace(nn.Module):
    """Every way to change a tensor in place that models are written with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = y.clone()
        z += y
        z -= 0.5
        z *= y
        z /= 2.0
        z.tanh_()
        z.neg_()
        return self.last(nn.functional.selu(nn.functional.elu(z, inplace=True), inplace=True).clamp_min_(-1.0))


def test_what_is_changed_in_place_is_captured_as_functions() -> None:
    model = InPlace().eval()
    captured = capture(model, IMAGE)
    assert torch.equal(run(captured, IMAGE)[0], model(IMAGE))
    assert not any(
        str(node.target).split(".")[1].endswith("_") for node in captured.graph.nodes if node.op == "call_function"
    )
