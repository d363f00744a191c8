from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.errors import DataError
from edgeqat.per_sample import iou_per_class, mae, mean_iou, mean_iou_value, same_prediction, top1, top5

NAN = float("nan")


def labels(*values: int) -> Tensor:
    return torch.tensor(values)


# top1 and top5.


def test_top1_by_hand() -> None:
    outputs = torch.tensor([[0.1, 0.9, 0.0], [3.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    assert top1(outputs, labels(1, 2, 2)).tolist() == [True, False, True]


def test_ties_go_to_the_lowest_index() -> None:
    outputs = torch.zeros(1, 1000)
    outputs[0, [3, 500, 999]] = 1
    assert [top1(outputs, labels(t)).item() for t in (3, 500, 999)] == [True, False, False]
    assert top1(torch.full((2, 10), -math.inf), labels(0, 1)).tolist() == [True, False]
    assert [top5(torch.zeros(1, 10), labels(t)).item() for t in range(10)] == [True] * 5 + [False] * 5


def test_integer_logits() -> None:
    outputs = torch.tensor([[7, 250, 250, 1, 2, 3], [9, 8, 7, 6, 5, 4]], dtype=torch.int32)
    assert top1(outputs, torch.tensor([1, 0], dtype=torch.int32)).tolist() == [True, True]
    assert top5(outputs, torch.tensor([3, 5], dtype=torch.int32)).tolist() == [False, False]


def test_nan_is_neither_right_nor_agreed_upon() -> None:
    outputs = torch.tensor([[NAN, 1.0, 0, 0, 0], [2.0, NAN, 0, 0, 0], [0.0, 1.0, 0, 0, 0]])
    assert top1(outputs, labels(0, 0, 1)).tolist() == [False, False, True]
    assert top5(outputs, labels(0, 0, 1)).tolist() == [False, False, True]
    assert same_prediction(outputs, outputs).tolist() == [False, False, True]
    assert torch.isnan(outputs).sum() == 2, "outputs must not change"


def test_top5_by_hand() -> None:
    outputs = torch.arange(7.0).repeat(7, 1)  # class 6 is largest: 2 to 6 are the top five
    assert top5(outputs, torch.arange(7)).tolist() == [False, False, True, True, True, True, True]


@given(st.integers(0, 10_000), st.integers(5, 12))
def test_top5_is_topk_without_ties_and_holds_top1(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.stack([torch.randperm(classes, generator=generator) for _ in range(6)]).float()
    targets = torch.randint(classes, (6,), generator=generator)
    expected = (outputs.topk(5).indices == targets[:, None]).any(1)
    assert torch.equal(top5(outputs, targets), expected)
    assert bool((top5(outputs, targets) >= top1(outputs, targets)).all())
    order = torch.randperm(classes, generator=generator)
    assert torch.equal(top5(outputs[:, order], order.argsort()[targets]), expected), "classes have no order"


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (torch.zeros(4), labels(0, 0, 0, 0), r"outputs are float32 \[4\], wanted \[N, C\]"),
        (torch.zeros(4, 0), labels(0, 0, 0, 0), r"wanted \[N, C\]"),
        (torch.zeros(4, 6), labels(0, 0, 0), r"targets are int64 \[3\], wanted integers \[4\]"),
        (torch.zeros(4, 6), torch.zeros(4, 1, dtype=torch.int64), "wanted integers"),
        (torch.zeros(4, 6), torch.zeros(4), "targets are float32"),
        (torch.zeros(2, 6), labels(0, 6), "targets are 0 to 6, wanted 0 to 5"),
        (torch.zeros(2, 6), labels(-1, 0), "targets are -1 to 0"),
        ({"a": torch.zeros(2, 6)}, labels(0, 0), "the model returns a dict, .* task.metric: file.py:callable"),
        (torch.zeros(2, 6), None, "the targets are a NoneType"),
    ],
)
@pytest.mark.parametrize("metric", [top1, top5])
def test_classification_refuses(metric: object, outputs: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        metric(outputs, targets)  # type: ignore[operator]


def test_top5_needs_five_classes() -> None:
    with pytest.raises(DataError, match="outputs are of 4 classes, wanted at least 5 for top5; use top1"):
        top5(torch.zeros(2, 4), labels(0, 1))


# mean_iou.


def scores(predicted: Tensor, classes: int) -> Tensor:
    """Outputs [N, C, H, W] whose largest entries are at `predicted`, [N, H, W]."""
    return torch.nn.functional.one_hot(predicted, classes).permute(0, 3, 1, 2).float()


def test_mean_iou_by_hand() -> None:
    """Class 0: 1 of 3. Class 1: 2 of 5. Class 2: 1 of 2. Class 3 is neither predicted nor there: left out."""
    predicted = torch.tensor([[[0, 0], [1, 1]], [[1, 1], [2, 2]]])
    targets = torch.tensor([[[0, 1], [1, 255]], [[0, 1], [1, 2]]])
    found = mean_iou(scores(predicted, 4), targets)
    assert found[0].tolist() == [[1, 2], [1, 2], [0, 0], [0, 0]]
    assert found[1].tolist() == [[0, 1], [1, 3], [1, 2], [0, 0]]
    assert mean_iou_value(found.mean(0)) == pytest.approx((1 / 3 + 2 / 5 + 1 / 2) / 3)
    assert iou_per_class(found.mean(0))[3].isnan()


def test_a_class_that_is_predicted_but_not_there_counts() -> None:
    found = mean_iou(scores(torch.tensor([[[0, 1]]]), 2), torch.tensor([[[0, 0]]]))
    assert mean_iou_value(found.mean(0)) == pytest.approx((1 / 2 + 0) / 2)


def test_a_nan_pixel_is_predicted_as_no_class() -> None:
    outputs = scores(torch.tensor([[[0, 0]]]), 2)
    outputs[0, 1, 0, 0] = NAN
    assert mean_iou(outputs, torch.tensor([[[0, 0]]]))[0].tolist() == [[1, 2], [0, 0]]


def test_where_every_pixel_is_ignored_there_is_no_value() -> None:
    found = mean_iou(torch.zeros(2, 3, 2, 2), torch.full((2, 2, 2), 255))
    assert math.isnan(mean_iou_value(found.mean(0)))


@given(st.integers(0, 10_000))
def test_mean_iou_is_perfect_on_itself_and_blind_to_order(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    predicted, targets = torch.randint(4, (2, 3, 5, 2), generator=generator)
    assert mean_iou_value(mean_iou(scores(targets, 4), targets).mean(0)) == 1.0
    found = mean_iou(scores(predicted, 4), targets)
    pixels = torch.randperm(10, generator=generator)
    shuffled = [t.flatten(1)[:, pixels].reshape(3, 5, 2) for t in (predicted, targets)]
    assert torch.equal(mean_iou(scores(shuffled[0], 4), shuffled[1]), found)
    # Against its definition, class by class.
    for c in range(4):
        both, either = (predicted == c) & (targets == c), (predicted == c) | (targets == c)
        assert found[:, c].tolist() == [[int(b.sum()), int(e.sum())] for b, e in zip(both, either, strict=True)]


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (torch.zeros(2, 3), labels(0, 1), r"wanted scores \[N, C, H, W\] for mean_iou"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.int64), r"integers \[2, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4), r"targets are float32"),
        (torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3), "targets are 3 to 3, wanted 0 to 2"),
        ((torch.zeros(2, 3, 4, 4),), torch.zeros(2, 4, 4), "the model returns a tuple, and the metric mean_iou"),
    ],
)
def test_mean_iou_refuses(outputs: Tensor, targets: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        mean_iou(outputs, targets)


# mae.


def test_mae_by_hand() -> None:
    assert mae(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])).tolist() == [1.5, 0]
    assert mae(torch.tensor([3.0, 1.0]), torch.tensor([1, 1])).tolist() == [2, 0]


