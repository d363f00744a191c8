from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeqat.diagnose.trial_log import TrialLog
from edgeqat.errors import OutputError


def never() -> dict[str, int]:
    raise AssertionError("it was measured again")


def test_what_is_logged_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "trials.jsonl"
    log = TrialLog(path, {"weights": "abc"})
    assert log.once("trial", ["a"], lambda: {"drop": 0.5}) == {"drop": 0.5}
    assert log.once("trial", ["a"], never) == {"drop": 0.5}
    again = TrialLog(path, {"weights": "abc"})
    assert again.once("trial", ["a"], never) == {"drop": 0.5}
    (line,) = map(json.loads, path.read_text().splitlines())
    assert (line["kind"], line["of"], line["found"]) == ("trial", ["a"], {"drop": 0.5})


@pytest.mark.parametrize(
    ("kind", "of", "identity"), [("size", ["a"], "abc"), ("trial", ["b"], "abc"), ("trial", ["a"], "other")]
)
def test_everything_that_a_measurement_depends_on_tells_it_apart(
    tmp_path: Path, kind: str, of: list[str], identity: str
) -> None:
    path = tmp_path / "trials.jsonl"
    TrialLog(path, {"weights": "abc"}).once("trial", ["a"], lambda: {"drop": 0.5})
    assert TrialLog(path, {"weights": identity}).once(kind, of, lambda: {"drop": 0.25}) == {"drop": 0.25}


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_line_is_measured_again_and_spoils_no_other(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trials.jsonl"
    log = TrialLog(path, {})
    for name in ("a", "b"):
        log.once("trial", name, lambda: {"drop": 0.5})
    path.write_bytes(path.read_bytes()[:-cut])
    log = TrialLog(path, {})
    log.once("trial", "a", never)
    # A line that lacks its end alone is whole, and counts.
    log.once("trial", "b", never if cut == 1 else lambda: {"drop": 0.5})
    log.once("trial", "c", lambda: {"drop": 0.75})
    log = TrialLog(path, {})
    assert [log.once("trial", name, never)["drop"] for name in ("a", "b", "c")] == [0.5, 0.5, 0.75]


def test_without_a_file_nothing_is_written(tmp_path: Path) -> None:
    log = TrialLog(None, {})
    log.once("trial", "a", lambda: {"drop": 0.5})
    log.once("trial", "a", never)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write "):
        TrialLog(tmp_path / "file" / "trials.jsonl", {}).once("trial", "a", lambda: {"drop": 0.5})
