"""Weights on disk: safetensors, or torch files read without unpickling anything."""

from __future__ import annotations

import pickle  # noqa: TID251  only for the name of the error that weights_only=True raises
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from edgeqat.errors import ModelError
from edgeqat.files import write_atomically

__all__ = ["load_weights", "put_weights", "save_weights", "weights_of"]


WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and its like, and torch.compile, put before each name of a state_dict."""


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state_dict, on the CPU; tied parameters come once under each name.

    Raises:
        ModelError: The state_dict holds something that is no tensor.
    """
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ModelError(
                f"the model keeps a {type(value).__name__} under {name} of its state_dict, wanted tensors alone"
            )
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a module's state_dict as safetensors, atomically.

    Raises:
        ModelError: The state_dict holds something that is no tensor.
        OutputError: The file cannot be written.
    """
    write_atomically(path, safetensors.torch.save(weights_of(model)))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state_dict into `model`: a .safetensors file, or a torch file holding nothing but tensors.

    Raises:
        ModelError: The file is missing, unreadable, holds pickled code, or its weights do not fit (keys named).
    """
    put_weights(model, _read(path), str(path))


def put_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into `model`; one that does not fit changes nothing.

    Args:
        model: Changed in place.
        state: Tensors by the names of its state_dict.
        source: Where they come from, for messages.

    Raises:
        ModelError: They do not fit (keys named).
    """
    wanted = model.state_dict()
    # PyTorch's own counter of batches is missing from files that other tools wrote, and changes nothing here.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted]
    prefix = _prefix(state)
    if prefix and extra and all(prefix + name in state for name in missing):
        raise ModelError(
            f"{source} does not fit the model: every name in it begins with {prefix!r}, as DataParallel, "
            "DistributedDataParallel or torch.compile save them; save the state_dict of the model inside, "
            "model.module or model._orig_mod"
        )
    if missing or extra:
        raise ModelError(f"{source} does not fit the model: missing {_some(missing)}, not in the model {_some(extra)}")
    wrong = [k for k in state if state[k].shape != wanted[k].shape]
    if wrong:
        found, shape = tuple(state[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise ModelError(f"{source} does not fit the model: {wrong[0]} has shape {found}, wanted {shape}")
    model.load_state_dict(state, strict=False)


def _prefix(state: Mapping[str, Tensor]) -> str:
    """What a wrapper put before every name; "" for nothing."""
    return next((p for p in WRAPPERS if state and all(name.startswith(p) for name in state)), "")


def _is_torch_file(path: Path) -> bool:
    """Whether a file begins as those of torch.save do, today's or an old one; an empty one was cut off."""
    with path.open("rb") as file:
        start = file.read(4)
    return not start or start.startswith((b"PK\x03\x04", b"\x80"))


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"found no weights file {path}; check model.weights, or set it to null to train from scratch")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # On damaged files torch raises whatever its reader stumbles over: IndexError, KeyError, RuntimeError, ...
        if path.suffix != ".safetensors" and not _is_torch_file(path):
            raise ModelError(f"{path} is no checkpoint, wanted .safetensors or what torch.save writes") from error
        if isinstance(error, pickle.UnpicklingError):
            raise ModelError(
                f"{path} holds pickled code, which edgeqat does not run; save the state_dict alone, best as "
                ".safetensors"
            ) from error
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{path} cannot be read as weights: {type(error).__name__}: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path} holds no state_dict of tensors; save model.state_dict()")
    return state
