"""A simulation is an ordinary module: autocast, compile, channels-last, accumulation and DDP, in every mode."""

from __future__ import annotations

import copy
import datetime
import pickle  # noqa: TID251  only to see it refused
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import edgeqat as eq
from edgeqat.errors import PhaseError, PlanError
from edgeqat.simulate.fake_quant import ActivationQuantizer
from models import SmallNet, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(8) % 10
LR = 0.001

SUMMATION = 1e-4
"""Gradients whose sums are taken in another order: float32 rounding, relative to the largest of a parameter."""


def make(batch_norm: str = "fold", learned: bool = False) -> eq.SimulatedModel:
    torch.manual_seed(0)
    qconfig = eq.QConfig(eq.ActivationConfig(learned=learned), eq.WeightConfig(learned=learned))
    model = shake(SmallNet())
    model.drop.p = 0.0
    sim = eq.prepare(model.eval(), IMAGE, qconfig_mapping=qconfig, batch_norm=batch_norm)
    return eq.calibrate(sim, [IMAGE]).train()


def backward(model: nn.Module, x: Tensor, targets: Tensor, weight: float = 1.0) -> None:
    (weight * nn.functional.cross_entropy(model(x), targets)).backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        assert float((found[name] - gradient).abs().max()) <= SUMMATION * largest + 1e-7, name


MODES = [("fold", False), ("fold", True), ("live", False), ("live", True)]
IDS = ["fold", "fold learned", "live", "live learned"]


# Dynamo itself instantiates autograd functions while it traces them.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("batch_norm", "learned"), MODES, ids=IDS)
def test_it_compiles_whole_and_gives_the_same_bits(batch_norm: str, learned: bool) -> None:
    sim = make(batch_norm, learned)
    twin = copy.deepcopy(sim)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IMAGE), sim(IMAGE))
    backward(sim, IMAGE, TARGETS)
    backward(compiled, IMAGE, TARGETS)
    assert_close(gradients(twin), gradients(sim))


@pytest.mark.parametrize(("batch_norm", "learned"), MODES, ids=IDS)
def test_a_loaded_state_gives_the_same_bits_and_the_phase(batch_norm: str, learned: bool) -> None:
    sim = make(batch_norm, learned)
    eq.fit(sim, [(IMAGE, TARGETS)], epochs=2, lr=0.01)
    qconfig = eq.QConfig(eq.ActivationConfig(learned=learned), eq.WeightConfig(learned=learned))
    other = eq.prepare(SmallNet().eval(), IMAGE, qconfig_mapping=qconfig, batch_norm=batch_norm)
    assert other.phase == "float"
    other.load_state_dict(sim.state_dict())
    assert other.phase == "quantized"
    with torch.no_grad():
        assert torch.equal(other.eval()(IMAGE), sim.eval()(IMAGE))
    assert eq.convert(other).grid_hash == eq.convert(sim).grid_hash
    other.load_state_dict(sim.state_dict())
    assert other.phase == "converted"


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_under_autocast_quantizers_compute_in_float32(learned: bool) -> None:
    sim = make(learned=learned)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, quantizer in sim.activation_quantizers().items():
        quantizer.register_forward_hook(lambda m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        backward(sim, IMAGE, TARGETS)
    halves = 0
    for name, (x, out) in seen.items():
        quantizer = sim.quantizer_of(name)
        assert isinstance(quantizer, ActivationQuantizer) and out.dtype == x.dtype
        halves += out.dtype == torch.bfloat16
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            assert torch.equal(out, quantizer(x.float()).to(out.dtype)), name
        assert out.unique().numel() <= 256
    assert halves >= 3
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) for p in sim.parameters())
    with sim.exact("onnxruntime/x86"), torch.autocast("cpu", torch.bfloat16):
        assert sim(IMAGE).dtype == torch.float32


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_channels_last_computes_the_same(learned: bool) -> None:
    sim = make(learned=learned)
    twin = copy.deepcopy(sim).to(memory_format=torch.channels_last)
    backward(sim, IMAGE, TARGETS)
    backward(twin, IMAGE.to(memory_format=torch.channels_last), TARGETS)
    ours, theirs = gradients(twin), gradients(sim)
    # Convolutions sum in another order, so that a few values fall on the other side of a tie: a step in some of them.
    for name, gradient in theirs.items():
        assert float((ours[name] - gradient).norm()) <= 0.05 * float(gradient.norm()) + 1e-6, name


