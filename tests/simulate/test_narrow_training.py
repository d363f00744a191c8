"""Grids of 2 to 8 bits, learned or calibrated: what is trained on is what is shipped, integer by integer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import edgeqat as eq
from edgeqat import affine
from edgeqat.lowering.onnx_session import OnnxSession
from edgeqat.lowering.to_onnx import spell_model, taps_suffix
from helpers import EXACT_ARITHMETIC

IMAGE = torch.randn(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 5
BITS = st.integers(2, 8)


class Residual(nn.Module):
    """A rectified value, one with two signs, their sum, a table, a pool and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = torch.sigmoid(x + self.b(x))
        return self.fc(x.mean((2, 3)))


def trained(weight: eq.WeightConfig, activation: eq.ActivationConfig, batch_norm: str) -> eq.SimulatedModel:
    torch.manual_seed(0)
    qconfig = eq.QConfig(activation, weight)
    sim = eq.prepare(Residual(), IMAGE, "onnxruntime", qconfig, batch_norm=batch_norm)
    eq.fit(eq.calibrate(sim, [IMAGE]), [(IMAGE, TARGETS)] * 3, epochs=1, lr=0.01)
    return sim.eval()


@EXACT_ARITHMETIC
@settings(max_examples=14, deadline=None)
@given(BITS, BITS, st.booleans(), st.booleans(), st.booleans(), st.sampled_from(["fold", "live"]))
def test_what_is_trained_on_is_what_runs(
    w: int, a: int, learned_weights: bool, learned: bool, symmetric: bool, batch_norm: str
) -> None:
    activation = eq.ActivationConfig(bits=a, learned=learned, symmetric=symmetric)
    sim = trained(eq.WeightConfig(bits=w, learned=learned_weights), activation, batch_norm)
    program = eq.convert(sim)
    for name, weights in sim.weight_quantizers().items():
        on_grid, scale = weights(sim.get_parameter(name))
        data = program.consts[name].data
        assert data is not None and scale is not None and int(data.abs().max()) <= 2 ** (w - 1) - 1
        if batch_norm == "fold":  # a live one moves its gain into the scale, and its sign into the integers
            assert torch.equal(on_grid, affine.dequantize(data.float(), scale, torch.zeros_like(scale).int(), 0))
    for name, quantizer in sim.activation_quantizers().items():
        grid = program.grid_of(name)
        assert (grid.qmin, grid.qmax) == (0, 2**a - 1)
        scale, zero_point = grid.filled()
        steps = torch.arange(-(2**a), 2 ** (a + 1)) + torch.rand(3 * 2**a, generator=torch.Generator().manual_seed(a))
        reals = (steps - zero_point) * scale
        q = affine.quantize(reals, scale, zero_point, max(grid.qmin, quantizer.lowest), grid.qmax)
        assert torch.equal(quantizer(reals), affine.dequantize(q, scale, zero_point)), name
    session = OnnxSession(spell_model(program).SerializeToString() + taps_suffix(program))
    found = dict(zip(session.outputs, session.run([IMAGE]), strict=True))
    with sim.exact("onnxruntime") as exact:
        assert torch.equal(exact(IMAGE), found[program.outputs[0]])
    _, taps = eq.reference(program, IMAGE, taps=True)
    assert all(torch.equal(found[name].int(), integers) for name, integers in taps.items())


@pytest.mark.parametrize("arithmetic", ["fbgemm", "qnnpack", "xnnpack", "litert/builtin", "onnxruntime/arm64"])
def test_exact_mode_takes_narrow_grids_in_other_arithmetics(arithmetic: str) -> None:
    """Of runtimes that take no such program: what a device would compute that clamps."""
    torch.manual_seed(0)
    qconfig = eq.QConfig(eq.ActivationConfig(bits=4), eq.WeightConfig(bits=4))
    mapping = eq.QConfigMapping().set_global(qconfig)
    targets = ["onnxruntime", "executorch"]
    sim = eq.calibrate(eq.prepare(Residual().eval(), IMAGE, targets, mapping), [IMAGE])
    with sim.exact(arithmetic) as exact:
        exact_logits = exact(IMAGE)
    program = eq.convert(sim)
    logits, taps = eq.reference(program, IMAGE, arithmetic, taps=True)
    assert torch.equal(exact_logits, logits)
    assert max(int(value.max()) for value in taps.values()) == 15
