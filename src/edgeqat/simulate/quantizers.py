"""All quantizers of a simulation, and the one phase they are in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgeqat.errors import PhaseError
from edgeqat.simulate.fake_quant import ActivationQuantizer, Quantizer
from edgeqat.simulate.parameter_quantizers import WeightQuantizer
from edgeqat.simulate.phases import CALIBRATING, CONVERTED, FLOAT, PHASES, QUANTIZED, check_move

__all__ = ["Quantizers", "key_of"]


class Quantizers(nn.ModuleDict):
    """The quantizers by name; their phase is saved and loaded with them.

    Attributes:
        phase: "float", "calibrating", "quantized" or "converted" (see `edgeqat.simulate.phases`).
    """

    def __init__(self, quantizers: Mapping[str, Quantizer]) -> None:
        super().__init__({key_of(name): q for name, q in quantizers.items()})
        self.phase = FLOAT
        self.register_load_state_dict_post_hook(_read_grids)  # type: ignore[no-untyped-call]

    def activations(self) -> dict[str, ActivationQuantizer]:
        """By the name of the first value on their grid."""
        return {q.name: q for q in self.values() if isinstance(q, ActivationQuantizer)}

    def weights(self) -> dict[str, WeightQuantizer]:
        """By the name of the parameter."""
        return {q.name: q for q in self.values() if isinstance(q, WeightQuantizer)}

    def set_phase(self, phase: str) -> None:
        """Switches what every quantizer does.

        Raises:
            PhaseError: The phase is unknown or may not follow the present one, or a grid that it needs is missing.
        """
        check_move(self.phase, phase)
        if phase in (QUANTIZED, CONVERTED):
            for quantizer in [*self.activations().values(), *self.weights().values()]:
                if not quantizer.calibrated:
                    raise PhaseError(f"{quantizer.name} has no grid yet; call edgeqat.calibrate(sim, batches) first")
        if phase == CALIBRATING:
            self._start_observing()
        self._enter(phase)

    def train(self, mode: bool = True) -> Quantizers:
        """As any module's; and reads grids that something else wrote, as DistributedDataParallel does."""
        super().train(mode)
        _read_grids(self)
        return self

    def _start_observing(self) -> None:
        try:
            for activation in self.activations().values():
                activation.start_observing()
        except BaseException:
            self._enter(self.phase)  # an observer that cannot be made leaves all as it was
            raise

    def _enter(self, phase: str) -> None:
        for module in self.values():
            assert isinstance(module, Quantizer)
            if phase == CALIBRATING:
                module.mode = "observe" if isinstance(module, ActivationQuantizer) else "float"
            else:
                module.mode = "float" if phase == FLOAT else "quantize"
                if isinstance(module, ActivationQuantizer):
                    module.observer = None
        self.phase = phase
        _read_grids(self)

    def get_extra_state(self) -> Tensor:
        """The phase, as a uint8 0-d tensor; calibrating is saved as float, for observers are not saved."""
        return torch.tensor(PHASES.index(FLOAT if self.phase == CALIBRATING else self.phase), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Enters the phase that a state_dict was saved in; its grids come with it."""
        self._enter(PHASES[int(state)])


def _read_grids(module: nn.Module, _: object = None) -> None:
    """Reads frozen grids as numbers once they stand, so that no step, and no compiled graph, waits for a tensor."""
    assert isinstance(module, Quantizers)
    for quantizer in module.activations().values():
        quantizer.read_grid()


def key_of(name: str) -> str:
    """A dotted name as a key of a ModuleDict, which takes no dots."""
    return name.replace(".", "/")
