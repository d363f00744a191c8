"""Looks at batches: put together they are the same table, whoever made them, whenever, and however often killed."""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.diagnose.effects import Figures
from edgeqat.diagnose.jobs import Jobs
from edgeqat.diagnose.looks import Settings, _shared_out
from edgeqat.errors import DataError, InputError
from edgeqat.files import to_json
from edgeqat.metrics import Metric, resolve_metric
from helpers import ENVIRONMENT
from models import SmallNet, shake

IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = list(IMAGES.split(16))


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs(2) as found:
        yield found


def small() -> nn.Module:
    torch.manual_seed(0)
    return shake(SmallNet()).eval()


def pixelwise() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()


def distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """A metric of one's own: float32, and the smaller the better."""
    return (outputs.argmax(1) - targets).abs().float() / 3


distance.higher_is_better = False  # type: ignore[attr-defined]

CASES: dict[str, tuple[Callable[[], nn.Module], str | Callable[..., Tensor] | None]] = {
    "classes": (small, "top1"),
    "own": (small, distance),
    "none": (small, None),
    "pixels": (pixelwise, "mean_iou"),
}


def batches_of(case: str) -> list[Any]:
    """(inputs, targets), or inputs alone where there is no metric."""
    if CASES[case][1] is None:
        return list(BATCHES)
    draw, shape = torch.Generator().manual_seed(1), (8, 8) if case == "pixels" else ()
    return [(x, torch.randint(0, 5, (len(x), *shape), generator=draw)) for x in BATCHES]


def simulation(model: nn.Module) -> eq.SimulatedModel:
    return eq.calibrate(eq.prepare(model, IMAGES[:2]), BATCHES)


def make_of(model: nn.Module) -> Callable[[], eq.SimulatedModel]:
    return functools.partial(eq.prepare, model, IMAGES[:2])


def same(a: eq.Sensitivity, b: eq.Sensitivity) -> bool:
    return a == b and to_json(a.to_dict()) == to_json(b.to_dict())


@pytest.mark.parametrize("case", CASES)
def test_the_table_is_the_same_in_jobs_and_from_a_log(jobs: Jobs, case: str, tmp_path: Path) -> None:
    factory, metric = CASES[case]
    model, batches, runs = factory(), batches_of(case), Counter[str]()
    sim, log = simulation(model), tmp_path / "log.jsonl"
    wanted = eq.sensitivity(sim, batches, metric)

    def tell() -> None:
        runs["run"] += 1

    by_jobs = eq.sensitivity(sim, iter(batches), metric, jobs=jobs, make=make_of(model), on_run=tell, log=log)
    assert same(by_jobs, wanted)
    lines = Counter(json.loads(line)["kind"] for line in log.read_text().splitlines())
    assert lines == {"ranges": len(batches), "setting": len(batches) * len(Settings(sim).all)}
    before = log.read_bytes()
    for more in ({}, {"jobs": jobs, "make": make_of(model)}):
        assert same(eq.sensitivity(simulation(model), batches, metric, log=log, on_run=tell, **more), wanted)
    assert log.read_bytes() == before
    assert runs["run"] == 3 * len(batches) * len(Settings(sim))


def test_a_log_that_was_cut_is_made_whole_again(tmp_path: Path) -> None:
    sim, batches, log = simulation(small()), batches_of("classes"), tmp_path / "log.jsonl"
    wanted = eq.sensitivity(sim, batches, "top1", log=log)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[1::2]) + lines[0][:20])
    assert same(eq.sensitivity(sim, batches, "top1", log=log), wanted)
    records = [json.loads(line) for line in log.read_text().splitlines() if line != lines[0][:20]]
    assert len({record["key"] for record in records}) == len(lines)


def test_everything_that_a_look_depends_on_tells_it_apart(tmp_path: Path) -> None:
    log, batches = tmp_path / "log.jsonl", batches_of("classes")
    sim = simulation(small())

    def new(sim: eq.SimulatedModel, batches: list[Any], metric: Any, **more: Any) -> int:
        """The lines that this adds."""
        before = len(log.read_text().splitlines()) if log.exists() else 0
        eq.sensitivity(sim, batches, metric, log=log, **more)
        return len(log.read_text().splitlines()) - before

    every = new(sim, batches, "top1")
    assert new(sim, batches, "top1") == 0
    assert new(sim, batches, "top5") == new(sim, batches, "top1", classes=False) == every
    assert new(sim, batches[:2], "top1") == 0
    assert new(sim, [batches[0], (batches[1][0], 1 + batches[1][1])], "top1") == every // 3
    with torch.no_grad():
        sim.get_parameter("fc.bias")[0] += 1
    assert new(sim, batches, "top1") == every


