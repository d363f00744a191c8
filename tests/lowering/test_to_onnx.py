from __future__ import annotations

from pathlib import Path

import onnx
import onnx.checker
import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.errors import EdgeqatError
from edgeqat.lowering.onnx_session import OnnxSession, optimized_ops
from edgeqat.lowering.to_onnx import payload_bytes, spell_model, taps_suffix
from edgeqat.replay.script import replay
from edgeqat.zoo import edge_model, resnet20
from helpers import EXACT_ARITHMETIC
from models import Branches, FloatBlocks, FloatMiddle, SmallNet, Tokens, WithConstants, shake

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def converted(model: nn.Module, x: object = IMAGE, **settings: object) -> eq.QuantizedProgram:
    sim = eq.prepare(model.eval(), x, **settings)  # type: ignore[arg-type]
    if sim.activation_quantizers():
        eq.calibrate(sim, [x])  # type: ignore[list-item]
    return eq.convert(sim)


MODELS = {"edge": edge_model, "resnet20": resnet20, "small": SmallNet}


@pytest.mark.parametrize("name", MODELS)
def test_every_op_becomes_one_integer_kernel_and_nothing_stays_float(name: str) -> None:
    torch.manual_seed(0)
    program = converted(shake(MODELS[name]()))
    ops = optimized_ops(spell_model(program).SerializeToString())
    planned = [op.kind.value for op in program.ops]
    assert ops["QLinearConv"] == planned.count("conv")
    assert ops["QLinearAdd"] == planned.count("add")
    assert ops["QLinearGlobalAveragePool"] == 1 and ops["QGemm"] == 1 and ops["QuantizeLinear"] == 1
    integer = {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"}
    moving = {"Transpose", "Reshape", "Slice", "Pad", "MaxPool"}
    assert set(ops) <= integer | moving | {"QuantizeLinear"}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("batch", [1, 5, 128])
@pytest.mark.parametrize("name", MODELS)
def test_any_batch_runs_and_equals_the_reference(name: str, batch: int) -> None:
    torch.manual_seed(0)
    program = converted(shake(MODELS[name]()))
    x = torch.randn(batch, 3, 32, 32)
    (found,) = OnnxSession(spell_model(program).SerializeToString()).run([x])
    assert torch.equal(found, eq.reference(program, x))


def test_the_file_is_clean() -> None:
    model = spell_model(converted(edge_model()))
    onnx.checker.check_model(model, full_check=True)
    assert not model.metadata_props and not model.producer_name and not model.graph.doc_string
    for node in model.graph.node:
        assert not node.metadata_props and not node.doc_string and not node.name
    assert not model.graph.value_info and not model.functions
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_float_twin_is_clean_too_and_agrees_with_the_model() -> None:
    model = shake(edge_model()).eval()
    program = converted(model, qconfig_mapping=eq.QConfigMapping().set_global(None))
    written = spell_model(program)
    for item in [*written.graph.node, *written.graph.initializer, written]:
        assert not item.metadata_props
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}  # it competes folded
    (found,) = OnnxSession(written.SerializeToString()).run([IMAGE])
    # float32 kernels that sum in another order: relative to the largest logit.
    expected = model(IMAGE).detach()
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max() + 1)
    assert payload_bytes(written) == 4 * folded_sizes(program)


def folded_sizes(program: eq.QuantizedProgram) -> int:
    """Elements of a batch-norm-free network: each weight, and a bias per output channel."""
    body = program.ops[0].body
    assert body is not None
    return sum(p.numel() + p.shape[0] for p in body.parameters() if p.dim() > 1)


@EXACT_ARITHMETIC
def test_islands_between_integer_ops_are_inlined() -> None:
    torch.manual_seed(0)
    program = converted(FloatMiddle())
    ops = optimized_ops(spell_model(program).SerializeToString())
    assert ops["QLinearConv"] == 2 and ops["Sin"] == 1
    (found,) = OnnxSession(spell_model(program).SerializeToString()).run([IMAGE])
    expected = eq.reference(program, IMAGE)
    # sin may differ in its last bit between the libraries, so the next quantize may land one step away; a 3x3 conv
    # over 4 channels carries a few such steps into its output.
    step = program.grid_of("last").per_tensor()[0]
    assert float((found - expected).abs().max()) <= 4 * step


