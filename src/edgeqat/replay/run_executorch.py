"""Running ExecuTorch files; the thread pool is a global of the process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeqat.replay.folder import FolderError, reason_of
from edgeqat.replay.runner import Call, quiet_runtime

TAPS_HEADER = 8
"""Bytes of the number that tells how long the description before a tapped model file is."""


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    import torch

    inputs = [torch.from_numpy(array.copy()) for array in feed.values()]
    set_executorch_threads(1)
    model = path.read_bytes()
    found = [tensor.numpy() for tensor in call_executorch(load_executorch(model), inputs)]
    values = {name: value.numpy() for name, value in tapped_executorch(taps, inputs).items()} if taps else {}
    return dict(zip(outputs, found, strict=True)), values


def start(engine: str, threads: int) -> Callable[[Path, dict[str, Any]], Call]:
    """Imports ExecuTorch and sets its threads; returns what makes a call of a model file and its inputs."""
    import torch

    set_executorch_threads(threads)

    def load(model: Path, feed: dict[str, Any]) -> Call:
        loaded = load_executorch(model.read_bytes())
        inputs = [torch.from_numpy(array.copy()) for array in feed.values()]
        return lambda: call_executorch(loaded, inputs)

    return load


class LoadedExecutorch:
    """A model file in memory: the runtime reads from `data` for as long as it runs.

    Attributes:
        program: The runtime's own object.
        method: What runs.
        data: Bytes of the file.
        batch: The largest batch that one call takes.
    """

    def __init__(self, data: bytes) -> None:
        import torch  # noqa: F401  # the bindings need its libraries
        from executorch.extension.pybindings import _C

        _C._threadpool_get_thread_count()  # makes the pool, which looks for files and tells of it
        self.data = data
        self.program = _C._load_program_from_buffer(data)
        self.method = self.program.load_method("forward")
        sizes = self.method.method_meta().input_tensor_meta(0).sizes()
        self.batch = sizes[0] if sizes else 1


def load_executorch(data: bytes) -> LoadedExecutorch:
    """A model file's bytes, ready to run.

    Raises:
        FolderError: ExecuTorch cannot read them.
    """
    with quiet_runtime():
        try:
            return LoadedExecutorch(data)
        except RuntimeError as error:
            raise FolderError(f"ExecuTorch refuses the model: {reason_of(error)}; fetch the artifact again") from error


def call_executorch(loaded: LoadedExecutorch, inputs: list[Any]) -> list[Any]:
    """Every output as a tensor; a batch larger than the file takes is run in parts.

    The inputs are contiguous: the runtime would take a view of another order of memory for what it is not.
    """
    if len(inputs[0]) <= loaded.batch:
        return list(loaded.method.call(inputs))
    import torch

    starts = range(0, len(inputs[0]), loaded.batch)
    parts = [loaded.method.call([tensor[start : start + loaded.batch] for tensor in inputs]) for start in starts]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


def tapped_executorch(taps: bytes, inputs: list[Any]) -> dict[str, Any]:
    """The integers of the values inside, uint8, from a file that computes the same and has them all as outputs."""
    return read_taps(load_executorch(tapped_model(taps)), taps, inputs)


def tapped_model(taps: bytes) -> bytes:
    """The file with more outputs."""
    return taps[TAPS_HEADER + int.from_bytes(taps[:TAPS_HEADER], "little") :]


def taps_header(taps: bytes) -> dict[str, Any]:
    """The description before a file with more outputs.

    "values": name, output, sizes in memory and order of dimensions of each; "exact": whether its other outputs are
    those of the shipped file, to the bit.
    """
    size = int.from_bytes(taps[:TAPS_HEADER], "little")
    found: dict[str, Any] = json.loads(taps[TAPS_HEADER : TAPS_HEADER + size])
    return found


def read_taps(loaded: LoadedExecutorch, taps: bytes, inputs: list[Any]) -> dict[str, Any]:
    """The integers of the values inside, uint8, each in the program's order of dimensions."""
    found = call_executorch(loaded, inputs)
    values: dict[str, Any] = {}
    for name, at, shape, dims in taps_header(taps)["values"]:
        stored = found[at].reshape(shape).permute(dims).contiguous()
        values[name] = (stored.short() + 128).byte()  # activations are stored 128 less
    return values


class ThreadPool:
    """How often this process's pool was replaced: a model that was loaded before refers to one that is gone."""

    replaced = 0


def set_executorch_threads(threads: int) -> None:
    """Gives the process's pool so many threads; if it had another number, what is loaded can no longer be run."""
    import torch  # noqa: F401  # the bindings need its libraries
    from executorch.extension.pybindings import _C

    with quiet_runtime():
        if _C._threadpool_get_thread_count() != threads:
            _C._unsafe_reset_threadpool(threads)
            ThreadPool.replaced += 1
