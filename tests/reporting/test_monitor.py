"""What is told while something works: on a terminal of 80 columns, of 50, and where there is none."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from edgeqat.reporting.monitor import ConsoleMonitor, Followed, Silent
from edgeqat.reporting.terminal import message_console

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def shown(width: int, note: str) -> list[str]:
    """The lines that a bar leaves on a terminal, those it draws over included, without control codes."""
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, force_interactive=True, highlight=False)
    with ConsoleMonitor(console=console).steps("calibration", 1234) as advance:
        for _ in range(1234):
            advance(note)
    return [line.rstrip() for line in re.split(r"[\r\n]+", CONTROL.sub("", out.getvalue())) if line.strip()]


def test_a_bar_shows_count_rate_time_and_the_latest_figure_in_80_columns() -> None:
    last = shown(80, "loss 0.1234, top1 98.76%")[-1]
    assert len(last) <= 80
    assert re.search(r"calibration ━+ 1234/1234 [\d.]+/s \S+ loss 0\.1234, top1 98\.76%$", last), last


def test_a_narrow_terminal_cuts_the_figure_and_breaks_no_line() -> None:
    lines = shown(50, "loss 0.1234, top1 98.76%")
    assert max(map(len, lines)) <= 50
    assert all("calibration" in line for line in lines)


def test_without_a_terminal_there_is_no_bar_and_no_control_code() -> None:
    out = io.StringIO()
    monitor = ConsoleMonitor(console=Console(file=out, width=80, highlight=False))
    monitor.stage("train")
    with monitor.steps("training", 2) as advance:
        advance("loss 1")
    monitor.line("epoch 1/1")
    assert out.getvalue().splitlines() == ["   0.0 s  train", "          epoch 1/1"]


def test_no_color_means_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not message_console().is_terminal


@pytest.mark.parametrize("verbose", [False, True])
def test_details_are_told_where_they_are_wanted(verbose: bool) -> None:
    out = io.StringIO()
    ConsoleMonitor(verbose, Console(file=out, width=80)).detail("conv1: 3.2 ms")
    assert bool(out.getvalue()) == verbose


def test_items_are_followed_once_each_and_in_order() -> None:
    assert list(Followed(Silent(), "calibration", [3, 1, 2])) == [3, 1, 2]
