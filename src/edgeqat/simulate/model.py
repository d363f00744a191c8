"""SimulatedModel: the user's model as a trainable nn.Module in which every value with a grid is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgeqat.errors import PhaseError, PlanError
from edgeqat.graph.capture import innermost_module
from edgeqat.graph.fuse import FusedGraph
from edgeqat.interpreter.arithmetic import resolve_arithmetic
from edgeqat.interpreter.run import Interpreter
from edgeqat.planning import Plan
from edgeqat.program import Kind
from edgeqat.signature import call_of
from edgeqat.simulate.fake_quant import ActivationQuantizer, Quantizer, WeightQuantizer
from edgeqat.simulate.freeze import convert

__all__ = ["SimulatedModel"]

PHASES = ("float", "calibrating", "quantized")


class SimulatedModel(nn.Module):
    """A model under simulated quantization, made by `prepare`.

    An ordinary module: train it, copy it, save its state_dict. Parameters keep the names they had; a conv that
    absorbed a batch norm has a bias beside its weight. It starts in phase "float"; `calibrate` moves it to
    "quantized".

    Attributes:
        fused: The captured graph it simulates.
        plan: What was decided.
        biases: Dotted name of each op's bias parameter, by op.
    """

    def __init__(
        self,
        fused: FusedGraph,
        plan: Plan,
        root: nn.Module,
        graph: fx.Graph,
        quantizers: Mapping[str, Quantizer],
        biases: Mapping[str, str],
    ) -> None:
        super().__init__()
        for name, child in root.named_children():
            self.add_module(self._free(name), child)
        for name, parameter in root.named_parameters(recurse=False):
            self.register_parameter(self._free(name), parameter)
        for name, buffer in root.named_buffers(recurse=False):
            persistent = name not in root._non_persistent_buffers_set
            self.register_buffer(self._free(name), buffer, persistent=persistent)
        self.quantizers = nn.ModuleDict({key_of(name): q for name, q in quantizers.items()})
        self.fused, self.plan = fused, plan
        self.biases: Mapping[str, str] = dict(biases)
        # fx writes the forward function; it reads everything from the module that it is called with.
        self._run: Callable[..., tuple[Tensor, ...]] = type(fx.GraphModule(self, graph)).forward
        self._graph = graph
        self._phase = "float"
        self._exact: Interpreter | None = None

    def _free(self, name: str) -> str:
        if name in ("quantizers", "fused", "plan", "biases") or hasattr(type(self), name):
            raise PlanError(f"the model's own {name!r} collides with a name edgeqat uses; rename it")
        return name

    @property
    def phase(self) -> str:
        """ "float", "calibrating" or "quantized"."""
        return self._phase

    def set_phase(self, phase: str) -> None:
        """Switches what every quantizer does.

        Raises:
            PhaseError: The phase is unknown, or "quantized" before calibration.
        """
        if phase not in PHASES:
            raise PhaseError(f"found the phase {phase!r}, wanted one of {', '.join(PHASES)}")
        for quantizer in self.activation_quantizers().values():
            if phase == "calibrating":
                quantizer.start_observing()
            elif phase == "quantized" and not quantizer.calibrated:
                raise PhaseError(f"{quantizer.name} has no grid yet; call edgeqat.calibrate(sim, batches) first")
        for module in self.quantizers.values():
            assert isinstance(module, Quantizer)
            if phase == "calibrating":
                module.mode = "observe" if isinstance(module, ActivationQuantizer) else "float"
            else:
                module.mode = "quantize" if phase == "quantized" else "float"
        self._phase = phase

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """By the name of the first value on their grid."""
        return {q.name: q for q in self.quantizers.values() if isinstance(q, ActivationQuantizer)}

    def weight_quantizers(self) -> dict[str, WeightQuantizer]:
        """By the name of the parameter."""
        return {q.name: q for q in self.quantizers.values() if isinstance(q, WeightQuantizer)}

    def quantizer_of(self, value: str) -> ActivationQuantizer:
        """The quantizer whose grid a value is on, be it its own or one it shares."""
        grid = self.plan.program.grid_of(value)
        for name, quantizer in self.activation_quantizers().items():
            if self.plan.program.values[name].grid is grid:
                return quantizer
        raise PhaseError(f"no quantizer holds the grid of {value!r}")

    def reserve_bias_ranges(self) -> None:
        """Keeps every bias inside int32, whatever the scales that calibration found."""
        weights = self.weight_quantizers()
        for op in self.plan.program.ops:
            if op.weight is not None and op.name in self.biases:
                scale = self.quantizer_of(op.inputs[0]).scale
                weight = self.get_parameter(op.weight)
                weights[op.weight].reserve(weight, self.get_parameter(self.biases[op.name]), scale)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output; the differentiable dequantized simulation, except inside `exact`."""
        if self._exact is not None:
            return self._exact.run(self.plan.program.signature.flatten_call(args, kwargs))
        inputs = self.plan.program.signature.flatten_call(args, kwargs)
        return self.plan.program.signature.unflatten(self._run(self, *inputs))

    def call(self, batch: Any) -> Any:
        """The model's output for a batch: a tensor, a tuple of positional or a dict of keyword inputs."""
        args, kwargs = call_of(batch)
        return self(*args, **kwargs)

    def traced(self, batch: Any) -> Iterator[tuple[str, Any]]:
        """Runs the simulation value by value, in the mode it is in: (name of the layer or grid, its output)."""
        inputs = self.plan.program.signature.flatten_call(*call_of(batch))
        interpreter = fx.Interpreter(self, garbage_collect_values=False, graph=self._graph)
        interpreter.args_iter = iter(inputs)
        for node in self._graph.nodes:
            if node.op == "output":
                return
            interpreter.env[node] = interpreter.run_node(node)
            quantizer = self.get_submodule(str(node.target)) if node.op == "call_module" else None
            name = quantizer.name if isinstance(quantizer, Quantizer) else innermost_module(node) or node.name
            yield name, interpreter.env[node]

    @contextmanager
    def exact(self, arithmetic: str) -> Iterator[SimulatedModel]:
        """Within it, forward computes a runtime's own integers, bit for bit: no gradient, no autocast, on the CPU.

        The weights are frozen on entry; what changes them inside has no effect there.

        Args:
            arithmetic: An arithmetic such as "onnxruntime/x86", or a runtime: its arithmetic on this machine.

        Raises:
            PhaseError: The simulation is not calibrated.
        """
        interpreter = Interpreter(convert(self), resolve_arithmetic(arithmetic))
        previous, self._exact = self._exact, interpreter
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                yield self
        finally:
            self._exact = previous

    def __repr__(self) -> str:
        """The plan with the grids found so far."""
        lines = [f"SimulatedModel, phase {self.phase}"]
        for op in (op for op in self.plan.program.ops if op.kind is not Kind.FLOAT):
            value = self.plan.program.values[op.name]
            grid = "float" if value.grid is None else self.quantizer_of(op.name).extra_repr()
            fused = " + ".join(o.describe() for o in op.origins)
            lines.append(f"  ({op.name}): {op.kind.value} [{fused}] -> {grid}")
        for origin in self.plan.program.float_origins():
            lines.append(f"  ({origin.describe()}): float, {origin.reason}")
        return "\n".join(lines)


def key_of(name: str) -> str:
    """A dotted name as a key of a ModuleDict, which takes no dots."""
    return name.replace(".", "/")
