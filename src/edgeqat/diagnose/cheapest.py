"""The cheapest plan that meets its limits: which trials are made, in which order, and which of them wins.

It knows nothing of models: what a plan loses, what it costs and which layers matter is asked for. Where several
trials can be made at a time, those that are likely to come next are asked for together. Each is still judged in its
turn, and one that was not needed counts for nothing: the same plans are chosen for the same reasons.

    1. the plan as it is
    2. treatments of all layers at once, other observers or equalization, which cost nothing when the model runs
    3. too large: fewer bits, for the layers that lose least by a byte saved, until it is small enough
    4. too much is lost: float, for the fewest groups of layers with which it is not, those that lose most first
    5. a cheaper treatment, or none, for each layer treated, the one that loses least first
    6. the treatments of 2 once more, in the place of what is in float still
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edgeqat.diagnose.treatments import BASE, FEWER_BITS, FLOAT, Choice

__all__ = ["Cost", "Found", "Limits", "Outcome", "Problem", "Trial", "find_cheapest"]


@dataclass(frozen=True)
class Limits:
    """What a plan must meet; None for no limit.

    Attributes:
        max_drop: Of the metric, in its own unit, against the float model.
        min_size_ratio: Size of the float model's file by that of the quantized one's.
        min_speedup: Latency of the float model's file by that of the quantized one's, on the same runtime.
    """

    max_drop: float | None = None
    min_size_ratio: float | None = None
    min_speedup: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a trial lost.

    Attributes:
        drop: By how much the metric is worse than the float model's on the same samples, in its own unit; None where
            the plan was refused.
        standard_error: Of the drop.
        n: Samples.
        refused: Why the plan cannot be made; "" where it was.
    """

    drop: float | None
    standard_error: float
    n: int
    refused: str = ""


@dataclass(frozen=True)
class Cost:
    """What a plan is expected to cost on the target.

    Attributes:
        file_bytes: Size of the model file.
        size_ratio: The float model's file by it.
        speedup: The float model's latency by its own; None where it was not asked for.
    """

    file_bytes: int
    size_ratio: float
    speedup: float | None = None


@dataclass(frozen=True)
class Trial:
    """A choice with what it lost and what it costs."""

    choice: Choice
    outcome: Outcome
    cost: Cost


@dataclass(frozen=True)
class Found:
    """How a search ended.

    Attributes:
        best: The cheapest plan that meets every limit; where none does, the one that misses them by least.
        base: The plan as it was.
        passed: Whether `best` meets every limit.
        why: Where it does not, what stands in the way.
        trials: All that were made, in order.
    """

    best: Trial
    base: Trial
    passed: bool
    why: str
    trials: tuple[Trial, ...]


class Problem(Protocol):
    """What a search asks for."""

    @property
    def at_once(self) -> int:
        """How many trials it can make at a time; with 1 it is never asked for several."""
        ...

    def evaluate(self, choice: Choice) -> Outcome:
        """What a choice loses; measured."""
        ...

    def evaluate_all(self, choices: Sequence[Choice]) -> None:
        """Measures what several choices lose, at most `at_once`, so that `evaluate` knows it; nothing else is asked
        meanwhile. Choices that it fails for are still to be asked for one by one.
        """
        ...

    def possible(self, choice: Choice) -> bool:
        """Whether a choice can be planned at all; found without a trial."""
        ...

    def cost(self, choice: Choice, timed: bool) -> Cost:
        """What a choice costs; `timed`: its speed too, for which each layer in it is measured once."""
        ...

    def globally(self) -> Sequence[Sequence[str]]:
        """Global treatments that are not in the plan already, in groups of which one at most is chosen."""
        ...

    def treatments(self, layer: str, basis: Choice) -> Sequence[str]:
        """What may be done with a layer, cheapest first; the last is float."""
        ...

    def ranking(self, basis: Choice) -> Sequence[tuple[str, ...]]:
        """Groups of layers by what leaving them in float wins back, most first."""
        ...

    def fewer_bits(self, basis: Choice) -> Sequence[str]:
        """Layers whose weights may have fewer bits, by what that loses for a byte saved, least first."""
        ...


def find_cheapest(
    problem: Problem,
    limits: Limits,
    max_trials: int = 100,
    tell: Callable[[Trial, tuple[str, ...]], None] | None = None,
) -> Found:
    """Searches until the cheapest plan is found, or `max_trials` are made; the same problem gives the same trials.

    Args:
        problem: What is searched.
        limits: What a plan must meet.
        max_trials: At least 1.
        tell: Called with every trial, and the names of the limits that it misses.
    """
    return _Search(problem, limits, max_trials, tell or (lambda _, __: None)).run()


