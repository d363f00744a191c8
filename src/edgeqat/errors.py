"""Every error edgeqat raises on purpose, and the exit code it ends a command with.

    EdgeqatError                 1  internal error
    ├── InputError               2  something the user gave is wrong
    │   ├── RecipeError             a recipe or a --set that does not fit the schema
    │   ├── DataError               data that is missing, undecodable or of the wrong shape
    │   ├── ModelError              a factory or its weights
    │   │   └── CaptureError        a model that torch.export cannot capture
    │   ├── PlanError               settings that no plan can satisfy
    │   ├── TrainingError           training that diverged
    │   ├── CheckpointError         a checkpoint of another run, or one that cannot be read
    │   ├── PhaseError              a step out of order: convert before calibrate
    │   ├── OutputError             an output directory that holds another run
    │   ├── JobError                a job's process that the system ended: too many jobs for the memory
    │   └── TamperedError           an artifact whose files do not have their recorded hashes
    ├── VerificationError        3  a runtime disagrees with the reference
    ├── MissingRuntimeError      4  a runtime is not installed; the message names the pip install
    └── LostProcessError         5  another process of the training is gone or does not answer

CalibrationWarning is no error: calibration went on, but a grid that it made may be of no use.

A message says what was found, what was wanted and what to do, in one line.
"""

from __future__ import annotations

__all__ = [
    "CalibrationWarning",
    "CaptureError",
    "CheckpointError",
    "DataError",
    "EdgeqatError",
    "InputError",
    "JobError",
    "LostProcessError",
    "MissingRuntimeError",
    "ModelError",
    "OutputError",
    "PhaseError",
    "PlanError",
    "RecipeError",
    "TamperedError",
    "TrainingError",
    "VerificationError",
]


class EdgeqatError(Exception):
    """Root of the tree; `exit_code` is what a command that meets it exits with.

    Attributes:
        told: Whether another process of the same run tells the user; None while processes know nothing of each other.
    """

    exit_code = 1
    told: bool | None = None


class InputError(EdgeqatError):
    """Something the user gave cannot be used."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, or a --set, that does not fit the schema; the dotted path is in the message."""


class DataError(InputError):
    """Data that is missing, undecodable, empty or of the wrong shape."""


class ModelError(InputError):
    """A factory that cannot be used, or weights that do not fit it."""


class CaptureError(ModelError):
    """A model that torch.export cannot capture; the message names the line that stands in the way."""


class PlanError(InputError):
    """Quantization settings that no plan can satisfy on the chosen targets."""


class TrainingError(InputError):
    """Training in which a loss, gradient or parameter became NaN or infinite; the message says where."""


class CheckpointError(InputError):
    """A checkpoint that belongs to another run, or that this version cannot read."""


class PhaseError(InputError):
    """A step out of order, such as convert before calibrate; the message says the way out."""


class OutputError(InputError):
    """An output directory that cannot be written, or that already holds a run."""


class JobError(InputError):
    """A job whose process was ended from outside, as the system does where memory is short."""


class TamperedError(InputError):
    """An artifact folder whose files do not match the hashes in its manifest."""


class VerificationError(EdgeqatError):
    """A runtime computes other integers than the reference."""

    exit_code = 3


class MissingRuntimeError(EdgeqatError):
    """A runtime's packages are not installed."""

    exit_code = 4

    def __init__(self, runtime: str, extra: str, cause: str, remedy: str = "") -> None:
        self._given = (runtime, extra, cause, remedy)
        remedy = remedy or f"install it: pip install 'edgeqat[{extra}]'"
        super().__init__(f"{runtime} is not usable here ({cause}); {remedy}")

    def __reduce__(self) -> tuple[type[MissingRuntimeError], tuple[str, str, str, str]]:
        return type(self), self._given  # else what comes from another process is made of its message alone


class LostProcessError(EdgeqatError):
    """Another process of a training is gone, or has not answered in time.

    Attributes:
        gone: Whether it is gone.
    """

    exit_code = 5
    gone = True


class CalibrationWarning(UserWarning):
    """Calibration data that no good grid can come from; the message names the value and what was seen."""


class SkippedWarning(UserWarning):
    """Samples that could not be read and were skipped; the message counts them and names the first."""
