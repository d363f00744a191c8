"""docs/run.svg, the README's figure: a finished run's report.json as drop, size and latency, a row a runtime.

    edgeqat run cifar10-resnet20 -o runs/portable --set 'export=[portable, openvino]' ...
    python tools/readme_figure.py runs/portable

The run's command in full is in docs/results.md, under "One training, five runtimes".
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from matplotlib.figure import Figure

from edgeqat.reporting.schema import FLOAT_TWIN, Report, Row, read_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUT = Path(__file__).parents[1] / "docs" / "run.svg"
FLOAT, INT8, EDGE = "#9aa5b1", "#1f6feb", "#6b7280"


def main() -> None:
    """Writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="The directory of a finished run.")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    draw(read_report(options.folder), options.out)


def draw(report: Report, out: Path) -> None:
    """Three panels; the title says what run it was, on what."""
    pairs = [(row, twin) for row in report.results if row.artifact and (twin := twin_of(report, row)) is not None]
    variant = "qat" if any(row.variant == "qat" for row, _ in pairs) else "ptq"
    pairs = [(row, twin) for row, twin in pairs if row.variant == variant]
    with mpl.rc_context({"svg.hashsalt": "edgeqat", "font.size": 9}):
        figure = Figure(figsize=(9, 0.9 + 0.42 * len(pairs)), layout="constrained")
        drops, sizes, times = figure.subplots(1, 3, sharey=True)
        _drops(drops, [row for row, _ in pairs])
        _bars(sizes, [(r.file_bytes or 0, t.file_bytes or 0) for r, t in pairs], 1e-3, "file, kB")
        latencies = [(r.latency_ms.p50, t.latency_ms.p50) for r, t in pairs if r.latency_ms and t.latency_ms]
        _bars(times, latencies, 1e3, f"median latency, µs (batch 1, {report.machine['threads']} thread)")
        drops.set_yticks(range(len(pairs)), [_label(row) for row, _ in pairs])
        drops.invert_yaxis()
        for axes in (drops, sizes, times):
            axes.spines[["top", "right"]].set_visible(False)
        times.legend(loc="lower right", fontsize=8, frameon=False)
        figure.suptitle(_title(report, variant), fontsize=9)
        figure.savefig(out, format="svg", facecolor="white", metadata={"Date": None})


def twin_of(report: Report, row: Row) -> Row | None:
    """The float model that a row's size and latency are compared with."""
    return report.row(FLOAT_TWIN[row.variant], row.runtime) if row.variant in FLOAT_TWIN else None


def _label(row: Row) -> str:
    """The runtime, and how much of its outputs are the reference's."""
    exact = row.parity is not None and row.parity.against.startswith("reference")
    equal = f"\n{100 * row.parity.bit_identical:.0f}% bit-identical" if row.parity is not None and exact else ""
    return f"{row.runtime}{equal}"


def _title(report: Report, variant: str) -> str:
    n = report.results[0].metric.n
    model = str(report.recipe["model"]["factory"]).rpartition(":")[2]
    source = Path(str(report.data["source"])).name  # of a folder, its name alone
    return (
        f"{model}, {source}, {variant}: {n} test images; FP32 in the same runtime in grey; "
        f"{report.machine['cpu']}, verdict: {'ship' if report.gate.passed else 'do not ship'}"
    )


def _drops(axes: Axes, rows: list[Row]) -> None:
    metric = rows[0].metric
    for i, row in enumerate(rows):
        if row.drop is not None and row.drop_ci95 is not None:
            low, high = row.drop_ci95
            axes.plot([100 * low, 100 * high], [i, i], color=INT8, linewidth=2)
            axes.plot(100 * row.drop, i, "o", color=INT8)
    axes.axvline(0, color=EDGE, linewidth=0.8)
    axes.set_xlabel(f"drop of {metric.name}, points (95%)")


def _bars(axes: Axes, pairs: list[tuple[float, float]], unit: float, label: str) -> None:
    """A thin grey bar for FP32 and a blue one for INT8, with their ratio at its end."""
    for i, (quantized, twin) in enumerate(pairs):
        axes.barh(i - 0.19, twin * unit, 0.36, color=FLOAT, label="FP32" if i == 0 else None)
        axes.barh(i + 0.19, quantized * unit, 0.36, color=INT8, label="INT8" if i == 0 else None)
        axes.text(quantized * unit, i + 0.19, f" {twin / quantized:.2f}x", va="center", fontsize=8)
    axes.set_xlabel(label)


if __name__ == "__main__":
    main()
