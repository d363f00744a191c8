"""First and last layers with weights, which networks of few bits keep at 8: `QConfigMapping.set_first_last`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from edgeqat.graph.fuse import FusedGraph, Region
from edgeqat.program import PASSTHROUGH, WEIGHTED, Kind
from edgeqat.qconfig import QConfig

__all__ = ["FirstLast"]


class FirstLast:
    """Which regions of a graph these are.

    A layer with weights is a first one if an input of the model reaches it through none other, and a last one if its
    result reaches an output of the model through none other.

    Args:
        fused: The graph.
        region_of: The region of each node.
        pools_keep_grid: Whether an average pool's output is on its input's grid.
    """

    def __init__(self, fused: FusedGraph, region_of: Mapping[fx.Node, Region], pools_keep_grid: bool) -> None:
        self._region_of = region_of
        self._keeping = PASSTHROUGH | ({Kind.AVERAGE_POOL} if pools_keep_grid else frozenset())
        self._first = self._reached(fused.regions, forwards=True)
        self._last = self._reached(fused.regions[::-1], forwards=False)
        feeding = (self._maker_of_input(region) for region in self._last)
        self._feeding = frozenset(region for region in feeding if region is not None)

    def applied(self, region: Region, own: QConfig, wanted: QConfig) -> QConfig:
        """A region's settings, once first and last layers, and what these read, have those that are wanted for them.

        Of a first layer that is the weight and what it reads, of a last one its result too.
        """
        at_end = region in self._first or region in self._last
        reads_or_ends = region in self._last or region in self._feeding
        return QConfig(
            wanted.activation if at_end else own.activation,
            wanted.weight if at_end else own.weight,
            wanted.activation if reads_or_ends else own.result,
        )

    def _reached(self, regions: tuple[Region, ...], forwards: bool) -> frozenset[Region]:
        """The regions with weights that the model's inputs, or backwards its outputs, come to first."""
        found: set[Region] = set()
        through: set[Region] = set()
        for region in regions:
            end = "placeholder" if forwards else "output"
            around = self._read(region) if forwards else [user for node in region.nodes for user in node.users]
            if any(node.op == end or self._region_of.get(node) in through for node in around):
                is_weighted = region.form is not None and region.form.kind in WEIGHTED
                (found if is_weighted else through).add(region)
        return frozenset(found)

    def _read(self, region: Region) -> list[fx.Node]:
        inside = set(region.nodes)
        return [n for node in region.nodes for n in node.all_input_nodes if n not in inside and n.op != "get_attr"]

    def _maker_of_input(self, region: Region) -> Region | None:
        """What makes the grid that a layer reads; None where the layer itself brings its input into the integers."""
        assert region.form is not None
        maker = self._region_of.get(region.form.inputs[0])
        while maker is not None and (maker.identity or (maker.form is not None and maker.form.kind in self._keeping)):
            read = self._read(maker)
            maker = self._region_of.get(read[0]) if read else None
        return maker
