"""What becomes one: the built-in patterns of one integer op, and the user's patterns of whole blocks.

A built-in pattern ends as one region: `fuse` grows it op by op, by the table `BUILT_IN`. A block of several integer
ops keeps a grid for every inner value, since each integer kernel needs one; a user's pattern makes it one group, which
runs in integers as a whole or stays in float as a whole, under one QConfig (`graph/groups.py`). With `replace` it is
another module before capture (`graph/replace_blocks.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from edgeqat.callables import USER_ERRORS
from edgeqat.errors import PlanError

__all__ = [
    "BUILT_IN",
    "Fusion",
    "FusionMatch",
    "FusionPattern",
    "Refusal",
    "ask",
    "bare_op",
    "built_in_after",
    "did_you_mean",
    "is_class",
    "lists_of",
    "patterns_of",
]

ModuleClass: TypeAlias = "type[nn.Module] | str"


@dataclass(frozen=True)
class Refusal:
    """Something that was not fused, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FusionMatch:
    """A place where a pattern fits, as its `check` sees it.

    Attributes:
        pattern: Name of the pattern.
        name: Dotted name of the block; of a sequence, the name of its first module or op.
        modules: The modules that compute it, by dotted name. Look, do not change.
        inputs: Shape of each tensor it reads, "batch" for a size that depends on the batch.
        outputs: Shape of each tensor that others read.
    """

    pattern: str
    name: str
    modules: Mapping[str, nn.Module]
    inputs: tuple[tuple[int | str, ...], ...]
    outputs: tuple[tuple[int | str, ...], ...]


@dataclass(frozen=True)
class FusionPattern:
    """Blocks of a model that are quantized as one, found by module class or by the sequence of their ops.

    All ops of a block run in integers, or all of them stay in float, with one reason. The block has one QConfig, that
    of its module (for a sequence, of the innermost module that holds it); a rule that names a module inside it wins
    there. Where the blocks of two patterns share an op, the pattern given first has it.

    Attributes:
        name: What plans call it.
        modules: A module class or its name: every instance is a block, subclasses included. Or a tuple of them: they
            must follow one another, each the only reader of the one before.
        ops: ATen ops as the model's own code has them, ("conv2d", "batch_norm", "silu"), which must follow one
            another in the same way. "relu|relu6" stands for either.
        check: Called with each FusionMatch. "" accepts it; any other text is the reason of a refusal, which plans
            report.
        replace: Instead of grouping, every instance of the class `modules` is replaced, in the copy of the model that
            is captured, by what this makes of it: RepVGG's branches by one conv. In eval mode it must compute what
            the instance does on the example inputs, up to 1e-4 of its largest output there; examples that are all
            zeros show little. `SimulatedModel.to_float` returns the model with the replacements in it.
    """

    name: str
    modules: ModuleClass | tuple[ModuleClass, ...] | None = None
    ops: tuple[str, ...] | None = None
    check: Callable[[FusionMatch], str] | None = None
    replace: Callable[[nn.Module], nn.Module] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise PlanError(f"FusionPattern: found the name {self.name!r}, wanted a text")
        what = f"FusionPattern {self.name!r}"
        if (self.modules is None) == (self.ops is None):
            raise PlanError(f"{what}: found {'neither' if self.ops is None else 'both'}, wanted modules or ops")
        if self.replace is not None and (self.modules is None or isinstance(self.modules, tuple)):
            raise PlanError(f"{what}: replace wants modules to be one class or its name")
        for cls in self.classes:
            if not (isinstance(cls, str) and cls) and not (isinstance(cls, type) and issubclass(cls, nn.Module)):
                raise PlanError(f"{what}: found {cls!r} among its modules, wanted an nn.Module class or its name")
        ops: Any = self.ops
        if ops is not None and not (isinstance(ops, tuple) and all(isinstance(op, str) and op for op in ops)):
            raise PlanError(f"{what}: found ops={ops!r}, wanted a tuple of ATen names such as ('conv2d', 'silu')")
        if self.modules == () or self.ops == ():
            raise PlanError(f"{what}: found an empty sequence, wanted at least one")

    @property
    def classes(self) -> tuple[ModuleClass, ...]:
        """The classes of `modules`; none for a pattern of ops."""
        if self.modules is None:
            return ()
        return self.modules if isinstance(self.modules, tuple) else (self.modules,)

    @property
    def steps(self) -> tuple[frozenset[str], ...]:
        """The names that each op of `ops` may have; none for a pattern of modules."""
        return tuple(frozenset(map(bare_op, op.split("|"))) for op in self.ops or ())


