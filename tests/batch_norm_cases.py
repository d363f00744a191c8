"""Every place a batch norm can stand in, as a table that any test can run under any batch-norm mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

CHANNELS = 8
"""Of every input, so that the same layer can stand first in a network and inside it."""

SIZES: Mapping[int, tuple[int, ...]] = {0: (), 1: (20,), 2: (9, 7), 3: (5, 6, 4)}
"""Spatial sizes of an input, by the number of spatial dimensions."""

EXPECTED_WARNING = "ignore:Using padding='same' with even kernel lengths"
"""What torch says once a process of the uneven cases, for `pytest.mark.filterwarnings`."""

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class BatchNormCase:
    """A model with batch norms, and what planning must make of them.

    Attributes:
        name: Readable, unique.
        factory: Makes the model in eval mode, with statistics, gammas and betas that do something.
        shape: Of an example input, the batch included.
        folds: Whether every batch norm is folded; if not, none is.
        refusal: Part of the reason that the plan gives for a batch norm that is not.
    """

    name: str
    factory: Callable[[], nn.Module]
    shape: tuple[int, ...]
    folds: bool = True
    refusal: str = ""

    def example(self, n: int | None = None, seed: int = 0) -> Tensor:
        """Standard normal inputs, n of them, by default as many as the shape says."""
        shape = (self.shape[0] if n is None else n, *self.shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Normed(nn.Module):
    """A layer, its batch norm, a ReLU."""

    def __init__(self, layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.layer(x)))


class Calls(nn.Module):
    """Layers under names, called as a function says."""

    def __init__(self, function: Callable[[Calls, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, x)


def trained(model: nn.Module) -> nn.Module:
    """Gives batch norms what training would, in eval mode.

    Variances go down to 0.005, where another eps than the model's own shows; gammas that are not 1 are left alone.
    """
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        n = module.num_features
        if module.running_mean is not None and module.running_var is not None:
            module.running_mean.copy_(torch.randn(n, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(n, generator=generator) ** 2 + 0.005)
        if module.affine:
            gamma = torch.rand(n, generator=generator) + 0.5
            module.weight.data = torch.where(module.weight.data == 1, gamma, module.weight.data)
            module.bias.data.copy_(torch.randn(n, generator=generator) * 0.5)
    return model.eval()


def twice(layer: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The layer at the input and the layer inside, each with its norm."""
    return lambda: trained(nn.Sequential(Normed(layer(), norm()), Normed(layer(), norm())))


def conv(dims: int, kernel: int = 3, **settings: object) -> Callable[[], nn.Module]:
    return lambda: CONVS[dims](CHANNELS, CHANNELS, kernel, **{"padding": 1, **settings})  # type: ignore[arg-type]


def norm(dims: int, gamma: tuple[float, ...] = (), **settings: object) -> Callable[[], nn.Module]:
    """A batch norm whose first gammas are the given ones."""

    def make() -> nn.Module:
        made = NORMS[dims](CHANNELS, **settings)  # type: ignore[arg-type]
        if gamma:
            made.weight.data[: len(gamma)] = torch.tensor(gamma)
        return made

    return make


