"""report.html: a report as one page that needs nothing else, neither files nor a network.

Everything that comes from a recipe, a model or data is escaped; and the page forbids every script but its own.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import importlib.resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from edgeqat.errors import InputError
from edgeqat.reporting.figures.distributions import MOST_SHOWN, distributions_svg
from edgeqat.reporting.figures.drawing import embedded
from edgeqat.reporting.figures.latency import latency_svg
from edgeqat.reporting.figures.network import error_graph_svg, grid_graph_svg, row_id
from edgeqat.reporting.figures.parity import parity_svg
from edgeqat.reporting.figures.results import by_runtime, metric_svg, tradeoff_svg
from edgeqat.reporting.figures.training import training_svg
from edgeqat.reporting.pictures import flipped, picture_path
from edgeqat.reporting.schema import FLOAT_TWIN, Report, Row, size_ratio, speedup
from edgeqat.reporting.summary import change, figure, header, memory_rows, not_measured, table_rows
from edgeqat.reporting.verdict import best_artifact, passing_artifacts, slower_than_float, verdict

__all__ = ["environment", "render_page"]

CLASSES_SHOWN = 20
"""Classes in a table of the page, those that lose most first; report.json has them all."""

OPS_SHOWN = 12
"""Kinds of op in a profile, the slowest first; report.json has them all."""

HAZARD_UNITS = {
    "saturation": "of output channels",
    "bias": "largest integer bias",
    "overflow": "largest sum",
    "rounding": "largest sum",
    "range": "ratio of scales",
    "scale": "scale, product or ratio of scales",
}
"""What is counted of each kind of hazard."""

HAZARDS_SHOWN = 50
"""Hazards of an artifact; report.json has them all."""


def render_page(report: Report, folder: Path) -> str:
    """The page.

    Args:
        report: What was found.
        folder: Of the run: its timings, pictures and sensitivity figure are taken in.

    Raises:
        InputError: The file of a row's timings cannot be read.
    """
    best, memory, rows = best_artifact(report), memory_rows(report), table_rows(report)
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            title=f"edgeqat: {_headline(report)}",
            headline=_headline(report),
            columns=header(report) + (("peak memory",) if memory else ()),
            rows=[(*row, cell) for row, cell in zip(rows, memory, strict=True)] if memory else rows,
            figure=figure,
            change=change,
            classes_shown=CLASSES_SHOWN,
            ops_shown=OPS_SHOWN,
            hazards_shown=HAZARDS_SHOWN,
            hazard_units=HAZARD_UNITS,
            most_shown=MOST_SHOWN,
            profiles=_profiles(report),
            not_measured=not_measured(report),
            verdict=verdict(report),
            passed=passing_artifacts(report) if report.gate.passed else [],
            slower=slower_than_float(report),
            key_figures=_key_figures(report, best),
            drawings=_drawings(report, folder),
            pictures=_pictures(report, folder),
            row_id=row_id,
        )
    )


def _headline(report: Report) -> str:
    """The model and the data; of a path the last two parts, for the whole stands in the recipe."""
    return f"{_end_of(report.recipe['model']['factory'])} on {_end_of(report.data['source'])}"


def _end_of(name: str) -> str:
    return "/".join(name.split("/")[-2:]) if name.startswith("/") else name


def environment() -> jinja2.Environment:
    """What every page is made with: its parts, styles and script, and the policy that allows no other script."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeqat.reporting", "page_parts"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = importlib.resources.files("edgeqat.reporting") / "page_parts"
    style, script = ((parts / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    found.globals |= {
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    }
    return found


def _key_figures(report: Report, best: Row | None) -> list[tuple[str, str]]:
    """(name, figure) of the artifact that ships; of the first that was judged where none does."""
    judged = {(check.variant, check.runtime) for check in report.gate.checks}
    found = [row for row in report.results if row.variant in FLOAT_TWIN and row.artifact is not None]
    row = best or next((row for row in found if (row.variant, row.runtime) in judged), next(iter(found), None))
    if row is None:
        return []
    twin = report.row(FLOAT_TWIN[row.variant], row.runtime)
    figures: list[tuple[str, str]] = [(row.metric.name, figure(row.metric.value, row.metric.is_share))]
    if row.drop is not None:
        unit = " points" if row.metric.is_share else ""
        figures.append(("drop", change(row.drop, row.metric.is_share) + unit))
    ratios = {"smaller": size_ratio, "faster": speedup}
    for name, ratio in ratios.items():
        value = None if twin is None else ratio(row, twin)
        if value is not None:
            figures.append((f"{name} than FP32", f"{value:.2f}x"))
    if row.parity is not None:
        figures.append(("bit-identical outputs", f"{100 * row.parity.bit_identical:.2f}%"))
    return figures


def _profiles(report: Report) -> list[tuple[Row, Row | None]]:
    """The quantized rows whose runtime told where the time goes, each with its float twin."""
    rows = [row for row in report.results if row.variant in FLOAT_TWIN and row.profile]
    return [(row, report.row(FLOAT_TWIN[row.variant], row.runtime)) for row in rows]


def _drawings(report: Report, folder: Path) -> dict[str, Markup]:
    """Every figure that there is something to draw for, by name."""
    metric, network = report.results[0].metric, report.network
    named = [(f"{row.variant}, {row.runtime}", row) for row in report.results]
    found: dict[str, tuple[str | None, str]] = {
        "metric": (metric_svg(named), f"{metric.name} of each variant on each runtime, with 95% intervals"),
        "tradeoff": (tradeoff_svg(by_runtime(report.results)), f"{metric.name} against latency and size"),
        "latency": (latency_svg(_timings(report, folder)), "distribution of the latency of single calls"),
        "parity": (parity_svg(report), "integers of each quantized file by their error in steps"),
        "training": (training_svg(report.training, metric.name, metric.is_share), "loss and metric by epoch"),
    }
    if network is not None:
        values = [row for row in network.distributions if row.part == "activation"]
        weights = [row for row in network.distributions if row.part == "weight"]
        found |= {
            "graph-grids": (grid_graph_svg(network.ops), "the network, coloured by grid; the table below has it all"),
            "graph-error": (
                error_graph_svg(network.ops),
                "the network, coloured by error; the table below has it all",
            ),
            "values": (distributions_svg(values, "values"), "histograms of values over their grids"),
            "weights": (distributions_svg(weights, "weights"), "histograms of weights over their grids"),
        }
    sensitivity = folder / "sensitivity.svg"
    if sensitivity.is_file():
        text = sensitivity.read_text(encoding="utf-8")
        found["sensitivity"] = (text if "<svg" in text else None, "what each layer costs when it is quantized")
    return {name: Markup(embedded(svg, name, label)) for name, (svg, label) in found.items() if svg is not None}


def _timings(report: Report, folder: Path) -> dict[tuple[str, str], list[float]]:
    """Milliseconds of every timed call."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in report.results:
        if row.latency_ms is None:
            continue
        path = folder / row.latency_ms.samples
        try:
            with path.open(encoding="utf-8", newline="") as file:
                found[row.variant, row.runtime] = [float(line["ms"]) for line in csv.DictReader(file)]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} cannot be read ({error}); run the recipe again") from error
    return found


def _pictures(report: Report, folder: Path) -> dict[int, str]:
    """Samples as data URLs, by index."""
    found: dict[int, Any] = {}
    for index in flipped(report):
        path = folder / picture_path(index)
        if path.is_file():
            found[index] = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    return found
