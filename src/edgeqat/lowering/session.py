"""Sessions: a model file loaded in its runtime, whichever that is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from edgeqat.errors import InputError
from edgeqat.lowering.op_time import OpTime

__all__ = ["Session", "open_session", "torch_threads"]


class Session(Protocol):
    """A loaded model with pinned threads.

    Some runtimes keep threads and engine in globals of the process: `run_raw` wants to be called inside `active`;
    `run` and `run_with_taps` see to it themselves.
    """

    def active(self) -> AbstractContextManager[None]:
        """Within it, the process's globals are this session's."""
        ...

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the flat inputs in the model's order."""
        ...

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the integers of every value that has a grid, from the very file that was loaded."""
        ...

    def feed(self, inputs: Sequence[Tensor]) -> Any:
        """The inputs as `run_raw` takes them."""
        ...

    def run_raw(self, feed: Any) -> Any:
        """One call and nothing else: what a latency measurement times."""
        ...

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """What the runtime's profiler says of some calls, the slowest kind of op first; nothing where it has none."""
        ...


def open_session(runtime: str, path: Path, engine: str, threads: int, taps: bytes) -> Session:
    """Loads a model file.

    Args:
        runtime: "onnxruntime", "torchscript", "executorch", "litert", "openvino" or "aoti".
        path: The model file.
        engine: The runtime's engine, as the manifest names it.
        threads: Threads within an op.
        taps: What the golden vectors hold of how to look inside the file.

    Raises:
        MissingRuntimeError: The runtime is not installed.
        InputError: It refuses the file or the engine.
    """
    if runtime == "onnxruntime":
        from edgeqat.lowering.onnx_session import OnnxSession

        return OnnxSession(path.read_bytes(), threads, taps=taps)
    if runtime == "torchscript":
        from edgeqat.lowering.torchscript_session import TorchScriptSession

        return TorchScriptSession(path, engine, threads, taps)
    if runtime == "executorch":
        from edgeqat.lowering.executorch_session import ExecutorchSession

        return ExecutorchSession(path, engine, threads, taps)
    if runtime == "litert":
        from edgeqat.lowering.litert_session import LiteRTSession

        return LiteRTSession(path, engine, threads, taps)
    if runtime == "openvino":
        from edgeqat.lowering.openvino_session import OpenVinoSession

        return OpenVinoSession(path, engine, threads, taps)
    if runtime == "aoti":
        from edgeqat.lowering.aoti_session import AotiSession

        return AotiSession(path, threads)
    known = "onnxruntime, torchscript, executorch, litert, openvino or aoti"
    raise InputError(f"found the runtime {runtime!r}, wanted {known}")


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """Within it torch has n threads within an op, which is a global of the process."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
