"""Bench: latency of artifact folders, all of them interleaved in one run, with ratios against the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgeqat.errors import InputError
from edgeqat.lowering.artifact import load_artifact
from edgeqat.lowering.golden import golden_inputs
from edgeqat.measuring.latency import Latency, measure_latency

__all__ = ["Benched", "Ratio", "bench", "find_artifacts", "latency_ratio"]

BLOCK_ROUNDS = 20
RESAMPLES = 1000
SEED = 20240229


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians and its 95% interval [low, high]."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Benched:
    """What one artifact folder did.

    Attributes:
        folder: The artifact folder.
        runtime: Name of its runtime.
        inputs: Shape of each input of a call, by name.
        file_bytes: Size of the model file.
        latency: Its calls.
        ratio: Its median latency over that of the first folder; None for the first itself.
    """

    folder: Path
    runtime: str
    inputs: dict[str, tuple[int, ...]]
    file_bytes: int
    latency: Latency
    ratio: Ratio | None


def find_artifacts(folders: Sequence[Path]) -> list[Path]:
    """The artifact folders among and inside `folders`: each is one itself, or a run that holds some.

    Raises:
        InputError: One is neither.
    """
    found: list[Path] = []
    for folder in folders:
        if (folder / "manifest.json").is_file():
            found.append(folder)
            continue
        inside = sorted(path.parent for path in folder.glob("artifacts/*/*/manifest.json"))
        if not inside:
            raise InputError(
                f"{folder} {_state(folder)}, wanted an artifact folder (with manifest.json) or a run's directory"
            )
        found += inside
    return found


def _state(folder: Path) -> str:
    """What a folder is that holds no run's artifacts."""
    if not folder.is_dir():
        return "is no directory"
    if (folder / "recipe.yaml").is_file() and not (folder / "report.json").is_file():
        return "holds an unfinished run without artifacts: finish it with edgeqat run --resume"
    below = sorted(path.parent for path in folder.glob("*/manifest.json"))
    if below:
        return f"is no artifact, but holds some: name them ({' '.join(map(str, below))})"
    return "holds no artifact"


def bench(folders: Sequence[Path], threads: int = 1, batch: int = 1) -> list[Benched]:
    """Times artifact folders call by call in turn, each on the first of its own golden inputs.

    Args:
        folders: Artifact folders, or run directories, of which every artifact is taken.
        threads: Threads within an op.
        batch: Samples a call; golden inputs are repeated where they are fewer.

    Raises:
        InputError: A folder holds no artifact.
        TamperedError: A file is missing, unreadable, or does not match its hash.
        MissingRuntimeError: The runtime of an artifact is not installed.
    """
    places = find_artifacts(folders)
    # The same folder may be given twice: the ratio then shows how sharp this machine's figures are.
    artifacts = {str(i): load_artifact(place) for i, place in enumerate(places)}
    feeds = {key: golden_inputs(found.folder, found.manifest, batch) for key, found in artifacts.items()}
    inputs = {key: [torch.from_numpy(array) for array in feed.values()] for key, feed in feeds.items()}
    latencies = measure_latency(artifacts, inputs, threads)
    first = latencies["0"].samples_ms
    return [
        Benched(
            folder=artifact.folder,
            runtime=artifact.runtime,
            inputs={name: array.shape for name, array in feeds[key].items()},
            file_bytes=artifact.file_bytes,
            latency=latencies[key],
            ratio=None if key == "0" else latency_ratio(latencies[key].samples_ms, first),
        )
        for key, artifact in artifacts.items()
    ]


def latency_ratio(samples_ms: Sequence[float], against_ms: Sequence[float]) -> Ratio:
    """Median of `samples_ms` over median of `against_ms`, with a 95% interval.

    The interval is a percentile one of a paired circular block bootstrap: blocks of consecutive rounds are
    drawn, the same for both, because what slows a machine down lasts for many calls and slows both.

    Args:
        samples_ms: Latencies, one a round, [R].
        against_ms: Latencies of the same rounds, [R].
    """
    ours, theirs = np.asarray(samples_ms), np.asarray(against_ms)
    rounds = len(ours)
    generator = np.random.default_rng(SEED)
    starts = generator.integers(0, rounds, (RESAMPLES, -(-rounds // BLOCK_ROUNDS), 1))
    drawn = ((starts + np.arange(BLOCK_ROUNDS)) % rounds).reshape(RESAMPLES, -1)[:, :rounds]
    ratios = np.median(ours[drawn], axis=1) / np.median(theirs[drawn], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(float(np.median(ours) / np.median(theirs)), float(low), float(high))
