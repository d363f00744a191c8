from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeqat.errors import PlanError
from edgeqat.graph.capture import capture
from edgeqat.graph.fuse import FusedGraph, fuse
from edgeqat.op_attrs import AveragePoolAttrs, PadAttrs, SliceAttrs
from edgeqat.program import Kind
from edgeqat.zoo import edge_model, edge_model_with_stubs, resnet20
from models import SmallNet

IMAGE = torch.zeros(2, 3, 16, 16)


def regions(fused: FusedGraph) -> dict[str, list[str]]:
    return {region.name: [o.module for o in region.origins] for region in fused.regions}


class Compound(nn.Sequential):
    """A container of the user's own, which torch's fuser does not look into."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


@pytest.mark.parametrize("factory", [edge_model, edge_model_with_stubs])
def test_the_article_s_fusions_are_found_inside_its_containers(factory: type[nn.Module]) -> None:
    lists = [["entry_block.0", "entry_block.1", "entry_block.2"]]
    for block in ("residual_block", "downsample_block"):
        lists += [[f"{block}.conv.{i}", f"{block}.conv.{i + 1}"] for i in (0, 3, 6)]
    fused = fuse(capture(factory(), torch.zeros(1, 3, 32, 32)), lists)
    assert regions(fused)["entry_block.0"] == ["entry_block.0", "entry_block.1", "entry_block.2"]
    assert fused.refusals == ()
    assert len(fused.folded()) == 7


def test_every_pattern_of_a_small_network() -> None:
    fused = fuse(capture(SmallNet(), IMAGE))
    found = {region.name: region for region in fused.regions}
    forms = {name: None if r.form is None else r.form.kind for name, r in found.items()}
    assert forms == {
        "conv1": Kind.CONV,
        "conv2": Kind.CONV,
        "add": Kind.ADD,
        "slice": Kind.SLICE,
        "slice_1": Kind.SLICE,
        "pad": Kind.PAD,
        "conv3": Kind.CONV,
        "add_1": Kind.ADD,
        "pool": Kind.MAX_POOL,
        "mean": Kind.AVERAGE_POOL,
        "drop": None,
        "fc": Kind.LINEAR,
    }
    activations = {
        name: r.form.attrs.activation
        for name, r in found.items()
        if hasattr(getattr(r.form, "attrs", None), "activation")
    }  # type: ignore[union-attr]
    assert activations == {"conv1": "relu", "conv2": None, "add": "relu", "conv3": None, "add_1": "relu6", "fc": None}
    assert found["drop"].identity
    assert found["pad"].form is not None and found["pad"].form.attrs == PadAttrs(((0, 0), (4, 4), (0, 0), (0, 0)))
    assert found["slice"].form is not None and found["slice"].form.attrs == SliceAttrs(2, 0, None, 2)
    assert found["mean"].form is not None and found["mean"].form.attrs == AveragePoolAttrs()


def test_resnet20_leaves_nothing_unfused() -> None:
    fused = fuse(capture(resnet20(), torch.zeros(1, 3, 32, 32)))
    assert fused.refusals == ()
    assert len(fused.folded()) == 19
    assert all(region.form is not None for region in fused.regions)


RELUS = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "nn.ReLU": nn.ReLU(),
    "in place": lambda x: F.relu_(x),
    "clamp_min": lambda x: torch.clamp_min(x, 0.0),
    "clamp": lambda x: torch.clamp(x, min=0),
    "F.relu6": F.relu6,
    "nn.ReLU6": nn.ReLU6(),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 6.0),
    "clamp 6": lambda x: torch.clamp(x, 0, 6),
}


class WithActivation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.activation = RELUS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


@pytest.mark.parametrize("name", RELUS)
def test_every_spelling_of_an_activation_is_fused(name: str) -> None:
    (region,) = fuse(capture(WithActivation(name), IMAGE)).regions
    assert region.form is not None
    expected = "relu6" if "6" in name or name == "hardtanh" else "relu"
    assert region.form.attrs.activation == expected  # type: ignore[union-attr]


class Reads(nn.Module):
    """A conv whose output, before BN and ReLU, is read by someone else too."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.conv, self.bn, self.at = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), at

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        z = self.bn(y)
        return F.relu(z), y if self.at == "conv" else z


def test_a_batch_norm_whose_conv_has_two_readers_is_refused_by_name() -> None:
    fused = fuse(capture(Reads("conv"), IMAGE))
    assert [(r.name, "not folded into conv" in r.reason) for r in fused.refusals] == [("bn", True)]


def test_an_activation_whose_input_has_two_readers_is_refused_by_name() -> None:
    fused = fuse(capture(Reads("bn"), IMAGE))
    assert len(fused.refusals) == 1 and "not fused with conv, which output reads too" in fused.refusals[0].reason
    alone = next(r for r in fused.regions if r.name == "relu")
    assert alone.form is not None and alone.form.kind is Kind.CLAMP


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.conv(x)))


def test_a_weight_used_twice_takes_no_batch_norm() -> None:
    fused = fuse(capture(Twice(), IMAGE))
    assert [r.reason for r in fused.refusals] == ["not folded: conv.weight is used more than once"]


class NoStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


def test_a_batch_norm_without_running_statistics_is_left_in_float() -> None:
    fused = fuse(capture(NoStatistics(), IMAGE))
    assert fused.folded() == []
    assert [r.form is None for r in fused.regions] == [False, True]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (["conv1", "bn1"], None),
        (["conv1", "nowhere"], "found no module 'nowhere'"),
        (["conv1", "conv2"], "are not one conv or linear, batch norm and activation in a row"),
    ],
)
def test_explicit_fusions_are_checked(group: list[str], message: str | None) -> None:
    captured = capture(SmallNet(), IMAGE)
    if message is None:
        assert "bn1" in regions(fuse(captured, [group]))["conv1"]
    else:
        with pytest.raises(PlanError, match=message):
            fuse(captured, [group])


def test_names_are_unique_and_follow_modules() -> None:
    names = [region.name for region in fuse(capture(edge_model(), torch.zeros(1, 3, 32, 32))).regions]
    assert len(set(names)) == len(names)
    assert {"entry_block.0", "residual_block.add", "avgpool", "fc"} <= set(names)


class OneBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.other.bias = self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.bn(self.conv(x)))


def test_a_bias_used_twice_takes_no_batch_norm() -> None:
    """Folding would change the other conv's bias too."""
    (refusal,) = fuse(capture(OneBias(), IMAGE)).refusals
    assert refusal.name == "bn" and refusal.reason.endswith("bias is used more than once")


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_conv_keeps_its_name_whatever_pads_before_it(mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4))
    expected = {"0": ["0", "1"]} if mode == "zeros" else {"0.pad": ["0"], "0": ["0", "1"]}
    assert regions(fuse(capture(model, IMAGE))) == expected


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[0]) + x.mean()


def test_a_conv_over_a_single_image_has_no_integer_form() -> None:
    conv = next(r for r in fuse(capture(First(), IMAGE)).regions if r.name == "conv")
    assert conv.reason == "its input has 3 dimensions, wanted 4: its first would be channels, not the batch"
