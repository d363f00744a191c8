"""verify.py: the modules of this package that one runtime needs, as one file that imports nothing of ours."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from edgeqat.replay import run_onnxruntime, run_torchscript
from edgeqat.replay.compare import Replay, Run, replay_with

__all__ = ["RUNNERS", "replay", "verify_script"]

RUNNERS: Mapping[str, Run] = {"onnxruntime": run_onnxruntime.run, "torchscript": run_torchscript.run}
"""By runtime: what runs its files."""

HERE = Path(__file__).parent

SHARED = ("kernels", "folder", "pixels", "compare", "command")
"""In an order in which every name is defined before it is used."""

END = """


if __name__ == "__main__":
    sys.exit(main({{"{runtime}": run}}))
"""


def replay(folder: Path, check: bool = True) -> Replay:
    """Replays an artifact folder of any runtime; see `edgeqat.replay.compare.replay_with`."""
    return replay_with(RUNNERS, folder, check)


def verify_script(runtime: str) -> str:
    """The source of the script that verifies artifacts of a runtime."""
    modules: set[str] = set()
    names: dict[str, set[str]] = {}
    bodies: list[str] = []
    for module in (*SHARED[:-1], f"run_{runtime}", SHARED[-1]):
        source = (HERE / f"{module}.py").read_text(encoding="utf-8")
        lines, body = source.splitlines(), ast.parse(source).body
        statements = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
        # A module begins with its docstring and imports; none stands further down.
        bodies.append("\n".join(lines[max(node.end_lineno or 0 for node in statements) :]).strip("\n"))
        for node in statements:
            if isinstance(node, ast.Import):
                modules |= {ast.unparse(alias) for alias in node.names}
            elif not str(node.module).startswith(("edgeqat", "__future__")):
                names.setdefault(str(node.module), set()).update(alias.name for alias in node.names)
    head = (HERE / "__init__.py").read_text(encoding="utf-8").strip("\n")
    imports = [f"import {module}" for module in sorted(modules)]
    imports += [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(names.items())]
    parts = [head, "", "from __future__ import annotations", "", *imports, "", "", "\n\n\n".join(bodies)]
    return "\n".join(parts) + END.format(runtime=runtime)
