"""What is told of one stage's training while it goes on: to the monitor each step, to trackers each epoch."""

from __future__ import annotations

from edgeqat.reporting.monitor import Advance
from edgeqat.reporting.summary import figure
from edgeqat.run_context import Run
from edgeqat.train.state import Epoch, TrainingState

__all__ = ["TrainingProgress"]


class TrainingProgress:
    """Follows the training of a stage.

    Args:
        work: The run.
        stage: Its name.
        epochs: How many the stage has.
        start: Where it is resumed from.
        advance: What is called after each step.
    """

    def __init__(self, work: Run, stage: str, epochs: int, start: TrainingState | None, advance: Advance) -> None:
        self._work, self._stage, self._epochs, self._advance = work, stage, epochs, advance
        done = () if start is None else start.history
        self._metric = self._scored(done[-1]) if done else ""
        self._total, self._count = 0.0, 0
        if start is not None:
            within = "" if start.underway is None else f" and {start.underway.steps} steps"
            work.monitor.line(f"resumed after epoch {len(done)}/{epochs}{within}")
        for epoch in done:  # a run that was killed may have kept an epoch that no tracker was told of
            self._track(epoch)

    def step(self, loss: float) -> None:
        """A step is done."""
        self._total, self._count = self._total + loss, self._count + 1
        self._advance(f"loss {self._total / self._count:.4f}{self._metric and f', {self._metric}'}")

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is done, and kept."""
        self._metric = self._scored(epoch)
        self._total, self._count = 0.0, 0
        metric = self._metric and f", validation {self._metric}"
        told = f"epoch {epoch.index}/{self._epochs}: loss {epoch.loss:.4f}{metric} ({epoch.seconds:.1f} s)"
        self._work.monitor.line(told)
        rate = len(self._work.data.train) / max(epoch.seconds, 1e-9)
        self._work.monitor.detail(f"learning rate {epoch.lr:.3g}, {rate:.0f} samples/s, validation included")
        self._track(epoch)

    def _track(self, epoch: Epoch) -> None:
        figures = {"loss": epoch.loss, "lr": epoch.lr}
        if epoch.metric is not None:
            figures[self._work.metric.name] = epoch.metric
        self._work.tracking.epoch(self._stage, epoch.index, figures)

    def _scored(self, epoch: Epoch) -> str:
        metric = self._work.metric
        return "" if epoch.metric is None else f"{metric.name} {figure(epoch.metric, metric.is_share)}"
