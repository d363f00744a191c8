"""Golden vectors: inputs, and the integers a runtime must compute from them.

Outputs are kept whole. For every value inside, a CRC-32 a sample is kept instead of its integers: it tells which
op is the first to differ at a thousandth of the size (all of ResNet-20's integers for 16 images are 4 MB, against
a model of 0.3 MB).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeqat.errors import TamperedError
from edgeqat.graph.pixels import takes_pixels
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.arithmetic.base import Arithmetic
from edgeqat.interpreter.run import Interpreter
from edgeqat.program import Kind, QuantizedProgram
from edgeqat.replay.folder import FolderError, checksums, read_safetensors
from edgeqat.replay.pixels import preprocess, steps_of

__all__ = ["GOLDEN_N", "golden_inputs", "golden_vectors", "pixels_of", "sample_inputs", "what_is_owed"]

GOLDEN_N = 16
GOLDEN_SEED = 20240229

PART_ELEMENTS = 2**21
"""Elements of the largest value up to which samples are computed together. Larger tensors, 8 MiB in float32, get
fresh memory from the system each time, which took longer than the arithmetic."""


def sample_inputs(program: QuantizedProgram) -> list[Tensor]:
    """16 seeded samples, uniform over the range of each input's grid; standard normal where an input has none.

    Images are random pixels. Other integer inputs are zeros: no other index is known to be a legal one.
    """
    generator = torch.Generator().manual_seed(GOLDEN_SEED)
    twins = {op.inputs[0]: op.name for op in program.ops if op.kind is Kind.QUANTIZE}
    samples = []
    for i, name in enumerate(program.inputs):
        leaves = program.signature.leaves
        sizes = leaves[i].example[1:] if leaves else (int(size) for size in program.values[name].shape[1:])
        shape = [GOLDEN_N, *sizes]
        if takes_pixels(torch.empty(shape, dtype=program.values[name].dtype, device="meta")):
            samples.append(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
        elif name in twins:
            grid = program.grid_of(twins[name])
            scale, zero_point = grid.per_tensor()
            low, high = (grid.qmin - zero_point) * scale, (grid.qmax - zero_point) * scale
            samples.append(torch.rand(shape, generator=generator) * (high - low) + low)
        else:
            dtype = program.values[name].dtype
            noise = torch.randn(shape, generator=generator)
            samples.append(noise.to(dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype))
    return samples


def what_is_owed(program: QuantizedProgram) -> dict[str, str]:
    """How near a runtime must come to the golden vectors, for every value.

    "exact": no float island is upstream, so every bit is owed. "close": float ops on exact values, which two
    libraries may compute differently in the last bits. "reported": a float result was quantized again, so a last
    bit may have become a step; nothing bounds what follows from it.
    """
    owed = dict.fromkeys(program.inputs, "exact")
    for op in program.ops:
        upstream = {owed[name] for name in op.inputs}
        if op.kind is Kind.FLOAT:
            level = "reported" if "reported" in upstream else "close"
        else:
            level = "exact" if upstream <= {"exact"} else "reported"
        owed.update(dict.fromkeys(op.outputs, level))
    return owed


def pixels_of(inputs: Tensor, steps: Mapping[str, Any] | None) -> Tensor | None:
    """The images, uint8 [N, H, W, C], that a manifest's preprocessing turns into exactly these inputs, if any does.

    A device can then check its own preprocessing too.
    """
    if steps is None or inputs.dim() != 4 or takes_pixels(inputs):
        return None
    mean, std = (torch.tensor(steps[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    if len(mean) != inputs.shape[1]:
        return None
    pixels = ((inputs * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    again = preprocess(pixels.numpy(), dict(steps))
    return pixels if np.array_equal(again, inputs.numpy()) else None


def golden_vectors(
    program: QuantizedProgram,
    inputs: Sequence[Tensor],
    arithmetics: Sequence[str],
    taps: bytes,
    preprocessing: Mapping[str, Any] | None,
    unseen: frozenset[str] = frozenset(),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of golden.safetensors; and by arithmetic the one that its vectors are kept under.

    Two arithmetics that make the same of the golden inputs share their vectors.

    Args:
        program: The program.
        inputs: Flat inputs, float32.
        arithmetics: Names of the arithmetics whose results to keep.
        taps: How the inner values of the model file are made visible.
        preprocessing: What the manifest says of it.
        unseen: Values that no runtime of the file shows.
    """
    tensors = {f"inputs/{n}": t.detach().clone() for n, t in zip(program.inputs, inputs, strict=True)}
    for name, tensor in zip(program.inputs, inputs, strict=True):
        pixels = pixels_of(tensor, steps_of({"preprocessing": preprocessing}, name))
        if pixels is not None:
            tensors[f"pixels/{name}"] = pixels
    tensors["taps"] = torch.from_numpy(np.frombuffer(taps, np.uint8).copy())
    kept: dict[str, dict[str, Tensor]] = {}
    places: dict[str, str] = {}
    for name in arithmetics:
        together = samples_together(program, ARITHMETICS[name], len(inputs[0]))
        expected = _expected(program, name, inputs, together)
        found = {key: t for key, t in expected.items() if key.removeprefix("crc32/") not in unseen}
        places[name] = next((other for other, vectors in kept.items() if _same(found, vectors)), name)
        kept.setdefault(places[name], found)
    tensors |= {f"{name}/{key}": tensor for name, vectors in kept.items() for key, tensor in vectors.items()}
    return tensors, places


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def samples_together(program: QuantizedProgram, arithmetic: Arithmetic, n: int) -> int:
    """How many of n samples to compute at once: fewer than n only if the integers are the same either way.

    They are where each sample is computed on its own: all integers have the batch in front, no float op, whose last
    bits may depend on the batch, is among the ops, and no sample's addition or dequantization ends within a block.
    """
    blocks = {Kind.ADD: arithmetic.add_block, Kind.DEQUANTIZE: arithmetic.dequantize_block}
    largest = 1
    for op in program.ops:
        for name in op.outputs:
            sizes = program.values[name].shape[1:]
            elements = math.prod(size for size in sizes if isinstance(size, int))
            within_block = elements % blocks.get(op.kind, 1) != 0
            if op.kind is Kind.FLOAT or any(isinstance(size, str) for size in sizes) or within_block:
                return max(1, n)
            largest = max(largest, elements)
    return max(1, min(n, PART_ELEMENTS // largest))


def _expected(
    program: QuantizedProgram, arithmetic: str, inputs: Sequence[Tensor], together: int
) -> dict[str, Tensor]:
    """Outputs, and the checksums of all values inside."""
    interpreter = Interpreter(program, ARITHMETICS[arithmetic])
    parts: dict[str, list[Tensor]] = {}
    for start in range(0, max(1, len(inputs[0])), together):
        found, values = interpreter.run_with_taps([tensor[start : start + together] for tensor in inputs])
        leaves: list[Any] = torch.utils._pytree.tree_leaves(found)
        # A value that the model returns twice is kept once.
        for output, tensor in dict(zip(program.outputs, leaves, strict=True)).items():
            parts.setdefault(f"outputs/{output}", []).append(tensor.detach())
        for value, integers in values.items():
            crc = torch.from_numpy(checksums(integers.to(torch.uint8).numpy()))
            parts.setdefault(f"crc32/{value}", []).append(crc)
    # One part is all samples; its outputs need not have the batch in front.
    return {
        key: (torch.cat(found) if len(found) > 1 else found[0].clone()).contiguous() for key, found in parts.items()
    }


def golden_inputs(folder: Path, manifest: Mapping[str, Any], n: int) -> dict[str, np.ndarray[Any, Any]]:
    """n samples of an artifact folder's golden inputs by name, in the model's order; repeated where n needs more.

    Raises:
        TamperedError: They cannot be read, or are not those of the manifest.
    """
    try:
        tensors = read_safetensors(folder / "golden.safetensors")
    except FolderError as error:
        raise TamperedError(str(error)) from error
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name in manifest["inputs"]:
        samples = tensors.get(f"inputs/{name}")
        if samples is None or samples.ndim == 0 or len(samples) == 0:
            raise TamperedError(f"{folder / 'golden.safetensors'} has no input {name!r}; fetch the artifact again")
        found[name] = samples[np.arange(n) % len(samples)]
    return found
