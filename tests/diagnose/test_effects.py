"""The figures of a sensitivity analysis against other ways to get them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgeqat.diagnose.effects import Tally, drop_of, kl_divergence, sqnr
from edgeqat.errors import DataError
from edgeqat.intervals import paired_difference
from edgeqat.metrics import METRICS

GENERATOR = torch.Generator().manual_seed(0)


def scores(n: int = 50, classes: int = 4) -> Tensor:
    return torch.randn(n, classes, generator=GENERATOR)


def tally(outputs: Tensor, reference: Tensor, targets: Tensor | None = None, parts: int = 1) -> Tally:
    found = Tally(None if targets is None else METRICS["top1"], outputs.ndim in (2, 4))
    given = [None] * parts if targets is None else targets.chunk(parts)
    for some, others, labels in zip(outputs.chunk(parts), reference.chunk(parts), given, strict=True):
        found.add(some, others, labels)
    return found


def test_sqnr_is_the_ratio_of_energies_over_all_samples_however_they_are_batched() -> None:
    reference = scores()
    outputs = reference + 0.01 * scores()
    wanted = 10 * math.log10(float((reference.double() ** 2).sum() / ((outputs.double() - reference) ** 2).sum()))
    for parts in (1, 7):
        own = tally(outputs, reference, parts=parts)
        assert own.effect(own).sqnr.value == pytest.approx(wanted, rel=1e-12)


def test_the_standard_error_of_an_sqnr_is_the_jackknife_s() -> None:
    signal = torch.rand(400, generator=GENERATOR, dtype=torch.float64) + 0.1
    noise = torch.rand(400, generator=GENERATOR, dtype=torch.float64) ** 3
    left_out = 10 * torch.log10((signal.sum() - signal) / (noise.sum() - noise))
    n = len(signal)
    jackknife = math.sqrt((n - 1) / n * float(((left_out - left_out.mean()) ** 2).sum()))
    assert sqnr(signal, noise).standard_error == pytest.approx(jackknife, rel=0.02)


def test_what_changes_nothing_has_an_infinite_sqnr_and_what_loses_everything_has_none() -> None:
    some = torch.ones(3, dtype=torch.float64)
    assert sqnr(some, 0 * some).value == math.inf
    assert sqnr(0 * some, some).value == -math.inf
    assert sqnr(some, some).value == 0.0


def test_kl_is_torch_s_and_that_of_pixels_their_mean() -> None:
    reference, outputs = scores(), scores()
    log_q, log_p = outputs.double().log_softmax(1), reference.double().log_softmax(1)
    wanted = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    assert torch.allclose(kl_divergence(reference, outputs), wanted, rtol=1e-12)
    pixels = [part.reshape(2, 25, 4).permute(0, 2, 1).reshape(2, 4, 5, 5) for part in (reference, outputs)]
    assert torch.allclose(kl_divergence(*pixels), wanted.reshape(2, 25).mean(1), rtol=1e-12)


def test_a_tiny_divergence_is_not_lost_to_float32() -> None:
    reference = torch.tensor([[10.0, 0.0]])
    outputs = reference + torch.tensor([[0.0, 2.0**-10]])
    p = torch.softmax(reference.double(), 1)[0, 1]
    second_order = 0.5 * p * (1 - p) * 2.0**-20
    assert float(kl_divergence(reference, outputs)) == pytest.approx(float(second_order), rel=1e-3)


def test_drop_agreement_and_metric_are_of_pairs() -> None:
    reference = scores(200)
    outputs = reference + 0.5 * scores(200)
    labels = (reference + 0.3 * scores(200)).argmax(1)
    float_model, own = tally(reference, reference, labels), tally(outputs, reference, labels, parts=3)
    effect = own.effect(float_model)
    right = [found.argmax(1) == labels for found in (reference, outputs)]
    estimate = paired_difference(*right)
    assert effect.metric == pytest.approx(float(right[1].double().mean()))
    assert effect.agreement == pytest.approx(float((reference.argmax(1) == outputs.argmax(1)).double().mean()))
    assert effect.drop is not None
    assert effect.drop.value == estimate.value > 0
    assert effect.drop.standard_error == pytest.approx((estimate.high - estimate.low) / 2 / 1.959963984540054)
    assert drop_of(METRICS["top1"], own, float_model).value == -estimate.value


def test_without_a_discordant_pair_there_is_still_a_standard_error() -> None:
    reference = scores(100)
    own = tally(reference, reference, reference.argmax(1))
    found = drop_of(METRICS["top1"], own, own)
    assert found.value == 0
    assert 0.005 < found.standard_error < 0.02


def test_what_is_no_scores_of_classes_has_neither_kl_nor_agreement() -> None:
    own = tally(scores()[:, :, None], scores()[:, :, None])
    effect = own.effect(own)
    assert (effect.kl, effect.agreement, effect.metric, effect.drop) == (None, None, None, None)


def test_refusals() -> None:
    with pytest.raises(DataError, match="computes NaN or infinity"):
        tally(scores() * math.inf, scores())
    one = tally(scores(1), scores(1))
    with pytest.raises(DataError, match="found 1 samples to analyse on, wanted at least 2"):
        one.effect(one)
