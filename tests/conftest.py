from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import edgeqat as eq
from edgeqat import artifact_stages
from edgeqat.measuring import latency, memory, profile
from helpers import CommandLine
from models import SmallNet, shake

# Test workers share the machine's few cores: more threads than cores make everything ten times slower.
torch.set_num_threads(1)

# Tests look at whether measuring works, not at the figures: a tenth of the calls, one process instead of three.
latency.BUDGET_S, latency.MIN_ROUNDS = 0.3, 50
memory.PROCESSES = 1
profile.CALLS = 5

# The same examples every time, and no deadline: machines differ in speed, properties do not.
settings.register_profile("edgeqat", deadline=None, derandomize=True, max_examples=60, database=None)
# New examples every night, several times as many; what fails is printed as a line that reproduces it.
settings.register_profile("nightly", deadline=None, max_examples=300, database=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "edgeqat"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random weights are the same in every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def few_rounds() -> Iterator[None]:
    """For tests of whole runs: how often is measured, and how much memory is used, is not what they look at."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(latency, "MIN_ROUNDS", 5)
        patched.setattr(latency, "MAX_ROUNDS", 5)
        # As where the system does not tell; a process for each artifact takes as long as all the rest of a run.
        patched.setattr(artifact_stages, "peak_memory", lambda artifact, threads: None)
        yield


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def small_program() -> eq.QuantizedProgram:
    """`SmallNet`, calibrated and converted."""
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    batch = torch.randn(16, 3, 8, 8)
    return eq.convert(eq.calibrate(eq.prepare(model, batch), [batch]))


@pytest.fixture(scope="session")
def small_artifact(small_program: eq.QuantizedProgram, tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    """`SmallNet` lowered, once; read only."""
    return eq.lower(small_program, "onnxruntime", tmp_path_factory.mktemp("artifact") / "small")


@pytest.fixture
def folder(small_artifact: eq.Artifact, tmp_path: Path) -> Path:
    """A copy of its folder, to damage."""
    return Path(shutil.copytree(small_artifact.folder, tmp_path / "small"))
