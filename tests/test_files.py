"""Files and folders are whole or not there."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from edgeqat.errors import OutputError
from edgeqat.files import replace_folder, to_json, write_atomically
from helpers import digests


def test_write_atomically_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "ä\n")
    assert path.read_bytes() == b"\xc3\xa4\n"
    write_atomically(path, b"\x00\r\n")
    assert path.read_bytes() == b"\x00\r\n"
    assert list(path.parent.iterdir()) == [path]


def test_written_files_and_folders_are_as_readable_as_any_other(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write_atomically(tmp_path / "file", "x")
        with replace_folder(tmp_path / "folder"):
            pass
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


@pytest.mark.parametrize("target", [(os, "fsync"), (Path, "chmod"), (Path, "replace")], ids=lambda t: str(t[1]))
def test_a_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: tuple[object, str]
) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(*target, fail)
        with pytest.raises(OutputError, match=f"^cannot write {path}: No space left on device; choose another"):
            write_atomically(path, "new")
    assert digests(tmp_path).keys() == {"file"}
    assert path.read_text() == "old"


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"^cannot write .*file/below"):
        write_atomically(tmp_path / "file" / "below", "x")
    with pytest.raises(OutputError, match=r"^cannot write .*file/below"), replace_folder(tmp_path / "file" / "below"):
        raise AssertionError("nothing is written")
    with (
        pytest.raises(OutputError, match=r"^cannot replace .*file: Not a directory"),
        replace_folder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OutputError, match=r"^cannot write .*: Is a directory"):
        (tmp_path / "folder").mkdir()
        write_atomically(tmp_path / "folder", "x")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_replace_folder_replaces_whole(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    with replace_folder(folder) as new:
        (new / "a").write_text("1")
        assert not folder.exists()
    with replace_folder(folder) as new:
        (new / "b").write_text("2")
        assert (folder / "a").exists()
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in folder.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_replace_folder_leaves_the_old_one_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    folder = tmp_path / "folder"
    with replace_folder(folder) as new:
        (new / "a").write_text("old")
    with pytest.raises(error), replace_folder(folder) as new:
        (new / "a").write_text("half")
        raise error
    assert (folder / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_the_old_folder_is_there_until_the_new_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    with replace_folder(folder) as new:
        (new / "a").write_text("old")
    rename, held = Path.replace, []

    def fail(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".old"):
            # What a process that dies here would leave behind.
            held.extend(path.read_text() for path in tmp_path.rglob("a"))
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OutputError, match=r"^cannot replace .*: Input/output error; "), replace_folder(folder):
            pass
    assert held == ["old"]
    assert digests(tmp_path).keys() == {"folder/a"}


def test_json_is_strict_and_keeps_its_order() -> None:
    assert to_json({"b": 1, "a": "ä"}) == '{\n "b": 1,\n "a": "ä"\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json({"a": float("nan")})
