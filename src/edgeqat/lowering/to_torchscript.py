"""Spelling a quantized program in TorchScript, over torch's INT8 kernels: traced, frozen, saved.

Every value with a grid is a quint8 tensor; 4-d ones are kept in channels-last order, as the kernels want them, others
contiguous, which also fixes the order of memory that fbgemm's additions depend on. Weights are qint8 and packed when
the file is loaded, for the engine that is set then, so one file serves all engines; biases are float32, at the very
value that stands for the program's integers.

The saved archive is written again without debug records, which are larger than the code and hold paths of the machine,
and without the counter that torch puts into class names: the same program gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat import affine
from edgeqat.errors import EdgeqatError, PlanError
from edgeqat.lowering.engine import fastest_engine
from edgeqat.lowering.padding import padding_index
from edgeqat.lowering.spelling import Spelling, payload_bytes
from edgeqat.lowering.torchscript_island import traceable_island
from edgeqat.lowering.torchscript_lookup import Kernel, kernels_of, look_up
from edgeqat.op_attrs import (
    AveragePoolAttrs,
    ClampAttrs,
    ConcatAttrs,
    ConvAttrs,
    MaxPoolAttrs,
    PadAttrs,
    PermuteAttrs,
    ResizeAttrs,
    SliceAttrs,
    ViewAttrs,
)
from edgeqat.program import BATCH_DIM, Grid, Kind, Op, QuantizedProgram
from edgeqat.replay.kernels import EXACT_ENGINES
from edgeqat.replay.run_torchscript import on_engine, tensor_kinds
from edgeqat.target_table import TARGETS

__all__ = ["spell"]

FILE_NAME = "model.pt"
PERMANENT = (1980, 1, 1, 0, 0, 0)
"""The date of every record in the archive."""

REORDERED = frozenset(
    {
        Kind.QUANTIZE,
        Kind.VIEW,
        Kind.PERMUTE,
        Kind.PAD,
        Kind.SLICE,
        Kind.RESIZE,
        Kind.MUL,
        Kind.CONCAT,
        Kind.LOOKUP,
        Kind.CONSTANT,
    }
)
"""Kinds after which a value need not be in its order of memory; the kernels keep that order, but for conv1d."""


def spell(program: QuantizedProgram, engine: str | None) -> Spelling:
    """The TorchScript file of a program.

    Args:
        program: The program.
        engine: What it is to run on; None: see `fastest_engine`, in a file that is exact with every engine.

    Raises:
        PlanError: The program was planned without torchscript, so that torch's kernels cannot compute it, or for
            images of any size.
    """
    _check_fixed_size(program)
    exact = EXACT_ENGINES if engine is None else tuple(e for e in EXACT_ENGINES if e == engine)
    chosen = fastest_engine(program) if engine is None else engine
    quantized = any(value.grid is not None for value in program.values.values())
    if quantized:
        _check_planned(program, "torchscript" if engine is None else f"torchscript/{engine}")
    module = _Program(program, chosen, kernels_of(program, _engines_here(exact)))
    frozen = _trace(module, program, chosen)
    data = _strip(_saved(frozen))
    return Spelling(
        file_name=FILE_NAME,
        data=data,
        engine=chosen,
        arithmetics=tuple(sorted(exact, key=lambda name: name != chosen)),
        payload_bytes=payload_bytes(program),
        runtime_ops=Counter(tensor_kinds(frozen.graph)),
        taps=module.taps(),
    )


def _engines_here(engines: Sequence[str]) -> list[str]:
    """Those of the engines that this build of torch has."""
    return [engine for engine in engines if engine in torch.backends.quantized.supported_engines]


def _check_fixed_size(program: QuantizedProgram) -> None:
    for name in program.inputs:
        found = [size for size in program.values[name].shape if isinstance(size, str) and size != BATCH_DIM]
        if found:
            raise PlanError(
                f"input {name!r} has a dynamic {' and '.join(found)}, which a trace would fix: prepare without "
                "dynamic_size for torchscript, or lower to onnxruntime"
            )


def _check_planned(program: QuantizedProgram, target: str) -> None:
    rule = TARGETS[target]
    found = None
    for op in program.ops:
        if op.kind is Kind.LINEAR and program.values[op.name].grid is None:
            found = f"{op.name} gives float logits"
        elif op.kind is Kind.AVERAGE_POOL and program.grid_of(op.name) is not program.grid_of(op.inputs[0]):
            found = f"{op.name} does not keep its input's grid"
        elif isinstance(op.attrs, ConvAttrs) and len(op.attrs.stride) not in rule.conv_dims:
            found = f"{op.name} is an integer conv{len(op.attrs.stride)}d"
        elif isinstance(op.attrs, ConvAttrs) and op.weight is not None and rule.depthwise_limit is not None:
            const = program.consts[op.weight]
            assert const.data is not None
            window = const.data.shape[1] == 1 and const.data[0].numel() > 1
            if window and int(const.data.abs().max()) > rule.depthwise_limit:
                found = f"{op.name} has depthwise weights beyond +-{rule.depthwise_limit}"
    if found is not None:
        raise PlanError(f"the program was not planned for {target} ({found}); name it among the targets of prepare")


class _Program(nn.Module):
    """Runs the program op by op over quantized tensors; tracing it writes the spelling down."""

    def __init__(self, program: QuantizedProgram, engine: str, kernels: Mapping[str, Kernel]) -> None:
        super().__init__()
        self.program, self.kernels = program, kernels
        self.same = _twins(program)
        self.tap_names = [name for name in program.tapped() if name not in self.same]
        self._tap_index = {name: i for i, name in enumerate(self.tap_names)}
        # The tracer wants what it meets as attributes. torch announces that its quantized tensor types will go.
        with on_engine(engine), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for index, op in enumerate(program.ops):
                if op.weight is not None:
                    setattr(self, f"packed{index}", _pack(program, op))
                elif op.body is not None:
                    self.add_module(f"island{index}", traceable_island(op))
                elif op.kind is Kind.LOOKUP and op.name not in kernels:
                    self.register_buffer(f"table{index}", program.consts[op.name].data)
                elif op.kind is Kind.CONSTANT:
                    self.register_buffer(f"constant{index}", program.consts[op.name].data)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        env = dict(zip(self.program.inputs, inputs, strict=True))
        env |= {name: _on_grid(x, self.program.values[name].grid) for name, x in env.items()}
        for index, op in enumerate(self.program.ops):
            if op.name in self.same:
                env[op.name] = env[self.same[op.name]]
                continue
            results = self._step(index, op, [env[name] for name in op.inputs])
            for name, result in zip(op.outputs, results, strict=True):
                env[name] = result
                if name in self._tap_index and torch._C._get_tracing_state() is not None:
                    # torch keeps a named value through freezing and saving: this is how verify finds it.
                    value = torch._C._get_value_trace(result)  # type: ignore[attr-defined]
                    value.setDebugName(f"v{self._tap_index[name]}")
        return tuple(env[name] for name in self.program.outputs)

    def taps(self) -> bytes:
        """A line for each named value: the names it has in the program, separated by tabs."""
        twins: dict[str, list[str]] = {name: [name] for name in self.tap_names}
        for twin, name in self.same.items():
            twins[name].append(twin)
        return "\n".join("\t".join(names) for names in twins.values()).encode()

    def _step(self, index: int, op: Op, args: list[Tensor]) -> tuple[Tensor, ...]:
        if op.kind is Kind.FLOAT:
            results: tuple[Tensor, ...] = self.get_submodule(f"island{index}")(*args)
            return results
        if op.kind is Kind.DEQUANTIZE:
            return (args[0].dequantize(),)
        result = self._integer(index, op, args)
        return (_in_order(op, result),)

    def _integer(self, index: int, op: Op, args: list[Tensor]) -> Tensor:
        grid = self.program.grid_of(op.name).per_tensor()
        result: Tensor
        if op.kind is Kind.QUANTIZE:
            result = torch.quantize_per_tensor(args[0], *grid, torch.quint8)
        elif op.kind is Kind.CONV:
            x = _pad_unevenly(args[0], op.attrs)
            convolve = torch.ops.quantized.conv1d if x.dim() == 3 else torch.ops.quantized.conv2d
            result = convolve(x, getattr(self, f"packed{index}"), *grid)
        elif op.kind is Kind.LINEAR:
            result = torch.ops.quantized.linear(args[0], getattr(self, f"packed{index}"), *grid)
        elif op.kind is Kind.ADD:
            result = torch.ops.quantized.add(args[0], args[1], *grid)
        elif op.kind is Kind.MUL:
            result = torch.ops.quantized.mul(args[0], args[1], *grid)
        elif isinstance(op.attrs, ConcatAttrs):
            result = torch.ops.quantized.cat(args, op.attrs.dim, *grid)
        elif op.kind is Kind.LOOKUP:
            kernel = self.kernels.get(op.name)
            result = look_up(getattr(self, f"table{index}"), args[0], *grid) if kernel is None else kernel(args[0])
        elif op.kind is Kind.CONSTANT:
            result = torch._make_per_tensor_quantized_tensor(getattr(self, f"constant{index}"), *grid)
        else:
            result = _move(op, args[0])
        return result


def _on_grid(x: Tensor, grid: Grid | None) -> Tensor:
    """An input as the ops take it: pixels as a quantized tensor, in the order of memory of one."""
    if grid is None:
        return x
    quantized: Tensor = torch._make_per_tensor_quantized_tensor(x, *grid.per_tensor())
    return quantized.contiguous(memory_format=torch.channels_last)


def _twins(program: QuantizedProgram) -> dict[str, str]:
    """Values that are computed twice, such as two equal views of one tensor, with the first value that equals them.

    torch computes them once when it freezes a module, and only one name would be left.
    """
    same: dict[str, str] = {}
    first: dict[Any, str] = {}
    for op in program.ops:
        if op.kind in (Kind.FLOAT, Kind.DEQUANTIZE) or op.weight is not None:
            continue
        inputs = tuple(same.get(name, name) for name in op.inputs)
        key = (op.kind, inputs, op.attrs, program.grid_of(op.name).per_tensor())
        if first.setdefault(key, op.name) != op.name:
            same[op.name] = first[key]
    return same


def _pack(program: QuantizedProgram, op: Op) -> Any:
    """Weight and bias as torch's kernels take them."""
    assert op.weight is not None
    const = program.consts[op.weight]
    assert const.data is not None
    weight_scale, _ = const.grid.filled()
    input_scale, _ = program.grid_of(op.inputs[0]).filled()
    if const.grid.axis is None:
        weight = torch._make_per_tensor_quantized_tensor(const.data, float(weight_scale), 0)
    else:
        zeros = torch.zeros(len(weight_scale), dtype=torch.int64)
        weight = torch._make_per_channel_quantized_tensor(const.data, weight_scale.double(), zeros, const.grid.axis)
    bias = None if op.bias is None else affine.float_bias(op.bias, input_scale, weight_scale)
    if not isinstance(op.attrs, ConvAttrs):
        return torch.ops.quantized.linear_prepack(weight, bias)
    a = op.attrs
    padding = [0 if _is_uneven(a) else before for before, _ in a.padding]
    prepack = torch.ops.quantized.conv1d_prepack if len(a.stride) == 1 else torch.ops.quantized.conv2d_prepack
    return prepack(weight, bias, list(a.stride), padding, list(a.dilation), a.groups)


