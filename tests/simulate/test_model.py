from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PhaseError, PlanError
from edgeqat.graph.fold_bn import folded_parameters
from edgeqat.zoo import edge_model, edge_model_with_stubs, resnet20
from models import Branches, FloatMiddle, SmallNet, WithConstants, shake

IMAGE = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LARGE = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def calibrated(model: nn.Module, x: Tensor = IMAGE) -> eq.SimulatedModel:
    return eq.calibrate(eq.prepare(model.eval(), x), [x])


def fold_by_hand(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """The user's own model with every batch norm folded into its conv and replaced by nothing."""
    folded = copy.deepcopy(model).eval()
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        assert isinstance(norm, nn.BatchNorm2d)
        weight, bias = folded_parameters(conv.weight, conv.bias, norm)
        conv.weight.data.copy_(weight)
        conv.bias = nn.Parameter(bias)
        parent, _, leaf = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), leaf, nn.Identity())
    return folded


EDGE_PAIRS = [("entry_block.0", "entry_block.1")] + [
    (f"{block}.conv.{i}", f"{block}.conv.{i + 1}")
    for block in ("residual_block", "downsample_block")
    for i in (0, 3, 6)
]
RESNET_PAIRS = [("conv1", "bn1")] + [
    (f"layer{i}.{j}.conv{k}", f"layer{i}.{j}.bn{k}") for i in (1, 2, 3) for j in (0, 1, 2) for k in (1, 2)
]
RULE_4 = {
    "edge": (edge_model, EDGE_PAIRS),
    "edge with stubs": (edge_model_with_stubs, EDGE_PAIRS),
    "resnet20": (resnet20, RESNET_PAIRS),
    "small": (SmallNet, [("conv1", "bn1"), ("conv2", "bn2")]),
}


@pytest.mark.parametrize("name", RULE_4)
def test_with_quantization_off_it_equals_the_folded_model(name: str) -> None:
    factory, pairs = RULE_4[name]
    torch.manual_seed(0)
    model = shake(factory()).eval()
    sim, folded = eq.prepare(model, LARGE), fold_by_hand(model, pairs)
    with torch.no_grad():
        assert torch.equal(sim(LARGE), folded(LARGE))
    eq.calibrate(sim, [LARGE])
    sim.set_phase("float")
    with torch.no_grad():
        assert torch.equal(sim(LARGE), folded(LARGE))
    assert sorted(sim.plan.folded) == sorted(norm for _, norm in pairs)


@pytest.mark.parametrize("name", RULE_4)
def test_exact_mode_is_the_reference(name: str) -> None:
    factory, _ = RULE_4[name]
    torch.manual_seed(0)
    sim = calibrated(shake(factory()), LARGE)
    program = eq.convert(sim)
    with sim.exact("onnxruntime/x86"):
        inside = sim(LARGE)
    assert torch.equal(inside, eq.reference(program, LARGE))
    assert not inside.requires_grad
    assert sim(LARGE).requires_grad  # outside it is the differentiable simulation again


def test_the_article_s_spelling_and_the_plain_one_give_the_same_integers() -> None:
    torch.manual_seed(0)
    plain = shake(edge_model())
    stubs = edge_model_with_stubs()
    stubs.load_state_dict(plain.state_dict())
    programs = [eq.convert(calibrated(m, LARGE)) for m in (plain, stubs)]
    assert programs[0].plan_hash == programs[1].plan_hash
    for name, const in programs[0].consts.items():
        assert const.data is not None
        assert torch.equal(const.data, programs[1].consts[name].data)
    taps = [eq.reference(program, LARGE, taps=True)[1] for program in programs]
    assert taps[0].keys() == taps[1].keys()
    assert all(torch.equal(taps[0][name], taps[1][name]) for name in taps[0])


def test_every_value_with_a_grid_has_at_most_256_levels_in_training() -> None:
    sim = calibrated(shake(SmallNet())).train()
    levels: dict[str, int] = {}
    for name, quantizer in sim.activation_quantizers().items():
        quantizer.register_forward_hook(
            lambda module, args, output, name=name: levels.__setitem__(name, output.unique().numel())
        )
    sim(IMAGE)
    gridded = {v.name for v in sim.plan.program.values.values() if v.grid is not None}
    owners = {name for name in gridded if name in sim.plan.activations}
    assert levels.keys() == owners
    assert max(levels.values()) <= 256
    assert min(levels.values()) > 8  # and it does quantize something


