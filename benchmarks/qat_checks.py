"""Whether a training step quantizes what it says it does: looked at in the tensors that convs and linears get.

The dispatcher is watched, below every library's own modules and hooks, so that one check holds for all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from edgeqat.simulate.fake_quant import ActivationQuantizer
from qat_variants import Step

LEVELS = 256
"""Of 8 bits."""

OFF_GRID = 0.01
"""Furthest a value may be from an integer, in steps: float32 puts one of 255 steps within 1e-4."""

FAR = 1e3
"""Beyond the range of any input."""

aten = torch.ops.aten
OPERANDS: dict[Any, Callable[[Any], tuple[Tensor, Tensor]]] = {
    aten.convolution.default: lambda args: (args[0], args[1]),
    aten.addmm.default: lambda args: (args[1], args[2].t()),
    aten.mm.default: lambda args: (args[0], args[1].t()),
}
"""(input, weight) of the ops that conv and linear modules end in; a weight's channels are its dimension 0."""


class _Watch(TorchDispatchMode):
    """Keeps the operands of every conv and linear."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op in OPERANDS:
            self.seen.append(OPERANDS[op](args))
        return op(*args, **(kwargs or {}))


def check_step(name: str, step: Step) -> str:
    """Checks a variant's step and leaves it as it was; what was found, in a few words.

    Raises:
        AssertionError: Something is not quantized, or a gradient passes outside a range.
    """
    if not step.variant.quantized:
        return ""
    state = copy.deepcopy(step.module.state_dict())
    try:
        return f"{_operands_on_grids(name, step)}, {_no_gradient_outside(name, step)}"
    finally:
        step.module.load_state_dict(state)
        step.optimizer.zero_grad(set_to_none=True)


def _operands_on_grids(name: str, step: Step) -> str:
    """Every conv and linear gets an input and, per output channel, a weight on a grid of at most 256 points."""
    assert step.module.training or not any(True for _ in step.module.children()), f"{name} is not in training mode"
    with _Watch() as watch, step.autocast():
        step.module(step.setting.x)
    wanted = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in step.setting.model.modules())
    assert len(watch.seen) == wanted, f"{name}: {len(watch.seen)} convs and linears ran, the model has {wanted}"
    for i, (x, weight) in enumerate(watch.seen):
        inputs = x.detach().transpose(0, 1).flatten(1) if step.variant.channel_inputs else x.detach().reshape(1, -1)
        for what, rows in (("input", inputs), ("weight", weight.detach().flatten(1))):
            values = [row.unique() for row in rows]
            levels = max(len(found) for found in values)
            assert levels <= LEVELS, f"{name}: the {what} of op {i} has {levels} values, wanted {LEVELS} at most"
            # bfloat16 moves the points of a grid by up to half a step.
            points = nn.utils.rnn.pad_sequence(values, batch_first=True)  # padded with 0, a point of every grid
            assert step.variant.autocast or on_grid(points), f"{name}: the {what} of op {i} lies on no grid"
    return f"{wanted} convs and linears on grids"


def on_grid(rows: Tensor) -> bool:
    """Whether each row holds integer multiples of some step, with integers up to 255: [R, N]."""
    exact = rows.double()
    exact = exact / exact.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for largest in range(1, LEVELS):  # the integer that the row's largest magnitude stands for
        scaled = exact * largest
        found |= (scaled - scaled.round()).abs().amax(1) < OFF_GRID
        if bool(found.all()):
            return True
    return False


def _no_gradient_outside(name: str, step: Step) -> str:
    """Inputs beyond the range get no gradient, others some; of edgeqat, every quantizer is looked at."""
    x = step.setting.x.detach().clone()
    outside = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.1
    x[outside] = FAR * x[outside].sign()
    x.requires_grad_()
    with step.autocast():
        logits = step.module(x)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(x.device)
    (grad,) = torch.autograd.grad((logits.float() * weights).sum(), x)
    passed = int(grad[outside].count_nonzero())
    assert passed == 0, f"{name}: {passed} of {int(outside.sum())} inputs outside the range get a gradient"
    assert bool(grad[~outside].any()), f"{name}: no input inside the range gets a gradient"
    quantizers = [m for m in step.module.modules() if isinstance(m, ActivationQuantizer)]
    for quantizer in quantizers:
        _check_quantizer(name, quantizer, x.device)
    return "no gradient outside " + (f"any of {len(quantizers)} ranges" if quantizers else "the input's range")


def _check_quantizer(name: str, quantizer: ActivationQuantizer, device: torch.device) -> None:
    with torch.no_grad():
        low, high = (float(quantizer(torch.tensor([v], device=device))) for v in (-1e6, 1e6))
    margin = (high - low) / (LEVELS - 1)
    points = torch.linspace(low - 50 * margin, high + 50 * margin, 5000, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(quantizer(points).sum(), points)
    outside = (points < low - margin) | (points > high + margin)
    inside = (points > low + margin) & (points < high - margin)
    assert not bool(grad[outside].any()), f"{name}: {quantizer.name} passes a gradient outside its range"
    assert bool((grad[inside] == 1).all()), f"{name}: {quantizer.name} stops a gradient inside its range"
