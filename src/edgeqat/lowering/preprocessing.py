"""What a manifest may say of a model's preprocessing, checked before it is written: a device would find out last."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from edgeqat.errors import InputError
from edgeqat.program import QuantizedProgram

__all__ = ["check_preprocessing", "classes_of"]

STEPS = ("input", "mean", "std", "layout", "resize", "in_the_model")
KEYS = (*STEPS, "inputs", "labels")


def check_preprocessing(program: QuantizedProgram, preprocessing: Mapping[str, Any] | None) -> None:
    """Refuses a preprocessing that a device could not do, or that would be done twice.

    Args:
        program: What is lowered.
        preprocessing: `mean` and `std`: a figure a channel. `resize`: {"size": [height, width]}, or {"shorter_side":
            pixels, "center_crop": [height, width]}. `layout`: "NCHW". `labels`: the classes' names. `input`: what it
            is, in words. A model of several inputs has `inputs`, by name, each with its own; `labels` stands beside.

    Raises:
        InputError: A key is unknown, or what it says does not fit the program.
    """
    if preprocessing is None:
        return
    _check_keys("preprocessing", preprocessing, KEYS)
    _check_labels(program, preprocessing.get("labels"))
    each = preprocessing.get("inputs")
    if each is None:
        for name in program.inputs:
            _check_steps(program, "preprocessing", name, preprocessing)
        return
    if not isinstance(each, Mapping):
        raise InputError(f"preprocessing: found inputs {each!r:.60}, wanted a dict of each input's steps, by its name")
    for name, steps in each.items():
        where = f"preprocessing: inputs: {name}"
        _check_keys(where, steps, STEPS)
        _check_steps(program, where, name, steps)


def classes_of(program: QuantizedProgram) -> int | None:
    """How many classes the only output scores, [N, C] or [N, C, H, W]; None where it is something else."""
    shape = program.values[program.outputs[0]].shape
    classes = shape[1] if len(program.outputs) == 1 and len(shape) in (2, 4) else 1
    return classes if isinstance(classes, int) and classes > 1 else None


def _check_keys(where: str, found: Any, known: Sequence[str]) -> None:
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: found {found!r:.60}, wanted a dict with any of {', '.join(known)}")
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"wanted any of {', '.join(known)}"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")


def _check_labels(program: QuantizedProgram, labels: Any) -> None:
    if labels is None:
        return
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) for label in labels):
        raise InputError(f"preprocessing: found labels {labels!r:.60}, wanted a list of class names")
    classes = classes_of(program)
    if classes is not None and len(labels) != classes:
        raise InputError(
            f"preprocessing: found {len(labels)} labels, and the model has {classes} outputs; wanted a name for each"
        )


def _check_steps(program: QuantizedProgram, where: str, name: str, steps: Mapping[str, Any]) -> None:
    """Checks what is said of the input `name`; one that the program does not know has no shape to compare with."""
    value = program.values[name] if name in program.inputs else None
    if value is not None and value.dtype == torch.uint8 and (steps.get("mean") or steps.get("std")):
        raise InputError(
            f"found a mean or std in the preprocessing of {name!r}, which takes pixels: the model normalises "
            "them; leave both out"
        )
    shape = value.shape if value is not None and len(value.shape) == 4 else (None,) * 4
    _check_figures(where, steps, shape[1])
    if steps.get("layout") not in (None, "NCHW"):
        raise InputError(f"{where}: found the layout {steps['layout']!r}, wanted 'NCHW', as the model takes images")
    if steps.get("resize") is not None:
        _check_resize(where, steps["resize"], shape[2:])


def _check_figures(where: str, steps: Mapping[str, Any], channels: int | str | None) -> None:
    given = {key: steps[key] for key in ("mean", "std") if steps.get(key) is not None}
    for key, figures in given.items():
        if not isinstance(figures, (list, tuple)) or not all(map(_is_number, figures)):
            raise InputError(f"{where}: found {key} {figures!r:.60}, wanted a list of numbers, one a channel")
        if isinstance(channels, int) and len(figures) != channels:
            raise InputError(f"{where}: {key} has {len(figures)} figures, and the input {channels} channels")
    if len(given) == 1:
        raise InputError(f"{where}: found {next(iter(given))} alone, wanted mean and std: (pixel / 255 - mean) / std")
    if min(given.get("std", (1.0,)), default=1.0) <= 0:
        raise InputError(f"{where}: found std {list(given['std'])}, wanted figures above 0")


def _is_number(found: Any) -> bool:
    return isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)


def _is_side(found: Any) -> bool:
    return type(found) is int and found > 0


def _check_resize(where: str, resize: Any, wanted: Sequence[int | str | None]) -> None:
    cropped = isinstance(resize, Mapping) and "center_crop" in resize
    size = resize.get("center_crop" if cropped else "size") if isinstance(resize, Mapping) else None
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(map(_is_side, size)):
        ways = '{"size": [height, width]}, or {"shorter_side": pixels, "center_crop": [height, width]}'
        raise InputError(f"{where}: found resize {resize!r:.60}, wanted {ways}")
    _check_keys(
        f"{where}: resize", resize, ("shorter_side", "center_crop", "method") if cropped else ("size", "method")
    )
    if cropped and not (_is_side(resize.get("shorter_side")) and resize["shorter_side"] >= max(size)):
        shorter = resize.get("shorter_side")
        raise InputError(f"{where}: found shorter_side {shorter!r:.60}, wanted pixels, {max(size)} or more")
    if resize.get("method", "bilinear") != "bilinear":
        raise InputError(f"{where}: found the resize method {resize['method']!r}, wanted 'bilinear'")
    if any(isinstance(side, int) and side != n for n, side in zip(size, wanted, strict=True)):
        raise InputError(f"{where}: resize makes images of {list(size)}, and the model takes {list(wanted)}")
