"""ExecuTorch artifacts: exact, the same bytes for the same program, one delegate, at home in a fresh process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import EdgeqatError, InputError, PlanError
from edgeqat.lowering.executorch_file import MAX_BATCH
from edgeqat.lowering.executorch_session import ExecutorchSession
from edgeqat.lowering.to_executorch import spell
from edgeqat.lowering.xnnpack_limits import check_scales
from edgeqat.op_attrs import AddAttrs, ConcatAttrs, MulAttrs
from edgeqat.program import Kind, QuantizedProgram
from edgeqat.replay.kernels import arithmetic_here
from edgeqat.replay.script import replay
from helpers import CommandLine, flip_byte, run_python
from models import FloatMiddle, SmallNet, shake
from programs import CONV, grid, one_op

pytestmark = pytest.mark.skipif(arithmetic_here("executorch") is None, reason="XNNPACK's kernels are tried on x86")

IMAGE = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))

RUN_SHIPPED = """
import sys
sys.modules["edgeqat"] = sys.modules["onnxruntime"] = None
import runpy
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


def converted(model: nn.Module, target: object = "executorch", x: Tensor = IMAGE) -> QuantizedProgram:
    sim = eq.prepare(model.eval(), x, target)  # type: ignore[arg-type]
    return eq.convert(eq.calibrate(sim, [x]))


@pytest.fixture(scope="module")
def program() -> QuantizedProgram:
    torch.manual_seed(0)
    return converted(shake(SmallNet()))


@pytest.fixture(scope="module")
def artifact(program: QuantizedProgram, tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    return eq.lower(program, "executorch", tmp_path_factory.mktemp("artifact") / "small")


def test_every_value_is_the_references(artifact: eq.Artifact, program: QuantizedProgram) -> None:
    found = eq.verify(artifact, program, [IMAGE, IMAGE[:1], IMAGE.repeat(4, 1, 1, 1)])
    assert (found.against, found.exact_here) == ("reference:xnnpack", True)
    assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)


def test_everything_is_in_one_delegate_and_the_shortcut_is_one_conv(
    artifact: eq.Artifact, program: QuantizedProgram
) -> None:
    ops = artifact.manifest["coverage"]["runtime_ops"]
    assert ops["executorch_call_delegate"] == 1
    assert not any("." in name for name in ops), "an op outside the delegate"
    assert ops["Conv2d"] == 4  # three and the shortcut
    assert not {"StaticSlice", "StaticConstantPad"} & set(ops)


def test_same_program_gives_the_same_bytes(artifact: eq.Artifact, program: QuantizedProgram) -> None:
    again = spell(program, None)
    assert again.data == artifact.path.read_bytes()
    assert str(Path.cwd()).encode() not in again.data + again.taps


def test_shipped_script_needs_no_edgeqat(artifact: eq.Artifact) -> None:
    done = run_python(RUN_SHIPPED, artifact.folder / "verify.py")
    assert (done.code, done.err) == (0, "")
    assert "100.00% of outputs bit-identical to xnnpack" in done.out


