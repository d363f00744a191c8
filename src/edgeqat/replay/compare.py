"""What a runtime computes from the golden inputs, against the integers it must compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.folder import (
    FolderError,
    check_hashes,
    checksums,
    outputs_in_order,
    read_manifest,
    read_safetensors,
)
from edgeqat.replay.kernels import EXACT_ENGINES, arithmetic_here
from edgeqat.replay.pixels import check_preprocessing
from edgeqat.replay.runner import Runner

FLOAT_TOLERANCE = 1e-4
"""Relative to the largest expected output: what two float32 kernels may differ by, for float islands only."""

OWED = ("exact", "close", "reported")
"""What an output owes: every bit; FLOAT_TOLERANCE; nothing, since a float was quantized again on the way."""


@dataclass(frozen=True)
class Replay:
    """What replaying found.

    Attributes:
        against: Name of the arithmetic whose results on the golden inputs were compared with.
        exact_here: Whether this machine's kernels are the ones of that arithmetic, so that a difference is a failure.
        samples: Number of golden inputs.
        identical: Share of output elements that are bit-identical.
        max_difference: Largest difference among the outputs, in their own unit.
        first_difference: First op, in program order, whose integers differ; None if none does.
        passed: Whether everything that must be equal is.
        owed: The least that an output owes, see OWED.
        inside: Number of inner values that must be, and were, compared to the bit.
    """

    against: str
    exact_here: bool
    samples: int
    identical: float
    max_difference: float
    first_difference: str | None
    passed: bool
    owed: str
    inside: int


def runner_of(manifest: dict[str, Any], runners: Mapping[str, Runner]) -> Runner:
    """What runs an artifact's model file."""
    runtime = str(manifest["runtime"])
    if runtime not in runners:
        raise FolderError(f"the manifest names the runtime {runtime}, and this script runs {', '.join(runners)}")
    return runners[runtime]


def replay_with(runners: Mapping[str, Runner], folder: Path, check: bool = True) -> Replay:
    """Runs the golden inputs through the model file and compares.

    Args:
        runners: By runtime: what runs a model file.
        folder: An artifact folder.
        check: Whether to check the files' hashes first.

    Raises:
        FolderError: A file is missing, unreadable or changed.
        ImportError: The runtime is not installed.
    """
    manifest = read_manifest(folder)
    if check:
        check_hashes(folder, manifest)
    golden = read_safetensors(folder / "golden.safetensors")
    if not (folder / manifest["model"]).is_file():
        raise FolderError(f"{folder / manifest['model']} is missing; fetch the artifact again")
    try:
        return compare(runner_of(manifest, runners), manifest, golden, folder / manifest["model"])
    except (LookupError, TypeError, StopIteration) as error:
        raise FolderError(
            f"{folder}: model, manifest and golden vectors do not belong together ({type(error).__name__}: {error}); "
            "fetch the artifact again"
        ) from error


def compare(runner: Runner, manifest: dict[str, Any], golden: dict[str, Any], model: Path) -> Replay:
    """Runs the golden inputs through a model file and compares."""
    engine, against = choose_engine(manifest)
    # Arithmetics that make the same of the golden inputs share their vectors.
    place = manifest["golden"][against]
    feed = {name: golden[f"inputs/{name}"] for name in manifest["inputs"]}
    check_complete(manifest, golden, place)
    check_preprocessing(manifest, golden)
    samples = len(next(iter(feed.values())))
    inside = sum(row["exact"] for row in manifest["checks"])
    taps = golden["taps"].tobytes() if inside else b""
    outputs, values = runner.run(model, engine, feed, outputs_in_order(manifest), taps)
    identical, worst, wrong = compare_outputs(manifest, golden, place, outputs)
    first = first_difference(manifest["checks"], golden, place, values) if inside else None
    first = wrong if first is None else first
    # ONNX Runtime computes layers over int8 activations in float: none of its integer kernels on x86 take them.
    here = arithmetic_here(f"{manifest['runtime']}/{engine}") == against and manifest.get("storage") != "int8"
    owed = max((entry["owed"] for entry in manifest["outputs"].values()), key=OWED.index)
    return Replay(against, here, samples, identical, worst, first, first is None, owed, inside)


def check_complete(manifest: dict[str, Any], golden: dict[str, Any], place: str) -> None:
    """Raises LookupError where the manifest does not list what the golden vectors hold: it would go unchecked."""
    rows = {"outputs": manifest["outputs"], "crc32": {row["value"] for row in manifest["checks"]}}
    for part, listed in rows.items():
        prefix = f"{place}/{part}/"
        odd = {key.removeprefix(prefix) for key in golden if key.startswith(prefix)} ^ set(listed)
        if odd:
            raise LookupError(f"only one of them has {prefix}{min(odd)}")


def choose_engine(manifest: dict[str, Any]) -> tuple[str, str]:
    """(engine, arithmetic to compare with): the manifest's engine where this device has it, else another exact one."""
    engine, known = str(manifest["engine"]), [str(name) for name in manifest["arithmetics"]]
    if manifest["runtime"] != "torchscript":
        here = arithmetic_here(f"{manifest['runtime']}/{engine}")
        return engine, here if here in known else known[0]
    import torch

    supported = torch.backends.quantized.supported_engines
    if engine in supported and (engine in known or engine not in EXACT_ENGINES):
        return engine, engine if engine in known else known[0]
    usable = [name for name in known if name in supported]
    if not usable:
        raise FolderError(f"torch here has the engines {', '.join(supported)}, wanted one of {', '.join(known)}")
    return usable[0], usable[0]


def compare_outputs(
    manifest: dict[str, Any], golden: dict[str, Any], place: str, outputs: dict[str, Any]
) -> tuple[float, float, str | None]:
    """(share of identical elements, largest difference, op of the first output that is not as it must be)."""
    equal, total, worst, wrong = 0, 0, 0.0, None
    for name, entry in manifest["outputs"].items():
        expected, found = golden[f"{place}/outputs/{name}"], outputs[name]
        if expected.shape != found.shape:
            return 0.0, float("inf"), str(entry["op"])
        difference = np.abs(expected.astype(np.float64) - found)
        equal, total = equal + int((expected == found).sum()), total + expected.size
        worst = max(worst, float(difference.max(initial=0.0)))
        close = FLOAT_TOLERANCE * float(np.abs(expected).max(initial=0.0))
        allowed = {"exact": 0.0, "close": close, "reported": float("inf")}[entry["owed"]]
        if wrong is None and not bool((difference <= allowed).all()):
            wrong = str(entry["op"])
    return equal / max(total, 1), worst, wrong


def first_difference(
    checks: list[dict[str, Any]], golden: dict[str, Any], place: str, values: dict[str, Any]
) -> str | None:
    """The first op, in program order, whose integers are not the expected ones."""
    for row in checks:
        expected = golden[f"{place}/crc32/{row['value']}"]
        if row["exact"] and not np.array_equal(checksums(values[row["value"]]), expected):
            return str(row["op"])
    return None
