"""Running LiteRT files, by the XNNPACK delegate or by LiteRT's own kernels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.folder import FolderError, reason_of
from edgeqat.replay.runner import Call, quiet_runtime


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    model, arrays = path.read_bytes(), list(feed.values())
    found = call_litert(load_litert(model, engine, 1), arrays)
    values = tapped_litert(load_litert(model_with_taps(model, taps), engine, 1), arrays, taps) if taps else {}
    return dict(zip(outputs, found, strict=True)), values


def start(engine: str, threads: int) -> Callable[[Path, dict[str, Any]], Call]:
    """Imports LiteRT; returns what makes a call of a model file and its inputs."""
    from ai_edge_litert import interpreter  # noqa: F401

    def load(model: Path, feed: dict[str, Any]) -> Call:
        loaded, arrays = load_litert(model.read_bytes(), engine, threads), list(feed.values())
        call_litert(loaded, arrays)
        return lambda: invoke_litert(loaded, arrays)

    return load


def load_litert(model: bytes, engine: str, threads: int) -> Any:
    """An interpreter of a model on one engine.

    Raises:
        FolderError: LiteRT cannot read the model.
    """
    from ai_edge_litert import interpreter

    kind = interpreter.OpResolverType
    resolver = kind.BUILTIN if engine == "xnnpack" else kind.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with quiet_runtime():
            return interpreter.Interpreter(
                model_content=model, num_threads=threads, experimental_op_resolver_type=resolver
            )
    except (RuntimeError, ValueError) as error:
        raise FolderError(f"LiteRT refuses the model: {reason_of(error)}; fetch the artifact again") from error


def call_litert(loaded: Any, arrays: list[Any]) -> list[Any]:
    """The outputs for some inputs, whose batch may be another than before."""
    try:
        for entry, array in zip(loaded.get_input_details(), arrays, strict=True):
            if tuple(entry["shape"]) != array.shape:
                loaded.resize_tensor_input(entry["index"], array.shape)
        with quiet_runtime():
            loaded.allocate_tensors()
        return invoke_litert(loaded, arrays)
    except (RuntimeError, ValueError) as error:
        raise FolderError(f"LiteRT cannot run the model: {reason_of(error)}") from error


def invoke_litert(loaded: Any, arrays: list[Any]) -> list[Any]:
    """The outputs for inputs of the same sizes as before."""
    for entry, array in zip(loaded.get_input_details(), arrays, strict=True):
        loaded.set_tensor(entry["index"], array)
    loaded.invoke()
    return [loaded.get_tensor(entry["index"]) for entry in loaded.get_output_details()]


def model_with_taps(model: bytes, taps: bytes) -> bytes:
    """The same file with every value that has a grid among its outputs."""
    given = json.loads(taps)
    at, offset = int(given["at"]), int(given["offset"])
    return model[:at] + offset.to_bytes(4, "little") + model[at + 4 :] + bytes.fromhex(given["append"])


def tapped_litert(loaded: Any, arrays: list[Any], taps: bytes) -> dict[str, Any]:
    """The integers of every value with a grid, uint8, in the model's own order of dimensions."""
    found = call_litert(loaded, arrays)
    # int8 activations are stored 128 less, and their dimensions in the order that the taps name.
    return {
        name: np.ascontiguousarray((found[at].view(np.uint8) ^ 128).transpose(np.argsort(order)))
        for name, at, order in json.loads(taps)["values"]
    }
