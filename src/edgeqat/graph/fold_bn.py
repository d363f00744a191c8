"""Folding a batch norm into the conv or linear before it, and the normalisation of pixels too, once, before training.

With BN(y) = gamma * (y - mean) / sqrt(var + eps) + beta and y = W x + b:

    W' = W * gamma / sqrt(var + eps)            per output channel
    b' = (b - mean) * gamma / sqrt(var + eps) + beta

computed in float64 and rounded to float32 once. `gamma` and `beta` are 1 and 0 where affine=False.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat import affine
from edgeqat.graph.fuse import Region
from edgeqat.graph.pixels import PixelFold
from edgeqat.graph.submodules import owner_of

__all__ = ["fold_region", "folded_bias", "folded_parameters", "gain_of"]


def gain_of(norm: _BatchNorm) -> Tensor:
    """gamma / sqrt(var + eps), float64 [C]."""
    assert norm.running_var is not None
    gain = torch.rsqrt(norm.running_var.detach().double() + norm.eps)
    return gain if norm.weight is None else gain * norm.weight.detach().double()


def folded_bias(bias: Tensor | None, norm: _BatchNorm) -> Tensor:
    """b' in float64 [C]; the formula stands at the top of this file."""
    assert norm.running_mean is not None
    mean = norm.running_mean.detach().double()
    shift = (-mean if bias is None else bias.detach().double() - mean) * gain_of(norm)
    return shift if norm.bias is None else shift + norm.bias.detach().double()


def folded_parameters(weight: Tensor, bias: Tensor | None, norm: _BatchNorm, axis: int = 0) -> tuple[Tensor, Tensor]:
    """(W', b') in the weight's dtype; the formula stands at the top of this file.

    Args:
        weight: C_out along `axis`.
        bias: [C_out], None for zeros.
        norm: Batch norm over C_out with running statistics.
        axis: 1 for a transposed conv, else 0.
    """
    gain = affine.broadcast(gain_of(norm), axis, weight.dim())
    return (weight.detach().double() * gain).to(weight.dtype), folded_bias(bias, norm).to(weight.dtype)


def fold_region(
    root: nn.Module, region: Region, captured: nn.Module, live: bool = False, pixels: PixelFold | None = None
) -> str | None:
    """Folds a region's batch norm into the parameters under `root`, and removes it there; all is rounded once.

    Args:
        root: Changed in place.
        region: The region.
        captured: Holds the batch norm still, where an earlier region that it also follows has removed it.
        live: Whether its batch norm stays.
        pixels: The normalisation that the region does before, if it reads pixels.

    Returns:
        The dotted name of the region's bias: the one it had, the one that folding made, or None.
    """
    assert region.form is not None and region.form.weight is not None
    batch_norm = None if live else region.batch_norm
    if batch_norm is None and pixels is None:
        return region.form.bias
    weight_name, bias_name = region.form.weight, region.form.bias
    owner, leaf = owner_of(root, weight_name)
    weight = owner.get_parameter(leaf)
    bias = None if bias_name is None else root.get_parameter(bias_name)
    new_weight, new_bias = weight.detach().double(), None if bias is None else bias.detach().double()
    if pixels is not None:
        shift = pixels.shift(new_weight)
        new_weight, new_bias = pixels.weight(new_weight), shift if new_bias is None else new_bias + shift
    if batch_norm is not None:
        norm = captured.get_submodule(str(batch_norm.target))
        assert isinstance(norm, _BatchNorm)
        new_weight, new_bias = folded_parameters(new_weight, new_bias, norm, region.form.channel_axis)
    assert new_bias is not None
    weight.data.copy_(new_weight)
    if bias is not None:
        bias.data.copy_(new_bias)
    else:
        # A bias beside the weight it belongs to: conv1.weight gets conv1.bias.
        bias_leaf = "bias" if leaf == "weight" else f"{leaf}_bias"
        owner._parameters.pop(bias_leaf, None)
        owner.register_parameter(
            bias_leaf, nn.Parameter(new_bias.to(weight.dtype), requires_grad=weight.requires_grad)
        )
        bias_name = f"{weight_name.rpartition('.')[0]}.{bias_leaf}".lstrip(".")
    if batch_norm is not None:
        norm_owner, norm_leaf = owner_of(root, str(batch_norm.target))
        norm_owner._modules.pop(norm_leaf, None)
    return bias_name
