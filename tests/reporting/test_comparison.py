from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeqat.errors import InputError
from edgeqat.files import to_json
from edgeqat.recipe import load_recipe
from edgeqat.reporting.comparison import compare_runs, differences
from edgeqat.reporting.schema import Check, Gate, MetricRow, Report, Row, read_report
from helpers import CommandLine

MACHINE = {"cpu": "c", "arch": "a", "features": ["avx2"], "threads": 1, "versions": {"torch": "1", "onnxruntime": "2"}}
DATA = {"source": "digits", "train_n": 10, "calibration_n": 5, "eval_n": 7}


def row(variant: str) -> Row:
    return Row(
        variant=variant,  # type: ignore[arg-type]
        runtime="onnxruntime",
        engine="CPUExecutionProvider",
        arithmetic=None,
        metric=MetricRow(name="top1", value=0.9, ci95=(0.8, 0.95), n=7),
        drop=None,
        drop_ci95=None,
        file_bytes=None,
        payload_bytes=None,
        latency_ms=None,
        parity=None,
        ops=None,
        artifact=None,
        sha256=None,
    )


def write_run(folder: Path, *settings: str, passed: bool = True, **changes: Any) -> Path:
    """A directory as a finished run leaves it, report.json alone."""
    recipe = load_recipe("digits-edge", list(settings))
    check = Check(name="max_drop", variant="qat", runtime="onnxruntime", limit=0.1, value=0.2, passed=passed)
    fields: dict[str, Any] = {
        "edgeqat": "0.1.0",
        "recipe": recipe.model_dump(mode="json"),
        "recipe_sha256": recipe.sha256(),
        "machine": MACHINE,
        "data": DATA,
        "results": [row("float_finetuned"), row("qat")],
        "gate": Gate(passed=passed, checks=[check]),
    }
    folder.mkdir()
    (folder / "report.json").write_text(to_json(Report(**(fields | changes)).to_dict()), encoding="utf-8")
    return folder


# Reading a report.


def test_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    assert to_json(read_report(folder).to_dict()) == (folder / "report.json").read_text(encoding="utf-8")


