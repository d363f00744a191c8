"""What each kind of op in a program needs to know besides its inputs: one small frozen dataclass a kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "PAD_MODES",
    "AddAttrs",
    "Attrs",
    "AveragePoolAttrs",
    "ClampAttrs",
    "ConcatAttrs",
    "ConstantAttrs",
    "ConvAttrs",
    "ConvTransposeAttrs",
    "ExpandAttrs",
    "LinearAttrs",
    "LookupAttrs",
    "MatmulAttrs",
    "MaxPoolAttrs",
    "MulAttrs",
    "NoAttrs",
    "PadAttrs",
    "PermuteAttrs",
    "ResizeAttrs",
    "SliceAttrs",
    "ViewAttrs",
]

PAD_MODES = ("constant", "reflect", "replicate", "circular")
"""Every way of padding that moves integers and computes none."""


@dataclass(frozen=True)
class NoAttrs:
    """Attributes of a kind that has none."""


@dataclass(frozen=True)
class ConvAttrs:
    """A convolution over the trailing dimensions; `padding` is (before, after) per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    activation: str | None = None
    """None, "relu" or "relu6": applied by the clamp of the output grid."""


@dataclass(frozen=True)
class ConvTransposeAttrs:
    """A transposed convolution over the trailing dimensions; weight [C_in, C_out, ...], one group.

    `padding` is what the output loses on both sides of each dimension, `output_padding` what it gains at the end.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    activation: str | None = None


@dataclass(frozen=True)
class LinearAttrs:
    """A fully connected layer over the last dimension."""

    activation: str | None = None


@dataclass(frozen=True)
class AddAttrs:
    """An elementwise addition of two values, whose shapes broadcast."""

    activation: str | None = None


@dataclass(frozen=True)
class MulAttrs:
    """An elementwise product of two values, whose shapes broadcast."""

    activation: str | None = None


@dataclass(frozen=True)
class MatmulAttrs:
    """A matrix product of two values over their last two dimensions; those before them broadcast."""


@dataclass(frozen=True)
class ConcatAttrs:
    """Values one after the other along `dim`, each brought onto the grid of the result."""

    dim: int
    activation: str | None = None


@dataclass(frozen=True)
class LookupAttrs:
    """A function of each element on its own: a table with an entry for every integer of the input's grid.

    Attributes:
        function: Its name in `edgeqat.lookup.FUNCTIONS`.
        arguments: Its numbers, such as a slope.
    """

    function: str
    arguments: tuple[float, ...] = ()


@dataclass(frozen=True)
class ConstantAttrs:
    """A parameter, buffer or constant of the model as an operand; `source` is its dotted name."""

    source: str


@dataclass(frozen=True)
class ClampAttrs:
    """A ReLU on its own: integers below the zero point become the zero point."""


@dataclass(frozen=True)
class ExpandAttrs:
    """Repeats dimensions of size 1; -1 stands for a dimension that stays as it is."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class ResizeAttrs:
    """Repeats each element of [N, C, ...] a whole number of times along each spatial dimension: nearest neighbour."""

    factors: tuple[int, ...]


@dataclass(frozen=True)
class AveragePoolAttrs:
    """Average pooling of [N, C, H, W]; `kernel` None means the whole plane, leaving [N, C, 1, 1]."""

    kernel: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    count_include_pad: bool = True


@dataclass(frozen=True)
class MaxPoolAttrs:
    """Max pooling of [N, C, H, W]."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False


@dataclass(frozen=True)
class ViewAttrs:
    """A reshape; -1 stands for the one dimension that depends on the batch."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class PermuteAttrs:
    """A transposition: output dimension i is input dimension dims[i]."""

    dims: tuple[int, ...]


@dataclass(frozen=True)
class PadAttrs:
    """Padding, (before, after) for every dimension, the batch included.

    `mode` is one of `PAD_MODES`, by PyTorch's names: "constant" pads with real zeros, the others with elements of the
    tensor itself, and neither batch nor channels.
    """

    padding: tuple[tuple[int, int], ...]
    mode: str = "constant"


@dataclass(frozen=True)
class SliceAttrs:
    """x[start:stop:step] along `dim`; `stop` None runs to the end."""

    dim: int
    start: int
    stop: int | None
    step: int


Attrs: TypeAlias = (
    NoAttrs
    | ConvAttrs
    | LinearAttrs
    | ConvTransposeAttrs
    | AddAttrs
    | MulAttrs
    | MatmulAttrs
    | ConcatAttrs
    | LookupAttrs
    | ConstantAttrs
    | ClampAttrs
    | ExpandAttrs
    | ResizeAttrs
    | AveragePoolAttrs
    | MaxPoolAttrs
    | ViewAttrs
    | PermuteAttrs
    | PadAttrs
    | SliceAttrs
)
