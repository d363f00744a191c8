"""QDQ files from other tools: what ONNX Runtime makes of each of their cells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import safetensors.torch
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import edgeqat as eq
from edgeqat.errors import InputError
from edgeqat.measuring.qdq_file import read_inputs
from helpers import EXACT_ARITHMETIC, CommandLine
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Reader(CalibrationDataReader):
    def __init__(self, name: str) -> None:
        self._batches = iter([{name: IMAGE.numpy()}])

    def get_next(self) -> dict[str, np.ndarray]:
        return next(self._batches, None)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def float_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    island = eq.prepare(shake(SmallNet()).eval(), IMAGE, qconfig_mapping=eq.QConfigMapping().set_global(None))
    return eq.lower(eq.convert(island), "onnxruntime", tmp_path_factory.mktemp("float") / "a").path


@pytest.fixture(scope="module")
def made_elsewhere(float_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ONNX Runtime's own quantizer."""
    folder = tmp_path_factory.mktemp("elsewhere")
    quant_pre_process(float_file, folder / "prepared.onnx", skip_symbolic_shape=True)
    name = onnx.load(float_file).graph.input[0].name
    quantize_static(
        folder / "prepared.onnx",
        folder / "model.onnx",
        Reader(name),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return folder / "model.onnx"


def make(path: Path, nodes: list[onnx.NodeProto], **constants: np.ndarray) -> Path:
    """A graph from "x" [N, 3, 8, 8] to "y"."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [info("y", onnx.TensorProto.UINT8, ["N", 4, 6, 6])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), path)
    return path


def a_conv_whose_weights_were_forgotten(path: Path) -> Path:
    """ONNX Runtime quantizes them by itself."""
    node = onnx.helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("Conv", ["d", "w"], ["f"]),
        node("QuantizeLinear", ["f", "s_y", "z"], ["y"]),
    ]
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    scales = {"s": np.float32(0.02), "s_y": np.float32(0.05), "z": np.uint8(128)}
    return make(path, nodes, w=weight, **{name: np.asarray(value) for name, value in scales.items()})


@EXACT_ARITHMETIC
def test_a_file_of_another_tool_is_what_it_says(made_elsewhere: Path) -> None:
    found = eq.verify_qdq(made_elsewhere)
    assert found.n == 4 and len(found.cells) >= 5
    assert found.departing == [] and found.agreement == 1.0
    integers = [cell for cell in found.cells if cell.histogram]
    assert all(set(cell.histogram) <= {-1, 0, 1} and cell.worst <= 0.501 for cell in integers)
    assert str(found).endswith("verified: every cell computes what the file says, rounded")


def test_a_departure_is_named_at_its_cell(tmp_path: Path, command: CommandLine) -> None:
    path = a_conv_whose_weights_were_forgotten(tmp_path / "forgotten.onnx")
    found = eq.verify_qdq(path)
    (departing,) = found.departing
    assert (departing.output, departing.ops) == ("y", ("Conv",))
    assert departing.worst > 0.6
    ended = command("verify", path)
    assert ended.code == 3
    assert "DEPARTS at y (Conv): " in ended.out


def test_floats_left_in_the_graph_are_named(made_elsewhere: Path, float_file: Path, tmp_path: Path) -> None:
    model = onnx.load(made_elsewhere)
    head = next(node for node in model.graph.node if node.op_type == "Gemm")
    bias = next(node for node in model.graph.node if node.output[0] == head.input[2])
    head.input[2] = "bias"
    scale = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == bias.input[1]))
    integers = onnx.numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == bias.input[0]))
    model.graph.initializer.append(onnx.numpy_helper.from_array((integers * scale).astype(np.float32), "bias"))
    onnx.save(model, tmp_path / "model.onnx")
    found = eq.verify_qdq(tmp_path / "model.onnx")
    assert sum(found.float_ops.values()) >= 1
    assert "computed in float: " in str(found)


@EXACT_ARITHMETIC
def test_inputs_of_ones_own(made_elsewhere: Path, tmp_path: Path, command: CommandLine) -> None:
    np.save(tmp_path / "x.npy", IMAGE[:3].numpy())
    ended = command("verify", made_elsewhere, "--inputs", tmp_path / "x.npy", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["n"] == 3
    safetensors.torch.save_file({"x": IMAGE[:2]}, tmp_path / "x.safetensors")
    assert torch.equal(read_inputs(tmp_path / "x.safetensors")["x"], IMAGE[:2])


def test_bad_input_is_named(float_file: Path, made_elsewhere: Path, tmp_path: Path, command: CommandLine) -> None:
    assert "quantizes no value: it has no QuantizeLinear" in command("verify", float_file).refusal(2)
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    assert "cannot be read as ONNX" in command("verify", tmp_path / "junk.onnx").refusal(2)
    assert "cannot be read as ONNX" in command("verify", tmp_path / "none.onnx").refusal(2)
    assert "holds no inputs" in command("verify", made_elsewhere, "--inputs", tmp_path / "junk.onnx").refusal(2)
    np.save(tmp_path / "wrong.npy", np.zeros((1, 5), np.float32))
    assert "cannot run the file" in command("verify", made_elsewhere, "--inputs", tmp_path / "wrong.npy").refusal(2)
    with pytest.raises(InputError, match="found the inputs a, b, wanted"):
        eq.verify_qdq(made_elsewhere, {"a": IMAGE, "b": IMAGE})