def between_convs(dims: int, layer: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> nn.Module:
    """The layer and its norm between two convs, so that what stays in float has integers on both sides."""
    return trained(nn.Sequential(conv(dims)(), Normed(layer(), norm()), conv(dims)()))


def shape_of(dims: int) -> tuple[int, ...]:
    return (16, CHANNELS, *SIZES[dims])


def folding(name: str, dims: int, layer: Callable[[], nn.Module], norm: Callable[[], nn.Module]) -> BatchNormCase:
    return BatchNormCase(name, twice(layer, norm), shape_of(dims))


def _each_dimension(dims: int) -> list[BatchNormCase]:
    d = f"{dims}d"
    plain = norm(dims)
    return [
        folding(f"conv{d}", dims, conv(dims), plain),
        folding(f"conv{d}-no-bias", dims, conv(dims, bias=False), plain),
        folding(f"conv{d}-stride-2-dilation-2", dims, conv(dims, stride=2, dilation=2, padding=2), plain),
        folding(f"conv{d}-grouped", dims, conv(dims, groups=4), plain),
        folding(f"conv{d}-depthwise", dims, conv(dims, groups=CHANNELS, bias=False), plain),
        folding(f"conv{d}-same", dims, conv(dims, padding="same"), plain),
        folding(f"conv{d}-same-uneven", dims, conv(dims, kernel=2, padding="same", dilation=3), plain),
        folding(f"conv{d}-valid", dims, conv(dims, kernel=2, padding="valid"), plain),
        *(
            folding(f"conv{d}-{mode}", dims, conv(dims, padding_mode=mode), plain)
            for mode in ("zeros", "reflect", "replicate", "circular")
        ),
        folding(
            f"conv{d}-same-uneven-circular",
            dims,
            conv(dims, kernel=2, padding="same", padding_mode="circular"),
            plain,
        ),
        BatchNormCase(
            f"conv-transpose{d}",
            lambda: between_convs(
                dims,
                lambda: TRANSPOSED[dims](CHANNELS, CHANNELS, 3, stride=2, padding=1),
                norm(dims, eps=1e-2),
            ),
            shape_of(dims),
        ),
        BatchNormCase(
            f"grouped-conv-transpose{d}",
            lambda: between_convs(
                dims,
                lambda: TRANSPOSED[dims](CHANNELS, CHANNELS, 3, stride=2, padding=1, groups=2),
                norm(dims, eps=1e-2),
            ),
            shape_of(dims),
            folds=False,
            refusal=f"not folded: conv_transpose{d} before it is no conv or linear with an integer form",
        ),
    ]


def _called_twice(m: Calls, x: Tensor) -> Tensor:
    x = torch.relu(m.bn(m.conv(x)))
    return torch.relu(m.bn(m.conv(x)))


def _one_norm(m: Calls, x: Tensor) -> Tensor:
    return m.bn(m.left(x)) + m.bn(m.right(x))


def _one_bias() -> nn.Module:
    made = Calls(lambda m, x: m.bn(m.left(x)) + m.right(x), left=conv(2)(), right=conv(2)(), bn=norm(2)())
    made.right.bias = made.left.bias
    return made


OWN_EPS = {"eps": 1e-3, "momentum": 0.03}

CASES: tuple[BatchNormCase, ...] = (
    *(case for dims in (1, 2, 3) for case in _each_dimension(dims)),
    folding("linear", 0, lambda: nn.Linear(CHANNELS, CHANNELS), norm(0)),
    folding("linear-no-bias", 0, lambda: nn.Linear(CHANNELS, CHANNELS, bias=False), norm(0)),
    folding("eps-1e-3-momentum-0.03", 2, conv(2, bias=False), norm(2, **OWN_EPS)),
    folding("linear-eps-1e-3", 0, lambda: nn.Linear(CHANNELS, CHANNELS), norm(0, **OWN_EPS)),
    folding("no-affine", 2, conv(2), norm(2, affine=False)),
    folding("gamma-1e-12", 2, conv(2), norm(2, gamma=(1e-12,))),
    folding("gamma-zero", 2, conv(2), norm(2, gamma=(0.0, 0.0))),
    folding("gamma-zero-everywhere", 2, conv(2), norm(2, gamma=(0.0,) * CHANNELS)),
    folding("gamma-negative", 2, conv(2, bias=False), norm(2, gamma=(-0.7, -1.5, -1e-12))),
    BatchNormCase(
        "no-running-statistics",
        lambda: between_convs(2, conv(2), norm(2, track_running_stats=False)),
        shape_of(2),
        folds=False,
        refusal="it normalises by the statistics of each batch",
    ),
    BatchNormCase(
        "conv-called-twice",
        lambda: trained(Calls(_called_twice, conv=conv(2)(), bn=norm(2, **OWN_EPS)())),
        shape_of(2),
        folds=False,
        refusal="not folded: conv.weight is used more than once",
    ),
    BatchNormCase(
        "convs-with-one-bias",
        lambda: trained(_one_bias()),
        shape_of(2),
        folds=False,
        refusal="bias is used more than once",
    ),
    BatchNormCase(
        "norm-shared-by-two-convs",
        lambda: trained(Calls(_one_norm, left=conv(2)(), right=conv(2)(), bn=norm(2)())),
        shape_of(2),
    ),
)
