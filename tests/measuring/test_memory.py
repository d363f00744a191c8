from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import EdgeqatError, TamperedError
from edgeqat.lowering.golden import golden_inputs
from edgeqat.measuring.memory import peak_memory
from edgeqat.replay import probe, run_onnxruntime
from edgeqat.replay.script import probe_script
from helpers import flip_byte

LINUX = pytest.mark.skipif(not probe.CLEAR_REFS.exists(), reason="peaks are read from Linux' /proc")


class Wide(nn.Module):
    """Few weights; an activation of 32 channels at the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.narrow = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.widen(x).relu())


def lowered(size: int, folder: Path) -> eq.Artifact:
    images = torch.randn(2, 3, size, size)
    program = eq.convert(eq.calibrate(eq.prepare(Wide().eval(), images), [images]))
    return eq.lower(program, "onnxruntime", folder, golden_inputs=images)


@LINUX
def test_peak_grows_with_the_activations(tmp_path: Path) -> None:
    """At 512 pixels the widened activation alone is 8 MB as uint8; both files have the same few weights."""
    small, large = lowered(8, tmp_path / "small"), lowered(512, tmp_path / "large")
    few, many = peak_memory(small), peak_memory(large)
    assert few is not None and many is not None
    assert few > 0
    assert many > few + 32 * 512 * 512


@LINUX
def test_the_probe_of_torchscript(tmp_path: Path) -> None:
    """The same probe on a scripted model, whose largest tensor is 32 MB as float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(Wide().eval()).save(tmp_path / "model.pt")
    artifact = lowered(512, tmp_path / "folder")
    (artifact.folder / "model.pt").write_bytes((tmp_path / "model.pt").read_bytes())
    manifest = {
        **artifact.manifest,
        "runtime": "torchscript",
        "engine": torch.backends.quantized.supported_engines[-1],
    }
    manifest["model"] = "model.pt"
    peak = peak_memory(eq.Artifact(artifact.folder, manifest))
    assert peak is not None and peak > 4 * 32 * 512 * 512


def test_nothing_is_told_without_proc(
    small_artifact: eq.Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    request = {"model": str(small_artifact.path), "engine": "CPUExecutionProvider", "threads": 1, "calls": 1}
    feed = golden_inputs(small_artifact.folder, small_artifact.manifest, 1)
    assert probe.probe(run_onnxruntime.start, request, feed) is None


def test_one_process_that_does_not_tell_makes_the_figure_unknown(
    small_artifact: eq.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeqat.measuring.memory.PROCESSES", 3)
    told = iter([1, None, 3])
    monkeypatch.setattr("edgeqat.measuring.memory._measure_once", lambda artifact, threads: next(told))
    assert peak_memory(small_artifact) is None


def test_the_probe_holds_no_torch() -> None:
    code = probe_script("onnxruntime").replace(
        "probe_main(start)",
        "start('CPUExecutionProvider', 1)\n"
        "    print(json.dumps(sorted({'torch', 'edgeqat', 'onnx', 'onnxruntime'} & set(sys.modules))))",
    )
    ended = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == ["onnxruntime"]


def test_a_process_that_fails_is_named(folder: Path) -> None:
    artifact = eq.load_artifact(folder)
    artifact.path.write_bytes(b"no model")
    with pytest.raises(
        EdgeqatError, match=r"measuring the memory of .*small failed with exit code 1: .*INVALID_PROTOBUF"
    ):
        peak_memory(artifact)


def test_golden_inputs_that_are_damaged(folder: Path) -> None:
    artifact = eq.load_artifact(folder)
    flip_byte(folder / "golden.safetensors", at=0)
    with pytest.raises(TamperedError, match="cannot be read as safetensors"):
        peak_memory(artifact)


def test_golden_inputs_are_repeated_where_more_are_asked_for(small_artifact: eq.Artifact) -> None:
    (all16,) = golden_inputs(small_artifact.folder, small_artifact.manifest, 16).values()
    (more,) = golden_inputs(small_artifact.folder, small_artifact.manifest, 20).values()
    assert more.shape == (20, *all16.shape[1:])
    assert (more[:16] == all16).all() and (more[16:] == all16[:4]).all()
    with pytest.raises(TamperedError, match="has no input 'other'"):
        golden_inputs(small_artifact.folder, {"inputs": {"other": {}}}, 1)
