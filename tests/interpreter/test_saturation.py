"""Pairs of products in 16 bits: against loops that do it one by one, and against ONNX Runtime on an emulated Haswell.

A failure of the second kind means that the arithmetic written down for "onnxruntime/x86-avx2" is wrong. Zero steps.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import edgeqat as eq
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.arithmetic.saturation import saturating_pairs, saturation
from edgeqat.interpreter.run import CONVOLUTIONS, TRANSPOSED, Interpreter
from edgeqat.lowering.to_onnx import spell_model, taps_suffix
from edgeqat.op_attrs import Attrs, ConvAttrs, ConvTransposeAttrs, LinearAttrs
from edgeqat.program import Kind, QuantizedProgram
from edgeqat.zoo import edge_model, resnet20
from emulation import HASWELL, run_on_haswell
from models import shake
from programs import grid, on_grid, one_op

WITH, WITHOUT = "onnxruntime/x86", "onnxruntime/x86-avx2"

DENSE = ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), 1)


def integers(draw: torch.Generator, *shape: int) -> Tensor:
    """Two of five at the top of the grid, so that many pairs saturate."""
    found = torch.randint(0, 256, shape, generator=draw)
    return torch.where(torch.rand(shape, generator=draw) < 0.4, torch.tensor(255), found)


def pairwise(products: list[int]) -> int:
    """What saturation adds to the sum of these products."""
    pairs = [sum(products[i : i + 2]) for i in range(0, len(products), 2)]
    return sum(min(max(pair, -32768), 32767) - pair for pair in pairs)


def slow(q: Tensor, weight: Tensor, a: ConvAttrs, zero_point: int) -> Tensor:
    """`saturation` of a conv of two dimensions, one product after the other."""
    q = F.pad(q, [side for pair in reversed(a.padding) for side in pair], value=zero_point)
    outs, channels, height, width = weight.shape
    sizes = F.conv2d(q[:1].float(), weight.float(), None, a.stride, 0, a.dilation, a.groups).shape[2:]
    found = torch.zeros(len(q), outs, *sizes, dtype=torch.float64)
    for n, out, y, x in itertools.product(range(len(q)), range(outs), range(sizes[0]), range(sizes[1])):
        first = out // (outs // a.groups) * channels
        products = [
            int(q[n, first + c, y * a.stride[0] + i * a.dilation[0], x * a.stride[1] + j * a.dilation[1]])
            * int(weight[out, c, i, j])
            for i in range(height)
            for j in range(width)
            for c in range(channels)
        ]
        found[n, out, y, x] = pairwise(products)
    return found


CONVS = {
    "dense": (ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), 1), (4, 4, 2, 2)),
    "odd": (ConvAttrs((1, 1), ((0, 0), (0, 0)), (1, 1), 1), (3, 3, 3, 3)),
    "padded": (ConvAttrs((2, 1), ((1, 0), (0, 2)), (1, 1), 1), (3, 3, 3, 2)),
    "dilated": (ConvAttrs((1, 1), ((1, 1), (1, 1)), (2, 1), 1), (3, 2, 2, 3)),
    "grouped": (ConvAttrs((1, 2), ((1, 1), (1, 1)), (1, 1), 2), (6, 3, 3, 3)),
    "one channel a group": (ConvAttrs((1, 1), ((1, 1), (1, 1)), (1, 1), 3), (6, 1, 3, 3)),
}


@pytest.mark.parametrize("zero_point", [0, 77, 255])
@pytest.mark.parametrize("name", CONVS)
def test_a_conv_is_what_a_loop_computes(name: str, zero_point: int) -> None:
    attrs, shape = CONVS[name]
    draw = torch.Generator().manual_seed(len(name))
    weight = torch.randint(-127, 128, shape, generator=draw)
    q = integers(draw, 2, shape[1] * attrs.groups, 5, 5).float()
    found = saturation(q, grid(1.0, zero_point), weight.float(), attrs)
    assert found is not None and bool(found.any())
    assert torch.equal(found, slow(q, weight, attrs, zero_point))


def test_a_linear_is_what_a_loop_computes() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (5, 11), generator=draw)
    q = integers(draw, 2, 3, 11)
    found = saturation(q.float(), grid(1.0, 9), weight.float(), LinearAttrs())
    rows = [[pairwise((row * w).tolist()) for w in weight] for row in q.flatten(0, 1)]
    assert found is not None and torch.equal(found, torch.tensor(rows, dtype=torch.float64))


def test_a_depthwise_conv_never_saturates() -> None:
    attrs = ConvAttrs((1, 1), ((1, 1), (1, 1)), (1, 1), 8)
    assert saturation(torch.full((1, 8, 5, 5), 255.0), grid(1.0, 0), torch.full((8, 1, 3, 3), 127.0), attrs) is None


@pytest.mark.parametrize("qmax", [255, 127, 15])
def test_which_pairs_saturate_is_exact(qmax: int) -> None:
    """Every pair of weights, against the extremes that its inputs can reach."""
    every = torch.arange(-127, 128)
    weight = torch.cartesian_prod(every, every)
    corners = torch.tensor([[0, 0], [0, qmax], [qmax, 0], [qmax, qmax]])
    sums = weight @ corners.T
    expected = ((sums > 32767) | (sums < -32768)).any(1, keepdim=True)
    assert torch.equal(saturating_pairs(weight, LinearAttrs(), qmax), expected)
    same_sign = weight.prod(1) > 0
    assert torch.equal(expected[:, 0], same_sign & (weight.abs().sum(1) * qmax > 32767 + (weight[:, 0] < 0).long()))


def test_seven_bits_of_weights_are_the_cure() -> None:
    weight = torch.full((1, 64, 3, 3), 63)
    assert not bool(saturating_pairs(weight, DENSE, 255).any())
    assert bool(saturating_pairs(weight + 2, DENSE, 255).all())


def random_op(draw: torch.Generator, kind: str) -> tuple[QuantizedProgram, Tensor]:
    """A conv, transposed conv or linear of random sizes, and a batch for it."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    dims = 0 if kind == "linear" else 2 if kind == "transposed" else pick(1, 4)
    sizes = tuple(pick(4, 7) for _ in range(dims))
    kernel, stride, dilation = (tuple(pick(1, high) for _ in range(dims)) for high in (4, 3, 3))
    groups = pick(2, 5) if kind in ("grouped", "multiplied", "depthwise") else 1
    ins = 1 if kind in ("multiplied", "depthwise", "single") else pick(1, 20)
    outs = 1 if kind in ("depthwise", "single") else pick(2, 20)
    weight = torch.randint(-127, 128, (outs * groups, ins, *kernel), generator=draw)
    attrs: Attrs = LinearAttrs()
    empty = torch.zeros(1, ins * groups, *sizes)
    if kind == "transposed":
        attrs = ConvTransposeAttrs(stride, (1,) * dims, tuple(pick(0, step) for step in stride), dilation)
        weight = weight.transpose(0, 1)
        made = TRANSPOSED[dims](empty, weight.float(), None, stride, 1, attrs.output_padding, 1, dilation)
    elif kind != "linear":
        attrs = ConvAttrs(stride, tuple((pick(0, 3), pick(2, 4)) for _ in sizes), dilation, groups)
        padded = F.pad(empty, [side for pair in reversed(attrs.padding) for side in pair])
        made = CONVOLUTIONS[dims](padded, weight.float(), None, stride, 0, dilation, groups)
    else:
        made = torch.zeros(1, outs)
    x, spread = grid(0.5, [0, 90, 255][pick(0, 3)]), 90 * 73 * (ins * weight[0, 0].numel()) ** 0.5
    scale = torch.rand(outs * groups, generator=draw) * 0.01 + 0.01
    bias = torch.randint(-20000, 20000, (outs * groups,), generator=draw, dtype=torch.int32)
    what = {"linear": Kind.LINEAR, "transposed": Kind.CONV_TRANSPOSE}.get(kind, Kind.CONV)
    y = grid(0.5 * 0.015 * spread / 50, 128)
    program = one_op(what, attrs, [tuple(empty.shape[1:])], [x], tuple(made.shape[1:]), y, weight, scale, bias)
    if kind == "transposed":
        const = program.consts["w"]
        program = replace(program, consts={"w": replace(const, grid=replace(const.grid, axis=1))})
    return program, on_grid(x, integers(draw, 3, *empty.shape[1:]))


