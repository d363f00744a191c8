"""What may go wrong on other processors and runtimes, from the numbers of a program; and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.affine import BIAS_LIMIT
from edgeqat.errors import DataError, PlanError
from edgeqat.op_attrs import AddAttrs, ConcatAttrs, LinearAttrs, MulAttrs
from edgeqat.program import Grid, Kind, QuantizedProgram
from models import SmallNet, shake
from programs import grid, one_op

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BYTES = grid(0.02, 128)


def converted(bits: int = 8) -> QuantizedProgram:
    mapping = eq.QConfigMapping().set_global(eq.QConfig(weight=eq.WeightConfig(bits=bits)))
    sim = eq.prepare(shake(SmallNet()).eval(), IMAGES, qconfig_mapping=mapping)
    return eq.convert(eq.calibrate(sim, [IMAGES]))


def linear(
    weight: Tensor, x: Grid = BYTES, y: Grid | None = BYTES, scale: float = 0.01, bias: list[int] | None = None
) -> QuantizedProgram:
    outs, ins = weight.shape
    integers = None if bias is None else torch.tensor(bias, dtype=torch.int32)
    scales = torch.full((outs,), scale)
    return one_op(Kind.LINEAR, LinearAttrs(), [(ins,)], [x], (outs,), y, weight, scales, integers)


def kinds(program: QuantizedProgram, runtime: str | None = None) -> list[tuple[str, str, float, float]]:
    return [(h.kind, h.op, h.found, h.limit) for h in eq.hazards(program, runtime)]


def test_a_pair_that_can_saturate_is_found_by_channel() -> None:
    weight = torch.tensor([[64, 64, 0, 0], [65, 64, 0, 0], [0, 65, 64, 0], [-64, -65, 0, 0], [127, -127, 127, 0]])
    assert kinds(linear(weight)) == [("saturation", "y", 0.4, 0.0)]


def test_what_an_input_reaches_counts() -> None:
    """129 * (127 + 127) fits 16 bits, and so do inputs of 7 bits."""
    weight = torch.full((1, 2), 127)
    assert kinds(linear(weight, x=grid(0.02, 0, qmax=129))) == []
    assert kinds(linear(weight, x=grid(0.02, 0, qmax=130))) == [("saturation", "y", 1.0, 0.0)]


def test_only_what_concerns_a_runtime_is_told() -> None:
    program = linear(torch.full((1, 2), 127), y=grid(1e-7, 128))
    ratio = float(torch.tensor(0.02) * torch.tensor(0.01) / torch.tensor(1e-7))
    saturation, outside = ("saturation", "y", 1.0, 0.0), ("range", "y", ratio, 256.0)
    assert kinds(program) == [saturation, outside]
    assert kinds(program, "onnxruntime") == kinds(program, "torchscript") == [saturation]
    assert kinds(program, "torchscript/qnnpack") == []
    assert kinds(program, "executorch") == kinds(program, "litert") == [outside]


@pytest.mark.parametrize(("bias", "found"), [(BIAS_LIMIT, False), (-BIAS_LIMIT - 1, True)])
def test_a_bias_beyond_half_of_int32(bias: int, found: bool) -> None:
    told = [h for h in eq.hazards(linear(torch.ones(1, 2), bias=[bias])) if h.kind == "bias"]
    assert [h.found for h in told] == ([float(-bias)] if found else [])


def test_sums_beyond_float32_and_beyond_int32() -> None:
    ones = torch.ones(1, 2)
    at_zero = grid(0.02, 0)
    assert kinds(linear(ones, x=at_zero, bias=[2**24 - 510])) == []
    assert kinds(linear(ones, x=at_zero, bias=[2**24 - 509])) == [("rounding", "y", 2.0**24 + 1, 2.0**24)]
    beyond = eq.hazards(linear(ones, x=at_zero, bias=[2**31 - 1]))
    assert [h.kind for h in beyond] == ["bias", "overflow"]
    assert beyond[1].found == 2.0**31 + 509


@pytest.mark.parametrize("factor", [1.0, 0.999], ids=["inside", "outside"])
@pytest.mark.parametrize(
    ("kind", "attrs", "limits"),
    [
        (Kind.ADD, AddAttrs(), (2.0**-10, 2.0**8)),
        (Kind.CONCAT, ConcatAttrs(1), (2.0**-16, 2.0**8)),
        (Kind.MUL, MulAttrs(), (2.0**-16, 2.0**8)),
    ],
    ids=lambda x: x.value if isinstance(x, Kind) else "",
)
def test_ratios_that_xnnpack_refuses(kind: Kind, attrs: Any, limits: tuple[float, float], factor: float) -> None:
    """The lower limit is allowed itself, the upper one is not; of a sum the larger input counts."""

    def ratios(of_inputs: float) -> list[tuple[float, float]]:
        grids = [grid(of_inputs, 0), grid(of_inputs / 2 if kind is Kind.ADD else 1.0, 0)]
        program = one_op(kind, attrs, [(4, 4, 4)] * 2, grids, (4, 4, 4), grid(1.0, 0))
        return [(h.found, h.limit) for h in eq.hazards(program, "executorch")]

    low, high = limits
    small, large = (float(torch.tensor(limit * factor)) for limit in limits)
    assert ratios(small) == ([] if factor == 1.0 else [(small, low)])
    assert ratios(large) == ([(large, high)] if factor == 1.0 else [])


def test_scales_that_are_no_normal_float32() -> None:
    weight = torch.ones(1, 2)
    assert kinds(linear(weight, x=grid(1e-30, 0), scale=1e-10), "onnxruntime")[0][:2] == ("scale", "y")
    assert kinds(linear(weight, x=grid(1e-30, 0), scale=1e-30), "onnxruntime")[0][2] == 0.0
    assert kinds(linear(weight, x=grid(1e-20, 0), y=grid(1e-20, 0), scale=1e-10), "onnxruntime") == []
    tiny = eq.hazards(linear(weight, x=grid(1e-40, 0)), "onnxruntime")
    assert [(h.kind, h.op) for h in tiny] == [("scale", "x0.q"), ("scale", "y")]


def test_seven_bits_of_weights_have_no_hazard_on_x86() -> None:
    assert {h.kind for h in eq.hazards(converted(8), "onnxruntime")} == {"saturation"}
    assert eq.hazards(converted(7), "onnxruntime") == []


def test_a_manifest_lists_them(tmp_path: Any) -> None:
    program = converted()
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    assert manifest["hazards"] == [asdict(h) for h in eq.hazards(program, "onnxruntime")] != []
    assert manifest["golden"] == {
        "onnxruntime/x86": "onnxruntime/x86",
        "onnxruntime/x86-avx2": "onnxruntime/x86-avx2",
        "onnxruntime/arm64": "onnxruntime/x86",  # there is no addition
    }
    artifact = eq.lower(converted(7), "onnxruntime", tmp_path / "b")
    assert artifact.manifest["hazards"] == []
    assert artifact.manifest["golden"]["onnxruntime/x86-avx2"] == "onnxruntime/x86"


def test_one_line_of_a_hazard() -> None:
    (found,) = eq.hazards(linear(torch.full((1, 2), 127)))
    assert found.describe() == (
        "y: saturation (x86 without VNNI), 1 against 0; 7 bits of weights (bits: 7) cannot saturate"
    )


# What saturation costs.


def test_the_cost_is_what_the_two_references_say() -> None:
    program, targets = converted(), torch.arange(16) % 10
    batches = [(IMAGES[:9], targets[:9]), (IMAGES[9:], targets[9:])]
    found = eq.saturation_cost(program, batches, "top1")
    with_vnni, values = eq.reference(program, IMAGES, "onnxruntime/x86", taps=True)
    without, others = eq.reference(program, IMAGES, "onnxruntime/x86-avx2", taps=True)
    assert found.n == 16
    assert found.outputs == pytest.approx(float((with_vnni != without).double().mean()))
    assert found.agreement == float((with_vnni.argmax(1) == without.argmax(1)).double().mean())
    assert found.values == {name: float((values[name] != others[name]).double().mean()) for name in values}
    assert found.vnni == float((with_vnni.argmax(1) == targets).double().mean())
    assert found.without == float((without.argmax(1) == targets).double().mean())
    assert found.drop is not None and found.drop.value == pytest.approx(found.vnni - found.without)
    assert any(found.values.values())


def test_without_a_hazard_there_is_no_cost() -> None:
    found = eq.saturation_cost(converted(7), [IMAGES])
    assert (found.outputs, found.agreement, found.vnni, found.without, found.drop) == (0.0, 1.0, None, None, None)
    assert not any(found.values.values())


def test_no_batches_are_refused() -> None:
    with pytest.raises(DataError, match="found no batches"):
        eq.saturation_cost(converted(), [])


# Biases at convert.


class LargeBias(nn.Module):
    """Channels whose bias is enormous against their weights and input."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        with torch.no_grad():
            assert self.conv.bias is not None
            self.conv.weight.mul_(1e-6)
            self.conv.bias[:2] = torch.tensor([bias, -bias])

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


