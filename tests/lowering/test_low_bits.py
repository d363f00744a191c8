"""Weights of up to 4 bits in 4 bits, and activations of fewer than 8, in whole networks. Zero steps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.lowering.onnx_session import OnnxSession, float_ops, optimized_ops
from edgeqat.lowering.onnx_writer import WORTH_PACKING, pack_nibbles
from edgeqat.lowering.to_onnx import payload_bytes, spell_model, taps_suffix
from edgeqat.program import Kind
from edgeqat.replay.kernels import arithmetic_here
from edgeqat.replay.script import replay
from edgeqat.zoo import edge_model, mobilenetv2_cifar, resnet8
from helpers import EXACT_ARITHMETIC
from models import FloatBlocks, SmallNet, shake
from own_targets import write_target

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def bits(weights: int, activations: int = 8) -> eq.QConfig:
    return eq.QConfig(eq.ActivationConfig(bits=activations), eq.WeightConfig(bits=weights))


def converted(
    model: nn.Module, qconfig: object, x: Tensor = IMAGE, target: str | list[str] = "onnxruntime"
) -> eq.QuantizedProgram:
    return eq.convert(eq.calibrate(eq.prepare(model.eval(), x, target, qconfig), [x]))


def types_of(model: onnx.ModelProto) -> Counter[int]:
    return Counter(tensor.data_type for tensor in model.graph.initializer)


@pytest.mark.parametrize("shape", [(8,), (3, 5), (1, 1, 7), (128,)])
def test_nibbles_are_packed_as_onnx_reads_them(shape: tuple[int, ...]) -> None:
    integers = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    raw = pack_nibbles(integers)
    assert len(raw) == (integers.size + 1) // 2
    tensor = onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=shape, raw_data=raw)
    assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), integers)
    expected = onnx.helper.make_tensor("", onnx.TensorProto.INT4, shape, integers.reshape(-1).tolist())
    assert bytes(expected.int32_data) == raw


class EveryWeight(nn.Module):
    """A conv, a depthwise, grouped, transposed and 1-d one, linear layers, one weight twice, an odd count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)
        self.transposed = nn.ConvTranspose2d(16, 5, 3, stride=2)
        self.odd = nn.Conv2d(5, 9, 3)
        self.sequence = nn.Conv1d(9, 9, 3, padding=1)
        self.tokens, self.head = nn.Linear(9, 19), nn.Linear(19, 10)
        self.scale = nn.Parameter(torch.randn(19))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        x = torch.relu(self.odd(self.transposed(torch.relu(self.grouped(x)))))
        x = self.sequence(self.sequence(x.flatten(2))).transpose(1, 2)
        return self.head((self.tokens(x) * self.scale)[:, 0])


