"""How a command ends, and what it says then: one line on standard error, from one process of a run; its exit code."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from types import FrameType
from typing import Any, NoReturn, TextIO

from edgeqat.errors import CalibrationWarning, EdgeqatError, LostProcessError, SkippedWarning
from edgeqat.launch import is_first, is_launched_here

PATIENCE = 5.0
"""Seconds that a process which another one tells of waits for that."""


def fail(message: str, code: int) -> NoReturn:
    """Ends with a line that begins with "error:", whatever line breaks the message has."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def end_with_error(error: EdgeqatError) -> NoReturn:
    """Ends with an error's own line and code; silently where another process of the run tells of it."""
    if not _another_tells(error):
        fail(str(error), error.exit_code)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE)  # the launcher ends the others where one has failed: that one is to tell first
    sys.exit(error.exit_code)


def _another_tells(error: EdgeqatError) -> bool:
    """Whether another process of the run tells of an error: the first one, or the one that has started them all."""
    if isinstance(error, LostProcessError):
        return not is_first() or (error.gone and is_launched_here())
    return not is_first() if error.told is None else error.told


def end_with_misuse(error: Any) -> NoReturn:
    """Ends with what the command line found wrong in its own use, or with the help that it has to say."""
    message: str = error.format_message()
    if message.startswith("Usage:"):  # called without a command: the message is the help
        print(message, file=sys.stderr)
        sys.exit(2)
    command = "edgeqat" if error.ctx is None else error.ctx.command_path
    fail(f"{message} See {command} --help.", 2)


def interrupt(_: int, __: FrameType | None) -> None:
    """SIGTERM is what Ctrl-C is: files half written are removed, and the user told how to go on."""
    raise KeyboardInterrupt


def interrupted(advice: str) -> NoReturn:
    """Ends as an interrupted command does, with how to go on."""
    if is_first():
        print(f"interrupted: {advice}", file=sys.stderr)
    sys.exit(130)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours is for the user, in a line; others are for who can change the code, and say where it is."""
    if issubclass(category, CalibrationWarning) and not is_first():
        return  # ranges are those of all processes
    if issubclass(category, (CalibrationWarning, SkippedWarning)):
        print(f"warning: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)
