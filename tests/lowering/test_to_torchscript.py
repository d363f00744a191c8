"""TorchScript artifacts: exact on every engine, the same bytes for the same program, at home in a fresh process."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import EdgeqatError, InputError, PlanError
from edgeqat.lowering import to_torchscript
from edgeqat.replay.compare import choose_engine
from edgeqat.replay.kernels import EXACT_ENGINES, arithmetic_here
from edgeqat.replay.script import replay
from edgeqat.zoo import edge_model, resnet20
from helpers import CommandLine, digests, flip_byte, run_python
from models import Branches, FloatMiddle, SmallNet, WithConstants, shake

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

EXACT = pytest.mark.skipif(
    arithmetic_here("torchscript/fbgemm") is None, reason="torch's engines are exact on x86 with AVX512-VNNI"
)

RUN_SHIPPED = """
import sys
sys.modules["edgeqat"] = sys.modules["onnxruntime"] = None
import runpy
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


def converted(model: nn.Module, target: object = "torchscript", x: object = IMAGE) -> eq.QuantizedProgram:
    sim = eq.prepare(model.eval(), x, target)  # type: ignore[arg-type]
    return eq.convert(eq.calibrate(sim, [x]))  # type: ignore[list-item]


@pytest.fixture(scope="module")
def program() -> eq.QuantizedProgram:
    torch.manual_seed(0)
    return converted(shake(edge_model()))


@pytest.fixture(scope="module")
def artifact(program: eq.QuantizedProgram, tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    return eq.lower(program, "torchscript", tmp_path_factory.mktemp("artifact") / "edge")


@EXACT
@pytest.mark.parametrize("engine", EXACT_ENGINES)
@pytest.mark.parametrize("name", ["edge", "resnet20", "small"])
def test_every_value_is_the_references(name: str, engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake({"edge": edge_model, "resnet20": resnet20, "small": SmallNet}[name]()), "portable")
    found = eq.verify(eq.lower(made, "torchscript", tmp_path / "a"), made, [IMAGE, IMAGE[:1]], engine=engine)
    assert (found.against, found.exact_here) == (f"reference:{engine}", True)
    assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)


@EXACT
def test_one_plan_serves_both_runtimes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake(SmallNet()), ["onnxruntime", "torchscript"])
    for runtime in ("onnxruntime", "torchscript"):
        assert eq.verify(eq.lower(made, runtime, tmp_path / runtime), made, [IMAGE]).bit_identical == 1.0


