"""Pixels in: what the first convolutions compute, what is refused, and when the normalisation stays in float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import InputError, PlanError
from edgeqat.graph.capture import capture
from edgeqat.graph.fuse import fuse
from edgeqat.graph.pixels import NormalisePixels
from edgeqat.program import Kind
from models import SmallNet, shake
from own_targets import write_target

MEAN, STD = (0.49, 0.48, 0.44), (0.25, 0.24, 0.26)
PIXELS = eq.Pixels(MEAN, STD)
SCALE = 2.0**-6  # 1 / (255 * 0.25) = 2**-5.99
ZERO_POINT = 120  # 255 * 0.47 = 119.85


def images(n: int = 4, size: int = 8, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


class Convs(nn.Module):
    """A first convolution of any kind, and something behind it."""

    def __init__(self, conv: nn.Module, norm: bool) -> None:
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(8) if norm else nn.Identity()
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.conv(x))))


CONVS: dict[str, Callable[[], nn.Module]] = {
    "padded": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "no bias": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
    "unpadded": lambda: nn.Conv2d(3, 8, 3),
    "patches": lambda: nn.Conv2d(3, 8, 4, stride=4),
    "same": lambda: nn.Conv2d(3, 8, (3, 5), padding="same"),
    "dilated": lambda: nn.Conv2d(3, 8, 3, padding=2, dilation=2),
    "reflected": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"),
    "padded before": lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(3, 8, 3)),
}
EXACT_AT_THE_BORDER = ("unpadded", "patches", "reflected", "circular")


def padded_by_the_mean_pixel(model: nn.Module, pixels: Tensor) -> Tensor:
    """The model in float64 where zero padding puts the normalised colour of the zero point: an oracle."""
    mean, std = (torch.tensor(f, dtype=torch.float64)[:, None, None] for f in (MEAN, STD))
    offset = (ZERO_POINT / 255 - mean) / std
    double = model.double().eval()

    def hook(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] - offset,)

    first = next(m for m in double.modules() if isinstance(m, (nn.Conv2d, nn.ZeroPad2d)))
    conv = next(m for m in double.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(hook)  # now zero stands for the offset, which the bias gives back
    shift = (conv.weight * offset).sum((1, 2, 3))
    conv.bias = nn.Parameter(shift if conv.bias is None else conv.bias + shift)
    with torch.no_grad():
        found: Tensor = double((pixels.double() / 255 - mean) / std)
    return found


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", CONVS)
def test_the_first_convolution_normalises(name: str, norm: bool) -> None:
    torch.manual_seed(0)
    model, pixels = shake(Convs(CONVS[name](), norm)).eval(), images()
    sim = eq.prepare(model, pixels, pixels=PIXELS).eval()
    with torch.no_grad():
        found, normalised = sim(pixels), model(PIXELS.normalised(pixels))
    torch.testing.assert_close(found.double(), padded_by_the_mean_pixel(model, pixels), rtol=0, atol=2e-6)
    border = float((found - normalised).abs().max())
    assert (border < 2e-6) == (name in EXACT_AT_THE_BORDER), border
    assert all(op.kind is not Kind.QUANTIZE and op.kind is not Kind.FLOAT for op in sim.plan.program.ops)


def test_weights_are_folded_in_float64_and_rounded_once() -> None:
    torch.manual_seed(0)
    model = shake(Convs(nn.Conv2d(3, 8, 3, padding=1), norm=True)).eval()
    sim = eq.prepare(model, images(), pixels=PIXELS)
    conv, norm = model.conv, model.norm
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and conv.bias is not None
    assert norm.running_mean is not None and norm.running_var is not None
    mean, std = (torch.tensor(f, dtype=torch.float64)[:, None, None] for f in (MEAN, STD))
    weight, gain = conv.weight.double(), norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    bias = conv.bias.double() + (weight * (ZERO_POINT / 255 - mean) / std).sum((1, 2, 3))
    own = dict(sim.named_parameters())
    assert torch.equal(own["conv.weight"], (weight / (255 * SCALE * std) * gain[:, None, None, None]).float())
    assert torch.equal(own["conv.bias"], ((bias - norm.running_mean.double()) * gain + norm.bias.double()).float())


def test_groups_take_their_own_channels() -> None:
    torch.manual_seed(0)
    pixels, given = eq.Pixels((0.1, 0.5, 0.9, 0.3), (0.1, 0.2, 0.3, 0.4)), images(channels=4)
    for conv in (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(4, 8, 3, groups=4)):
        model = Convs(conv, norm=False).eval()
        sim = eq.prepare(model, given, pixels=pixels).eval()
        with torch.no_grad():
            torch.testing.assert_close(sim(given), model(pixels.normalised(given)), rtol=0, atol=2e-6)


def test_a_batch_norm_at_the_head_normalises_too() -> None:
    model = shake(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))).eval()
    sim = eq.prepare(model, images(), pixels=PIXELS).eval()
    with torch.no_grad():
        torch.testing.assert_close(sim(images()), model(PIXELS.normalised(images())), rtol=0, atol=5e-6)
    assert [op.kind for op in sim.plan.program.ops][:2] == [Kind.CONV, Kind.CONV]


def test_the_grid_is_the_pixels() -> None:
    sim = eq.prepare(SmallNet().eval(), images(), pixels=PIXELS)
    assert sim.plan.program.grid_of("x").per_tensor() == (SCALE, ZERO_POINT)
    assert sim.plan.program.values["x"].dtype == torch.uint8
    everything = torch.arange(256, dtype=torch.uint8)
    real = sim.quantizer_of("x")(everything)
    assert torch.equal(real / SCALE + ZERO_POINT, everything.float())
    row = sim.plan.rows()[0]
    assert row.grid_in == "u8 scale 0.01562 zero 120"
    assert row.reason.endswith("; its weights normalise the pixels, zero padding is off by up to 0.12")


class Head(nn.Module):
    """What reads the image is chosen; behind it there is a convolution."""

    def __init__(self, read: Callable[[Tensor], Tensor], channels: int = 3) -> None:
        super().__init__()
        self.read, self.conv = read, nn.Conv2d(channels, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.read(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), x


LEFT_IN_FLOAT = {
    "relu reads it, which is no convolution": Head(torch.relu),
    "max_pool2d reads it, which is no convolution": Head(lambda x: F.max_pool2d(x, 2)),
    "conv reads it, whose weight or bias is used more than once": Twice(),
    "it is an output of the model": Returned(),
}


@pytest.mark.parametrize("reason", LEFT_IN_FLOAT)
def test_where_no_convolution_can_it_is_done_in_float_and_the_plan_says_why(reason: str) -> None:
    model = LEFT_IN_FLOAT[reason].eval()
    sim = eq.prepare(model, images(), pixels=PIXELS).eval()
    first = sim.plan.rows()[0]
    assert (first.kind, first.runs) == ("normalise_pixels", "float")
    assert first.reason == reason
    with torch.no_grad():
        found, wanted = sim(images()), model(PIXELS.normalised(images()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_a_first_convolution_in_float_gets_normalised_floats() -> None:
    mapping = eq.QConfigMapping().set_module_name("conv1", None)
    plan = eq.plan(SmallNet().eval(), images(), qconfig_mapping=mapping, pixels=PIXELS)
    assert plan.rows()[0].reason == "conv1 reads it in float: its QConfig is None"


@pytest.mark.parametrize("storage", ["uint8", "int8"])
def test_a_target_of_one_s_own_takes_pixels_on_the_grid_that_it_wants(storage: str, tmp_path: Path) -> None:
    target = write_target(tmp_path, f"activations: {{symmetric: true, power_of_two: true}}\nstorage: {storage}\n")
    plan = eq.plan(SmallNet().eval(), images(), target, pixels=PIXELS)
    if storage == "uint8":
        assert plan.program.grid_of("x").per_tensor() == (SCALE, 128)
    else:
        assert plan.rows()[0].reason == "my-npu stores no activations of 8 bits as uint8"


def test_the_user_s_model_and_its_names_stay() -> None:
    model = SmallNet()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured = capture(model, images(), pixels=PIXELS)
    assert isinstance(captured.root.get_submodule("normalise_pixels"), NormalisePixels)
    assert [r.name for r in fuse(captured).regions][:2] == ["normalise_pixels", "conv1"]
    eq.prepare(model, images(), pixels=PIXELS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("mean", "std", "said"), [
    ((0.5,), (0.5, 0.5), "found 1 means and 2 stds"),
    ((), (), "found 0 means and 0 stds"),
    ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "wanted figures in 0..1: those of pixels / 255"),
    ((0.5,), (0.0,), "wanted figures above 0"),
    ((float("nan"),), (0.5,), "wanted figures in 0..1"),
])  # fmt: skip
def test_figures_that_make_no_sense_are_refused(mean: tuple[float, ...], std: tuple[float, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        eq.Pixels(mean, std)


def test_other_examples_than_pixels_are_refused() -> None:
    with pytest.raises(InputError, match=r"found no image among the example inputs \(torch.float32 \[2, 3, 8, 8\]\)"):
        eq.prepare(SmallNet(), torch.rand(2, 3, 8, 8), pixels=PIXELS)
    with pytest.raises(InputError, match=r"found an image \[4, 1, 8, 8\], wanted 3 channels, one for each mean"):
        eq.prepare(SmallNet(), images(channels=1), pixels=PIXELS)
    sim = eq.prepare(SmallNet(), images(), pixels=PIXELS)
    with pytest.raises(InputError, match=r"input 'x' is float32 \[4, 3, 8, 8\], wanted uint8 \[N, 3, 8, 8\]"):
        sim(PIXELS.normalised(images()))


@pytest.mark.parametrize("batch_norm", ["fold", "live"])
@pytest.mark.parametrize("name", ["padded", "no bias"])
def test_the_way_back_takes_normalised_floats(name: str, batch_norm: str) -> None:
    """Whatever training did to the folded parameters, the float model computes what the simulation does inside."""
    torch.manual_seed(0)
    model = shake(Convs(CONVS[name](), norm=True)).eval()
    sim = eq.prepare(model, images(), pixels=PIXELS, batch_norm=batch_norm).eval()
    with torch.no_grad():
        for parameter in sim.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.abs().mean())
        found, back = sim(images()), sim.to_float().eval()(PIXELS.normalised(images()))
        before = model(PIXELS.normalised(images()))
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(found[inside], back[inside], rtol=0, atol=5e-5)
    assert float((back - before).abs().max()) > 0.01


def test_a_bias_that_has_no_place_in_the_float_model_is_refused() -> None:
    model = Convs(nn.Conv2d(3, 8, 3, bias=False), norm=False).eval()
    sim = eq.prepare(model, images(), pixels=PIXELS).eval()
    with torch.no_grad():
        torch.testing.assert_close(sim.to_float().conv.weight, model.conv.weight, rtol=1e-6, atol=0)  # type: ignore[union-attr]
        sim.get_parameter("conv.bias").add_(0.1)
    with pytest.raises(PlanError, match="conv has no bias of its own"):
        sim.to_float()
