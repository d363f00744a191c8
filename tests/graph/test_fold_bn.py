from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgeqat.graph.fold_bn import folded_parameters
from edgeqat.simulate.build import prepare


def oracle(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """The fold in numpy float64, written from the definition, channel by channel."""
    w = weight.detach().numpy().astype(np.float64)
    b = np.zeros(len(w)) if bias is None else bias.detach().numpy().astype(np.float64)
    assert norm.running_mean is not None and norm.running_var is not None
    mean, var = (t.numpy().astype(np.float64) for t in (norm.running_mean, norm.running_var))
    gamma = np.ones(len(w)) if norm.weight is None else norm.weight.detach().numpy().astype(np.float64)
    beta = np.zeros(len(w)) if norm.bias is None else norm.bias.detach().numpy().astype(np.float64)
    folded_w, folded_b = np.empty_like(w), np.empty_like(b)
    for c in range(len(w)):
        deviation = np.sqrt(var[c] + norm.eps)
        folded_w[c] = w[c] * (gamma[c] / deviation)
        folded_b[c] = (b[c] - mean[c]) * (gamma[c] / deviation) + beta[c]
    return folded_w, folded_b


def norm_of(channels: int, affine: bool, eps: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels, eps=eps, affine=affine)
    generator = torch.Generator().manual_seed(channels)
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.copy_(torch.randn(channels, generator=generator))
    norm.running_var.copy_(torch.rand(channels, generator=generator) * 3)
    if affine:
        norm.weight.data.copy_(torch.randn(channels, generator=generator))  # negative gammas too
        norm.weight.data[0] = 0.0
        norm.bias.data.copy_(torch.randn(channels, generator=generator))
    return norm


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_folding_is_float64_rounded_once(eps: float, affine: bool, bias: bool) -> None:
    conv, norm = nn.Conv2d(5, 12, 3, bias=bias), norm_of(12, affine, eps)
    weight, shift = folded_parameters(conv.weight, conv.bias, norm)
    expected_weight, expected_shift = oracle(conv.weight, conv.bias, norm)
    # The two float64 formulas may differ in their last bits, which rounds to another float32 once in 2**28.
    assert np.abs(weight.numpy() - expected_weight.astype(np.float32)).max() <= np.spacing(np.float32(1.0)) * 1e-3
    assert np.array_equal(shift.numpy(), expected_shift.astype(np.float32))
    # Rounding once: no further than half a unit in the last place from the exact value.
    assert (np.abs(weight.numpy() - expected_weight) <= 0.5001 * np.spacing(np.abs(weight.numpy()))).all()


class Net(nn.Module):
    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(x)))


LAYERS = {
    "conv": (lambda: nn.Conv2d(3, 12, 3, padding=1), (2, 3, 8, 8)),
    "conv same": (lambda: nn.Conv2d(3, 12, 3, padding="same"), (2, 3, 8, 8)),
    "conv reflect": (lambda: nn.Conv2d(3, 12, 3, padding=1, padding_mode="reflect"), (2, 3, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, groups=12, bias=False), (2, 12, 8, 8)),
    "linear": (lambda: nn.Linear(6, 12), (2, 6)),
}


def rounding_bound(folded: Net, norm: nn.Module, x: Tensor) -> Tensor:
    """What float32 may differ by before and after folding, per element.

    Each side sums fan_in products and a few terms, in any order: at most (fan_in + 8) roundings of half a unit,
    relative to the sum of the magnitudes (Higham 2002, section 3.1), once for each side.
    """
    magnitude = copy.deepcopy(folded)
    magnitude.layer.weight.data.abs_()
    mean, var = norm.running_mean, norm.running_var
    gain = (norm.weight / torch.sqrt(var + norm.eps)).abs()
    magnitude.layer.bias.data = magnitude.layer.bias.abs() + 2 * mean.abs() * gain + norm.bias.abs()
    fan_in = magnitude.layer.weight[0].numel()
    return (fan_in + 8) * torch.finfo(torch.float32).eps * magnitude.layer(x.abs())


@pytest.mark.parametrize("name", LAYERS)
def test_the_unquantized_simulation_equals_the_folded_network(name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    layer = make()
    template = norm_of(12, True, 1e-3)
    norm = nn.BatchNorm1d(12, eps=1e-3) if name == "linear" else nn.BatchNorm2d(12, eps=1e-3)
    norm.load_state_dict(template.state_dict())
    model = Net(layer, norm).eval()
    x = torch.randn(shape)
    sim = prepare(model, x)

    folded = copy.deepcopy(model)
    weight, bias = folded_parameters(layer.weight, layer.bias, norm)
    folded.layer.weight.data.copy_(weight)
    folded.layer.bias = nn.Parameter(bias)
    folded.norm = nn.Identity()

    with torch.no_grad():
        assert torch.equal(sim(x), folded(x))
        assert bool(((sim(x) - model(x)).abs() <= rounding_bound(folded, norm, x)).all())
    assert "norm.weight" not in sim.state_dict() and "layer.bias" in sim.state_dict()
