"""Spelling a quantized program for OpenVINO: the ONNX file of `to_onnx`, which OpenVINO reads as it is.

Its CPU plugin makes the same integer kernels of it as of its own format, whose XML part alone is larger than this
whole file for ResNet-20. What is special is what can be looked at: an inner tensor that becomes an output has one
reader more, and whether the plugin fuses an addition depends on the readers. So inner values are looked at in groups,
each in a model that ends with them, and only where every addition before them is computed as in the model itself.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from edgeqat.errors import MissingRuntimeError
from edgeqat.interpreter.sum_forms import SumForm, sum_forms
from edgeqat.lowering.own_target import check_follows
from edgeqat.lowering.spelling import Spelling
from edgeqat.lowering.to_onnx import payload_bytes, spell_model
from edgeqat.op_attrs import Attrs, AveragePoolAttrs, MaxPoolAttrs, PadAttrs, ViewAttrs
from edgeqat.program import Kind, Op, QuantizedProgram
from edgeqat.replay.run_openvino import compile_openvino
from edgeqat.target_table import TARGETS

__all__ = ["spell", "visible_groups"]

ENGINE = "CPU"

FUSING = frozenset({Kind.CONV, Kind.ADD})
"""Kinds whose kernels take in a dequantization of their result."""

BATCH = 2
"""Of the model whose layers are counted."""


def spell(program: QuantizedProgram, engine: str | None) -> Spelling:
    """The ONNX file of a program; `engine` is of no meaning here.

    Raises:
        MissingRuntimeError: openvino or onnx is not installed.
        PlanError: The program holds an integer op that OpenVINO computes otherwise.
    """
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        raise MissingRuntimeError("openvino", "openvino", str(error)) from error
    check_follows(program, TARGETS["openvino"])
    model = spell_model(with_spacers(program), kernels=False)
    data: bytes = model.SerializeToString(deterministic=True)
    groups = visible_groups(program)
    return Spelling(
        file_name="model.onnx",
        data=data,
        engine=ENGINE,
        arithmetics=("openvino/x86",),
        payload_bytes=payload_bytes(model),
        runtime_ops=_layers(program, data),
        taps="\n".join("\t".join(names) for names in groups).encode(),
        unseen=frozenset(program.tapped()) - {name for names in groups for name in names},
    )


def with_spacers(program: QuantizedProgram) -> QuantizedProgram:
    """The same program, with ops that compute nothing where OpenVINO would compute something else.

    An average pool counts what it pads with as integer 0, not as the zero point, so that padding is an op of its own.
    A convolution or an addition takes the dequantization of its result in and multiplies with other scales; a max
    pool of one element keeps the two apart.
    """
    writer = _Inserter(program)
    makers = {name: op for op in program.ops for name in op.outputs}
    uses = Counter(name for op in program.ops for name in op.inputs)
    for op in program.ops:
        a = op.attrs
        if isinstance(a, AveragePoolAttrs) and a.kernel is not None and any(a.padding) and a.count_include_pad:
            sides = ((0, 0), (0, 0), *((side, side) for side in a.padding))
            padded = writer.insert(op, op.inputs[0], "padded", Kind.PAD, PadAttrs(sides), writer.padded(op, sides))
            op = replace(op, inputs=(padded,), attrs=replace(a, padding=(0, 0)))
        elif op.kind is Kind.DEQUANTIZE and uses[op.inputs[0]] == 1 and makers[op.inputs[0]].kind in FUSING:
            op = replace(op, inputs=(writer.apart(op),))
        writer.ops.append(op)
    return replace(program, ops=tuple(writer.ops), values=writer.values)


class _Inserter:
    """Puts ops that move integers between those of a program."""

    def __init__(self, program: QuantizedProgram) -> None:
        self.values, self.ops = dict(program.values), list[Op]()

    def insert(self, op: Op, source: str, what: str, kind: Kind, attrs: Attrs, shape: tuple[int | str, ...]) -> str:
        """Adds an op in front of another; the name of its value."""
        name = f"{op.name}:{what}"
        self.values[name] = replace(self.values[source], name=name, shape=shape)
        self.ops.append(Op(kind, (source,), (name,), attrs))
        return name

    def padded(self, op: Op, sides: tuple[tuple[int, int], ...]) -> tuple[int | str, ...]:
        """The shape of an op's input with padding on every side."""
        shape = self.values[op.inputs[0]].shape
        return tuple(s if isinstance(s, str) else s + sum(pair) for s, pair in zip(shape, sides, strict=True))

    def apart(self, op: Op) -> str:
        """The value that an op reads, behind a max pool of one element."""
        source, shape = op.inputs[0], self.values[op.inputs[0]].shape
        if len(shape) > 2:
            ones, zeros = (1,) * (len(shape) - 2), (0,) * (len(shape) - 2)
            return self.insert(op, source, "apart", Kind.MAX_POOL, MaxPoolAttrs(ones, ones, zeros, ones), shape)
        channels = int(shape[1])
        image = self.insert(op, source, "image", Kind.VIEW, ViewAttrs((-1, channels, 1, 1)), (*shape, 1, 1))
        pool = MaxPoolAttrs((1, 1), (1, 1), (0, 0), (1, 1))
        apart = self.insert(op, image, "pooled", Kind.MAX_POOL, pool, (*shape, 1, 1))
        return self.insert(op, apart, "apart", Kind.VIEW, ViewAttrs((-1, channels)), shape)


def _layers(program: QuantizedProgram, data: bytes) -> dict[str, int]:
    """How often each layer occurs in the compiled model."""
    from edgeqat.lowering.openvino_session import layer_types

    examples = []
    for name in program.inputs:
        value = program.values[name]
        shape = [size if isinstance(size, int) else BATCH for size in value.shape]
        examples.append(np.zeros(shape, str(value.dtype).removeprefix("torch.")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        return layer_types(compile_openvino(path, ENGINE, 1, examples))


def visible_groups(program: QuantizedProgram) -> list[list[str]]:
    """The values that can be looked at, those in one group at once.

    What an addition reads is looked at alone, everything else together.
    """
    forms = sum_forms(program)
    summed = {form.conv for form in forms.values()}
    added = {name for op in program.ops if op.kind is Kind.ADD for name in op.inputs}
    names = [name for name in program.tapped() if name not in summed]
    together = [name for name in names if name not in added]
    if together and not _keeps_forms(program, forms, together):
        return [[name] for name in names if _keeps_forms(program, forms, [name])]
    alone = [[name] for name in names if name in added and _keeps_forms(program, forms, [name])]
    return [group for group in (together, *alone) if group]


def _keeps_forms(program: QuantizedProgram, forms: dict[str, SumForm], ends: Sequence[str]) -> bool:
    """Whether a model that ends with these values computes every addition as the program does."""
    needed = set(ends)
    ops = []
    for op in reversed(program.ops):
        if needed.intersection(op.outputs):
            needed.update(op.inputs)
            ops.append(op)
    shorter = replace(program, ops=tuple(reversed(ops)), outputs=tuple(ends))
    found = sum_forms(shorter)
    return all(_key(form) == _key(forms[name]) for name, form in found.items())


def _key(form: SumForm) -> tuple[object, ...]:
    return form.scaled, form.requantized, form.apart, form.conv, form.merged
