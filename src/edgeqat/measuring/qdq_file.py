"""A QDQ ONNX file made anywhere: does ONNX Runtime, on this machine, compute what the file says?

Each cell of the file (see `edgeqat.lowering.qdq_cells`) is compared on its own: fed with the integers that the runtime
itself computed before it, so that a difference is its own and no echo of an earlier one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeqat.errors import InputError
from edgeqat.lowering.onnx_session import OnnxSession, float_ops
from edgeqat.lowering.qdq_cells import Cell, QdqGraph, meant
from edgeqat.replay.folder import FolderError, read_safetensors

__all__ = ["CellParity", "QdqParity", "read_inputs", "verify_qdq"]

HALF_STEP = 0.5
FLOAT_STEPS = 1e-3
"""Steps by which a sum of float32 products may miss the real one: some hundred products of 8-bit numbers are right to
1e-6 of the largest, which is at most 255 steps. A tie is rounded one way or the other within it."""

FLOAT_TOLERANCE = 1e-4
"""Of the largest output: what two float32 kernels may differ by."""

SAMPLES = 4
SEED = 20240229


@dataclass(frozen=True)
class CellParity:
    """One cell.

    Attributes:
        output: The tensor it ends with.
        ops: Types of its nodes between dequantize and quantize.
        n: Elements compared.
        histogram: How many integers are off by how many steps from the nearest point to the file's real result; empty
            for a cell that ends in float.
        departures: Elements that are no rounding of the file's real result: further from it than half a step, or for
            a float output than FLOAT_TOLERANCE.
        worst: The largest distance from the real result, in steps; for a float output in its own unit.
    """

    output: str
    ops: tuple[str, ...]
    n: int
    histogram: Mapping[int, int]
    departures: int
    worst: float


@dataclass(frozen=True)
class QdqParity:
    """What verifying a file found.

    Attributes:
        n: Samples.
        cells: Every cell, in the order of the file.
        agreement: Share of samples whose largest first output is the same in the runtime as with every node computed
            as it stands; None where the first output is not [N, C].
        float_ops: Ops of the graph that really runs that compute in float.
    """

    n: int
    cells: tuple[CellParity, ...]
    agreement: float | None
    float_ops: Mapping[str, int] = field(default_factory=dict)

    @property
    def departing(self) -> list[CellParity]:
        """The cells whose results are not what the file says."""
        return [cell for cell in self.cells if cell.departures]

    def __str__(self) -> str:
        steps: Counter[int] = Counter()
        for cell in self.cells:
            steps.update(cell.histogram)
        total = sum(steps.values())
        lines = [
            f"{len(self.cells)} cells on {self.n} samples: {100 * steps[0] / total:.4f}% of integers are the nearest"
        ]
        if self.agreement is not None:
            lines[0] += f"; predictions agree on {100 * self.agreement:.2f}%"
        if self.float_ops:
            lines.append("computed in float: " + ", ".join(f"{op} {n}" for op, n in self.float_ops.items()))
        for cell in self.departing:
            what = " + ".join(cell.ops) or "quantize"
            lines.append(
                f"DEPARTS at {cell.output} ({what}): {cell.departures} of {cell.n} elements, by up to {cell.worst:.4g}"
            )
        if not self.departing:
            lines.append("verified: every cell computes what the file says, rounded")
        return "\n".join(lines)


def verify_qdq(path: str | Path, inputs: Mapping[str, Tensor] | None = None) -> QdqParity:
    """Runs a QDQ ONNX file in ONNX Runtime and says where the results are not what the file means.

    Args:
        path: An .onnx file with QuantizeLinear and DequantizeLinear, from any tool.
        inputs: Its inputs by name, any number of samples in dimension 0; by default 4 seeded samples over the grid of
            each input, or standard normal ones where none says its range.

    Raises:
        InputError: The file cannot be read, quantizes nothing, has sizes that only `inputs` can tell, or is refused
            by the runtime.
        MissingRuntimeError: onnx or onnxruntime is not installed.
    """
    graph = QdqGraph(Path(path))
    feed = _samples(graph) if inputs is None else _checked(graph, inputs)
    session = OnnxSession(graph.tapped())
    names = session.outputs
    found = dict(zip(names, _run(session, feed), strict=True))
    cells = graph.cells()
    known = {**found, **feed}
    begins = sorted({name for cell in cells for name in cell.inputs})
    plain = OnnxSession(graph.meaning(cells), optimize=False)
    expected = dict(zip(plain.outputs, _run(plain, {name: known[name] for name in begins}), strict=True))
    whole = OnnxSession(Path(path).read_bytes(), optimize=False)
    first = _run(whole, feed)[0]
    return QdqParity(
        n=len(next(iter(feed.values()))),
        cells=tuple(_compare(cell, found[cell.output], expected, known) for cell in cells),
        agreement=_agreement(found[graph.outputs[0]], first),
        float_ops=dict(sorted(float_ops(Path(path).read_bytes()).items())),
    )


def read_inputs(path: Path) -> dict[str, Tensor]:
    """Inputs from a file: every tensor of a .safetensors, or the one array of a .npy.

    Raises:
        InputError: It cannot be read as either.
    """
    try:
        if path.suffix == ".npy":
            return {path.stem: torch.from_numpy(np.load(path, allow_pickle=False))}
        return {name: torch.from_numpy(array.copy()) for name, array in read_safetensors(path).items()}
    except (FolderError, OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} holds no inputs ({error}); wanted a .npy or a .safetensors file") from error


def _run(session: OnnxSession, feed: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        return session.run([feed[name] for name in session.inputs])
    except Exception as error:
        # The runtime raises whatever its kernels do.
        raise InputError(f"ONNX Runtime cannot run the file: {str(error).splitlines()[0]}") from error


def _samples(graph: QdqGraph) -> dict[str, Tensor]:
    """Seeded samples over the range of each input."""
    generator, ranges, found = torch.Generator().manual_seed(SEED), graph.input_ranges(), {}
    for info in graph.inputs:
        kind = info.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
        if sizes and sizes[0] == 0:
            sizes[0] = SAMPLES
        if kind.elem_type != graph.FLOAT or not all(sizes):
            raise InputError(
                f"the input {info.name} has sizes or a type that no sample can be drawn for; give the inputs, as "
                "--inputs FILE.safetensors or .npy"
            )
        if info.name in ranges:
            low, high = ranges[info.name]
            found[info.name] = torch.rand(sizes, generator=generator) * (high - low) + low
        else:
            found[info.name] = torch.randn(sizes, generator=generator)
    return found


def _checked(graph: QdqGraph, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wanted = [info.name for info in graph.inputs]
    if len(inputs) == len(wanted) == 1:
        return {wanted[0]: next(iter(inputs.values()))}
    if set(inputs) != set(wanted):
        raise InputError(f"found the inputs {', '.join(sorted(inputs))}, wanted {', '.join(wanted)}")
    return {name: inputs[name] for name in wanted}


def _compare(cell: Cell, found: Tensor, expected: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> CellParity:
    meaning = expected[meant(cell.output)]
    if cell.real is None:
        errors = (found.double() - meaning.double()).abs()
        limit = FLOAT_TOLERANCE * float(meaning.abs().max())
        return CellParity(cell.output, cell.ops, errors.numel(), {}, int((errors > limit).sum()), float(errors.max()))
    steps = found.int() - meaning.int()
    counts = Counter(steps.flatten().tolist())
    real = known[cell.real] if cell.real in known else expected[cell.real]
    if cell.scale is None:  # per channel: the distance is told in whole steps
        distance = steps.abs().double()
    else:
        point = (real.double() / cell.scale + cell.zero_point).clamp(cell.low, cell.high)
        distance = (found.double() - point).abs()
    departs = int((distance > HALF_STEP + FLOAT_STEPS).sum())
    return CellParity(
        cell.output, cell.ops, steps.numel(), dict(sorted(counts.items())), departs, float(distance.max())
    )


def _agreement(found: Tensor, expected: Tensor) -> float | None:
    if found.dim() != 2 or found.shape[1] < 2:
        return None
    return float(np.mean((found.argmax(1) == expected.argmax(1)).numpy()))
