"""An image as a model takes it, by what manifest.json says, and the classes behind its outputs: the same everywhere.

Nothing but numpy, and Pillow where the image is not a .npy file (uint8 [H, W, C]). Copy it beside the script of your
runtime.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[Path, str, np.ndarray], np.ndarray]
"""(model file, engine, input of batch 1) to the scores, [1, classes]."""


def main(runtime: str, run: Run) -> None:
    """Reads the folder and the image, runs the model, and prints the best classes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="an artifact folder")
    parser.add_argument("image", type=Path, help="an image file, or a .npy file of uint8 [H, W, C]")
    options = parser.parse_args()
    manifest = json.loads((options.folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["runtime"] != runtime:
        raise SystemExit(f"{options.folder} is for {manifest['runtime']}, this script runs {runtime}")
    (entry,) = manifest["inputs"].values()
    steps = manifest["preprocessing"] or {}
    if entry["dtype"] != "uint8" and not (steps.get("mean") and steps.get("std")):
        raise SystemExit(f"{options.folder} does not say how an image becomes the model's input: no mean and std")
    pixels = read(options.image, steps.get("resize"))
    for found, wanted in zip(pixels.shape[:2], entry["shape"][2:], strict=True):
        if isinstance(wanted, int) and found != wanted:  # a name, where the model takes any size
            height, width = pixels.shape[:2]
            raise SystemExit(
                f"{options.image} is {width}x{height}, the model wants {entry['shape'][3]}x{entry['shape'][2]} "
                "and the manifest has no resize: give it in that size"
            )
    image = preprocess(pixels, steps, entry["dtype"])
    scores = run(options.folder / manifest["model"], manifest["engine"], image)[0]
    labels = steps.get("labels") or [str(number) for number in range(len(scores))]
    for best in np.argsort(-scores, kind="stable")[:3]:
        print(f"{labels[best]}\t{scores[best]:.6g}")


def read(path: Path, resize: dict | None) -> np.ndarray:
    """uint8 [H, W, C]; an image file is resized to what the model takes, a .npy file has that size already."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    from PIL import Image

    with Image.open(path) as image:
        rgb = image.convert("RGB")
        return np.asarray(rgb.resize(resize["size"][::-1], Image.Resampling.BILINEAR) if resize else rgb)


def preprocess(pixels: np.ndarray, steps: dict, dtype: str) -> np.ndarray:
    """[1, C, H, W], normalised as in training; the pixels themselves where the model normalises them."""
    if dtype == "uint8":
        real = pixels
    else:  # all in float32, in this order: then it is what training saw, to the bit
        mean, std = np.asarray(steps["mean"], np.float32), np.asarray(steps["std"], np.float32)
        real = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(real.transpose(2, 0, 1)[None])
