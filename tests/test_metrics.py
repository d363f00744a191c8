from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.errors import DataError, InputError, ModelError
from edgeqat.intervals import mean_interval, paired_difference, proportion_interval
from edgeqat.metrics import METRICS, Metric, evaluate, resolve_metric

NAN = float("nan")


def largest_error(outputs: Any, targets: Any) -> Any:
    return (outputs["value"] - targets).abs().flatten(1).amax(1)


largest_error.higher_is_better = False  # type: ignore[attr-defined]


def test_registry() -> None:
    found = {name: (m.higher_is_better, m.is_share, m.classes) for name, m in METRICS.items()}
    assert found == {
        "top1": (True, True, True),
        "top5": (True, True, True),
        "mean_iou": (True, True, True),
        "mae": (False, False, False),
        "agreement": (True, True, True),
    }
    assert all(metric.name == name for name, metric in METRICS.items())


# Resolving.


CODE = """
def dice(outputs, targets):
    return (outputs.argmax(1) == targets).double()
dice.higher_is_better = True
dice.is_share = True

def undecided(outputs, targets):
    return outputs

def loose(outputs, targets):
    return outputs
loose.higher_is_better = "yes"

def half(outputs, targets):
    return outputs
half.higher_is_better, half.is_share = True, 1
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


def test_a_metric_of_one_s_own_by_name(code: Path) -> None:
    found = resolve_metric(f"{code}:dice")
    assert (found.name, found.higher_is_better, found.is_share, found.classes) == ("dice", True, True, False)
    assert found.statistics(torch.eye(2), torch.tensor([0, 0])).tolist() == [1, 0]


def test_a_callable_and_a_metric_are_taken_as_they_are() -> None:
    found = resolve_metric(largest_error)
    assert (found.name, found.higher_is_better, found.is_share) == ("largest_error", False, False)
    assert resolve_metric(found) is found
    assert resolve_metric("top5") is METRICS["top5"]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("f1", InputError, "found the metric 'f1', wanted one of top1, top5, .*, or file.py:callable"),
        ("{code}:nothing", ModelError, "task.metric: .* has no callable 'nothing'"),
        ("{code}:undecided", InputError, "which way is better; write undecided.higher_is_better = True, or False"),
        ("{code}:loose", InputError, "the metric loose does not say which way is better"),
        ("{code}:half", InputError, r"half has is_share = 1, wanted True \(figures in 0..1\) or False"),
    ],
)
def test_what_is_no_metric_is_refused(code: Path, name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        resolve_metric(name.format(code=code))


# Evaluating.


def test_evaluate_gives_the_model_s_own_structure_to_the_metric() -> None:
    inputs, targets = torch.arange(12.0).reshape(6, 2), torch.zeros(6, 2)
    batches = [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])]
    scores = evaluate(lambda x: {"value": x, "other": x[:, :1]}, batches, resolve_metric(largest_error))
    assert scores.statistics.tolist() == [1, 3, 5, 7, 9, 11]
    assert scores.predicted is None and scores.labelled is None


def test_evaluate_keeps_predictions_and_labels_of_classifiers() -> None:
    batches = [(torch.eye(3), torch.tensor([0, 1, 1])), (torch.eye(3)[:1], torch.tensor([2]))]
    scores = evaluate(lambda x: x, batches, METRICS["top1"])
    assert scores.predicted is not None and scores.labelled is not None
    assert scores.predicted.tolist() == [0, 1, 2, 0] and scores.labelled.tolist() == [0, 1, 1, 2]
    assert scores.statistics.tolist() == [True, True, False, False]


def raises(outputs: Any, targets: Any) -> Any:
    raise KeyError("boxes")


RETURNS = {
    "a scalar": (lambda o, t: o.mean(), r"returns float32 \[\], wanted a tensor \[4\], one figure per sample"),
    "a matrix": (lambda o, t: o, r"returns float32 \[4, 2\], wanted a tensor \[4\]"),
    "too few": (lambda o, t: o[1:, 0], r"returns float32 \[3\], wanted a tensor \[4\]"),
    "a list": (lambda o, t: [1.0] * 4, r"returns a list, wanted a tensor \[4\]"),
    "a number": (lambda o, t: 0.5, r"returns a float, wanted a tensor \[4\]"),
    "complex": (lambda o, t: o[:, 0] * 1j, r"returns complex64 \[4\]"),
    "NaN": (lambda o, t: o[:, 0] / 0, "is NaN or infinite for 4 of 4 samples"),
    "no share": (lambda o, t: o[:, 0] + 2, "gives figures of 2 to 2, but its is_share = True means 0..1"),
    "an error": (raises, "the metric own fails on a batch: KeyError: 'boxes'"),
}


@pytest.mark.parametrize("case", RETURNS)
def test_whatever_one_s_own_metric_does_wrong_is_one_line(case: str) -> None:
    function, words = RETURNS[case]

    def own(outputs: Any, targets: Any) -> Any:
        return function(outputs, targets)

    own.higher_is_better = own.is_share = True  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=words) as caught:
        evaluate(lambda x: x, [(torch.zeros(4, 2), None)], resolve_metric(own))
    assert "\n" not in str(caught.value)


def test_nothing_to_evaluate_on_and_nan_outputs() -> None:
    with pytest.raises(DataError, match="found no batches to evaluate on"):
        evaluate(lambda x: x, [], METRICS["mae"])
    with pytest.raises(DataError, match="mae is NaN or infinite for 1 of 2 samples of a batch"):
        evaluate(lambda x: x, [(torch.tensor([1.0, NAN]), torch.zeros(2))], METRICS["mae"])


# Intervals and drops.


def test_each_kind_of_metric_has_its_interval() -> None:
    right = torch.tensor([True, True, False, True])
    shares = torch.tensor([0.9, 1.0, 1.0, 1.0])
    assert METRICS["top1"].estimate(right) == proportion_interval(3, 4)
    assert METRICS["mae"].estimate(shares * 9) == mean_interval(shares * 9)
    clipped = METRICS["agreement"].estimate(shares)
    assert (clipped.low, clipped.high) == (pytest.approx(mean_interval(shares).low), 1.0)


def test_drop_is_positive_where_the_second_is_worse() -> None:
    right, worse = torch.tensor([True] * 4), torch.tensor([True, False, True, True])
    assert METRICS["top1"].drop(right, worse) == paired_difference(right, worse)
    assert METRICS["top1"].drop(right, worse).value == 0.25
    errors = torch.tensor([1.0, 2.0, 30.0])
    assert METRICS["mae"].drop(errors, errors + 2).value == pytest.approx(2)
    assert METRICS["mae"].drop(errors + 2, errors).value == pytest.approx(-2)
    iou = torch.tensor([[[4.0, 4.0], [2.0, 2.0]]] * 3)
    lower = iou.clone()
    lower[0, 0, 0] = 1.0  # class 0: 9 of 12 instead of 12 of 12
    assert METRICS["mean_iou"].drop(iou, lower).value == pytest.approx((1 - 0.75) / 2)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=2, max_size=30), st.booleans())
def test_drop_is_the_difference_and_mirrors(pairs: list[tuple[int, int]], higher: bool) -> None:
    metric = Metric("own", higher, False, lambda o, t: o)
    twin, own = torch.tensor(pairs).double().T
    found, mirror = metric.drop(twin, own), metric.drop(own, twin)
    worse_by = twin.mean() - own.mean() if higher else own.mean() - twin.mean()
    assert found.value == pytest.approx(float(worse_by))
    assert found.low <= found.value <= found.high
    assert (found.low, found.high) == pytest.approx((-mirror.high, -mirror.low))
    estimate = metric.estimate(own)
    assert estimate.low <= estimate.value <= estimate.high


def test_the_figures_of_samples_alone() -> None:
    iou = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    found = METRICS["mean_iou"].figures(iou)
    assert found[0] == 0.5 and found[1].isnan()
    assert METRICS["top1"].figures(torch.tensor([True, False])).tolist() == [1, 0]


def test_where_nothing_counts_there_is_no_estimate() -> None:
    with pytest.raises(DataError, match="nothing in the 2 samples counts"):
        METRICS["mean_iou"].estimate(torch.zeros(2, 3, 2, dtype=torch.float64))


def test_a_metric_never_keeps_gradients() -> None:
    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[:, 0]

    own.higher_is_better = True  # type: ignore[attr-defined]
    weights = torch.ones(2, 2, requires_grad=True)
    assert not resolve_metric(own).statistics(weights * 2, None).requires_grad