def test_a_metric_of_one_s_own_is_known_by_its_source(tmp_path: Path) -> None:
    def written(body: str) -> dict[str, str]:
        (tmp_path / "mine.py").write_text(
            f"def score(outputs, targets):\n    return {body}\nscore.higher_is_better = True\n"
        )
        return resolve_metric(f"{tmp_path}/mine.py:score").identity()

    first, second = written("outputs[:, 0]"), written("outputs[:, 1]")
    assert first["name"] == second["name"] == "score"
    assert len({first["source"], second["source"], ""}) == 3
    assert written("outputs[:, 0]") == first
    assert resolve_metric("top1").identity() == {"name": "top1"}


class Scorer:
    higher_is_better = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0]


def test_metrics_without_a_source_of_their_own_have_an_identity_too() -> None:
    assert resolve_metric(Scorer()).identity()["source"]
    assert Metric("compiled", True, False, torch.add).identity() == {"name": "compiled", "source": ""}


def test_figures_are_exact_in_json() -> None:
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bool, torch.int64, torch.float64):
        statistics = (torch.randn(5, 3, generator=draw) * 3).to(dtype)
        signal, noise = torch.rand(2, 5, generator=draw, dtype=torch.float64) / 3
        figures = Figures(signal, noise, None, noise, statistics)
        again = Figures.from_dict(json.loads(json.dumps(figures.to_dict())))
        assert again.kl is None and again.statistics is not None
        assert again.statistics.dtype == dtype
        for name in ("signal", "noise", "same", "statistics"):
            assert torch.equal(getattr(again, name), getattr(figures, name))
    assert Figures.from_dict(Figures(signal, noise, None, None, None).to_dict()).statistics is None


@pytest.mark.parametrize("n", [2, 3, 16])
def test_work_is_shared_out_whole_and_to_all(n: int) -> None:
    settings = [frozenset({name}) for name in "abcdefghijk"]
    wanted = [settings, [], settings[:1], settings]
    abouts = _shared_out(wanted, n)
    assert len(abouts) >= n
    for at, names in enumerate(wanted):
        given = [name for place, some in abouts if place == at for name in some]
        assert sorted(given, key=sorted) == sorted(names, key=sorted)
    assert _shared_out([[], []], n) == []


def test_refusals(jobs: Jobs) -> None:
    model = small()
    sim = simulation(model)
    with pytest.raises(InputError, match="found jobs and no `make`"):
        eq.sensitivity(sim, BATCHES, jobs=jobs)
    with pytest.raises(DataError, match="computes NaN or infinity"):
        eq.sensitivity(sim, [IMAGES * float("nan")], jobs=jobs, make=make_of(model))
    with pytest.raises(DataError, match="found no batches to analyse on"):
        eq.sensitivity(sim, [], jobs=jobs, make=make_of(model))


SETUP = """
import functools, sys, time, torch
import edgeqat as eq
from edgeqat.diagnose.jobs import Jobs
from edgeqat.files import to_json

def slow(outputs, targets):
    time.sleep(0.02)  # so that there is time to be killed in
    return outputs[:, 0, 0, 0]

slow.higher_is_better = True
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3)).eval()
images = torch.randn(24, 3, 8, 8)
sim = eq.calibrate(eq.prepare(model, images[:2]), [images])
batches = [(batch, None) for batch in images.split(4)]
"""
ANALYSIS = (
    SETUP
    + """
with Jobs(2) as jobs:
    make = functools.partial(eq.prepare, model, images[:2])
    table = eq.sensitivity(sim, batches, slow, jobs=jobs, make=make, log=sys.argv[1])
print(to_json(table.to_dict()))
"""
)


def analysis(log: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", ANALYSIS, str(log)]
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def records(log: Path) -> list[dict[str, Any]]:
    found = []
    for line in log.read_text().splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError):  # cut off by the kill
            found.append(json.loads(line))
    return found


def test_an_analysis_that_is_killed_goes_on_and_looks_at_nothing_twice(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    killed = analysis(log)
    while not records(log):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    before = records(log)
    ended, _ = (resumed := analysis(log)).communicate(timeout=120)
    assert resumed.returncode == 0
    after = records(log)
    assert 0 < len(before) < len(after)
    assert after[: len(before)] == before
    assert len({record["key"] for record in after}) == len(after)
    here: dict[str, Any] = {}
    exec(SETUP, here)
    assert ended.rstrip() == to_json(eq.sensitivity(here["sim"], here["batches"], here["slow"]).to_dict()).rstrip()
