from __future__ import annotations

import base64
import hashlib
import html
import re
from pathlib import Path
from typing import Any

import pytest
from test_schema import ROWS, quantized, report, row

from edgeqat.errors import InputError
from edgeqat.reporting.network_schema import NetworkRows, OpRow
from edgeqat.reporting.page import render_page
from edgeqat.reporting.schema import (
    ChangedSample,
    Changes,
    Check,
    ClassRow,
    FlippedSample,
    Flips,
    Gate,
    HazardRow,
    MetricRow,
)

PASSED = Gate(passed=True, checks=[])
HOSTILE = "<script>alert('x')</script>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's directory with the timings that all rows point to."""
    (tmp_path / "x.csv").write_text("ms\n1.0\n2.0\n")
    return tmp_path


def own_parts(page: str) -> str:
    """A page without its style, script and figures."""
    return re.sub(r"<style>.*?</style>|<script>.*?</script>|<svg.*?</svg>", "", page, flags=re.DOTALL)


def op(name: str, **changes: Any) -> OpRow:
    fields: dict[str, Any] = {
        "name": name,
        "kind": "conv",
        "runs": "integer",
        "module": name,
        "reads": [],
        "grid_in": "u8",
        "grid_weight": "s8 per-channel",
        "grid_out": "u8",
        "fused": "",
        "group": "",
        "reason": "",
    }
    return OpRow(**(fields | changes))


def test_what_comes_from_the_user_is_escaped(folder: Path) -> None:
    found = report(ROWS, PASSED)
    network = NetworkRows(
        variant="qat", n=1, ops=[op(HOSTILE, reason=HOSTILE), op("$x_$", reads=[HOSTILE])], distributions=[]
    )
    changes = {"data": {**found.data, "source": HOSTILE}, "plan": HOSTILE, "network": network}
    page = render_page(found.model_copy(update=changes), folder)
    assert page.count("<script") == 1 and page.count("</script>") == 1
    assert own_parts(page).count("&lt;script&gt;") >= 6
    assert "&lt;script&gt;alert" in page[page.index("<svg") :] and "$x_$" in page  # no mathematics in the graph either


def test_a_long_name_is_whole_in_the_table_and_short_in_the_graph(folder: Path) -> None:
    name = "layer" * 60
    network = NetworkRows(variant="qat", n=1, ops=[op(name)], distributions=[])
    page = render_page(report(ROWS, PASSED).model_copy(update={"network": network}), folder)
    assert f">{name}</td>" in page
    graph = page[
        page.index('id="figure-graph-grids"') : page.index("</figure>", page.index('id="figure-graph-grids"'))
    ]
    assert name not in graph and "layerlayer" in graph


def test_the_verdict_and_every_row_and_check_are_there(folder: Path) -> None:
    check = Check(name="max_drop", variant="qat", runtime="onnxruntime", limit=0.1, value=0.2, passed=False)
    found = report(ROWS, Gate(passed=False, checks=[check])).model_copy(update={"plan": "the plan"})
    page = render_page(found, folder)
    assert ">Do not ship</h1>" in page and "the plan" in page
    assert "max_drop: 0.2, the limit is 0.1 (qat, onnxruntime)" in page[: page.index("<nav")]
    parts = own_parts(page)
    results = parts[parts.index('class="results"') : parts.index("</table>", parts.index('class="results"'))]
    assert results.count("<tr>") == 1 + len(ROWS)
    assert "://" not in parts and "src=" not in parts  # self-contained


