"""Why a region stays in float: what the user, the op itself or a target's rules say, whatever grids there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from edgeqat.first_last import FirstLast
from edgeqat.graph.form import Form, shape_of
from edgeqat.graph.forms import PROBABILITIES
from edgeqat.graph.fuse import FusedGraph, Region
from edgeqat.graph.groups import Group
from edgeqat.graph.layer_ids import layer_ids
from edgeqat.op_attrs import AveragePoolAttrs, ConvAttrs, ConvTransposeAttrs
from edgeqat.program import WEIGHTED, Kind
from edgeqat.qconfig import QConfig
from edgeqat.qconfig_mapping import LayerId, QConfigMapping
from edgeqat.target_table import Target

__all__ = ["FloatReasons"]

MOVES = frozenset({Kind.PAD, Kind.VIEW, Kind.PERMUTE, Kind.SLICE})
"""Kinds that a float input may go through before what has weights brings it into the integers."""


class FloatReasons:
    """Answers for the regions of one graph, under one mapping and one list of targets.

    Raises:
        PlanError: A rule of the mapping matches nothing in the graph.
    """

    def __init__(self, fused: FusedGraph, mapping: QConfigMapping, rules: Sequence[Target]) -> None:
        self._fused, self._mapping, self._rules = fused, mapping, rules
        self._layers = layer_ids(fused.captured)
        blocks = (LayerId(group.module, group.type) for group in fused.groups)
        mapping.check_used([*blocks, *self._layers.values()])
        self._region_of: dict[fx.Node, Region] = {node: r for r in fused.regions for node in r.nodes}
        self._ends = FirstLast(fused, self._region_of, any(rule.pools_keep_grid for rule in rules))
        self._of_group: dict[Group, str] = {}
        self._behind: dict[Region, list[Region]] = {}
        while self._leave_a_group_in_float():  # one may be the reason for another: they share a batch norm
            continue

    def qconfig_of(self, region: Region) -> QConfig | None:
        """The settings of a region; what is moved for weighted ops alone is on the grid that the first of them wants.

        Those of a block are its module's, but for a rule that names a module inside it.
        """
        own = self._asked_for(region)
        if own is None or not self._weighted_behind(region):
            return own
        return self._asked_for(self._weighted_behind(region)[0])

    def _asked_for(self, region: Region) -> QConfig | None:
        layer, group = self._layers[region.anchor.name], region.group
        if group is not None and not self._mapping.names_inside(group.module, layer.module):
            layer = LayerId(group.module, group.type)
        own, wanted = self._mapping.lookup(layer), self._mapping.first_last
        if own is None or wanted is None or self._mapping.names(layer):
            return own
        return self._ends.applied(region, own, wanted)

    def of(self, region: Region) -> str:
        """The reason why a region cannot run in integers, "" where only its inputs may still prevent it."""
        return self._of_its_group(region) or self._own(region) or self._of_norm(region)

    def brings_in(self, region: Region) -> bool:
        """Whether a region's float input becomes integers before it, not after.

        So it is for what has weights, for a block, which has no float op inside, and for what is padded, cut or turned
        for these alone: quantizing first is quicker, and comes to the same.
        """
        if region.form is not None and region.group is not None:
            return True
        weighted = region.form is not None and region.form.kind in WEIGHTED
        return weighted or bool(self._weighted_behind(region))

    def normalising(self, source: Region) -> tuple[Region, ...] | str:
        """The convolutions that read the images which a region makes of pixels, or moves, perhaps moved on.

        Their weights can hold the normalisation. Or the reason why it has to be done in float before them.
        """
        found: list[Region] = []
        for user in source.outputs[0].users:
            reader = self._region_of.get(user)
            if reader is None:
                return "it is an output of the model"
            reason = self.of(reader)
            if reason or reader.form is None:
                return f"{reader.name} reads it in float: {reason}"
            if reader.form.kind is Kind.PAD:
                behind = self.normalising(reader)
                if isinstance(behind, str):
                    return behind
                found += behind
            elif reader.form.kind is not Kind.CONV:
                return f"{reader.name} reads it, which is no convolution"
            elif any(self._readers(name) > 1 for name in (reader.form.weight, reader.form.bias) if name):
                return f"{reader.name} reads it, whose weight or bias is used more than once"
            else:
                found.append(reader)
        return tuple(found) if found else "no convolution reads it"

    def _readers(self, parameter: str) -> int:
        """How many nodes read a parameter, under any of its names."""
        named = dict(self._fused.captured.root.named_parameters(remove_duplicate=False))
        names = {name for name, other in named.items() if other is named[parameter]}
        nodes = [node for node in self._fused.captured.graph.nodes if node.op == "get_attr" and node.target in names]
        return sum(len(node.users) for node in nodes)

    def _of_its_group(self, region: Region) -> str:
        return "" if region.group is None else self._of_group.get(region.group, "")

    def _leave_a_group_in_float(self) -> bool:
        """Finds a block that runs in integers so far, and one op of it that cannot; False if there is none."""
        for region in self._fused.regions:
            group = region.group
            if group is None or group in self._of_group or region.identity:
                continue
            reason = self._own(region) or self._of_norm(region)
            if reason:
                whole = f"its block {group.describe()} stays in float as a whole"
                self._behind.clear()
                self._of_group[group] = f"{whole}, because of {region.name}: {reason}"
                return True
        return False

    def _own(self, region: Region) -> str:
        outside = [self._fused.captured.outside.get(node.name, "") for node in region.nodes]
        if any(outside):
            return next(filter(None, outside))
        if region.identity:
            return "it is nothing in eval mode, and its input is float"
        if region.form is None:
            return region.reason
        if self.qconfig_of(region) is None:
            return "its QConfig is None"
        attrs = region.form.attrs
        if region.form.kind is Kind.ADD and self._only_for_softmax(region):
            return "a softmax alone reads it: masks and biases of scores span more than 8 bits"
        for node in region.form.inputs:
            if node.op == "get_attr" and not bool(torch.isfinite(self._fused.captured.tensor_of(node)).all()):
                return f"{node.target} holds infinite or NaN values, which no grid has"
        for rule in self._rules:
            if region.form.kind not in rule.kinds:
                return f"{rule.name} has no integer {region.form.kind.value}"
            if Kind.CONSTANT not in rule.kinds and any(n.op == "get_attr" for n in region.form.inputs):
                return f"{rule.name} takes no parameter or buffer as an operand"
            shapes = {tuple(map(str, shape_of(n))) for n in region.form.inputs}
            if not rule.broadcasts and region.form.kind is Kind.ADD and len(shapes) > 1:
                return f"{rule.name} adds no values of different shapes"
            if rule.centred and Kind.CLAMP not in rule.kinds and getattr(attrs, "activation", None) is not None:
                return f"{rule.name} has no integer clamp, which is its ReLU where zero points are in the middle"
            if isinstance(attrs, (ConvAttrs, ConvTransposeAttrs)) and len(attrs.stride) not in rule.conv_dims:
                return f"{rule.name} has no exact integer conv{len(attrs.stride)}d"
            if not rule.one_output_groups and self._has_one_output_groups(region.form):
                return f"{rule.name} has no exact conv of groups of several inputs and one output"
            uncounted = isinstance(attrs, AveragePoolAttrs) and any(attrs.padding) and not attrs.count_include_pad
            if rule.counts_padding and uncounted:
                return f"{rule.name} counts the padding in averages"
        return ""

    def _has_one_output_groups(self, form: Form) -> bool:
        if not isinstance(form.attrs, ConvAttrs) or form.weight is None:
            return False
        outputs, inputs = self._fused.captured.root.get_parameter(form.weight).shape[:2]
        return form.attrs.groups == outputs > 1 and inputs > 1

    def _of_norm(self, region: Region) -> str:
        """Why a batch norm cannot be folded after all: another call of it, which stays in float, needs it whole."""
        if region.batch_norm is None:
            return ""
        norm = region.batch_norm.target
        for other in self._fused.regions:
            if not any(node.target == norm for node in other.nodes):
                continue
            if other.batch_norm is None:
                return f"its {norm} is called again where it cannot be folded"
            if self._of_its_group(other) or self._own(other):
                return f"its {norm} also follows {other.name}, which stays in float"
        return ""

    def _only_for_softmax(self, region: Region) -> bool:
        """Whether all that reads a region's output, perhaps moved, is softmax."""
        readers = [self._region_of.get(user) for user in region.outputs[0].users]
        for reader in readers:
            if reader is None or reader.anchor.target in PROBABILITIES:
                continue
            if reader.form is None or reader.form.kind not in MOVES or not self._only_for_softmax(reader):
                return False
        return bool(readers) and None not in readers

    def _weighted_behind(self, region: Region) -> list[Region]:
        """What has weights and reads what a region moves, perhaps moved on.

        None if anything else reads it, or if one of them stays in float.
        """
        if region not in self._behind:
            self._behind[region] = self._find_weighted_behind(region)
        return self._behind[region]

    def _find_weighted_behind(self, region: Region) -> list[Region]:
        if region.form is None or region.form.kind not in MOVES:
            return []
        found: list[Region] = []
        for user in region.outputs[0].users:
            reader = self._region_of.get(user)
            if reader is None or reader.form is None or self.of(reader):
                return []
            behind = [reader] if reader.form.kind in WEIGHTED else self._weighted_behind(reader)
            if not behind:
                return []
            found += behind
        return found
