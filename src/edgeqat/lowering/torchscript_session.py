"""Running TorchScript files: engine and threads are globals of the process, set by the session."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeqat.errors import InputError
from edgeqat.lowering.op_time import OpTime
from edgeqat.lowering.session import torch_threads
from edgeqat.replay.folder import FolderError
from edgeqat.replay.run_torchscript import load_torchscript, on_engine, tapped_torchscript

__all__ = ["TorchScriptSession"]

WARM_UP_CALLS = 10

QUIET = "9"
"""Above every level: torch's profiler would announce itself on standard error."""


class TorchScriptSession:
    """A TorchScript module on one engine.

    Args:
        path: The model file.
        engine: "fbgemm", "qnnpack", "onednn" or "x86"; weights are packed for it on loading.
        threads: Threads within an op.
        taps: Names of the values with a grid, a line each.
    """

    def __init__(self, path: Path, engine: str, threads: int, taps: bytes = b"") -> None:
        self.engine, self.threads = engine, threads
        try:
            self._module = load_torchscript(path, engine)
        except FolderError as error:
            raise InputError(str(error)) from error
        self._taps = taps

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, the process has this session's engine and threads."""
        with on_engine(self.engine), torch_threads(self.threads):
            yield

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the inputs in the model's order."""
        with self.active():
            return list(self.run_raw(self.feed(inputs)))

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the integers of every value that has a grid."""
        names = self._taps.decode().split("\n") if self._taps else []
        with self.active():
            return self.run(inputs), tapped_torchscript(self._module, names, self.feed(inputs))

    def feed(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs as the runtime takes them."""
        return tuple(tensor.detach().cpu().contiguous() for tensor in inputs)

    def run_raw(self, feed: tuple[Tensor, ...]) -> Any:
        """One call and nothing else: what a latency measurement times."""
        with torch.no_grad():
            return self._module(*feed)

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """What torch's profiler says of some calls, the slowest kind of op first; time in an op's own kernel."""
        os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
        feed = self.feed(inputs)
        with self.active():
            for _ in range(WARM_UP_CALLS):
                self.run_raw(feed)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
                for _ in range(calls):
                    self.run_raw(feed)
        found = [
            OpTime(average.key, round(average.count / calls), average.self_cpu_time_total / 1000 / calls)
            for average in profiled.key_averages()
        ]
        return tuple(sorted(found, key=lambda time: -time.ms))