def test_accumulated_gradients_are_those_of_the_whole_batch() -> None:
    sim = make()
    twin = copy.deepcopy(sim)
    backward(sim, IMAGE, TARGETS)
    for half in (slice(0, 4), slice(4, 8)):
        backward(twin, IMAGE[half], TARGETS[half], weight=0.5)
    assert_close(gradients(twin), gradients(sim))


def test_frozen_parameters_get_no_gradient() -> None:
    sim = make(learned=True).requires_grad_(False)
    sim.get_parameter("fc.weight").requires_grad_(True)
    backward(sim, IMAGE, TARGETS)
    assert list(gradients(sim)) == ["fc.weight"]


def test_no_observer_runs_in_a_training_step() -> None:
    sim = make()
    assert all(quantizer.observer is None for quantizer in sim.activation_quantizers().values())
    before = {name: t.clone() for name, t in sim.named_buffers()}
    backward(sim, IMAGE, TARGETS)
    assert all(torch.equal(t, before[name]) for name, t in sim.named_buffers())


def _train_rank(rank: int, world: int, place: str, learned: bool, state: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)
    sim = make(learned=learned)
    sim.load_state_dict(state)
    meet, patience = f"file://{place}/meet", datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=patience)
    model = DistributedDataParallel(sim)
    half = slice(4 * rank, 4 * rank + 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, IMAGE[half], TARGETS[half])
        optimizer.step()
    torch.save({name: p.detach() for name, p in sim.named_parameters()}, f"{place}/{rank}.pt")
    del model
    torch.distributed.barrier()  # a rank that leaves while the other still receives can leave it waiting
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("learned", [False, True], ids=["frozen", "learned"])
def test_two_ranks_train_as_one(tmp_path: Path, learned: bool) -> None:
    sim = make(learned=learned)
    state = {name: t.clone() for name, t in sim.state_dict().items()}
    torch.multiprocessing.spawn(_train_rank, (2, str(tmp_path), learned, state), nprocs=2)
    optimizer = torch.optim.SGD(sim.parameters(), lr=LR)
    for _ in range(2):
        optimizer.zero_grad()
        backward(sim, IMAGE, TARGETS)
        optimizer.step()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, parameter in sim.named_parameters():
        assert torch.equal(ranks[0][name], ranks[1][name])
        moved = float((parameter.detach() - state[name]).abs().max())
        assert float((ranks[0][name] - parameter.detach()).abs().max()) <= 1e-3 * moved + 1e-7, name


def test_grids_that_ddp_wrote_are_in_use_from_train_on() -> None:
    """It gives the buffers of the first process to all: of simulations calibrated apart, the others change."""
    first, other = make(), make()
    eq.calibrate(other, [3 * IMAGE])
    with torch.no_grad():
        for buffer, given in zip(other.buffers(), first.buffers(), strict=True):
            buffer.copy_(given)
    assert torch.equal(other.train()(IMAGE), first(IMAGE))


@pytest.mark.parametrize("save", [torch.save, pickle.dump], ids=["torch", "pickle"])
def test_pickling_it_says_what_to_do_instead(save: Callable[[object, BytesIO], None]) -> None:
    for sim in (make(), copy.deepcopy(make())):
        with pytest.raises(PhaseError, match=r"^a simulation cannot be pickled: save sim.state_dict\(\), and load it"):
            save(sim, BytesIO())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moved_to_another_type_it_says_so(dtype: torch.dtype) -> None:
    """As trainers do on request; its grids are then not those that were calibrated."""
    sim, name = make().to(dtype), str(dtype).removeprefix("torch.")
    words = f"^the grid of x:quantized is {name}, wanted float32: a simulation is trained in float32, or under torch"
    with pytest.raises(PlanError, match=words):
        eq.convert(sim)
    with pytest.raises(PlanError, match=words), sim.exact("onnxruntime/x86"):
        pass
