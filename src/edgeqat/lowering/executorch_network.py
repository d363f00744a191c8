"""A program as torch.export takes it for ExecuTorch: calls of XNNPACK graphs, float islands, tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering.executorch_file import delegate_module
from edgeqat.lowering.executorch_parts import Delegate, Part, cut, spell_part
from edgeqat.lowering.float_shortcut import with_shortcut_convs
from edgeqat.lowering.xnnpack_graph import SHIFT, Located
from edgeqat.program import BATCH_DIM, Kind, QuantizedProgram

__all__ = ["Network"]


class Network(nn.Module):
    """The program as torch.export takes it: calls of XNNPACK graphs, float islands, tables."""

    def __init__(self, program: QuantizedProgram, tapped: Sequence[str], nodes: frozenset[str]) -> None:
        super().__init__()
        self.program, self.tapped = program, list(tapped)
        self.parts = cut(program, nodes)
        self.delegates: list[Delegate] = []
        self.steps: list[tuple[Part, Delegate | None, str]] = []
        self.has_floats = any(op.kind is Kind.FLOAT for op in program.ops)
        self.shapes = _shapes(program)
        self.located = {name: self._as_is(name) for name in program.inputs}
        for i, part in enumerate(self.parts):
            self._add(i, part)
        self.extra = list(dict.fromkeys(self._twin(name) for name in self.tapped))

    def _add(self, i: int, part: Part) -> None:
        name = f"part{i}"
        if part.inside:
            made = [output for op in part.ops for output in op.outputs]
            later = {name for other in self.parts[i + 1 :] for op in other.ops for name in op.inputs}
            wanted = [v for v in made if v in later or v in self.program.outputs or v in self.tapped]
            delegate = spell_part(self.program, part, self.located, wanted)
            self.delegates.append(delegate)
            self.located.update(delegate.located)
            self.steps.append((part, delegate, name))
            inputs = [self.located[read] for read in delegate.inputs]
            self.add_module(name, delegate_module(delegate.data, delegate.constants, inputs, delegate.outputs))
            return
        (op,) = part.ops
        if op.body is not None:
            self.add_module(name, with_shortcut_convs(op.body))
            self.located.update({output: self._as_is(output) for output in op.outputs})
        else:
            data = self.program.consts[op.name].data
            assert data is not None
            self.register_buffer(name, (data.to(torch.int16) - SHIFT).to(torch.int8))
            source = self.located[op.inputs[0]]
            grid = self.program.grid_of(op.name)
            self.located[op.name] = Located(source.id, source.shape, source.order, grid)
        self.steps.append((part, None, name))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        env = dict(zip(self.program.inputs, inputs, strict=True))
        for name in [name for name in env if self.program.values[name].grid is not None]:  # pixels
            env[name] = (env[name].to(torch.int16) - SHIFT).to(torch.int8)
        for part, delegate, name in self.steps:
            if delegate is not None:
                if not delegate.outputs:
                    continue
                results = self.get_submodule(name)(*(env[read].contiguous() for read in delegate.inputs))
                for names, result in zip(delegate.names, results, strict=True):
                    env.update(dict.fromkeys(names, result))
                continue
            (op,) = part.ops
            args = [env[read] for read in op.inputs]
            if op.body is not None:
                env.update(zip(op.outputs, (x.contiguous() for x in self.get_submodule(name)(*args)), strict=True))
            else:
                index = (args[0].to(torch.int32) + SHIFT).reshape(-1)
                env[op.name] = torch.index_select(getattr(self, name), 0, index).reshape(args[0].shape)
        return tuple(env[name] for name in (*self.program.outputs, *self.extra))

    def tap_at(self, name: str) -> tuple[int, Located]:
        """Which output a tapped value is, and how it lies."""
        return len(self.program.outputs) + self.extra.index(self._twin(name)), self.located[name]

    def _twin(self, name: str) -> str:
        """The first value that is the same tensor."""
        groups = (names for delegate in self.delegates for names in delegate.names)
        return next((names[0] for names in groups if name in names), name)

    def _as_is(self, name: str) -> Located:
        """A value that no XNNPACK graph made."""
        shape = self.shapes[name]
        return Located(-1, shape, tuple(range(len(shape))), self.program.values[name].grid)

    def examples(self) -> tuple[Tensor, ...]:
        """Inputs of a batch of 2, which torch.export does not take for a constant."""
        values = [self.program.values[name] for name in self.program.inputs]
        sizes = [[2 if size == BATCH_DIM else int(size) for size in value.shape] for value in values]
        return tuple(torch.zeros(size, dtype=value.dtype) for size, value in zip(sizes, values, strict=True))


def _shapes(program: QuantizedProgram) -> dict[str, tuple[int, ...]]:
    """The sizes of every value for one sample: the program does not say how many times the batch one is."""
    interpreter, env = Interpreter(program, ARITHMETICS["xnnpack"]), {}
    for name in program.inputs:
        value = program.values[name]
        env[name] = torch.zeros([1 if isinstance(size, str) else size for size in value.shape], dtype=value.dtype)
    for op in program.ops:
        env.update(zip(op.outputs, interpreter.run_op(op, [env[name] for name in op.inputs]), strict=True))
    return {name: tuple(tensor.shape) for name, tensor in env.items()}
