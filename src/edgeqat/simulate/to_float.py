"""The way back: trained weights in the user's own class.

A batch norm that was folded before training is put back. With its gain g = gamma / sqrt(var + eps):

    W = W' / g        b = (b' - beta) / g + mean        where the layer has a bias of its own
                      beta = b' + mean * g              where it has none; without beta, mean = -b' / g

A channel whose gain is (almost) 0 has lost its weights in folding; its batch norm becomes the identity plus a bias.
What normalised pixels (`graph/pixels.py`) normalises no more: W = W' / gain, b = b' - sum of W * offset.
All in float64, rounded once.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat import affine
from edgeqat.errors import PlanError
from edgeqat.graph.fold_bn import gain_of
from edgeqat.graph.fuse import FusedGraph, Region
from edgeqat.graph.normalize import scale_of_norm
from edgeqat.graph.pixels import PixelFold
from edgeqat.simulate.op_parameters import OpParameters

__all__ = ["FoldedSimulation", "to_float"]

SMALLEST_GAIN = 1e-12

ROUNDING = 1e-5
"""What float32 may leave of a bias that training did not move, as a share of the largest shift."""


class FoldedSimulation(Protocol):
    """What the way back needs of a SimulatedModel."""

    fused: FusedGraph
    parameters_of: Mapping[str, OpParameters]

    def get_parameter(self, target: str) -> nn.Parameter:
        """A parameter by its dotted name."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer."""
        ...


def to_float(sim: FoldedSimulation) -> nn.Module:
    """See `SimulatedModel.to_float`."""
    model = copy.deepcopy(sim.fused.captured.template)
    state = sim.state_dict()
    device = next((t.device for t in state.values() if t.is_floating_point()), torch.device("cpu"))
    model.to(device)
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, tensor in own.items():
            if name in state:
                tensor.copy_(state[name])
        for region in _folded_regions(sim):
            _unfold(sim, region, model)
        for region in sim.fused.regions:
            parameters = sim.parameters_of.get(region.name)
            if parameters is not None and parameters.pixels is not None:
                _unfold_pixels(sim, region, parameters.pixels, model)
    return model


def _folded_regions(sim: FoldedSimulation) -> list[Region]:
    """Regions whose batch norm is gone; what decides a batch norm's shift before what can make up for it."""
    without: dict[str, Region] = {}
    others: list[Region] = []
    for region in sim.fused.regions:
        parameters = sim.parameters_of.get(region.name)
        if parameters is None or parameters.norm is not None or region.batch_norm is None:
            continue
        assert region.form is not None
        if region.form.bias is not None:
            others.append(region)
            continue
        name = str(region.batch_norm.target)
        first = without.setdefault(name, region)
        if first is not region:
            raise PlanError(
                f"{name} was folded into {first.name} and {region.name}, which have no biases of their own, so that "
                "training gave it two shifts; prepare with batch_norm='live' to keep it"
            )
    return [*without.values(), *others]


def _unfold(sim: FoldedSimulation, region: Region, model: nn.Module) -> None:
    assert region.form is not None and region.form.weight is not None and region.batch_norm is not None
    parameters = sim.parameters_of[region.name]
    assert parameters.bias is not None
    norm = model.get_submodule(str(region.batch_norm.target))
    assert isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None
    weight, shift = sim.get_parameter(parameters.weight).double(), sim.get_parameter(parameters.bias).double()
    if parameters.pixels is not None:
        weight = parameters.pixels.own_weight(weight)
        shift = shift - parameters.pixels.shift(weight)
    dead = gain_of(norm).abs() < SMALLEST_GAIN
    if bool(dead.any()) and norm.weight is not None:
        norm.running_mean.masked_fill_(dead, 0.0)
        norm.running_var.masked_fill_(dead, 1.0)
        norm.weight.masked_fill_(dead, (1.0 + norm.eps) ** 0.5)
    gain, mean = gain_of(norm), norm.running_mean.double()
    if region.form.weight == scale_of_norm(str(region.batch_norm.target)):  # no conv of the user's stands before it
        _set_gain(norm, weight.flatten(), shift)
        return
    if region.form.bias is not None:
        beta = torch.zeros_like(shift) if norm.bias is None else norm.bias.double()
        model.get_parameter(region.form.bias).copy_((shift - beta) / gain + mean)
    elif norm.affine:
        norm.bias.copy_(shift + mean * gain)
    else:
        norm.running_mean.copy_(-shift / gain)
    own = weight / affine.broadcast(gain, region.form.channel_axis, weight.dim())
    model.get_parameter(region.form.weight).copy_(own)


def _unfold_pixels(sim: FoldedSimulation, region: Region, pixels: PixelFold, model: nn.Module) -> None:
    """Of a region without a folded batch norm."""
    parameters = sim.parameters_of[region.name]
    assert region.form is not None and region.form.weight is not None and parameters.bias is not None
    if region.batch_norm is not None and parameters.norm is None:
        return
    weight = pixels.own_weight(sim.get_parameter(parameters.weight))
    bias = sim.get_parameter(parameters.bias).double() - pixels.shift(weight)
    if region.form.bias is not None:
        model.get_parameter(region.form.bias).copy_(bias)
    elif parameters.norm is not None:
        norm = model.get_submodule(parameters.norm)
        assert isinstance(norm, _BatchNorm) and norm.running_mean is not None
        norm.running_mean.sub_(bias)
    elif bool((bias.abs() > ROUNDING * pixels.shift(weight.abs()).abs().amax()).any()):
        raise PlanError(
            f"{region.name} has no bias of its own, and training gave it one together with the pixels' normalisation; "
            "give the model's first convolution a bias, or prepare without pixels"
        )
    if parameters.norm is None or region.form.weight != scale_of_norm(parameters.norm):
        model.get_parameter(region.form.weight).copy_(weight)


def _set_gain(norm: _BatchNorm, gain: Tensor, shift: Tensor) -> None:
    """Makes a batch norm compute gain * x + shift."""
    assert norm.running_mean is not None and norm.running_var is not None
    if norm.affine:
        norm.weight.copy_(gain * torch.sqrt(norm.running_var.double() + norm.eps))
        norm.bias.copy_(shift + norm.running_mean.double() * gain)
    else:  # its gain is not trained
        norm.running_mean.copy_(-shift / gain)
