"""Calibration: data through the float model finds every activation's range; one pass, or two where it must."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from edgeqat.arguments import check_batches, check_made
from edgeqat.errors import DataError, PlanError
from edgeqat.ranks import Ranks
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.observers import Observer

__all__ = ["calibrate"]


def calibrate(sim: SimulatedModel, batches: Iterable[Batch]) -> SimulatedModel:
    """Seeds the ranges of `sim` from `batches` and switches quantization on.

    The model runs in float and eval mode meanwhile, so that ranges come from what it was trained to compute.
    Calibrated and untrained is the post-training quantization result.

    Where torch.distributed is initialised, all its processes must call this, each with batches of its own, as many
    as it has. All end with the same grids, those of the data taken together. "histogram", the default, then needs
    the data twice: a list or a DataLoader, not a generator. "moving_average" and observers of the user's own work
    in a single process only.

    Args:
        sim: A prepared model, in any phase.
        batches: Inputs only: tensors, tuples or dicts; no labels are needed.

    Returns:
        `sim`, in phase "quantized".

    Raises:
        InputError: `sim` was not made by `prepare`, or `batches` is a single one.
        DataError: There is no batch, a batch holds NaN or infinite values, the data cannot be read twice where
            that is needed; what one process raises all of them raise.
        PhaseError: The model computed NaN from finite inputs.
        PlanError: An observer of the user's own cannot be used, or not with several processes.

    Warns:
        CalibrationWarning: A value was constant, had one huge outlier or was infinite at times.
    """
    check_made(sim, SimulatedModel)
    check_batches(batches)
    training, ranks = sim.training, Ranks()
    with ranks.together():
        sim.set_phase("calibrating")
    sim.eval()
    try:
        with torch.no_grad():
            _observe(sim, batches, ranks)
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


def _observe(sim: SimulatedModel, batches: Iterable[Batch], ranks: Ranks) -> None:
    """Shows the data to every observer, and joins what those of several processes saw.

    Processes talk between the passes only, so that they may have different numbers of batches.
    """
    observers = {q.name: q.observer for q in sim.activation_quantizers().values() if q.observer is not None}
    if ranks.size > 1:
        for observer in observers.values():
            observer.which_pass = "first"
    with ranks.together():
        if ranks.size > 1:
            _check_joinable(observers, batches)
        n = _look(sim, batches)
    if int(ranks.total(torch.tensor(n))) == 0:
        raise DataError("found no calibration batches, wanted at least one")
    for observer in observers.values():
        observer.merge(ranks)
    if ranks.size == 1 or not any(observer.method.two_passes for observer in observers.values()):
        return
    for observer in observers.values():
        observer.start_second_pass()
    with ranks.together():
        again = _look(sim, batches)
        if again != n:
            raise DataError(f"found {n} calibration batches in the first pass and {again} in the second; pass a list")
    for observer in observers.values():
        observer.merge(ranks)


def _check_joinable(observers: dict[str, Observer], batches: Iterable[Batch]) -> None:
    for name, observer in observers.items():
        if observer.method.alone:
            raise PlanError(
                f"{name}: its observer works in a single process only: {observer.method.alone}; "
                "use 'minmax', 'histogram', 'percentile' or 'mse'"
            )
    if any(observer.method.two_passes for observer in observers.values()) and isinstance(batches, Iterator):
        raise DataError(
            f"found a {type(batches).__name__} of calibration batches, which can be read once; with several processes "
            "the observer 'histogram' reads them twice: pass a list or a DataLoader, or use 'minmax' or 'mse'"
        )


def _look(sim: SimulatedModel, batches: Iterable[Batch]) -> int:
    """Runs the batches through the model; returns how many there were."""
    n = 0
    for n, batch in enumerate(batches, start=1):
        for tensor in sim.plan.program.signature.flatten(batch):
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"calibration batch {n} holds NaN or infinite inputs; clean the data")
        sim.call(batch)
    return n
