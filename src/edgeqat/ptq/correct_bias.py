"""Bias correction: the mean by which quantization moves each channel of a layer's outputs is taken off its bias.

Rounding errors of weights do not average out over inputs that are all positive, as behind a ReLU: they move the mean
of an output. The means are those over calibration data, of the float network and of the quantized one whose layers so
far are corrected.

Source: Nagel et al. 2019 (arXiv:1906.04721), section 4.2, and its appendix D for means over data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeqat.arguments import check_batches, check_made
from edgeqat.op_attrs import LinearAttrs
from edgeqat.ptq.walk import check_calibrated, evaluating, float_twin_of, shared_parameters, walk
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel

__all__ = ["BiasCorrection", "CorrectedLayer", "correct_biases"]


@dataclass(frozen=True)
class CorrectedLayer:
    """What became of one layer: its bias by name, and the root mean square and largest shift over its channels."""

    name: str
    bias: str
    rms_shift: float
    largest_shift: float


@dataclass(frozen=True)
class BiasCorrection:
    """What `correct_biases` did: to each layer, and by op the reason why one was left as it was."""

    layers: tuple[CorrectedLayer, ...]
    skipped: dict[str, str]


def correct_biases(
    sim: SimulatedModel, batches: Iterable[Batch], float_twin: SimulatedModel | None = None
) -> BiasCorrection:
    """Shifts the biases of a calibrated simulation so that the means of its layers' outputs are those in float.

    Where a new bias needs it to fit int32, the smallest scale of its weight is raised, as by `calibrate`.

    Args:
        sim: In phase "quantized", with batch norms folded.
        batches: Inputs only, as for `calibrate`. Their values in the network are held in memory, a layer's at a time.
        float_twin: Whose means in float are wanted, of the same plan: a copy of `sim` from before `adaround`, which
            changes what `sim` computes in float. None: those of `sim` itself.

    Raises:
        InputError: `sim` was not made by `prepare`, or `batches` is a single one.
        PhaseError: The simulation is not calibrated, or was converted.
        PlanError: A batch norm is live, or `float_twin` has another plan.
        DataError: There is no batch.
    """
    check_made(sim, SimulatedModel)
    check_batches(batches)
    check_calibrated(sim, "correct_biases")
    shared, twin = shared_parameters(sim), float_twin_of(sim, float_twin)
    layers: list[CorrectedLayer] = []
    skipped: dict[str, str] = {}
    with evaluating(sim):
        for layer in walk(sim, twin, batches):
            name, bias = layer.op.name, layer.parameters.bias
            if bias is None:
                skipped[name] = "it has no bias"
            elif bias in shared:
                skipped[name] = f"{shared[bias]} layers have its bias"
            else:
                axis = -1 if isinstance(layer.op.attrs, LinearAttrs) else 1
                shift = _mean(layer.targets, axis) - _mean(layer.outputs(), axis)
                parameter, rounded = sim.get_parameter(bias), layer.bias()
                assert rounded is not None
                # The means hold the bias as it was rounded; what that cost goes into the new one, before its rounding.
                moved = rounded.double() + shift - parameter.double()
                parameter.copy_(parameter.double() + moved)
                rms, largest = float(moved.square().mean().sqrt()), float(moved.abs().max())
                layers.append(CorrectedLayer(name, bias, rms, largest))
    sim.reserve_bias_ranges()
    return BiasCorrection(tuple(layers), skipped)


def _mean(outputs: Sequence[Tensor], axis: int) -> Tensor:
    """The mean of each channel over samples and places, float64 [C]."""
    total = torch.stack([y.double().movedim(axis, 0).flatten(1).sum(1) for y in outputs]).sum(0)
    return total / sum(y.numel() // y.shape[axis] for y in outputs)
