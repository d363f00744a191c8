from __future__ import annotations

import re
import sys

import pytest

import activations


def test_a_line_an_activation_size_and_runtime(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(activations, "RUNTIMES", ("onnxruntime",))
    monkeypatch.setattr(sys, "argv", ["activations.py", "--sizes", "16", "--activations", "relu", "hardswish"])
    activations.main()
    machine, versions, *lines = capsys.readouterr().out.splitlines()
    assert machine.startswith("machine: ") and versions.startswith("versions: ")
    row = re.compile(
        r"\| (\w+) \| 16 \| onnxruntime \| [\d.]+ \| [\d.]+ \| [\d.]+x \([\d.]+-[\d.]+\) \| \d+ \| \w+ \d+%.*\|"
    )
    found = [row.fullmatch(line) for line in lines[2:]]
    assert [match and match[1] for match in found] == ["relu", "hardswish"]
