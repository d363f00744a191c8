"""What a stage is given, checked before it is used: what an earlier stage made, and batches."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from edgeqat.errors import InputError
from edgeqat.signature import Batch

__all__ = ["check_batches", "check_made", "named", "pair_of"]

MADE_BY: Mapping[str, str] = MappingProxyType(
    {
        "SimulatedModel": "edgeqat.prepare(model, example_inputs)",
        "QuantizedProgram": "edgeqat.convert(sim)",
        "Artifact": "edgeqat.lower(program, runtime, folder) or edgeqat.load_artifact(folder)",
    }
)
"""By class: what returns one."""

INPUTS, PAIRS = "inputs", "(inputs, targets)"
"""What batches may be wanted of."""


def check_made(found: object, kind: type) -> None:
    """Raises InputError unless something is of the class that an earlier stage returns; that stage is named."""
    if not isinstance(found, kind):
        raise InputError(f"found {named(found)}, wanted what {MADE_BY[kind.__name__]} returns")


def check_batches(batches: object, wanted: str = INPUTS) -> None:
    """Raises InputError where a batch stands for the batches; `wanted` is what a batch holds, INPUTS or PAIRS.

    A tensor would be taken apart along its batch.
    """
    if isinstance(batches, Mapping) or hasattr(batches, "shape") or not _can_be_read(batches):
        way = "[tensor]" if wanted == INPUTS and isinstance(batches, Tensor) else f"[{wanted}]"
        raise InputError(f"batches is {named(batches)}, wanted a list or DataLoader of {wanted}; pass {way}")


def _can_be_read(found: object) -> bool:
    return (hasattr(found, "__iter__") or hasattr(found, "__getitem__")) and not isinstance(found, (str, Path))


def pair_of(batch: Any) -> tuple[Batch, Any]:
    """The inputs and the targets of a batch.

    Raises:
        InputError: It is no pair of them.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        found = f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else named(batch)
        raise InputError(f"found a batch that is {found}, wanted {PAIRS}; give each batch its targets")
    return batch[0], batch[1]


def named(found: object) -> str:
    """Something as messages show it: `a Tensor [2, 3]`, `'runs/my'`, `the class Net`, `an Artifact`."""
    if isinstance(found, (str, Path)):
        return repr(str(found))
    if isinstance(found, type):
        return f"the class {found.__name__}"
    kind = "tensor" if type(found) is Tensor else type(found).__name__
    shape = getattr(found, "shape", None)
    sizes = f" {list(shape)}" if isinstance(shape, tuple) else ""
    return f"{'an' if kind[0] in 'AEIOaeiou' else 'a'} {kind}{sizes}"
