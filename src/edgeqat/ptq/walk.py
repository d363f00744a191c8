"""A walk through a simulation, all batches in step, that stops at every conv and linear layer.

Beside the simulation walks its float twin, so that at each layer there is what the layer reads in the quantized
network so far, and what it should give. What is changed at a stop is seen by all that comes behind it. One pass does
for the whole network; the price is memory for the live values of every batch, twice.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edgeqat.errors import DataError, PhaseError, PlanError
from edgeqat.op_attrs import ConvAttrs, LinearAttrs
from edgeqat.program import WEIGHTED, Op
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.op_parameters import OpParameters
from edgeqat.simulate.parameter_quantizers import WeightQuantizer

__all__ = ["Layer", "check_calibrated", "check_folded", "evaluating", "float_twin_of", "shared_parameters", "walk"]


def check_folded(sim: SimulatedModel, what: str) -> None:
    """Raises PlanError where a batch norm is live: it would undo what is done to the weights before it."""
    live = next((p.norm for p in sim.parameters_of.values() if p.norm is not None), None)
    if live is not None:
        raise PlanError(f"{what} wants folded batch norms, and {live} is live; prepare with batch_norm='fold'")


def check_calibrated(sim: SimulatedModel, what: str) -> None:
    """Raises PhaseError unless the simulation is calibrated and open, PlanError where a batch norm is live."""
    if sim.phase != "quantized":
        way = "reopen it with set_phase('quantized')" if sim.phase == "converted" else "call edgeqat.calibrate first"
        raise PhaseError(f"{what} wants a calibrated simulation, and it is in phase {sim.phase}; {way}")
    check_folded(sim, what)


def shared_parameters(sim: SimulatedModel) -> dict[str, int]:
    """The weights and biases that several layers compute with, and how many do."""
    used = Counter(name for p in sim.parameters_of.values() for name in (p.weight, p.bias) if name is not None)
    return {name: n for name, n in used.items() if n > 1}


@contextmanager
def evaluating(sim: SimulatedModel) -> Iterator[None]:
    """Eval mode without gradients; afterwards the mode that it was in."""
    training = sim.training
    sim.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        sim.train(training)


def float_twin_of(sim: SimulatedModel, given: SimulatedModel | None) -> SimulatedModel:
    """A copy, in float and eval mode, of `given`; of `sim` where that is None.

    Raises:
        PlanError: `given` simulates another plan.
    """
    if given is not None and given.plan.program.plan_hash != sim.plan.program.plan_hash:
        raise PlanError(
            "the float twin simulates another plan; take a copy of this simulation, made before it changed"
        )
    twin = copy.deepcopy(sim if given is None else given).eval()
    twin.set_phase("float")
    return twin


@dataclass(frozen=True, eq=False)
class Layer:
    """A conv or linear layer on the walk, before it is computed.

    Attributes:
        op: Its op in the plan.
        parameters: The names of what it computes with.
        inputs: What it reads in the simulation, a tensor a batch.
        targets: What it gives in the float twin, before its activation function, a tensor a batch.
    """

    op: Op
    parameters: OpParameters
    inputs: list[Tensor]
    targets: list[Tensor]
    _network: _Network
    _node: fx.Node

    @property
    def activation(self) -> str | None:
        """The activation function behind it: None, "relu" or "relu6"."""
        attrs = self.op.attrs
        return attrs.activation if isinstance(attrs, (ConvAttrs, LinearAttrs)) else None

    def bias(self) -> Tensor | None:
        """Its bias as the simulation rounds it, with the parameters as they are now."""
        return self._network.parameters(self._node)[1]

    def outputs(self) -> list[Tensor]:
        """What it gives with the parameters as they are now, before its activation function, a tensor a batch."""
        return self._network.compute(self._node, self.inputs)


def walk(sim: SimulatedModel, twin: SimulatedModel, batches: Iterable[Batch]) -> Iterator[Layer]:
    """The conv and linear layers in the order they are computed; what is done to one, the next ones read.

    Args:
        sim: In eval mode; its parameters may be changed between two layers, of the layer just met.
        twin: The same plan in float and eval mode.
        batches: Inputs.

    Raises:
        DataError: There is no batch.
    """
    inputs = [sim.plan.program.signature.flatten(batch) for batch in batches]
    if not inputs:
        raise DataError("found no calibration batches, wanted at least one")
    own, other = _Network(sim, inputs), _Network(twin, inputs)
    ops = iter([op for op in sim.plan.program.ops if op.kind in WEIGHTED])
    for node, twin_node in zip(own.nodes, other.nodes, strict=True):
        other.step(twin_node)
        if node in own.layers:
            op = next(ops)
            yield Layer(op, sim.parameters_of[op.name], own.read(node), other.given(twin_node), own, node)
        own.step(node)
        own.forget(node)
        other.forget(twin_node)


class _Network:
    """One of the two networks, with the values of every batch that are still to be read."""

    def __init__(self, sim: SimulatedModel, inputs: list[list[Tensor]]) -> None:
        graph = sim._graph
        self._interpreter = fx.Interpreter(sim, garbage_collect_values=False, graph=graph)
        self.layers = {node: _chain(node) for node in graph.nodes if _is_layer(sim, node)}
        apart = {node for chain in self.layers.values() for node in chain}
        self.nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output") and n not in apart]
        self._last_reader = {source: node for node in graph.nodes for source in node.all_input_nodes}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self._values: list[dict[fx.Node, Any]] = [dict(zip(placeholders, batch, strict=True)) for batch in inputs]

    def step(self, node: fx.Node) -> None:
        """Computes a node for every batch."""
        if node in self.layers:
            found: list[Any] = list(self.compute(node, self.read(node)))
        else:
            found = []
            for values in self._values:
                self._interpreter.env = values
                found.append(self._interpreter.run_node(node))
        for values, result in zip(self._values, found, strict=True):
            values[node] = result

    def forget(self, node: fx.Node) -> None:
        """Drops what this node was the last to read."""
        for source in node.all_input_nodes:
            if self._last_reader[source] is node:
                for values in self._values:
                    values.pop(source, None)

    def read(self, layer: fx.Node) -> list[Tensor]:
        """What a layer reads."""
        return [values[layer.args[0]] for values in self._values]  # type: ignore[index]

    def given(self, node: fx.Node) -> list[Tensor]:
        """What a node gave."""
        return [values[node] for values in self._values]

    def parameters(self, layer: fx.Node) -> tuple[Tensor, Tensor | None]:
        """A layer's weight and bias as it computes with them; they depend on no batch."""
        self._interpreter.env = {}
        for node in self.layers[layer]:
            self._interpreter.env[node] = self._interpreter.run_node(node)
        weight, bias = layer.args[1], layer.args[2]
        found = self._interpreter.env
        return found[weight], None if bias is None else found[bias]  # type: ignore[index]

    def compute(self, layer: fx.Node, inputs: list[Tensor]) -> list[Tensor]:
        """What a layer gives for each batch."""
        weight, bias = self.parameters(layer)
        assert callable(layer.target)
        return [layer.target(x, weight, bias, *layer.args[3:], **layer.kwargs) for x in inputs]


def _is_layer(sim: SimulatedModel, node: fx.Node) -> bool:
    """Whether a node is a conv or linear layer over a quantized weight, as `simulate` builds it."""
    if node.op != "call_function" or len(node.args) < 3:
        return False
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.target is not operator.getitem:
        return False
    maker = weight.args[0]
    if not isinstance(maker, fx.Node) or maker.op != "call_module":
        return False
    return isinstance(sim.get_submodule(str(maker.target)), WeightQuantizer)


def _chain(layer: fx.Node) -> list[fx.Node]:
    """What makes a layer's weight and bias out of parameters, in order."""
    chain: dict[fx.Node, None] = {}

    def add(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            add(source)
        chain[node] = None

    for argument in layer.args[1:3]:
        if isinstance(argument, fx.Node):
            add(argument)
    return list(chain)
