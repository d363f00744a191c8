"""How a command ends, and what it says then."""

from __future__ import annotations

import pytest

from edgeqat.endings import end_with_error, show_warning
from edgeqat.errors import CalibrationWarning, InputError


def test_an_error_is_one_line_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        end_with_error(InputError("found 3,\n   wanted 4"))
    assert (ended.value.code, capsys.readouterr().err) == (2, "error: found 3, wanted 4\n")


def test_a_warning_of_calibration_is_one_line_and_others_say_where_they_come_from(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show_warning(CalibrationWarning("conv1: found nothing but 0 in calibration"), CalibrationWarning, "a.py", 7)
    assert capsys.readouterr().err == "warning: conv1: found nothing but 0 in calibration\n"
    show_warning("old", DeprecationWarning, "a.py", 7)
    assert capsys.readouterr().err.startswith("a.py:7: DeprecationWarning: old")
