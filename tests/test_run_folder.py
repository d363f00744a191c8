"""The directory of a run: what may be written, resumed, replaced; and one process at a time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgeqat.errors import OutputError
from edgeqat.run_folder import FolderState, check_free, claimed
from helpers import ENVIRONMENT, digests

HOLD = """
import sys
from pathlib import Path
from edgeqat.run_folder import claimed

with claimed(Path(sys.argv[1]), resume=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


UNFINISHED = ["recipe.yaml", "checkpoints/float.json", "checkpoints/float.safetensors"]
FINISHED = [*UNFINISHED, "artifacts/qat/onnxruntime/model.onnx", "report.html", "report.json"]


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize("made", [[], [".edgeqat-lock"], [".edgeqat-lock", "checkpoints/float.json"]])
def test_what_is_free(tmp_path: Path, made: list[str], flags: dict[str, bool]) -> None:
    """Missing, empty, and what a run leaves that was killed while it emptied the directory."""
    assert check_free(tmp_path / "deep" / "run", **flags) is FolderState.FREE
    folder = fill(tmp_path / "run", *made)
    folder.mkdir(exist_ok=True)
    assert check_free(folder, **flags) is FolderState.FREE
    with claimed(folder, **flags):
        assert [path.name for path in folder.iterdir()] == [".edgeqat-lock"]


@pytest.mark.parametrize(
    ("names", "state", "ways"),
    [
        (UNFINISHED, FolderState.UNFINISHED, "pass --resume to continue it, --overwrite to replace it"),
        (FINISHED, FolderState.FINISHED, "pass --overwrite to replace it"),
    ],
    ids=["unfinished", "finished"],
)
def test_what_holds_a_run(tmp_path: Path, names: list[str], state: FolderState, ways: str) -> None:
    folder = fill(tmp_path / "run", *names, ".report.json.x7y")  # and a temporary file of a killed process
    before = digests(folder)
    with pytest.raises(OutputError) as caught:
        check_free(folder)
    assert str(caught.value) == f"{folder} holds {state.value}; {ways}, or choose another directory"
    assert check_free(folder, resume=True) is check_free(folder, overwrite=True) is state
    assert digests(folder) == before


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}])
@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["photo.png"], "holds files that are no edgeqat run, such as photo.png"),
        ([*FINISHED, "notes.txt"], "holds files that are no edgeqat run, such as notes.txt"),
        ([".edgeqat-lock", "notes.txt"], "holds files that are no edgeqat run, such as notes.txt"),
        (["report.json"], "holds report.json but no recipe.yaml, without which it is no run to resume or replace"),
        ([".notes.txt.swp"], "holds files that are no edgeqat run, such as .notes.txt.swp"),
    ],
)
def test_what_is_not_ours_is_never_touched(
    tmp_path: Path, names: list[str], words: str, flags: dict[str, bool]
) -> None:
    folder = fill(tmp_path / "run", *names)
    before = digests(folder)
    with pytest.raises(OutputError) as caught:
        check_free(folder, **flags)
    assert words in str(caught.value)
    with pytest.raises(OutputError), claimed(folder, **flags):
        pass
    assert digests(folder) == before


def test_overwriting_empties_and_the_lock_file_goes(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", *FINISHED)
    with claimed(folder, overwrite=True):
        assert [path.name for path in folder.iterdir()] == [".edgeqat-lock"]
        fill(folder, "recipe.yaml")
    assert [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_resuming_keeps_whole_checkpoints_and_nothing_that_is_made_again(tmp_path: Path) -> None:
    epochs = "checkpoints/epochs"
    whole = [*UNFINISHED, f"{epochs}/float-0001.json", f"{epochs}/float-0001.safetensors"]
    left = [
        f"{epochs}/float-0002.safetensors",  # killed before its JSON file
        f"{epochs}/.float-0003.safetensors.abc",
        "checkpoints/.ptq.json.abc",
        ".report.html.abc",
        "report.html",
        "artifacts/qat/onnxruntime/model.onnx",
        "artifacts/qat/.torchscript.abc/model.pt",
        "latency/qat-onnxruntime.csv",
    ]
    folder = fill(tmp_path / "run", *whole, *left)
    with claimed(folder, resume=True):
        assert set(digests(folder)) == {*whole, ".edgeqat-lock"}
    assert set(digests(folder)) == set(whole)


def test_a_finished_run_is_not_claimed_to_be_resumed(tmp_path: Path) -> None:
    folder = fill(tmp_path / "run", *FINISHED)
    before = digests(folder)
    with pytest.raises(OutputError, match="another process has just finished the run"), claimed(folder, resume=True):
        pass
    assert digests(folder) == before


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("names", [[], UNFINISHED], ids=["new", "unfinished"])
def test_one_process_at_a_time(tmp_path: Path, names: list[str]) -> None:
    folder = fill(tmp_path / "run", *names)
    with held_by_another(folder) as process:
        before = digests(folder)
        for flags in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(OutputError, match="another process is writing a run into .*; wait for it, or choose"):
                check_free(folder, **flags)
            with pytest.raises(OutputError, match="another process is writing a run into"), claimed(folder, **flags):
                pass
        assert digests(folder) == before
        process.send_signal(signal.SIGKILL)
        process.wait()
        with claimed(folder, resume=True):  # the system has released the lock of the dead
            assert (folder / ".edgeqat-lock").exists()


def test_the_same_process_holds_it_too(tmp_path: Path) -> None:
    with claimed(tmp_path / "run"), pytest.raises(OutputError, match="another process"):
        check_free(tmp_path / "run", resume=True)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_is_one_line(tmp_path: Path, code: int) -> None:
    folder = tmp_path / "run"
    with pytest.raises(OutputError) as caught, claimed(folder):
        raise OSError(code, os.strerror(code), str(folder / "latency"))
    assert str(caught.value) == (
        f"cannot write {folder}/latency: {os.strerror(code)}; free space or choose another place"
    )


def test_any_other_error_is_not_taken_for_the_disk_s(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), claimed(tmp_path / "run"):
        raise FileNotFoundError(errno.ENOENT, "gone")
