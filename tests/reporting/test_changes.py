"""What quantization changed, counted by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edgeqat.metrics import METRICS, Metric, Scores, evaluate
from edgeqat.reporting.changes import LISTED, find_changes

NAMES = ("cat", "dog", "owl")


def classified(predicted: list[int], labels: list[int], metric: str = "top1") -> Scores:
    outputs = torch.eye(max(3, max(predicted) + 1))[torch.tensor(predicted)]
    return evaluate(lambda x: x, [(outputs, torch.tensor(labels))], METRICS[metric])


def test_flips_are_counted_each_way_and_listed_in_order() -> None:
    labels = [0, 0, 1, 1, 2, 2, 2]
    twin, own = classified([0, 0, 1, 0, 2, 0, 1], labels), classified([0, 1, 1, 1, 0, 1, 1], labels)
    found = find_changes(METRICS["top1"], twin, own, NAMES)
    assert found.flips is not None and found.largest is None
    flips = found.flips
    assert (flips.right_to_wrong, flips.wrong_to_right, flips.wrong_to_wrong) == (2, 1, 1)
    assert [tuple(sample.model_dump().values()) for sample in flips.samples] == [
        (1, "cat", "cat", "dog"),
        (3, "dog", "cat", "dog"),
        (4, "owl", "owl", "cat"),
        (5, "owl", "cat", "dog"),
    ]
    assert found.per_class is not None
    rows = [tuple(row.model_dump().values()) for row in found.per_class]
    assert rows == [
        ("cat", 2, 1.0, 0.5, 0.5),
        ("dog", 2, 0.5, 1.0, -0.5),
        ("owl", 3, pytest.approx(1 / 3), 0.0, pytest.approx(1 / 3)),
    ]


def test_classes_without_samples_are_left_out_and_those_without_names_numbered() -> None:
    scores = classified([0, 2, 4], [0, 2, 4])
    found = find_changes(METRICS["top1"], scores, scores, NAMES).per_class
    assert found is not None
    assert [(row.name, row.n, row.drop) for row in found] == [("cat", 1, 0.0), ("owl", 1, 0.0), ("4", 1, 0.0)]


def test_samples_are_listed_up_to_a_limit_and_all_are_counted() -> None:
    n = LISTED + 20
    flips = find_changes(METRICS["top1"], classified([0] * n, [0] * n), classified([1] * n, [0] * n), NAMES).flips
    assert flips is not None
    assert flips.right_to_wrong == n and [sample.index for sample in flips.samples] == list(range(LISTED))


def test_a_prediction_of_nan_has_no_class() -> None:
    nan = evaluate(lambda x: x, [(torch.full((1, 3), float("nan")), torch.tensor([0]))], METRICS["top1"])
    flips = find_changes(METRICS["top1"], classified([0], [0]), nan, NAMES).flips
    assert flips is not None and flips.samples[0].quantized_class == "NaN"


@given(st.lists(st.tuples(*[st.integers(0, 2)] * 3), min_size=1, max_size=30))
def test_flips_explain_the_drop(samples: list[tuple[int, int, int]]) -> None:
    labels, before, after = (list(column) for column in zip(*samples, strict=True))
    twin, own = classified(before, labels), classified(after, labels)
    found = find_changes(METRICS["top1"], twin, own, NAMES)
    assert found.flips is not None and found.per_class is not None
    drop = METRICS["top1"].drop(twin.statistics, own.statistics).value
    assert (found.flips.right_to_wrong - found.flips.wrong_to_right) / len(samples) == pytest.approx(drop)
    assert sum(row.n * row.drop for row in found.per_class if row.drop is not None) / len(samples) == pytest.approx(
        drop
    )


def errors(values: list[float]) -> Scores:
    outputs = torch.tensor(values)
    return evaluate(lambda x: x, [(outputs, torch.zeros_like(outputs))], METRICS["mae"])


def test_without_right_and_wrong_the_largest_changes_are_listed() -> None:
    found = find_changes(METRICS["mae"], errors([1, 2, 3, 4]), errors([1, 5, 2.5, 9]), None)
    assert found.flips is None and found.per_class is None and found.largest is not None
    assert [tuple(sample.model_dump().values()) for sample in found.largest] == [
        (3, 4, 9, 5),
        (1, 2, 5, 3),
        (2, 3, 2.5, -0.5),
    ]


def iou(predicted: list[list[int]], targets: list[list[int]]) -> Scores:
    outputs = torch.nn.functional.one_hot(torch.tensor(predicted), 3).permute(0, 2, 1)[..., None].float()
    return evaluate(lambda x: x, [(outputs, torch.tensor(targets)[..., None])], METRICS["mean_iou"])


def test_segmentation_tells_the_iou_of_each_class() -> None:
    """The last sample is ignored whole: it has no figure, and is no change."""
    targets = [[0, 0, 1], [0, 1, 1], [255, 255, 255]]
    twin, own = iou([[0, 0, 1], [0, 1, 1], [0, 0, 0]], targets), iou([[0, 2, 1], [0, 1, 1], [1, 1, 1]], targets)
    found = find_changes(METRICS["mean_iou"], twin, own, NAMES)
    assert found.per_class is not None and found.largest is not None
    assert [tuple(row.model_dump().values()) for row in found.per_class] == [
        ("cat", 2, 1.0, pytest.approx(2 / 3), pytest.approx(1 / 3)),
        ("dog", 2, 1.0, 1.0, 0.0),
        ("owl", 1, None, 0.0, None),
    ]
    assert [(s.index, s.float_value, s.quantized_value) for s in found.largest] == [(0, 1.0, pytest.approx(0.5))]


def test_one_s_own_metric_on_labelled_data_has_classes_but_no_flips() -> None:
    def confidence(outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs[torch.arange(len(outputs)), targets]

    metric = Metric("confidence", True, True, confidence)
    labels = torch.tensor([0, 1, 1])
    twin = evaluate(lambda x: x, [(torch.full((3, 2), 0.75), labels)], metric)
    own = evaluate(lambda x: x, [(torch.tensor([[0.75, 0.0], [0.0, 0.5], [0.0, 0.75]]), labels)], metric)
    found = find_changes(metric, twin, own, NAMES)
    assert found.flips is None and found.largest is not None and found.per_class is not None
    assert [(sample.index, sample.drop) for sample in found.largest] == [(1, 0.25)]
    assert [(row.name, row.n, row.drop) for row in found.per_class] == [("cat", 1, 0.0), ("dog", 2, 0.125)]


def test_agreement_without_labels_tells_who_parted() -> None:
    outputs = torch.eye(3)
    other = outputs[[0, 2, 2]]
    twin, own = (evaluate(lambda x: x, [(found, outputs)], METRICS["agreement"]) for found in (outputs, other))
    found = find_changes(METRICS["agreement"], twin, own, None)
    assert found.flips is not None and found.per_class is None
    assert found.flips.right_to_wrong == 1
    assert tuple(found.flips.samples[0].model_dump().values()) == (1, None, "1", "2")