class _OutOfTrialsError(Exception):
    """No trial is left."""


@dataclass(eq=False)
class _Search:
    problem: Problem
    limits: Limits
    max_trials: int
    tell: Callable[[Trial, tuple[str, ...]], None]
    trials: dict[Choice, Trial] = field(default_factory=dict)
    foreseen: set[Choice] = field(default_factory=set)
    why: str = ""

    def run(self) -> Found:
        try:
            self._search()
        except _OutOfTrialsError:
            self.why = f"it ended after {self.max_trials} trials"
        passing = [trial for trial in self.trials.values() if self._passes(trial)]
        best = min(passing, key=_price) if passing else min(self.trials.values(), key=self._misses)
        return Found(best, self.trials[BASE], bool(passing), "" if passing else self.why, tuple(self.trials.values()))

    def _search(self) -> None:
        first = self.problem.globally()[:1] if self.limits.max_drop is not None else ()
        self._foresee([BASE, *(Choice((name,)) for group in first for name in group)])
        base = self._try(BASE)
        if self._passes(base):
            return
        basis = BASE if self._loses_little(base) else self._globally()
        if not self._small_enough(basis):
            lowered = self._lower_bits(basis)
            if lowered is None:
                return
            basis = lowered
        if self._loses_little(self._try(basis)):
            self.why = "the plan that loses little enough is too slow, and float would make it slower"
            return
        treated = self._prefix(basis)
        if treated is None:
            self.why = "not even float for all layers of the ranking wins enough back"
            return
        self._without_float(self._shrink(basis, treated))
        self.why = "what loses little enough is too large or too slow"

    def _globally(self) -> Choice:
        """The base with global treatments: the first that passes, or those that are better by more than chance."""
        basis = BASE
        for alternatives in self.problem.globally():
            before = basis.globally
            choices = [Choice((*before, name)) for name in alternatives]
            for at, choice in enumerate(choices):
                self._foresee(choices[at:])
                trial, best = self._try(choice), self.trials[basis]
                if self._passes(trial):
                    return trial.choice
                chance = max(best.outcome.standard_error, trial.outcome.standard_error)
                if _drop(trial) < _drop(best) - chance:
                    basis = trial.choice
        return basis

    def _lower_bits(self, basis: Choice) -> Choice | None:
        """The basis with fewer bits for as few layers as make it small enough; None where all of them do not."""
        choice = basis
        for layer in self.problem.fewer_bits(basis):
            fewer = choice.treating({layer: FEWER_BITS})
            choice = fewer if self.problem.possible(fewer) else choice
            if self._small_enough(choice):
                return choice
        ratio = self.problem.cost(choice, timed=False).size_ratio
        self.why = f"no plan is {self.limits.min_size_ratio:.4g} times smaller than float; {ratio:.2f} is the most"
        return None

    def _prefix(self, basis: Choice) -> Choice | None:
        """The basis with float for the fewest groups at the head of the ranking that will do; None where none do."""
        prefixes = [basis]
        for group in self.problem.ranking(basis):
            longer = prefixes[-1].treating(dict.fromkeys(group, FLOAT))
            if longer != prefixes[-1] and self.problem.possible(longer):
                prefixes.append(longer)
        failing, step = 0, 1
        while failing + 1 < len(prefixes):
            at = min(step, len(prefixes) - 1)
            self._foresee([prefixes[min(at * 2**ahead, len(prefixes) - 1)] for ahead in range(self.problem.at_once)])
            if self._loses_little(self._try(prefixes[at])):
                return prefixes[self._bisect(prefixes, failing, at)]
            failing, step = at, 2 * step
        return None

    def _bisect(self, choices: Sequence[Choice], failing: int, enough: int) -> int:
        while enough - failing > 1:
            middle = (failing + enough) // 2
            self._foresee([choices[at] for at in _halvings(failing, enough)])
            if self._loses_little(self._try(choices[middle])):
                enough = middle
            else:
                failing = middle
        return enough

    def _shrink(self, basis: Choice, treated: Choice) -> Choice:
        """Gives each layer that `treated` leaves in float the first cheaper treatment that will do."""
        before: Mapping[str, str] = dict(basis.layers)
        order = list(dict.fromkeys(name for group in self.problem.ranking(basis) for name in group))
        touched = [name for name, treatment in treated.layers if before.get(name) != treatment]
        for layer in sorted(touched, key=order.index, reverse=True):
            cheaper = [treatment for treatment in self.problem.treatments(layer, basis) if treatment != FLOAT]
            choices = [treated.treating({layer: treatment}) for treatment in (before.get(layer), *cheaper)]
            for at, choice in enumerate(choices):
                self._foresee(choices[at:])
                if self._loses_little(self._try(choice)):
                    treated = choice
                    break
        return treated

    def _without_float(self, treated: Choice) -> None:
        """Tries global treatments in the place of float: beside a layer that ruins everything none shows its worth."""
        floats = [name for name, treatment in treated.layers if treatment == FLOAT]
        groups = [group for group in self.problem.globally() if not set(group) & set(treated.globally)]
        others = [name for group in groups for name in group]
        rest = treated.treating(dict.fromkeys(floats)).layers
        choices = [Choice((*treated.globally, name), rest) for name in others if floats]
        for at, choice in enumerate(choices):
            self._foresee(choices[at:])
            self._try(choice)

    def _foresee(self, choices: Sequence[Choice]) -> None:
        """Has trials made that are likely to be next, most likely first, where several can be made at a time.

        What costs are timed for comes after them, one by one.
        """
        known, room = {*self.trials, *self.foreseen}, min(self.problem.at_once, self.max_trials - len(self.trials))
        if self.problem.at_once == 1 or known.issuperset(choices[:1]):
            return
        new = [choice for choice in dict.fromkeys(choices) if choice not in known][:room]
        if new:
            self.problem.evaluate_all(new)
            self.foreseen.update(new)

    def _try(self, choice: Choice) -> Trial:
        if choice not in self.trials:
            if len(self.trials) >= self.max_trials:
                raise _OutOfTrialsError
            outcome = self.problem.evaluate(choice)
            # A plan that loses too much is out, however quick it is.
            timed = self.limits.min_speedup is not None and self._within_drop(outcome)
            trial = Trial(choice, outcome, self.problem.cost(choice, timed))
            self.trials[choice] = trial
            self.tell(trial, self._missed(trial))
        return self.trials[choice]

    def _passes(self, trial: Trial) -> bool:
        return not self._missed(trial)

    def _missed(self, trial: Trial) -> tuple[str, ...]:
        """The names of the limits that a trial misses."""
        within = {
            "max_drop": self._loses_little(trial),
            "min_size_ratio": self._is_small(trial.cost),
            "min_speedup": self._is_quick(trial.cost),
        }
        return tuple(name for name, met in within.items() if not met)

    def _loses_little(self, trial: Trial) -> bool:
        return self._within_drop(trial.outcome)

    def _within_drop(self, outcome: Outcome) -> bool:
        limit = self.limits.max_drop
        return outcome.drop is not None and (limit is None or outcome.drop <= limit)

    def _small_enough(self, choice: Choice) -> bool:
        return self.limits.min_size_ratio is None or self._is_small(self.problem.cost(choice, timed=False))

    def _is_small(self, cost: Cost) -> bool:
        limit = self.limits.min_size_ratio
        return limit is None or cost.size_ratio >= limit

    def _is_quick(self, cost: Cost) -> bool:
        limit = self.limits.min_speedup
        return limit is None or cost.speedup is None or cost.speedup >= limit

    def _misses(self, trial: Trial) -> tuple[bool, float, int]:
        """How far a trial is from the limits: whether it costs too much, then what it loses, then its size."""
        too_costly = not (self._is_small(trial.cost) and self._is_quick(trial.cost))
        return (too_costly, _drop(trial), trial.cost.file_bytes)


def _halvings(failing: int, enough: int) -> Iterator[int]:
    """The places that a bisection may look at, those of the next step first."""
    spans = [(failing, enough)]
    while spans:
        spans = [(low, high) for low, high in spans if high - low > 1]
        yield from ((low + high) // 2 for low, high in spans)
        spans = [half for low, high in spans for half in (((low + high) // 2, high), (low, (low + high) // 2))]


def _drop(trial: Trial) -> float:
    """What a trial lost; infinitely much where its plan was refused."""
    return float("inf") if trial.outcome.drop is None else trial.outcome.drop


def _price(trial: Trial) -> tuple[int, float, int, float]:
    """By size, then by speed where that was measured, then by how little is touched."""
    cost, choice = trial.cost, trial.choice
    slowness = 0.0 if cost.speedup is None else -cost.speedup
    return (cost.file_bytes, slowness, len(choice.globally) + len(choice.layers), _drop(trial))
