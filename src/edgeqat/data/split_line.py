"""How a source was split, in words."""

from __future__ import annotations

from edgeqat.data.dataset import Dataset

__all__ = ["split_line", "split_warning"]


def split_line(data: Dataset) -> str:
    """`800 images, 4 classes: 64 train, 64 validation, 512 calibration, 160 test`."""
    parts = {name: len(getattr(data, name)) for name in ("train", "validation", "calibration", "test")}
    what = "images" if data.test.image_inputs else "samples"
    classes = f", {len(data.labels)} classes" if data.labels is not None else ""
    told = ", ".join(f"{n} {name}" for name, n in parts.items() if n)
    return f"{sum(parts.values())} {what}{classes}: {told}"


def split_warning(data: Dataset) -> str | None:
    """What is wrong with the split where training gets the smaller part of its samples; None where it is not."""
    calibration, train = len(data.calibration), len(data.train)
    if calibration <= train:
        return None
    return (
        f"{calibration} samples calibrate and {train} are left to train on; calibration samples are not trained on: "
        "lower data.calibration_n"
    )
