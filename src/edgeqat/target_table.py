"""The table of targets: what each runtime's integer kernels take and compute exactly.

A target is a runtime, or a runtime and one of its engines, "torchscript/qnnpack". A runtime's plain name stands for
every engine of it whose arithmetic is known exactly, and so one file for all of them. How each rounds is in
`edgeqat.interpreter.arithmetic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeqat.program import Kind

__all__ = ["PORTABLE", "TARGETS", "Target", "engine_of", "runtime_of"]


@dataclass(frozen=True)
class Target:
    """The rules of one runtime, or of a device that a user's file describes.

    Attributes:
        name: The runtime's name, with its engine where it is one engine's rules; or the one that the user's file has.
        kinds: Integer ops it has kernels for.
        activation_bits: Widths of activation grids its kernels clamp to.
        weight_bits: Widths of weight grids it can store.
        float_logits: Whether a linear layer that ends the network gives float straight from its accumulator.
        note: One line for `targets()`.
        conv_dims: Numbers of spatial dimensions of a conv that its kernels compute exactly.
        pools_keep_grid: Whether an average pool's output is on its input's grid.
        depthwise_limit: Largest |weight| of a depthwise conv that its kernels compute exactly; None for any.
        counts_padding: Whether an average pool counts what it pads with, whatever `count_include_pad` says.
        broadcasts: Whether operands of additions and products may differ in shape.
        one_output_groups: Whether a conv may have groups of several inputs and one output.
        open_sizes: Whether one file takes images of any height and width.
        symmetric_activations: Whether the zero point of activations is the middle of their integers.
        power_of_two_activations: Whether scales of activations are powers of two.
        per_channel_weights: Whether a weight may have a scale for each channel.
        power_of_two_weights: Whether scales of weights are powers of two.
        storage: How its file stores the integers of activations: "uint8", or "int8", which is 128 less.
        packs_weights: Whether its file stores weights of up to 4 bits in 4; its kernels take them in 8.
        file: The user's file that it was read from; None for what is built in.
    """

    name: str
    kinds: frozenset[Kind]
    activation_bits: frozenset[int]
    weight_bits: frozenset[int]
    float_logits: bool
    note: str
    conv_dims: frozenset[int] = frozenset({1, 2, 3})
    pools_keep_grid: bool = False
    depthwise_limit: int | None = None
    counts_padding: bool = False
    broadcasts: bool = True
    one_output_groups: bool = True
    open_sizes: bool = True
    symmetric_activations: bool = False
    power_of_two_activations: bool = False
    per_channel_weights: bool = True
    power_of_two_weights: bool = False
    storage: str = "uint8"
    packs_weights: bool = False
    file: str | None = None

    @property
    def runtime(self) -> str:
        """What runs its files: the runtime itself; for a user's own target, which is spelled in ONNX, ONNX Runtime."""
        return runtime_of(self.name) if self.file is None else "onnxruntime"

    @property
    def spelled(self) -> str:
        """What a target is named by: its name; or, of a user's own, its file."""
        return self.name if self.file is None else self.file

    @property
    def clamps_anywhere(self) -> bool:
        """Whether its files clamp activations where their grid ends, be that within the storage."""
        return self.runtime in CLAMPING

    @property
    def centred(self) -> bool:
        """Whether every zero point is the middle, that of a rectified value too: int8 with zero points of 0."""
        return self.symmetric_activations and self.storage == "int8"


CLAMPING = frozenset({"onnxruntime", "executorch"})
"""Runtimes whose files clamp activations within their storage."""

ALL_KINDS = frozenset(Kind) - {Kind.FLOAT}

TORCH_KINDS = ALL_KINDS - {Kind.CONV_TRANSPOSE, Kind.MATMUL, Kind.EXPAND}
"""Kinds whose arithmetic in torch's INT8 kernels is known exactly."""

XNNPACK_KINDS = ALL_KINDS - {Kind.MATMUL}
"""Kinds whose arithmetic in XNNPACK is known exactly; it has no product of two activations."""

LITERT_KINDS = ALL_KINDS - {Kind.CONV_TRANSPOSE, Kind.MATMUL}
"""Kinds whose arithmetic in LiteRT is known exactly."""

OPENVINO_KINDS = frozenset(
    {Kind.QUANTIZE, Kind.DEQUANTIZE, Kind.CONV, Kind.LINEAR, Kind.ADD, Kind.AVERAGE_POOL, Kind.MAX_POOL}
    | {Kind.VIEW, Kind.PERMUTE, Kind.PAD, Kind.SLICE, Kind.CLAMP, Kind.RESIZE, Kind.LOOKUP}
)
"""Kinds whose arithmetic in OpenVINO's CPU plugin is known exactly."""

UINT8_ACTIVATIONS = frozenset({8})
"""Of runtimes whose kernels clamp to what is stored, and to nothing else."""

