"""The table of bench: a long path has its own line where the terminal is narrow, and no cell is broken."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from edgeqat.machine import Machine
from edgeqat.measuring.bench import Benched, Ratio
from edgeqat.measuring.latency import Latency
from edgeqat.reporting.latency_table import print_bench

FOLDER = Path("runs/a-run-with-a-name/artifacts/float_finetuned/onnxruntime")
MACHINE = Machine("A processor", "x86_64", (), 1, {"onnxruntime": "1.32.0"})


def benched(ratio: Ratio | None) -> Benched:
    return Benched(
        FOLDER, "onnxruntime", {"x": (1, 3, 224, 224)}, 123_456_789, Latency(1, 1, (1234.5678,) * 20), ratio
    )


@pytest.mark.parametrize("width", [80, 160])
def test_every_figure_stays_whole(width: int) -> None:
    out = io.StringIO()
    print_bench(
        [benched(None), benched(Ratio(0.512, 0.501, 0.523))], MACHINE, Console(file=out, width=width, highlight=False)
    )
    shown = out.getvalue()
    for told in (str(FOLDER), "1x3x224x224", "1234.568", "123456.8 kB", "0.512", "(0.501-0.523)", "onnxruntime"):
        assert told in shown
    table = [line for line in shown.splitlines() if "1234.568" in line]
    assert len(table) == 2
    assert all(line.count("1234.568") == 3 and len(line) <= width for line in table)
