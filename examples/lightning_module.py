"""Quantization-aware training in Lightning: the simulation is a submodule of your LightningModule.

    pip install lightning
    python examples/lightning_module.py

The Trainer trains, validates in the integers of the file, keeps the best checkpoint, and loads it into a simulation
that was prepared anew. Handwritten digits, seconds on one core.
"""

from __future__ import annotations

import logging
import sys
from tempfile import TemporaryDirectory

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import edgeqat as eq

try:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
except ImportError:
    sys.exit("this example needs Lightning, which is not installed: pip install lightning")


class Classifier(lightning.LightningModule):
    """Trains any module of images to logits; of quantization it knows `exact` alone."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of a batch."""
        images, targets = batch
        return nn.functional.cross_entropy(self.model(images), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Logs the share of right answers."""
        images, targets = batch
        if isinstance(self.model, eq.SimulatedModel):
            with self.model.exact("onnxruntime"):  # what will be shipped
                logits = self.model(images)
        else:
            logits = self.model(images)
        self.log("top1", (logits.argmax(1) == targets).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def network() -> nn.Sequential:
    """float images [N, 1, 8, 8] to 10 logits."""
    first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(16, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(32 * 16, 10))


def main() -> None:
    """Prints what each stage reaches, and what the best checkpoint's file computes."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # no lines about GPUs that are not used
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    images, targets = torch.from_numpy(digits.images).float().div(16).unsqueeze(1), torch.from_numpy(digits.target)
    training = DataLoader(TensorDataset(images[:1300], targets[:1300]), batch_size=32, shuffle=True)
    validation = DataLoader(TensorDataset(images[1300:], targets[1300:]), batch_size=500)
    calibration = [images for images, _ in training]

    with TemporaryDirectory() as folder:

        def trainer(epochs: int, *callbacks: lightning.Callback) -> lightning.Trainer:
            return lightning.Trainer(
                accelerator="cpu",
                max_epochs=epochs,
                gradient_clip_val=1.0,
                callbacks=list(callbacks),
                default_root_dir=folder,
                logger=False,
                enable_checkpointing=bool(callbacks),
                enable_progress_bar=False,
                enable_model_summary=False,
            )

        model = network()
        first = trainer(4)
        first.fit(Classifier(model, lr=0.05), training, validation)

        sim = eq.calibrate(eq.prepare(model, images[:2]), calibration)
        best = ModelCheckpoint(folder, "best", monitor="top1", mode="max")
        second = trainer(3, best)
        second.fit(Classifier(sim, lr=0.01), training, validation)

        # What a later process does: prepare the same model, and load the checkpoint into it. No calibration.
        again = eq.prepare(network(), images[:2])
        Classifier.load_from_checkpoint(best.best_model_path, model=again, lr=0.0)
        program = eq.convert(again)
        artifact = eq.lower(program, "onnxruntime", f"{folder}/digits")
        parity = eq.verify(artifact, program, [images[1300:]])
        top1 = float((artifact.run(images[1300:]).argmax(1) == targets[1300:]).float().mean())
    print(f"top-1: float {first.callback_metrics['top1']:.1%}, best of quantized {best.best_model_score:.1%}")
    print(f"file of the best checkpoint {top1:.1%}, {parity.bit_identical:.0%} of its logits bit-identical")
    assert top1 == float(best.best_model_score), "the file computes something else than was validated"
    assert parity.bit_identical == 1.0, parity.first_difference


if __name__ == "__main__":
    main()
