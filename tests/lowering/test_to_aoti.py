"""AOTInductor packages: exact, for any batch, honest about where they run. Compiling takes seconds: few are made."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

import edgeqat as eq
from edgeqat.errors import InputError, MissingRuntimeError, PlanError
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.aoti_network import Network
from edgeqat.lowering.aoti_session import AotiSession
from edgeqat.lowering.to_aoti import spell
from edgeqat.machine import cpp_compiler
from edgeqat.op_attrs import AveragePoolAttrs, ConvAttrs, ConvTransposeAttrs, LinearAttrs, MatmulAttrs
from edgeqat.program import Kind, QuantizedProgram
from edgeqat.replay import kernels, run_aoti
from edgeqat.replay.script import replay
from helpers import flip_byte, run_python
from models import shake
from op_cases import (
    Case,
    accumulators_of_full_range,
    average_pools,
    concatenations,
    convs_and_linear_layers,
    drawn,
    halved,
    integer,
    integers,
    merged,
    moves,
    quantizations,
    sums_and_products,
    tables,
    weighted,
)
from programs import one_op

IMAGE = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0))

EXACT = pytest.mark.skipif(
    kernels.arithmetic_here("aoti") is None, reason="oneDNN's kernels are known on x86 with AVX512-VNNI"
)
COMPILED = pytest.mark.skipif(cpp_compiler() is None, reason="AOTInductor needs a C++ compiler")

RUN_SHIPPED = """
import sys
sys.modules["edgeqat"] = sys.modules["torch._inductor"] = sys.modules["onnx"] = sys.modules["onnxruntime"] = None
import runpy
path = sys.argv.pop(1)
sys.argv[0] = path
runpy.run_path(path, run_name="__main__")
"""


@pytest.fixture
def draw() -> Generator:
    return Generator().manual_seed(7)


def square(*padding: int) -> ConvAttrs:
    return ConvAttrs((1,) * len(padding), tuple((p, p) for p in padding), (1,) * len(padding), 1)


ODD_LAYERS = [
    (Kind.CONV, square(1, 0, 1), (4, 5, 6, 7), (9, 5, 4, 7), (9, 4, 3, 3, 3), 9),
    (Kind.CONV, ConvAttrs((1,) * 3, ((1, 1),) * 3, (1,) * 3, 6), (6, 5, 6, 7), (6, 5, 6, 7), (6, 1, 3, 3, 3), 6),
    (Kind.CONV, square(1, 0, 1), (1, 5, 6, 7), (9, 5, 4, 7), (9, 1, 3, 3, 3), 9),
    (Kind.CONV, square(0, 0), (70, 5, 6), (130, 5, 6), (130, 70, 1, 1), 130),
    (Kind.CONV, square(1), (1, 9), (8, 9), (8, 1, 3), 8),
    (Kind.CONV, square(0), (3, 1), (6, 1), (6, 3, 1), 6),
    (Kind.CONV, square(0, 0), (16, 1, 1), (40, 1, 1), (40, 16, 1, 1), 40),
    (Kind.CONV, square(1, 1), (16, 1, 1), (40, 2, 2), (40, 16, 2, 2), 40),
    (Kind.CONV, square(1, 1), (16, 1, 9), (40, 1, 9), (40, 16, 3, 3), 40),
    (Kind.CONV, square(1, 1), (1, 9, 9), (1, 9, 9), (1, 1, 3, 3), 1),
    (Kind.CONV_TRANSPOSE, ConvTransposeAttrs((2, 1), (1, 1), (1, 0), (1, 1)), (4, 3, 4), (5, 6, 4), (4, 5, 3, 3), 5),
]
"""Shapes whose orders of memory coincide, and 3-d ones."""


def odd_layers(draw: Generator) -> list[Case]:
    return [weighted(*layer, draw, bias) for layer in ODD_LAYERS for bias in (True, False)]


def pools_onto_another_grid(draw: Generator) -> list[Case]:
    cases: list[Case] = []
    windows = AveragePoolAttrs((3, 3), (1, 1), (1, 1), False), AveragePoolAttrs((4, 2), (2, 1), (1, 0), False)
    for attrs, result in zip(windows, ((5, 8, 12), (5, 4, 11)), strict=True):
        for factor in (1 / 12, 1 / 3):
            x = drawn(draw)
            y = halved([x], factor, draw)
            program = one_op(Kind.AVERAGE_POOL, attrs, [(5, 8, 12)], [x], result, y)
            cases.append((program, [integers(x, (5, 8, 12), draw)]))
    for factor in (1 / 7, 1 / 64, 1 / 9):
        x = drawn(draw)
        program = one_op(
            Kind.AVERAGE_POOL, AveragePoolAttrs(), [(67, 8, 8)], [x], (67, 1, 1), halved([x], factor, draw)
        )
        cases.append((program, [integers(x, (67, 8, 8), draw)]))
    return cases


def matmuls(draw: Generator) -> list[Case]:
    """The last are sums beyond what float32 holds."""
    cases: list[Case] = []
    for k in (5, 40, 300):
        a, b = drawn(draw), drawn(draw)
        y = halved([a, b], 2.0 * integer(draw, 1, 200) * 8 * k**0.5, draw)
        shapes = [(3, 7, k), (3, k, 9)]
        program = one_op(Kind.MATMUL, MatmulAttrs(), shapes, [a, b], (3, 7, 9), y)
        cases.append((program, [integers(g, shape, draw) for g, shape in zip((a, b), shapes, strict=True)]))
    return cases


def float_logits(draw: Generator) -> list[Case]:
    cases: list[Case] = []
    for bias in (True, False):
        program, inputs = weighted(Kind.LINEAR, LinearAttrs(), (40,), (130,), (130, 40), 130, draw, bias)
        const, op = program.consts["w"], program.ops[1]
        x = program.grid_of("x0.q")
        last = one_op(
            Kind.LINEAR, LinearAttrs(), [(40,)], [x], (130,), None, const.data, const.grid.filled()[0], op.bias
        )
        cases.append((last, inputs))
    return cases


def everything(draw: Generator) -> list[Case]:
    sums = [case for kind in (Kind.ADD, Kind.MUL) for case in sums_and_products(kind, draw)]
    layers = convs_and_linear_layers(draw) + accumulators_of_full_range(draw) + odd_layers(draw) + float_logits(draw)
    pools = average_pools(draw) + pools_onto_another_grid(draw)
    return [*quantizations(draw), *layers, *sums, *concatenations(draw), *pools, *matmuls(draw), *moves(draw)]


def wrong(cases: list[Case], found: list[Tensor], program: QuantizedProgram, inputs: list[Tensor]) -> dict[str, int]:
    """By kind: outputs that are not the reference's."""
    expected = pytree.tree_leaves(Interpreter(program, ARITHMETICS["aoti"]).run(inputs))
    differ = [int((a != b).sum()) for a, b in zip(found, expected, strict=True)]
    return {
        f"{i}: {case.ops[-2].kind.value}": n for i, ((case, _), n) in enumerate(zip(cases, differ, strict=True)) if n
    }


