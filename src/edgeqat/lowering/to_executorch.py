"""Spelling a quantized program as an ExecuTorch file: integer ops in XNNPACK graphs, the rest around them.

The graphs are written from the program, node by node, and not found in an exported QDQ model: what is in them does not
depend on what a partitioner recognises, it takes a second and not a minute, and ops are there that no exported form
leads to. Everything outside, float islands and tables, goes through torch.export and ExecuTorch's own lowering, which
gives floats to XNNPACK too.

The same program gives the same bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from edgeqat.errors import MissingRuntimeError, PlanError
from edgeqat.lowering.executorch_file import file_of, silent
from edgeqat.lowering.executorch_network import Network
from edgeqat.lowering.spelling import Spelling, payload_bytes
from edgeqat.lowering.xnnpack_limits import check_scales
from edgeqat.lowering.xnnpack_lookup import exact_nodes
from edgeqat.program import BATCH_DIM, Kind, QuantizedProgram
from edgeqat.replay.run_executorch import TAPS_HEADER

__all__ = ["spell"]

FILE_NAME = "model.pte"


def spell(program: QuantizedProgram, engine: str | None) -> Spelling:
    """The ExecuTorch file of a program.

    Args:
        program: The program.
        engine: "xnnpack" or None.

    Raises:
        PlanError: The program was planned without executorch, so that XNNPACK cannot compute it.
        EdgeqatError: Two scales are too far apart for XNNPACK.
        MissingRuntimeError: ExecuTorch is not installed.
    """
    _check_planned(program)
    check_scales(program)
    try:
        with silent():
            nodes = exact_nodes(program)
            network = Network(program, (), nodes)
            plain, ops = file_of(network, network.examples(), network.has_floats)
            for delegate in network.delegates:
                ops = Counter(ops) + Counter(delegate.nodes)
            tapped = program.tapped()
            taps = _taps(program, tapped, nodes) if tapped else b""
    except ImportError as error:
        raise MissingRuntimeError("executorch", "executorch", str(error)) from error
    return Spelling(
        file_name=FILE_NAME,
        data=plain,
        engine="xnnpack",
        arithmetics=("xnnpack",),
        payload_bytes=payload_bytes(program),
        runtime_ops=ops,
        taps=taps,
    )


def _check_planned(program: QuantizedProgram) -> None:
    for name in program.inputs:
        found = [size for size in program.values[name].shape if isinstance(size, str) and size != BATCH_DIM]
        if found:
            raise PlanError(
                f"input {name!r} has a dynamic {' and '.join(found)}, which a file for executorch fixes: prepare "
                "without dynamic_size, or lower to onnxruntime"
            )
    for op in program.ops:
        if op.kind is Kind.LINEAR and program.values[op.name].grid is None:
            raise PlanError(
                f"the program was not planned for executorch ({op.name} gives float logits); name it among the "
                "targets of prepare"
            )


def _taps(program: QuantizedProgram, names: Sequence[str], nodes: frozenset[str]) -> bytes:
    """A description of the inner values, and a file that has them as outputs behind its own."""
    network = Network(program, names, nodes)
    data, _ = file_of(network, network.examples(), network.has_floats)
    described = []
    for name in names:
        at, located = network.tap_at(name)
        # Found by the sizes in memory, then turned into the program's order.
        dims = [located.order.index(dim) for dim in range(len(located.order))]
        described.append([name, at, [-1, *located.sizes[1:]], dims])
    # Float islands may be cut in another way there, and then differ in last bits.
    header = json.dumps({"exact": not network.has_floats, "values": described}).encode()
    return len(header).to_bytes(TAPS_HEADER, "little") + header + data
