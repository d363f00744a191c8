"""The network of a report: each op of a program, joined with what its values look like on their grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.utils import _pytree as pytree

from edgeqat.diagnose.distributions import Distribution, distributions
from edgeqat.measuring.variant import Variant
from edgeqat.plan_table import rows_of
from edgeqat.program import Kind, Op, QuantizedProgram
from edgeqat.reporting.network_schema import DistributionRow, NetworkRows, OpRow
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel

__all__ = ["network_of", "network_rows"]


def network_of(variant: Variant, batch: Batch) -> NetworkRows:
    """The network of a quantized variant, its values looked at over a batch (see `samples_within`)."""
    assert isinstance(variant.model, SimulatedModel)
    found, n = distributions(variant.model, batch), len(pytree.tree_leaves(batch)[0])
    return network_rows(variant.name, variant.program, found, n)


def network_rows(variant: str, program: QuantizedProgram, found: Sequence[Distribution], n: int) -> NetworkRows:
    """The ops of a program in their order.

    Args:
        variant: Whose program it is.
        program: Converted.
        found: Distributions of its values and weights, over n samples.
        n: How many.
    """
    makers = {name: op.name for op in program.ops for name in op.outputs}
    values = {one.name: one for one in found if one.part == "activation"}
    ops = [_op_row(program, op, makers, values) for op in program.ops]
    return NetworkRows(variant=variant, n=n, ops=ops, distributions=[_distribution_row(one) for one in found])


def _op_row(program: QuantizedProgram, op: Op, makers: Mapping[str, str], values: Mapping[str, Distribution]) -> OpRow:
    rows, found = rows_of(program, op), values.get(op.name)
    first = rows[0]
    return OpRow(
        name=op.name,
        kind=op.kind.value if op.kind is not Kind.FLOAT else ", ".join(dict.fromkeys(row.kind for row in rows)),
        runs="float" if op.kind is Kind.FLOAT else "integer",
        module=", ".join(dict.fromkeys(row.module for row in rows)),
        reads=list(dict.fromkeys(makers[name] for name in op.inputs if name in makers)),
        grid_in=first.grid_in,
        grid_weight=first.grid_weight,
        grid_out=first.grid_out,
        fused=first.fused,
        group=first.group,
        reason="; ".join(dict.fromkeys(row.reason for row in rows if row.reason)),
        sqnr_db=None if found is None else found.sqnr_db,
        clipped=None if found is None else found.ranges.clipped,
    )


def _distribution_row(one: Distribution) -> DistributionRow:
    ranges = one.ranges
    return DistributionRow(
        name=one.name,
        part=one.part,
        low=ranges.low,
        high=ranges.high,
        grid_low=ranges.grid_low,
        grid_high=ranges.grid_high,
        scale=ranges.scale,
        clipped=ranges.clipped,
        sqnr_db=one.sqnr_db,
        counts=list(one.counts),
    )
