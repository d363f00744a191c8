"""ONNX Runtime on an x86 processor without VNNI: its own wheel, under qemu's user-mode emulation of a Haswell."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgeqat.replay.kernels import is_x86

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")

HASWELL = pytest.mark.skipif(
    QEMU is None or not is_x86(),
    reason="qemu-x86_64-static (Debian's qemu-user-static) is not installed, or this is no x86 machine",
)

RUN_ALL = """
import pathlib, sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, dict(numpy.load(path.with_suffix(".in.npz"))))
    names = [output.name for output in session.get_outputs()]
    numpy.savez(path.with_suffix(".out.npz"), **dict(zip(names, found)))
"""


def run_on_haswell(
    models: Mapping[str, tuple[bytes, Mapping[str, Tensor]]], folder: Path
) -> dict[str, dict[str, Tensor]]:
    """Every output of several ONNX files, by the file's name and the output's: AVX2, FMA, no AVX512, no VNNI.

    Args:
        models: By name: the file's bytes, and its inputs.
        folder: An empty one to work in.
    """
    for name, (model, inputs) in models.items():
        (folder / f"{name}.onnx").write_bytes(model)
        np.savez(folder / f"{name}.in.npz", **{key: tensor.numpy() for key, tensor in inputs.items()})
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, "-c", RUN_ALL, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {
        name: {key: torch.from_numpy(array) for key, array in np.load(folder / f"{name}.out.npz").items()}
        for name in models
    }


RUN_VERIFY = """
import pathlib, sys
path = sys.argv[1]
source = pathlib.Path(path, "verify.py").read_text()
# /proc/cpuinfo is the host's: what the emulated processor has is said here.
source = source.replace("def cpu_flags(", "def cpu_flags():\\n    return frozenset({'avx2'})\\n\\n\\ndef _host_flags(")
sys.argv = ["verify.py", path]
exec(compile(source, "verify.py", "exec"), {"__name__": "__main__"})
"""


def verify_on_haswell(folder: Path) -> tuple[int, str]:
    """(exit code, output) of the script that an artifact folder ships, run there."""
    command = [str(QEMU), "-cpu", "Haswell", sys.executable, "-c", RUN_VERIFY, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout
