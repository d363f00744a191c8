"""Artifact folders on 64-bit ARM, by emulation: verify.py as a device would run it.

Single ops run there in test_onnxruntime_arithmetic.py and test_onnxruntime_elements.py, with
HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import edgeqat as eq
from edgeqat.replay.folder import read_safetensors
from helpers import EXACT_ARITHMETIC, flip_byte
from onnx_kernels import arm_emulation

INSTALLED = pytest.mark.skipif(
    not arm_emulation.is_installed(),
    reason="there is no emulated 64-bit ARM here: python tools/arm_emulation.py install",
)


class Sums(nn.Module):
    """Two additions and a product behind convs: ARM's own arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3, padding=1), nn.Linear(24, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        z = self.conv2(y) + y
        z = torch.sigmoid(z) * z + y
        return self.fc(z.mean((-2, -1)))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> eq.Artifact:
    torch.manual_seed(3)
    batch = torch.randn(16, 3, 32, 32)
    program = eq.convert(eq.calibrate(eq.prepare(Sums().eval(), batch, "onnxruntime"), [batch]))
    return eq.lower(program, "onnxruntime", tmp_path_factory.mktemp("arm") / "sums", golden_inputs=batch)


def verified(folder: Path, cpu: str) -> tuple[int, str]:
    """How verify.py of a folder ends on an emulated processor, and what it says."""
    words = arm_emulation.command(folder / "verify.py", cpu=cpu)
    done = subprocess.run(words, env=arm_emulation.environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


@INSTALLED
@EXACT_ARITHMETIC
@pytest.mark.parametrize("cpu", arm_emulation.CPUS)
def test_a_folder_is_verified_to_the_bit(sums: eq.Artifact, small_artifact: eq.Artifact, cpu: str) -> None:
    for artifact in (sums, small_artifact):
        expected = "verified: 100.00% of outputs bit-identical to onnxruntime/arm64 on 16 samples"
        assert verified(artifact.folder, cpu) == (0, expected)


@INSTALLED
@EXACT_ARITHMETIC
def test_a_changed_model_fails_there(sums: eq.Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sums.folder, tmp_path / "changed"))
    flip_byte(folder / "model.onnx", -40)
    assert verified(folder, "max")[0] == 2


@EXACT_ARITHMETIC
def test_golden_vectors_hold_both_arithmetics(sums: eq.Artifact, small_artifact: eq.Artifact) -> None:
    """Of sums, ARM's own; where no integer differs, the name of the arithmetic that they are shared with."""
    assert sums.manifest["golden"]["onnxruntime/arm64"] == "onnxruntime/arm64"
    golden = read_safetensors(small_artifact.folder / "golden.safetensors")
    assert small_artifact.manifest["golden"]["onnxruntime/arm64"] == "onnxruntime/x86"
    assert not [key for key in golden if key.startswith("onnxruntime/arm64/outputs")]
