"""OpenVINO artifacts: exact, the same bytes for the same program, honest about what cannot be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.errors import InputError, PlanError
from edgeqat.lowering.openvino_session import OpenVinoSession
from edgeqat.lowering.to_openvino import visible_groups
from edgeqat.replay import kernels
from edgeqat.replay.script import replay
from edgeqat.zoo import edge_model, resnet8
from helpers import digests, flip_byte, run_python
from models import FloatMiddle, SmallNet, WithConstants, shake

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

EXACT = pytest.mark.skipif(
    kernels.arithmetic_here("openvino") is None,
    reason="OpenVINO's kernels are known on x86 with AVX512-VNNI, without AMX",
)

RUN_SHIPPED = """
import sys
sys.modules["edgeqat"] = sys.modules["torch"] = sys.modules["onnx"] = sys.modules["onnxruntime"] = None
import runpy
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


def converted(model: nn.Module, target: object = "openvino") -> eq.QuantizedProgram:
    sim = eq.prepare(model.eval(), IMAGE, target)  # type: ignore[arg-type]
    return eq.convert(eq.calibrate(sim, [IMAGE]))


@pytest.fixture(scope="module")
def program() -> eq.QuantizedProgram:
    torch.manual_seed(0)
    return converted(shake(resnet8()))


@pytest.fixture(scope="module")
def artifact(program: eq.QuantizedProgram, tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    return eq.lower(program, "openvino", tmp_path_factory.mktemp("artifact") / "resnet8")


@EXACT
@pytest.mark.parametrize("target", ["openvino", ["onnxruntime", "openvino"], "portable"], ids=str)
def test_every_value_that_can_be_looked_at_is_the_references(target: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake(edge_model()), target)
    found = eq.verify(eq.lower(made, "openvino", tmp_path / "a"), made, [IMAGE, IMAGE[:1]])
    assert (found.against, found.exact_here) == ("reference:openvino/x86", True)
    assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)
    assert len(found.values) + len(found.unseen) == len(made.tapped())


@EXACT
def test_both_shapes_of_a_residual_block_are_exact(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    found = eq.verify(artifact, program, [IMAGE])
    assert (found.bit_identical, found.max_error_steps) == (1.0, 0.0)
    assert found.unseen == ("block1.conv2", "block2.shortcut", "block3.shortcut")
    assert "not looked at, as the runtime shows no integers of them: block1.conv2, block2.shortcut" in str(found)


def test_manifest_says_what_runs_and_leaves_out_what_is_never_an_integer(artifact: eq.Artifact) -> None:
    manifest = artifact.manifest
    assert (manifest["runtime"], manifest["engine"], manifest["arithmetics"]) == ("openvino", "CPU", ["openvino/x86"])
    ops = manifest["coverage"]["runtime_ops"]
    assert {name for name in ops if name.startswith("Convolution")} == {"Convolution u8"}
    assert ops["FullyConnected u8"] == 1
    assert "block1.conv2" in manifest["grids"]
    assert "block1.conv2" not in {row["value"] for row in manifest["checks"]}


def test_same_program_gives_the_same_bytes(
    artifact: eq.Artifact, program: eq.QuantizedProgram, tmp_path: Path
) -> None:
    eq.lower(program, "openvino", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(artifact.folder)


@EXACT
def test_shipped_script_needs_numpy_and_openvino_alone(artifact: eq.Artifact, tmp_path: Path) -> None:
    ended = run_python(RUN_SHIPPED, artifact.folder / "verify.py", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "100.00% of outputs bit-identical to openvino/x86 on 16 samples" in ended.out


@EXACT
def test_replay_compares_what_is_inside(artifact: eq.Artifact) -> None:
    found = replay(artifact.folder)
    assert (found.passed, found.exact_here, found.inside) == (True, True, len(artifact.manifest["checks"]))


def test_on_other_kernels_a_difference_is_no_failure(artifact: eq.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset({"avx2"}))
    assert not replay(artifact.folder).exact_here


def test_openvinos_own_format_made_of_the_file_computes_the_same(artifact: eq.Artifact, tmp_path: Path) -> None:
    core = openvino.Core()
    openvino.save_model(core.read_model(artifact.path), tmp_path / "model.xml", compress_to_fp16=False)
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    found = core.compile_model(core.read_model(tmp_path / "model.xml"), "CPU", settings)(IMAGE.numpy())[0]
    assert np.array_equal(found, artifact.run(IMAGE).numpy())


def test_a_session_counts_time_and_keeps_few_shapes(artifact: eq.Artifact) -> None:
    session = artifact.session()
    assert isinstance(session, OpenVinoSession)
    assert "Convolution" in {time.op for time in session.profile([IMAGE[:1]], 3)}
    whole = session.run([IMAGE])[0]
    parts = torch.cat([session.run([part])[0] for part in IMAGE.split([1, 2, 3])])
    assert torch.equal(parts, whole)


def test_the_fp32_twin(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shake(edge_model()).eval()
    sim = eq.prepare(model, IMAGE, "openvino", eq.QConfigMapping().set_global(None))
    twin = eq.lower(eq.convert(sim), "openvino", tmp_path / "a")
    assert twin.manifest["coverage"]["integer"] == 0
    assert twin.manifest["checks"] == []
    assert torch.allclose(twin.run(IMAGE), model(IMAGE), atol=1e-4)
    assert replay(twin.folder).passed


def test_float_islands_are_reported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(FloatMiddle())
    assert replay(eq.lower(made, "openvino", tmp_path / "a").folder).passed
    assert {"openvino has no integer mul"} & {origin.reason for origin in converted(WithConstants()).float_origins()}


def test_what_it_computes_otherwise_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(WithConstants(), "onnxruntime")
    with pytest.raises(PlanError, match="which openvino does not take; plan the model for openvino"):
        eq.lower(made, "openvino", tmp_path / "a")


def test_a_damaged_file_is_refused(program: eq.QuantizedProgram, tmp_path: Path) -> None:
    artifact = eq.lower(program, "openvino", tmp_path / "a")
    flip_byte(artifact.path)
    with pytest.raises(eq.EdgeqatError, match="sha256"):
        eq.load_artifact(artifact.folder)
    artifact.path.write_bytes(b"no model")
    with pytest.raises(InputError, match="OpenVINO refuses the model"):
        OpenVinoSession(artifact.path, "CPU", 1)


class LaterReader(nn.Module):
    """A sum whose other operand is read again behind it, so that no kernel may overwrite it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.c, self.d = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        y = x + self.c(torch.relu(self.b(x)))
        return self.d(torch.relu(y) + x)


@EXACT
def test_taps_change_no_sum(program: eq.QuantizedProgram, tmp_path: Path) -> None:
    groups = visible_groups(program)
    assert groups[1:] == [["conv1"], ["block2.conv2"], ["block3.conv2"]]  # operands of sums, each looked at alone
    torch.manual_seed(0)
    made = converted(LaterReader())
    found = eq.verify(eq.lower(made, "openvino", tmp_path / "a"), made, [IMAGE])
    assert (found.bit_identical, found.max_error_steps) == (1.0, 0.0)


@EXACT
def test_one_plan_serves_three_runtimes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake(SmallNet()), ["onnxruntime", "torchscript", "openvino"])
    for runtime in ("onnxruntime", "torchscript", "openvino"):
        assert eq.verify(eq.lower(made, runtime, tmp_path / runtime), made, [IMAGE]).bit_identical == 1.0
