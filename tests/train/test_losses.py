from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgeqat.errors import DataError, InputError, ModelError
from edgeqat.train.losses import check_loss, resolve_loss

A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 2.0]])


@pytest.mark.parametrize(
    ("name", "targets", "value"),
    [
        ("cross_entropy", torch.tensor([1]), 0.3132617),  # log(1 + exp(-1))
        ("mse", B, 4.5),
        ("l1", B, 1.5),
        ("binary_cross_entropy_with_logits", torch.tensor([[1.0, 0.0]]), (0.3132617 + 2.1269280) / 2),
    ],
)
def test_losses_by_hand(name: str, targets: Tensor, value: float) -> None:
    assert resolve_loss(name)(A, targets).item() == pytest.approx(value)


def test_void_pixels_do_not_count_in_cross_entropy() -> None:
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    targets = torch.randint(0, 3, (2, 4, 4))
    targets[:, 1] = 255
    loss = resolve_loss("cross_entropy")(scores, targets)
    kept = [0, 2, 3]
    assert torch.equal(loss, F.cross_entropy(scores[:, :, kept].contiguous(), targets[:, kept].contiguous()))
    loss.backward()
    assert scores.grad is not None and not bool(scores.grad[:, :, 1].any()) and bool(scores.grad[:, :, 0].any())


def test_a_batch_of_void_pixels_alone_and_one_of_shares() -> None:
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = resolve_loss("cross_entropy")(scores, torch.full((2, 4, 4), 255))
    loss.backward()
    assert scores.grad is not None and (loss.item(), bool(scores.grad.any())) == (0.0, False)
    shares = torch.rand(2, 3, 4, 4)
    assert torch.equal(resolve_loss("cross_entropy")(scores, shares), F.cross_entropy(scores, shares))


def test_an_image_has_no_void_class() -> None:
    with pytest.raises(IndexError, match="Target 255 is out of bounds"):
        resolve_loss("cross_entropy")(torch.zeros(1, 3), torch.tensor([255]))


@pytest.mark.parametrize("name", ["mse", "l1", "binary_cross_entropy_with_logits"])
def test_what_torch_would_broadcast_is_refused(name: str) -> None:
    with pytest.raises(DataError, match=r"outputs are float32 \[4, 1\], targets float32 \[4\], wanted one shape"):
        resolve_loss(name)(torch.zeros(4, 1), torch.zeros(4))


def test_a_callable_is_taken_as_it_is_and_an_unknown_name_refused() -> None:
    assert resolve_loss(torch.nn.functional.huber_loss) is torch.nn.functional.huber_loss
    with pytest.raises(InputError, match="found the loss 'hinge', wanted one of cross_entropy, mse, l1"):
        resolve_loss("hinge")


def raises(outputs: Any, targets: Any) -> Tensor:
    raise KeyError("boxes")


def exits(outputs: Any, targets: Any) -> Tensor:
    raise SystemExit(7)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (exits, "the loss own of one batch of digits fails: SystemExit: 7"),
        (raises, "the loss own of one batch of digits fails: KeyError: 'boxes'"),
        (lambda o, t: 1.0, "returns a float, wanted a 0-d tensor"),
        (lambda o, t: o.mean(1), r"returns float32 \[1\], wanted a 0-d tensor; take its mean"),
        (lambda o, t: o.detach().sum(), "has no gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_refused(loss: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        check_loss(loss, "own", "digits", A.clone().requires_grad_(), B)


def test_a_loss_that_can_is_not() -> None:
    check_loss(resolve_loss("mse"), "mse", "digits", A.clone().requires_grad_(), B)
