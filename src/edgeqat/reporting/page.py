"""report.html: the report as one plain, self-contained page."""

from __future__ import annotations

import importlib.resources

import jinja2

from edgeqat.reporting.schema import FLOAT_TWIN, Report, Row
from edgeqat.reporting.summary import best_artifact, change, figure, header, memory_rows, not_measured, table_rows

__all__ = ["render_page"]

CLASSES_SHOWN = 20
"""Classes in a table of the page, those that lose most first; report.json has them all."""


OPS_SHOWN = 12
"""Kinds of op in a profile, the slowest first; report.json has them all."""


def profiles(report: Report) -> list[tuple[Row, Row | None]]:
    """The quantized rows whose runtime told where the time goes, each with its float twin."""
    rows = [row for row in report.results if row.variant in FLOAT_TWIN and row.profile]
    return [(row, report.row(FLOAT_TWIN[row.variant], row.runtime)) for row in rows]


def render_page(report: Report, plan_text: str) -> str:
    """The page; everything that comes from a recipe or model is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = (importlib.resources.files("edgeqat.reporting") / "template.html").read_text(encoding="utf-8")
    best, memory = best_artifact(report), memory_rows(report)
    rows = table_rows(report)
    return environment.from_string(source).render(
        report=report,
        columns=header(report) + (("peak memory",) if memory else ()),
        rows=[(*row, cell) for row, cell in zip(rows, memory, strict=True)] if memory else rows,
        figure=figure,
        change=change,
        classes_shown=CLASSES_SHOWN,
        ops_shown=OPS_SHOWN,
        profiles=profiles(report),
        not_measured=not_measured(report),
        ship=best.artifact if report.gate.passed and best is not None else None,
        plan=plan_text,
    )
