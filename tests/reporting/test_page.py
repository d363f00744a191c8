from __future__ import annotations

from test_schema import ROWS, quantized, report, row

from edgeqat.reporting.page import render_page
from edgeqat.reporting.schema import (
    ChangedSample,
    Changes,
    Check,
    ClassRow,
    FlippedSample,
    Flips,
    Gate,
    MetricRow,
)

PASSED = Gate(passed=True, checks=[])
HOSTILE = "<script>alert('x')</script>"


def test_what_comes_from_the_user_is_escaped() -> None:
    hostile = "<script>alert('x')</script>"
    found = report(ROWS, Gate(passed=True, checks=[]))
    found = found.model_copy(update={"data": {**found.data, "source": hostile}})
    page = render_page(found, f"plan {hostile}")
    assert "<script" not in page and page.count("&lt;script&gt;") >= 3


def test_the_verdict_and_every_row_and_check_are_there() -> None:
    check = Check(name="max_drop", variant="qat", runtime="onnxruntime", limit=0.1, value=0.2, passed=False)
    page = render_page(report(ROWS, Gate(passed=False, checks=[check])), "the plan")
    assert "<h1>Do not ship</h1>" in page and "max_drop" in page and "the plan" in page
    assert page.count("<tr>") == 1 + len(ROWS) + 1 + 1
    assert "http" not in page  # self-contained


def flipped(n: int, classes: int) -> Changes:
    samples = [FlippedSample(index=700 + i, target=HOSTILE, float_class="a", quantized_class="b") for i in range(n)]
    rows = [
        ClassRow(name=f"class-{i}", n=10, float_value=0.9, quantized_value=0.9 - i / 100, drop=i / 100)
        for i in range(classes)
    ]
    flips = Flips(right_to_wrong=41, wrong_to_right=42, wrong_to_wrong=43, samples=samples)
    return Changes(flips=flips, largest=None, per_class=rows)


def test_flipped_samples_and_classes_are_shown_worst_first_and_escaped() -> None:
    rows = [row("float"), quantized("ptq", changes=flipped(2, 30))]
    page = " ".join(render_page(report(rows, PASSED), "").split())
    assert "41 went from right to wrong, 42 from wrong to right, 43 from one wrong class to another" in page
    assert "<td>700</td><td>&lt;script&gt;" in page and "<script" not in page
    assert "The 20 of 30 classes that lose most" in page
    assert page.index("class-29") < page.index("class-10") and "class-9<" not in page
    assert "<td>class-29</td><td>10</td><td>90.00%</td> <td>61.00%</td><td>+29.00</td>" in page


def test_a_metric_in_its_own_unit_is_never_shown_in_percent() -> None:
    metric = MetricRow(name="mae", value=0.25, ci95=(0.2, 0.3), n=9, higher_is_better=False, is_share=False)
    changes = Changes(
        flips=None,
        largest=[ChangedSample(index=5, float_value=0.1, quantized_value=0.4, drop=0.3)],
        per_class=[ClassRow(name="owl", n=1, float_value=None, quantized_value=0.5, drop=None)],
    )
    rows = [row("float", metric=metric), quantized("ptq", metric=metric, drop=0.05, changes=changes, parity=None)]
    page = render_page(report(rows, PASSED), "")
    assert "mae\n(lower is better)" in page and "0.25\n0.2..0.3" in page and "+0.05" in page
    assert "in the unit of the metric" in page and "%</td>" not in page
    assert "<td>5</td><td>0.1</td><td>0.4</td>" in page
    assert "<td>owl</td><td>1</td><td></td>" in page


def test_what_is_not_measured_is_said() -> None:
    page = render_page(report(ROWS, PASSED), "")
    assert "What edgeqat does not measure" in page
    for words in ("power and energy", "thermal throttling", "cold start", "accelerators"):
        assert words in page


def test_peak_memory_has_a_column_where_it_was_measured() -> None:
    measured = [row("float", peak_memory_bytes=51_240_000), quantized("ptq")]
    page = render_page(report(measured, PASSED), "")
    assert "memory at run time" not in page and "memory at run time" in render_page(report(ROWS, PASSED), "")
    assert "peak memory" in page and "<td>51.2 MB</td>" in page
    assert "peak memory" not in render_page(report(ROWS, PASSED), "")
