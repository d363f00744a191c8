"""LiteRT artifacts: exact on both engines, of any batch, self-contained, and honest about what changed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import InputError, PlanError
from edgeqat.lookup import FUNCTIONS, fixed_grid, table_of
from edgeqat.op_attrs import (
    Attrs,
    ClampAttrs,
    ExpandAttrs,
    LookupAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import Const, Grid, Kind
from edgeqat.replay.kernels import ENGINES, arithmetic_here
from edgeqat.replay.run_litert import load_litert, model_with_taps
from edgeqat.replay.script import replay
from edgeqat.zoo import edge_model, resnet8, resnet20
from helpers import CommandLine, run_python
from interpreter.test_litert_arithmetic import check, drawn
from models import Branches, FloatMiddle, SmallNet, Tokens, shake
from programs import TABLE_ARGUMENTS, grid, on_grid, one_op

IMAGE = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))

EXACT = pytest.mark.skipif(arithmetic_here("litert/builtin") is None, reason="not known on this processor")

RUN_SHIPPED = """
import sys
sys.modules["edgeqat"] = sys.modules["torch"] = sys.modules["onnxruntime"] = None
import runpy
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


def converted(model: nn.Module, target: object = "litert", x: object = IMAGE) -> eq.QuantizedProgram:
    sim = eq.prepare(model.eval(), x, target)  # type: ignore[arg-type]
    return eq.convert(eq.calibrate(sim, [x]))  # type: ignore[list-item]


@pytest.fixture(scope="module")
def program() -> eq.QuantizedProgram:
    torch.manual_seed(0)
    return converted(shake(edge_model()))


