"""report.html: the report as one plain, self-contained page."""

from __future__ import annotations

import importlib.resources

import jinja2

from edgeqat.reporting.schema import Report
from edgeqat.reporting.summary import COLUMNS, best_artifact, table_rows

__all__ = ["render_page"]


def render_page(report: Report, plan_text: str) -> str:
    """The page; everything that comes from a recipe or model is escaped."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    source = (importlib.resources.files("edgeqat.reporting") / "template.html").read_text(encoding="utf-8")
    best = best_artifact(report)
    return environment.from_string(source).render(
        report=report,
        columns=COLUMNS,
        rows=table_rows(report),
        ship=best.artifact if report.gate.passed and best is not None else None,
        plan=plan_text,
    )
