"""report.html: the report as one plain, self-contained page."""

from __future__ import annotations

import importlib.resources

import jinja2

from edgeqat.reporting.schema import Report
from edgeqat.reporting.summary import best_artifact, change, figure, header, memory_rows, not_measured, table_rows

__all__ = ["render_page"]

CLASSES_SHOWN = 20
"""Classes in a table of the page, those that lose most first; report.json has them all."""


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
        not_measured=not_measured(report),
        ship=best.artifact if report.gate.passed and best is not None else None,
        plan=plan_text,
    )
