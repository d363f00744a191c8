"""ONNX Runtime's integer products, sums of other shapes, matrix products, concatenations and tables: zero steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.lookup import FUNCTIONS, fixed_grid, table_of
from edgeqat.lowering.onnx_lookup import exact_in_kernels
from edgeqat.lowering.onnx_session import optimized_ops
from edgeqat.lowering.to_onnx import spell_model
from edgeqat.op_attrs import (
    AddAttrs,
    Attrs,
    ClampAttrs,
    ConcatAttrs,
    ConvTransposeAttrs,
    ExpandAttrs,
    LinearAttrs,
    LookupAttrs,
    MatmulAttrs,
    MulAttrs,
    ResizeAttrs,
)
from edgeqat.program import Const, Grid, Kind, QuantizedProgram
from helpers import EXACT_ARITHMETIC
from onnx_kernels import check
from programs import TABLE_ARGUMENTS, grid, on_grid, one_op

pytestmark = [EXACT_ARITHMETIC, pytest.mark.usefixtures("onnx_kernels")]

SCALES = st.floats(2**-10, 0.5, width=32)
ZEROS = st.integers(0, 255)


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(SCALES, SCALES, st.floats(0.25, 4.0, width=32), ZEROS, ZEROS, ZEROS)
def test_mul_on_all_pairs_of_integers(s_a: float, s_b: float, steps: float, z_a: int, z_b: int, z_y: int) -> None:
    a, b, y = grid(s_a, z_a), grid(s_b, z_b), grid(s_a * s_b * 128 * steps, z_y)
    left = torch.arange(256).repeat_interleave(256).reshape(1, -1)
    right = torch.arange(256).repeat(256).reshape(1, -1)
    program = one_op(Kind.MUL, MulAttrs(), [(65536,), (65536,)], [a, b], (65536,), y)
    check(program, [on_grid(a, left), on_grid(b, right)], "QLinearMul")


def nudged(value: float, generator: torch.Generator) -> float:
    """Moved by up to three units in the last place of a float32."""
    steps = int(torch.randint(-3, 4, (), generator=generator))
    return float(torch.tensor(value * (1 + steps * 2.0**-23), dtype=torch.float32))


def test_products_and_concatenations_on_ties() -> None:
    """Every other product, or integer, is halfway between two results, up to some units in the last place."""
    generator = torch.Generator().manual_seed(5)
    left = torch.arange(256).repeat_interleave(256).reshape(1, -1)
    right = torch.arange(256).repeat(256).reshape(1, -1)
    for _ in range(12):
        s_a, s_b = (torch.rand(2, generator=generator) * 0.1 + 0.001).tolist()
        z_a, z_b, z_y, k = torch.randint(0, 256, (4,), generator=generator).tolist()
        a, b = grid(s_a, z_a), grid(s_b, z_b)
        product = float(a.filled()[0].double() * b.filled()[0].double())
        y = grid(nudged(product * 2 * (k + 1), generator), z_y)
        program = one_op(Kind.MUL, MulAttrs(), [(65536,), (65536,)], [a, b], (65536,), y)
        check(program, [on_grid(a, left), on_grid(b, right)], "QLinearMul")
        y = grid(nudged(float(a.filled()[0]) * 2, generator), z_y)
        program = one_op(Kind.CONCAT, ConcatAttrs(1), [(256,), (256,)], [a, b], (512,), y)
        check(program, [on_grid(item, torch.arange(256).reshape(1, -1)) for item in (a, b)], "QLinearConcat")
        y = grid(nudged(product * 2 * (k + 1) * 50, generator), z_y)
        program = one_op(Kind.MATMUL, MatmulAttrs(), [(64, 9), (9, 64)], [a, b], (64, 64), y)
        q = (torch.randint(0, 256, (8, *shape), generator=generator) for shape in ((64, 9), (9, 64)))
        check(program, [on_grid(g, x) for g, x in zip((a, b), q, strict=True)], "QLinearMatMul")


SMALLER = [(6, 1, 1), (1, 1, 33), (1, 9, 33), (1, 9, 1), (6, 9, 1)]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", SMALLER, ids=str)
@pytest.mark.parametrize(("kind", "attrs"), [(Kind.ADD, AddAttrs()), (Kind.MUL, MulAttrs())], ids=["add", "mul"])
def test_operands_of_different_shapes(kind: Kind, attrs: Attrs, shape: tuple[int, ...], swapped: bool) -> None:
    """An addend repeated along the last dimension plays the other role: else some of these are a step off."""
    generator = torch.Generator().manual_seed(2)
    for seed in range(12):
        scales = (torch.rand(2, generator=generator) * 0.1 + 0.001).tolist()
        zeros = torch.randint(0, 256, (3,), generator=generator).tolist()
        a, b = grid(scales[0], zeros[0]), grid(scales[1], zeros[1])
        top = max(scales) if kind is Kind.ADD else scales[0] * scales[1] * 128
        y = grid(top * (0.5 + seed / 8), zeros[2])
        sides = [((6, 9, 33), a, integers(seed, 5, 6, 9, 33)), (shape, b, integers(seed + 50, 5, *shape))]
        (s0, g0, q0), (s1, g1, q1) = reversed(sides) if swapped else sides
        program = one_op(kind, attrs, [s0, s1], [g0, g1], (6, 9, 33), y)
        check(program, [on_grid(g0, q0), on_grid(g1, q1)], "QLinearAdd" if kind is Kind.ADD else "QLinearMul")


@settings(max_examples=20, deadline=None)
@given(SCALES, SCALES, st.floats(0.5, 2.0, width=32), ZEROS, ZEROS, ZEROS)
def test_concat_brings_each_input_onto_the_grid(
    s_a: float, s_b: float, wider: float, z_a: int, z_b: int, z_y: int
) -> None:
    a, b, y = grid(s_a, z_a), grid(s_b, z_b), grid(max(s_a, s_b) * wider, z_y)
    program = one_op(Kind.CONCAT, ConcatAttrs(1), [(256,), (256,), (256,)], [a, b, y], (768,), y)
    every = torch.arange(256).reshape(1, -1)
    check(program, [on_grid(item, every) for item in (a, b, y)], "QLinearConcat")


MATRICES = {
    "attention": ((3, 8, 40), (3, 40, 8), (3, 8, 8)),
    "plain": ((17, 33), (33, 7), (17, 7)),
    "one row": ((1, 70), (70, 5), (1, 5)),
}


@pytest.mark.parametrize("name", MATRICES)
def test_matmul(name: str) -> None:
    left, right, result = MATRICES[name]
    for seed in range(5):
        a, b = grid(0.03 + seed * 0.01, 20 * seed), grid(0.02, 255 - 30 * seed)
        y = grid(0.03 * 0.02 * 73 * 73 * left[-1] ** 0.5 / 30, 100)
        program = one_op(Kind.MATMUL, MatmulAttrs(), [left, right], [a, b], result, y)
        q = integers(seed, 2, *left), integers(seed + 9, 2, *right)
        check(program, [on_grid(a, q[0]), on_grid(b, q[1])], "QLinearMatMul")


def lookup(function: str, x: Grid, y: Grid) -> QuantizedProgram:
    """A program that is one table."""
    attrs = LookupAttrs(function, TABLE_ARGUMENTS.get(function, ()))
    program = one_op(Kind.LOOKUP, attrs, [(256,)], [x], (256,), y)
    return replace(program, consts={"y": Const("y", table_of(attrs, x, y), y)})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_table_is_what_the_runtime_computes(function: str) -> None:
    """Whatever the kernels give: a table that they miss is written down itself."""
    forms = set()
    for seed in range(10):
        x = grid(0.011 + 0.006 * seed, 25 * seed)
        values = (torch.arange(256.0) - 25 * seed) * (0.011 + 0.006 * seed)
        results = FUNCTIONS[function].compute(values.double(), *TABLE_ARGUMENTS.get(function, ()))
        fixed = fixed_grid(function, 8)
        low, high = min(float(results.min()), 0.0), max(float(results.max()), 0.0)
        scale = (high - low) / 255
        y = Grid(0, 255, None, *fixed) if fixed is not None else grid(scale, round(-low / scale))
        program = lookup(function, x, y)
        every = torch.arange(256).reshape(1, -1)
        model = spell_model(program).SerializeToString()
        forms.add("Gather" if "Gather" in optimized_ops(model) else "kernels")
        taps = check(program, [on_grid(x, every)], "Gather" if "Gather" in optimized_ops(model) else "QuantizeLinear")
        # The table is the function rounded, and half a step is all that rounding may cost.
        real = (taps["y"] - y.filled()[1]) * y.filled()[0]
        inside = (results > float(real.min())) & (results < float(real.max()))
        error = (real.double().flatten() - results).abs()[inside]
        assert float(error.max()) <= 0.5 * float(y.filled()[0]) * (1 + 1e-4)
    assert "kernels" in forms, forms


def test_a_table_that_kernels_miss_is_gathered() -> None:
    x, y = grid(0.05, 128), Grid(0, 255, None, *fixed_grid("sigmoid", 8) or ())
    program = lookup("sigmoid", x, y)
    assert exact_in_kernels(program) == {"y"}
    data = program.consts["y"].data
    assert data is not None
    other = data.clone()
    other[200] -= 1
    changed = replace(program, consts={"y": Const("y", other, y)})
    assert exact_in_kernels(changed) == frozenset()
    check(changed, [on_grid(x, torch.arange(256).reshape(1, -1))], "Gather")


TRANSPOSED = {
    "2x2 stride 2": ConvTransposeAttrs((2, 2), (0, 0), (0, 0), (1, 1)),
    "odd": ConvTransposeAttrs((2, 2), (1, 1), (1, 1), (1, 1)),
    "cropped": ConvTransposeAttrs((3, 1), (2, 1), (0, 0), (1, 1)),
    "dilated": ConvTransposeAttrs((1, 2), (0, 3), (0, 1), (2, 2)),
    "stride beyond the kernel": ConvTransposeAttrs((4, 5), (0, 0), (2, 3), (1, 1)),
}


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose(name: str, per_channel: bool) -> None:
    attrs = TRANSPOSED[name]
    x = grid(0.031, 131)
    generator = torch.Generator().manual_seed(4)
    w = torch.randint(-127, 128, (6, 5, 3, 2), generator=generator)
    if name.startswith("2x2"):
        w = w[:, :, :2]
    scale = torch.rand(5 if per_channel else (), generator=generator) * 0.01 + 1e-3
    bias = torch.randint(-20000, 20000, (5,), generator=generator, dtype=torch.int32)
    y = grid(0.031 * 0.006 * 73 * 74 * 24**0.5 / 60, 90)
    sample = torch.nn.functional.conv_transpose2d(
        torch.zeros(1, 6, 7, 8), w.float(), None, attrs.stride, attrs.padding, attrs.output_padding, 1, attrs.dilation
    )
    program = one_op(Kind.CONV_TRANSPOSE, attrs, [(6, 7, 8)], [x], tuple(sample.shape[1:]), y, w, scale, bias)
    if per_channel:
        const = program.consts["w"]
        program = replace(program, consts={"w": replace(const, grid=replace(const.grid, axis=1))})
    values = check(program, [on_grid(x, integers(8, 3, 6, 7, 8))], "QLinearConv")
    assert len(values["y"].unique()) > 50


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 4, 7)], ids=str)
def test_linear_over_the_last_of_many_dimensions(shape: tuple[int, ...]) -> None:
    x, y = grid(0.02, 77), grid(0.05, 120)
    generator = torch.Generator().manual_seed(4)
    w = torch.randint(-127, 128, (5, 7), generator=generator)
    scale = torch.rand(5, generator=generator) * 0.01 + 1e-3
    bias = torch.randint(-2000, 2000, (5,), generator=generator, dtype=torch.int32)
    for out in (y, None):  # None: float logits straight from the accumulator
        program = one_op(Kind.LINEAR, LinearAttrs(), [shape], [x], (*shape[:-1], 5), out, w, scale, bias)
        check(program, [on_grid(x, integers(3, 6, *shape))], "QGemm")


@pytest.mark.parametrize(
    ("kind", "attrs", "shape", "result", "fused"),
    [
        (Kind.CLAMP, ClampAttrs(), (6, 5, 7), (6, 5, 7), "Clip"),
        (Kind.EXPAND, ExpandAttrs((-1, -1, 5, 7)), (6, 1, 1), (6, 5, 7), "Expand"),
        (Kind.RESIZE, ResizeAttrs((2, 3)), (6, 5, 7), (6, 10, 21), "Resize"),
        (Kind.RESIZE, ResizeAttrs((2,)), (6, 5), (6, 10), "Resize"),
    ],
    ids=["clamp", "expand", "resize", "resize 1d"],
)
def test_what_moves_integers(
    kind: Kind, attrs: Attrs, shape: tuple[int, ...], result: tuple[int, ...], fused: str
) -> None:
    x = grid(0.03, 100)
    program = one_op(kind, attrs, [shape], [x], result, x)
    values = check(program, [on_grid(x, integers(1, 4, *shape))], fused)
    assert tuple(values["y"].shape) == (4, *result)
    if kind is Kind.CLAMP:
        assert int(values["y"].min()) == 100
