"""Images of any height and width, where that is asked for: captured once, verified at several sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import CaptureError, InputError, PlanError
from edgeqat.signature import Batch, call
from edgeqat.zoo import edge_model, resnet20
from helpers import EXACT_ARITHMETIC
from models import Branches, FloatBlocks, SmallNet, shake

SIZES = [(16, 16), (24, 10), (9, 33)]


def images(channels: int, size: tuple[int, int], n: int = 2) -> Tensor:
    return torch.randn(n, channels, *size, generator=torch.Generator().manual_seed(sum(size)))


class Pyramid(nn.Module):
    """Two scales that meet again: the smaller is enlarged in float, to the size of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.same = nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        small, large = F.relu(self.down(x)), F.relu(self.same(x))
        both = torch.cat([F.interpolate(small, size=large.shape[2:]), large], 1)
        return {"map": self.head(both), "small": small}


class CutAndReshaped(nn.Module):
    """Slices whose bounds count from the end or lie beyond it, and views that hold one open size, or two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.conv(x)
        a, b = self.head(x[:, :, 1:-1, -6:]), self.head(x[:, :, :20, ::2])
        return (
            a,
            b,
            self.head(F.pad(x[:, 1:], (1, 2, 0, 0, 1, 0))).flatten(2),
            x.mean((2, 3)).reshape(x.shape[0], 2, 2),
        )


MODELS = {
    "SmallNet": (SmallNet, 3),
    "edge_model": (edge_model, 3),
    "resnet20": (resnet20, 3),
    "two inputs": (Branches, 3),
    "float islands": (FloatBlocks, 4),
    "pyramid": (Pyramid, 3),
    "cut and reshaped": (CutAndReshaped, 3),
}


def batch_of(model: nn.Module, channels: int, size: tuple[int, int], n: int = 2) -> Batch:
    x = images(channels, size, n)
    return (x, x + 1) if isinstance(model, Branches) else x


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", MODELS)
def test_one_file_takes_images_of_any_size(name: str, tmp_path: Path) -> None:
    factory, channels = MODELS[name]
    model = shake(factory()).eval()
    sim = eq.prepare(model, batch_of(model, channels, SIZES[0]), dynamic_size=True)
    eq.calibrate(sim, [batch_of(model, channels, size) for size in SIZES]).eval()
    fixed = eq.plan(model, batch_of(model, channels, SIZES[0]))
    program = eq.convert(sim)
    assert program.integer_ops()
    # An open size costs no integer op but the view of two of them, and resizing to the size of something else.
    lost = [o for o in program.float_origins() if o.reason not in {f.reason for f in fixed.program.float_origins()}]
    wanted = {
        "cut and reshaped": [("aten.flatten.using_ints", "more than one dimension of its result depends")],
        "pyramid": [("aten.upsample_nearest2d.vec", "wanted whole multiples")],
    }.get(name, [])
    assert [o.aten for o in lost] == [aten for aten, _ in wanted]
    assert all(text in o.reason for o, (_, text) in zip(lost, wanted, strict=True))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "artifact")
    for size in SIZES:
        batch = batch_of(model, channels, size, 3)
        expected, found = call(model, batch), artifact.run(batch)
        shapes = [[t.shape for t in torch.utils._pytree.tree_leaves(y)] for y in (expected, found, sim.call(batch))]
        assert shapes[0] == shapes[1] == shapes[2]
        parity = eq.verify(artifact, program, [batch])
        assert parity.max_error_steps == 0.0
        # Outputs of the others come through float islands, which two libraries may round differently.
        assert name in ("float islands", "pyramid", "cut and reshaped") or parity.bit_identical == 1.0


@EXACT_ARITHMETIC
def test_the_float_twin_takes_any_size_too(tmp_path: Path) -> None:
    model = shake(Pyramid()).eval()
    mapping = eq.QConfigMapping().set_global(None)
    program = eq.convert(eq.prepare(model, images(3, SIZES[0]), qconfig_mapping=mapping, dynamic_size=True))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "artifact")
    for size in SIZES:
        x = images(3, size)
        # float32 sums of two libraries: a few units in the last place of values around 1.
        assert torch.allclose(artifact.run(x)["map"], model(x)["map"], rtol=1e-5, atol=1e-5)


class HangsOver(nn.Module):
    """Pooling whose last windows hang over the edge of some images, and padding up to a multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(3, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.pool(self.conv(x)), (0, -x.shape[3] % 4))


def test_what_depends_on_the_size_stays_in_float_with_the_reason() -> None:
    # At 17 x 17 no window hangs over, at other sizes one does.
    origins = eq.plan(HangsOver().eval(), images(3, (17, 17)), dynamic_size=True).program.float_origins()
    assert [(o.aten, o.reason) for o in origins] == [
        ("aten.avg_pool2d", "ceil_mode lets its last windows hang over the edge"),
        ("aten.pad", "its padding is computed"),
    ]


def test_values_are_named_by_height_and_width() -> None:
    program = eq.plan(SmallNet().eval(), images(3, (16, 16)), dynamic_size=True).program
    assert program.values["x"].shape == ("batch", 3, "height", "width")
    pooled = program.values["pool"].shape
    assert pooled[:2] == ("batch", 16)
    assert all(isinstance(size, str) for size in pooled[2:])
    assert "height" in str(pooled[2]) and "width" in str(pooled[3])


def test_a_size_that_the_example_fixes_is_refused_by_name() -> None:
    sim = eq.prepare(SmallNet(), images(3, (16, 16)), dynamic_size=True)
    with pytest.raises(InputError, match=r"is float32 \[2, 4, 16, 16\], wanted float32 \[N, 3, H, W\] as in"):
        sim(images(4, (16, 16)))


class Flat(nn.Module):
    """A linear over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_a_model_of_one_size_is_refused() -> None:
    with pytest.raises(
        CaptureError, match="^Flat does not take images of twice the example's.*: mat1 and mat2"
    ) as refused:
        eq.prepare(Flat(), images(3, (8, 8)), dynamic_size=True)
    assert str(refused.value).endswith("; prepare it without dynamic_size, for one size")


def test_an_opaque_submodule_has_the_sizes_of_the_example() -> None:
    with pytest.raises(
        CaptureError, match="^found dynamic_size with the opaque 'conv1', whose sizes .*; prepare without"
    ):
        eq.prepare(SmallNet(), images(3, (16, 16)), opaque=["conv1"], dynamic_size=True)


def test_torchscript_refuses_it(tmp_path: Path) -> None:
    x = images(3, (16, 16))
    with pytest.raises(
        PlanError, match="^input 'x' has a dynamic height and width, but a file for torchscript has one"
    ):
        eq.prepare(SmallNet(), x, "torchscript", dynamic_size=True)
    everything_float = eq.QConfigMapping().set_global(None)
    program = eq.convert(eq.prepare(SmallNet(), x, qconfig_mapping=everything_float, dynamic_size=True))
    with pytest.raises(PlanError, match="^input 'x' has a dynamic height and width, which a trace would fix: prepare"):
        eq.lower(program, "torchscript", tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []
