"""Calibration: one pass of data through the float model finds every activation's range."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from edgeqat.errors import DataError
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel

__all__ = ["calibrate"]


def calibrate(sim: SimulatedModel, batches: Iterable[Batch]) -> SimulatedModel:
    """Seeds the ranges of `sim` from `batches` and switches quantization on.

    The model runs in float and eval mode meanwhile, so that ranges come from what it was trained to compute.
    Calibrated and untrained is the post-training quantization result.

    Args:
        sim: A prepared model, in any phase.
        batches: Inputs only: tensors, tuples or dicts; no labels are needed.

    Returns:
        `sim`, in phase "quantized".

    Raises:
        DataError: There is no batch, or a batch holds NaN or infinite values.
    """
    training, n = sim.training, 0
    sim.set_phase("calibrating")
    sim.eval()
    try:
        with torch.no_grad():
            for n, batch in enumerate(batches, start=1):
                for tensor in sim.plan.program.signature.flatten(batch):
                    if not bool(torch.isfinite(tensor).all()):
                        raise DataError(f"calibration batch {n} holds NaN or infinite inputs; clean the data")
                sim.call(batch)
        if n == 0:
            raise DataError("found no calibration batches, wanted at least one")
        for quantizer in sim.activation_quantizers().values():
            quantizer.settle()
        for name, weight_quantizer in sim.weight_quantizers().items():
            weight_quantizer.settle(sim.get_parameter(name))
    except BaseException:
        sim.set_phase("float")
        raise
    finally:
        sim.train(training)
    sim.reserve_bias_ranges()
    sim.set_phase("quantized")
    return sim