class Sequence1d(nn.Module):
    """Conv1d with a residual sum of 3-d values, one of them transposed, whose element counts fill no block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 7, 3, padding=1, padding_mode="circular"), nn.BatchNorm1d(7)
        self.conv2, self.bn2 = nn.Conv1d(7, 7, 2, padding="same", groups=7), nn.BatchNorm1d(7)
        self.fc = nn.Linear(7 * 13, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(x))
        z = (x + y).transpose(1, 2) + y.transpose(1, 2)
        return self.fc(z.flatten(1))


@EXACT
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("engine", EXACT_ENGINES)
def test_a_network_over_sequences_is_exact(engine: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 3, 13)
    made = converted(shake(Sequence1d()), "portable", x)
    assert made.float_origins() == []
    for runtime in ("onnxruntime", "torchscript"):
        artifact = eq.lower(made, runtime, tmp_path / runtime)
        found = eq.verify(artifact, made, [x, x[:1]], engine=engine if runtime == "torchscript" else None)
        assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)


def test_manifest_names_engine_and_arithmetics(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    manifest = artifact.manifest
    assert manifest["runtime"] == artifact.runtime == "torchscript"
    assert manifest["engine"] == manifest["arithmetics"][0] == arithmetic_here("torchscript")
    assert sorted(manifest["arithmetics"]) == sorted(EXACT_ENGINES)
    assert manifest["coverage"]["runtime_ops"]["quantized::conv2d"] == 7
    assert not any(name.startswith("aten::conv") for name in manifest["coverage"]["runtime_ops"])
    integers = sum(const.data.numel() for const in program.consts.values() if const.data is not None)
    biases = sum(op.bias.numel() for op in program.ops if op.bias is not None)
    assert manifest["payload_bytes"] == integers + 4 * biases < artifact.file_bytes


def test_same_program_gives_the_same_bytes(
    artifact: eq.Artifact, program: eq.QuantizedProgram, tmp_path: Path
) -> None:
    eq.lower(program, "torchscript", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(artifact.folder)
    with zipfile.ZipFile(artifact.path) as archive:
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            raw = archive.read(entry)
            assert b"mangle" not in raw and b"/src/" not in raw and not entry.filename.endswith(".debug_pkl")


def test_the_file_runs_in_a_fresh_process_that_knows_no_edgeqat(artifact: eq.Artifact, tmp_path: Path) -> None:
    torch.save(IMAGE, tmp_path / "x.pt")
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); sys.modules['edgeqat'] = None\n"
        "import torch; torch.backends.quantized.engine = sys.argv[2]\n"
        "y = torch.jit.load(sys.argv[1])(torch.load(sys.argv[3], weights_only=True))\n"
        "torch.save(y, sys.argv[4])"
    )
    ended = run_python(code, artifact.path, artifact.engine, tmp_path / "x.pt", tmp_path / "y.pt")
    assert ended.code == 0, ended.err
    (found,) = torch.load(tmp_path / "y.pt", weights_only=True)
    assert torch.equal(found, artifact.run(IMAGE))


@EXACT
def test_shipped_script_needs_torch_alone(artifact: eq.Artifact, tmp_path: Path) -> None:
    ended = run_python(RUN_SHIPPED, artifact.folder / "verify.py", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"verified: 100.00% of outputs bit-identical to {artifact.engine} on 16 samples")


@EXACT
def test_a_changed_weight_is_found_and_named(
    program: eq.QuantizedProgram, artifact: eq.Artifact, tmp_path: Path, command: CommandLine
) -> None:
    from dataclasses import replace

    const = program.consts["downsample_block.conv.0.weight"]
    assert const.data is not None
    data = const.data.clone()
    data[3, 1] += 1 if data[3, 1] < 0 else -1
    changed = replace(program, consts={**program.consts, const.source: replace(const, data=data)})
    other = eq.lower(changed, "torchscript", tmp_path / "other")
    golden = artifact.folder / "golden.safetensors"
    (other.folder / golden.name).write_bytes(golden.read_bytes())
    found = replay(other.folder, check=False)
    assert (found.passed, found.exact_here, found.first_difference) == (False, True, "downsample_block.conv.0")
    assert eq.verify(other, program, [IMAGE], check_hashes=False).first_difference == "downsample_block.conv.0"
    assert command("verify", other.folder, "--no-hash").code == 3
    assert "sha256" in command("verify", other.folder).refusal(2)


def test_float_twin_keeps_the_models_results(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    sim = eq.prepare(model, IMAGE, "torchscript", eq.QConfigMapping().set_global(None))
    artifact = eq.lower(eq.convert(sim), "torchscript", tmp_path / "float")
    torch.testing.assert_close(artifact.run(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-5)
    assert replay(artifact.folder).passed


@pytest.mark.parametrize("model", [FloatMiddle, WithConstants])
def test_float_islands_run_between_integers(model: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(model())
    artifact = eq.lower(made, "torchscript", tmp_path / "a")
    expected = eq.reference(made, IMAGE, "qnnpack")
    torch.testing.assert_close(artifact.session(engine="qnnpack").run([IMAGE])[0], expected, rtol=0.02, atol=0.02)


class Twice(nn.Module):
    """The same view, and a view of it, computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x))
        return torch.softmax(y.flatten(2).transpose(1, 2), -1) @ y.flatten(2).transpose(1, 2).transpose(1, 2)


@EXACT
def test_what_torch_computes_once_is_compared_under_each_of_its_names(tmp_path: Path) -> None:
    made = converted(Twice())
    artifact = eq.lower(made, "torchscript", tmp_path / "a")
    found = eq.verify(artifact, made, [IMAGE])
    assert (found.max_error_steps, found.agreement) == (0.0, 1.0)
    gridded = {value.name for value in made.values.values() if value.grid is not None}
    _, inside = artifact.session().run_with_taps([IMAGE])
    assert inside.keys() == gridded == {row["value"] for row in artifact.manifest["checks"]}
    assert replay(artifact.folder).passed


