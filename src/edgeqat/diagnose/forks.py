"""Running a simulation under many settings of its switches, sharing what they have in common.

Two settings compute the same up to the first quantizer in which they differ. So one is run value by value, and the
others branch off it there: on average half of every run is saved. The results are those of whole runs, to the bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgeqat.diagnose.switches import quantizing
from edgeqat.signature import Batch
from edgeqat.simulate.fake_quant import Quantizer
from edgeqat.simulate.model import SimulatedModel

__all__ = ["Forks"]


class Forks:
    """Runs of one simulation.

    Args:
        sim: Calibrated.
    """

    def __init__(self, sim: SimulatedModel) -> None:
        self._sim = sim
        self._interpreter = fx.Interpreter(sim, graph=sim.forward_graph)
        self._nodes = list(sim.forward_graph.nodes)
        self._first: dict[str, int] = {}
        for at, node in enumerate(self._nodes):
            module = sim.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, Quantizer):
                self._first.setdefault(module.switch, at)

    def run(
        self, batch: Batch, base: frozenset[str], settings: Sequence[frozenset[str]]
    ) -> Generator[tuple[int, Any], None, None]:
        """Runs a batch under each setting, in the order in which they branch off.

        The switches are back where they were when it has ended, or was closed (`contextlib.closing`).

        Args:
            batch: Inputs.
            base: The setting that they branch off from: best one from which each of them differs in little.
            settings: Names of what is quantized, as `quantizing` takes them.

        Yields:
            The index of a setting, and the model's own output structure.
        """
        forks: dict[int, list[int]] = {}
        for index, names in enumerate(settings):
            first = min((self._first[name] for name in names ^ base), default=len(self._nodes) - 1)
            forks.setdefault(first, []).append(index)
        inputs = self._sim.plan.program.signature.flatten(batch)
        env: dict[fx.Node, Any] = {}
        env.update(zip((node for node in self._nodes if node.op == "placeholder"), inputs, strict=True))
        with quantizing(self._sim, base):
            for at, node in enumerate(self._nodes[: max(forks, default=-1) + 1]):
                for index in forks.get(at, ()):
                    with quantizing(self._sim, settings[index]):
                        outputs = self._finish(_copied(env), at)
                    yield index, outputs
                self._step(env, node)

    def _finish(self, env: dict[fx.Node, Any], start: int) -> Any:
        """The outputs of a run that has come as far as the node at `start`."""
        result: Any = None
        for node in self._nodes[start:]:
            result = self._step(env, node)
        return self._sim.plan.program.signature.unflatten(result)

    def _step(self, env: dict[fx.Node, Any], node: fx.Node) -> Any:
        """Computes a node, and forgets what nothing reads any more."""
        if node.op != "placeholder":
            self._interpreter.env = env
            env[node] = self._interpreter.run_node(node)
        result = env[node]
        for read in self._interpreter.user_to_last_uses.get(node, ()):
            del env[read]
        if not node.users:
            del env[node]
        return result


def _copied(env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
    """Values that a branch may have for itself: a module that is not looked into may write into its inputs."""
    return {node: pytree.tree_map_only(Tensor, Tensor.clone, value) for node, value in env.items()}