def spelled(program: QuantizedProgram) -> bytes:
    """The ONNX file of a program, with every value inside as an output."""
    return spell_model(program).SerializeToString() + taps_suffix(program)


@HASWELL
def test_every_op_is_what_onnx_runtime_computes_without_vnni(tmp_path: Path) -> None:
    kinds = ("dense", "grouped", "multiplied", "depthwise", "single", "linear", "transposed")
    draw = torch.Generator().manual_seed(5)
    ops = {f"{kind}{n}": random_op(draw, kind) for kind in kinds for n in range(12)}
    files = {name: (spelled(program), {"x0": batch}) for name, (program, batch) in ops.items()}
    found = run_on_haswell(files, tmp_path)
    changed = dict.fromkeys(kinds, 0)
    for name, (program, batch) in ops.items():
        (_, values), (_, others) = (
            Interpreter(program, ARITHMETICS[a]).run_with_taps([batch]) for a in (WITHOUT, WITH)
        )
        assert torch.equal(found[name]["y"].float(), values["y"]), name
        changed[name.rstrip("0123456789")] += int((values["y"] != others["y"]).sum())
    exact = {kind for kind, count in changed.items() if count == 0}
    assert exact == {"depthwise", "single"}, changed


@HASWELL
@pytest.mark.parametrize("bits", [8, 7])
def test_models_are_what_onnx_runtime_computes_without_vnni(bits: int, tmp_path: Path) -> None:
    """Every value inside; with 7 bits of weights they are those of VNNI too."""
    batch = torch.randn(6, 3, 32, 32)
    mapping = eq.QConfigMapping().set_global(eq.QConfig(weight=eq.WeightConfig(bits=bits)))
    models = {"edge": shake(edge_model()).eval(), "resnet20": shake(resnet20()).eval()}
    programs = {
        name: eq.convert(eq.calibrate(eq.prepare(model, batch, qconfig_mapping=mapping), [batch]))
        for name, model in models.items()
    }
    files = {name: (spelled(program), {program.inputs[0]: batch}) for name, program in programs.items()}
    found = run_on_haswell(files, tmp_path)
    for name, program in programs.items():
        outputs, values = eq.reference(program, batch, WITHOUT, taps=True)
        assert torch.equal(found[name][program.outputs[0]], outputs)
        for value, expected in values.items():
            assert torch.equal(found[name][value].int(), expected), (name, value)
        assert torch.equal(outputs, eq.reference(program, batch, WITH)) == (bits == 7)
