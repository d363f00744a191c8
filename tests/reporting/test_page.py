from __future__ import annotations

from test_schema import ROWS, report

from edgeqat.reporting.page import render_page
from edgeqat.reporting.schema import Check, Gate


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