def test_the_policy_allows_the_page_s_own_script_alone(folder: Path) -> None:
    page = html.unescape(render_page(report(ROWS, PASSED), folder))
    script = page[page.index("<script>") + len("<script>") : page.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_timings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x\.csv cannot be read .*run the recipe again"):
        render_page(report(ROWS, PASSED), tmp_path)
    (tmp_path / "x.csv").write_text("ms\nfast\n")
    with pytest.raises(InputError, match=r"x\.csv cannot be read"):
        render_page(report(ROWS, PASSED), tmp_path)


def test_hazards_are_listed(folder: Path) -> None:
    hazard = HazardRow(kind="saturation", where="x86 without VNNI", op="conv1", found=1.0, limit=0.5, advice=HOSTILE)
    page = render_page(report([row("float"), quantized("ptq", hazards=[hazard] * 60)], PASSED), folder)
    assert "ptq, onnxruntime: 60" in page and "The first 50" in page and page.count("<td>saturation</td>") == 50
    assert "<td>100%</td>" in page and "<td>50%</td>" in page and "<td>of output channels</td>" in page
    assert "None is known" in render_page(report(ROWS, PASSED), folder)


def test_the_sensitivity_figure_and_pictures_are_taken_in(folder: Path) -> None:
    found = report([row("float"), quantized("ptq", changes=flipped(2, 3))], PASSED)
    assert "Sensitivity" not in render_page(found, folder)
    (folder / "sensitivity.svg").write_text('<?xml version="1.0"?><svg id="a"><use href="#a"/></svg>')
    (folder / "samples").mkdir()
    (folder / "samples" / "test-700.png").write_bytes(b"png")
    page = render_page(found, folder)
    assert 'id="sensitivity-a"><use href="#sensitivity-a"/>' in page
    assert page.count("<img") == 1 and base64.b64encode(b"png").decode() in page


def flipped(n: int, classes: int) -> Changes:
    samples = [FlippedSample(index=700 + i, target=HOSTILE, float_class="a", quantized_class="b") for i in range(n)]
    rows = [
        ClassRow(name=f"class-{i}", n=10, float_value=0.9, quantized_value=0.9 - i / 100, drop=i / 100)
        for i in range(classes)
    ]
    flips = Flips(right_to_wrong=41, wrong_to_right=42, wrong_to_wrong=43, samples=samples)
    return Changes(flips=flips, largest=None, per_class=rows)


def test_flipped_samples_and_classes_are_shown_worst_first_and_escaped(folder: Path) -> None:
    rows = [row("float"), quantized("ptq", changes=flipped(2, 30))]
    page = " ".join(own_parts(render_page(report(rows, PASSED), folder)).split())
    assert "41 went from right to wrong, 42 from wrong to right, 43 from one wrong class to another" in page
    assert "<td>700</td><td>&lt;script&gt;" in page
    assert "The 20 of 30 classes that lose most" in page
    assert page.index("class-29") < page.index("class-10") and "class-9<" not in page
    assert "<td>class-29</td><td>10</td><td>90.00%</td> <td>61.00%</td><td>+29.00</td>" in page


def test_a_metric_in_its_own_unit_is_never_shown_in_percent(folder: Path) -> None:
    metric = MetricRow(name="mae", value=0.25, ci95=(0.2, 0.3), n=9, higher_is_better=False, is_share=False)
    changes = Changes(
        flips=None,
        largest=[ChangedSample(index=5, float_value=0.1, quantized_value=0.4, drop=0.3)],
        per_class=[ClassRow(name="owl", n=1, float_value=None, quantized_value=0.5, drop=None)],
    )
    rows = [row("float", metric=metric), quantized("ptq", metric=metric, drop=0.05, changes=changes, parity=None)]
    page = render_page(report(rows, PASSED), folder)
    assert "mae\n(lower is better)" in page and "0.25\n0.2..0.3" in page and "+0.05" in page
    assert "in the unit of the metric" in page and "%</td>" not in page
    assert "<td>5</td><td>0.1</td><td>0.4</td>" in page
    assert "<td>owl</td><td>1</td><td></td>" in page


def test_what_is_not_measured_is_said(folder: Path) -> None:
    page = render_page(report(ROWS, PASSED), folder)
    assert "What edgeqat does not measure" in page
    for words in ("power and energy", "thermal throttling", "cold start", "accelerators"):
        assert words in page


def test_peak_memory_has_a_column_where_it_was_measured(folder: Path) -> None:
    measured = [row("float", peak_memory_bytes=51_240_000), quantized("ptq")]
    page = render_page(report(measured, PASSED), folder)
    assert "memory at run time" not in page and "memory at run time" in render_page(report(ROWS, PASSED), folder)
    assert "peak memory" in page and "<td>51.2 MB</td>" in page
    assert "peak memory" not in render_page(report(ROWS, PASSED), folder)
