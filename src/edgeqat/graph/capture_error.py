"""What a model that torch.export cannot take is told: the line that stands in the way, and what can be done."""

from __future__ import annotations

import linecache
import re
import traceback

from torch import nn

__all__ = ["UNKNOWN_OUTPUT", "explain", "last_user_frame"]

UNKNOWN_OUTPUT = "in output, which is not a known type"
"""What torch.export says of a class that pytree does not know."""


def explain(model: nn.Module, error: BaseException, dynamic_size: bool) -> str:
    """One line about an error of torch.export; `dynamic_size` is that of `capture`."""
    text = str(error)
    user_code = re.findall(r'File "([^"]+)", line (\d+), in (\w+)(?:\n\s+(.*))?', text)
    frames = [f for f in user_code if "/torch/" not in f[0]]
    where = ""
    if frames:
        file, line, _, source = frames[-1]
        where = f" at {file.rsplit('/', 1)[-1]}:{line} ({source.strip()})"
    elif (frame := last_user_frame(error)) is not None:
        where = f" at {frame}"
    unknown = re.search(rf"Found <class '([^']+)'> {UNKNOWN_OUTPUT}", text)
    if unknown is not None:
        found = unknown[1].rsplit(".", 1)[-1]
        return (
            f"{type(model).__name__} cannot be captured: it returns a {found}, whose tensors torch.export cannot "
            "find; return tensors, tuples, lists, dicts or dataclasses, or register it with "
            "torch.utils._pytree.register_pytree_node"
        )
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)
    fixed = "Constraints violated" in text or "specialized" in text
    if fixed:
        first = "its code fixes the batch size" + ", the height or the width" * dynamic_size
    name = "" if fixed else _innermost_submodule(model, error)
    return (
        f"{type(model).__name__} cannot be captured{where}: {first[:300]}; torch.export must be able to export it "
        f"with {'images' if dynamic_size else 'a batch'} of any size: remove data-dependent control flow, or branch "
        "on shapes"
        + (f"; or keep {name} ({type(model.get_submodule(name)).__name__}) in float: opaque=[{name!r}]" * bool(name))
    )


def last_user_frame(error: BaseException) -> str | None:
    """The innermost frame of the traceback that is neither torch's nor ours."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if "/torch/" not in file and "/edgeqat/graph/" not in file and not file.startswith("<"):
            found = f"{file.rsplit('/', 1)[-1]}:{line} ({linecache.getline(file, line).strip()})"
    return found


def _innermost_submodule(model: nn.Module, error: BaseException) -> str:
    """The dotted name of the innermost submodule of a class not torch's in which an error arose; "" for none."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names and not type(module).__module__.startswith("torch."):
            found = names[id(module)]
    return found
