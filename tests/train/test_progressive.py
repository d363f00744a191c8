"""Progressive bits: each stage starts from the weights of the one before, to the bit, and finds its own ranges."""

from __future__ import annotations

import pytest
import torch

import edgeqat as eq
from edgeqat.errors import ModelError, PhaseError
from models import SmallNet, shake

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(IMAGES[:8], torch.arange(8) % 10), (IMAGES[8:], torch.arange(8) % 10)]
FOUR = eq.QConfigMapping().set_global(eq.QConfig(weight=eq.WeightConfig(bits=4, learned=True)))


def prepared(mapping: eq.QConfigMapping, batch_norm: str = "fold", channels: int = 8) -> eq.SimulatedModel:
    torch.manual_seed(0)
    model = shake(SmallNet(channels)).eval()
    return eq.prepare(model, IMAGES[:2], qconfig_mapping=mapping, batch_norm=batch_norm)


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
def test_weights_are_carried_to_the_bit_and_ranges_are_found_anew(batch_norm: str) -> None:
    wide = eq.calibrate(prepared(FOUR.at_least(weights=8), batch_norm), [IMAGES])
    eq.fit(wide, BATCHES, epochs=2, lr=0.02)
    narrow = prepared(FOUR, batch_norm)
    assert eq.carry_weights(wide, narrow) is narrow
    assert narrow.phase == "float"
    wide.set_phase("float")
    with torch.no_grad():
        assert torch.equal(wide.eval()(IMAGES), narrow.eval()(IMAGES))
    eq.calibrate(narrow, [IMAGES])
    for name, quantizer in narrow.weight_quantizers().items():
        weight = narrow.get_parameter(name)
        assert torch.equal(weight, wide.get_parameter(name))
        assert torch.equal(quantizer.scale.detach(), weight.detach().abs().flatten(1).amax(1) / 7)
    assert {int(const.data.abs().max()) for const in eq.convert(narrow).consts.values() if const.data is not None} == {
        7
    }


def test_a_target_that_was_calibrated_is_to_be_calibrated_again() -> None:
    wide = eq.calibrate(prepared(FOUR.at_least(weights=8)), [IMAGES])
    narrow = eq.calibrate(prepared(FOUR), [IMAGES])
    assert eq.carry_weights(wide, narrow).phase == "float"
    eq.convert(eq.calibrate(narrow, [IMAGES]))
    with pytest.raises(PhaseError, match="it was converted; reopen it"):
        eq.carry_weights(wide, narrow)


def test_other_models_are_refused_and_nothing_changes() -> None:
    wide, live = prepared(FOUR), prepared(FOUR, "live")
    before = {name: t.clone() for name, t in live.state_dict().items()}
    with pytest.raises(ModelError, match="are not of one model: bn1.bias is in one of them alone"):
        eq.carry_weights(wide, live)
    with pytest.raises(ModelError, match="conv1.weight has shape"):
        eq.carry_weights(prepared(FOUR, channels=4), wide)
    assert all(torch.equal(t, before[name]) for name, t in live.state_dict().items() if t.isfinite().all())


def test_no_fewer_bits_everywhere() -> None:
    mixed = (
        eq.QConfigMapping()
        .set_global(eq.QConfig(eq.ActivationConfig(bits=4), eq.WeightConfig(bits=3)))
        .set_first_last(eq.QConfig(weight=eq.WeightConfig(bits=7)))
        .set_object_type("Linear", eq.QConfig(weight=eq.WeightConfig(bits=8, observer="mse")))
        .set_module_name("conv1", None)
        .set_module_name_regex("conv2", eq.QConfig(weight=eq.WeightConfig(bits=2), output=eq.ActivationConfig(bits=2)))
        .set_module_name_object_type_order("", "Conv2d", 2, eq.QConfig(weight=eq.WeightConfig(bits=4)))
    )
    wide = mixed.at_least(weights=6, activations=5)
    from edgeqat.qconfig_mapping import LayerId

    def bits(module: str, kind: str = "Conv2d", index: int = 0) -> tuple[int, int, int] | None:
        found = wide.lookup(LayerId(module, kind, "conv2d", index))
        return None if found is None else (found.weight.bits, found.activation.bits, found.result.bits)

    assert bits("other") == (6, 5, 5)
    assert bits("fc", "Linear") == (8, 8, 8)
    assert bits("conv1") is None
    assert bits("conv2") == (6, 8, 5)
    assert bits("conv3", index=2) == (6, 8, 8)
    assert wide.first_last is not None and wide.first_last.weight.bits == 7
    unchanged = mixed.lookup(LayerId("other", "Conv2d", "conv2d"))
    assert unchanged is not None and unchanged.weight.bits == 3
