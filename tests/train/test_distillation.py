"""Distillation: the loss against torch's, the teacher left alone, and what has no classes refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import CheckpointError, InputError
from edgeqat.train.distillation import check_distillable, distillation_loss
from edgeqat.train.state import TrainingState
from models import SmallNet, shake

RANDOM = torch.Generator().manual_seed(0)
IMAGES = torch.randn(16, 3, 16, 16, generator=RANDOM)
BATCHES = [(IMAGES[:8], torch.arange(8) % 10), (IMAGES[8:], torch.arange(8) % 10)]


def scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=RANDOM) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_loss_is_torch_s(temperature: float) -> None:
    student, teacher = scores(8, 10).requires_grad_(), scores(8, 10)
    found = distillation_loss([student], [teacher], temperature)
    log_p, q = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    expected = nn.KLDivLoss(reduction="batchmean")(log_p, q) * temperature**2
    assert torch.allclose(found, expected, rtol=1e-5)  # log q is taken of q there: float32 rounding
    (grad,) = torch.autograd.grad(found, student)
    # d/ds = T (p - q) / N: Hinton et al. 2015, equation 2, times T**2.
    assert torch.allclose(grad, temperature * (log_p.exp() - q).detach() / 8, atol=1e-6)


def test_equal_scores_cost_nothing_and_have_no_gradient() -> None:
    student = scores(4, 5).requires_grad_()
    loss = distillation_loss([student], [student.detach()], 3.0)
    (grad,) = torch.autograd.grad(loss, student)
    assert float(loss.detach()) == 0.0 and float(grad.abs().max()) < 1e-7


def test_positions_are_averaged_like_samples_and_outputs_alike() -> None:
    maps, taught = scores(2, 4, 3, 5), scores(2, 4, 3, 5)
    rows = [t.permute(0, 2, 3, 1).reshape(-1, 4) for t in (maps, taught)]
    one = distillation_loss([maps], [taught], 2.0)
    assert torch.allclose(one, distillation_loss([rows[0]], [rows[1]], 2.0))
    a, b = scores(8, 10), scores(8, 10)
    assert torch.allclose(distillation_loss([maps, a], [taught, b], 2.0), (one + distillation_loss([a], [b], 2.0)) / 2)


def test_the_task_s_share_is_the_rest() -> None:
    teacher = SmallNet().eval()
    x, y = BATCHES[0]
    outputs = scores(8, 10)
    task = F.cross_entropy(outputs, y)
    with torch.no_grad():
        taught = distillation_loss([outputs], [teacher(x)], 2.0)
    found = eq.Distillation(teacher, 0.25, 2.0).loss(task, x, outputs, y)
    assert torch.equal(found, 0.75 * task + 0.25 * taught)


class Watched(nn.Module):
    """Remembers what it was called with, and how."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.seen: list[tuple[Tensor, bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x, self.training or self.inner.training, torch.is_grad_enabled()))
        return self.inner(x)


def test_the_teacher_sees_the_student_s_batches_in_eval_mode_and_is_left_alone() -> None:
    torch.manual_seed(0)
    model = shake(SmallNet()).eval()
    teacher = Watched(shake(SmallNet(), seed=5)).train()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    sim = eq.calibrate(eq.prepare(model, IMAGES[:2]), [IMAGES])
    eq.fit(sim, BATCHES, epochs=2, lr=0.01, aids=eq.QatAids(distillation=eq.Distillation(teacher)))
    assert len(teacher.seen) == 4
    assert all(x is BATCHES[i % 2][0] for i, (x, _, _) in enumerate(teacher.seen))
    assert not any(training or grad for _, training, grad in teacher.seen)
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_with_the_teacher_alone_labels_do_not_count() -> None:
    found = []
    for shift in (0, 1):
        torch.manual_seed(0)
        model = shake(SmallNet())
        teacher = shake(SmallNet(), seed=5)
        batches = [(x, (y + shift) % 10) for x, y in BATCHES]
        eq.fit(model, batches, epochs=1, lr=0.01, aids=eq.QatAids(distillation=eq.Distillation(teacher, weight=1.0)))
        found.append(model.fc.weight.detach())
    # 0 times another number is 0, whatever the number.
    assert torch.equal(found[0], found[1])


