"""Targets that users describe themselves: a YAML file that says what a device's integer kernels take.

    name: my-npu
    activations: {symmetric: true, power_of_two: true}
    weights: {per_channel: false, power_of_two: true}
    ops: [conv, linear, add, average_pool, view]

Only `name` has no default; the others allow what ONNX Runtime does, activations of fewer than 8 bits
excepted. The path of such a file stands wherever a target's name does.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from edgeqat.errors import PlanError, RecipeError
from edgeqat.program import Kind
from edgeqat.recipe_quantize import Section
from edgeqat.strict_yaml import parse_yaml
from edgeqat.validation import explain

__all__ = ["TargetFile", "load_target_file"]

ALWAYS = frozenset({Kind.QUANTIZE, Kind.DEQUANTIZE, Kind.FLOAT})
"""Kinds that are no op of a device."""

OPS = {kind.value: kind for kind in Kind if kind not in ALWAYS}
"""What `ops` may list."""


Widths = list[Annotated[int, Field(ge=2, le=8)]]


class ActivationRules(Section):
    """Grids of activations."""

    bits: Widths = Field(default=[8], min_length=1)
    symmetric: bool = False
    power_of_two: bool = False


class WeightRules(Section):
    """Grids of weights; they are symmetric."""

    bits: Widths = Field(default=[2, 3, 4, 5, 6, 7, 8], min_length=1)
    per_channel: bool = True
    power_of_two: bool = False


class TargetFile(Section):
    """A whole file; see edgeqat.target_table.Target for what it means."""

    name: str
    note: str = "described by a file"
    activations: ActivationRules = ActivationRules()
    weights: WeightRules = WeightRules()
    ops: list[Kind] | None = None
    conv_dims: list[Annotated[int, Field(ge=1, le=3)]] = Field(default=[1, 2, 3], min_length=1)
    float_logits: bool = False
    pools_keep_grid: bool = False
    storage: Literal["uint8", "int8"] = "uint8"

    @field_validator("name")
    @classmethod
    def _fits_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError("wanted letters, digits, and . _ - within: it names a folder")
        return name

    @field_validator("ops", mode="before")
    @classmethod
    def _kinds(cls, ops: Any) -> Any:
        for op in ops if isinstance(ops, list) else ():
            if not isinstance(op, str) or op not in OPS:
                close = difflib.get_close_matches(str(op), OPS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"wanted one of {', '.join(OPS)}"
                raise ValueError(f"unknown op {op!r}; {hint}")
        return [OPS[op] for op in ops] if isinstance(ops, list) else ops


def load_target_file(path: str) -> TargetFile:
    """A user's own target.

    Raises:
        PlanError: There is no such file, it is no YAML, or a key or value does not fit (dotted path named).
    """
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
        return TargetFile.model_validate({} if data is None else data)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise PlanError(f"the target {path} cannot be read: {reason}; wanted a YAML file that describes it") from error
    except RecipeError as error:
        raise PlanError(str(error)) from error
    except ValidationError as error:
        raise PlanError(f"{path}: {explain(error, TargetFile)}") from error
