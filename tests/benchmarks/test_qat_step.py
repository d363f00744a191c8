from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qat_step
from qat_checks import check_step, on_grid
from qat_variants import VARIANTS, Setting, Step, Variant, make_setting, make_step


def test_it_prints_and_writes_a_ratio_for_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "figures.json"
    words = "--models edge --variants fp32-folded fold nncf --batch 4 --steps 2 --repeats 1 --threads 1 --no-memory"
    monkeypatch.setattr(sys, "argv", ["qat_step.py", *words.split(), "--json", str(report)])
    find = importlib.util.find_spec
    # As where NNCF is not installed.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nncf" else find(name, *rest))
    threads = torch.get_num_threads()
    try:
        qat_step.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "fold         checked: 8 convs and linears on grids, no gradient outside any of 10 ranges" in printed
    assert "nncf         not available: nncf is not installed" in printed
    found = json.loads(report.read_text())["models"]["edge"]
    assert found["not_available"] == {"nncf": "nncf is not installed"}
    assert list(found["variants"]) == ["fp32", "fp32-folded", "fold"]
    for name in ("fp32-folded", "fold"):
        times = [found["variants"][key]["samples_ms"] for key in (name, "fp32")]
        ratio = found["variants"][name]["ratios"]["fp32"]
        low, high = sorted(a / b for a, b in zip(*times, strict=True))
        assert ratio["median"] == pytest.approx((low + high) / 2)
        assert low <= ratio["ci95"][0] <= ratio["median"] <= ratio["ci95"][1] <= high


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident peaks are reset on Linux alone")
def test_step_memory_is_what_a_step_adds() -> None:
    class Hungry:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

        def __call__(self) -> None:
            torch.ones(2**24)  # 64 MiB, given back at once

    grown = qat_step.resident_growth(Hungry())  # type: ignore[arg-type]
    # The rest is what the interpreter and the allocator touch meanwhile.
    assert 60 * 2**20 <= grown <= 80 * 2**20


def setting() -> Setting:
    return make_setting("edge", 4, "cpu", False)


def test_a_step_that_quantizes_nothing_is_found_out() -> None:
    step = Step(Variant(VARIANTS["fp32-folded"].build, quantized=True), setting())
    with pytest.raises(AssertionError, match=r"the input of op 0 has \d+ values, wanted 256 at most"):
        check_step("fp32-folded", step)


class _PassEverything(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def test_a_gradient_outside_a_range_is_found_out() -> None:
    step = Step(VARIANTS["fold"], setting())
    quantizer = step.module.get_submodule("quantizers").get_submodule("x:quantized")
    forward = quantizer.forward
    quantizer.forward = lambda x: _PassEverything.apply(x, forward(x).detach())
    with pytest.raises(AssertionError, match="inputs outside the range get a gradient"):
        check_step("fold", step)


def test_a_check_leaves_the_step_as_it_was() -> None:
    step = make_step("fx", setting())  # its observers follow what they see
    before = {name: tensor.clone() for name, tensor in step.module.state_dict().items()}
    check_step("fx", step)
    after = step.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if before[name].is_floating_point())


def test_what_is_on_a_grid() -> None:
    integers = torch.randint(-127, 128, (3, 40)).float()
    scales = torch.tensor([[0.013], [2.7], [1e-6]])
    assert on_grid(integers * scales)
    assert on_grid(torch.zeros(2, 5))
    assert not on_grid(torch.cat([integers * scales, torch.randn(1, 40)]))
    assert not on_grid(integers * 3.0 + 0.5)  # equidistant, but zero is no point of it
    assert not on_grid(torch.arange(1000.0).reshape(1, -1))


def test_every_variant_says_whether_it_quantizes() -> None:
    assert {name for name, variant in VARIANTS.items() if not variant.quantized} == {
        "fp32",
        "fp32-folded",
        "fp32-bf16",
    }
    assert isinstance(VARIANTS["fp32"].build(setting()), nn.Module)
