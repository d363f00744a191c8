"""Two gloo processes train one model; each writes down what it saw, and one process does the same by itself."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from sklearn.datasets import load_digits
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Split
from edgeqat.data.share import Share
from edgeqat.errors import CheckpointError, DataError, EdgeqatError, OutputError
from edgeqat.processes import Team, team_of
from edgeqat.recipe_compute import ComputeSection
from edgeqat.train.batch_norm import running_statistics
from edgeqat.train.state import TrainingState
from models import SmallNet, shake

RANKS = 2
BATCH = 30
STEPS = 20
"""The training samples make a last batch of 19, of which the two get 9 and 10."""


@functools.cache
def digits() -> tuple[Split, Split]:
    """Training and validation samples."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1).repeat(1, 3, 1, 1)
    images = nn.functional.interpolate(images, 16)
    targets = torch.from_numpy(found.target)
    n = BATCH * (STEPS - 1) + 19
    return Split(images[:n], targets[:n]), Split(images[n : n + 200], targets[n : n + 200])


def batches(split: Split, share: Share, train: bool = False) -> Batches:
    return Batches(split, batch_size=BATCH, mean=None, std=None, shuffle=train, share=share)


class Deterministic(SmallNet):
    """Without dropout, whose figures each process draws for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Identity()


def network(dropout: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return shake(SmallNet() if dropout else Deterministic()).eval()


def simulation(team: Team, batch_norm: str = "fold", dropout: bool = False, observer: str = "minmax") -> Any:
    """Calibrated on 200 samples by all processes together."""
    config = eq.QConfig(eq.ActivationConfig(observer=observer))
    sim = eq.prepare(network(dropout), digits()[0].inputs[:2], qconfig_mapping=config, batch_norm=batch_norm)
    share = Share(team.ranks.rank, team.ranks.size, within=False)
    return eq.calibrate(sim, list(batches(digits()[1], share).inputs()))


def learner(team: Team) -> eq.SimulatedModel:
    """Of a network that learns the digits in three epochs."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 10)).eval()
    share = Share(team.ranks.rank, team.ranks.size, within=False)
    return eq.calibrate(eq.prepare(model, digits()[0].inputs[:2]), list(batches(digits()[1], share).inputs()))


class Faulty:
    """Batches of which one process's number `at` is something else."""

    def __init__(self, own: Batches, at: int, what: Any) -> None:
        self.own, self.at, self.what = own, at, what

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.own):
            if index == self.at and isinstance(self.what, Exception):
                raise self.what
            yield (batch[0] * self.what, batch[1]) if index == self.at else batch


def fitted(
    team: Team, model: nn.Module, epochs: int = 1, wrap: Callable[[Batches], Any] | None = None, **more: Any
) -> Any:
    """What `fit` told of a training on all processes: losses of its steps, history, states, weights."""
    ranks = team.ranks
    train = batches(digits()[0], Share(ranks.rank, ranks.size), train=True)
    losses: list[float] = []
    states: list[TrainingState] = []
    settings = {"lr": 0.01, "max_grad_norm": 1.0, "on_step": losses.append, "on_checkpoint": states.append, **more}
    history = eq.fit(
        model,
        train if wrap is None else wrap(train),
        epochs=epochs,
        validation_batches=batches(digits()[1], Share(ranks.rank, ranks.size, within=False)),
        fabric=team.fabric,
        **settings,
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"losses": losses, "history": history.epochs, "states": states, "weights": weights}


def own_statistics(team: Team) -> list[dict[str, Tensor]]:
    """Running statistics of each process after half an epoch, before they are averaged, and after it."""
    model, seen = network(), []
    half = [0]

    def look(_: float) -> None:
        half[0] += 1
        if half[0] == STEPS:  # the last step: what follows is the end of the epoch
            seen.append({name: tensor.clone() for name, tensor in running_statistics(model).items()})

    fitted(team, model, on_step=look)
    return [*seen, {name: tensor.clone() for name, tensor in running_statistics(model).items()}]


def stopped(team: Team, model: nn.Module | None = None) -> TrainingState:
    """The state of a training of which the second process was asked to stop in its second epoch."""
    asked: list[float] = []
    states: list[TrainingState] = []
    with pytest.raises(KeyboardInterrupt):
        fitted(
            team,
            simulation(team, dropout=True) if model is None else model,
            epochs=2,
            on_step=asked.append,
            on_checkpoint=states.append,
            should_stop=lambda: len(asked) == STEPS + 3 and team.ranks.rank == team.ranks.size - 1,
        )
    return states[-1]


