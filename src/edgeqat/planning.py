"""Planning: who gets which grid, and why what stays in float does. Decides; changes no model.

A plan is the quantized program with empty grids. It can be printed, compared and serialised.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from edgeqat.errors import InputError, PlanError
from edgeqat.float_reasons import FloatReasons
from edgeqat.graph.capture import capture
from edgeqat.graph.forms import Form
from edgeqat.graph.fuse import FusedGraph, Region, fuse
from edgeqat.graph.islands import build_island, island_inputs
from edgeqat.graph.patterns import Fusion
from edgeqat.graph.pixels import Pixels
from edgeqat.graph.replace_blocks import replace_blocks
from edgeqat.grid_rules import GridRules
from edgeqat.lookup import FUNCTIONS
from edgeqat.op_attrs import (
    AveragePoolAttrs,
    ClampAttrs,
    ConstantAttrs,
    ConvAttrs,
    LinearAttrs,
    LookupAttrs,
    NoAttrs,
    ViewAttrs,
)
from edgeqat.plan_table import Plan, PlanRow
from edgeqat.program import BATCH_DIM, PASSTHROUGH, Const, Grid, Kind, Op, QuantizedProgram, Value
from edgeqat.program_hash import hash_plan
from edgeqat.qconfig import REUSE_INPUT, ActivationConfig, QConfig, WeightConfig
from edgeqat.qconfig_mapping import QConfigMapping, as_mapping
from edgeqat.signature import Batch
from edgeqat.target_rules import resolve_targets
from edgeqat.target_table import Target

__all__ = ["BATCH_NORM_MODES", "Plan", "PlanRow", "check_float_module", "plan", "plan_graph"]

PIXEL_BITS = 8

BATCH_NORM_MODES = ("fold", "live")


def plan(
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
) -> Plan:
    """Plans the quantization of `model` without touching it; see `prepare` for the arguments.

    Raises:
        CaptureError: The model cannot be exported.
        PlanError: The settings cannot be satisfied.
    """
    check_float_module(model)
    model, refused = replace_blocks(model, example_inputs, fusions, pixels)
    fused = fuse(capture(model, example_inputs, opaque, dynamic_size, pixels), fusions, refused)
    return plan_graph(fused, qconfig_mapping, target, batch_norm)


def check_float_module(model: nn.Module) -> None:
    """Raises InputError for what `prepare` returned."""
    if isinstance(getattr(model, "plan", None), Plan):
        raise InputError(
            f"found a {type(model).__name__}, which is prepared already, wanted the float module that it was made of; "
            "calibrate it, or pass that"
        )


def plan_graph(
    fused: FusedGraph,
    qconfig_mapping: Any = None,
    target: str | Sequence[str] = "onnxruntime",
    batch_norm: str = "fold",
) -> Plan:
    """Decides for every region of a fused graph whether it runs in integers, and on which grids."""
    if batch_norm not in BATCH_NORM_MODES:
        raise PlanError(f"found batch_norm {batch_norm!r}, wanted one of {', '.join(BATCH_NORM_MODES)}")
    rules = resolve_targets(target)
    _check_sizes(fused, rules)
    planner = _Planner(fused, as_mapping(qconfig_mapping), rules, batch_norm)
    for region in fused.regions:
        planner.place(region)
    return planner.finish()


class _Planner:
    """Walks the regions once, in order, and writes the program down.

    Names it makes itself hold a colon, which no module name does, so that they never meet a user's.
    """

    def __init__(self, fused: FusedGraph, mapping: QConfigMapping, rules: tuple[Target, ...], batch_norm: str) -> None:
        self.fused, self.rules, self.batch_norm = fused, rules, batch_norm
        self.grids = GridRules.of(rules, batch_norm)
        self.reasons = FloatReasons(fused, mapping, rules)
        self.captured = fused.captured
        self.ops: list[Op] = []
        self.values: dict[str, Value] = {}
        self.consts: dict[str, Const] = {}
        self.activations: dict[str, ActivationConfig] = {}
        self.weights: dict[str, WeightConfig] = {}
        self.folded: list[str] = []
        self.named: dict[fx.Node, str] = {}
        self.pending: list[tuple[Region, str]] = []
        self.border_notes: dict[Region, str] = {}
        for node, name in self.captured.placeholders().items():
            self.named[node] = name
            self._value(
                name, self.captured.shape_of(node), None, "an input of the model", dtype=node.meta["val"].dtype
            )

    def place(self, region: Region) -> None:
        """Adds one region: to the program, or to the float island being collected."""
        source = region.anchor.all_input_nodes[0] if region.anchor.all_input_nodes else None
        if region.identity and source is not None and not self._is_pending(source):
            self.named[region.anchor] = self._name_of(source)
            return
        pixels = self.fused.normalises(region)
        reason = self._take_pixels(region) if pixels else self._why_float(region)
        if pixels and not reason:
            return
        if reason:
            self.pending.append((region, reason))
            for i, node in enumerate(region.outputs):
                self.named[node] = region.name if len(region.outputs) == 1 else f"{region.name}:{i}"
            return
        qconfig = self.reasons.qconfig_of(region)
        assert region.form is not None and qconfig is not None
        self._flush()
        self.grids.check(self.rules, region.name, region.form, qconfig)
        self._integer(region, region.form, self.grids.follow(qconfig))

    def finish(self) -> Plan:
        """Ends the program with float outputs."""
        self._flush()
        output = next(node for node in self.captured.graph.nodes if node.op == "output")
        outputs = tuple(self._as_float(self._name_of(node)) for node in output.args[0])
        inputs = self.captured.signature.inputs
        plan_hash = hash_plan(self.ops, self.values, self.consts, inputs, outputs)
        program = QuantizedProgram(
            tuple(self.ops), self.values, self.consts, inputs, outputs, self.captured.signature, plan_hash
        )
        names = tuple(rule.name for rule in self.rules)
        folded, refused = tuple(self.folded), self.fused.refusals
        return Plan(program, self.activations, self.weights, names, folded, refused, self.batch_norm, self.grids)

    def _is_pending(self, node: fx.Node) -> bool:
        # What is collected for a float island gets its value when the island is written down.
        return node in self.named and self.named[node] not in self.values

    def _take_pixels(self, region: Region) -> str:
        """Gives an input of pixels its grid and names the normalised image after it; or says why that cannot be."""
        convs = self.reasons.normalising(region)
        if isinstance(convs, str):
            return convs
        for rule in self.rules:
            if rule.storage != "uint8" or PIXEL_BITS not in rule.activation_bits:
                return f"{rule.name} stores no activations of {PIXEL_BITS} bits as uint8"
        assert self.captured.pixels is not None
        name = self._name_of(region.anchor.all_input_nodes[0])
        grid = self.captured.pixels.grid(symmetric=bool(self.grids.symmetric))
        config = ActivationConfig(bits=PIXEL_BITS, observer="minmax")
        self._value(name, self.values[name].shape, grid, "pixels", config, torch.uint8)
        self.named[region.anchor] = name
        error = self.captured.pixels.fold(grid).border_error
        for conv in convs:
            assert conv.form is not None and isinstance(conv.form.attrs, ConvAttrs)
            padded = any(map(any, conv.form.attrs.padding)) or conv.form.inputs[0] is not region.anchor
            border = f", zero padding is off by up to {error:.2g}" if padded else ""
            self.border_notes[conv] = f"; its weights normalise the pixels{border}"
        return ""

    def _why_float(self, region: Region) -> str:
        """The reason why a region stays in float, "" if it runs in integers."""
        reason = self.reasons.of(region)
        if reason or self.reasons.brings_in(region):
            return reason
        assert region.form is not None
        gridded = [self._grid(self._name_of(node)) is not None for node in region.form.inputs if node.op != "get_attr"]
        if not any(gridded) or (region.form.kind in PASSTHROUGH and not all(gridded)):
            return "its input is float"
        return ""

    def _integer(self, region: Region, form: Form, qconfig: QConfig) -> None:
        inputs = tuple(self._operand(node, qconfig) for node in form.inputs)
        shape = self.captured.shape_of(region.outputs[0])
        grid: Grid | None
        why = ""
        if form.kind in PASSTHROUGH:
            grid, why = self._grid(inputs[0]), f"moves the integers of {inputs[0]}"
        elif self._gives_float(region, form):
            grid, why = None, "the last linear layer gives float logits straight from its accumulator"
        elif form.kind is Kind.AVERAGE_POOL and any(rule.pools_keep_grid for rule in self.rules):
            keeper = next(rule.name for rule in self.rules if rule.pools_keep_grid)
            grid, why = self._grid(inputs[0]), f"{keeper} averages on the grid of {inputs[0]}"
        else:
            grid = self._new_grid(region.name, qconfig.result)
            why = _why_this_grid(form, qconfig) + self.grids.note(form.weight is not None)
            why += self.border_notes.get(region, "")
        if form.weight is not None:
            self._const(form, form.weight, qconfig)
        if form.kind is Kind.LOOKUP:
            assert grid is not None
            self.consts[region.name] = Const(region.name, None, grid)
        if region.batch_norm is not None:
            if self.batch_norm == "live" and not qconfig.weight.per_channel:
                raise PlanError(
                    f"{region.name}: its batch norm is live, which scales each channel, but its weight has one scale "
                    "for all; use per_channel: true, or batch_norm: fold"
                )
            self.folded.append(str(region.batch_norm.target))
        self.named[region.outputs[0]] = region.name
        if isinstance(form.attrs, AveragePoolAttrs) and form.attrs.kernel is None and len(shape) == 2:
            # mean without keepdim: a pool that leaves [N, C, 1, 1], then a view.
            pooled = f"{region.name}:pooled"
            self._value(pooled, (*shape, 1, 1), grid, why, self._owner(grid, inputs, qconfig))
            self.ops.append(Op(form.kind, inputs, (pooled,), form.attrs, origins=region.origins))
            channels = shape[1]
            assert isinstance(channels, int)
            self._value(region.name, shape, grid, f"moves the integers of {pooled}")
            view = ViewAttrs((-1, channels))
            self.ops.append(Op(Kind.VIEW, (pooled,), (region.name,), view, origins=region.origins))
            return
        made, attrs = self.grids.split(region.name, form.attrs)
        self._value(made, shape, grid, why, self._owner(grid, inputs, qconfig))
        self.ops.append(Op(form.kind, inputs, (made,), attrs, weight=form.weight, origins=region.origins))
        if made != region.name:  # its ReLU is an op of its own
            self._value(region.name, shape, grid, f"moves the integers of {made}")
            self.ops.append(Op(Kind.CLAMP, (made,), (region.name,), ClampAttrs(), origins=region.origins[-1:]))

    def _gives_float(self, region: Region, form: Form) -> bool:
        if not isinstance(form.attrs, LinearAttrs) or form.attrs.activation is not None:
            return False
        ends = all(user.op == "output" for user in region.outputs[0].users)
        return ends and all(rule.float_logits for rule in self.rules)

    def _owner(self, grid: Grid | None, inputs: tuple[str, ...], qconfig: QConfig) -> ActivationConfig | None:
        """The settings that a result's grid follows: None for a grid that is an input's."""
        return None if any(grid is self._grid(name) for name in inputs) else qconfig.result

    def _const(self, form: Form, name: str, qconfig: QConfig) -> None:
        known = self.weights.get(name)
        if known is not None and known != qconfig.weight:
            raise PlanError(f"{name} is used by layers with different weight settings; give them one QConfig")
        if known is None:
            limit = 2 ** (qconfig.weight.bits - 1) - 1
            shape = self.captured.root.get_parameter(name).shape
            if _is_depthwise(form, shape):
                limit = min([limit, *(r.depthwise_limit for r in self.rules if r.depthwise_limit is not None)])
            axis = form.channel_axis if qconfig.weight.per_channel else None
            self.consts[name] = Const(name, None, Grid(-limit, limit, axis))
            self.weights[name] = qconfig.weight

    def _flush(self) -> None:
        """Writes the collected float regions down as one island."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        nodes = [node for region, _ in pending for node in region.nodes]
        inside = set(nodes)
        reads = [n for n in island_inputs(nodes) if n not in inside]
        sources = {node: self._as_float(self._name_of(node)) for node in reads}
        made = [node for region, _ in pending for node in region.outputs]
        outputs = [n for n in made if any(user not in inside for user in n.users)]
        read = set(outputs)
        for region, reason in pending:
            for node in region.outputs:
                if node in read:
                    shape, dtype = self.captured.shape_of(node), node.meta["val"].dtype
                    self._value(self.named[node], shape, None, reason, dtype=dtype)
        body = build_island(self.captured, nodes, reads, outputs)
        origins = tuple(replace(o, reason=reason) for region, reason in pending for o in region.origins)
        names = tuple(self.named[n] for n in outputs)
        self.ops.append(Op(Kind.FLOAT, tuple(sources.values()), names, body=body, origins=origins))

    def _name_of(self, node: fx.Node) -> str:
        return self.named[node]

    def _grid(self, name: str) -> Grid | None:
        value = self.values.get(name)
        return None if value is None else value.grid

    def _new_grid(self, name: str, config: ActivationConfig) -> Grid:
        if config.observer == REUSE_INPUT:
            raise PlanError(
                f"{name}: found the observer {REUSE_INPUT!r}, which is for ops that only move integers; give it one "
                "that finds a range"
            )
        return Grid(0, 2**config.bits - 1)

    def _value(
        self,
        name: str,
        shape: tuple[int | str, ...],
        grid: Grid | None,
        why: str,
        owner: ActivationConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.values[name] = Value(name, shape, grid, why, dtype)
        if grid is not None and owner is not None:
            self.activations[name] = owner

    def _operand(self, node: fx.Node, qconfig: QConfig) -> str:
        """The name of what an integer op reads: a value, or a parameter or buffer made into one."""
        if node.op != "get_attr":
            return self._as_integer(self._name_of(node), qconfig)
        source = str(node.target)
        name = f"{source}:quantized"
        if name not in self.values:
            grid, shape = self._new_grid(name, qconfig.activation), self.captured.shape_of(node)
            self._value(name, shape, grid, f"{source} as an operand", qconfig.activation)
            self.consts[name] = Const(source, None, grid)
            self.ops.append(Op(Kind.CONSTANT, (), (name,), ConstantAttrs(source)))
        return name

    def _as_integer(self, name: str, qconfig: QConfig) -> str:
        """The name of the value on a grid: itself, or what a quantize op makes of it."""
        value = self.values[name]
        if value.grid is not None:
            return name
        twin = f"{name}:quantized"
        if twin not in self.values:
            self._value(
                twin,
                value.shape,
                self._new_grid(name, qconfig.activation),
                f"enters the integers, {qconfig.activation.describe()} range{self.grids.note()}",
                qconfig.activation,
            )
            self.ops.append(Op(Kind.QUANTIZE, (name,), (twin,), NoAttrs()))
        return twin

    def _as_float(self, name: str) -> str:
        """The name of the value in float: itself, or what a dequantize op makes of it."""
        value = self.values[name]
        if value.grid is None:
            return name
        twin = f"{name}:dequantized"
        if twin not in self.values:
            self._value(twin, value.shape, None, "leaves the integers")
            self.ops.append(Op(Kind.DEQUANTIZE, (name,), (twin,), NoAttrs()))
        return twin


def _check_sizes(fused: FusedGraph, rules: Sequence[Target]) -> None:
    """Refuses open sizes for a target whose files have one, before anything is trained."""
    captured = fused.captured
    for node, name in captured.placeholders().items():
        found = [size for size in captured.shape_of(node) if isinstance(size, str) and size != BATCH_DIM]
        fixed = next((rule.name for rule in rules if not rule.open_sizes), None)
        if found and fixed is not None:
            raise PlanError(
                f"input {name!r} has a dynamic {' and '.join(found)}, but a file for {fixed} has one size; leave "
                f"dynamic_size out, or {fixed} from the targets"
            )


def _why_this_grid(form: Form, qconfig: QConfig) -> str:
    if isinstance(form.attrs, LookupAttrs):
        if FUNCTIONS[form.attrs.function].range is not None:
            return f"table of {form.attrs.function}, whose range is known"
        return f"table of {form.attrs.function}, {qconfig.result.describe()} range"
    return f"integer kernel, {qconfig.result.describe()} range"


def _is_depthwise(form: Form, weight_shape: Sequence[int]) -> bool:
    """Whether each output channel of a conv reads one input channel, over a window."""
    return isinstance(form.attrs, ConvAttrs) and weight_shape[1] == 1 and math.prod(weight_shape[2:]) > 1
