"""What `edgeqat bench` prints: a table for people, a dict for machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeqat.machine import Machine
from edgeqat.measuring.bench import Benched
from edgeqat.reporting.terminal import fits

__all__ = ["bench_to_dict", "print_bench"]

RIGHT = ("p50 ms", "p90 ms", "p99 ms", "n", "size")


def bench_to_dict(results: Sequence[Benched], machine: Machine) -> dict[str, Any]:
    """JSON-ready; latencies in milliseconds, every call of them in order."""
    return {
        "machine": machine.to_dict(),
        "results": [
            {
                "artifact": str(result.folder),
                "runtime": result.runtime,
                "inputs": {name: list(shape) for name, shape in result.inputs.items()},
                "file_bytes": result.file_bytes,
                "latency_ms": {
                    "batch": result.latency.batch,
                    "threads": result.latency.threads,
                    "n": len(result.latency.samples_ms),
                    **{f"p{q}": result.latency.percentile(q) for q in (50, 90, 99)},
                    "samples": list(result.latency.samples_ms),
                },
                "p50_ratio": None if result.ratio is None else result.ratio.value,
                "p50_ratio_ci95": None if result.ratio is None else [result.ratio.low, result.ratio.high],
            }
            for result in results
        ],
    }


def print_bench(results: Sequence[Benched], machine: Machine, console: Console) -> None:
    """Prints the table and what its figures hold for."""
    table = _table(results, narrow=False)
    if not fits(table, console):  # a path a line above it, instead of a column of them
        for number, result in enumerate(results, start=1):
            console.print(f"{number}  {result.folder}, {_shapes(result)}", markup=False, soft_wrap=True)
        table = _table(results, narrow=True)
    console.print(table)
    batch = results[0].latency.batch
    console.print(
        f"{batch} sample(s) a call, calls interleaved; intervals: block bootstrap, paired over rounds", markup=False
    )
    versions = ", ".join(f"{runtime} {machine.versions[runtime]}" for runtime in _named(results, machine))
    console.print(f"{machine.cpu}, {machine.arch}, {machine.threads} thread(s), {versions}", markup=False)


def _table(results: Sequence[Benched], narrow: bool) -> Table:
    table = Table(header_style="bold", box=box.SIMPLE, padding=(0, 1), collapse_padding=narrow, pad_edge=not narrow)
    places = ("", "runtime") if narrow else ("artifact", "runtime", "input")
    gap = "\n" if narrow else " "
    for column in (*places, *RIGHT, f"p50 / first{gap}(95%)"):
        table.add_column(column, justify="right" if column in RIGHT else "left", overflow="fold")
    for number, result in enumerate(results, start=1):
        latency, ratio = result.latency, result.ratio
        named = (str(number), result.runtime) if narrow else (str(result.folder), result.runtime, _shapes(result))
        cells = (
            *named,
            *(f"{latency.percentile(q):.3f}" for q in (50, 90, 99)),
            str(len(latency.samples_ms)),
            f"{result.file_bytes / 1000:.1f} kB",
            "1" if ratio is None else f"{ratio.value:.3f}{gap}({ratio.low:.3f}-{ratio.high:.3f})",
        )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _shapes(result: Benched) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in result.inputs.values())


def _named(results: Sequence[Benched], machine: Machine) -> list[str]:
    """The packages whose versions matter: a runtime has its package's name, or is part of torch."""
    return sorted({r.runtime if r.runtime in machine.versions else "torch" for r in results})
