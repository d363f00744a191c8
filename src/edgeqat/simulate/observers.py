"""Observers: what calibration learns a range with. torchao's, which are kept well; imported when first used."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from edgeqat.errors import EdgeqatError, PhaseError

__all__ = ["Observer", "make_observer", "observed_range"]


class Observer(Protocol):
    """torch.ao's observer protocol."""

    def __call__(self, x: Tensor) -> Tensor:
        """Looks at a batch."""
        ...

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale and zero_point it would choose."""
        ...


def make_observer(name: str, qmin: int, qmax: int) -> Observer:
    """A fresh per-tensor affine observer: "minmax", "moving_average" or "histogram"."""
    # torchao reports at import the GPU kernels that it cannot load on this machine; calibration uses none.
    logging.disable(logging.WARNING)
    try:
        from torchao.quantization.pt2e import observer as torchao_observers
    finally:
        logging.disable(logging.NOTSET)
    classes = {
        "minmax": torchao_observers.MinMaxObserver,
        "moving_average": torchao_observers.MovingAverageMinMaxObserver,
        "histogram": torchao_observers.HistogramObserver,
    }
    if name not in classes:
        raise EdgeqatError(f"found the observer {name!r}, wanted one of {', '.join(classes)}")
    observer: Observer = classes[name](
        dtype=torch.quint8 if qmax > 127 else torch.uint8,
        qscheme=torch.per_tensor_affine,
        quant_min=qmin,
        quant_max=qmax,
        eps=1e-10,
    )
    return observer


def observed_range(observer: Observer, qmin: int, qmax: int, name: str) -> tuple[float, float]:
    """The range [low, high] that an observer settled on; `affine.activation_qparams` makes the grid from it.

    Raises:
        PhaseError: It has seen no data.
    """
    low, high = (torch.as_tensor(getattr(observer, k, torch.inf)) for k in ("min_val", "max_val"))
    if low.numel() != 1 or not bool(torch.isfinite(low)) or not bool(torch.isfinite(high)):
        raise PhaseError(f"{name} saw no finite data in calibration; pass at least one batch of finite inputs")
    if float(low) == float(high) == 0.0 or not hasattr(observer, "histogram"):
        return float(low), float(high)
    # A histogram observer keeps the extremes and searches the range: its scale and zero point carry it.
    scale, zero_point = (t.flatten()[0].double() for t in observer.calculate_qparams())
    return float((qmin - zero_point) * scale), float((qmax - zero_point) * scale)
