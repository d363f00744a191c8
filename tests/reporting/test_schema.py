from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from edgeqat.errors import EdgeqatError
from edgeqat.recipe import GateSection
from edgeqat.reporting.schema import Gate, HazardRow, LatencyRow, MetricRow, ParityRow, Report, Row, judge
from edgeqat.reporting.summary import print_summary, table_rows
from edgeqat.reporting.verdict import best_artifact


def row(variant: str, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "variant": variant,
        "runtime": "onnxruntime",
        "engine": "CPUExecutionProvider",
        "arithmetic": "onnxruntime/x86",
        "metric": MetricRow(name="top1", value=0.9, ci95=(0.88, 0.92), n=1000),
        "drop": None,
        "drop_ci95": None,
        "file_bytes": 4000,
        "payload_bytes": 3500,
        "latency_ms": LatencyRow(batch=1, threads=1, n=10, p50=2.0, p90=2.1, p99=2.2, samples="x.csv"),
        "parity": None,
        "ops": None,
        "artifact": f"artifacts/{variant}/onnxruntime/model.onnx",
        "sha256": None,
    }
    return Row(**(fields | changes))


def quantized(variant: str, **changes: Any) -> Row:
    fields: dict[str, Any] = {
        "drop": 0.004,
        "drop_ci95": (-0.01, 0.02),
        "file_bytes": 1000,
        "latency_ms": LatencyRow(batch=1, threads=1, n=10, p50=1.0, p90=1.1, p99=1.2, samples="x.csv"),
        "parity": ParityRow(
            against="reference:onnxruntime/x86",
            n=1000,
            bit_identical=1.0,
            max_error_steps=0.0,
            agreement=1.0,
            first_difference=None,
        ),
    }
    return row(variant, **(fields | changes))


ROWS = [row("float"), quantized("ptq"), row("float_finetuned"), quantized("qat")]


@pytest.mark.parametrize(
    ("limits", "passed"),
    [
        ({}, {}),
        ({"max_drop": 0.004}, {"max_drop": True}),
        ({"max_drop": 0.003}, {"max_drop": False}),
        ({"max_drop": -0.01}, {"max_drop": False}),
        ({"min_size_ratio": 4.0}, {"min_size_ratio": True}),
        ({"min_size_ratio": 4.01}, {"min_size_ratio": False}),
        ({"min_speedup": 2.0, "min_agreement": 1.0}, {"min_speedup": True, "min_agreement": True}),
        ({"min_speedup": 2.5, "min_agreement": 1.0}, {"min_speedup": False, "min_agreement": True}),
    ],
    ids=str,
)
def test_each_limit_decides_at_its_own_edge(limits: dict[str, float], passed: dict[str, bool]) -> None:
    gate = judge(ROWS, GateSection(**limits), ["onnxruntime"], "qat")  # type: ignore[arg-type]
    assert {check.name: check.passed for check in gate.checks} == passed
    assert gate.passed == all(passed.values())


def test_a_limit_on_what_was_not_measured_is_never_passed_in_silence() -> None:
    rows = [row("float_finetuned"), quantized("qat", parity=None)]
    with pytest.raises(EdgeqatError, match="gate.min_agreement: not measured for qat on onnxruntime"):
        judge(rows, GateSection(min_agreement=0.9), ["onnxruntime"], "qat")


def report(rows: list[Row], gate: Gate) -> Report:
    return Report(
        edgeqat="0",
        recipe={"model": {"factory": "f"}},
        recipe_sha256="0",
        machine={"cpu": "c", "arch": "a", "threads": 1, "versions": {}},
        data={"source": "s", "train_n": 1, "calibration_n": 1, "eval_n": 1},
        results=rows,
        gate=gate,
    )


def test_the_artifact_to_ship_passed_the_gate() -> None:
    passing = judge(ROWS, GateSection(max_drop=0.01), ["onnxruntime"], "qat")
    failing = judge(ROWS, GateSection(max_drop=0.0), ["onnxruntime"], "qat")
    best = best_artifact(report(ROWS, passing))
    assert best is not None and best.variant == "qat"
    assert best_artifact(report(ROWS, failing)) is None


def test_the_table_names_ratios_against_the_float_twin() -> None:
    cells = table_rows(report(ROWS, Gate(passed=True, checks=[])))[3]
    assert cells == (
        "qat\nonnxruntime",
        "90.00%\n88.0-92.0",
        "+0.40\n-1.00..+2.00",
        "1.0 kB\n4.00x",
        "1.000 ms\n2.00x",
        "100.00%\nbits",
    )


def test_the_gate_on_a_drop_is_in_the_metric_s_unit() -> None:
    metric = MetricRow(name="mae", value=3.0, ci95=(2.0, 4.0), n=10, higher_is_better=False, is_share=False)
    rows = [row("float", metric=metric), quantized("ptq", metric=metric, drop=1.5, drop_ci95=(1.0, 2.0))]
    assert judge(rows, GateSection(max_drop=1.5), ["onnxruntime"], "ptq").passed
    assert not judge(rows, GateSection(max_drop=1.4), ["onnxruntime"], "ptq").passed
    assert table_rows(report(rows, Gate(passed=True, checks=[])))[1][1:3] == ("3\n2..4", "+1.5\n+1..+2")


def summary(rows: list[Row]) -> str:
    out = io.StringIO()
    print_summary(report(rows, Gate(passed=True, checks=[])), Console(file=out, width=80))
    return out.getvalue()


def test_the_summary_fits_80_columns_and_says_what_is_not_measured() -> None:
    printed = summary(ROWS)
    table, _, rest = printed.partition("not measured:")
    assert "power and energy" in rest
    assert "\u2026" not in table and max(map(len, table.splitlines())) <= 80
    assert "top1" in table and "lower is better" not in table and "peak memory" not in table


def test_the_summary_names_the_way_that_is_better_and_the_memory() -> None:
    metric = MetricRow(name="[mae]", value=3.0, ci95=(2.0, 4.0), n=10, higher_is_better=False, is_share=False)
    printed = summary([row("float", metric=metric, peak_memory_bytes=2_000_000), quantized("ptq", metric=metric)])
    assert "[mae]" in printed and "(lower is better)" in printed
    assert "peak memory 2.0 MB  (float, onnxruntime)" in printed and "(ptq, onnxruntime)" not in printed


def test_the_summary_counts_the_hazards_of_a_row() -> None:
    told = [HazardRow(kind="saturation", where="x86 without VNNI", op=n, found=1, limit=0, advice="") for n in "ab"]
    told.append(HazardRow(kind="rounding", where="float32 requantization", op="a", found=2e7, limit=2**24, advice=""))
    printed = summary([row("float"), quantized("ptq", hazards=told)])
    assert (
        "hazards: saturation in 2 ops (x86 without VNNI), rounding in 1 ops (float32 requantization)  "
        "(ptq, onnxruntime)\n" in printed
    )
    assert printed.count("hazards") == 1


def test_a_report_written_before_a_metric_said_its_direction_is_read() -> None:
    assert MetricRow(name="top1", value=0.9, ci95=(0.8, 1.0), n=10).is_share