NARROW_ACTIVATIONS = frozenset(range(2, 9))
"""Of runtimes whose files clamp within the storage."""

INT8_WEIGHTS = frozenset(range(2, 9))

TORCH_CONV_DIMS = frozenset({1, 2})
"""conv3d is off by a step in up to three of a hundred random ops with onednn, x86 and qnnpack."""

FBGEMM_DEPTHWISE_LIMIT = 63
"""255 * (63 + 63) fits the 16 bits in which fbgemm's depthwise kernels add pairs of products."""


def _torch_int8(name: str, note: str, depthwise_limit: int | None, counts_padding: bool) -> Target:
    return Target(
        name=name,
        kinds=TORCH_KINDS,
        activation_bits=UINT8_ACTIVATIONS,
        weight_bits=INT8_WEIGHTS,
        float_logits=False,
        note=note,
        conv_dims=TORCH_CONV_DIMS,
        pools_keep_grid=True,
        depthwise_limit=depthwise_limit,
        counts_padding=counts_padding,
        broadcasts=False,
        open_sizes=False,
    )


def _litert(name: str, note: str, delegate_alone: bool) -> Target:
    """LiteRT's own kernels compute sums of different shapes, and groups of one output, in ways that are not known."""
    return Target(
        name=name,
        kinds=LITERT_KINDS,
        activation_bits=UINT8_ACTIVATIONS,
        weight_bits=INT8_WEIGHTS,
        float_logits=False,
        note=note,
        conv_dims=frozenset({1, 2}),
        pools_keep_grid=True,
        counts_padding=True,
        broadcasts=delegate_alone,
        one_output_groups=delegate_alone,
        open_sizes=False,
    )


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnxruntime",
            kinds=ALL_KINDS,
            activation_bits=NARROW_ACTIVATIONS,
            weight_bits=INT8_WEIGHTS,
            float_logits=True,
            note="uint8 activations, int8 weights per channel, int32 biases, QDQ form",
            packs_weights=True,
        ),
        _torch_int8(
            "torchscript",
            "torch's INT8 kernels; one file that is exact with every engine",
            FBGEMM_DEPTHWISE_LIMIT,
            True,
        ),
        _torch_int8("torchscript/fbgemm", "exact on x86 with AVX512-VNNI", FBGEMM_DEPTHWISE_LIMIT, False),
        _torch_int8("torchscript/onednn", "exact on x86 with AVX512-VNNI; full-range depthwise weights", None, False),
        _torch_int8("torchscript/x86", "onednn, but fbgemm above 100 groups", FBGEMM_DEPTHWISE_LIMIT, False),
        _torch_int8("torchscript/qnnpack", "exact on any x86; full-range depthwise weights", None, True),
        Target(
            name="executorch",
            kinds=XNNPACK_KINDS,
            activation_bits=NARROW_ACTIVATIONS,
            weight_bits=INT8_WEIGHTS,
            float_logits=False,
            note="XNNPACK: int8 activations, int8 weights per channel, int32 biases, in one delegate",
            conv_dims=frozenset({1, 2}),
            pools_keep_grid=True,
            counts_padding=True,
            open_sizes=False,
        ),
        _litert("litert", "int8 activations and weights, int32 biases; one file, exact with both engines", False),
        _litert("litert/xnnpack", "the XNNPACK delegate, which is the default", True),
        _litert("litert/builtin", "LiteRT's own kernels", False),
        Target(
            name="openvino",
            kinds=OPENVINO_KINDS,
            activation_bits=UINT8_ACTIVATIONS,
            weight_bits=INT8_WEIGHTS,
            float_logits=True,
            note="uint8 activations, int8 weights per channel; sums fuse into convolutions, unrounded",
            broadcasts=False,
            open_sizes=False,
            packs_weights=True,
        ),
        Target(
            name="aoti",
            kinds=ALL_KINDS,
            activation_bits=UINT8_ACTIVATIONS,
            weight_bits=INT8_WEIGHTS,
            float_logits=True,
            note="AOTInductor: compiled code around oneDNN's INT8 kernels, for processors like this one; wants g++",
            open_sizes=False,
        ),
    )
}

PORTABLE = ("onnxruntime", "torchscript", "executorch", "litert")
"""The target "portable": one program for every runtime whose arithmetic is known exactly for most ops.

OpenVINO takes such a program too, and is exact where it has convolutions, linear layers, sums and pools alone; it is
not among them because products and concatenations would then be float everywhere.
"""


def runtime_of(target: str) -> str:
    """The runtime of a target: "torchscript" of "torchscript/qnnpack"."""
    return target.partition("/")[0]


def engine_of(target: str) -> str | None:
    """The engine of a target, None where it names none."""
    return target.partition("/")[2] or None
