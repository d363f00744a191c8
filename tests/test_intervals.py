from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.errors import DataError
from edgeqat.intervals import (
    bootstrap_difference,
    bootstrap_interval,
    mean_interval,
    paired_difference,
    proportion_interval,
)

NAN = float("nan")


def matched(both: int, only_a: int, only_b: int, neither: int) -> tuple[Tensor, Tensor]:
    """Per-sample correctness of two models, from the four cells of their table."""
    a = torch.tensor([1] * both + [1] * only_a + [0] * only_b + [0] * neither, dtype=torch.bool)
    b = torch.tensor([1] * both + [0] * only_a + [1] * only_b + [0] * neither, dtype=torch.bool)
    return a, b


# Wilson.


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3."""
    got = proportion_interval(successes, n)
    assert (round(got.low, 4), round(got.high, 4)) == (low, high)
    assert got.value == successes / n
    assert got.n == n


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_mirrors(case: tuple[int, int]) -> None:
    successes, n = case
    got, mirror = proportion_interval(successes, n), proportion_interval(n - successes, n)
    assert 0 <= got.low <= got.value <= got.high <= 1
    assert got.low < got.high
    assert got.low == pytest.approx(1 - mirror.high, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(successes: int, n: int) -> None:
    with pytest.raises(DataError, match=f"{successes} successes in {n} samples"):
        proportion_interval(successes, n)


# Matched pairs.


def test_paired_difference_by_hand() -> None:
    """Cells 794, 150, 86, 570: centre 64/1602, variance (150.5 + 86.5 - 64^2/1602) / 1602^2."""
    got = paired_difference(*matched(794, 150, 86, 570))
    assert got.value == pytest.approx(0.04)
    assert got.low == pytest.approx(0.021217, abs=1e-6)
    assert got.high == pytest.approx(0.058683, abs=1e-6)
    assert got.n == 1600


@pytest.mark.parametrize("n", [1, 20, 600, 10_000])
def test_no_discordant_sample_still_has_a_width(n: int) -> None:
    got = paired_difference(*matched(n, 0, 0, 0))
    assert got.value == 0
    assert got.high == -got.low == pytest.approx(1.959964 / (n + 2), rel=1e-6)


@given(st.tuples(*[st.integers(0, 40)] * 4).filter(lambda cells: sum(cells) > 0))
def test_paired_difference_contains_its_value_and_mirrors(cells: tuple[int, int, int, int]) -> None:
    a, b = matched(*cells)
    got, mirror = paired_difference(a, b), paired_difference(b.float(), a.float())
    assert got.value == pytest.approx((cells[1] - cells[2]) / sum(cells))
    assert -1 <= got.low <= got.value <= got.high <= 1
    assert (got.low, got.high) == pytest.approx((-mirror.high, -mirror.low))


@pytest.mark.parametrize(("p_a", "p_b"), [(0.005, 0.005), (0.02, 0.01), (0.1, 0.05), (0.3, 0.0)])
def test_paired_interval_covers(p_a: float, p_b: float) -> None:
    """Exact coverage at n = 40, over all tables.

    A plain Wald interval misses whenever no sample is discordant, 30% of the time at (0.02, 0.01).
    """
    n, covered = 40, 0.0
    for only_a in range(n + 1):
        for only_b in range(n + 1 - only_a):
            rest = n - only_a - only_b
            ways = math.comb(n, only_a) * math.comb(n - only_a, only_b)
            weight = ways * p_a**only_a * p_b**only_b * (1 - p_a - p_b) ** rest
            if weight > 1e-9:
                got = paired_difference(*matched(rest, only_a, only_b, 0))
                covered += weight * (got.low <= p_a - p_b <= got.high)
    assert covered >= 0.93


def test_paired_difference_of_shares() -> None:
    """Fractions: two pseudo-samples, one with 1/2 + 1/2 of discordance, are added to the moments."""
    a, b = torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    got = paired_difference(a, b)
    squares = 0.25**2 + 0.5**2 + 1
    half = 1.959963984540054 * math.sqrt(squares - 0.75**2 / 5) / 5
    assert got.value == pytest.approx(0.25)
    assert (got.low, got.high) == pytest.approx((0.15 - half, 0.15 + half))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(3), torch.ones(4), r"float32 \[3\] and float32 \[4\], wanted \[N\]"),
        (torch.ones(0), torch.ones(0), "for the same samples"),
        (torch.ones(2, 2), torch.ones(2, 2), r"wanted \[N\]"),
        (torch.tensor([2.0]), torch.tensor([0.0]), "not all in 0..1"),
        (torch.tensor([NAN]), torch.tensor([0.0]), "not all in 0..1"),
    ],
)
def test_paired_difference_refuses(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        paired_difference(a, b)


# Student.


def test_student_by_hand() -> None:
    """s = 2, n = 16, t(15) = 2.131450 (any table)."""
    figures = torch.tensor([1.0, 5.0] * 8) * math.sqrt(15 / 16)
    got = mean_interval(figures)
    assert got.value == pytest.approx(3 * math.sqrt(15 / 16))
    assert got.high - got.value == pytest.approx(2.131450 * 2 / 4, abs=1e-6)
    assert got.value - got.low == pytest.approx(got.high - got.value)
    assert got.n == 16


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=40), st.floats(-100, 100))
def test_student_contains_its_value_moves_and_mirrors(figures: list[float], by: float) -> None:
    tensor = torch.tensor(figures, dtype=torch.float64)
    got, moved, mirror = mean_interval(tensor), mean_interval(tensor + by), mean_interval(-tensor)
    assert got.low <= got.value <= got.high
    assert (moved.low, moved.high) == pytest.approx((got.low + by, got.high + by), rel=1e-9, abs=1e-5)
    assert (mirror.low, mirror.value, mirror.high) == pytest.approx((-got.high, -got.value, -got.low))


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (torch.ones(1), "wanted .N. of at least 2 samples"),
        (torch.ones(2, 2), "wanted .N. of at least 2 samples"),
        (torch.tensor([1.0, NAN]), "NaN or infinity"),
        (torch.tensor([1.0, math.inf]), "NaN or infinity"),
    ],
)
def test_student_refuses(figures: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        mean_interval(figures)


# Bootstrap.


def ratio(mean: Tensor) -> float:
    return float(mean[0] / mean[1])


def test_bootstrap_of_a_mean_is_near_student() -> None:
    """At n = 400 the two methods must tell the same, within the noise of 2000 resamples."""
    figures = torch.randn(400, generator=torch.Generator().manual_seed(3)).double() + 5
    got = bootstrap_interval(figures[:, None], lambda mean: float(mean[0]))
    exact = mean_interval(figures)
    assert got.value == pytest.approx(exact.value)
    width = exact.high - exact.low
    assert got.low == pytest.approx(exact.low, abs=0.05 * width)
    assert got.high == pytest.approx(exact.high, abs=0.05 * width)


def test_bootstrap_is_seeded_and_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(50, 2, generator=generator).double() + 1
    b = a.clone()
    b[:, 0] *= 0.99
    assert bootstrap_interval(a, ratio) == bootstrap_interval(a, ratio)
    got = bootstrap_difference(a, b, ratio)
    # In every resample the second ratio is 99% of the first: unpaired, the interval would be far wider.
    alone = bootstrap_interval(a, ratio)
    assert got.value == pytest.approx(0.01 * alone.value)
    assert (got.low, got.high) == pytest.approx((0.01 * alone.low, 0.01 * alone.high))
    same = bootstrap_difference(a, a, ratio)
    assert (same.low, same.value, same.high) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=8))
@settings(max_examples=15)
def test_bootstrap_contains_its_value(pairs: list[tuple[int, int]]) -> None:
    got = bootstrap_interval(torch.tensor(pairs), ratio)
    assert got.low <= got.value <= got.high
    assert got.value == pytest.approx(sum(a for a, _ in pairs) / sum(b for _, b in pairs))


def test_bootstrap_leaves_resamples_out_in_which_nothing_counts() -> None:
    got = bootstrap_interval(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), ratio)
    assert (got.low, got.value, got.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(2, 2), torch.ones(3, 2), "wanted one shape"),
        (torch.ones(1, 2), torch.ones(1, 2), "wanted at least 2 samples"),
        (torch.zeros(3, 2), torch.zeros(3, 2), "nothing in the 3 samples counts"),
    ],
)
def test_bootstrap_refuses(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        bootstrap_difference(a, b, ratio)
