"""What a setting of the switches does to a network's outputs, against the float model on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.errors import DataError
from edgeqat.intervals import Z_95, Estimate
from edgeqat.metrics import Metric, evaluate
from edgeqat.per_sample import same_prediction

__all__ = ["Effect", "Measured", "Tally", "drop_of", "kl_divergence", "sqnr"]


@dataclass(frozen=True)
class Measured:
    """A figure over all samples, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Effect:
    """What a setting does to the outputs.

    Attributes:
        sqnr: Signal to quantization noise of the outputs in dB: energy of the float outputs by energy of the
            difference, over all of them. Infinite where nothing differs.
        kl: Kullback-Leibler divergence, in nats, of the classes' probabilities from the float model's; the mean over
            samples (and pixels). None where outputs are not scores of classes.
        agreement: Share of samples (of pixels) with the float model's prediction; None as for `kl`.
        metric: The metric; None without one.
        drop: By how much the metric is worse than the float model's, in its own unit, whichever way is better;
            measured on pairs.
    """

    sqnr: Measured
    kl: Measured | None
    agreement: float | None
    metric: float | None
    drop: Measured | None


class Tally:
    """Collects what one setting computes, batch by batch.

    Args:
        metric: Of the outputs; None for none.
        classes: Whether outputs are scores of classes.
    """

    def __init__(self, metric: Metric | None, classes: bool) -> None:
        self._metric, self._classes = metric, classes
        self._signal: list[Tensor] = []
        self._noise: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._same: list[Tensor] = []
        self._statistics: list[Tensor] = []

    def add(self, outputs: Any, reference: Any, targets: Any) -> None:
        """Takes the outputs of a batch, the float model's, and the targets that go with them.

        Raises:
            DataError: The metric does not take them, or outputs are NaN or infinite.
        """
        pairs = list(zip(pytree.tree_leaves(outputs), pytree.tree_leaves(reference), strict=True))
        self._signal.append(_energy([wanted for _, wanted in pairs]))
        self._noise.append(_energy([found.double() - wanted.double() for found, wanted in pairs]))
        if not bool((self._signal[-1].isfinite() & self._noise[-1].isfinite()).all()):
            raise DataError("the simulation computes NaN or infinity; clean the data, or run the float model on it")
        if self._classes:
            found, wanted = pairs[0]
            self._kl.append(kl_divergence(wanted, found))
            self._same.append(same_prediction(found, wanted).double())
        if self._metric is not None:
            self._statistics.append(evaluate(lambda _: outputs, [((), targets)], self._metric).statistics)

    @property
    def statistics(self) -> Tensor:
        """What the metric tells of each sample, [N, ...]."""
        return torch.cat(self._statistics)

    def effect(self, float_model: Tally) -> Effect:
        """What was collected, against what the float model gave.

        Raises:
            DataError: There are fewer than two samples, which have no standard error.
        """
        n = sum(map(len, self._signal))
        if n < 2:
            raise DataError(f"found {n} samples to analyse on, wanted at least 2")
        figure, drop = None, None
        if self._metric is not None:
            figure = self._metric.value(self.statistics.double().mean(0))
            drop = drop_of(self._metric, float_model, self)
        return Effect(
            sqnr=sqnr(torch.cat(self._signal), torch.cat(self._noise)),
            kl=_mean(torch.cat(self._kl)) if self._kl else None,
            agreement=float(torch.cat(self._same).mean()) if self._same else None,
            metric=figure,
            drop=drop,
        )


def drop_of(metric: Metric, twin: Tally, own: Tally) -> Measured:
    """By how much the metric of `own` is worse than that of `twin`, on pairs of the same samples.

    The standard error is that of the metric's own 95% interval, so that no discordant pair does not mean no error.
    """
    return _measured(metric.drop(twin.statistics, own.statistics))


def _measured(estimate: Estimate) -> Measured:
    return Measured(estimate.value, (estimate.high - estimate.low) / (2 * Z_95))


def _mean(figures: Tensor) -> Measured:
    return Measured(float(figures.mean()), float(figures.std()) / math.sqrt(len(figures)))


def sqnr(signal: Tensor, noise: Tensor) -> Measured:
    """10 log10 of the ratio of two sums over samples, in dB.

    Its standard error is that of a ratio of sums, to first order in the samples' shares of either.

    Args:
        signal: Energy of each sample, float64 [N], N >= 2.
        noise: Energy of each sample's error, float64 [N].

    >>> round(sqnr(torch.tensor([2.0, 8.0]), torch.tensor([0.02, 0.08])).value, 6)
    20.0
    """
    total, error = float(signal.sum()), float(noise.sum())
    if error == 0.0:
        return Measured(math.inf, 0.0)
    if total == 0.0:
        return Measured(-math.inf, 0.0)
    shares = signal / total - noise / error
    relative = math.sqrt(len(shares) / (len(shares) - 1) * float((shares**2).sum()))
    return Measured(10 * math.log10(total / error), 10 / math.log(10) * relative)


def kl_divergence(reference: Tensor, outputs: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(outputs)) of each sample, in nats; the mean over pixels where there are any.

    Args:
        reference: Scores [N, C, ...].
        outputs: The same shape.

    Returns:
        float64 [N].

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([0.], dtype=torch.float64)
    """
    log_p, log_q = (scores.double().log_softmax(1) for scores in (reference, outputs))
    # In float64: of eight bits the divergence is some 1e-5, a difference of logarithms of which float32 leaves little.
    return (log_p.exp() * (log_p - log_q)).sum(1).reshape(len(reference), -1).mean(1)


def _energy(leaves: list[Tensor]) -> Tensor:
    """The sum of squares of each sample over all tensors, float64 [N]."""
    return torch.stack([leaf.double().square().reshape(len(leaf), -1).sum(1) for leaf in leaves]).sum(0)
