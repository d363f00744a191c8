"""Running TorchScript files; the engine is a global of the process."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from edgeqat.replay.folder import FolderError, reason_of
from edgeqat.replay.runner import Call


def run(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    import torch

    module = load_torchscript(path, engine)
    inputs = tuple(torch.from_numpy(array.copy()) for array in feed.values())
    threads = torch.get_num_threads()
    try:
        with on_engine(engine), torch.no_grad():
            torch.set_num_threads(1)
            found = [tensor.numpy() for tensor in module(*inputs)]
            values = tapped_torchscript(module, taps.decode().split("\n"), inputs) if taps else {}
    except RuntimeError as error:
        raise FolderError(f"torch refuses the model: {reason_of(error)}") from error
    finally:
        torch.set_num_threads(threads)
    return dict(zip(outputs, found, strict=True)), {name: value.numpy() for name, value in values.items()}


def start(engine: str, threads: int) -> Callable[[Path, dict[str, Any]], Call]:
    """Imports torch, sets its engine and threads; returns what makes a call of a model file and its inputs."""
    import torch

    torch.set_num_threads(threads)
    torch.backends.quantized.engine = engine

    def load(model: Path, feed: dict[str, Any]) -> Call:
        module = load_torchscript(model, engine)
        inputs = [torch.from_numpy(array) for array in feed.values()]

        def call() -> object:
            with torch.inference_mode():
                return module(*inputs)

        return call

    return load


def load_torchscript(path: Path, engine: str) -> Any:
    """A TorchScript file, its weights packed for an engine.

    Raises:
        FolderError: torch has no such engine, or cannot read the file.
    """
    import torch

    if engine not in torch.backends.quantized.supported_engines:
        supported = ", ".join(torch.backends.quantized.supported_engines)
        raise FolderError(f"torch here has no engine {engine!r}, wanted one of {supported}")
    try:
        # torch announces that TorchScript and its quantized tensors will go; who runs this file has chosen them.
        with on_engine(engine), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The second announcement comes once, with the first quantized tensor, and from inside a model it could
            # not be kept off standard error.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise FolderError(
            f"{path} cannot be read as TorchScript ({reason_of(error)}); fetch the artifact again"
        ) from error


@contextlib.contextmanager
def on_engine(engine: str) -> Iterator[None]:
    """Within it, torch's INT8 kernels and packing are an engine's."""
    import torch

    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


def tapped_torchscript(module: Any, names: list[str], inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The integers of the named values, from a module's own graph with other outputs.

    The i-th line names the value `v<i>`, as the file was written; loading appends a number to it. Names between tabs
    have one value.
    """
    import torch

    graph = module.graph.copy()
    found = {value.debugName().partition(".")[0]: value for node in graph.nodes() for value in node.outputs()}
    graph.eraseOutput(0)
    together = graph.appendNode(graph.create("prim::ListConstruct", [found[f"v{i}"] for i in range(len(names))]))
    together.output().setType(torch._C.ListType(torch._C.TensorType.get()))
    graph.registerOutput(together.output())
    graph.eraseInput(0)  # the module itself: a frozen graph does not read it
    with torch.no_grad():
        tensors = torch._C._create_function_from_graph("taps", graph)(*inputs)
    lines = zip(names, tensors, strict=True)
    return {name: tensor.int_repr().contiguous() for line, tensor in lines for name in line.split("\t")}


def tensor_kinds(graph: Any) -> list[str]:
    """The kind of every node of a TorchScript graph that computes a tensor, in order."""
    return [node.kind() for node in graph.nodes() if not node.kind().startswith("prim::")]
