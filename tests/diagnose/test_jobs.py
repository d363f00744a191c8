"""Jobs: what they find comes back, what goes wrong is told, and no process outlives the one that it works for."""

from __future__ import annotations

import copy
import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeqat import errors
from edgeqat.diagnose.jobs import Failed, Jobs
from edgeqat.errors import DataError, EdgeqatError, InputError, JobError, MissingRuntimeError
from helpers import ENVIRONMENT, run_python

IS_POSIX = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals of a POSIX system")


@dataclass
class Work:
    """Says who did what; a job about "data" or "code" fails, and one about "killed" does not come back."""

    seen: list[str] = field(default_factory=list)

    def __call__(self, about: str) -> tuple[str, int, int, int]:
        self.seen.append(about)
        if about == "data":
            raise DataError("the data is of no use")
        if about == "code":
            raise ZeroDivisionError("of the user's")
        if about == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return about, len(self.seen), os.getpid(), torch.get_num_threads()


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs(2) as found:
        yield found


def test_each_process_keeps_what_it_was_sent(jobs: Jobs) -> None:
    sent, names = jobs.send(Work()), [str(i) for i in range(6)]
    found = dict(jobs.run(sent, names))
    assert [found[at][0] for at in range(6)] == names
    processes = {pid for _, _, pid, _ in found.values()}
    assert len(processes) <= 2
    assert os.getpid() not in processes
    assert {threads for *_, threads in found.values()} == {jobs.threads}
    again = dict(jobs.run(sent, names))
    assert max(n for _, n, _, _ in again.values()) > 3  # it is the same one that counts on
    other = dict(jobs.run(jobs.send(Work(["another"])), ["a"]))
    assert other[0][:2] == ("a", 2)


def test_what_a_job_raises_comes_back_beside_what_others_found(jobs: Jobs) -> None:
    found = dict(jobs.run(jobs.send(Work()), ["a", "data", "code"]))
    assert found[0][0] == "a"
    data, code = found[1], found[2]
    assert isinstance(data, Failed) and isinstance(code, Failed)
    with pytest.raises(DataError, match="the data is of no use"):
        data.again()
    with pytest.raises(RuntimeError, match="(?s)a job failed:.*ZeroDivisionError: of the user's"):
        code.again()


def test_what_cannot_be_pickled_is_one_line(jobs: Jobs) -> None:
    work = Work()
    work.lock = threading.Lock()  # type: ignore[attr-defined]
    with pytest.raises(
        InputError, match=r"cannot be sent to another process \(TypeError: .*\); set compute.jobs to 1"
    ):
        jobs.send(work)


def test_every_error_of_ours_survives_the_way_from_another_process() -> None:
    """Which is made anew there from what it was made of, as a copy is."""
    kinds = [kind for kind in map(vars(errors).get, errors.__all__) if issubclass(kind, EdgeqatError)]
    assert len(kinds) > 10
    for kind in kinds:
        error = kind("Ray", "ray", "no module") if kind is MissingRuntimeError else kind("words")
        again = copy.copy(error)
        assert (type(again), str(again)) == (kind, str(error))


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_its_install_is_named() -> None:
    with pytest.raises(MissingRuntimeError, match=r"Ray is not usable here .*pip install 'edgeqat\[ray\]'") as told:
        Jobs(2, "ray")
    assert told.value.exit_code == 4
    Jobs(1, "ray")  # which starts nothing


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="wants edgeqat[ray]")
def test_ray_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))  # what jobs import must be there on every node
    with Jobs(2, "ray") as own:
        found = dict(own.run(own.send(Work()), ["a", "data", "c"]))
    assert (found[0][0], found[2][0]) == ("a", "c")
    assert isinstance(found[1], Failed) and isinstance(found[1].error, DataError)


def test_one_job_at_a_time_needs_no_joblib() -> None:
    code = """
import sys, torch, edgeqat as eq
from edgeqat.diagnose.jobs import Jobs
x = torch.randn(8, 3, 4, 4)
sim = eq.calibrate(eq.prepare(torch.nn.Conv2d(3, 4, 1).eval(), x), [x])
with Jobs(1) as jobs:
    eq.sensitivity(sim, [x], jobs=jobs)
assert not {"joblib", "cloudpickle", "ray"} & set(sys.modules)
"""
    assert run_python(code).code == 0


ENDLESS = """
import os, signal, sys, time
from contextlib import closing
from edgeqat.diagnose.jobs import Jobs

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it

class Endless:
    def __call__(self, about):
        os.write(1, f"{os.getpid()}\\n".encode())  # in one piece, for two do it at once
        time.sleep(1000)

try:
    with Jobs(2) as jobs, closing(jobs.run(jobs.send(Endless()), ["a", "b"])) as found:
        list(found)
except KeyboardInterrupt:
    sys.exit(130)
"""


@IS_POSIX
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_that_it_works_for(how: signal.Signals, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with told.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", ENDLESS],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        if how is signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does: all of them get it
        else:
            process.send_signal(how)
        process.wait(timeout=60)
        process.stdout.close()
    finally:
        process.kill()
    for _ in range(600):
        if not any(map(is_alive, pids)):
            break
        time.sleep(0.1)
    assert not any(map(is_alive, pids))
    if how is signal.SIGINT:
        assert (process.returncode, told.read_text()) == (130, "")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def in_a_daemon(send: Any) -> None:
    with warnings.catch_warnings(), Jobs(2) as own:
        warnings.simplefilter("ignore")  # joblib says that there will be one job at a time
        send.put([found[0] for _, found in own.run(own.send(Work()), ["a", "b"])])


def test_where_no_process_may_be_started_jobs_run_in_this_one() -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_a_daemon, args=(queue,), daemon=True)
    process.start()
    assert queue.get(timeout=60) == ["a", "b"]
    process.join(timeout=60)
    assert process.exitcode == 0


@IS_POSIX
def test_a_process_that_the_system_ends_is_one_line() -> None:
    with (
        Jobs(2) as own,
        pytest.raises(JobError, match="the system ended one of 2 jobs .*lower compute.jobs") as told,
        closing(own.run(own.send(Work()), ["a", "killed"])) as found,
    ):
        list(found)
    assert told.value.exit_code == 2


def test_threads_are_shared_out_and_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert [Jobs(n).threads for n in (1, 2, 4, 5, 9)] == [5, 2, 1, 1, 1]
        with Jobs(2) as own:
            assert torch.get_num_threads() == 2
            assert str(own) == "2 jobs at a time on processes, 2 threads each"
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(before)
