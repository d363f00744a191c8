"""The command line as a user meets it, and folders as they look before and after."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeqat import cli
from edgeqat.replay.kernels import arithmetic_here

EXACT_ARITHMETIC = pytest.mark.skipif(
    arithmetic_here("onnxruntime") is None,
    reason="this processor's ONNX Runtime kernels have no known arithmetic (onnxruntime/x86 means VNNI)",
)
STAGE_LINE = re.compile(r" *\d+\.\d s  \S|          \S")
MAIN = "import sys; sys.argv[0] = 'edgeqat'; from edgeqat.cli import main; main()"
os.environ.pop("COLUMNS", None)  # pytest-xdist tells its workers that they have 80; a pipe has none
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refusal(self, code: int) -> str:
        """The one line of an expected error; stages of a run may stand before it, nothing else."""
        assert self.code == code, self
        assert "Traceback" not in self.err
        *stages, line = self.err.splitlines()
        assert all(STAGE_LINE.match(stage) for stage in stages), self.err
        assert line.startswith("error: ")
        return line


class CommandLine:
    """Runs commands in this process, which has torch loaded already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *args: str | Path) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["edgeqat", *map(str, args)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        found = self._capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return Ended(stop.value.code, found.out, found.err)


def run_python(code: str, *args: str | Path, cwd: Path | None = None) -> Ended:
    """Runs a program in a fresh interpreter; `args` become sys.argv[1:]."""
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)


def run_edgeqat(*args: str | Path, cwd: Path | None = None) -> Ended:
    """Runs the installed command in a fresh process."""
    command = [str(Path(sys.executable).with_name("edgeqat")), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    return Ended(done.returncode, done.stdout, done.stderr)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_byte(path: Path, at: int = -1) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)