def test_a_batch_larger_than_a_call_takes_is_run_in_parts(artifact: eq.Artifact, program: QuantizedProgram) -> None:
    many = torch.randn(2 * MAX_BATCH + 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(artifact.run(many), eq.reference(program, many, "xnnpack"))


def test_inputs_in_another_order_of_memory(artifact: eq.Artifact, program: QuantizedProgram) -> None:
    expected = eq.reference(program, IMAGE, "xnnpack")
    assert torch.equal(artifact.run(IMAGE.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(artifact.run(IMAGE.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)), expected)


def test_an_example_in_another_order_of_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = IMAGE.to(memory_format=torch.channels_last)
    made = converted(shake(FloatMiddle()), x=x)
    found = eq.verify(eq.lower(made, "executorch", tmp_path / "a"), made, [IMAGE])
    assert (found.bit_identical, found.first_difference) == (1.0, None)


def test_sessions_of_different_threads_live_side_by_side(artifact: eq.Artifact, program: QuantizedProgram) -> None:
    expected = eq.reference(program, IMAGE, "xnnpack")
    for threads in (1, 2, 1, 2):
        assert torch.equal(artifact.session(threads).run([IMAGE])[0], expected)


class Tables(nn.Module):
    """A table that XNNPACK has a node for, one that it has none for, a constant, and a float island between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.gain, self.fc = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x)) * self.gain
        x = torch.softmax(F.mish(self.last(x)), -1)
        return self.fc(F.relu(self.last(x)).mean((2, 3)))


def test_what_xnnpack_has_no_node_for_runs_around_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(Tables())
    artifact = eq.lower(made, "executorch", tmp_path / "a")
    coverage = artifact.manifest["coverage"]
    assert coverage["runtime_ops"]["Sigmoid"] == 1
    assert coverage["runtime_ops"]["aten.index_select.default"] == 1
    assert [entry["op"] for entry in coverage["float_ops"]] == ["aten.softmax.int"]
    found = eq.verify(artifact, made, [IMAGE])
    assert found.first_difference is None


def test_float_twin_keeps_the_models_results(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    mapping = eq.QConfigMapping().set_global(None)
    made = eq.convert(eq.prepare(model, IMAGE, "executorch", mapping))
    artifact = eq.lower(made, "executorch", tmp_path / "a")
    torch.testing.assert_close(artifact.run(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(artifact.run(IMAGE.repeat(3, 1, 1, 1)), model(IMAGE.repeat(3, 1, 1, 1)))
    assert replay(artifact.folder).passed


def test_a_changed_weight_is_found_and_named(program: QuantizedProgram, tmp_path: Path) -> None:
    artifact = eq.lower(program, "executorch", tmp_path / "a")
    name = next(op.weight for op in program.ops if op.kind is Kind.CONV)
    assert name is not None
    const = program.consts[name]
    assert const.data is not None
    changed = replace(const, data=const.data.clone())
    assert changed.data is not None
    changed.data.view(-1)[0] ^= 64
    other = replace(program, consts={**program.consts, name: changed})
    found = eq.verify(artifact, other, [IMAGE])
    assert found.bit_identical < 1.0
    assert found.first_difference is not None and found.first_difference.startswith("conv1")


def refusal(program: QuantizedProgram) -> str:
    with pytest.raises(EdgeqatError) as refused:
        spell(program, None)
    return str(refused.value)


LIMITS = {
    "add": (2.0**-10, 2.0**8),
    "mul": (2.0**-16, 2.0**8),
    "concat": (2.0**-16, 2.0**8),
    "conv": (2.0**-32, 2.0**8),
}


def limited(kind: str, ratio: float) -> QuantizedProgram:
    x, y = grid(2.0**-4, 100), grid(2.0**-4 / ratio, 3)
    if kind == "add":
        return one_op(Kind.ADD, AddAttrs(), [(9,)] * 2, [x, grid(2.0**-22, 5)], (9,), y)
    if kind == "mul":
        return one_op(Kind.MUL, MulAttrs(), [(9,)] * 2, [x, grid(1.0, 7)], (9,), y)
    if kind == "concat":
        return one_op(Kind.CONCAT, ConcatAttrs(1), [(9,)] * 2, [x, y], (18,), y)
    weight, scale = torch.ones(4, 3, 3, 3), torch.ones(4)
    return one_op(Kind.CONV, CONV, [(3, 5, 5)], [x], (4, 5, 5), y, weight, scale)


@pytest.mark.parametrize("kind", LIMITS)
def test_scales_beyond_what_the_kernels_are_made_for(kind: str) -> None:
    low, high = LIMITS[kind]
    for ratio in (low, high / 2):
        check_scales(limited(kind, ratio))
    for ratio in (low / 2, high):
        with pytest.raises(EdgeqatError, match="y: found .* wanted one from .* to 256, .* or leave the op in float"):
            spell(limited(kind, ratio), None)


def test_a_graph_that_xnnpack_refuses_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeqat.lowering.to_executorch.check_scales", lambda program: None)
    with pytest.raises(EdgeqatError, match="the file for executorch cannot be loaded: ExecuTorch refuses the model"):
        eq.lower(limited("conv", 2.0**8), "executorch", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_program_that_was_planned_without_executorch() -> None:
    torch.manual_seed(0)
    assert "fc gives float logits" in refusal(converted(shake(SmallNet()), "onnxruntime"))


def test_open_sizes_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(PlanError, match="a file for executorch has one size"):
        eq.prepare(SmallNet(), IMAGE, "executorch", dynamic_size=True)


def test_unknown_engine(artifact: eq.Artifact) -> None:
    with pytest.raises(InputError, match="ExecuTorch has no engine 'qnn', wanted xnnpack"):
        artifact.session(engine="qnn")


@pytest.mark.parametrize("content", [b"", b"no program", bytes(range(256)) * 9])
def test_a_file_that_is_no_program(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(content)
    with pytest.raises(InputError, match="ExecuTorch refuses the model: .*fetch the artifact again"):
        ExecutorchSession(path, "xnnpack", 1)


def test_a_flipped_byte_is_refused(artifact: eq.Artifact, tmp_path: Path, command: CommandLine) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in artifact.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    flip_byte(folder / "model.pte")
    assert "sha256" in command("verify", folder).refusal(2)
