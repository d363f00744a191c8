"""Running ONNX files in OpenVINO: models compiled for each shape, looking inside them, the graph that really runs."""

from __future__ import annotations

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
from edgeqat.replay.folder import FolderError
from edgeqat.replay.run_openvino import compile_openvino, infer_openvino, tap_groups

__all__ = ["OpenVinoSession", "layer_types"]

WARM_UP_CALLS = 10
"""Calls of a profiled model that are not counted."""

SHAPES_KEPT = 4
"""Compiled models that a session keeps: the latest shapes of inputs."""

PLUMBING = ("Const", "Input", "Output", "Reorder")
"""Layers of a compiled model that compute nothing."""


class OpenVinoSession:
    """An OpenVINO model on one device.

    Args:
        path: The ONNX file.
        engine: OpenVINO's name of the device.
        threads: Threads within an op.
        taps: Names of inner values, a line for each group that can be looked at together.
    """

    def __init__(self, path: Path, engine: str, threads: int, taps: bytes = b"") -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingRuntimeError("openvino", "openvino", str(error)) from error
        try:
            openvino.Core().read_model(path)
        except RuntimeError as error:
            raise InputError(f"OpenVINO refuses the model: {str(error).splitlines()[0]}") from error
        self._path, self._engine, self._threads, self._taps = path, engine, threads, tap_groups(taps)
        self._compiled: dict[Any, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Nothing: a session owns its threads."""
        yield

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the inputs in the model's order."""
        return [torch.from_numpy(array) for array in self._infer(_arrays(inputs), ())]

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the integers of every value that can be seen without changing what runs."""
        arrays = _arrays(inputs)
        values: dict[str, Tensor] = {}
        for names in self._taps:
            found = infer_openvino(self._compile(arrays, names), arrays)
            values |= {name: torch.from_numpy(array) for name, array in zip(names, found, strict=True)}
        return self.run(inputs), values

    def feed(self, inputs: Sequence[Tensor]) -> tuple[Any, list[np.ndarray[Any, Any]]]:
        """A request of the model compiled for these shapes, and the inputs as it takes them."""
        arrays = _arrays(inputs)
        return self._model(arrays, ()).create_infer_request(), arrays

    def run_raw(self, feed: tuple[Any, list[np.ndarray[Any, Any]]]) -> None:
        """One call and nothing else: what a latency measurement times."""
        request, arrays = feed
        request.infer(arrays, share_inputs=True, share_outputs=True)

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """What OpenVINO's counters say of some calls, the slowest kind of layer first."""
        arrays = _arrays(inputs)
        request = self._compile(arrays, (), profiled=True).create_infer_request()
        events: list[tuple[str, float]] = []
        for i in range(WARM_UP_CALLS + calls):
            request.infer(arrays)
            if i >= WARM_UP_CALLS:
                events += [(p.node_type, p.real_time.total_seconds() * 1000) for p in request.profiling_info]
        return totals((event for event in events if event[0] not in PLUMBING), calls)

    def _infer(self, arrays: list[np.ndarray[Any, Any]], names: Sequence[str]) -> list[Any]:
        return infer_openvino(self._model(arrays, names), arrays)

    def _model(self, arrays: list[np.ndarray[Any, Any]], names: Sequence[str]) -> Any:
        key = (tuple(array.shape for array in arrays), tuple(names))
        if key not in self._compiled:
            while len(self._compiled) >= SHAPES_KEPT:
                del self._compiled[next(iter(self._compiled))]
            self._compiled[key] = self._compile(arrays, names)
        return self._compiled[key]

    def _compile(self, arrays: list[np.ndarray[Any, Any]], names: Sequence[str], profiled: bool = False) -> Any:
        try:
            return compile_openvino(self._path, self._engine, self._threads, arrays, names, profiled)
        except FolderError as error:
            raise InputError(str(error)) from error


def _arrays(inputs: Sequence[Tensor]) -> list[np.ndarray[Any, Any]]:
    return [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in inputs]


def layer_types(compiled: Any) -> Counter[str]:
    """How often each layer occurs in a compiled model, with the precision it runs in: `Convolution u8`."""
    found: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        layer = str(info["layerType"].value)
        if layer not in PLUMBING:
            found[f"{layer} {info['runtimePrecision'].value}"] += 1
    return found