@given(st.lists(st.integers(-1000, 1000), min_size=4, max_size=4), st.integers(-50, 50))
def test_mae_is_symmetric_and_blind_to_a_shift_of_both(values: list[int], by: int) -> None:
    a, b = torch.tensor(values, dtype=torch.float64).reshape(2, 2)
    assert torch.equal(mae(a, b), mae(b, a))
    assert torch.equal(mae(a + by, b + by), mae(a, b))
    assert bool((mae(a, b) >= 0).all()) and mae(a, a).tolist() == [0, 0]


def test_mae_refuses_what_would_broadcast() -> None:
    with pytest.raises(DataError, match=r"outputs are float32 \[4, 1\], targets float32 \[4\], wanted one shape"):
        mae(torch.zeros(4, 1), torch.zeros(4))


# agreement.


def test_same_prediction_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 4.0]])
    b = torch.tensor([[9.0, 0.0], [1.0, 0.0], [3.0, 2.0], [0.0, 0.5]])
    assert same_prediction(a, b).tolist() == [True, False, True, False]


def test_pixels_agree_by_their_share() -> None:
    a, b = torch.tensor([[[0, 1], [2, 2]]]), torch.tensor([[[0, 1], [2, 0]]])
    assert same_prediction(scores(a, 3), scores(b, 3)).tolist() == [0.75]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 3), "wanted another model's outputs, of one shape"),
        (torch.zeros(2, 1), torch.zeros(2, 1), "of at least 2 classes for agreement"),
        (torch.zeros(2), torch.zeros(2), "of at least 2 classes for agreement"),
        (torch.zeros(2, 3), (torch.zeros(2, 3),), "the targets are a tuple"),
    ],
)
def test_same_prediction_refuses(a: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        same_prediction(a, b)