@EXACT_ARITHMETIC
@pytest.mark.parametrize("width", [2, 3, 4, 5])
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_kind_of_weight_fuses_as_its_int8_form_does(width: int, per_channel: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 3, 8, 8)
    program = converted(EveryWeight(), eq.QConfig(weight=eq.WeightConfig(bits=width, per_channel=per_channel)), x)
    packed, plain = (spell_model(program, packs=packs) for packs in (True, False))
    sizes = [op.weight for op in program.ops if op.weight is not None]
    wanted = {n for n in sizes if width <= 4 and program.consts[n].data.numel() >= WORTH_PACKING}  # type: ignore[union-attr]
    assert types_of(packed)[onnx.TensorProto.INT4] == len(wanted)
    assert len(wanted) == (8 if width <= 4 else 0)
    assert types_of(plain)[onnx.TensorProto.INT4] == 0
    files = [model.SerializeToString() for model in (packed, plain)]
    assert optimized_ops(files[0]) == optimized_ops(files[1]) and not float_ops(files[0])
    found, expected = (OnnxSession(file + taps_suffix(program)).run([x]) for file in files)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(OnnxSession(files[0]).run([x])[0], eq.reference(program, x))
    elements = {n: program.consts[n].data.numel() for n in wanted}  # type: ignore[union-attr]
    assert payload_bytes(plain) - payload_bytes(packed) == sum(n // 2 for n in elements.values())
    assert (packed.opset_import[0].version, packed.ir_version) == ((21, 10) if wanted else (18, 8))
    assert len(files[0]) <= len(files[1])


MODELS = {"resnet8": resnet8, "edge": edge_model, "small": SmallNet}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("activations", [2, 4, 6])
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_network_of_narrow_grids_is_exact_and_integer(name: str, activations: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = converted(shake(MODELS[name]()), bits(4, activations))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    parity = eq.verify(artifact, program, [IMAGE, 9 * IMAGE])
    assert parity.exact_here and parity.bit_identical == 1.0 and parity.max_error_steps == 0.0, parity
    _, taps = eq.reference(program, 9 * IMAGE, taps=True)
    assert max(int(value.max()) for value in taps.values()) == 2**activations - 1
    ops = optimized_ops(artifact.path.read_bytes())
    planned = [op.kind.value for op in program.ops]
    assert ops["QLinearConv"] == planned.count("conv") and ops["QLinearAdd"] == planned.count("add")
    assert not float_ops(artifact.path.read_bytes()), ops
    assert replay(artifact.folder).passed


@EXACT_ARITHMETIC
def test_narrow_values_inside_a_wide_network(tmp_path: Path) -> None:
    """Sums and concatenations of values of different widths, and ops that share a grid."""
    torch.manual_seed(0)
    mapping = eq.QConfigMapping().set_global(bits(8, 8)).set_module_name_regex(r".*\.conv1", bits(4, 4))
    model = shake(resnet8())
    program = converted(model, mapping)
    widths = Counter(value.grid.qmax.bit_length() for value in program.values.values() if value.grid is not None)
    assert widths[4] == 3 and widths[8] > 9, widths
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    parity = eq.verify(artifact, program, [IMAGE])
    assert parity.bit_identical == 1.0 and parity.max_error_steps == 0.0
    assert not float_ops(artifact.path.read_bytes())


@EXACT_ARITHMETIC
@pytest.mark.parametrize("widths", [(4, 8), (4, 4)])
def test_what_reads_a_file_takes_one_with_narrow_integers(widths: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = converted(shake(SmallNet()), bits(*widths))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    found = eq.verify_qdq(artifact.path)
    assert found.departing == [] and not found.float_ops
    assert artifact.manifest["payload_bytes"] < sum(
        c.data.numel() for c in program.consts.values() if c.data is not None
    )
    again = eq.lower(program, "onnxruntime", tmp_path / "b")
    assert again.path.read_bytes() == artifact.path.read_bytes()


@EXACT_ARITHMETIC
def test_float_islands_are_written_for_the_same_opset() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 8, 8)
    blocks = FloatBlocks()
    blocks.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
    program = converted(blocks, bits(4), x)
    model = spell_model(program)
    assert model.opset_import[0].version == 21 and types_of(model)[onnx.TensorProto.INT4]
    session = OnnxSession(model.SerializeToString() + taps_suffix(program))
    found = dict(zip(session.outputs, session.run([x[:3]]), strict=True))
    _, taps = eq.reference(program, x[:3], taps=True)
    assert torch.equal(found["convs.0"].int(), taps["convs.0"])
    # As in test_to_onnx: float32 sums of another order may turn into one step of what is quantized again.
    assert all(int((found[name].int() - taps[name]).abs().max()) <= 3 for name in taps)


def test_the_file_of_a_target_of_one_s_own_keeps_int8_weights(tmp_path: Path) -> None:
    """A device of one's own, whose compiler may not know INT4."""
    torch.manual_seed(0)
    target = write_target(tmp_path)
    program = converted(shake(SmallNet()), bits(4), target=target)
    artifact = eq.lower(program, target, tmp_path / "a")
    assert types_of(onnx.load(artifact.path))[onnx.TensorProto.INT4] == 0


@pytest.mark.parametrize("runtime", ["torchscript", "litert", "openvino", "aoti"])
def test_a_runtime_that_does_not_clamp_refuses_narrow_activations(runtime: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"found 4-bit activations, but {runtime} takes 8 bits"):
        eq.plan(SmallNet(), IMAGE, runtime, bits(8, 4))
    program = converted(SmallNet(), bits(8, 4))
    message = rf"x:quantized has the integers 0\.\.15, which {runtime} does not take; plan the model for {runtime}"
    with pytest.raises(PlanError, match=message):
        eq.lower(program, runtime, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@EXACT_ARITHMETIC
def test_depthwise_networks_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = converted(shake(mobilenetv2_cifar()), bits(4, 4))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    parity = eq.verify(artifact, program, [IMAGE])
    assert parity.bit_identical == 1.0 and parity.max_error_steps == 0.0, parity


@pytest.mark.skipif(arithmetic_here("openvino") is None, reason="OpenVINO's kernels here have no known arithmetic")
@pytest.mark.parametrize("name", ["resnet8", "edge"])
def test_openvino_reads_packed_weights_as_int8_ones(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = converted(shake(MODELS[name]()), bits(4), target="openvino")
    artifact = eq.lower(program, "openvino", tmp_path / "a")
    assert types_of(onnx.load(artifact.path))[onnx.TensorProto.INT4] > 5
    assert eq.verify(artifact, program, [IMAGE]).bit_identical == 1.0
    layers = artifact.manifest["coverage"]["runtime_ops"]
    assert layers["Convolution u8"] == sum(op.kind is Kind.CONV for op in program.ops), layers


@pytest.mark.skipif(arithmetic_here("executorch") is None, reason="XNNPACK's kernels are tried on x86")
def test_a_whole_network_of_narrow_grids_in_executorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = converted(shake(resnet8()), bits(4, 4), target="executorch")
    artifact = eq.lower(program, "executorch", tmp_path / "a")
    parity = eq.verify(artifact, program, [IMAGE, 9 * IMAGE])
    assert parity.exact_here and parity.bit_identical == 1.0 and parity.max_error_steps == 0.0, parity
    _, taps = eq.reference(program, 9 * IMAGE, "xnnpack", taps=True)
    assert max(int(value.max()) for value in taps.values()) == 15
    assert replay(artifact.folder).passed
