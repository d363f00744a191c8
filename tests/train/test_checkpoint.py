"""Weights on disk; how foreign files are refused is in tests/test_factory.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import ModelError, OutputError
from edgeqat.train.checkpoint import load_weights, save_weights
from models import SmallNet, shake


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    assert list(found.state_dict()) == list(wanted.state_dict())
    for name, tensor in wanted.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor), name


def test_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = shake(SmallNet()), SmallNet()
    model.conv1.weight.data = model.conv1.weight.data.to(memory_format=torch.channels_last)
    path = tmp_path / "deep" / "model.safetensors"
    save_weights(model, path)
    assert not torch.equal(other.fc.weight, model.fc.weight)
    load_weights(other, path)
    assert_same(other, model)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    model = SmallNet()
    save_weights(model, tmp_path / "a.safetensors")
    save_weights(model.train(), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "tied.safetensors")
    load_weights(other, tmp_path / "tied.safetensors")
    assert_same(other, model)
    assert other.first.weight is other.second.weight
    assert not torch.equal(Tied().first.weight, model.first.weight)


def test_simulation_round_trips_with_its_ranges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, batch = shake(SmallNet()).eval(), torch.randn(4, 3, 8, 8)
    sim = eq.calibrate(eq.prepare(model, batch), [batch])
    save_weights(sim, tmp_path / "sim.safetensors")
    other = eq.calibrate(eq.prepare(shake(SmallNet(), seed=1).eval(), batch), [batch * 3])
    assert not torch.equal(other(batch), sim(batch))
    load_weights(other, tmp_path / "sim.safetensors")
    assert torch.equal(other(batch), sim(batch))


def test_a_file_without_batch_counters_fits(tmp_path: Path) -> None:
    model = shake(SmallNet())
    found = {k: v.clone() for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    safetensors.torch.save_file(found, tmp_path / "w.safetensors")
    other = SmallNet()
    load_weights(other, tmp_path / "w.safetensors")
    assert_same(other, model)


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model, before = SmallNet(), SmallNet()
    before.load_state_dict(model.state_dict())
    found = {k: v.clone() + 1 for k, v in model.state_dict().items()}
    found["fc.bias"] = torch.zeros(11)
    safetensors.torch.save_file(found, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"fc\.bias has shape \(11,\), wanted \(10,\)"):
        load_weights(model, tmp_path / "w.safetensors")
    assert_same(model, before)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(SmallNet(), path)
    old = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
        with pytest.raises(OutputError) as caught:
            save_weights(shake(SmallNet()), path)
    assert str(caught.value) == f"cannot write {path}: No space left on device; choose another place or free space"
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    save_weights(shake(SmallNet()), path)
    assert path.read_bytes() != old
