"""What docs/data.md shows is executed."""

from __future__ import annotations

from pathlib import Path

import torch

from edgeqat.factory import build_loss, build_metric
from edgeqat.train.losses import check_loss
from helpers import run_edgeqat
from pages import DOCS, blocks

DATA, TASK = (block.code for block in blocks(DOCS / "data.md", "python"))


def test_the_data_example_can_be_inspected(tmp_path: Path) -> None:
    (tmp_path / "my_data.py").write_text(DATA, encoding="utf-8")
    ended = run_edgeqat("inspect", "--set", "data.source=my_data.py:make", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "ops in INT8" in ended.out


def test_the_task_example_fits_a_model_of_several_outputs(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(TASK, encoding="utf-8")
    loss, metric = build_loss(f"{tmp_path}/my_task.py:loss"), build_metric(f"{tmp_path}/my_task.py:box_error")
    outputs, targets = {"boxes": torch.ones(3, 4, requires_grad=True)}, {"boxes": torch.zeros(3, 4)}
    check_loss(loss, "loss", "boxes", outputs, targets)
    assert metric.statistics(outputs, targets).tolist() == [1, 1, 1]
    assert not metric.higher_is_better