Fusion: TypeAlias = FusionPattern | Sequence[str]
"""A pattern, or a list of module names that must end up in one region."""

CONV = "conv1d|conv2d|conv3d|conv_transpose1d|conv_transpose2d|conv_transpose3d"
RELU = "relu|relu6"

BUILT_IN: tuple[FusionPattern, ...] = (
    FusionPattern("conv-bn-relu", ops=(CONV, "batch_norm", RELU)),
    FusionPattern("conv-relu", ops=(CONV, RELU)),
    FusionPattern("linear-bn-relu", ops=("linear", "batch_norm", RELU)),
    FusionPattern("linear-relu", ops=("linear", RELU)),
    FusionPattern("add-relu", ops=("add", RELU)),
    FusionPattern("mul-relu", ops=("mul", RELU)),
    FusionPattern("concat-relu", ops=("cat", RELU)),
)
"""What one integer kernel computes, which is any beginning of these. A clamp to 0 .. 6 is a relu6."""


def built_in_after(*ops: str) -> frozenset[str]:
    """The ops that one integer kernel can compute together with `ops`, right behind them.

    >>> sorted(built_in_after("linear")), sorted(built_in_after("linear", "batch_norm"))
    (['batch_norm', 'relu', 'relu6'], ['relu', 'relu6'])
    """
    found: set[str] = set()
    for steps in (pattern.steps for pattern in BUILT_IN):
        if len(steps) > len(ops) and all(op in step for op, step in zip(ops, steps, strict=False)):
            found |= steps[len(ops)]
    return frozenset(found)


def bare_op(name: str) -> str:
    """An ATen op's name without namespace, overload and the mark of an in-place op.

    >>> bare_op("aten.add_.Tensor"), bare_op("silu")
    ('add', 'silu')
    """
    return name.strip().removeprefix("aten.").split(".")[0].strip("_")


def is_class(module: nn.Module, cls: ModuleClass) -> bool:
    """Whether a module is an instance of a class, which may be given by its name."""
    if isinstance(cls, str):
        return any(base.__name__ == cls for base in type(module).__mro__)
    return isinstance(module, cls)


def patterns_of(fusions: Iterable[Fusion]) -> list[FusionPattern]:
    """The patterns among `fusions`."""
    return [fusion for fusion in fusions if isinstance(fusion, FusionPattern)]


def lists_of(fusions: Iterable[Fusion]) -> list[list[str]]:
    """The lists of module names among `fusions`.

    Raises:
        PlanError: Something is neither a pattern nor such a list.
    """
    found = []
    for fusion in fusions:
        if isinstance(fusion, FusionPattern):
            continue
        is_list = isinstance(fusion, Sequence) and not isinstance(fusion, str)
        if not is_list or not all(isinstance(name, str) for name in fusion):
            raise PlanError(f"fusions: found {fusion!r}, wanted a FusionPattern or a list of module names")
        found.append(list(fusion))
    return found


def ask(pattern: FusionPattern, match: FusionMatch) -> str:
    """What the pattern's own check says about a match.

    Raises:
        PlanError: The check fails, or returns no text.
    """
    if pattern.check is None:
        return ""
    try:
        answer = pattern.check(match)
    except USER_ERRORS as error:
        text = " ".join(str(error).split())
        raise PlanError(
            f"the check of fusion pattern {pattern.name!r} failed on {match.name}: {type(error).__name__}: {text}"
        ) from error
    if not isinstance(answer, str):
        raise PlanError(
            f"the check of fusion pattern {pattern.name!r} returned {answer!r} for {match.name}, wanted a text: "
            '"" to accept it, or the reason why not'
        )
    return answer


def did_you_mean(names: Iterable[str], known: Collection[str]) -> str:
    """A hint with the known names that are most like `names`."""
    close = [near for name in names for near in difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.5)]
    return f"did you mean {' or '.join(dict.fromkeys(close))}?" if close else f"found {', '.join(sorted(known)[:8])}"