@pytest.mark.parametrize("per_channel", [True, False], ids=["per-channel", "per-tensor"])
@pytest.mark.parametrize("bias", [1e3, 1e6, 1e30])
def test_a_bias_that_would_not_fit_raises_the_scale_of_its_weights(bias: float, per_channel: bool) -> None:
    mapping = eq.QConfigMapping().set_global(eq.QConfig(weight=eq.WeightConfig(per_channel=per_channel)))
    sim = eq.calibrate(eq.prepare(LargeBias(bias).eval(), IMAGES, qconfig_mapping=mapping), [IMAGES])
    program = eq.convert(sim)
    (op,) = (op for op in program.ops if op.kind is Kind.CONV)
    assert op.bias is not None and op.weight is not None
    assert 2**29 < int(op.bias[0]) <= BIAS_LIMIT and -int(op.bias[1]) == int(op.bias[0])
    (s_x, _), (s_w, _) = program.grid_of(op.inputs[0]).filled(), program.consts[op.weight].grid.filled()
    real = op.bias.double() * s_x * s_w
    assert torch.allclose(real[:2], torch.tensor([bias, -bias], dtype=torch.float64), rtol=1e-6)
    assert not [h for h in eq.hazards(program) if h.kind in ("bias", "overflow")]


def test_a_bias_that_grew_beyond_int32_is_refused_by_name() -> None:
    sim = eq.calibrate(eq.prepare(LargeBias(1e3).eval(), IMAGES), [IMAGES])
    sim.get_parameter("conv.bias").data[1] = -1e9
    with pytest.raises(PlanError, match=r"^conv: its bias \(up to 1e\+09\) does not fit int32 .*reserve_bias_ranges"):
        eq.convert(sim)
    sim.reserve_bias_ranges()
    assert not [h for h in eq.hazards(eq.convert(sim)) if h.kind == "bias"]
