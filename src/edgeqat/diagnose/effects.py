"""What a setting of the switches does to a network's outputs, against the float model on the same samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.errors import DataError
from edgeqat.intervals import Z_95, Estimate
from edgeqat.metrics import Metric, evaluate
from edgeqat.per_sample import same_prediction

__all__ = ["Effect", "Figures", "Measured", "Tally", "drop_of", "figures_of", "kl_divergence", "sqnr"]


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


@dataclass(frozen=True, eq=False)
class Figures:
    """What is kept of the outputs of a batch under one setting, sample by sample.

    Attributes:
        signal: Energy of the float model's outputs, float64 [N].
        noise: Energy of the difference, float64 [N].
        kl: Divergence, float64 [N]; None where outputs are not scores of classes.
        same: Share of pixels with the float model's prediction, float64 [N]; None likewise.
        statistics: What the metric tells, [N, ...]; None without one.
    """

    signal: Tensor
    noise: Tensor
    kl: Tensor | None
    same: Tensor | None
    statistics: Tensor | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, and exact."""
        found = {name: None if x is None else x.tolist() for name, x in vars(self).items()}
        return {**found, "dtype": None if self.statistics is None else str(self.statistics.dtype)}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Figures:
        """What `to_dict` told."""

        def tensor(name: str, dtype: torch.dtype = torch.float64) -> Tensor | None:
            return None if found[name] is None else torch.tensor(found[name], dtype=dtype)

        signal, noise = tensor("signal"), tensor("noise")
        assert signal is not None and noise is not None
        dtype = torch.bool if found["dtype"] is None else getattr(torch, found["dtype"].removeprefix("torch."))
        return Figures(signal, noise, tensor("kl"), tensor("same"), tensor("statistics", dtype))


def figures_of(outputs: Any, reference: Any, targets: Any, metric: Metric | None, classes: bool) -> Figures:
    """What is kept of the outputs of a batch.

    Args:
        outputs: Under the setting.
        reference: The float model's.
        targets: Those that go with them.
        metric: Of the outputs; None for none.
        classes: Whether outputs are scores of classes.

    Raises:
        DataError: The metric does not take them, or outputs are NaN or infinite.
    """
    pairs = list(zip(pytree.tree_leaves(outputs), pytree.tree_leaves(reference), strict=True))
    signal = _energy([wanted for _, wanted in pairs])
    noise = _energy([found.double() - wanted.double() for found, wanted in pairs])
    if not bool((signal.isfinite() & noise.isfinite()).all()):
        raise DataError("the simulation computes NaN or infinity; clean the data, or run the float model on it")
    kl, same, statistics = None, None, None
    if classes:
        found, wanted = pairs[0]
        kl, same = kl_divergence(wanted, found), same_prediction(found, wanted).double()
    if metric is not None:
        statistics = evaluate(lambda _: outputs, [((), targets)], metric).statistics
    return Figures(signal, noise, kl, same, statistics)


class Tally:
    """Collects what one setting computes, batch by batch.

    Args:
        metric: Of the outputs; None for none.
        classes: Whether outputs are scores of classes.
    """

    def __init__(self, metric: Metric | None, classes: bool = False) -> None:
        self._metric, self._classes = metric, classes
        self._batches: list[Figures] = []

    def add(self, outputs: Any, reference: Any, targets: Any) -> None:
        """Takes the outputs of a batch, the float model's, and the targets that go with them.

        Raises:
            DataError: The metric does not take them, or outputs are NaN or infinite.
        """
        self.take(figures_of(outputs, reference, targets, self._metric, self._classes))

    def take(self, figures: Figures) -> None:
        """Takes what is kept of a batch."""
        self._batches.append(figures)

    @property
    def statistics(self) -> Tensor:
        """What the metric tells of each sample, [N, ...]."""
        return torch.cat(self._all("statistics"))

    def _all(self, name: str) -> list[Tensor]:
        found = (getattr(figures, name) for figures in self._batches)
        return [tensor for tensor in found if tensor is not None]

    def effect(self, float_model: Tally) -> Effect:
        """What was collected, against what the float model gave.

        Raises:
            DataError: There are fewer than two samples, which have no standard error.
        """
        signal, noise, kl, same = (self._all(name) for name in ("signal", "noise", "kl", "same"))
        n = sum(map(len, signal))
        if n < 2:
            raise DataError(f"found {n} samples to analyse on, wanted at least 2")
        figure, drop = None, None
        if self._metric is not None:
            figure = self._metric.value(self.statistics.double().mean(0))
            drop = drop_of(self._metric, float_model, self)
        return Effect(
            sqnr=sqnr(torch.cat(signal), torch.cat(noise)),
            kl=_mean(torch.cat(kl)) if kl else None,
            agreement=float(torch.cat(same).mean()) if same else None,
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
