"""verify.py: the modules of this package that one runtime needs, as one file that imports nothing of ours."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeqat.replay import run_aoti, run_executorch, run_litert, run_onnxruntime, run_openvino, run_torchscript
from edgeqat.replay.compare import Replay, replay_with
from edgeqat.replay.runner import Runner

__all__ = ["RUNNERS", "probe_script", "replay", "verify_script"]

RUNNERS: Mapping[str, Runner] = {
    "onnxruntime": Runner(run_onnxruntime.run, run_onnxruntime.start),
    "torchscript": Runner(run_torchscript.run, run_torchscript.start),
    "executorch": Runner(run_executorch.run, run_executorch.start),
    "litert": Runner(run_litert.run, run_litert.start),
    "openvino": Runner(run_openvino.run, run_openvino.start),
    "aoti": Runner(run_aoti.run, run_aoti.start),
}
"""By runtime: what runs its files."""

HERE = Path(__file__).parent


def replay(folder: Path, check: bool = True) -> Replay:
    """Replays an artifact folder of any runtime; see `edgeqat.replay.compare.replay_with`."""
    return replay_with(RUNNERS, folder, check)


def verify_script(runtime: str) -> str:
    """The source of the script that verifies and times artifacts of a runtime."""
    modules = ("kernels", "folder", "pixels", "runner", "compare", f"run_{runtime}", "command")
    return _script("__init__", modules, f'sys.exit(main({{"{runtime}": Runner(run, start)}}))')


def probe_script(runtime: str) -> str:
    """The source of the script that measures the memory of a runtime's files."""
    return _script("probe", ("kernels", "folder", "runner", f"run_{runtime}", "probe"), "probe_main(start)")


def _script(head: str, modules: Sequence[str], last: str) -> str:
    """Modules one after the other, in an order in which every name is defined before it is used.

    Args:
        head: The module whose docstring the script begins with.
        modules: What it is made of.
        last: What it does when run.
    """
    imported: set[str] = set()
    names: dict[str, set[str]] = {}
    bodies: list[str] = []
    for module in modules:
        lines, body = _source(module).splitlines(), ast.parse(_source(module)).body
        statements = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        # A module begins with its docstring and imports; none stands further down.
        bodies.append("\n".join(lines[max(node.end_lineno or 0 for node in statements) :]).strip("\n"))
        for node in statements:
            if isinstance(node, ast.Import):
                imported |= {ast.unparse(alias) for alias in node.names}
            elif not str(node.module).startswith(("edgeqat", "__future__")):
                names.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    imports = [f"import {module}" for module in sorted(imported)]
    imports += [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(names.items())]
    docstring = f'"""{ast.get_docstring(ast.parse(_source(head)), clean=False)}"""'
    start = [docstring, "", "from __future__ import annotations", "", *imports]
    return "\n\n\n".join(["\n".join(start), *bodies, f'if __name__ == "__main__":\n    {last}']) + "\n"


def _source(module: str) -> str:
    return (HERE / f"{module}.py").read_text(encoding="utf-8")
