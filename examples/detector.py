"""A detector: a model with two outputs in a dict, a loss and a metric of its own, in ONNX Runtime.

    python examples/detector.py [--epochs 6]

Finds the one bright rectangle in a noisy image: each cell of a 4x4 grid scores whether it holds the centre, and says
where the box is. Images are made here; seconds on one core.
"""

from __future__ import annotations

import argparse
import itertools
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import edgeqat as eq

CELLS = 4


class Detector(nn.Module):
    """float images [N, 1, 32, 32] to {"boxes": [N, 16, 4] in 0..1, x1 y1 x2 y2; "scores": logits [N, 16]}."""

    def __init__(self) -> None:
        super().__init__()
        sizes, layers = (1, 16, 32, 48), []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.sides, self.scores = nn.Conv2d(48, 4, 1), nn.Conv2d(48, 1, 1)
        centres = (torch.arange(CELLS) + 0.5) / CELLS
        self.register_buffer("centres", torch.cartesian_prod(centres, centres).flip(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Both heads read the same features; a box is how far each side is from the centre of its cell."""
        features = self.backbone(x)
        sides = torch.sigmoid(self.sides(features)).flatten(2).transpose(1, 2)
        boxes = torch.cat([self.centres - sides[..., :2], self.centres + sides[..., 2:]], -1)
        return {"boxes": boxes, "scores": self.scores(features).flatten(1)}


def make(n: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """(images, {"boxes": [n, 4], "cell": int64 [n], where the centre is})."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, 20, (n, 2), generator=generator)
    ends = corners + torch.randint(6, 13, (n, 2), generator=generator)
    images = 0.3 * torch.rand(n, 1, 32, 32, generator=generator)
    for image, (left, top), (right, bottom) in zip(images, corners.tolist(), ends.tolist(), strict=True):
        image[0, top:bottom, left:right] += 0.6
    column, row = ((corners + ends) / 2 / 32 * CELLS).long().unbind(1)
    return images, {"boxes": torch.cat([corners, ends], 1) / 32, "cell": row * CELLS + column}


def loss(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Which cell, and how far its box is off."""
    boxes = outputs["boxes"][torch.arange(len(targets["cell"])), targets["cell"]]
    where = nn.functional.cross_entropy(outputs["scores"], targets["cell"])
    return where + 10 * nn.functional.smooth_l1_loss(boxes, targets["boxes"], beta=0.1)


def overlap(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    """Intersection over union of the best scored box and the true one, per sample."""
    best = outputs["boxes"][torch.arange(len(targets["cell"])), outputs["scores"].argmax(1)]
    low, high = torch.maximum(best, targets["boxes"])[:, :2], torch.minimum(best, targets["boxes"])[:, 2:]
    common = (high - low).clamp(min=0).prod(1)
    areas = sum((box[:, 2:] - box[:, :2]).clamp(min=0).prod(1) for box in (best, targets["boxes"]))
    return common / (areas - common)


overlap.higher_is_better, overlap.is_share = True, True


def batches(n: int, seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """(inputs, targets), 32 at a time."""
    images, targets = make(n, seed)
    starts = range(0, n, 32)
    return [(images[i : i + 32], {name: t[i : i + 32] for name, t in targets.items()}) for i in starts]


def main() -> None:
    """Prints the overlap in float and in INT8, and how both outputs compare with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    torch.manual_seed(0)
    training, testing = batches(1024, seed=1), batches(256, seed=2)
    images = [inputs for inputs, _ in training[:8]]

    model = Detector()
    eq.fit(model, training, epochs=options.epochs, lr=3e-3, optimizer="adamw", loss=loss, exact=None)
    sim = eq.calibrate(eq.prepare(model, images[0]), images)
    eq.fit(sim, training, epochs=2, lr=5e-4, optimizer="adamw", loss=loss, max_grad_norm=1.0)
    program = eq.convert(sim)

    in_float = eq.convert(eq.prepare(model, images[0], qconfig_mapping=eq.QConfigMapping().set_global(None)))
    with TemporaryDirectory() as folder:
        twin, artifact = (eq.lower(p, "onnxruntime", f"{folder}/{i}") for i, p in enumerate((in_float, program)))
        parity = eq.verify(artifact, program, [inputs for inputs, _ in testing])
        before, after = eq.measure([twin, artifact], testing, metric=overlap)
        found = artifact.run(testing[0][0])
    expected = eq.reference(program, testing[0][0])
    for row in artifact.manifest["returns"]:  # in the file's order; an output has a name of its own there
        key, name = row["key"], row["output"]
        assert torch.equal(found[key], expected[key]), f"{key} differ from the reference"
        print(f"{key}: {list(found[key].shape)}, {name} in the file")
    print(f"mean overlap: float {before.metric.value:.3f}, INT8 {after.metric.value:.3f}")
    print(f"{parity.bit_identical:.0%} of all outputs bit-identical to {parity.against}")
    assert parity.bit_identical == 1.0, parity.first_difference
    assert after.metric.value > before.metric.value - 0.03


if __name__ == "__main__":
    main()