def _in_order(op: Op, result: Tensor) -> Tensor:
    """A value in the order of memory that `Fbgemm.add` and its like take for granted."""
    if result.dim() == 4 and op.kind in REORDERED:
        return result.contiguous(memory_format=torch.channels_last)
    if result.dim() in (3, 5) and (op.kind in REORDERED or op.kind is Kind.CONV):  # conv1d leaves its channels last
        return result.contiguous()
    return result


def _is_uneven(attrs: ConvAttrs) -> bool:
    return any(before != after for before, after in attrs.padding)


def _pad_unevenly(x: Tensor, attrs: Any) -> Tensor:
    if not isinstance(attrs, ConvAttrs) or not _is_uneven(attrs):
        return x
    return F.pad(x, [side for pair in reversed(attrs.padding) for side in pair])  # with the real zero


def _move(op: Op, x: Tensor) -> Tensor:
    """Pools and what only moves integers; all keep their input's grid."""
    a = op.attrs
    if isinstance(a, AveragePoolAttrs):
        if a.kernel is None:
            return F.adaptive_avg_pool2d(x, 1)
        return F.avg_pool2d(x, a.kernel, a.stride, a.padding, count_include_pad=a.count_include_pad)
    if isinstance(a, MaxPoolAttrs):
        return F.max_pool2d(x, a.kernel, a.stride, a.padding, a.dilation, a.ceil_mode)
    if isinstance(a, ViewAttrs):
        return x.reshape(a.shape)
    if isinstance(a, PermuteAttrs):
        return x.permute(a.dims)
    if isinstance(a, ClampAttrs):
        return torch.relu(x)
    if isinstance(a, ResizeAttrs):
        return _resize(x, a)
    if isinstance(a, PadAttrs) and a.mode != "constant":
        return _pad_with_itself(x, a)
    if isinstance(a, PadAttrs):
        return F.pad(x, [side for pair in reversed(a.padding) for side in pair])  # with the real zero
    if isinstance(a, SliceAttrs):
        index = [slice(None)] * x.dim()
        index[a.dim] = slice(a.start, a.stop, a.step)
        return x[tuple(index)]
    raise EdgeqatError(f"{op.name}: no TorchScript spelling for kind {op.kind.value}")


