"""Independent jobs over processes: of this machine, or of a Ray cluster. joblib runs them.

What all jobs share is pickled once and kept by each process; a job is sent what it is about alone. What a job finds is
taken here, as it comes: nothing but this process writes. Each job has the same number of threads, whatever else runs,
for float sums depend on it; so what is found does not depend on how many jobs run at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from edgeqat.callables import USER_ERRORS
from edgeqat.errors import EdgeqatError, InputError, JobError, MissingRuntimeError

__all__ = ["Failed", "Jobs", "JobsOn", "Sent"]

JobsOn = Literal["processes", "ray"]

KEPT = 2
"""What a process keeps of what was sent to it: of a search the trials, and one sensitivity analysis."""

LOOK_S = 0.5
"""How often a process looks whether the one that it works for is still there."""


@dataclass(frozen=True, eq=False)
class Sent:
    """What jobs share, pickled.

    Attributes:
        data: uint8 [n]; an array, which joblib hands over in a file that processes map, once for all of them.
        token: Its hash.
    """

    data: NDArray[np.uint8]
    token: str


@dataclass(frozen=True)
class Failed:
    """What came of a job that raised.

    Attributes:
        error: Where it was one of ours.
        told: The traceback.
    """

    error: EdgeqatError | None
    told: str

    def again(self) -> NoReturn:
        """Raises it here."""
        if self.error is not None:
            raise self.error
        raise RuntimeError(f"a job failed:\n{self.told}")


class Jobs:
    """Processes for jobs, within `with`; they are gone when it is left, by an error or not.

    Args:
        n: Jobs at a time; 1 starts no process, and then nothing is to be sent or run here.
        on: Where they run.

    Attributes:
        threads: Of each job, an equal share of this process's; and of this process meanwhile, which waits for them,
            so that nothing is computed with another number.

    Raises:
        MissingRuntimeError: Ray is asked for and not installed.
    """

    def __init__(self, n: int = 1, on: JobsOn = "processes") -> None:
        self.n, self.on = n, on
        self.threads = max(1, torch.get_num_threads() // n)
        self._exit = contextlib.ExitStack()
        self._parallel: Any = None
        if on == "ray" and n > 1:
            _register_ray()

    def __enter__(self) -> Jobs:
        if self.n > 1:
            self._exit.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self.threads)
            self._parallel = self._exit.enter_context(self._started())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._parallel = None
        self._exit.close()

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.n} jobs at a time on {self.on}, {threads} each"

    def send(self, work: Callable[[Any], Any]) -> Sent:
        """Prepares what jobs share: a callable that is given what a job is about, and returns what it found.

        Raises:
            InputError: It cannot be pickled.
        """
        import cloudpickle

        try:
            data = cloudpickle.dumps(work)
        except USER_ERRORS as error:
            # Pickling runs the code of the user's classes, which may raise anything.
            raise InputError(
                f"the model, data or metric cannot be sent to another process ({type(error).__name__}: {error}); "
                "set compute.jobs to 1"
            ) from error
        return Sent(np.frombuffer(data, np.uint8), hashlib.sha256(data).hexdigest())

    def run(self, sent: Sent, abouts: Sequence[Any]) -> Generator[tuple[int, Any], None, None]:
        """Runs a job for each of `abouts`; to be closed (`contextlib.closing`) where it is not exhausted.

        Yields:
            The place in `abouts` and what was found, or `Failed`; in the order in which jobs end.

        Raises:
            JobError: A process was ended from outside.
        """
        from joblib import delayed

        shared = (sent.data, sent.token, self.threads, os.getpid() if self.on == "processes" else None)
        tasks = [delayed(_do)(*shared, at, about) for at, about in enumerate(abouts)]
        # Ray's backend gives results once all are there, so it is given as many as run at a time.
        size = self.n if self.on == "ray" else max(1, len(tasks))
        for start in range(0, len(tasks), size):
            yield from self._found(tasks[start : start + size])

    def _found(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        lost = _ray_error() if self.on == "ray" else BrokenExecutor
        found: Any = ()
        try:
            with _undisturbed():
                found = self._parallel(tasks)
            for one in found:  # noqa: UP028  yield from would close what is found before we can
                yield one
        except lost as error:
            raise JobError(
                f"the system ended one of {self.n} jobs ({type(error).__name__}), as it does where memory is short; "
                "lower compute.jobs and start again, a run with --resume: what was measured is kept in the log"
            ) from error
        finally:
            if self.on == "processes" and found:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that jobs were cancelled: it is meant
                    found.close()

    @contextlib.contextmanager
    def _started(self) -> Iterator[Any]:
        from joblib import Parallel

        if self.on == "ray":
            with Parallel(n_jobs=self.n, backend="ray", batch_size=1, pre_dispatch="all") as parallel:
                yield parallel
            return
        from joblib.externals.loky import get_reusable_executor

        own = {"initializer": _work_for, "initargs": (os.getpid(),)}
        options = {"batch_size": 1, "pre_dispatch": "all", "return_as": "generator_unordered", **own}
        try:
            with Parallel(n_jobs=self.n, backend="loky", **options) as parallel:
                yield parallel
        finally:
            get_reusable_executor(reuse=True, kill_workers=True).shutdown(wait=True, kill_workers=True)


def _register_ray() -> None:
    try:
        register: Any = importlib.import_module("ray.util.joblib").register_ray
    except ImportError as error:
        raise MissingRuntimeError("Ray", "ray", str(error)) from error
    register()


def _ray_error() -> type[Exception]:
    found: type[Exception] = importlib.import_module("ray.exceptions").RayError
    return found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """What is started within it never gets Ctrl-C or SIGTERM, which go to all processes of a terminal or a job.

    This one gets them when it is left, and ends the others: they would only tell of it too, each with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # not a POSIX system
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_kept: dict[str, Callable[[Any], Any]] = {}
"""In a process for jobs: what was sent to it, by its hash, the latest last."""


_parents: list[int] = []
"""In a process for jobs: the one that it works for."""


def _work_for(parent: int) -> None:
    """Begins a process for jobs, however often it is called."""
    if not _parents and parent != os.getpid():  # joblib starts none from a process that may not have any
        _parents.append(parent)
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone, killed perhaps: nobody would take what it finds."""
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    os._exit(1)


def _do(data: NDArray[np.uint8], token: str, threads: int, parent: int | None, at: int, about: Any) -> tuple[int, Any]:
    """A job, in a process for jobs; Ray ends its own processes by itself, and theirs is another parent."""
    if parent is not None:
        _work_for(parent)  # again: joblib forgets how a process is to begin once it has had to end some
    torch.set_num_threads(threads)
    try:
        return at, _work(data, token)(about)
    except USER_ERRORS as error:
        # Models and data are the user's code, which may raise anything; another job may be all that is needed.
        return at, Failed(error if isinstance(error, EdgeqatError) else None, traceback.format_exc())


def _work(data: NDArray[np.uint8], token: str) -> Callable[[Any], Any]:
    import cloudpickle

    if token not in _kept:
        while len(_kept) >= KEPT:
            del _kept[next(iter(_kept))]
        _kept[token] = cloudpickle.loads(data)
    _kept[token] = _kept.pop(token)
    return _kept[token]