def change(folder: Path, **fields: Any) -> None:
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (folder / "report.json").write_text(json.dumps(data | fields), encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "report.json cannot be read"),
        ("\xff", "report.json cannot be read"),
        ("[" * 100_000, "report.json cannot be read"),
        ("[]", "is no report of edgeqat: it has no schema"),
        ("{}", "is no report of edgeqat: it has no schema"),
        ('{"schema": 2}', "has schema 2, this edgeqat reads 1"),
        ('{"schema": 1}', "does not fit the schema at edgeqat: Field required"),
    ],
    ids=["half", "no text", "deep", "list", "empty", "newer", "fields"],
)
def test_report_that_cannot_be_used(command: CommandLine, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        read_report(tmp_path)
    assert words in str(caught.value)
    assert words in command("compare", tmp_path).refusal(2)


@pytest.mark.parametrize(
    ("fields", "where"),
    [({"results": []}, "results"), ({"gate": {"passed": "?"}}, "gate.passed"), ({"extra": 1}, "extra")],
    ids=["no results", "type", "unknown"],
)
def test_report_of_another_shape_names_the_place(tmp_path: Path, fields: dict[str, Any], where: str) -> None:
    folder = write_run(tmp_path / "a")
    change(folder, **fields)
    with pytest.raises(InputError, match=f"does not fit the schema at {where}: "):
        read_report(folder)


def test_directories_without_a_finished_run(command: CommandLine, tmp_path: Path) -> None:
    assert f"found no report.json in {tmp_path}" in command("compare", tmp_path).refusal(2)
    (tmp_path / "recipe.yaml").write_text("")
    assert f"{tmp_path} holds an unfinished run" in command("compare", tmp_path).refusal(2)


# Differences.


def test_differences_are_dotted_and_lack_what_a_tree_lacks() -> None:
    left = {"a": {"b": 1, "c": [1, 2]}, "train": None, "same": {}, "flag": True}
    right = {"a": {"b": 2, "c": [1, 2]}, "train": {"lr": 0.1}, "same": {}, "flag": 1}
    found = {d.key: d.values for d in differences({"l": left, "r": right})}
    assert found == {"a.b": {"l": 1, "r": 2}, "train": {"l": None, "r": {"lr": 0.1}}, "flag": {"l": True, "r": 1}}
    assert differences({"l": left, "again": left}) == []


def test_a_section_that_one_run_lacks_hides_no_difference_of_the_others() -> None:
    trees = {"l": {"train": None}} | {
        run: {"train": {"a": 1, "b": 2, "c": 3, "lr": lr}} for run, lr in zip("mr", (1, 2), strict=True)
    }
    found = {d.key: d.describe(list(trees)) for d in differences(trees)}
    assert found == {"train": ["null", "set (4 keys)", "set (4 keys)"], "train.lr": ["-", "1", "2"]}


def test_a_string_is_not_the_number_it_spells() -> None:
    assert [d.key for d in differences({"l": {"a": "1"}, "r": {"a": 1}})] == ["a"]


@pytest.mark.parametrize(
    ("settings", "changes", "warnings"),
    [
        ((), {}, []),
        (("train.seed=1",), {}, []),
        ((), {"machine": MACHINE | {"cpu": "d"}}, ["machine.cpu differs (c | d): latencies cannot be compared"]),
        (
            ("measure.threads=2",),
            {"machine": MACHINE | {"threads": 2}},
            ["machine.threads differs (1 | 2): latencies cannot be compared"],
        ),
        (("measure.batch=4",), {}, ["measure.batch differs (1 | 4): latencies cannot be compared"]),
        ((), {"data": DATA | {"eval_n": 8}}, ["data.eval_n differs (7 | 8): metrics cannot be compared"]),
        (
            (),
            {"machine": MACHINE | {"versions": {"torch": "1", "onnxruntime": "3"}}, "edgeqat": "0.2.0"},
            [
                "edgeqat differs (0.1.0 | 0.2.0): a difference may be the software's",
                "versions.onnxruntime differs (2 | 3): a difference may be the software's",
            ],
        ),
    ],
    ids=["same", "recipe", "cpu", "threads", "batch", "data", "versions"],
)
def test_warnings_say_what_cannot_be_compared(
    tmp_path: Path, settings: tuple[str, ...], changes: dict[str, Any], warnings: list[str]
) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", *settings, **changes)]
    assert compare_runs(runs).warnings == warnings


def test_a_run_given_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    with pytest.raises(InputError, match=r"found .*a twice, wanted each run once"):
        compare_runs([folder, folder])


# The command.


def test_compare_prints_rows_differences_and_warnings(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    a = write_run(Path("a[b]"))
    b = write_run(Path("b"), "train=null", passed=False, machine=MACHINE | {"cpu": "d"})
    ended = command("compare", a, b)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert sum("qat" in line and "a[b]" in line and line.rstrip().endswith("pass") for line in lines) == 1
    assert sum("qat" in line and line.rstrip().endswith("FAIL") for line in lines) == 1
    (train,) = [line.split() for line in lines if line.split()[:1] == ["train"]]
    assert train[1] == "set" and train[-1] == "null" and not any(line.strip().startswith("train.") for line in lines)
    assert lines[-1] == "warning: machine.cpu differs (c | d): latencies cannot be compared"


def test_compare_in_80_columns_breaks_no_cell(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    full = row("qat").model_copy(update={"drop": 0.0163, "drop_ci95": (-0.0163, 0.0304), "file_bytes": 56100})
    results = [row("float_finetuned"), full]
    long = tmp_path / "a-run-with-a-name-that-leaves-no-room-beside-it"
    runs = [write_run(long, results=results), write_run(tmp_path / "b", "train.seed=3", results=results)]
    ended = command("compare", *runs)
    lines = ended.out.splitlines()
    for run, seed in zip(runs, (0, 3), strict=True):
        assert str(run) in lines
        assert f"  {run}: {seed}" in lines
    figures = [line for line in lines if "-1.63..+3.04" in line]
    assert len(figures) == 2 and max(map(len, figures)) <= 80
    assert sum(line.split()[:1] == ["float_finetuned"] for line in lines) == 2
    assert sum(line.rstrip().endswith("pass") for line in lines) == 2


def test_compare_of_equal_recipes(command: CommandLine, tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    assert "the recipes are the same\n" in command("compare", a, b).out
    alone = command("compare", a)
    assert alone.code == 0
    assert "the recipes" not in alone.out


def test_compare_as_json(command: CommandLine, tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", "train.seed=3", passed=False)
    ended = command("compare", a, b, "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert [(run["run"], run["gate"]) for run in found["runs"]] == [(str(a), True), (str(b), False)]
    assert [[result["gate"] for result in run["results"]] for run in found["runs"]] == [[None, True], [None, False]]
    assert found["runs"][0]["results"][1]["metric"]["value"] == 0.9
    assert found["recipe"] == [{"key": "train.seed", "values": {str(a): 0, str(b): 3}}]
    assert found["warnings"] == []
