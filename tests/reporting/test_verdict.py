"""What a report comes to, in the terminal and on the page: ship, not, or nothing was checked; which file, how fast."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_schema import ROWS, quantized, report, row

from edgeqat.recipe import GateSection
from edgeqat.reporting.comparison import Comparison
from edgeqat.reporting.comparison_page import render_comparison
from edgeqat.reporting.figures.results import tradeoff_svg
from edgeqat.reporting.figures.training import training_svg
from edgeqat.reporting.network_schema import EpochRow, StageRow
from edgeqat.reporting.page import render_page
from edgeqat.reporting.schema import Gate, LatencyRow, MetricRow, Report, Row, judge
from edgeqat.reporting.summary import print_summary
from edgeqat.reporting.verdict import passing_artifacts, slower_than_float, verdict

NONE = Gate(passed=True, checks=[])


def printed(found: Report) -> str:
    out = io.StringIO()
    print_summary(found, Console(file=out, width=80))
    return out.getvalue()


def page(found: Report, folder: Path) -> str:
    (folder / "x.csv").write_text("ms\n1.0\n2.0\n")
    return " ".join(render_page(found, folder).split())


def on(runtime: str, p50: float, **changes: Any) -> list[Row]:
    """A float row and a qat row of a runtime; the float call takes 1 ms."""
    names = {name: f"artifacts/{name}/{runtime}/model" for name in ("float_finetuned", "qat")}
    ms = {
        name: LatencyRow(batch=1, threads=1, n=9, p50=p, p90=p, p99=p, samples="x.csv")
        for name, p in (("float_finetuned", 1.0), ("qat", p50))
    }
    return [
        row("float_finetuned", runtime=runtime, latency_ms=ms["float_finetuned"], artifact=names["float_finetuned"]),
        quantized("qat", runtime=runtime, latency_ms=ms["qat"], artifact=names["qat"], **changes),
    ]


THREE = [*on("onnxruntime", 2.0), *on("litert", 0.5), *on("executorch", 1.0)]
RUNTIMES = ["onnxruntime", "litert", "executorch"]


def test_a_gate_of_nothing_is_no_reason_to_ship(tmp_path: Path) -> None:
    empty = report(ROWS, judge(ROWS, GateSection(), ["onnxruntime"], "qat"))
    assert verdict(empty) == "no gate: nothing was checked" and empty.gate.passed
    told = printed(empty)
    assert "no gate: nothing was checked\n      the fastest of 2 files: artifacts/ptq/" in told and "ship" not in told
    shown = page(empty, tmp_path)
    assert '<h1 class="">No gate: nothing was checked</h1>' in shown and "The fastest of 2 files:" in shown
    compared = Comparison({"a": empty}, [], [])
    assert compared.to_dict()["runs"][0]["verdict"] == "no gate: nothing was checked"
    assert "no gate: nothing was checked</span>: a" in render_comparison(compared)


@pytest.mark.parametrize(("limit", "words"), [(0.004, "ship"), (0.003, "do not ship")])
def test_a_limit_decides(limit: float, words: str, tmp_path: Path) -> None:
    found = report(ROWS, judge(ROWS, GateSection(max_drop=limit), ["onnxruntime"], "qat"))
    assert verdict(found) == words
    assert f"\n{words}  {'artifacts/qat/' if words == 'ship' else 'the gate failed'}" in printed(found)
    assert f">{words.capitalize()}</h1>" in page(found, tmp_path)


def test_all_that_passed_are_named_the_fastest_first(tmp_path: Path) -> None:
    found = report(THREE, judge(THREE, GateSection(max_drop=0.1), RUNTIMES, "qat"))
    assert [row.runtime for row in passing_artifacts(found)] == ["litert", "executorch", "onnxruntime"]
    told = printed(found)
    assert "ship  artifacts/qat/litert/model\n      the fastest of 3 that passed; the others:\n" in told
    assert "      artifacts/qat/executorch/model\n      artifacts/qat/onnxruntime/model\n" in told
    shown = page(found, tmp_path)
    assert "The fastest of 3 files that passed: <code>artifacts/qat/litert/model</code>" in shown
    assert (
        "Passed too: <code>artifacts/qat/executorch/model</code>, <code>artifacts/qat/onnxruntime/model</code>"
        in shown
    )


def test_what_is_slower_than_float_is_said_slowest_first(tmp_path: Path) -> None:
    """Where the interval leaves no doubt, and of what would ship alone."""
    rows = [
        *on("onnxruntime", 1.6, speedup_ci95=(0.6, 0.65)),
        *on("litert", 5.0, speedup_ci95=(0.19, 0.21)),
        *on("executorch", 1.01, speedup_ci95=(0.95, 1.03)),
        *on("openvino", 0.5, speedup_ci95=(1.9, 2.1)),
    ]
    found = report(rows, NONE)
    assert slower_than_float(found) == "litert 0.20x, onnxruntime 0.62x"
    assert "slower than FP32: litert 0.20x, onnxruntime 0.62x\n" in printed(found)
    assert "Slower than FP32 on the same runtime: litert 0.20x, onnxruntime 0.62x" in page(found, tmp_path)
    assert slower_than_float(report(THREE, NONE)) == ""  # a report of before has no intervals
    assert "lower than FP32" not in printed(report(THREE, NONE)) + page(report(THREE, NONE), tmp_path)


def test_the_title_has_the_end_of_a_path_and_the_page_the_whole(tmp_path: Path) -> None:
    found = report(ROWS, NONE)
    found = found.model_copy(
        update={
            "recipe": {"model": {"factory": "/srv/work/nets/mine.py:Net"}},
            "data": {**found.data, "source": "/srv/data/images"},
        }
    )
    shown = page(found, tmp_path)
    assert "<title>edgeqat: nets/mine.py:Net on data/images</title>" in shown
    assert "<p>nets/mine.py:Net on data/images." in shown
    assert "/srv/work/nets/mine.py:Net on /srv/data/images" in shown


def test_no_axis_names_more_than_all() -> None:
    whole = MetricRow(name="top1", value=1.0, ci95=(0.97, 1.0), n=160)
    rows = [row("float", metric=whole), quantized("ptq", metric=whole)]
    epochs = [EpochRow(index=i, loss=0.1, lr=0.1, metric=1.0, seconds=1.0) for i in (1, 2)]
    figures = tradeoff_svg({"onnxruntime": rows}), training_svg([StageRow(stage="qat", epochs=epochs)], "top1", True)
    for svg in figures:
        assert svg is not None
        told = [float(text) for text in re.findall(r"<text[^>]*>([\d.]+)</text>", svg)]
        assert 100 in told and max(told) == 100
