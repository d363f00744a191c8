"""Running ExecuTorch files: the pool of threads is a global of the process, set by the session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from edgeqat.errors import EdgeqatError, InputError, MissingRuntimeError
from edgeqat.lowering.op_time import OpTime
from edgeqat.replay.folder import FolderError
from edgeqat.replay.kernels import ENGINES
from edgeqat.replay.run_executorch import (
    LoadedExecutorch,
    ThreadPool,
    call_executorch,
    load_executorch,
    read_taps,
    set_executorch_threads,
    tapped_model,
    taps_header,
)

__all__ = ["ExecutorchSession"]


class ExecutorchSession:
    """An ExecuTorch program.

    Args:
        path: The model file.
        engine: "xnnpack".
        threads: Threads within an op.
        taps: What the values with a grid are called, and a file that has them as outputs.
    """

    def __init__(self, path: Path, engine: str, threads: int, taps: bytes = b"") -> None:
        if engine not in ENGINES["executorch"]:
            raise InputError(f"ExecuTorch has no engine {engine!r}, wanted {' or '.join(ENGINES['executorch'])}")
        self.threads = threads
        self._data, self._taps = path.read_bytes(), taps
        self._loaded: LoadedExecutorch | None = None
        self._tapped: LoadedExecutorch | None = None
        self._pool = -1
        with self.active():
            pass

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, the process's pool has this session's threads, and the model is loaded for it."""
        try:
            set_executorch_threads(self.threads)
            if self._loaded is None or self._pool != ThreadPool.replaced:
                self._loaded, self._tapped, self._pool = load_executorch(self._data), None, ThreadPool.replaced
        except ImportError as error:
            raise MissingRuntimeError("executorch", "executorch", str(error)) from error
        except FolderError as error:
            raise InputError(str(error)) from error
        yield

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the inputs in the model's order."""
        with self.active():
            return self.run_raw(self.feed(inputs))

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the integers of every value that has a grid, from a twin of the file.

        Nothing inside a delegate can be seen. The twin computes the same and has more outputs; those that both have
        are compared.
        """
        outputs = self.run(inputs)
        if not self._taps:
            return outputs, {}
        with self.active():
            feed = self.feed(inputs)
            self._tapped = self._tapped or load_executorch(tapped_model(self._taps))
            twins = call_executorch(self._tapped, feed)[: len(outputs)]
            same = all(torch.equal(a, b) for a, b in zip(outputs, twins, strict=True))
            if taps_header(self._taps)["exact"] and not same:
                raise EdgeqatError("the file for executorch and its twin with more outputs disagree; lower it again")
            return outputs, read_taps(self._tapped, self._taps, feed)

    def feed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs as the runtime takes them."""
        return [tensor.detach().cpu().contiguous() for tensor in inputs]

    def run_raw(self, feed: list[Tensor]) -> list[Tensor]:
        """One call and nothing else: what a latency measurement times."""
        assert self._loaded is not None
        return call_executorch(self._loaded, feed)

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """Nothing: the bindings that ExecuTorch ships have no profiler."""
        return ()
