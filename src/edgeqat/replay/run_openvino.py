"""Running ONNX files in OpenVINO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgeqat.replay.folder import FolderError, reason_of
from edgeqat.replay.runner import Call


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    arrays = list(feed.values())
    values: dict[str, Any] = {}
    for names in tap_groups(taps):
        values |= zip(names, infer_openvino(compile_openvino(path, engine, 1, arrays, names), arrays), strict=True)
    found = infer_openvino(compile_openvino(path, engine, 1, arrays), arrays)
    return dict(zip(outputs, found, strict=True)), values


def start(engine: str, threads: int) -> Callable[[Path, dict[str, Any]], Call]:
    """Imports OpenVINO; returns what makes a call of a model file and its inputs."""
    import openvino  # noqa: F401

    def load(model: Path, feed: dict[str, Any]) -> Call:
        arrays = list(feed.values())
        request = compile_openvino(model, engine, threads, arrays).create_infer_request()
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)

    return load


def tap_groups(taps: bytes) -> list[list[str]]:
    """Names of values, a group a line, between tabs: those that may be looked at together, see `to_openvino`."""
    return [line.split("\t") for line in taps.decode().split("\n") if line]


def compile_openvino(
    path: Path,
    engine: str,
    threads: int,
    inputs: Sequence[Any],
    names: Sequence[str] = (),
    profiled: bool = False,
) -> Any:
    """A model compiled for the shapes of some inputs, with which it is faster than with open ones.

    Args:
        path: The ONNX file.
        engine: OpenVINO's name of the device.
        threads: Threads within an op.
        inputs: Arrays in the model's order.
        names: Inner tensors that are its outputs instead: the model ends with them.
        profiled: Whether it counts the time of each op.

    Raises:
        FolderError: OpenVINO refuses the file.
    """
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": profiled}
    core = openvino.Core()
    try:
        model = core.read_model(path)
        if names:
            tensors = {name: out for op in model.get_ops() for out in op.outputs() for name in out.get_names()}
            ends = [openvino.opset13.result(tensors[name]) for name in names]
            model = openvino.Model(ends, model.get_parameters(), "taps")
        ports = zip(model.inputs, inputs, strict=True)
        model.reshape({port: openvino.PartialShape(list(array.shape)) for port, array in ports})
        return core.compile_model(model, engine, settings)
    except RuntimeError as error:
        raise FolderError(f"OpenVINO refuses the model: {reason_of(error)}; fetch the artifact again") from error


def infer_openvino(compiled: Any, inputs: Sequence[Any]) -> list[Any]:
    """The outputs of a compiled model, in its order."""
    try:
        found = compiled(list(inputs))
    except RuntimeError as error:
        raise FolderError(f"OpenVINO refuses the model: {reason_of(error)}") from error
    return [found[i].copy() for i in range(len(compiled.outputs))]