def test_a_student_comes_nearer_to_its_teacher() -> None:
    torch.manual_seed(0)
    teacher = shake(SmallNet(), seed=5).eval()
    sim = eq.calibrate(eq.prepare(shake(SmallNet()).eval(), IMAGES[:2]), [IMAGES])
    aids = eq.QatAids(distillation=eq.Distillation(teacher, weight=1.0))
    history = eq.fit(sim, BATCHES, epochs=8, lr=0.05, max_grad_norm=1.0, aids=aids)
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss


@pytest.mark.parametrize(
    ("outputs", "targets", "words"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 3), r"targets are float32 \[4, 3\], which are no classes"),
        ({"a": torch.zeros(4, 3)}, (torch.zeros(4, dtype=torch.long), torch.zeros(4)), "which are no classes"),
        (torch.zeros(4), torch.zeros(4, dtype=torch.long), r"no output is a float tensor \[N, C, \.\.\.\] with two"),
        (torch.zeros(4, 1), torch.zeros(4, dtype=torch.long), "with two classes or more"),
        (torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long), "no output is a float tensor"),
    ],
    ids=["regression", "a part of it", "one number", "one class", "integers"],
)
def test_what_has_no_classes_is_refused(outputs: object, targets: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_distillable(outputs, targets)


def test_every_output_with_classes_counts() -> None:
    outputs = {"map": torch.zeros(2, 3, 4, 4), "score": torch.zeros(2), "pair": (torch.zeros(2, 5), None)}
    found = check_distillable(outputs, torch.zeros(2, dtype=torch.long))
    assert [tuple(t.shape) for t in found] == [(2, 3, 4, 4), (2, 5)]


def test_regression_is_refused_by_fit() -> None:
    aids = eq.QatAids(distillation=eq.Distillation(nn.Linear(3, 2)))
    with pytest.raises(InputError, match="compares class scores, and targets are float32"):
        batches = [(torch.zeros(2, 3), torch.zeros(2, 2))]
        eq.fit(nn.Linear(3, 2), batches, epochs=1, lr=0.1, loss="mse", metric="mae", aids=aids)


def test_other_refusals() -> None:
    model = SmallNet()
    with pytest.raises(InputError, match="the distillation teacher is the model that is trained"):
        eq.fit(model, BATCHES, epochs=1, lr=0.1, aids=eq.QatAids(distillation=eq.Distillation(model)))
    five = eq.QatAids(distillation=eq.Distillation(SmallNet(classes=5)))
    with pytest.raises(InputError, match=r"scores are \[\(8, 5\)\], the student's \[\(8, 10\)\]; wanted the same"):
        eq.fit(model, BATCHES, epochs=1, lr=0.1, aids=five)
    with pytest.raises(InputError, match="found the distillation weight 1.5, wanted 0 to 1"):
        eq.Distillation(model, weight=1.5)
    for temperature in (0.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="found the distillation temperature"):
            eq.Distillation(model, temperature=temperature)


def test_training_goes_on_with_the_same_teacher_only() -> None:
    states: list[TrainingState] = []
    one, other = shake(SmallNet(), seed=5), shake(SmallNet(), seed=6)
    aids = eq.QatAids(distillation=eq.Distillation(one))
    eq.fit(SmallNet(), BATCHES, epochs=2, lr=0.01, aids=aids, on_checkpoint=states.append)
    changed = eq.QatAids(distillation=eq.Distillation(other))
    with pytest.raises(CheckpointError, match="the training state was made with aids distillation"):
        eq.fit(SmallNet(), BATCHES, epochs=2, lr=0.01, aids=changed, start=states[0])
