"""Keyword spotting on 1-d features: a depthwise-separable network of Conv1d, INT8 in ONNX Runtime and in LiteRT.

    python examples/keywords.py [--epochs 8]

Inputs have the shape of 40 filter bank energies over 64 frames. They are made here: each of six words is a sequence
of three tones that glide, at a random time and pitch, in noise. Seconds on one core.
"""

from __future__ import annotations

import argparse
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import edgeqat as eq

BANDS, FRAMES, WORDS = 40, 64, 6
RUNTIMES = ("onnxruntime", "litert")


def separable(channels: int) -> nn.Sequential:
    """A filter over time for each channel, then a mix of channels."""
    depthwise = nn.Conv1d(channels, channels, 9, padding=4, groups=channels, bias=False)
    mix = nn.Conv1d(channels, channels, 1, bias=False)
    norms = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
    return nn.Sequential(depthwise, norms[0], nn.ReLU(), mix, norms[1], nn.ReLU())


def network() -> nn.Sequential:
    """float features [N, 40, 64] to 6 logits; bands are the channels."""
    first = nn.Sequential(nn.Conv1d(BANDS, 48, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(48), nn.ReLU())
    return nn.Sequential(
        first, separable(48), separable(48), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, WORDS)
    )


def make(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """(features, words)."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, WORDS, (n,), generator=generator)
    sounds = torch.tensor([[5, 15, 25], [25, 15, 5], [5, 25, 15], [15, 5, 25], [15, 25, 5], [25, 5, 15]])[words]
    pitch = torch.randint(-4, 9, (n, 1), generator=generator)
    start = torch.randint(0, 22, (n,), generator=generator)
    features = 1.2 * torch.randn(n, BANDS, FRAMES, generator=generator)
    bands = torch.arange(BANDS).view(1, BANDS)
    for part in range(3):
        for frame in range(14):
            centre = (sounds[:, part : part + 1] + pitch + frame / 7).float()
            features[torch.arange(n), :, start + 14 * part + frame] += 3 * torch.exp(-((bands - centre) ** 2) / 4)
    return features, words


def batches(n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """32 at a time."""
    return list(zip(*(part.split(32) for part in make(n, seed)), strict=True))


def main() -> None:
    """Prints a line for each runtime."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.manual_seed(0)
    training, testing = batches(960, seed=1), batches(320, seed=2)
    features = [inputs for inputs, _ in training[:8]]

    model = network()
    eq.fit(model, training, epochs=options.epochs, lr=0.01, optimizer="adamw", exact=None)
    sim = eq.calibrate(eq.prepare(model, features[0], target=RUNTIMES), features)  # one plan that suits both
    eq.fit(sim, training, epochs=2, lr=0.001, optimizer="adamw", max_grad_norm=1.0)
    program = eq.convert(sim)
    assert not program.float_origins(), "a layer stayed in float"

    inputs, words = (torch.cat(parts) for parts in zip(*testing, strict=True))
    with torch.no_grad():
        in_float = float((model(inputs).argmax(1) == words).float().mean())
    print(f"float: {in_float:.1%} of {len(words)} words")
    with TemporaryDirectory() as folder:
        for runtime in RUNTIMES:
            artifact = eq.lower(program, runtime, f"{folder}/{runtime}")
            parity = eq.verify(artifact, program, [inputs])
            top1 = float((artifact.run(inputs).argmax(1) == words).float().mean())
            identical = f"{parity.bit_identical:.0%} of the logits bit-identical to {parity.against}"
            print(f"{runtime}: {top1:.1%}, {artifact.file_bytes} bytes, {identical}")
            assert parity.bit_identical == 1.0, parity.first_difference
            assert top1 > in_float - 0.03


if __name__ == "__main__":
    main()
