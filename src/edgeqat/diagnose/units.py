"""What can be quantized or left in float on its own: the layers of a simulation, their parts, and its other values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgeqat.diagnose.switches import switchable
from edgeqat.program import WEIGHTED, Op
from edgeqat.simulate.model import SimulatedModel

__all__ = ["PARTS", "WHOLE", "Unit", "units_of"]

PARTS = ("layer", "input", "weight", "output", "value")

WHOLE = ("layer", "value")
"""The parts that a network falls into: a layer's weight and output are in it, its input is another's output."""


@dataclass(frozen=True)
class Unit:
    """Something that has switches of its own.

    Attributes:
        name: Of a layer or one of its parts, the layer's; else the value's.
        module: Dotted name of the module, as `QConfigMapping.set_module_name` takes it; "" where none holds it.
        part: "layer" (its weight and its output), "input", "weight" or "output" of a layer; "value" for what no layer
            makes: an input that enters the integers, a sum, a pool, an operand.
        quantizers: The names to be given to `quantizing`.
    """

    name: str
    module: str
    part: str
    quantizers: tuple[str, ...]


def units_of(sim: SimulatedModel) -> list[Unit]:
    """The units of a simulation in the order of its ops; each layer is followed by its parts.

    A module that is called several times is one layer, for its calls share a weight.
    """
    program, known = sim.plan.program, switchable(sim)
    layers: dict[str, list[Op]] = {}
    for op in program.ops:
        if op.kind in WEIGHTED:
            layers.setdefault(_module(op) or op.name, []).append(op)
    owners = {id(program.grid_of(name)): name for name in sim.activation_quantizers()}

    def grids(values: Iterable[str]) -> tuple[str, ...]:
        found = [owners[id(v.grid)] for v in map(program.values.__getitem__, values) if v.grid is not None]
        return tuple(name for name in dict.fromkeys(found) if name in known)

    outputs = {name: grids(op.name for op in ops) for name, ops in layers.items()}
    made_by_layers = {name for names in outputs.values() for name in names}
    units: list[Unit] = []
    for op in program.ops:
        name = _module(op) or op.name
        if op.kind in WEIGHTED:
            ops = layers.pop(name, [])
            if ops:
                weights = tuple(dict.fromkeys(op.weight for op in ops if op.weight is not None))
                units += _layer(name, _module(op), grids(op.inputs[0] for op in ops), weights, outputs[name])
        elif op.name in known and op.name not in made_by_layers:
            units.append(Unit(op.name, _module(op), "value", (op.name,)))
    return units


def _layer(
    name: str, module: str, inputs: tuple[str, ...], weights: tuple[str, ...], outputs: tuple[str, ...]
) -> list[Unit]:
    parts = {"layer": (*weights, *outputs), "input": inputs, "weight": weights, "output": outputs}
    return [Unit(name, module, part, quantizers) for part, quantizers in parts.items() if quantizers]


def _module(op: Op) -> str:
    return op.origins[0].module if op.origins else ""