@EXACT
def test_what_a_package_is_made_of_is_the_reference_on_ties(draw: Generator) -> None:
    cases = everything(draw) + tables(draw)
    for case, inputs in cases:
        with torch.no_grad():
            found = Network(case)(*inputs)
        assert wrong([(case, inputs)], list(found), case, inputs) == {}


@EXACT
@COMPILED
def test_compiled_it_computes_the_same_for_any_batch(draw: Generator, tmp_path: Path) -> None:
    """A few of what was drawn above: each compiled loop takes the compiler half a second."""
    every = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 20
    odd = odd_layers(draw)[4:16:4]  # those whose orders of memory coincide
    joins = [concatenations(draw)[0], *(sums_and_products(kind, draw)[2] for kind in (Kind.ADD, Kind.MUL))]
    cases = [*odd, *joins, matmuls(draw)[1], tables(draw)[0], *moves(draw)[:20:9], *everything(draw)[5::every]]
    program = merged([case for case, _ in cases])
    given = [tensor for _, inputs in cases for tensor in inputs]
    path = tmp_path / "model.pt2"
    path.write_bytes(spell(program, None).data)
    session = AotiSession(path, 1)
    for n in (1, 2, 3):
        inputs = [tensor[torch.arange(n) % len(tensor)] for tensor in given]
        assert wrong(cases, session.run(inputs), program, inputs) == {}


