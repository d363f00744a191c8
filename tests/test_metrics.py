from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.errors import DataError
from edgeqat.metrics import METRICS, agreement, paired_difference, proportion_interval, same_prediction, top1

NAN = float("nan")


def matched(both: int, only_a: int, only_b: int, neither: int) -> tuple[Tensor, Tensor]:
    """Per-sample correctness of two models, from the four cells of their table."""
    a = torch.tensor([1] * both + [1] * only_a + [0] * only_b + [0] * neither, dtype=torch.bool)
    b = torch.tensor([1] * both + [0] * only_a + [1] * only_b + [0] * neither, dtype=torch.bool)
    return a, b


# top1 and agreement.


def test_top1_by_hand() -> None:
    outputs = torch.tensor([[0.1, 0.9, 0.0], [3.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    assert top1(outputs, torch.tensor([1, 2, 2])).tolist() == [True, False, True]


def test_ties_go_to_the_lowest_index() -> None:
    outputs = torch.zeros(1, 1000)
    outputs[0, [3, 500, 999]] = 1
    assert [top1(outputs, torch.tensor([t])).item() for t in (3, 500, 999)] == [True, False, False]
    assert top1(torch.full((2, 10), -math.inf), torch.tensor([0, 1])).tolist() == [True, False]


def test_top1_takes_integer_logits() -> None:
    outputs = torch.tensor([[7, 250, 250], [9, 8, 7]], dtype=torch.int32)
    assert top1(outputs, torch.tensor([1, 0], dtype=torch.int32)).tolist() == [True, True]


def test_nan_is_neither_right_nor_agreed_upon() -> None:
    outputs = torch.tensor([[NAN, 1.0], [2.0, NAN], [0.0, 1.0]])
    assert top1(outputs, torch.tensor([0, 0, 1])).tolist() == [False, False, True]
    assert agreement(outputs, outputs) == pytest.approx(1 / 3)
    assert torch.isnan(outputs).sum() == 2, "outputs must not change"


def test_agreement_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 4.0]])
    b = torch.tensor([[9.0, 0.0], [1.0, 0.0], [3.0, 2.0], [0.0, 0.5]])
    assert agreement(a, b) == 0.5


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64), r"outputs are float32 \[4\], wanted \[N, C\]"),
        (torch.zeros(4, 0), torch.zeros(4, dtype=torch.int64), r"wanted \[N, C\]"),
        (
            torch.zeros(4, 2),
            torch.zeros(3, dtype=torch.int64),
            r"targets are int64 \[3\], wanted integers \[4\]",
        ),
        (torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.int64), "wanted integers"),
        (torch.zeros(4, 2), torch.zeros(4), "targets are float32"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "targets are 0 to 2, wanted 0 to 1"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), "targets are -1 to 0"),
    ],
)
def test_top1_refuses(outputs: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        top1(outputs, targets)


def test_agreement_refuses() -> None:
    with pytest.raises(DataError, match="wanted one shape"):
        agreement(torch.zeros(2, 3), torch.zeros(3, 3))
    with pytest.raises(DataError, match="wanted at least 1"):
        agreement(torch.zeros(0, 3), torch.zeros(0, 3))


def test_same_prediction_per_sample() -> None:
    """Ties go to the lowest index; NaN agrees with nothing, not even with NaN."""
    nan = float("nan")
    outputs = torch.tensor([[1.0, 2.0], [3.0, 3.0], [0.0, 1.0], [nan, 0.0]])
    targets = torch.tensor([[0.0, 9.0], [5.0, 1.0], [1.0, 0.0], [nan, 0.0]])
    assert same_prediction(outputs, targets).tolist() == [True, True, False, False]
    with pytest.raises(DataError, match="wanted one shape"):
        same_prediction(outputs, targets[:, :1])


def test_registry() -> None:
    assert list(METRICS) == ["top1", "agreement"]
    metric = METRICS["top1"]
    assert (metric.name, metric.higher_is_better, metric.per_sample) == ("top1", True, top1)


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
