"""Parity: does the artifact on its real runtime compute the reference's integers, value by value?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from edgeqat.arguments import check_batches, check_made
from edgeqat.errors import DataError, InputError
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.artifact import Artifact, load_artifact
from edgeqat.measuring.value_parity import ValueParity, ValueTally
from edgeqat.per_sample import same_prediction
from edgeqat.program import QuantizedProgram
from edgeqat.signature import Batch

__all__ = ["Parity", "compare_float", "verify"]

AGREEMENT_STEPS = 255
"""Steps of the grid that says how far outputs without classes may be apart and still agree."""


@dataclass(frozen=True)
class Parity:
    """How an artifact's results compare with what they are held against.

    Attributes:
        against: "reference:onnxruntime/x86", or "simulation".
        n: Samples.
        bit_identical: Share of output elements equal to the bit.
        max_error_steps: Largest difference among the inner values that have a grid, in quantization steps.
        agreement: Share of samples with the same prediction. For scores of classes: the largest entry of the first
            output is the same (ties to the lowest index); per pixel, for outputs [N, C, H, W]. Without classes: all
            outputs are within one step of an 8-bit grid over the range of what they are held against.
        first_difference: Name of the first op, in program order, whose value differs; None if none does.
        exact_here: Whether this machine's kernels have the arithmetic compared with, so that equality is owed.
        values: Every inner value that has a grid, in program order, with its errors in steps.
        output_error: Largest difference of an output, in its own unit.
        unseen: The values that have a grid and could not be looked at: the runtime makes no integers of them, makes
            other ones when they are looked at, or keeps them inside compiled code.
    """

    against: str
    n: int
    bit_identical: float
    max_error_steps: float
    agreement: float
    first_difference: str | None
    exact_here: bool
    values: tuple[ValueParity, ...] = ()
    output_error: float = 0.0
    unseen: tuple[str, ...] = ()

    @property
    def histogram(self) -> dict[int, int]:
        """How many integers inside the network are off by how many steps, over all values."""
        total: Counter[int] = Counter()
        for value in self.values:
            total.update(value.histogram)
        return dict(sorted(total.items()))

    def __str__(self) -> str:
        """The findings in a few lines: the whole network, the first op that differs, the values that differ."""
        lines = [
            f"{100 * self.bit_identical:.4f}% of outputs bit-identical to {self.against} on {self.n} samples, largest "
            f"difference {self.output_error:.4g}, agreement {100 * self.agreement:.2f}%"
        ]
        if self.values:
            inside = ", ".join(f"{steps:+d}: {count}" for steps, count in self.histogram.items() if steps)
            lines.append(
                f"{len(self.values)} values inside: errors in steps {{{inside}}}"
                if inside
                else f"{len(self.values)} values inside: every integer equal"
            )
        if self.unseen:
            lines.append(f"not looked at, as the runtime shows no integers of them: {', '.join(self.unseen)}")
        if self.first_difference is not None:
            lines.append(f"the first op that differs is {self.first_difference}")
        lines += [
            f"  {value.name}: {100 * value.bit_identical:.4f}% identical, at most {value.max_error_steps:g} steps off"
            for value in self.values
            if value.max_error_steps > 0
        ]
        return "\n".join(lines)


class _Tally:
    """Adds up the comparison of outputs, batch by batch.

    Args:
        classes: Whether the first output holds scores of classes; outputs that cannot never do.
    """

    def __init__(self, classes: bool) -> None:
        self._classes = classes
        self._agreed: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._ranges: list[Tensor] = []
        self.n = self.equal = self.elements = 0
        self.worst = 0.0

    def add(self, found: list[Tensor], expected: list[Tensor]) -> list[int]:
        """Counts a batch; the positions of the outputs that are not equal."""
        for a, b in zip(found, expected, strict=True):
            if a.shape != b.shape:
                raise InputError(
                    f"the artifact gives an output of shape {list(a.shape)}, the program {list(b.shape)}; it was made "
                    "from another model, or its float ops compute sizes wrongly: lower it again"
                )
        unequal = [i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if not torch.equal(a, b)]
        for a, b in zip(found, expected, strict=True):
            self.equal += int((a == b).sum())
            self.elements += a.numel()
        for i in unequal:
            self.worst = max(self.worst, float((found[i].double() - expected[i].double()).abs().max()))
        self.n += len(found[0])
        if self._classes and found[0].ndim in (2, 4) and found[0].shape[1] > 1:
            self._agreed.append(same_prediction(found[0], expected[0]).double())
        else:
            pairs = [(_rows(a), _rows(b)) for a, b in zip(found, expected, strict=True)]
            self._errors.append(torch.stack([(a - b).abs().amax(1) for a, b in pairs]))
            self._ranges.append(torch.stack([torch.stack([b.min(), b.max()]) for _, b in pairs]))
        return unequal

    def shares(self) -> tuple[float, float]:
        """(bit-identical elements, agreeing samples)."""
        if self.n == 0:
            raise DataError("found no batches to verify with, wanted at least one")
        return self.equal / self.elements, self._agreement()

    def _agreement(self) -> float:
        if self._agreed:
            return float(torch.cat(self._agreed).mean())
        # The range is that of all batches, so that the figure does not depend on how samples are batched.
        ranges = torch.stack(self._ranges)
        step = (ranges[..., 1].amax(0) - ranges[..., 0].amin(0)) / AGREEMENT_STEPS
        return float((torch.cat(self._errors, 1) <= step[:, None]).all(0).double().mean())


def _rows(output: Tensor) -> Tensor:
    return output.double().reshape(len(output), -1)


def verify(
    artifact: Artifact,
    program: QuantizedProgram,
    batches: Iterable[Batch],
    check_hashes: bool = True,
    engine: str | None = None,
    classes: bool = True,
) -> Parity:
    """Runs an artifact on its runtime and compares every value that has a grid with the exact integer reference.

    The tensors inside are read from the very file that is shipped, with its inner tensors made outputs.

    Args:
        artifact: What `lower` wrote, or a folder loaded with `load_artifact`.
        program: The program it was lowered from.
        batches: Inputs only.
        check_hashes: Whether to check the files against the manifest first.
        engine: Another engine of the runtime than the artifact's own.
        classes: Whether the first output, [N, C] or [N, C, H, W] with C above 1, holds scores of classes, or something
            that has no largest entry worth comparing.

    Raises:
        InputError: It is no artifact, no program, or a single batch in place of batches.
        TamperedError: A file does not match its hash.
        DataError: There is no batch.
    """
    _check_given(artifact, program, batches, check_hashes)
    session = artifact.session(engine=engine)
    against = _arithmetic_of(artifact, engine)
    interpreter = Interpreter(program, ARITHMETICS[against])
    tally, wrong_outputs = _Tally(classes), set[str]()
    makers = {name: op.name for op in program.ops for name in op.outputs}
    seen = {str(row["value"]) for row in artifact.manifest["checks"]}
    inner = ValueTally({name: makers[name] for name in program.tapped() if name in seen})
    order = {name: i for i, name in enumerate(program.values)}
    for batch in batches:
        inputs = program.signature.flatten(batch)
        outputs, values = interpreter.run_with_taps(inputs)
        found, inside = session.run_with_taps(inputs)
        unequal = tally.add(found, pytree.tree_leaves(outputs))
        wrong_outputs.update(program.outputs[i] for i in unequal)
        inner.add(inside, {name: value for name, value in values.items() if name in seen})
    found_inside = inner.values()
    wrong = [value.name for value in found_inside if value.max_error_steps > 0]
    first = min(wrong, key=order.__getitem__, default=None)
    if first is None and wrong_outputs:
        first = str(artifact.manifest["outputs"][min(wrong_outputs, key=order.__getitem__)]["op"])
    identical, agreement = tally.shares()
    return Parity(
        against=f"reference:{against}",
        n=tally.n,
        bit_identical=identical,
        max_error_steps=max((value.max_error_steps for value in found_inside), default=0.0),
        agreement=agreement,
        first_difference=first,
        exact_here=artifact.arithmetic(engine) == against and against in artifact.manifest["arithmetics"],
        values=found_inside,
        unseen=tuple(name for name in program.tapped() if name not in seen),
        output_error=tally.worst,
    )


def _check_given(artifact: Artifact, program: QuantizedProgram, batches: Iterable[Batch], hashes: bool) -> None:
    check_made(artifact, Artifact)
    check_made(program, QuantizedProgram)
    check_batches(batches)
    if hashes:
        load_artifact(artifact.folder)


def _arithmetic_of(artifact: Artifact, engine: str | None) -> str:
    """The arithmetic to compare with: the engine's own, else the one whose kernels come nearest."""
    own = artifact.arithmetic(engine)
    known = [str(name) for name in artifact.manifest["arithmetics"]]
    return own if own is not None else (known[0] if known else "qnnpack")


def compare_float(
    artifact: Artifact, model: Callable[[Batch], Any], batches: Iterable[Batch], classes: bool = True
) -> Parity:
    """Compares a float artifact with the float model it was made from; nothing is owed to the bit there.

    `classes` is that of `verify`.
    """
    tally = _Tally(classes)
    with torch.no_grad():
        for batch in batches:
            found = artifact.session().run(artifact.flat_inputs(batch))
            tally.add(found, pytree.tree_leaves(model(batch)))
    identical, agreement = tally.shares()
    return Parity("simulation", tally.n, identical, 0.0, agreement, None, False, output_error=tally.worst)
