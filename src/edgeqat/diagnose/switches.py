"""Switching the quantizers of a calibrated simulation on and off one by one, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeqat.errors import InputError, PhaseError
from edgeqat.simulate.fake_quant import Quantizer
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.operand_quantizer import OperandQuantizer
from edgeqat.simulate.phases import CONVERTED, QUANTIZED
from edgeqat.simulate.pixel_quantizer import PixelQuantizer

__all__ = ["evaluating", "quantizers_of", "quantizing", "switchable", "watching"]


def quantizers_of(sim: SimulatedModel) -> list[Quantizer]:
    """All of them, those that follow another one's switch included."""
    return [q for q in sim.quantizers.values() if isinstance(q, Quantizer)]


def switchable(sim: SimulatedModel) -> frozenset[str]:
    """The names that `quantizing` takes: of values with a grid of their own, and of weights.

    Pixels are integers whatever is switched, so an input of pixels has no switch.
    """
    values = sim.activation_quantizers().items()
    return frozenset([*(n for n, q in values if not isinstance(q, PixelQuantizer)), *sim.weight_quantizers()])


@contextmanager
def quantizing(sim: SimulatedModel, names: Collection[str]) -> Iterator[None]:
    """Within it only the values and weights that are named are quantized; the rest of the simulation is float.

    What shares a grid follows its owner. A bias is rounded to the integers of input scale times weight scale where
    both are quantized, for else there is no such grid. With no names it is the float model, with all that are
    `switchable` the quantized one, either to the bit. Every switch is put back on leaving.

    Args:
        sim: Calibrated.
        names: Of `switchable`, any of them.

    Raises:
        PhaseError: The simulation is not calibrated.
        InputError: A name is not switchable.
    """
    if sim.phase not in (QUANTIZED, CONVERTED):
        raise PhaseError(f"the simulation is in phase {sim.phase}; call edgeqat.calibrate(sim, batches) first")
    known, wanted = switchable(sim), frozenset(names)
    if not wanted <= known:
        raise InputError(
            f"found no quantizer of {min(wanted - known)!r}, wanted names such as {min(known, default='')!r}"
        )
    before = [(quantizer, quantizer.mode) for quantizer in quantizers_of(sim)]
    try:
        for quantizer, _ in before:
            on = quantizer.switch in wanted or quantizer.switch not in known
            quantizer.mode = "quantize" if on else "float"
        yield
    finally:
        for quantizer, mode in before:
            quantizer.mode = mode


@contextmanager
def evaluating(sim: SimulatedModel) -> Iterator[None]:
    """Within it the simulation is in eval mode, without gradients; on leaving all is what it was, module by module."""
    training = [(module, module.training) for module in sim.modules()]
    # The grid of an operand is written in every forward pass, so that it follows its parameter.
    operands = [q for q in quantizers_of(sim) if isinstance(q, OperandQuantizer)]
    grids = [(buffer, buffer.clone()) for q in operands for buffer in q.buffers()]
    sim.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training:
            module.training = mode
        for buffer, kept in grids:
            buffer.copy_(kept)


@contextmanager
def watching(sim: SimulatedModel, names: Collection[str], look: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within it `look` is shown, in every run, what the quantizers of these values give: (name, output)."""

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: look(name, output)

    quantizers = sim.activation_quantizers()
    handles = [quantizers[name].register_forward_hook(watch(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
