"""Which trials a search makes and which of them wins, on problems whose every answer is known."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from edgeqat.diagnose.cheapest import Cost, Found, Limits, Outcome, Trial, find_cheapest
from edgeqat.diagnose.treatments import BASE, FEWER_BITS, FLOAT, Choice

LAYERS = ("a", "b", "c", "d", "e", "f", "g", "h")
BYTES = 100


@dataclass
class Table:
    """Layers of 100 bytes that each lose something in integers; what they lose adds up.

    `loss` is by (layer, treatment), 0 for float; `refuses` are layers that no plan can leave in float.
    """

    loss: Mapping[tuple[str, str | None], float]
    order: Sequence[tuple[str, ...]] = tuple((name,) for name in LAYERS)
    observers: Mapping[str, float] = field(default_factory=dict)
    aids: Mapping[str, float] = field(default_factory=dict)
    refuses: frozenset[str] = frozenset()
    error: float = 0.01
    slow: Mapping[str, float] = field(default_factory=dict)
    asked: list[Choice] = field(default_factory=list)
    timed: list[Choice] = field(default_factory=list)
    at_once: int = 1
    together: list[list[Choice]] = field(default_factory=list)

    def evaluate_all(self, choices: Sequence[Choice]) -> None:
        """Finds nothing out, as where each trial fails: all of them are then asked for in their turn."""
        self.together.append(list(choices))

    def evaluate(self, choice: Choice) -> Outcome:
        self.asked.append(choice)
        chosen = dict(choice.layers)
        if not self.possible(choice):
            return Outcome(None, 0.0, 0, "it cannot be")
        lost = sum(
            0.0
            if chosen.get(name) == FLOAT
            else self.loss.get((name, chosen.get(name)), self.loss.get((name, None), 0.0))
            for name in LAYERS
        )
        return Outcome(lost - sum({**self.observers, **self.aids}[name] for name in choice.globally), self.error, 1000)

    def possible(self, choice: Choice) -> bool:
        return not self.refuses & {name for name, treatment in choice.layers if treatment == FLOAT}

    def cost(self, choice: Choice, timed: bool) -> Cost:
        if timed:
            self.timed.append(choice)
        chosen = dict(choice.layers)
        sizes = {FLOAT: 4 * BYTES, FEWER_BITS: BYTES // 2}
        total = sum(sizes.get(chosen.get(name, ""), BYTES) for name in LAYERS)
        ms = 1.0 + sum(self.slow.get(name, 0.1) for name, treatment in chosen.items() if treatment == FLOAT)
        return Cost(total, 4 * BYTES * len(LAYERS) / total, 2.0 / ms if timed else None)

    def globally(self) -> Sequence[Sequence[str]]:
        return [tuple(self.observers), tuple(self.aids)]

    def treatments(self, layer: str, basis: Choice) -> Sequence[str]:
        return ("mse", "percentile", FLOAT)

    def ranking(self, basis: Choice) -> Sequence[tuple[str, ...]]:
        return self.order

    def fewer_bits(self, basis: Choice) -> Sequence[str]:
        return tuple(reversed(LAYERS))


def search(table: Table, limits: Limits, max_trials: int = 100) -> Found:
    return find_cheapest(table, limits, max_trials)


def test_a_plan_that_passes_is_left_alone() -> None:
    table = Table({("a", None): 0.1})
    found = search(table, Limits(max_drop=0.1))
    assert (found.passed, found.best.choice, table.asked) == (True, BASE, [BASE])


def test_another_observer_for_all_is_tried_before_any_layer_is_touched() -> None:
    table = Table({("a", None): 0.5}, observers={"mse": 0.1, "percentile": 0.45})
    found = search(table, Limits(max_drop=0.1))
    assert found.best.choice == Choice(globally=("percentile",))
    assert table.asked == [BASE, Choice(globally=("mse",)), Choice(globally=("percentile",))]


@pytest.mark.parametrize(("gain", "kept"), [(0.005, ()), (0.1, ("mse",))])
def test_an_observer_is_kept_only_where_it_is_better_by_more_than_chance(gain: float, kept: tuple[str, ...]) -> None:
    found = search(Table({("c", None): 0.5}, observers={"mse": gain}), Limits(max_drop=0.1))
    assert found.best.choice == Choice(kept, (("c", FLOAT),))


@pytest.mark.parametrize("needed", range(1, 9))
def test_the_shortest_prefix_of_the_ranking_is_found(needed: int) -> None:
    table = Table({(name, None): 1.0 for name in LAYERS[:needed]})
    found = search(table, Limits(max_drop=0.5))
    assert found.passed
    assert found.best.choice == BASE.treating(dict.fromkeys(LAYERS[:needed], FLOAT))


def test_no_trial_is_made_twice() -> None:
    table = Table({(name, None): 1.0 for name in LAYERS[:6]})
    found = search(table, Limits(max_drop=0.5))
    assert len(table.asked) == len(set(table.asked)) == len(found.trials)


def test_a_layer_that_the_ranking_blamed_wrongly_is_given_back() -> None:
    table = Table({("c", None): 1.0, ("a", None): 0.01})
    found = search(table, Limits(max_drop=0.5))
    assert found.best.choice == Choice(layers=(("c", FLOAT),))


def test_a_layer_gets_the_cheapest_treatment_that_will_do() -> None:
    table = Table({("a", None): 1.0, ("a", "mse"): 0.8, ("a", "percentile"): 0.2, ("b", None): 1.0, ("b", "mse"): 0.1})
    found = search(table, Limits(max_drop=0.5))
    assert found.best.choice == Choice(layers=(("a", "percentile"), ("b", "mse")))
    assert found.best.cost.file_bytes == 8 * BYTES


def test_layers_around_a_value_go_into_float_together() -> None:
    table = Table({("c", None): 1.0, ("d", None): 1.0}, order=[("c", "d"), ("a",)])
    found = search(table, Limits(max_drop=0.5))
    assert found.trials[1].choice == Choice(layers=(("c", FLOAT), ("d", FLOAT)))
    assert found.best.choice == Choice(layers=(("c", FLOAT), ("d", FLOAT)))


def test_size_is_met_with_fewer_bits_where_that_loses_least() -> None:
    found = search(Table({}), Limits(max_drop=0.5, min_size_ratio=4.5))
    assert found.passed
    assert found.best.choice == Choice(layers=(("g", FEWER_BITS), ("h", FEWER_BITS)))


def test_size_and_drop_are_met_together() -> None:
    """One layer in float is paid for by fewer bits in others, as far as these were needed already."""
    table = Table({("a", None): 1.0, ("a", "mse"): 0.1, ("h", FEWER_BITS): 0.1})
    found = search(table, Limits(max_drop=0.5, min_size_ratio=4.2))
    assert found.passed
    assert dict(found.best.choice.layers) == {"a": "mse", "h": FEWER_BITS}


def test_a_size_out_of_reach_is_said_at_once() -> None:
    table = Table({("a", None): 1.0})
    found = search(table, Limits(max_drop=0.5, min_size_ratio=9))
    assert (found.passed, found.why) == (False, "no plan is 9 times smaller than float; 8.00 is the most")
    assert len(found.trials) == 1


def test_limits_in_conflict_end_with_the_nearest_plan() -> None:
    """All eight layers lose: what passes on the drop is larger than the limit."""
    table = Table({(name, None): 1.0 for name in LAYERS})
    found = search(table, Limits(max_drop=0.5, min_size_ratio=2.0))
    assert (found.passed, found.why) == (False, "what loses little enough is too large or too slow")
    assert found.best.cost.size_ratio >= 2.0
    within = [trial for trial in found.trials if trial.cost.size_ratio >= 2.0]
    assert found.best.outcome.drop == min(trial.outcome.drop for trial in within if trial.outcome.drop is not None)


def test_speed_is_measured_only_of_what_loses_little_enough() -> None:
    table = Table({("a", None): 1.0, ("b", None): 1.0}, slow={"a": 0.2, "b": 0.9})
    found = search(table, Limits(max_drop=0.5, min_speedup=1.5))
    assert not found.passed
    assert all(table.evaluate(choice).drop <= 0.5 for choice in table.timed)
    quick = search(Table({("a", None): 1.0}, slow={"a": 0.2}), Limits(max_drop=0.5, min_speedup=1.5))
    assert (quick.passed, quick.best.cost.speedup) == (True, 2.0 / 1.2)


def test_a_plan_that_is_too_slow_as_it_is_is_no_case_for_float() -> None:
    found = search(Table({}), Limits(max_drop=0.5, min_speedup=3.0))
    assert (found.passed, len(found.trials)) == (False, 1)
    assert found.why == "the plan that loses little enough is too slow, and float would make it slower"


def test_nothing_helps() -> None:
    table = Table({("a", None): 1.0, ("h", None): 0.2}, order=[("b",), ("c",)])
    found = search(table, Limits(max_drop=0.5))
    assert (found.passed, found.why) == (False, "not even float for all layers of the ranking wins enough back")
    assert found.best.choice == BASE  # of plans that lose as much, the smallest


def test_a_layer_that_cannot_be_in_float_does_not_stand_in_the_way_of_others() -> None:
    table = Table({("a", None): 1.0, ("b", None): 0.7}, order=[("b",), ("a", "b"), ("a",)], refuses=frozenset({"b"}))
    found = search(table, Limits(max_drop=0.75))
    assert found.best.choice == Choice(layers=(("a", FLOAT),))
    assert len(found.trials) == 2 + len(["a as it was", "a mse", "a percentile"]) - 1


def test_trials_are_bounded_and_told() -> None:
    told: list[tuple[Trial, tuple[str, ...]]] = []
    table = Table({(name, None): 1.0 for name in LAYERS})
    found = find_cheapest(table, Limits(max_drop=0.5), 3, lambda trial, missed: told.append((trial, missed)))
    assert (found.passed, found.why, len(found.trials)) == (False, "it ended after 3 trials", 3)
    assert [trial for trial, _ in told] == list(found.trials)
    assert [missed for _, missed in told] == [("max_drop",)] * 3


def test_without_a_limit_anything_passes() -> None:
    assert search(Table({("a", None): 9.0}), Limits()).best.choice == BASE


def test_a_plan_that_is_refused_only_when_it_is_made_counts_as_failing() -> None:
    table = Table({("a", None): 1.0, ("a", "mse"): 0.1})
    table.evaluate = lambda choice: (
        Outcome(None, 0.0, 0, "no") if "mse" in dict(choice.layers).values() else Table.evaluate(table, choice)
    )  # type: ignore[method-assign]
    assert search(table, Limits(max_drop=0.5)).best.choice == Choice(layers=(("a", FLOAT),))


def test_of_observers_one_is_chosen_and_an_aid_comes_on_top() -> None:
    table = Table({("c", None): 0.9}, observers={"mse": 0.1, "percentile": 0.2}, aids={"equalize": 0.3})
    found = search(table, Limits(max_drop=0.35))
    assert found.best.choice == Choice(("percentile", "equalize"), (("c", FLOAT),))
    assert [trial.choice.globally for trial in found.trials[:4]] == [
        (),
        ("mse",),
        ("percentile",),
        ("percentile", "equalize"),
    ]


def test_a_global_treatment_is_tried_again_once_nothing_hides_its_worth() -> None:
    """Its gain is within the error as long as b ruins everything; with b mended it spares a from float."""
    table = Table({("a", None): 1.0, ("b", None): 1.0, ("b", "mse"): 0.0}, aids={"equalize": 0.4}, error=0.5)
    found = search(table, Limits(max_drop=0.65))
    assert found.best.choice == Choice(("equalize",), (("b", "mse"),))


def problem(seed: int, at_once: int = 1) -> Table:
    """One with random losses, some of them large, and gains."""
    draw = random.Random(seed)
    treatments = (None, "mse", "percentile", FEWER_BITS)
    loss = {(name, t): draw.choice([0.0, 0.0, 0.01, 0.3, 1.0]) for name in LAYERS for t in treatments}
    order = [(name,) for name in draw.sample(LAYERS, len(LAYERS))]
    gains = {name: draw.choice([0.0, 0.005, 0.2, 0.5]) for name in ("mse", "percentile")}
    refuses = frozenset(draw.sample(LAYERS, draw.choice([0, 0, 1])))
    return Table(loss, order, gains, {"equalize": draw.choice([0.0, 0.4])}, refuses, at_once=at_once)


@pytest.mark.parametrize("seed", range(40))
def test_what_is_found_does_not_depend_on_how_many_trials_are_made_at_a_time(seed: int) -> None:
    limits = Limits(0.25, [None, 3.9, 4.4][seed % 3], [None, 1.2][seed % 2])
    max_trials = [100, 7][seed % 7 == 0]
    alone = problem(seed)
    wanted = search(alone, limits, max_trials)
    for at_once in (2, 3, 8):
        table = problem(seed, at_once)
        told: list[Trial] = []
        found = find_cheapest(table, limits, max_trials, lambda trial, _, told=told: told.append(trial))
        assert (found, told) == (wanted, list(wanted.trials))
        assert (table.asked, table.timed) == (alone.asked, alone.timed)  # in the same order, each once
        for choices in table.together:
            assert len(choices) <= at_once
            assert choices[0] in table.asked
        together = [choice for choices in table.together for choice in choices]
        assert len(together) == len(set(together))
    assert alone.together == []


def test_what_is_independent_is_asked_for_together() -> None:
    table = Table({(name, None): 1.0 for name in LAYERS[:5]}, observers={"mse": 0.1, "percentile": 0.1}, at_once=4)
    search(table, Limits(max_drop=0.5))
    assert table.together[0] == [BASE, Choice(("mse",)), Choice(("percentile",))]
    prefixes = [{name for name, _ in choice.layers} for choice in table.together[1]]
    assert prefixes == [set(LAYERS[:n]) for n in (1, 2, 4, 8)]
    assert len(table.together) < len(table.asked)
