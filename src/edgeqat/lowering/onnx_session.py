"""Running ONNX files: sessions with pinned threads, looking inside them, and the graph that really runs."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeqat.errors import InputError, MissingRuntimeError
from edgeqat.lowering.op_time import OpTime, totals

__all__ = ["OnnxSession", "float_ops", "optimized_ops"]

WARM_UP_CALLS = 10
"""Calls of a profiled session that are not counted."""

FLOAT = 1
"""TensorProto.FLOAT."""

TO_FLOAT = ("DequantizeLinear", "MatMulIntegerToFloat")
"""Ops over integers whose results are float."""

MOVING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Ops that compute nothing."""


class OnnxSession:
    """An ONNX Runtime session on the CPU.

    Args:
        model: The serialised model.
        threads: Threads within one op; ops run one after the other.
        optimized_to: Where ONNX Runtime writes the graph it really runs, if wanted.
        taps: Bytes that, appended to the model, make its inner values outputs.
        profiled_to: How the names of files begin that its profiler writes, if wanted.
        optimize: Whether it may replace nodes by others; without, it runs each as it stands in the file.
    """

    def __init__(
        self,
        model: bytes,
        threads: int = 1,
        optimized_to: Path | None = None,
        taps: bytes = b"",
        profiled_to: Path | None = None,
        optimize: bool = True,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingRuntimeError("onnxruntime", "onnxruntime", str(error)) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait busily for the next call would take the cores of whatever is measured beside this.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if profiled_to is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profiled_to)
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if optimized_to is not None:
            options.optimized_model_filepath = str(optimized_to)
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # The runtime has a dozen exception classes for a file it does not take; all mean the same here.
            raise InputError(f"ONNX Runtime refuses the model: {str(error).splitlines()[0]}") from error
        self._model, self._threads, self._taps = model, threads, taps
        self._tapped: OnnxSession | None = None
        self.inputs = [i.name for i in self._session.get_inputs()]
        self.outputs = [o.name for o in self._session.get_outputs()]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Nothing: a session owns its threads."""
        yield

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the integers of every value that has a grid."""
        outputs = self.run(inputs)
        if not self._taps:
            return outputs, {}
        if self._tapped is None:
            self._tapped = OnnxSession(self._model + self._taps, self._threads)
        everything = dict(zip(self._tapped.outputs, self._tapped.run(inputs), strict=True))
        return outputs, {name: _unsigned(v) for name, v in everything.items() if name not in self.outputs}

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the inputs in the model's order."""
        return [torch.from_numpy(array) for array in self._session.run(None, self.feed(inputs))]

    def feed(self, inputs: Sequence[Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """The inputs as the runtime takes them."""
        arrays = [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in inputs]
        return dict(zip(self.inputs, arrays, strict=True))

    def run_raw(self, feed: dict[str, np.ndarray[Any, Any]]) -> None:
        """One call and nothing else: what a latency measurement times."""
        self._session.run(None, feed)

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """What ONNX Runtime's profiler says of some calls, the slowest kind of op first."""
        with tempfile.TemporaryDirectory() as folder:
            profiled = OnnxSession(self._model, self._threads, profiled_to=Path(folder) / "profile")
            for _ in range(WARM_UP_CALLS + calls):
                profiled.run_raw(self.feed(inputs))
            events = json.loads(Path(profiled._session.end_profiling()).read_text(encoding="utf-8"))
        kernels = [event for event in events if event.get("name", "").endswith("_kernel_time")]
        kernels = kernels[len(kernels) * WARM_UP_CALLS // (WARM_UP_CALLS + calls) :]
        return totals(((event["args"]["op_name"], event["dur"] / 1000) for event in kernels), calls)


def _unsigned(integers: Tensor) -> Tensor:
    """Activations as integers 0..255: int8 ones are stored 128 less."""
    return integers.view(torch.uint8) ^ 128 if integers.dtype == torch.int8 else integers


def optimized_ops(model: bytes) -> Counter[str]:
    """How often each op occurs in the graph that ONNX Runtime really runs."""
    return Counter(node.op_type for node in _optimized(model).node)


def float_ops(model: bytes) -> Counter[str]:
    """How often each op that computes in float occurs in the graph that ONNX Runtime really runs."""
    graph, found = _optimized(model), Counter[str]()
    constants = {tensor.name for tensor in graph.initializer}
    floats = {info.name for info in graph.input if info.type.tensor_type.elem_type == FLOAT} - constants
    for node in graph.node:
        if node.op_type.startswith("Q"):  # QuantizeLinear, and the integer kernels
            continue
        if node.op_type in TO_FLOAT or floats.intersection(node.input):
            floats.update(node.output)
            if node.op_type not in (*TO_FLOAT, *MOVING):
                found[node.op_type] += 1
    return found


def _optimized(model: bytes) -> Any:
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        OnnxSession(model, optimized_to=path)
        return onnx.load(path).graph
