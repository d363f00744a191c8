"""ONNX Runtime's kernels, here and on emulated 64-bit ARM: programs run on each and held against its arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.onnx_session import OnnxSession, optimized_ops
from edgeqat.lowering.to_onnx import spell_model, taps_suffix
from edgeqat.machine import arithmetic_here
from edgeqat.program import QuantizedProgram

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import arm_emulation

WORKER = """
import sys
import numpy as np
import onnxruntime
for line in sys.stdin:
    path = line.strip()
    request = np.load(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = path + ".onnx"
    model = request["model"].tobytes()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {item.name: request[f"input{i}"] for i, item in enumerate(session.get_inputs())})
    np.savez(path, **{item.name: value for item, value in zip(session.get_outputs(), found)})
    print("done", flush=True)
"""
"""Runs under emulation: a line on its standard input names a request, which the results replace."""


class Here:
    """The kernels of this machine."""

    arithmetic = arithmetic_here("onnxruntime") or "onnxruntime/x86"

    def run(self, model: bytes, taps: bytes, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], Counter[str]]:
        """Every output and tapped value by name; and the ops of the graph that ran, without taps."""
        session = OnnxSession(model + taps)
        return dict(zip(session.outputs, session.run(inputs), strict=True)), optimized_ops(model)

    def close(self) -> None:
        """Nothing runs."""


class Emulated:
    """Those of one emulated processor, in one process for many models."""

    arithmetic = "onnxruntime/arm64"

    def __init__(self, cpu: str) -> None:
        self._place = tempfile.TemporaryDirectory()
        script = Path(self._place.name) / "worker.py"
        script.write_text(WORKER)
        self._process = subprocess.Popen(
            arm_emulation.command(script, cpu=cpu),
            env=arm_emulation.environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, model: bytes, taps: bytes, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], Counter[str]]:
        """As `Here.run`."""
        values, _ = self._ask(model + taps, inputs)
        return values, self._ask(model, inputs)[1]

    def _ask(self, model: bytes, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], Counter[str]]:
        path = Path(self._place.name) / "request.npz"
        arrays = {f"input{i}": tensor.numpy() for i, tensor in enumerate(inputs)}
        np.savez(path, model=np.frombuffer(model, np.uint8), **arrays)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n", "the emulated process ended"
        with np.load(path) as found:
            values = {name: torch.from_numpy(found[name]) for name in found.files}
        ops = Counter(node.op_type for node in onnx.load(f"{path}.onnx").graph.node)
        return values, ops

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._place.cleanup()


EMULATED = arm_emulation.is_installed() and os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
PROCESSORS = ["here", *(arm_emulation.CPUS if EMULATED else ())]
"""Whose kernels the tests of single ops run; emulated ones take minutes, so that they run at night."""

current: list[Here | Emulated] = []
"""The kernels of the test that runs; the fixture `onnx_kernels` sets them."""


def check(program: QuantizedProgram, inputs: list[Tensor], fused: str, times: int | None = None) -> dict[str, Tensor]:
    """Asserts that the runtime ran the fused integer kernel, and that its integers are the reference's.

    Args:
        program: The program.
        inputs: Its inputs.
        fused: The op that must occur in the graph that really runs.
        times: How often; None for at least once.

    Returns:
        Every value with a grid.
    """
    (kernels,) = current
    model = spell_model(program).SerializeToString()
    found, ops = kernels.run(model, taps_suffix(program), inputs)
    assert ops[fused] == times if times is not None else ops[fused] >= 1, ops
    outputs, values = Interpreter(program, ARITHMETICS[kernels.arithmetic]).run_with_taps(inputs)
    for name, expected in values.items():
        assert torch.equal(found[name].float(), expected), f"{name}: {int((found[name] != expected).sum())} differ"
    for name, expected in zip(program.outputs, pytree.tree_leaves(outputs), strict=True):
        assert torch.equal(found[name], expected), name
    return values