def test_training_moves_every_parameter_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    sim = calibrated(shake(SmallNet())).train()
    before = {name: p.detach().clone() for name, p in sim.named_parameters()}
    targets = torch.arange(8) % 10
    history = eq.fit(sim, [(IMAGE, targets)] * 20, epochs=8, lr=0.1)
    losses = [epoch.loss for epoch in history.epochs]
    assert losses[-1] < 0.5 * losses[0]
    unmoved = [name for name, p in sim.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []


def test_parameters_keep_their_names_and_frozen_ones_stay_frozen() -> None:
    model = SmallNet()
    model.conv3.weight.requires_grad_(False)
    sim = eq.prepare(model, IMAGE)
    names = {name for name, _ in sim.named_parameters()}
    gone = {name for name, _ in model.named_parameters()} - names
    assert gone == {"bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias"}
    assert names - {name for name, _ in model.named_parameters()} == {"conv1.bias"}
    assert not sim.get_parameter("conv3.weight").requires_grad


def test_state_dict_round_trip_into_a_fresh_simulation() -> None:
    model = shake(SmallNet())
    sim = calibrated(model)
    other = eq.prepare(SmallNet().eval(), IMAGE)
    other.load_state_dict(sim.state_dict())
    other.set_phase("quantized")
    with torch.no_grad():
        assert torch.equal(other(IMAGE), sim(IMAGE))
    ours, theirs = eq.convert(sim), eq.convert(other)
    assert torch.equal(eq.reference(ours, IMAGE), eq.reference(theirs, IMAGE))


def test_a_loaded_grid_replaces_the_one_in_use() -> None:
    sim, other = calibrated(shake(SmallNet())), calibrated(shake(SmallNet(), seed=5), 3 * IMAGE)
    with torch.no_grad():
        other(IMAGE)  # fills its cached bounds
        other.load_state_dict(sim.state_dict())
        assert torch.equal(other(IMAGE), sim(IMAGE))


def test_deepcopy_is_independent() -> None:
    sim = calibrated(shake(SmallNet())).eval()
    twin = copy.deepcopy(sim)
    with torch.no_grad():
        expected = sim(IMAGE)
        assert torch.equal(twin(IMAGE), expected)
        twin.get_parameter("fc.weight").mul_(2.0)
        assert torch.equal(sim(IMAGE), expected)
        assert not torch.equal(twin(IMAGE), expected)


def test_train_and_eval_switch_dropout() -> None:
    sim = calibrated(shake(SmallNet()))
    sim.eval()
    assert torch.equal(sim(IMAGE), sim(IMAGE))
    sim.train()
    assert not torch.equal(sim(IMAGE), sim(IMAGE))


def test_float_ops_between_integer_ones_run_in_every_mode() -> None:
    torch.manual_seed(0)
    model = FloatMiddle().eval()
    sim = calibrated(model)
    with torch.no_grad():
        expected = model(IMAGE)
        step = float(sim.quantizer_of("last").scale)
        assert float((sim(IMAGE) - expected).abs().max()) < 6 * step
        with sim.exact("onnxruntime/x86"):
            assert float((sim(IMAGE) - expected).abs().max()) < 6 * step


def test_several_inputs_outputs_and_calls_of_one_module() -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    sim = eq.calibrate(eq.prepare(model, (IMAGE, IMAGE)), [{"left": IMAGE, "right": IMAGE + 1}])
    program = eq.convert(sim)
    shared = [op for op in program.ops if op.weight == "shared.weight"]
    assert len(shared) == 2 and len(program.consts) == 2
    with torch.no_grad():
        found, expected = sim(IMAGE, right=IMAGE + 1), model(IMAGE, IMAGE + 1)
    assert set(found) == {"sum", "map"}
    for key in expected:
        assert float((found[key] - expected[key]).abs().max()) < 0.1 * float(expected[key].detach().abs().max())


def test_phases_refuse_what_comes_too_early() -> None:
    sim = eq.prepare(SmallNet(), IMAGE)
    assert sim.phase == "float"
    with pytest.raises(PhaseError, match=r"has no grid yet; call edgeqat\.calibrate"):
        sim.set_phase("quantized")
    with pytest.raises(PhaseError, match="before convert"):
        eq.convert(sim)
    with pytest.raises(PhaseError, match="found the phase 'int', wanted one of float, calibrating, quantized"):
        sim.set_phase("int")


def test_constants_made_in_forward_are_no_part_of_the_state() -> None:
    sim = calibrated(WithConstants())
    assert {name for name in sim.state_dict() if not name.startswith("quantizers.")} == {"conv.weight", "conv.bias"}


class OneNormForTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))


def test_a_batch_norm_that_follows_two_convs_is_folded_into_both() -> None:
    torch.manual_seed(0)
    model = shake(OneNormForTwo()).eval()
    sim = eq.prepare(model, IMAGE)
    assert sim.plan.folded == ("norm", "norm") and "norm.weight" not in sim.state_dict()
    with torch.no_grad():
        # Two folds, each a float32 rounding of 4 products: relative to the largest value.
        assert torch.allclose(sim(IMAGE), model(IMAGE), rtol=0, atol=1e-6 * float(model(IMAGE).abs().max()))


class Collides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plan = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plan(x)


def test_a_name_that_collides_with_ours_is_refused() -> None:
    with pytest.raises(PlanError, match="the model's own 'plan' collides"):
        eq.prepare(Collides(), IMAGE)


def test_printing_shows_regions_grids_and_observers() -> None:
    text = repr(calibrated(shake(SmallNet())))
    assert "(conv1): conv [conv1 (Conv2d) + bn1 (BatchNorm2d)" in text
    assert "observer=histogram, relu" in text and "scale=" in text


def test_a_dead_channel_with_a_large_bias_fits_int32() -> None:
    torch.manual_seed(0)
    model = SmallNet().eval()
    model.conv3.weight.data[0] = 1e-12
    model.conv3.bias.data[0] = 50.0
    program = eq.convert(calibrated(model))
    bias = next(op.bias for op in program.ops if op.name == "conv3")
    assert bias is not None and 2**29 < int(bias.abs().max()) <= 2**30
    _, taps = eq.reference(program, IMAGE, taps=True)
    scale, zero_point = program.grid_of("conv3").per_tensor()
    # The channel is its bias: half a step of rounding, and at most a step of clipping by the histogram's range.
    assert float(((taps["conv3"][:, 0] - zero_point) * scale - 50.0).abs().max()) <= 1.5 * scale


def test_diverged_weights_are_refused_by_name() -> None:
    sim = calibrated(shake(SmallNet()))
    sim.get_parameter("conv2.weight").data[0] = float("nan")
    with pytest.raises(PlanError, match=r"conv2\.weight holds NaN"):
        eq.convert(sim)