def _resize(x: Tensor, attrs: ResizeAttrs) -> Tensor:
    """Repeated elements, a dimension at a time by their indexes: upsampling has no quantized form for every rank."""
    for dim, factor in enumerate(attrs.factors, 2):
        x = x.index_select(dim, torch.arange(x.shape[dim] * factor) // factor)
    return x


def _pad_with_itself(x: Tensor, attrs: PadAttrs) -> Tensor:
    """Padding with elements of the tensor, each dimension by their indexes: F.pad has no quantized form of it."""
    for dim, (before, after) in enumerate(attrs.padding):
        if before or after:
            x = x.index_select(dim, padding_index(attrs.mode, x.shape[dim], before, after))
    return x


def _trace(module: _Program, program: QuantizedProgram, engine: str) -> Any:
    examples = []
    for name in program.inputs:
        value = program.values[name]
        shape = [2 if size == BATCH_DIM else int(size) for size in value.shape]
        examples.append(torch.zeros(shape, dtype=value.dtype))
    # The tracer warns of every Python number it sees; all of them are attributes of the program. And torch announces
    # that TorchScript will go.
    with warnings.catch_warnings(), on_engine(engine), torch.no_grad():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module.eval(), tuple(examples), check_trace=False)  # type: ignore[no-untyped-call]
        return torch.jit.freeze(traced)


def _saved(module: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(module, buffer)
    return buffer.getvalue()


def _strip(archive: bytes) -> bytes:
    """The archive without debug records, identity, dates, and torch's counter in class names."""
    source, target = zipfile.ZipFile(io.BytesIO(archive)), io.BytesIO()

    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for entry in source.infolist():
            _, _, name = entry.filename.partition("/")
            if name.endswith(".debug_pkl") or name == ".data/serialization_id":
                continue
            raw = source.read(entry)
            if name.endswith((".py", ".pkl")):
                raw = re.sub(rb"\.___torch_mangle_\d+", b"", raw)
                name = re.sub(r"/___torch_mangle_\d+", "", name)
            copy.writestr(zipfile.ZipInfo(f"model/{name}", PERMANENT), raw)
    return target.getvalue()
