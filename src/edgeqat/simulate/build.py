"""Building a simulation: the captured graph again, with folded weights and a quantizer at every grid."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from edgeqat.graph.capture import capture
from edgeqat.graph.fold_bn import fold_region
from edgeqat.graph.form import is_tensor
from edgeqat.graph.forms import PROBABILITIES
from edgeqat.graph.fuse import FusedGraph, Region, fuse
from edgeqat.graph.normalize import scale_of_norm
from edgeqat.graph.patterns import Fusion
from edgeqat.graph.pixels import PixelFold, Pixels
from edgeqat.graph.replace_blocks import replace_blocks
from edgeqat.grid_rules import activation_of
from edgeqat.lookup import fixed_grid
from edgeqat.op_attrs import LookupAttrs
from edgeqat.planning import Plan, check_float_module, plan_graph
from edgeqat.program import PASSTHROUGH, WEIGHTED, Kind, Op
from edgeqat.signature import Batch
from edgeqat.simulate.fake_quant import ActivationQuantizer, Quantizer, SharedGrid
from edgeqat.simulate.model import SimulatedModel
from edgeqat.simulate.op_parameters import OpParameters
from edgeqat.simulate.operand_quantizer import OperandQuantizer
from edgeqat.simulate.parameter_quantizers import BiasQuantizer, WeightQuantizer
from edgeqat.simulate.pixel_quantizer import PixelQuantizer
from edgeqat.simulate.quantizers import key_of

__all__ = ["prepare", "simulate"]

aten = torch.ops.aten
FILLED = frozenset(
    {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default}
    | {aten.zeros_like.default, aten.ones_like.default, aten.full_like.default}
)
"""Ops that read nothing of a tensor but its size."""


def prepare(
    model: nn.Module,
    example_inputs: Batch,
    target: str | Sequence[str] = "onnxruntime",
    qconfig_mapping: Any = None,
    fusions: Sequence[Fusion] = (),
    *,
    batch_norm: str = "fold",
    opaque: Sequence[str] = (),
    dynamic_size: bool = False,
    pixels: Pixels | None = None,
) -> SimulatedModel:
    """Captures, fuses and plans `model`, and builds its simulation; the model itself is left as it was.

    Args:
        model: An unmodified float module.
        example_inputs: A tensor, tuple (positional) or dict (keyword) of inputs; dimension 0 is the batch.
        target: The runtime, or several that one plan must satisfy; or the path of a YAML file that describes a target
            of your own.
        qconfig_mapping: QConfigMapping or QConfig, ours or torch.ao's; None for the target's default.
        fusions: FusionPatterns, each of whose blocks is quantized as one or replaced before capture; and lists of
            module names that must become one region.
        batch_norm: "fold": each batch norm is folded into the weights before it now, and is gone. "live": it stays
            and is trained, behind the quantized raw weights; `convert` folds it into their scales per channel.
        opaque: Submodules kept in float as a whole, by dotted name or by class name: ones that torch.export cannot
            look into. Each takes tensors by position, and gives a tensor or a tuple of them. They are trained like
            all else. TorchScript runs one that torch.jit.script can compile; ONNX one that torch.export could take.
        dynamic_size: Whether the height and width of [N, C, H, W] inputs may differ from the example's, in the
            simulation and in ONNX Runtime; a TorchScript file has those it was traced with.
        pixels: The model's normalisation, if the file is to take images as uint8 pixels [N, C, H, W]. It goes into the
            weights of the first convolutions, and every batch from here on, the example inputs included, holds uint8
            images. Where something else than a convolution in integers reads them, it is done in float, and the plan
            says why.

    Returns:
        The simulation, in phase "float": calibrate it next.

    Raises:
        CaptureError: torch.export cannot export the model.
        PlanError: The settings cannot be satisfied.
        InputError: The example inputs cannot be used.
    """
    check_float_module(model)
    model, refused = replace_blocks(model, example_inputs, fusions, pixels)
    fused = fuse(capture(model, example_inputs, opaque, dynamic_size, pixels), fusions, refused)
    sim = simulate(fused, plan_graph(fused, qconfig_mapping, target, batch_norm))
    return sim.train(model.training)


def simulate(fused: FusedGraph, plan: Plan) -> SimulatedModel:
    """The trainable simulation of a plan; batch norms are folded into the weights first, or stay behind them."""
    return _Builder(fused, plan).build()


class _Builder:
    """Copies the captured graph node by node, putting quantizers where the plan has grids.

    In a simulation a quantized value and its dequantized twin are the same float tensor. `made` holds that tensor
    for each captured node.
    """

    def __init__(self, fused: FusedGraph, plan: Plan) -> None:
        self.fused, self.plan = fused, plan
        self.root = copy.deepcopy(fused.captured.root)
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.twins: dict[tuple[str, fx.Node], fx.Node] = {}
        self.quantizers: dict[str, Quantizer] = {}
        self.parameters: dict[str, OpParameters] = {}
        self.makers: dict[str, Op] = {op.name: op for op in plan.program.ops}
        entering = (Kind.QUANTIZE, Kind.CONSTANT)
        self.quantized_here = {op.name for op in plan.program.ops if op.kind in entering}
        self.unchanging = {r.name for r in fused.regions if not _changes(r.anchor)}
        self.probabilities = {r.name for r in fused.regions if r.anchor.target in PROBABILITIES}
        others = (*entering, Kind.DEQUANTIZE, Kind.FLOAT)
        self.ops: dict[str, Op] = {op.name: op for op in plan.program.ops if op.kind not in others}
        self.owners = {id(plan.program.grid_of(name)): name for name in plan.activations}

    def build(self) -> SimulatedModel:
        output = None
        regions = {node: region for region in self.fused.regions for node in region.nodes[-1:]}
        for node in self.fused.captured.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = self.graph.placeholder(str(node.target))
            elif node in regions:
                self._region(regions[node])
            elif node.op == "output":
                output = tuple(self._read(n) for n in node.args[0])
        assert output is not None
        self.graph.output(output)
        return SimulatedModel(self.fused, self.plan, self.root, self.graph, self.quantizers, self.parameters)

    def _region(self, region: Region) -> None:
        if self.fused.normalises(region) and self._pixels(region.anchor):
            return
        # A mean without keepdim became a pool and a view; the pool is what reads the region's input.
        # A ReLU that is an op of its own follows what it was fused into, whose quantizer does what it does.
        op = self.ops.get(f"{region.name}:unclamped", self.ops.get(region.name))
        op = self.ops.get(f"{region.name}:pooled", op)
        if op is None:  # float, or dropout: as it was
            for node in region.nodes:
                self.made[node] = self._copy(node)
            return
        if op.kind in WEIGHTED:
            result = self._weighted(region, op)
        else:
            assert region.form is not None
            inputs = {n: self._input(op.inputs[i], n) for i, n in enumerate(region.form.inputs)}
            anchor = region.anchor
            result = self.graph.node_copy(anchor, lambda n: inputs[n] if n in inputs else self._read(n))
        name = op.name
        if name in self.plan.activations:
            assert region.form is not None
            result = self._quantize(name, activation_of(region.form.attrs), result)
        elif op.kind is Kind.AVERAGE_POOL and self.plan.program.values[name].grid is not None:
            owner = self.quantizers[self._grid_owner(name)]
            assert isinstance(owner, ActivationQuantizer)
            self.quantizers[name] = SharedGrid(name, owner)
            result = self.graph.call_module(f"quantizers.{key_of(name)}", (result,))
        elif op.kind not in PASSTHROUGH and region.activation is not None:
            result = self.graph.node_copy(region.activation, lambda _: result)
        self.made[region.outputs[0]] = result

    def _pixels(self, normalised: fx.Node) -> bool:
        """Makes of an input's pixels what convolutions that normalise them read; False where that is done in float."""
        (source,) = normalised.all_input_nodes
        name = self.fused.captured.placeholders()[source]
        grid = self.plan.program.values[name].grid
        if grid is None:
            return False
        self.quantizers[name] = PixelQuantizer(name, self.plan.activations[name], grid)
        self.made[normalised] = self.graph.call_module(f"quantizers.{key_of(name)}", (self._read(source),))
        return True

    def _fold_of(self, op: Op) -> PixelFold | None:
        """The normalisation that an op does, None where it reads something else than pixels, perhaps padded."""
        name, program = op.inputs[0], self.plan.program
        while name in self.ops and self.ops[name].kind is Kind.PAD:
            name = self.ops[name].inputs[0]
        if name not in program.inputs or program.values[name].grid is None:
            return None
        assert self.fused.captured.pixels is not None
        return self.fused.captured.pixels.fold(program.grid_of(name))

    def _weighted(self, region: Region, op: Op) -> fx.Node:
        """A conv or linear over quantized input, weight and bias; behind it its batch norm, if that is live."""
        assert region.form is not None and op.weight is not None
        x = self._input(op.inputs[0], region.form.inputs[0])
        norm = (
            str(region.batch_norm.target) if self.plan.batch_norm == "live" and region.batch_norm is not None else None
        )
        pixels = self._fold_of(op)
        bias_name = fold_region(self.root, region, self.fused.captured.root, norm is not None, pixels)
        self.parameters[op.name] = OpParameters(op.weight, bias_name, norm, pixels)
        if norm is not None and op.weight == scale_of_norm(norm):  # the live norm trains its own gain
            self.root.get_parameter(op.weight).requires_grad_(False)
        self._add_weight_quantizer(op.weight)
        pair = self.graph.call_module(f"quantizers.{key_of(op.weight)}", (self.graph.get_attr(op.weight),))
        quantized = self.graph.call_function(operator.getitem, (pair, 0))
        bias: fx.Node | None = None
        if bias_name is not None:
            bias = self.graph.get_attr(bias_name)
            if norm is None:  # else the bias that the runtime holds is known once the norm is folded
                name = f"{op.name}:bias"
                owner = self.quantizers[self._grid_owner(op.inputs[0])]
                assert isinstance(owner, ActivationQuantizer)
                self.quantizers[name] = BiasQuantizer(name, owner)
                scale = self.graph.call_function(operator.getitem, (pair, 1))
                bias = self.graph.call_module(f"quantizers.{key_of(name)}", (bias, scale))
        _, _, _, *rest = [*region.anchor.args, None][: max(3, len(region.anchor.args))]
        kwargs = {k: v for k, v in region.anchor.kwargs.items() if k not in ("input", "weight", "bias")}
        assert callable(region.anchor.target)
        made = self.graph.call_function(region.anchor.target, (x, quantized, bias, *rest), kwargs)
        made.meta = dict(region.anchor.meta)  # says which module it comes from
        return made if norm is None else self.graph.call_module(norm, (made,))

    def _add_weight_quantizer(self, name: str) -> None:
        if name not in self.quantizers:
            grid, parameter = self.plan.program.consts[name].grid, self.root.get_parameter(name)
            power_of_two = bool(self.plan.grid_rules.power_of_two_weights)
            self.quantizers[name] = WeightQuantizer(name, self.plan.weights[name], grid, parameter, power_of_two)

    def _grid_owner(self, value: str) -> str:
        """The first value on the grid of `value`."""
        return self.owners[id(self.plan.program.grid_of(value))]

    def _input(self, value: str, node: fx.Node) -> fx.Node:
        """What an integer op reads: the tensor of `node`, quantized here if the plan quantizes it on the way in."""
        made = self._read(node)
        if value not in self.quantized_here:
            return made
        if (value, node) not in self.twins:
            self.twins[value, node] = self._quantize(value, None, made)
        return self.twins[value, node]

    def _quantize(self, name: str, activation: str | None, x: fx.Node) -> fx.Node:
        if name not in self.quantizers:
            self.quantizers[name] = self._new_quantizer(name, activation)
        return self.graph.call_module(f"quantizers.{key_of(name)}", (x,))

    def _new_quantizer(self, name: str, activation: str | None) -> ActivationQuantizer:
        config, op, fixed = self.plan.activations[name], self.makers.get(name), None
        constant = op is not None and (op.kind is Kind.CONSTANT or op.inputs[0] in self.unchanging)
        rules = self.plan.grid_rules
        symmetric = bool(rules.symmetric)
        if op is not None and isinstance(op.attrs, LookupAttrs):
            fixed = fixed_grid(op.attrs.function, config.bits, symmetric)
        elif op is not None and op.kind is Kind.QUANTIZE and op.inputs[0] in self.probabilities:
            fixed = fixed_grid("sigmoid", config.bits, symmetric)
        if fixed is not None:
            config = replace(config, learned=False)
        elif constant:
            config = replace(config, observer="minmax", observer_args=(), learned=False)
        saves_bytes = self.plan.batch_norm == "live"
        kind = OperandQuantizer if constant and fixed is None else ActivationQuantizer
        return kind(name, config, activation, fixed, constant, saves_bytes, rules)

    def _read(self, node: fx.Node) -> fx.Node:
        """The copy of a captured node; parameters and sizes are copied where they are first read."""
        if node not in self.made:
            self.made[node] = self._copy(node)
        return self.made[node]

    def _copy(self, node: fx.Node) -> fx.Node:
        for source in node.all_input_nodes:
            self._read(source)
        return self.graph.node_copy(node, lambda n: self.made[n])


def _changes(node: fx.Node) -> bool:
    """Whether a node's values may depend on those of the model's inputs: sizes and parameters do not."""
    return node.target not in FILLED and any(is_tensor(n) and n.op != "get_attr" for n in node.all_input_nodes)
