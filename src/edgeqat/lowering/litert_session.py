"""Running LiteRT files: an interpreter with pinned threads, and one more that looks inside the same file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeqat.errors import InputError, MissingRuntimeError
from edgeqat.lowering.op_time import OpTime
from edgeqat.replay.folder import FolderError
from edgeqat.replay.kernels import ENGINES
from edgeqat.replay.run_litert import call_litert, load_litert, model_with_taps, tapped_litert

__all__ = ["LiteRTSession"]

Arrays = list[np.ndarray[Any, Any]]


class LiteRTSession:
    """A LiteRT model on one engine.

    Args:
        path: The model file.
        engine: "xnnpack", the delegate, or "builtin", LiteRT's own kernels.
        threads: Threads within an op.
        taps: How the values with a grid become outputs.
    """

    def __init__(self, path: Path, engine: str, threads: int, taps: bytes = b"") -> None:
        if engine not in ENGINES["litert"]:
            raise InputError(f"LiteRT has no engine {engine!r}, wanted one of {', '.join(ENGINES['litert'])}")
        self._model, self._engine, self._threads, self._taps = path.read_bytes(), engine, threads, taps
        self._interpreter = self._load(self._model)
        self._inputs = [entry["index"] for entry in self._interpreter.get_input_details()]
        self._outputs = [entry["index"] for entry in self._interpreter.get_output_details()]
        self._tapped: Any = None
        self._sizes: list[tuple[int, ...]] | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Nothing: an interpreter owns its threads."""
        yield

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Every output, for the inputs in the model's order."""
        return [torch.from_numpy(array) for array in self.run_raw(self.feed(inputs))]

    def run_with_taps(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The outputs, and the integers of every value that has a grid."""
        outputs = self.run(inputs)
        if not self._taps:
            return outputs, {}
        if self._tapped is None:
            self._tapped = self._load(model_with_taps(self._model, self._taps))
        found = tapped_litert(self._tapped, self.feed(inputs), self._taps)
        return outputs, {name: torch.from_numpy(array) for name, array in found.items()}

    def feed(self, inputs: Sequence[Tensor]) -> Arrays:
        """The inputs as the runtime takes them."""
        return [np.ascontiguousarray(tensor.detach().cpu().numpy()) for tensor in inputs]

    def run_raw(self, feed: Arrays) -> Arrays:
        """One call and nothing else: what a latency measurement times."""
        sizes = [array.shape for array in feed]
        if sizes != self._sizes:  # memory is planned anew for another batch only
            self._sizes = sizes
            return call_litert(self._interpreter, feed)
        for index, array in zip(self._inputs, feed, strict=True):
            self._interpreter.set_tensor(index, array)
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]

    def profile(self, inputs: Sequence[Tensor], calls: int) -> tuple[OpTime, ...]:
        """Nothing: LiteRT's Python package has no profiler."""
        return ()

    def _load(self, model: bytes) -> Any:
        try:
            loaded = load_litert(model, self._engine, self._threads)
        except ImportError as error:
            raise MissingRuntimeError("litert", "litert", str(error)) from error
        except FolderError as error:
            raise InputError(str(error)) from error
        return loaded
