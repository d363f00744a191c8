"""Running AOTInductor packages: threads are a global of the process, set by the session."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from edgeqat.errors import InputError
from edgeqat.lowering.op_time import OpTime
from edgeqat.lowering.session import torch_threads
from edgeqat.replay.folder import FolderError
from edgeqat.replay.run_aoti import load_aoti

__all__ = ["AotiSession"]


class AotiSession:
    """A loaded package, which is compiled code.

    Args:
        path: The package.
        threads: Threads within an op.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.threads = threads
        try:
            self._package = load_aoti(path)
        except FolderError as error:
            raise InputError(str(error)) from error

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within it, the process has this session's threads."""
        with torch_threads(self.threads):
            yield

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the inputs in the model's order."""
        with self.active():
            return list(self.run_raw(self.feed(inputs)))

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs; nothing inside a package can be looked at."""
        return self.run(inputs), {}

    def feed(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The inputs as the runtime takes them."""
        return [tensor.detach().cpu().contiguous() for tensor in inputs]

    def run_raw(self, feed: list[Tensor]) -> Any:
        """One call and nothing else: what a latency measurement times."""
        return self._package.boxed_run(list(feed))  # which empties the list

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """Nothing."""
        return ()