CONV = (nn.Conv2d, 4, 4, 3)
FLOAT_MIDDLES: dict[str, list[tuple[object, ...]]] = {
    "conv": [CONV, (nn.ReLU,)],
    "depthwise": [(nn.Conv2d, 4, 4, 3, 1, 1, 1, 4)],
    "transposed": [(nn.ConvTranspose2d, 4, 4, 3, 1, 0, 0, 2)],
    "padding, conv": [(nn.ZeroPad2d, 1), CONV],
    "pool, conv": [(nn.MaxPool2d, 2), CONV],
    "pool, flatten, linear": [(nn.MaxPool2d, 30), (nn.Flatten,), (nn.Linear, 4, 4), (nn.Unflatten, 1, (4, 1, 1))],
}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", FLOAT_MIDDLES)
def test_a_layer_left_in_float_keeps_its_float_weights(name: str) -> None:
    """Between a DequantizeLinear and a QuantizeLinear, ONNX Runtime would quantize them by itself."""
    torch.manual_seed(0)
    middle = [make(*args) for make, *args in FLOAT_MIDDLES[name]]  # type: ignore[operator]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(*middle), nn.Conv2d(4, 4, 1))
    program = converted(network, qconfig_mapping=eq.QConfigMapping().set_module_name_regex(r"1\.\d", None))
    kinds = [op.kind.value for op in program.ops]
    assert kinds == ["quantize", "conv", "dequantize", "float", "quantize", "conv", "dequantize"]
    model = spell_model(program).SerializeToString()
    ops = optimized_ops(model)
    assert ops["QLinearConv"] == 2 and ops["QGemm"] == 0, ops
    session = OnnxSession(model + taps_suffix(program))
    found = dict(zip(session.outputs, session.run([IMAGE]), strict=True))
    _, expected = eq.reference(program, IMAGE, taps=True)
    # Float sums of another order move a value by a step once in thousands; int8 weights move every fifth.
    for value, integers in expected.items():
        assert float((found[value] != integers).double().mean()) <= 0.005, value


@EXACT_ARITHMETIC
def test_all_islands_are_exported_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: calls.append(1) or export(*args, **kwargs))
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8)
    program = converted(FloatBlocks().eval(), x)
    assert [op.kind.value for op in program.ops].count("float") == 3
    session = OnnxSession(spell_model(program).SerializeToString() + taps_suffix(program))
    assert len(calls) == 1
    found = dict(zip(session.outputs, session.run([x[:3]]), strict=True))
    _, taps = eq.reference(program, x[:3], taps=True)
    assert torch.equal(found["convs.0"].int(), taps["convs.0"])
    # Behind an island, float32 sums of another order may turn into one step of what is quantized again, and a 1x1 conv
    # over 4 channels carries a few of them on; a wrong or swapped island is off by tens.
    assert all(int((found[name].int() - taps[name]).abs().max()) <= 3 for name in taps)


class NoOnnx(nn.Module):
    """Two islands, one of an op that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.last(torch.tanh(self.first(x))))


def test_the_island_that_cannot_be_exported_is_named_alone() -> None:
    program = converted(NoOnnx())
    with pytest.raises(EdgeqatError, match=r"cannot export the float ops aten\.special_bessel_j0: "):
        spell_model(program)


@EXACT_ARITHMETIC
def test_several_inputs_and_outputs() -> None:
    torch.manual_seed(0)
    program = converted(Branches(), (IMAGE, IMAGE + 1))
    found = OnnxSession(spell_model(program).SerializeToString()).run([IMAGE, IMAGE - 1])
    expected = eq.reference(program, (IMAGE, IMAGE - 1))
    assert torch.equal(found[0], expected["sum"]) and torch.equal(found[1], expected["map"])


INPUTS = {
    "constants made in forward": (WithConstants, IMAGE),
    "integer inputs": (Tokens, torch.arange(40).reshape(8, 5) % 10),
}


@pytest.mark.parametrize("name", INPUTS)
def test_constants_and_other_types(name: str, tmp_path: Path) -> None:
    make, x = INPUTS[name]
    model = make().eval()
    artifact = eq.lower(converted(model, x), "onnxruntime", tmp_path / "artifact")
    expected = model(x).detach().float()
    found = artifact.run(x).float()
    # 8 bits on random weights: some steps of the output's range, which a wrong input type or constant exceeds by far.
    assert float((found - expected).abs().max()) <= 0.1 * float(expected.abs().max())
    assert replay(artifact.folder).passed


@EXACT_ARITHMETIC
def test_taps_appended_to_the_file_show_every_integer_value() -> None:
    torch.manual_seed(0)
    program = converted(shake(SmallNet()))
    session = OnnxSession(spell_model(program).SerializeToString() + taps_suffix(program))
    found = dict(zip(session.outputs, session.run([IMAGE]), strict=True))
    _, taps = eq.reference(program, IMAGE, taps=True)
    assert set(taps) == {v.name for v in program.values.values() if v.grid is not None}
    assert all(torch.equal(found[name].int(), taps[name]) for name in taps)


def test_payload_counts_weights_and_biases_alone() -> None:
    program = converted(shake(SmallNet()))
    weights = sum(const.data.numel() for const in program.consts.values() if const.data is not None)
    biases = sum(4 * op.bias.numel() for op in program.ops if op.bias is not None)
    assert payload_bytes(spell_model(program)) == weights + biases


@EXACT_ARITHMETIC
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_narrow_weights_stay_exact(bits: int) -> None:
    torch.manual_seed(0)
    program = converted(shake(SmallNet()), qconfig_mapping=eq.QConfig(weight=eq.WeightConfig(bits=bits)))
    assert max(int(c.data.abs().max()) for c in program.consts.values() if c.data is not None) == 2 ** (bits - 1) - 1
    (found,) = OnnxSession(spell_model(program).SerializeToString()).run([IMAGE])
    assert torch.equal(found, eq.reference(program, IMAGE))


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = converted(shake(edge_model()))
    folders = [eq.lower(program, "onnxruntime", tmp_path / str(i)).folder for i in range(2)]
    for name in ("model.onnx", "golden.safetensors", "manifest.json", "verify.py"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
