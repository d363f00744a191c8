"""Making an ExecuTorch file of a module, parts of which are XNNPACK graphs already."""

from __future__ import annotations

import logging
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from edgeqat.lowering.xnnpack_graph import Located

__all__ = ["MAX_BATCH", "delegate_module", "file_of", "silent"]

BACKEND = "XnnpackBackend"

MAX_BATCH = 8
"""The largest batch that one call takes: memory between the parts of a file is set aside for it. It costs no time."""


def file_of(module: nn.Module, examples: tuple[Tensor, ...], has_floats: bool) -> tuple[bytes, dict[str, int]]:
    """A module's file, and how often each call occurs in it.

    Args:
        module: Takes tensors with the batch in front, gives a tuple of such.
        examples: Contiguous inputs of a batch of 2, which torch.export does not take for a constant.
        has_floats: Whether there are float ops, of which XNNPACK is to take what it can.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    exported = torch.export.export(module.eval(), examples, dynamic_shapes=_dynamic([1] * len(examples)))
    config = EdgeCompileConfig(_check_ir_validity=False)
    if has_floats:
        edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()], compile_config=config)
    else:
        edge = to_edge(exported, compile_config=config)
    calls = [node.target for node in edge.exported_program().graph.nodes if node.op == "call_function"]
    found = Counter(str(getattr(call, "__name__", call)) for call in calls if call is not operator.getitem)
    planning = MemoryPlanningPass(alloc_graph_input=False)
    program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    return bytes(program.buffer), dict(found)


def delegate_module(data: bytes, constants: Any, inputs: Sequence[Located], outputs: Sequence[Located]) -> nn.Module:
    """A serialized XNNPACK graph as a module that torch.export takes.

    Args:
        data: The graph.
        constants: What it reads by name.
        inputs: What it takes; at least one.
        outputs: What it gives.
    """
    from executorch.exir.lowered_backend_module import LoweredBackendModule

    examples = tuple(
        torch.zeros((2 * found.sizes[0], *found.sizes[1:]), dtype=torch.float32 if found.grid is None else torch.int8)
        for found in inputs
    )
    sizes = torch.export.export(
        _Sizes(inputs, outputs), examples, dynamic_shapes=_dynamic([found.sizes[0] for found in inputs])
    )
    module: nn.Module = LoweredBackendModule(sizes, BACKEND, data, [], constants)
    return module


class _Sizes(nn.Module):
    """What a delegate's inputs and outputs look like: torch.export computes sizes with it, nothing else."""

    def __init__(self, inputs: Sequence[Located], outputs: Sequence[Located]) -> None:
        super().__init__()
        self.first = inputs[0].sizes[0]
        self.outputs = [(found.sizes, found.grid is None) for found in outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        batch = inputs[0].shape[0] // self.first if self.first != 1 else inputs[0].shape[0]
        return tuple(
            torch.zeros((batch * sizes[0], *sizes[1:]), dtype=torch.float32 if is_float else torch.int8)
            for sizes, is_float in self.outputs
        )


def _dynamic(multiples: Sequence[int]) -> Any:
    """The first sizes of the inputs: so many times the batch."""
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return (tuple({0: batch if n == 1 else n * batch} for n in multiples),)


@contextmanager
def silent() -> Iterator[None]:
    """Within it, torch and ExecuTorch announce nothing: neither what will go, nor what they did not find."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
