from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_comparison import write_run
from test_schema import ROWS

from edgeqat.reporting.comparison import compare_runs
from edgeqat.reporting.comparison_page import render_comparison
from helpers import CommandLine


def test_runs_stand_side_by_side_and_names_are_escaped(tmp_path: Path) -> None:
    hostile = tmp_path / "<b>bold"
    runs = [
        write_run(hostile, results=ROWS),
        write_run(tmp_path / "two", "data.source=other", passed=False, results=ROWS),
    ]
    page = render_comparison(compare_runs(runs))
    assert "<h1>2 runs</h1>" in page and "<b>bold" not in page and "&lt;b&gt;bold" in page
    assert "data.source" in page and "pass</td>" in page and "FAIL</td>" in page
    assert 'id="figure-metric"' in page and 'id="figure-tradeoff"' in page


def test_figures_of_different_metrics_are_not_drawn_on_one_axis(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, results=ROWS) for name in ("one", "two"))
    comparison = compare_runs([one, two])
    report = comparison.reports[str(two)]
    rows = [r.model_copy(update={"metric": r.metric.model_copy(update={"name": "mae"})}) for r in report.results]
    comparison.reports[str(two)] = report.model_copy(update={"results": rows})
    page = render_comparison(comparison)
    assert "<figure" not in page and ">metric</button>" in page


def test_the_command_writes_it_beside_what_it_prints(command: CommandLine, tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / name, results=ROWS)) for name in ("one", "two")]
    place = tmp_path / "page.html"
    done = command("compare", *runs, "--html", str(place))
    assert done.code == 0 and "the recipes are the same" in done.out
    assert done.out.startswith(f"page: {place}\n")
    as_json = command("compare", *runs, "--html", str(place), "--json")
    assert as_json.err == f"page: {place}\n" and json.loads(as_json.out)["warnings"] == []
    assert "<h1>2 runs</h1>" in place.read_text(encoding="utf-8")
    refused = command("compare", *runs, "--html", str(place / "page.html"))
    assert refused.code == 2 and "page.html" in refused.err  # its directory is a file


@pytest.mark.parametrize("n", [1, 2])
def test_equal_recipes_do_not_differ(tmp_path: Path, n: int) -> None:
    runs = [write_run(tmp_path / str(index)) for index in range(n)]
    assert "They do not." in render_comparison(compare_runs(runs))
