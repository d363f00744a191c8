"""Images as a model takes them, by the steps that a manifest names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeqat.replay.folder import FolderError

BILINEAR = 2  # Pillow's number of it; Pillow is imported only where an image file is read


def steps_of(manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
    """How pixels become an input, None where they do not; `channels` is how many an image has."""
    steps = manifest.get("preprocessing") or {}
    steps = steps.get("inputs", {}).get(name, {}) if "inputs" in steps else steps
    entry = manifest.get("inputs", {}).get(name, {})
    if entry.get("dtype") == "uint8" and len(entry["shape"]) == 4:  # the model takes the pixels themselves
        return {**steps, "channels": entry["shape"][1], "mean": None, "std": None}
    return {**steps, "channels": len(steps["mean"])} if steps.get("mean") and steps.get("std") else None


def preprocess(pixels: np.ndarray[Any, Any], steps: dict[str, Any]) -> np.ndarray[Any, Any]:
    """uint8 [N, H, W, C] to float32 [N, C, H, W]: (pixels / 255 - mean) / std, to the bit as in training.

    Where there is no mean, uint8 [N, C, H, W]: the pixels themselves.
    """
    if steps["mean"] is None:
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, BILINEAR))
    mean, std = (np.asarray(steps[key], np.float32) for key in ("mean", "std"))
    real = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(real.transpose(0, 3, 1, BILINEAR))


def check_preprocessing(manifest: dict[str, Any], golden: dict[str, Any]) -> None:
    """Raises FolderError where the manifest's preprocessing does not make the golden inputs of the golden pixels."""
    for name in manifest["inputs"]:
        pixels, steps = golden.get(f"pixels/{name}"), steps_of(manifest, name)
        if pixels is None:
            continue
        if steps is None or not np.array_equal(preprocess(pixels, steps), golden[f"inputs/{name}"]):
            raise FolderError(
                f"the manifest's preprocessing of {name} does not give the golden inputs; fetch the artifact again"
            )


def read_image(path: Path, steps: dict[str, Any], size: Sequence[int | str]) -> np.ndarray[Any, Any]:
    """uint8 [H, W, C] of a .npy file as it is, or of an image file, in RGB and resized; Pillow is needed for those.

    Args:
        path: The file.
        steps: What `steps_of` found.
        size: The height and width that the model takes, a name where it takes any.
    """
    try:
        if path.suffix == ".npy":
            pixels: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
        else:
            from PIL import Image

            with Image.open(path) as image:
                pixels = _resized(image.convert("RGB"), steps.get("resize"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read as an image ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != steps["channels"]:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise FolderError(f"{path} holds {found}, wanted uint8 [H, W, {steps['channels']}]")
    if any(isinstance(side, int) and side != n for n, side in zip(pixels.shape[:2], size, strict=True)):
        found, wanted = ("x".join(map(str, (width, height))) for height, width in (pixels.shape[:2], size))
        why = "a .npy file is not resized" if path.suffix == ".npy" else "the manifest has no resize"
        raise FolderError(f"{path} is {found}, the model wants {wanted}, and {why}; give it in that size")
    return pixels


def _resized(rgb: Any, resize: dict[str, Any] | None) -> np.ndarray[Any, Any]:
    """A Pillow image as a manifest's `resize` has it: to a size, or its shorter side, then the middle; bilinear."""
    if resize is None:
        return np.asarray(rgb)
    height, width = resize.get("size") or (resize["shorter_side"] * side // min(rgb.size) for side in rgb.size[::-1])
    if rgb.size != (width, height):
        rgb = rgb.resize((width, height), BILINEAR)
    if "center_crop" in resize:
        rows, columns = resize["center_crop"]
        left, top = (width - columns) // 2, (height - rows) // 2
        rgb = rgb.crop((left, top, left + columns, top + rows))
    return np.asarray(rgb)
