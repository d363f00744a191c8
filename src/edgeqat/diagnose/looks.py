"""Looks: what single batches show under settings of the switches; as jobs in other processes, and in a log.

What a batch shows under a setting depends on nothing else, not on the other settings it is run under nor on who runs
it. So looks can be made anywhere and in any order, and kept; put together in the order of the batches they give the
same figures, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.data.fingerprint import fingerprint
from edgeqat.diagnose.effects import Figures, figures_of
from edgeqat.diagnose.forks import Forks
from edgeqat.diagnose.jobs import Failed, Jobs
from edgeqat.diagnose.ranges import RangeTally
from edgeqat.diagnose.switches import evaluating, quantizing, switchable, watching
from edgeqat.diagnose.trial_log import TrialLog
from edgeqat.diagnose.units import Unit, units_of
from edgeqat.metrics import Metric
from edgeqat.signature import Batch
from edgeqat.simulate.model import SimulatedModel

__all__ = ["NOTHING", "Labelled", "Look", "LookLog", "Looker", "Settings"]

NOTHING: frozenset[str] = frozenset()
"""The setting of the float model."""

Labelled = tuple[Batch, Any]
"""Inputs and their targets; None for none."""

PARTS_A_JOB = 2
"""Into how many pieces the work is cut for each job that runs at a time, so that none waits long for the last one."""


class Settings:
    """What a simulation is run under, each set of switches once: a layer's input, say, is another one's output.

    Attributes:
        units: What is measured.
        everything: All switches.
        only: Each unit's own quantizers.
        without: Everything but them, and everything; without what `only` has already.
    """

    def __init__(self, sim: SimulatedModel) -> None:
        self.units: list[Unit] = units_of(sim)
        self.everything = switchable(sim)
        self.only = list(dict.fromkeys(frozenset(unit.quantizers) for unit in self.units))
        others = dict.fromkeys([*(self.everything - names for names in self.only), self.everything])
        self.without = [names for names in others if names and names not in self.only]

    def __len__(self) -> int:
        """How often each batch is run, in full or in part."""
        return len(self.only) + len(self.without)

    @property
    def all(self) -> list[frozenset[str]]:
        """The float model's and all others."""
        return [NOTHING, *self.only, *self.without]

    def describe(self, names: frozenset[str]) -> dict[str, list[str]]:
        """A setting as it stands in a log, in few words."""
        if names in self.without:
            return {"without": sorted(self.everything - names)}
        return {"only": sorted(names)}


@dataclass(eq=False)
class Look:
    """What a batch shows.

    Attributes:
        figures: Of each setting.
        ranges: Of each value in the float model, JSON-ready; none where the float model was not among the settings.
    """

    figures: dict[frozenset[str], Figures] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)

    def join(self, other: Look) -> None:
        """Takes what it shows under other settings."""
        self.figures.update(other.figures)
        self.ranges.update(other.ranges)


class Looker:
    """Looks at batches.

    Args:
        sim: Calibrated.
        settings: Its own.
        metric: None for none.
        classes: As `sensitivity` takes it.
    """

    def __init__(self, sim: SimulatedModel, settings: Settings, metric: Metric | None, classes: bool | None) -> None:
        self._sim, self._settings, self._metric, self._classes = sim, settings, metric, classes
        self._forks = Forks(sim)

    def all(
        self, batches: Iterable[Labelled], log: LookLog | None, tell: Callable[[], None]
    ) -> Generator[Look, None, None]:
        """Looks at batches one by one under all settings; within `evaluating`.

        Args:
            batches: Each is read once.
            log: What it holds is not looked at again; None for none.
            tell: Called for each setting but the float model's.
        """
        for batch in batches:
            look, wanted = self._known(batch, log, tell)
            if wanted:
                found = self.look(batch, wanted, tell)
                if log is not None:
                    log.keep(batch, found)
                look.join(found)
            yield look

    def all_by_jobs(
        self,
        batches: Iterable[Labelled],
        log: LookLog | None,
        tell: Callable[[], None],
        jobs: Jobs,
        make: Callable[[], SimulatedModel],
    ) -> Generator[Look, None, None]:
        """The same in other processes; `make` makes the simulation there, not calibrated."""
        given = list(batches)
        pairs = [self._known(batch, log, tell) for batch in given]
        looks, wanted = [look for look, _ in pairs], [names for _, names in pairs]
        abouts = _shared_out(wanted, jobs.n)
        if abouts:
            sent = jobs.send(_LookWork(make, self._sim.state_dict(), given, self._metric, self._classes))
            with closing(jobs.run(sent, abouts)) as ended:
                for place, result in ended:
                    found = _unpacked(abouts[place], result)
                    at, names = abouts[place]
                    if log is not None:
                        log.keep(given[at], found)
                    looks[at].join(found)
                    for _ in filter(None, names):
                        tell()
        yield from looks

    def _known(
        self, batch: Labelled, log: LookLog | None, tell: Callable[[], None]
    ) -> tuple[Look, list[frozenset[str]]]:
        """What is known of a batch, and the settings that it is still to be run under."""
        look = Look() if log is None else log.known(batch)
        for _ in filter(None, look.figures):
            tell()
        return look, [names for names in self._settings.all if names not in look.figures]

    def look(self, batch: Labelled, wanted: Collection[frozenset[str]], on_run: Callable[[], None]) -> Look:
        """Runs a batch under the settings that are wanted; `on_run` is called after each but the float model's."""
        inputs, targets = batch
        tallies = self._tallies() if NOTHING in wanted else {}
        with (
            quantizing(self._sim, NOTHING),
            watching(self._sim, tallies, lambda name, output: tallies[name].add(output)),
        ):
            reference = self._sim.call(inputs)
        classes = self._classes is not False and _are_scores(reference)
        look = Look(ranges={name: tally.to_dict() for name, tally in tallies.items()})
        if NOTHING in wanted:
            look.figures[NOTHING] = figures_of(reference, reference, targets, self._metric, classes)
        everything = self._settings.everything
        for base, group in ((NOTHING, self._settings.only), (everything, self._settings.without)):
            asked = [names for names in group if names in wanted]
            with closing(self._forks.run(inputs, base, asked)) as runs:
                for at, outputs in runs:
                    look.figures[asked[at]] = figures_of(outputs, reference, targets, self._metric, classes)
                    on_run()
        return look

    def _tallies(self) -> dict[str, RangeTally]:
        quantizers = self._sim.activation_quantizers().items()
        return {name: RangeTally(q) for name, q in quantizers if name in self._settings.everything}