@EXACT
def test_a_file_names_the_version_of_the_ops_it_uses(tmp_path: Path) -> None:
    # aten::gelu got another argument in version 7 of torch's ops: without the record, no torch reads the file.
    made = converted(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()))
    artifact = eq.lower(made, "torchscript", tmp_path / "a")
    found = eq.verify(artifact, made, [IMAGE])
    assert (found.max_error_steps, found.agreement) == (0.0, 1.0)


def test_a_file_that_torch_cannot_load_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = converted(FloatMiddle())
    strip = to_torchscript._strip
    monkeypatch.setattr(to_torchscript, "_strip", lambda archive: strip(archive)[:-200])
    wanted = r"^the file for torchscript cannot be loaded: model\.pt cannot be read as .*; it has .* aten\.sin$"
    with pytest.raises(EdgeqatError, match=wanted):
        eq.lower(made, "torchscript", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@EXACT
def test_two_inputs_and_a_dict_of_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = {"left": IMAGE, "right": IMAGE.flip(0)}
    made = converted(Branches(), x=pair)
    artifact = eq.lower(made, "torchscript", tmp_path / "a")
    found, expected = artifact.run(pair), eq.reference(made, pair, "torchscript")
    assert set(found) == {"sum", "map"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_running_leaves_engine_and_threads_as_they_were(artifact: eq.Artifact) -> None:
    before = torch.backends.quantized.engine, torch.get_num_threads()
    for engine in EXACT_ENGINES:
        artifact.session(2, engine).run([IMAGE])
        assert (torch.backends.quantized.engine, torch.get_num_threads()) == before


# Refusals.


def test_a_program_that_was_planned_without_torchscript(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake(edge_model()), "onnxruntime")
    with pytest.raises(PlanError, match="was not planned for torchscript .*; name it among the targets of prepare"):
        eq.lower(made, "torchscript", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_conv3d_that_was_planned_for_another_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    volume = torch.randn(2, 3, 5, 5, 5)
    made = converted(nn.Sequential(nn.Conv3d(3, 4, 3)), "onnxruntime", volume)
    with pytest.raises(PlanError, match=r"not planned for torchscript \(0 is an integer conv3d\)"):
        eq.lower(made, "torchscript", tmp_path / "a")


def test_a_file_for_one_engine_may_use_all_of_its_depthwise_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake(edge_model()), "torchscript/qnnpack")
    artifact = eq.lower(made, "torchscript/qnnpack", tmp_path / "a")
    assert (artifact.manifest["engine"], artifact.manifest["arithmetics"]) == ("qnnpack", ["qnnpack"])
    const = made.consts["residual_block.conv.3.weight"]
    assert const.data is not None and int(const.data.abs().max()) == 127
    with pytest.raises(PlanError, match=r"was not planned for torchscript/fbgemm \(.* depthwise weights beyond \+-63"):
        eq.lower(made, "torchscript/fbgemm", tmp_path / "b")


def test_unknown_engine(artifact: eq.Artifact) -> None:
    with pytest.raises(InputError, match="torch here has no engine 'tpu', wanted one of "):
        artifact.session(engine="tpu")


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x05\x06" + b"\0" * 18], ids=["empty", "junk", "empty archive"])
def test_a_file_that_is_no_torchscript(artifact: eq.Artifact, tmp_path: Path, content: bytes) -> None:
    import shutil

    folder = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    (folder / "model.pt").write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as TorchScript .*; fetch the artifact again"):
        eq.load_artifact(folder, check=False).run(IMAGE)


def test_a_flipped_byte_is_refused(artifact: eq.Artifact, tmp_path: Path, command: CommandLine) -> None:
    import shutil

    folder = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    flip_byte(folder / "model.pt", 400)
    assert "model.pt has sha256" in command("verify", folder).refusal(2)


def test_an_engine_that_this_device_lacks_is_replaced_by_an_exact_one(artifact: eq.Artifact) -> None:
    supported = torch.backends.quantized.supported_engines
    assert choose_engine({**artifact.manifest, "engine": "tpu"})[0] in supported
