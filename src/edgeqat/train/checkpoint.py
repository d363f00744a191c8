"""Weights on disk: safetensors, or torch files read without unpickling anything."""

from __future__ import annotations

import pickle  # noqa: TID251  only for the name of the error that weights_only=True raises
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from edgeqat.errors import ModelError
from edgeqat.files import write_atomically

__all__ = ["load_weights", "save_weights"]


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a module's state_dict as safetensors, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    # Tied parameters are stored once under each name: safetensors takes no shared memory.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, safetensors.torch.save(state))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state_dict into `model`: a .safetensors file, or a torch file holding nothing but tensors.

    Raises:
        ModelError: The file is missing, unreadable, holds pickled code, or its weights do not fit (keys named).
    """
    state = _read(path)
    wanted = model.state_dict()
    # PyTorch's own counter of batches is missing from files that other tools wrote, and changes nothing here.
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in wanted]
    if missing or extra:
        raise ModelError(f"{path} does not fit the model: missing {_some(missing)}, not in the model {_some(extra)}")
    wrong = [k for k in state if state[k].shape != wanted[k].shape]
    if wrong:
        found, shape = tuple(state[wrong[0]].shape), tuple(wanted[wrong[0]].shape)
        raise ModelError(f"{path} does not fit the model: {wrong[0]} has shape {found}, wanted {shape}")
    model.load_state_dict(state, strict=False)


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
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds pickled code, which edgeqat does not run; save the state_dict alone, best as .safetensors"
        ) from error
    except Exception as error:
        # On damaged files torch raises whatever its reader stumbles over: IndexError, KeyError, RuntimeError, ...
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"{path} cannot be read as weights: {type(error).__name__}: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelError(f"{path} holds no state_dict of tensors; save model.state_dict()")
    return state
