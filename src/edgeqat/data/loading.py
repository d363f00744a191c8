"""Decoding by worker processes: torch's DataLoader, with patience that ends, and nothing left behind."""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]
from torch.utils.data import DataLoader

from edgeqat.data.decode import CHANNELS
from edgeqat.data.sizing import Pixels
from edgeqat.errors import DataError

__all__ = ["IN_PROCESS", "Decoded", "Loading", "Work", "decode_all"]

POLL = 1.0
"""Seconds after which a worker that has died is noticed."""


@dataclass(frozen=True)
class Loading:
    """What samples that are not in memory are read with; it changes nothing about what is read.

    Attributes:
        workers: Processes that decode; 0: this one does, between steps.
        timeout: Seconds that a batch of the workers' is waited for.
        pin_memory: Whether batches come in page-locked memory, which a GPU copies from while it computes.
    """

    workers: int = 0
    timeout: float = 1800
    pin_memory: bool = False


IN_PROCESS = Loading()


@dataclass(frozen=True, eq=False)
class Work:
    """What is decoded at a time: items that `decode` takes, each with a row of `draw_crops` or all without."""

    items: list[Any]
    crops: Tensor | None


@dataclass(eq=False)
class Decoded:
    """uint8 [N, 3, S, S] of N items; where one cannot be read, its place, and why."""

    images: Tensor
    failures: list[tuple[int, str]] = field(default_factory=list)


class _Decoder(torch.utils.data.Dataset[Decoded]):
    """Work in place of an index, so that a worker gets a whole batch and nothing depends on who gets which."""

    def __init__(self, decode: Callable[[Any, Tensor | None], Pixels], side: int) -> None:
        self._decode, self._side = decode, side

    def __getitem__(self, work: Work) -> Decoded:
        found = Decoded(torch.empty(len(work.items), CHANNELS, self._side, self._side, dtype=torch.uint8))
        view = found.images.numpy().transpose(0, 2, 3, 1)
        for place, item in enumerate(work.items):
            try:
                view[place] = self._decode(item, None if work.crops is None else work.crops[place])
            except DataError as error:
                view[place] = 0
                found.failures.append((place, str(error)))
        return found


def decode_all(
    what: str, works: Iterable[Work], decode: Callable[[Any, Tensor | None], Pixels], side: int, loading: Loading
) -> Iterator[Decoded]:
    """What each piece of work becomes, in order.

    Args:
        what: How messages call the data.
        works: What is to be decoded; taken from ahead of time where there are workers.
        decode: (item, row of `draw_crops` or None) -> uint8 [side, side, 3]; raises DataError where it cannot.
        side: Of the images.
        loading: Who does it.

    Raises:
        DataError: a worker hangs or has died.
    """
    decoder = _Decoder(decode, side)
    if loading.workers == 0:
        yield from map(decoder.__getitem__, works)
        return
    loader = DataLoader(
        decoder,
        batch_size=None,
        sampler=works,
        num_workers=loading.workers,
        timeout=min(POLL, loading.timeout),
        worker_init_fn=_begin_worker,
        generator=Generator(),  # it draws a seed for workers; from torch's own that would change a training's dropout
    )
    with _started(loader) as batches:
        while True:
            try:
                yield _next(what, batches, loading.timeout)
            except StopIteration:
                return


def _next(what: str, batches: Any, timeout: float) -> Decoded:
    """The next of a DataLoader's iterator, asked again until `timeout`: each time it looks whether workers live."""
    until = time.monotonic() + timeout
    while True:
        try:
            found: Decoded = next(batches)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise DataError(
                    f"{what}: a loader worker ended while a batch was waited for ({str(error).splitlines()[0]}); "
                    "look for a lack of memory, or set compute.workers to 0"
                ) from error
            if time.monotonic() >= until:
                raise DataError(
                    f"{what}: the loader workers gave no batch for {timeout:g} s; look at what reading a sample "
                    "waits for, or raise compute.timeout"
                ) from error
        else:
            return found


@contextmanager
def _started(loader: DataLoader[Decoded]) -> Iterator[Any]:
    """The loader's iterator; its workers have ended when it is left, whatever they were at."""
    handler = signal.getsignal(signal.SIGCHLD)
    with warnings.catch_warnings():
        # JAX, which comes with LiteRT's converter, warns of every fork; workers decode images and use nothing of it.
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        batches: Any = iter(loader)
    try:
        # The DataLoader's own handler raises in the midst of whatever runs, a training step for one.
        if signal.getsignal(signal.SIGCHLD) is not handler:
            signal.signal(signal.SIGCHLD, handler)
        yield batches
    except BaseException:
        # Workers may be stuck; it would wait for each of them in turn.
        for worker in batches._workers:
            worker.kill()
        raise
    finally:
        # DataLoader has no other way to end workers before the garbage collector does.
        batches._shutdown_workers()


def _begin_worker(_: int) -> None:
    # What this process does on a signal, such as writing a checkpoint, is none of its workers' business.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl_pr_set_pdeathsig(signal.SIGKILL)  # a process that is killed leaves no workers
