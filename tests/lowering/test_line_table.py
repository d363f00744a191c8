"""Tables that lie on a line, in the kernels of XNNPACK and LiteRT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.lookup import table_of
from edgeqat.lowering import to_executorch, to_litert, to_onnx
from edgeqat.lowering.executorch_session import ExecutorchSession
from edgeqat.lowering.line_table import as_image, line_of
from edgeqat.lowering.litert_session import LiteRTSession
from edgeqat.lowering.onnx_lookup import exact_in_kernels, lines
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import BATCH_DIM, Const, Grid, Kind, QuantizedProgram
from edgeqat.replay.kernels import ENGINES, arithmetic_here
from programs import grid, on_grid, one_op, own_grid

HARD_SIGMOID = own_grid("hardsigmoid")
SHAPES = ((), (7,), (509,), (5, 3), (3, 4, 5), (300, 1, 2), (2, 3, 2, 3))
LITERT = [
    pytest.param(
        engine, marks=pytest.mark.skipif(arithmetic_here(f"litert/{engine}") is None, reason="not known here")
    )
    for engine in ENGINES["litert"]
]

scales = st.floats(0.002, 0.3)
zeros = st.integers(0, 255)
numbers = st.floats(-5, 5)


def looked_up(
    function: str, arguments: tuple[float, ...], x: Grid, y: Grid, shape: tuple[int, ...] = (256,)
) -> QuantizedProgram:
    attrs = LookupAttrs(function, arguments)
    program = one_op(Kind.LOOKUP, attrs, [shape], [x], shape, y)
    return replace(program, consts={"y": Const("y", table_of(attrs, x, y), y)})


def of_shape(shape: tuple[int, ...]) -> QuantizedProgram:
    return looked_up("hardsigmoid", (), grid(0.03, 110), HARD_SIGMOID, shape)


@given(scales, zeros, scales, zeros, numbers, st.sampled_from(["shift", "subtract_from", "scale", "hardsigmoid"]))
def test_a_line_gives_the_whole_table(s_x: float, z_x: int, s_y: float, z_y: int, number: float, name: str) -> None:
    fixed = name == "hardsigmoid"
    y = HARD_SIGMOID if fixed else grid(s_y, z_y)
    program = looked_up(name, () if fixed else (number,), grid(s_x, z_x), y)
    op = program.ops[1]
    line = line_of(program, op, ("xnnpack",))
    assume(line is not None)
    assert line is not None
    assert abs(line.weight) <= 127
    s, _ = y.filled()
    x_scale, _ = program.grid_of("x0.q").filled()
    accumulated = torch.tensor([line.weight * (q - z_x) + line.bias for q in range(256)], dtype=torch.float32)
    steps = torch.round(accumulated * ((x_scale * torch.tensor(line.scale)) / s)) + y.filled()[1]
    assert torch.equal(steps.clamp(0, 255).to(torch.uint8), program.consts["y"].data)


def test_nearly_every_hard_sigmoid_has_one() -> None:
    draw = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(40):
        x = grid(float(torch.rand((), generator=draw)) * 0.2 + 0.004, int(torch.randint(256, (), generator=draw)))
        program = looked_up("hardsigmoid", (), x, HARD_SIGMOID)
        found += line_of(program, program.ops[1], ("xnnpack",)) is not None
    assert found >= 38


@pytest.mark.parametrize(("function", "arguments"), [("sigmoid", ()), ("scale", (0.0,)), ("leaky_relu", (0.1,))])
def test_what_is_no_line_has_none(function: str, arguments: tuple[float, ...]) -> None:
    program = looked_up(function, arguments, grid(0.03, 110), grid(0.01, 3))
    assert line_of(program, program.ops[1], ("xnnpack",)) is None


@pytest.mark.parametrize("factor", [1e-60, 1e-12, 1e6, 1e60])
def test_what_xnnpack_refuses_to_load_is_no_line(factor: float) -> None:
    program = looked_up("scale", (factor,), grid(0.03, 110), grid(0.03, 110))
    assert line_of(program, program.ops[1], ("xnnpack",)) is None


def test_a_table_with_one_other_entry_has_none() -> None:
    program = of_shape((256,))
    assert line_of(program, program.ops[1], ("xnnpack", "litert/builtin")) is not None
    const = program.consts["y"]
    assert const.data is not None
    data = const.data.clone()
    data[100] += 1
    changed = replace(program, consts={"y": replace(const, data=data)})
    assert line_of(changed, changed.ops[1], ("xnnpack",)) is None


@pytest.mark.skipif(arithmetic_here("executorch") is None, reason="XNNPACK's kernels are tried on x86")
@pytest.mark.parametrize("shape", SHAPES)
def test_executorch_runs_it_in_the_delegate(shape: tuple[int, ...], tmp_path: Path) -> None:
    program = of_shape(shape)
    spelling = to_executorch.spell(program, None)
    assert spelling.runtime_ops["DepthwiseConv2d"] == spelling.runtime_ops["executorch_call_delegate"] == 1
    path = tmp_path / spelling.file_name
    path.write_bytes(spelling.data)
    check(program, ExecutorchSession(path, "xnnpack", 1, spelling.taps), shape)


@pytest.mark.parametrize("engine", LITERT)
@pytest.mark.parametrize("shape", SHAPES)
def test_litert_runs_it_as_a_convolution(engine: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    program = of_shape(shape)
    spelling = to_litert.spell(program, None)
    assert spelling.runtime_ops["DEPTHWISE_CONV_2D"] == 1 and not spelling.runtime_ops["GATHER"]
    assert spelling.arithmetics == ("litert/xnnpack", "litert/builtin")
    path = tmp_path / spelling.file_name
    path.write_bytes(spelling.data)
    check(program, LiteRTSession(path, engine, 1, spelling.taps), shape)


class Placed(nn.Module):
    """A line with the batch elsewhere, as sequence-first networks have it."""

    def __init__(self, there: tuple[int, ...], back: tuple[int, ...]) -> None:
        super().__init__()
        self.there, self.back, self.first = there, back, nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(self.first(x).permute(self.there)).permute(self.back)


@pytest.mark.skipif(arithmetic_here("litert/builtin") is None, reason="not known on this processor")
@pytest.mark.parametrize("runtime", ["onnxruntime", "litert"])
@pytest.mark.parametrize(
    ("sizes", "there", "back"),
    [((7, 6), (1, 0, 2), (1, 0, 2)), ((6,), (1, 0), (1, 0)), ((3, 5, 6), (1, 2, 3, 0), (3, 0, 1, 2))],
)
def test_the_batch_in_another_place(
    runtime: str, sizes: tuple[int, ...], there: tuple[int, ...], back: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, *sizes)
    program = eq.convert(eq.calibrate(eq.prepare(Placed(there, back).eval(), images, runtime), [images]))
    artifact = eq.lower(program, runtime, tmp_path / "placed")
    for batch in (images, images[:3]):
        found = eq.verify(artifact, program, [batch])
        assert (found.bit_identical, found.first_difference) == (1.0, None)


@pytest.mark.parametrize("shape", [(BATCH_DIM, "height", 4, 4), (5, BATCH_DIM, 4, 4)])
def test_onnx_runtime_wants_channels_whose_number_is_known(shape: tuple[int | str, ...]) -> None:
    program = of_shape((5, 4, 4))
    values = {**program.values, "y": replace(program.values["y"], shape=shape)}
    assert set(lines(program, frozenset())) == {"y"}
    assert not lines(replace(program, values=values), frozenset())


def test_what_is_long_is_no_larger_for_it() -> None:
    """A weight, a bias and their scales are stored for a few channels, not for each element."""
    for spell in (to_litert.spell, to_executorch.spell):
        short, long = (len(spell(of_shape(shape), None).data) for shape in ((256,), (8, 16_000)))
        assert long < short + 1000


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((BATCH_DIM, 7, 5, 24), (7, 5, 24)),
        ((BATCH_DIM, 7, 5, 960), (1, 140, 240)),
        ((BATCH_DIM, 8, 16_000), (1, 500, 256)),
        ((BATCH_DIM, 509), (1, 509, 1)),
        ((BATCH_DIM,), (1, 1, 1)),
        ((3, BATCH_DIM, 5, 24), None),
        ((BATCH_DIM, 8, "height", 24), None),
    ],
)
def test_as_an_image(shape: tuple[int | str, ...], image: tuple[int, int, int] | None) -> None:
    assert as_image(shape) == image


def check(program: QuantizedProgram, session: ExecutorchSession | LiteRTSession, shape: tuple[int, ...]) -> None:
    """Every integer, in batches of several sizes."""
    x, table = program.grid_of("x0.q"), program.consts["y"].data
    assert table is not None
    n = int(torch.tensor(shape).prod())
    for batch in (1, -(-256 // n)):
        q = torch.arange(batch * n) % 256
        outputs, values = session.run_with_taps([on_grid(x, q).reshape(batch, *shape)])
        assert torch.equal(values["y"].flatten(), table[q])
        assert outputs[0].shape == (batch, *shape)


def test_onnx_runtime_runs_it_where_its_own_kernels_differ_in_an_entry() -> None:
    draw, shape = torch.Generator().manual_seed(1), (5, 7, 8)
    for _ in range(200):
        x = grid(float(torch.rand((), generator=draw)) * 0.2 + 0.004, int(torch.randint(256, (), generator=draw)))
        program = looked_up("hardsigmoid", (), x, HARD_SIGMOID, shape)
        if lines(program, exact_in_kernels(program)):
            break
    else:
        pytest.fail("each of 200 tables is what the kernels give")
    spelling = to_onnx.spell(program, None)
    assert spelling.runtime_ops["QLinearConv"] == 1 and not spelling.runtime_ops["Gather"]
    q, table = torch.arange(280) % 256, program.consts["y"].data
    assert table is not None
    (found,) = OnnxSession(spelling.data).run([on_grid(x, q).reshape(1, *shape)])
    assert torch.equal(found.flatten(), on_grid(HARD_SIGMOID, table[q]))
