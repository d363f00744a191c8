"""SimulatedModel: the user's model as a trainable nn.Module in which every value with a grid is quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgeqat.errors import PhaseError, PlanError
from edgeqat.graph.capture import innermost_module
from edgeqat.graph.fuse import FusedGraph
from edgeqat.interpreter.arithmetic import resolve_arithmetic
from edgeqat.interpreter.run import Interpreter
from edgeqat.planning import Plan
from edgeqat.program import Kind
from edgeqat.signature import call_of
from edgeqat.simulate.fake_quant import ActivationQuantizer, Quantizer
from edgeqat.simulate.freeze import freeze
from edgeqat.simulate.op_parameters import OpParameters
from edgeqat.simulate.parameter_quantizers import WeightQuantizer
from edgeqat.simulate.quantizers import Quantizers
from edgeqat.simulate.to_float import to_float

__all__ = ["SimulatedModel"]


class NotPickled:
    """Stands in a simulation, whose captured graph cannot be pickled, to say so before pickle fails at its inside."""

    def __reduce__(self) -> str:
        raise PhaseError(
            "a simulation cannot be pickled: save sim.state_dict(), and load it into what edgeqat.prepare makes of "
            "the same model; in another process, prepare there"
        )

    def __deepcopy__(self, memo: object) -> NotPickled:
        return self


class SimulatedModel(nn.Module):
    """A model under simulated quantization, made by `prepare`.

    An ordinary module: train it, copy it, save its state_dict, which carries the phase too. Parameters keep the
    names they had; a conv that absorbed a batch norm has a bias beside its weight. It starts in phase "float";
    `calibrate` moves it to "quantized", `convert` to "converted" (see `edgeqat.simulate.phases`).

    Attributes:
        fused: The captured graph it simulates.
        plan: What was decided.
        parameters_of: What each conv and linear computes with, by op.
    """

    def __init__(
        self,
        fused: FusedGraph,
        plan: Plan,
        root: nn.Module,
        graph: fx.Graph,
        quantizers: Mapping[str, Quantizer],
        parameters: Mapping[str, OpParameters],
    ) -> None:
        self._not_pickled = NotPickled()  # before all else, so that pickle meets it first
        super().__init__()
        for name, child in root.named_children():
            self.add_module(self._free(name), child)
        for name, parameter in root.named_parameters(recurse=False):
            self.register_parameter(self._free(name), parameter)
        for name, buffer in root.named_buffers(recurse=False):
            persistent = name not in root._non_persistent_buffers_set
            self.register_buffer(self._free(name), buffer, persistent=persistent)
        self.quantizers = Quantizers(quantizers)
        self.fused, self.plan = fused, plan
        self.parameters_of: Mapping[str, OpParameters] = dict(parameters)
        # fx writes the forward function; it reads everything from the module that it is called with.
        self._run: Callable[..., tuple[Tensor, ...]] = type(fx.GraphModule(self, graph)).forward
        self._graph = graph
        self._norms_frozen = False
        self._exact: Interpreter | None = None

    def _free(self, name: str) -> str:
        if name in ("quantizers", "fused", "plan", "parameters_of") or hasattr(type(self), name):
            raise PlanError(f"the model's own {name!r} collides with a name edgeqat uses; rename it")
        return name

    @property
    def phase(self) -> str:
        """ "float", "calibrating", "quantized" or "converted"."""
        return self.quantizers.phase

    @property
    def forward_graph(self) -> fx.Graph:
        """What forward computes, node by node: flat inputs to flat outputs. To be read, not changed."""
        return self._graph

    def set_phase(self, phase: str) -> None:
        """Switches what every quantizer does.

        Raises:
            PhaseError: The phase is unknown or may not follow the present one, or "quantized" before calibration.
        """
        self.quantizers.set_phase(phase)

    def train(self, mode: bool = True) -> SimulatedModel:
        """Switches between training and evaluation; live batch norms that were frozen stay in evaluation.

        Grids that something else wrote meanwhile are in use from here on: DistributedDataParallel gives those of the
        first process to all.
        """
        super().train(mode)
        if self._norms_frozen:
            for norm in self.live_norms():
                norm.eval()
        return self

    def live_norms(self) -> list[_BatchNorm]:
        """The batch norms that are trained here and folded by convert."""
        names = dict.fromkeys(p.norm for p in self.parameters_of.values() if p.norm is not None)
        norms = [self.get_submodule(name) for name in names]
        return [norm for norm in norms if isinstance(norm, _BatchNorm)]

    def freeze_batch_norm(self, frozen: bool = True) -> None:
        """Live batch norms normalise by their running statistics from now on, which stay as they are.

        Their gamma and beta are trained on. The effect is that of `eval()` on each, but it survives `train()`.
        """
        self._norms_frozen = frozen
        self.train(self.training)

    def range_parameters(self) -> list[nn.Parameter]:
        """The learned scales and offsets."""
        return list(self.quantizers.parameters())

    @property
    def ranges(self) -> str:
        """ "learned" where training moves a range, else "frozen"."""
        return "learned" if any(p.requires_grad for p in self.range_parameters()) else "frozen"

    def freeze_ranges(self, frozen: bool = True) -> None:
        """Stops, or starts again, the learning of learned ranges."""
        for parameter in self.range_parameters():
            parameter.requires_grad_(not frozen)

    def activation_quantizers(self) -> dict[str, ActivationQuantizer]:
        """By the name of the first value on their grid."""
        return self.quantizers.activations()

    def weight_quantizers(self) -> dict[str, WeightQuantizer]:
        """By the name of the parameter."""
        return self.quantizers.weights()

    def quantizer_of(self, value: str) -> ActivationQuantizer:
        """The quantizer whose grid a value is on, be it its own or one it shares."""
        return self._quantizers_by_grid()[id(self.plan.program.grid_of(value))]

    def _quantizers_by_grid(self) -> dict[int, ActivationQuantizer]:
        return {id(self.plan.program.grid_of(name)): q for name, q in self.activation_quantizers().items()}

    def reserve_bias_ranges(self) -> None:
        """Keeps every bias inside int32, whatever scales calibration and learning found."""
        weights, owners = self.weight_quantizers(), self._quantizers_by_grid()
        for op in self.plan.program.ops:
            own = self.parameters_of.get(op.name)
            if own is not None and own.bias is not None and own.norm is None:
                scale = owners[id(self.plan.program.grid_of(op.inputs[0]))].scale_now()
                weights[own.weight].reserve(self.get_parameter(own.bias), scale)

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
        interpreter = Interpreter(freeze(self), resolve_arithmetic(arithmetic))
        previous, self._exact = self._exact, interpreter
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                yield self
        finally:
            self._exact = previous

    def to_float(self) -> nn.Module:
        """The user's own class with the trained weights, in float; its state_dict loads into the original code.

        A batch norm that was folded stands behind its conv again, with the statistics that it had, and the weights
        before it are divided by its gain: in eval mode the model computes what this simulation computes in float,
        up to float32 rounding. Grids are left behind. What a FusionPattern replaced before capture stays replaced.

        Returns:
            A new module on the device of the simulation's parameters, in the mode the original had.

        Raises:
            PlanError: A folded batch norm followed several layers without biases, so that no one bias undoes it.
        """
        return to_float(self)

    def __repr__(self) -> str:
        """The plan with the grids found so far."""
        lines, owners = [f"SimulatedModel, phase {self.phase}"], self._quantizers_by_grid()
        for op in (op for op in self.plan.program.ops if op.kind is not Kind.FLOAT):
            value = self.plan.program.values[op.name]
            grid = "float" if value.grid is None else owners[id(value.grid)].extra_repr()
            reads = [self.plan.program.values[name].grid for name in op.inputs]
            inputs = ", ".join("float" if g is None else owners[id(g)].name for g in dict.fromkeys(reads))
            weight = "" if op.weight is None else f", weight {self.weight_quantizers()[op.weight].extra_repr()}"
            fused = " + ".join(o.describe() for o in op.origins)
            group = next((f" in {o.group}" for o in op.origins if o.group), "")
            lines.append(f"  ({op.name}): {op.kind.value} [{fused}]{group} of {inputs}{weight} -> {grid}")
        for origin in self.plan.program.float_origins():
            lines.append(f"  ({origin.describe()}): float, {origin.reason}")
        return "\n".join([*lines, self.plan.totals()])