class LookLog:
    """Looks as a log holds them: a line for each batch and setting.

    Args:
        log: Under the identity of the simulation and the metric.
        settings: The simulation's.
    """

    def __init__(self, log: TrialLog, settings: Settings) -> None:
        self._log, self._settings = log, settings

    def known(self, batch: Labelled) -> Look:
        """What is known of a batch."""
        data = fingerprint(batch)
        ranges = self._log.known("ranges", data)
        found = {names: self._log.known("setting", self._of(data, names)) for names in self._settings.all}
        figures = {names: Figures.from_dict(own) for names, own in found.items() if own is not None}
        if ranges is None:
            figures.pop(NOTHING, None)  # the float model is run for both
        return Look(figures, ranges or {})

    def keep(self, batch: Labelled, look: Look) -> None:
        """Keeps what was found of a batch."""
        data = fingerprint(batch)
        ranges = [("ranges", data, look.ranges)] if NOTHING in look.figures else []
        found = look.figures.items()
        settings = [("setting", self._of(data, names), figures.to_dict()) for names, figures in found]
        self._log.keep([*ranges, *settings])

    def _of(self, data: str, names: frozenset[str]) -> dict[str, Any]:
        return {"batch": data, **self._settings.describe(names)}


@dataclass(frozen=True, eq=False)
class _LookWork:
    """What jobs that look share. A simulation cannot be pickled, so each process makes it anew and gives it its state.

    Attributes:
        make: Makes the simulation.
        state: What it is to hold.
        batches: All of them.
        metric: None for none.
        classes: As `sensitivity` takes it.
        made: In a process for jobs, the simulation.
    """

    make: Callable[[], SimulatedModel]
    state: Mapping[str, Tensor]
    batches: Sequence[Labelled]
    metric: Metric | None
    classes: bool | None
    made: list[SimulatedModel] = field(default_factory=list)

    def __call__(self, about: tuple[int, Sequence[frozenset[str]]]) -> dict[str, Any]:
        at, wanted = about
        if not self.made:
            sim = self.make()
            sim.load_state_dict(self.state)
            self.made.append(sim)
        with evaluating(self.made[0]):
            looker = Looker(self.made[0], Settings(self.made[0]), self.metric, self.classes)
            look = looker.look(self.batches[at], set(wanted), lambda: None)
        return {"figures": [look.figures[names].to_dict() for names in wanted], "ranges": look.ranges}


def _shared_out(wanted: Sequence[Sequence[frozenset[str]]], n: int) -> list[tuple[int, Sequence[frozenset[str]]]]:
    """What each job is about: the place of a batch, and settings to run it under.

    Batches are cut as little as may be: each piece runs once more what its settings share.
    """
    several = [at for at, names in enumerate(wanted) if names]
    pieces = -(-PARTS_A_JOB * n // max(1, len(several)))
    return [(at, wanted[at][start::pieces]) for at in several for start in range(min(pieces, len(wanted[at])))]


def _unpacked(about: tuple[int, Sequence[frozenset[str]]], result: Any) -> Look:
    if isinstance(result, Failed):
        result.again()
    figures = map(Figures.from_dict, result["figures"])
    return Look(dict(zip(about[1], figures, strict=True)), result["ranges"])


def _are_scores(outputs: Any) -> bool:
    """Whether the first output has the shape of classes' scores."""
    first = pytree.tree_leaves(outputs)[0]
    return bool(first.is_floating_point() and first.ndim in (2, 4) and first.shape[1] > 1)