@pytest.fixture(scope="module")
def artifact(program: eq.QuantizedProgram, tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    return eq.lower(program, "litert", tmp_path_factory.mktemp("artifact") / "edge")


@EXACT
@pytest.mark.parametrize("name", ["edge", "resnet8", "resnet20", "small"])
def test_every_value_is_the_references(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    factories = {
        "edge": edge_model,
        "resnet8": resnet8,
        "resnet20": resnet20,
        "small": SmallNet,
    }
    made = converted(shake(factories[name]()))
    assert made.float_origins() == []
    artifact = eq.lower(made, "litert", tmp_path / "a")
    for engine in ENGINES["litert"]:
        found = eq.verify(artifact, made, [IMAGE, IMAGE[:1]], engine=engine)
        assert (found.against, found.exact_here) == (f"reference:litert/{engine}", True)
        assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)


class Shuffled(nn.Module):
    """Images turned, split, shuffled and joined again: the order of dimensions in the file must not show."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1, groups=2)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(8 * 16 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(x))
        left, right = torch.chunk(y.view(-1, 2, 4, 16, 16).transpose(1, 2).reshape(-1, 8, 16, 16), 2, 1)
        y = torch.cat([right, torch.sigmoid(left)], 1) * self.gain
        y = self.conv2(y).permute(0, 3, 1, 2) + y.permute(0, 3, 1, 2)
        return self.fc2(self.fc1(y.permute(0, 2, 3, 1)).flatten(1))


@EXACT
def test_dimensions_in_another_order(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(Shuffled())
    assert made.float_origins() == []
    artifact = eq.lower(made, "litert", tmp_path / "a")
    for engine in ENGINES["litert"]:
        found = eq.verify(artifact, made, [IMAGE, IMAGE[:1]], engine=engine)
        assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)


MOVES: dict[str, tuple[Kind, Attrs, tuple[int, ...]]] = {
    "max pool": (Kind.MAX_POOL, MaxPoolAttrs((3, 3), (2, 2), (1, 1), (1, 1)), (6, 4, 4)),
    "max pool, ceil": (Kind.MAX_POOL, MaxPoolAttrs((3, 3), (2, 2), (0, 0), (1, 1), True), (6, 4, 4)),
    "max pool with gaps": (Kind.MAX_POOL, MaxPoolAttrs((3, 2), (2, 1), (1, 1), (2, 3)), (6, 3, 7)),
    "view": (Kind.VIEW, ViewAttrs((-1, 6 * 64)), (6 * 64,)),
    "permute": (Kind.PERMUTE, PermuteAttrs((0, 2, 3, 1)), (8, 8, 6)),
    "pad": (Kind.PAD, PadAttrs(((0, 0), (2, 1), (0, 3), (1, 0))), (9, 11, 9)),
    "reflect": (Kind.PAD, PadAttrs(((0, 0), (0, 0), (1, 2), (3, 1)), "reflect"), (6, 11, 12)),
    "replicate": (Kind.PAD, PadAttrs(((0, 0), (0, 0), (1, 2), (3, 1)), "replicate"), (6, 11, 12)),
    "circular": (Kind.PAD, PadAttrs(((0, 0), (0, 0), (1, 2), (3, 1)), "circular"), (6, 11, 12)),
    "slice": (Kind.SLICE, SliceAttrs(3, 1, None, 2), (6, 8, 4)),
    "slice of channels": (Kind.SLICE, SliceAttrs(1, 1, 4, 1), (3, 8, 8)),
    "clamp": (Kind.CLAMP, ClampAttrs(), (6, 8, 8)),
    "resize": (Kind.RESIZE, ResizeAttrs((2, 3)), (6, 16, 24)),
}


@pytest.mark.parametrize("engine", ENGINES["litert"])
@pytest.mark.parametrize("name", MOVES)
def test_what_moves_integers(name: str, engine: str, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(7)
    (kind, attrs, sizes), g = MOVES[name], drawn(draw)
    program = one_op(kind, attrs, [(6, 8, 8)], [g], sizes, g)
    check(program, [on_grid(g, torch.randint(0, 256, (3, 6, 8, 8), generator=draw))], engine, tmp_path)


@pytest.mark.parametrize("engine", ENGINES["litert"])
def test_expand(engine: str, tmp_path: Path) -> None:
    g = grid(0.05, 31)
    program = one_op(Kind.EXPAND, ExpandAttrs((-1, 6, 4, 8)), [(6, 1, 8)], [g], (6, 4, 8), g)
    check(program, [on_grid(g, torch.arange(6 * 8).reshape(1, 6, 1, 8))], engine, tmp_path)


@pytest.mark.parametrize("engine", ENGINES["litert"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_tables(function: str, engine: str, tmp_path: Path) -> None:
    x = grid(0.03, 110)
    attrs = LookupAttrs(function, TABLE_ARGUMENTS.get(function, ()))
    values = FUNCTIONS[function].compute((torch.arange(256.0) - 110).double() * 0.03, *attrs.arguments)
    fixed = fixed_grid(function, 8)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    y = Grid(0, 255, None, *fixed) if fixed is not None else grid((high - low) / 255, round(-low * 255 / (high - low)))
    program = one_op(Kind.LOOKUP, attrs, [(256,)], [x], (256,), y)
    program = replace(program, consts={"y": Const("y", table_of(attrs, x, y), y)})
    check(program, [on_grid(x, torch.arange(256)[None])], engine, tmp_path)


def test_manifest_names_engine_arithmetics_and_ops(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    manifest = artifact.manifest
    assert (manifest["runtime"], manifest["engine"], artifact.path.name) == ("litert", "xnnpack", "model.tflite")
    assert manifest["arithmetics"] == ["litert/xnnpack", "litert/builtin"]
    ops = manifest["coverage"]["runtime_ops"]
    assert (ops["CONV_2D"], ops["DEPTHWISE_CONV_2D"], ops["TRANSPOSE"], ops["QUANTIZE"]) == (5, 2, 1, 1)
    integers = sum(const.data.numel() for const in program.consts.values() if const.data is not None)
    assert integers < manifest["payload_bytes"] < artifact.file_bytes < 3 * integers


def test_the_same_program_gives_the_same_bytes(
    artifact: eq.Artifact, program: eq.QuantizedProgram, tmp_path: Path
) -> None:
    again = eq.lower(program, "litert", tmp_path / "again")
    for name in ("model.tflite", "manifest.json", "golden.safetensors"):
        assert (again.folder / name).read_bytes() == (artifact.folder / name).read_bytes()


def test_taps_change_four_bytes_and_add_to_the_end(artifact: eq.Artifact) -> None:
    from edgeqat.replay.folder import read_safetensors

    model = artifact.path.read_bytes()
    taps = read_safetensors(artifact.folder / "golden.safetensors")["taps"].tobytes()
    tapped = model_with_taps(model, taps)
    assert sum(a != b for a, b in zip(model, tapped, strict=False)) <= 4
    outputs = load_litert(tapped, "xnnpack", 1).get_output_details()
    assert len(outputs) > len(load_litert(model, "xnnpack", 1).get_output_details()) == 1


def test_the_file_takes_the_float_models_place(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    loaded = load_litert(artifact.path.read_bytes(), "xnnpack", 1)
    ((given,), (made,)) = loaded.get_input_details(), loaded.get_output_details()
    assert [list(given["shape_signature"]), list(made["shape_signature"])] == [[-1, 3, 32, 32], [-1, 10]]
    runner = loaded.get_signature_runner()
    (found,) = runner(**{program.inputs[0]: IMAGE[:1].numpy()}).values()
    assert torch.equal(torch.from_numpy(found), artifact.run(IMAGE[:1]))


@EXACT
def test_shipped_script_needs_the_runtime_alone(artifact: eq.Artifact, tmp_path: Path) -> None:
    ended = run_python(RUN_SHIPPED, artifact.folder / "verify.py", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("verified: 100.00% of outputs bit-identical to litert/xnnpack on 16 samples")


@EXACT
def test_a_changed_weight_is_found_and_named(
    program: eq.QuantizedProgram, artifact: eq.Artifact, tmp_path: Path, command: CommandLine
) -> None:
    const = program.consts["downsample_block.conv.0.weight"]
    assert const.data is not None
    data = const.data.clone()
    data[3, 1] += 1 if data[3, 1] < 0 else -1
    changed = replace(program, consts={**program.consts, const.source: replace(const, data=data)})
    other = eq.lower(changed, "litert", tmp_path / "other")
    golden = artifact.folder / "golden.safetensors"
    (other.folder / golden.name).write_bytes(golden.read_bytes())
    found = replay(other.folder, check=False)
    assert (found.passed, found.exact_here, found.first_difference) == (False, True, "downsample_block.conv.0")
    assert eq.verify(other, program, [IMAGE], check_hashes=False).first_difference == "downsample_block.conv.0"
    assert command("verify", other.folder, "--no-hash").code == 3


@EXACT
def test_two_inputs_and_a_dict_of_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    pair = {"left": IMAGE, "right": IMAGE.flip(0)}
    made = converted(Branches(), x=pair)
    artifact = eq.lower(made, "litert", tmp_path / "a")
    found, expected = artifact.run(pair), eq.reference(made, pair, "litert")
    assert set(found) == {"sum", "map"}
    assert all(torch.equal(found[name], expected[name]) for name in found)


@EXACT
def test_one_plan_serves_every_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    runtimes = ["onnxruntime", "torchscript", "litert"]
    made = converted(shake(SmallNet()), runtimes)
    for runtime in runtimes:
        assert eq.verify(eq.lower(made, runtime, tmp_path / runtime), made, [IMAGE]).bit_identical == 1.0


def test_float_twin_keeps_the_models_results(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    sim = eq.prepare(model, IMAGE, "litert", eq.QConfigMapping().set_global(None))
    artifact = eq.lower(eq.convert(sim), "litert", tmp_path / "float")
    torch.testing.assert_close(artifact.run(IMAGE), model(IMAGE), rtol=1e-5, atol=1e-5)
    assert replay(artifact.folder).passed


def test_float_islands_run_between_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for model, x in ((FloatMiddle(), IMAGE), (Tokens(), torch.randint(0, 10, (4, 7)))):
        made = converted(model, x=x)
        artifact = eq.lower(made, "litert", tmp_path / type(model).__name__)
        for n in (1, 3):
            expected = eq.reference(made, x[:n], "litert/xnnpack")
            torch.testing.assert_close(artifact.run(x[:n]), expected, rtol=0.02, atol=0.02)


# Refusals.


def test_a_program_that_was_planned_without_litert(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = converted(shake(edge_model()), "onnxruntime")
    with pytest.raises(PlanError, match="was not planned for litert .*; name it among the targets of prepare"):
        eq.lower(made, "litert", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_only_the_delegate_computes_exactly() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.narrow = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.narrow(self.conv(x))
            return y + y[:, :, :1]

    reasons = {row.reason for row in eq.plan(Net(), IMAGE, "litert").rows() if row.runs == "float"}
    assert "litert has no exact conv of groups of several inputs and one output" in reasons
    assert "litert adds no values of different shapes" in reasons
    assert all(row.runs == "INT8" for row in eq.plan(Net(), IMAGE, "litert/xnnpack").rows())


def test_unknown_engine(artifact: eq.Artifact) -> None:
    with pytest.raises(InputError, match="LiteRT has no engine 'tpu', wanted one of xnnpack, builtin"):
        artifact.session(engine="tpu")


@pytest.mark.parametrize("content", [b"", b"junk" * 10], ids=["empty", "junk"])
def test_a_file_that_is_no_flatbuffer(artifact: eq.Artifact, tmp_path: Path, content: bytes) -> None:
    folder = Path(shutil.copytree(artifact.folder, tmp_path / "copy"))
    (folder / "model.tflite").write_bytes(content)
    with pytest.raises(InputError, match="LiteRT refuses the model: .*; fetch the artifact again"):
        eq.load_artifact(folder, check=False).run(IMAGE)
