"""Runs in two processes, as a user starts them; and what becomes of one that loses a process or is stopped."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

import edgeqat as eq
from edgeqat.errors import RecipeError
from edgeqat.processes import team_of
from edgeqat.recipe import load_recipe
from edgeqat.recipe_compute import ComputeSection
from helpers import ENVIRONMENT, MAIN

SETTINGS = [
    "data.image_size=16",
    "data.calibration_n=64",
    "train.float_epochs=3",
    "train.qat_epochs=1",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
    "compute.timeout=60",
    "compute.checkpoint_seconds=0.05",
]
TWO = "compute.devices=2"
EDGEQAT = [sys.executable, "-c", MAIN]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "edgeqat"]
TRAINING = "epoch 1/3"


def words(folder: Path, *more: str, command: Sequence[str] = EDGEQAT) -> list[str]:
    settings = [part for setting in [*SETTINGS, *(m for m in more if "=" in m)] for part in ("--set", setting)]
    return [*command, "run", "digits-edge", "-o", str(folder), *settings, *(m for m in more if "=" not in m)]


def finish(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)


def errors(told: str) -> list[str]:
    """What a command says of what went wrong; nothing is left of it in several lines."""
    assert "Traceback" not in told, told
    return [line for line in told.splitlines() if line.startswith(("error:", "interrupted:"))]


def while_training(command: list[str], act: Callable[[psutil.Process, list[psutil.Process]], None]) -> tuple[int, str]:
    """Starts a command, does something to it or its processes in training, and waits for its end: code, stderr."""
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    told = ""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            told += line
            if TRAINING in line:
                break
        parent = psutil.Process(process.pid)
        ranks = [p for p in parent.children() if "RANK" in p.environ()]
        assert len(ranks) == 2, told
        act(parent, sorted(ranks, key=lambda p: int(p.environ()["RANK"])))
        told += process.stderr.read()
    for left in ranks:
        assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
    return process.returncode, told


def begun(command: list[str]) -> str:
    """What a command tells until training goes on; it is killed then."""
    told = ""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            told += line
            if "resumed after" in line:
                break
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
    return told


@pytest.mark.parametrize("start", ["edgeqat run", "torchrun"])
def test_two_processes_end_with_one_run(tmp_path: Path, start: str) -> None:
    folder = tmp_path / "run"
    command = words(folder, TWO) if start == "edgeqat run" else words(folder, command=TORCHRUN)
    done = finish(command)
    assert done.returncode == 0, done.stderr
    assert errors(done.stderr) == []
    assert len(re.findall(r"epoch 1/3: loss", done.stderr)) == 1  # told once
    assert done.stdout.count("report: ") == 1
    report = json.loads((folder / "report.json").read_text())
    assert {
        row["parity"]["bit_identical"] for row in report["results"] if row["variant"] == "qat" and row["parity"]
    } == {1.0}
    record = json.loads((folder / "checkpoints" / "qat.json").read_text())
    assert record["environment"]["processes"] == 2
    again = finish(words(folder, "--resume"))
    assert again.returncode == 0 and "is finished" in again.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_which_one_process_then_goes_on_with(tmp_path: Path, rank: int) -> None:
    folder = tmp_path / "run"
    code, told = while_training(words(folder, TWO), lambda _, ranks: ranks[rank].kill())
    assert code == 5
    assert len(errors(told)) == 1 and "the same command with --resume goes on" in told, told
    assert not (folder / "report.json").exists()
    if rank == 0:
        return
    again = finish(words(folder, "--resume"))
    assert again.returncode == 0, again.stderr
    assert "resumed after epoch" in again.stderr
    assert "processes 2 then and 1 now: the last bits may differ" in again.stderr
    assert (folder / "report.json").exists()


@pytest.mark.parametrize(("rank", "said"), [(1, "has not answered in time (compute.timeout)"), (0, "does not answer")])
def test_a_process_that_hangs_is_not_waited_for_longer_than_was_said(tmp_path: Path, rank: int, said: str) -> None:
    command = words(tmp_path / "run", TWO, "compute.timeout=5")
    code, told = while_training(command, lambda _, ranks: ranks[rank].suspend())
    assert code == 5
    assert len(errors(told)) == 1 and said in errors(told)[0], told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_after_a_step_with_130(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    code, told = while_training(
        [*words(folder, TWO, "compute.checkpoint_seconds=0")], lambda parent, _: parent.send_signal(number)
    )
    assert code == 130
    assert len(errors(told)) == 1 and errors(told)[0].endswith("the same command with --resume continues it"), told
    within = list((folder / "checkpoints" / "epochs").glob("float-*-*.json"))
    assert len(within) == 1  # what no checkpoint after a whole epoch has
    if number is signal.SIGINT:
        return
    assert re.search(r"resumed after epoch \d/3 and \d+ steps", begun(words(folder, TWO, "--resume")))


def test_what_is_wrong_is_said_once(tmp_path: Path) -> None:
    missing = finish(words(tmp_path / "run", TWO, f"data.source={tmp_path}/nothing"))
    assert missing.returncode == 2 and len(errors(missing.stderr)) == 1, missing.stderr
    diverged = finish(words(tmp_path / "run", TWO, "train.float_lr=1e30"))
    assert diverged.returncode == 2 and len(errors(diverged.stderr)) == 1, diverged.stderr
    assert "stage float; " in diverged.stderr
    auto = finish(words(tmp_path / "other", TWO, "--auto"))
    assert auto.returncode == 2
    assert errors(auto.stderr)[0].startswith(
        "error: found 2 processes, and run --auto works in one process on the CPU;"
    )
    absent = finish(words(tmp_path / "run", TWO, "compute.accelerator=gpu"))
    assert absent.returncode == 2 and len(errors(absent.stderr)) == 1, absent.stderr
    unknown = finish(words(tmp_path / "run", "train.epochs=1", command=TORCHRUN))
    assert len(errors(unknown.stderr.split("Traceback")[0])) == 1, unknown.stderr  # then comes torchrun's own
    assert not (tmp_path / "other").exists()


def test_processes_that_nobody_has_started_are_asked_for() -> None:
    wanted = "start them with `edgeqat run` on one machine, or `torchrun -m edgeqat run` on each"
    with pytest.raises(RecipeError, match=re.escape(wanted)), team_of(ComputeSection(devices=2)):
        pass
    with pytest.raises(RecipeError, match="found compute.devices 1 and compute.nodes 2, wanted as many processes"):
        eq.run(load_recipe("digits-edge", ["compute.nodes=2"]), Path("/nowhere"))