def told(team: Team, **more: Any) -> str:
    """The error of a training that has one."""
    try:
        fitted(team, **more)
    except EdgeqatError as error:
        return f"{type(error).__name__}, told {error.told}: {error}"
    except ZeroDivisionError as error:
        return repr(error)
    return "no error"


class Idle(nn.Module):
    """Has a layer without a part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.idle = Deterministic(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def cases(team: Team) -> dict[str, Callable[[], Any]]:
    second = team.ranks.rank == 1
    return {
        "grids": lambda: {n: (q.scale, q.zero_point) for n, q in simulation(team).activation_quantizers().items()},
        "qat": lambda: fitted(team, simulation(team)),
        "float": lambda: fitted(team, network(), batch_norm=eq.BatchNormSchedule(freeze_after=0)),
        "live": lambda: fitted(team, simulation(team, "live")),
        "in parts": lambda: fitted(team, simulation(team), accumulate=4),
        "more parts than samples": lambda: fitted(team, simulation(team), accumulate=10),
        "judged": lambda: fitted(team, simulation(team), lr=0.0),
        "three epochs": lambda: fitted(team, learner(team), epochs=3, lr=0.05),
        "whole": lambda: fitted(team, simulation(team, dropout=True), epochs=2),
        "live, whole": lambda: fitted(team, network(dropout=True), epochs=2),
        "live, gone on": lambda: fitted(
            team, network(dropout=True), epochs=2, start=stopped(team, network(dropout=True))
        ),
        "own statistics": lambda: own_statistics(team),
        "stopped": lambda: stopped(team),
        "gone on": lambda: fitted(team, simulation(team, dropout=True), epochs=2, start=stopped(team)),
        "no batch": lambda: told(
            team,
            model=network(),
            wrap=lambda own: Faulty(own, 3, DataError("the disk is gone")) if second else own,
        ),
        "a bug": lambda: told(
            team, model=network(), wrap=lambda own: Faulty(own, 3, ZeroDivisionError("by zero")) if not second else own
        ),
        "nan": lambda: told(team, model=network(), wrap=lambda own: Faulty(own, 4, torch.nan) if second else own),
        "diverged": lambda: told(team, model=network(), lr=1e30, max_grad_norm=None),
        "unequal": lambda: told(team, model=network(), wrap=lambda own: list(own)[: 3 + second]),
        "idle": lambda: told(team, model=Idle()),
        "cannot keep": lambda: told(team, model=network(), on_checkpoint=Full() if not second else bool),
    }


class Full:
    """A disk without space."""

    def __call__(self, _: TrainingState) -> None:
        raise OutputError("cannot write: no space left on device")


def work(rank: int, folder: str) -> None:
    """Does every case as one of the processes."""
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text(), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with team_of(ComputeSection(timeout=60)) as team:
        assert (team.ranks.size, team.ranks.rank) == (RANKS, rank)
        for name, case in cases(team).items():
            found[name] = case()
    torch.save(found, Path(folder) / f"{rank}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "port").write_text(str(free_port()))
    torch.multiprocessing.spawn(work, (str(folder),), RANKS)
    # Not of tensors alone; written a moment ago by the processes above.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@functools.cache
def alone(name: str) -> Any:
    """What one process ends with by itself."""
    return cases(Team())[name]()


def same_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "name",
    [
        *("qat", "float", "live", "in parts", "more parts than samples", "three epochs"),
        *("whole", "gone on", "live, whole", "live, gone on"),
    ],
)
def test_all_processes_end_with_the_same_bits(results: list[dict[str, Any]], name: str) -> None:
    first, second = (result[name] for result in results)
    assert same_bits(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert without_seconds(first) == without_seconds(second)


def without_seconds(found: Mapping[str, Any]) -> list[Any]:
    return [replace(epoch, seconds=0.0) for epoch in found["history"]]


def test_calibrated_ranges_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    """Not only within 1e-5: extremes of the same float outputs are the same numbers."""
    for name, (scale, zero_point) in alone("grids").items():
        assert torch.equal(results[0]["grids"][name][0], scale), name
        assert torch.equal(results[0]["grids"][name][1], zero_point), name


SUMMATION = 1e-6
"""Relative. A mean of 30 float32 losses, summed in two parts, and gradients averaged in two, move a loss by some 1e-7
in 20 steps; an integer that flips on a tie of rounding would move it by 1e-4 and more."""


@pytest.mark.parametrize("name", ["qat", "float", "in parts", "more parts than samples"])
def test_the_first_20_losses_are_those_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    wanted = alone("float" if name == "float" else "qat")
    assert len(wanted["losses"]) == STEPS
    assert results[0][name]["losses"] == pytest.approx(wanted["losses"], rel=SUMMATION)
    assert alone(name)["losses"] == pytest.approx(wanted["losses"], rel=SUMMATION)
    mean = sum(wanted["losses"]) / STEPS
    assert results[0][name]["history"][0].loss == pytest.approx(mean, rel=SUMMATION)


def test_the_metric_is_that_of_one_process_to_the_bit(results: list[dict[str, Any]]) -> None:
    """With a learning rate of 0 the weights are the same, and so is the batch that each sample is judged in."""
    assert results[0]["judged"]["history"][0].metric == alone("judged")["history"][0].metric


def test_the_last_metric_is_within_the_spread_of_seeds(results: list[dict[str, Any]]) -> None:
    found = results[0]["three epochs"]["history"][-1].metric
    of_seeds = [
        fitted(Team(), learner(Team()), epochs=3, lr=0.05, seed=seed)["history"][-1].metric for seed in range(3)
    ]
    assert min(of_seeds) > 0.3  # it has learned: chance is 0.1
    assert min(of_seeds) - 0.03 <= found <= max(of_seeds) + 0.03  # 6 samples of 200


def test_a_training_of_two_that_was_stopped_goes_on_to_the_same_bits(results: list[dict[str, Any]]) -> None:
    for result in results:  # each process has its own dropout
        assert result["stopped"].underway.steps == 3
        assert same_bits(result["gone on"]["weights"], result["whole"]["weights"])
        assert without_seconds(result["gone on"]) == without_seconds(result["whole"])
        # Within an epoch each has running statistics of its own, which go on too.
        assert same_bits(result["live, gone on"]["weights"], result["live, whole"]["weights"])
    first, second = (result["stopped"] for result in results)
    assert set(first.rng) == {"cpu", "rank1/cpu"} and same_bits(first.rng, second.rng)
    assert not torch.equal(first.rng["cpu"], first.rng["rank1/cpu"])


def test_it_goes_on_in_another_number_of_processes(results: list[dict[str, Any]]) -> None:
    found = fitted(Team(), simulation(Team(), dropout=True), epochs=2, start=results[0]["stopped"])
    assert len(found["losses"]) == STEPS - 3
    assert found["history"][1].loss == pytest.approx(results[0]["whole"]["history"][1].loss, rel=0.1)  # dropout
    alone_stopped = stopped(Team())
    assert set(alone_stopped.rng) == {"cpu"}
    with pytest.raises(CheckpointError, match="was made with lr 0.01, this training has 0.02"):
        fitted(Team(), simulation(Team(), dropout=True), epochs=2, lr=0.02, start=results[0]["stopped"])


def test_running_statistics_are_the_mean_of_both(results: list[dict[str, Any]]) -> None:
    (first, end), (second, _) = (result["own statistics"] for result in results)
    assert first.keys() == end.keys() and first
    for name in first:
        assert not torch.equal(first[name], second[name])
        torch.testing.assert_close(end[name], (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no batch", "DataError, told {second}: the disk is gone"),
        ("nan", "DataError, told {second}: epoch 1, step 5: the input of sample 0 of the batch is NaN or infinite"),
        ("diverged", "TrainingError, told {second}: epoch 1, step"),
        ("unequal", "DataError, told {second}: the processes have 3, 4 training batches, wanted equally many"),
        ("idle", "ModelError, told {second}: a parameter of the model has no part in the loss"),
        ("cannot keep", "OutputError, told {second}: cannot write: no space left on device"),
    ],
)
def test_what_fails_in_one_fails_in_both_and_is_told_once(
    results: list[dict[str, Any]], name: str, message: str
) -> None:
    for rank, result in enumerate(results):
        told = result[name]
        assert told.startswith(message.format(second=rank == 1)), told
        assert "\n" not in told
    said = [result[name].partition(": ")[2] for result in results]
    assert said[0] == said[1]


def test_a_bug_in_one_ends_the_other_with_its_name(results: list[dict[str, Any]]) -> None:
    assert results[0]["a bug"] == "ZeroDivisionError('by zero')"
    assert results[1]["a bug"] == "EdgeqatError, told True: ZeroDivisionError: by zero"
