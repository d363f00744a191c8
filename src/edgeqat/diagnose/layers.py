"""The layers of a simulation as an override can name them, and which of them stand around each value and weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgeqat.float_reasons import FloatReasons
from edgeqat.graph.fuse import FusedGraph, Region
from edgeqat.graph.layer_ids import layer_ids
from edgeqat.program import PASSTHROUGH, Kind, Op, Value
from edgeqat.qconfig import QConfig
from edgeqat.qconfig_mapping import LayerId, QConfigMapping
from edgeqat.simulate.model import SimulatedModel
from edgeqat.target_rules import resolve_targets
from edgeqat.target_table import Target

__all__ = ["Layer", "Layers", "layers_of"]

NO_LAYERS = PASSTHROUGH | {Kind.QUANTIZE, Kind.DEQUANTIZE, Kind.CONSTANT, Kind.FLOAT}
"""Kinds that settings of their own would change nothing of: they move integers, or belong to what reads them."""

PARTS = re.compile(r":(pooled|unclamped)$")
"""What the plan adds to a region's name where the region becomes two ops."""


@dataclass(frozen=True)
class Layer:
    """What one override is about.

    Attributes:
        name: The module's dotted name; of an op that no library module stands for, `layer1.0 add 0`.
        selector: The keys of an override that name it, and it alone.
        weights: Elements of each weight, by the parameter's name.
        region: Its place in the graph; of a module that is called several times, that of the last call.
    """

    name: str
    selector: Mapping[str, str | int]
    weights: Mapping[str, int]
    region: Region


@dataclass(frozen=True)
class Layers:
    """All of them.

    Attributes:
        fused: The graph that they are in.
        targets: What it is planned for.
        by_name: In the order of the program.
        around: By the name of a weight, or of the first value on a grid: the layers that must be in float for it to be
            in float. Those that make and read it, for what reads a float value brings it onto the same grid again.
    """

    fused: FusedGraph
    targets: tuple[Target, ...]
    by_name: Mapping[str, Layer]
    around: Mapping[str, tuple[str, ...]]

    def qconfig_of(self, name: str, mapping: QConfigMapping) -> QConfig | None:
        """The settings that a layer has under a mapping; None for float."""
        return FloatReasons(self.fused, mapping, self.targets).qconfig_of(self.by_name[name].region)


def layers_of(sim: SimulatedModel, targets: str | Sequence[str]) -> Layers:
    """The layers of a simulation, planned for these targets, that run in integers."""
    program, ids = sim.plan.program, layer_ids(sim.fused.captured)
    regions = {region.name: region for region in sim.fused.regions}
    owners = {id(program.grid_of(name)): name for name in sim.plan.activations}
    found: dict[str, Layer] = {}
    around: dict[str, dict[str, None]] = {}
    for op in program.ops:
        if op.kind in NO_LAYERS:
            continue
        region = regions[PARTS.sub("", op.name)]
        own = _id_of(region, ids)
        name, selector = _named(own, region.group is not None)
        weights = {} if op.weight is None else {op.weight: sim.get_parameter(op.weight).numel()}
        known = found.get(name)
        weights = weights if known is None else {**known.weights, **weights}
        found[name] = Layer(name, selector, weights, region)
        for grid in _grids(op, program.values, owners):
            around.setdefault(grid, {})[name] = None
        for weight in weights:
            around.setdefault(weight, {})[name] = None
    groups = {grid: tuple(names) for grid, names in around.items()}
    return Layers(sim.fused, resolve_targets(targets), found, groups)


def _id_of(region: Region, ids: Mapping[str, LayerId]) -> LayerId:
    """A block of a pattern has its module's settings, all others have their own."""
    if region.group is not None:
        return LayerId(region.group.module, region.group.type)
    return ids[region.anchor.name]


def _named(layer: LayerId, is_block: bool) -> tuple[str, dict[str, str | int]]:
    if layer.module and (layer.is_library or is_block):
        return layer.module, {"module": layer.module}
    selector: dict[str, str | int] = {"regex": re.escape(layer.parent), "type": layer.kind, "index": layer.index}
    return f"{layer.parent or '<model>'} {layer.kind} {layer.index}", selector


def _grids(op: Op, values: Mapping[str, Value], owners: Mapping[int, str]) -> Iterable[str]:
    """The first value on each grid that an op makes or reads."""
    grids = [values[name].grid for name in (*op.inputs, *op.outputs)]
    return dict.fromkeys(owners[id(grid)] for grid in grids if grid is not None)
