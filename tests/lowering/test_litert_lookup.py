"""What LiteRT computes tables with, and on which engines that is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.lookup import NEAR_TIE, distance_to_tie
from edgeqat.lowering.line_table import line_of
from edgeqat.lowering.litert_lookup import kernels_of
from edgeqat.lowering.to_litert import spell
from edgeqat.op_attrs import LookupAttrs
from edgeqat.program import QuantizedProgram
from edgeqat.replay.kernels import ENGINES, arithmetic_here
from edgeqat.replay.run_litert import call_litert, load_litert
from lowering.test_line_table import HARD_SIGMOID, looked_up
from models import shake
from programs import grid, on_grid, own_grid

pytestmark = pytest.mark.skipif(arithmetic_here("litert/builtin") is None, reason="not known on this processor")

BOTH = ENGINES["litert"]


def ops_of(program: QuantizedProgram) -> set[str]:
    return {op for op, count in spell(program, None).runtime_ops.items() if count} - {"QUANTIZE", "DEQUANTIZE"}


@pytest.mark.parametrize(("function", "op"), [("sigmoid", "LOGISTIC"), ("tanh", "TANH")])
def test_a_function_is_the_kernel_that_gives_its_table(function: str, op: str) -> None:
    assert ops_of(looked_up(function, (), grid(0.03, 110), own_grid(function))) == {op}


def test_another_grid_than_the_kernels_own_is_a_table() -> None:
    assert ops_of(looked_up("sigmoid", (), grid(0.03, 110), grid(1 / 300, 0))) == {"CAST", "ADD", "GATHER"}


def test_a_function_that_comes_near_a_tie_is_given_another_scale() -> None:
    y = own_grid("sigmoid")
    for scale in torch.linspace(0.02, 0.04, 2000).tolist():
        x = grid(scale, 110)
        if distance_to_tie(LookupAttrs("sigmoid", ()), x, y) <= NEAR_TIE:
            break
    else:
        pytest.fail("none of 2,000 tables is near a tie")
    program = looked_up("sigmoid", (), x, y)
    spelling = spell(program, None)
    assert (spelling.runtime_ops["LOGISTIC"], spelling.runtime_ops["QUANTIZE"]) == (1, 2)  # one of them is the input's
    assert spelling.arithmetics == ("litert/xnnpack", "litert/builtin")
    table = program.consts["y"].data
    assert table is not None
    for engine in BOTH:
        loaded = load_litert(spelling.data, engine, 1)
        (found,) = call_litert(loaded, [on_grid(x, torch.arange(256)[None]).numpy()])
        assert torch.equal(torch.from_numpy(found[0]), on_grid(y, table))


def test_a_table_that_is_not_the_functions_own_stays_one() -> None:
    program = looked_up("sigmoid", (), grid(0.03, 110), own_grid("sigmoid"))
    const = program.consts["y"]
    assert const.data is not None
    other = const.data.clone()
    other[100] += 1
    assert ops_of(replace(program, consts={"y": replace(const, data=other)})) == {"CAST", "ADD", "GATHER"}


def test_what_one_engine_computes_is_exact_on_that_one() -> None:
    """LiteRT's own kernels round twice: not every line that suits the delegate suits them."""
    for scale in torch.linspace(0.02, 0.2, 50).tolist():
        program = looked_up("hardsigmoid", (), grid(scale, 101), HARD_SIGMOID)
        op = program.ops[1]
        alone = line_of(program, op, ("litert/xnnpack",))
        if alone is not None and line_of(program, op, ("litert/xnnpack", "litert/builtin")) is None:
            break
    else:
        pytest.fail("each of 50 lines suits both engines")
    kernels, engines = kernels_of(program, BOTH)
    assert (kernels["y"], engines) == (alone, ("xnnpack",))
    assert spell(program, None).arithmetics == ("litert/xnnpack",)
    assert spell(program, "builtin").arithmetics == ("litert/builtin",)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Hardswish])
def test_a_network_of_gates_is_exact_and_has_no_table(activation: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), activation(), nn.Conv2d(8, 16, 3, 2, 1), activation()]
    model = shake(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))).eval()
    images = torch.randn(16, 3, 16, 16)
    program = eq.convert(eq.calibrate(eq.prepare(model, images, "litert"), [images]))
    artifact = eq.lower(program, "litert", tmp_path / "gates")
    assert "GATHER" not in artifact.manifest["coverage"]["runtime_ops"]
    assert eq.verify(artifact, program, [images]).bit_identical == 1.0


def test_nothing_is_owed_on_an_engine_that_the_manifest_leaves_out(tmp_path: Path) -> None:
    images = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(12):
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.Hardswish(), nn.Conv2d(8, 8, 3, 1, 1), nn.Hardswish()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
        program = eq.convert(eq.calibrate(eq.prepare(model, images, "litert"), [images]))
        if kernels_of(program, BOTH)[1] == ("xnnpack",):
            break
    else:
        pytest.fail("the lines of 12 networks suit both engines")
    artifact = eq.lower(program, "litert", tmp_path / "delegate")
    assert artifact.manifest["arithmetics"] == ["litert/xnnpack"]
    own, other = (eq.verify(artifact, program, [images], engine=engine) for engine in BOTH)
    assert (own.exact_here, own.bit_identical, own.max_error_steps) == (True, 1.0, 0.0)
    assert not other.exact_here and other.max_error_steps <= 1
