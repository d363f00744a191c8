"""Two gloo processes calibrate one model; each writes down what it ended with, and one process does it alone."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

import edgeqat as eq
from edgeqat import affine
from edgeqat.errors import EdgeqatError
from edgeqat.simulate.observers import make_observer
from edgeqat.simulate.range_methods import Percentile
from models import SmallNet, shake

RANKS = 2
generator = torch.Generator().manual_seed(0)
# The second process has fewer batches, of other sizes and another spread.
SHARES = [
    [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(3)],
    [3 * torch.randn(4, 3, 8, 8, generator=generator) + 1],
]
NAN = torch.full((2, 3, 8, 8), torch.nan)
JOINABLE = ["minmax", "histogram", "percentile", "mse"]
Grids = dict[str, tuple[Tensor, Tensor]]


class Shrinking:
    """Gives a batch less each time it is read."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        self.batches = self.batches[1:]


class Growing:
    """Gives larger values each time it is read, as a loader that augments may."""

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.batches
        self.batches = [2 * batch for batch in self.batches]


@functools.cache
def prepared() -> eq.SimulatedModel:
    """SmallNet; capturing it takes longer than all calibrations."""
    torch.manual_seed(0)
    return eq.prepare(shake(SmallNet()).eval(), SHARES[0][0])


def calibrated(observer: Any, batches: Iterable[Tensor]) -> Grids:
    """The grids it gets."""
    sim = prepared()
    for quantizer in sim.activation_quantizers().values():
        quantizer.config = eq.ActivationConfig(observer=observer)
    eq.calibrate(sim, batches)
    return {name: (q.scale.clone(), q.zero_point.clone()) for name, q in sim.activation_quantizers().items()}


def cases(rank: int) -> dict[str, tuple[Any, Iterable[Tensor]]]:
    """What each process calibrates with: the observer, and its own batches."""
    own = SHARES[rank]
    return {
        **{name: (name, own) for name in JOINABLE},
        "percentile of one's own": (lambda: Percentile(90.0), own),
        "mse, batches that are read once": ("mse", iter(own)),
        **{f"{name}, no batch in the second": (name, own if rank == 0 else []) for name in JOINABLE},
        "constant in the second": ("histogram", own if rank == 0 else [torch.full((2, 3, 8, 8), 0.5)]),
        "larger the second time": ("histogram", own if rank == 0 else Growing(own)),
        "moving_average": ("moving_average", own),
        "foreign": (torch.ao.quantization.MinMaxObserver, own),
        "batches that are read once": ("histogram", iter(own)),
        "once in the second": ("histogram", own if rank == 0 else iter(own)),
        "fewer the second time": ("histogram", own if rank == 0 else Shrinking(own)),
        "nan in the second": ("minmax", own if rank == 0 else [*own, NAN]),
        "none at all": ("minmax", []),
        "after all that": ("histogram", own),
    }


def work(rank: int, folder: str) -> None:
    """Calibrates every case as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}
    for name, (observer, batches) in cases(rank).items():
        try:
            found[name] = calibrated(observer, batches)
        except EdgeqatError as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def equal(ours: Grids, theirs: Grids) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True)
    )


UNION = [*SHARES[0], *SHARES[1]]


def test_every_process_ends_with_the_same_grids(results: list[dict[str, Any]]) -> None:
    first, second = results
    found = {name for name in cases(0) if isinstance(first[name], dict)}
    assert found >= {*JOINABLE, "constant in the second", "larger the second time", "after all that"}
    for name in found:
        assert equal(first[name], second[name]), name


@pytest.mark.parametrize("name", ["minmax", "percentile", "mse"])
def test_they_are_those_of_one_process_with_all_the_data(results: list[dict[str, Any]], name: str) -> None:
    assert equal(results[0][name], calibrated(name, UNION))
    assert equal(results[0][f"{name}, no batch in the second"], calibrated(name, SHARES[0]))


def test_read_once_is_enough_where_the_bins_are_fixed(results: list[dict[str, Any]]) -> None:
    assert equal(results[0]["mse, batches that are read once"], results[0]["mse"])
    assert equal(results[0]["percentile of one's own"], calibrated(lambda: Percentile(90.0), UNION))


def test_the_histogram_is_that_of_all_data_over_one_range(results: list[dict[str, Any]]) -> None:
    """One batch with everything in it has the same bins."""
    alone = make_observer("histogram", 0, 255)
    alone(torch.cat(UNION))
    seen = alone.seen
    scale, zero_point = affine.activation_qparams(*alone.method.range(seen.low, seen.high, 0, 255), 0, 255)
    found = results[0]["histogram"]["x:quantized"]
    assert torch.equal(found[0], scale) and torch.equal(found[1], zero_point)


def test_the_histogram_of_a_single_process_is_close(results: list[dict[str, Any]]) -> None:
    """Its bins grow with the data and are interpolated, which moves an end by a few of 2048 bins."""
    alone = calibrated("histogram", UNION)
    for name, (scale, zero_point) in results[0]["histogram"].items():
        assert float(scale) == pytest.approx(float(alone[name][0]), rel=0.03)
        assert abs(int(zero_point) - int(alone[name][1])) <= 3
    assert equal(results[0]["after all that"], results[0]["histogram"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "moving_average",
            "PlanError: x:quantized: its observer works in a single process only: it depends on the order",
        ),
        ("foreign", "PlanError: x:quantized: its observer works in a single process only: only the object itself"),
        ("batches that are read once", "DataError: found a list_iterator of calibration batches, which can be"),
        ("once in the second", "DataError: found a list_iterator"),
        (
            "fewer the second time",
            "DataError: found 1 calibration batches in the first pass and 0 in the second; pass a list",
        ),
        ("nan in the second", "DataError: calibration batch 2 holds NaN"),
        ("none at all", "DataError: found no calibration batches"),
    ],
    ids=lambda text: "" if ":" in text else text,
)
def test_what_fails_in_one_fails_in_all_with_its_message(
    results: list[dict[str, Any]], name: str, message: str
) -> None:
    for result in results:
        assert result[name].startswith(message)
        assert "\n" not in result[name]


def test_a_single_process_reads_batches_once(results: list[dict[str, Any]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(calibrated("histogram", iter(UNION)), calibrated("histogram", UNION))
    assert calibrated("moving_average", iter(UNION))