class Gray(nn.Module):
    """One channel in; sums, a shortcut, a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.fc(torch.relu(x + self.second(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return shake(Gray()).eval()


@pytest.fixture(scope="module")
def program(model: nn.Module) -> QuantizedProgram:
    return eq.convert(eq.calibrate(eq.prepare(model, IMAGE, "aoti"), [IMAGE]))


@pytest.fixture(scope="module")
def artifact(program: QuantizedProgram, tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    if cpp_compiler() is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    return eq.lower(program, "aoti", tmp_path_factory.mktemp("artifact") / "gray")


@EXACT
def test_every_logit_is_the_references(artifact: eq.Artifact, program: QuantizedProgram) -> None:
    found = eq.verify(artifact, program, [IMAGE, IMAGE[:1], torch.cat([IMAGE] * 3)])
    assert (found.against, found.exact_here, found.bit_identical) == ("reference:aoti", True, 1.0)
    assert found.unseen == tuple(program.tapped())
    assert replay(artifact.folder).passed
    with_threads = artifact.session(threads=2).run([IMAGE])[0]
    assert torch.equal(with_threads, artifact.run(IMAGE))


def test_the_manifest_counts_kernels_and_the_package_holds_no_sources(artifact: eq.Artifact) -> None:
    manifest = artifact.manifest
    assert (manifest["runtime"], manifest["engine"], manifest["checks"]) == ("aoti", "inductor", [])
    ops = manifest["coverage"]["runtime_ops"]
    assert (ops["qconv_pointwise_tensor"], ops["qlinear_pointwise_tensor"]) == (2, 1)
    with zipfile.ZipFile(artifact.path) as package:
        assert not [name for name in package.namelist() if name.endswith(".cpp")]
        (library,) = (package.read(name) for name in package.namelist() if name.endswith(".so"))
    assert str(Path(torch.__file__).parent).encode() not in library
    assert artifact.session().profile([IMAGE], 1) == ()


@EXACT
def test_shipped_script_needs_numpy_and_torch_alone(artifact: eq.Artifact, tmp_path: Path) -> None:
    ended = run_python(RUN_SHIPPED, artifact.folder / "verify.py", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert "100.00% of outputs bit-identical to aoti on 16 samples" in ended.out


def test_on_other_processors_it_is_not_loaded(artifact: eq.Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_aoti, "cpu_flags", lambda: frozenset({"sse2"}))
    with pytest.raises(InputError, match="was compiled for a processor with .*; lower it on this one"):
        AotiSession(artifact.path, 1)


def test_damaged_packages_are_refused(artifact: eq.Artifact, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"no package")
    with pytest.raises(InputError, match="cannot be read as an AOTInductor package"):
        AotiSession(path, 1)
    with zipfile.ZipFile(path, "w") as package:
        package.writestr("model/data/aotinductor/model/x.wrapper_metadata.json", json.dumps({"AOTI_CPU_ISA": ""}))
    with pytest.raises(InputError, match="cannot be read as an AOTInductor package"):
        AotiSession(path, 1)
    for name in ("model.pt2", "manifest.json", "golden.safetensors", "verify.py"):
        (tmp_path / name).write_bytes((artifact.folder / name).read_bytes())
    flip_byte(path)
    with pytest.raises(eq.EdgeqatError, match="sha256"):
        eq.load_artifact(tmp_path)


@COMPILED
def test_the_fp32_twin_and_float_islands(model: nn.Module, tmp_path: Path) -> None:
    """Two in one: a network whose middle is float, beside the network in float."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.first, self.last = model, nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.plain(x), self.last(torch.sin(self.first(x)) * 2.0)

    torch.manual_seed(0)
    both = Both().eval()
    qconfig = eq.QConfigMapping().set_module_name("plain", None)
    made = eq.convert(eq.calibrate(eq.prepare(both, IMAGE, "aoti", qconfig), [IMAGE]))
    artifact = eq.lower(made, "aoti", tmp_path / "a")
    assert torch.allclose(artifact.run(IMAGE)[0], model(IMAGE), atol=1e-5)
    assert replay(artifact.folder).passed
    parity = eq.verify(artifact, made, [IMAGE, IMAGE[:1]])
    assert parity.agreement == 1.0


def test_without_a_compiler_nothing_is_written(
    program: QuantizedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(MissingRuntimeError, match=r"no C\+\+ compiler was found\); install g\+\+"):
        eq.lower(program, "aoti", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_images_of_any_size_are_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1)).eval()
    sim = eq.prepare(net, IMAGE, "onnxruntime", dynamic_size=True)
    made = eq.convert(eq.calibrate(sim, [IMAGE]))
    if cpp_compiler() is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    with pytest.raises(PlanError, match="has a dynamic height and width"):
        eq.lower(made, "aoti", tmp_path / "a")
