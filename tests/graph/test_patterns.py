from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.program import Kind
from edgeqat.reporting.plan_print import print_plan
from fusion_models import Blocks, ConvBnSilu, HardBlock, RepBlock, SineBlock, SqueezeExcite, one_conv
from helpers import EXACT_ARITHMETIC
from models import shake

IMAGE = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))
SILU = eq.FusionPattern("conv-bn-silu", ops=("conv2d", "batch_norm", "silu"))
SILU_MODULES = eq.FusionPattern("conv-bn-silu", modules=(nn.Conv2d, nn.BatchNorm2d, nn.SiLU))
HARDSWISH = eq.FusionPattern("conv-bn-hardswish", ops=("conv2d", "batch_norm", "hardswish"))
SQUEEZE = eq.FusionPattern("squeeze-excite", modules=SqueezeExcite)
REP = eq.FusionPattern("repvgg", modules=RepBlock, replace=one_conv)
SINE = eq.FusionPattern("sine", modules="SineBlock")

EXAMPLES: dict[str, tuple[Callable[[], nn.Module], eq.FusionPattern, str]] = {
    "conv-BN-SiLU by ops": (lambda: ConvBnSilu(8, 8), SILU, "blocks.0.0 (conv-bn-silu)"),
    "conv-BN-SiLU by modules": (lambda: ConvBnSilu(8, 8), SILU_MODULES, "blocks.0.0 (conv-bn-silu)"),
    "conv-BN-hardswish": (lambda: HardBlock(8, 8), HARDSWISH, "blocks.0.conv (conv-bn-hardswish)"),
    "squeeze-excite": (lambda: SqueezeExcite(8), SQUEEZE, "blocks.0 (squeeze-excite)"),
    "RepVGG": (lambda: RepBlock(8), REP, ""),
}


def network(*blocks: nn.Module, channels: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return shake(Blocks(*blocks, channels=channels)).eval()


def groups(planned: eq.Plan) -> dict[str, list[str]]:
    """The kinds of the ops of each block."""
    found: dict[str, list[str]] = {}
    for row in planned.rows():
        found.setdefault(row.group, []).append(row.kind)
    return found


@EXACT_ARITHMETIC
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_block_is_trained_lowered_and_proved(name: str, tmp_path: Path) -> None:
    make, pattern, described = EXAMPLES[name]
    torch.manual_seed(0)
    model = network(make())
    sim = eq.prepare(model, IMAGE, fusions=[pattern])
    assert sim.plan.program.float_origins() == []
    assert described in groups(sim.plan)
    assert f"in {described}" in repr(sim) or not described
    eq.calibrate(sim, [IMAGE])
    eq.fit(sim, [(IMAGE, torch.tensor([0, 1, 2, 3]))], epochs=1, lr=0.01)
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "out")
    parity = eq.verify(artifact, program, [torch.randn(8, 3, 12, 12)])
    assert (parity.bit_identical, parity.max_error_steps) == (1.0, 0.0)


def test_the_ops_of_a_block_are_those_that_the_user_wrote() -> None:
    planned = eq.plan(network(ConvBnSilu(8, 8), HardBlock(8, 8)), IMAGE, fusions=[SILU, HARDSWISH])
    found = groups(planned)
    assert found["blocks.0.0 (conv-bn-silu)"] == ["conv", "lookup", "mul"]
    assert found["blocks.1.conv (conv-bn-hardswish)"] == ["conv", "lookup", "mul"]
    assert "in blocks.0.0 (conv-bn-silu)" in str(planned)


def test_an_alternative_of_ops() -> None:
    either = eq.FusionPattern("conv-bn-act", ops=("conv2d", "batch_norm", "silu|hardswish"))
    assert len(groups(eq.plan(network(ConvBnSilu(8, 8), HardBlock(8, 8)), IMAGE, fusions=[either]))) == 3


def test_a_block_with_an_op_of_no_integer_form_stays_in_float_as_a_whole() -> None:
    model = network(SineBlock(8))
    kinds = [op.kind for op in eq.plan(model, IMAGE).program.ops]
    assert kinds.count(Kind.CONV) == 3 and kinds.count(Kind.FLOAT) == 1  # without the pattern it is cut in three
    planned = eq.plan(model, IMAGE, fusions=[SINE])
    kinds = [op.kind for op in planned.program.ops]
    assert kinds.count(Kind.CONV) == 1 and kinds.count(Kind.FLOAT) == 1
    inside = [row for row in planned.rows() if row.group]
    assert [(row.kind, row.runs) for row in inside] == [("conv2d", "float"), ("sin", "float"), ("conv2d", "float")]
    whole = "its block blocks.0 (sine) stays in float as a whole, because of blocks.0.sin: "
    assert {row.reason for row in inside} == {whole + "aten.sin has no integer form here"}


def test_a_target_without_one_kernel_of_a_block_runs_it_in_float_as_a_whole() -> None:
    class Up(nn.Sequential):
        pass

    up = eq.FusionPattern("up", modules=Up)
    model = network(Up(nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 8, 2)))
    planned = eq.plan(model, IMAGE, target="torchscript", fusions=[up])
    assert {row.runs for row in planned.rows() if row.group} == {"float"}
    runs = [row.runs for row in eq.plan(model, IMAGE, target="torchscript").rows() if row.kind.startswith("conv")]
    assert runs.count("float") == 1  # torch has no exact integer transposed conv


def test_a_block_behind_float_ops_is_in_integers_from_its_first_op_on() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.se = SqueezeExcite(4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.se(torch.sin(x)))

    image = torch.randn(2, 4, 6, 6)
    alone = {row.op: row.runs for row in eq.plan(Behind(), image).rows()}
    assert alone["se"] == "float"  # the pool, whose input is float
    planned = eq.plan(Behind(), image, fusions=[SQUEEZE])
    kinds = [op.kind.value for op in planned.program.ops]
    inside = ["average_pool", "conv", "lookup", "mul", "conv", "lookup", "mul"]
    assert kinds == ["float", "quantize", *inside, "dequantize", "float"]


@pytest.mark.parametrize(
    ("mapping", "runs"),
    [
        (eq.QConfigMapping().set_object_type(SqueezeExcite, None), {"float"}),
        (eq.QConfigMapping().set_module_name("blocks.0", None), {"float"}),
        (eq.QConfigMapping().set_module_name_regex(r"blocks\.\d", None), {"float"}),
        (eq.QConfigMapping().set_module_name("blocks.0.reduce", None), {"float"}),
        (eq.QConfigMapping().set_global(None).set_object_type("SqueezeExcite", eq.QConfig()), {"INT8"}),
        (eq.QConfigMapping().set_object_type(nn.Conv2d, None), {"INT8"}),
    ],
    ids=["type", "name", "regex", "inner name", "only this type", "inner type"],
)
def test_a_block_has_one_qconfig(mapping: eq.QConfigMapping, runs: set[str]) -> None:
    planned = eq.plan(network(SqueezeExcite(8)), IMAGE, fusions=[SQUEEZE], qconfig_mapping=mapping)
    assert {row.runs for row in planned.rows() if row.group} == runs


def test_a_rule_that_names_an_inner_module_wins_there() -> None:
    narrow, narrower = (eq.QConfig(weight=eq.WeightConfig(bits=bits)) for bits in (6, 4))
    mapping = eq.QConfigMapping().set_object_type(SqueezeExcite, narrow).set_module_name("blocks.0.expand", narrower)
    planned = eq.plan(network(SqueezeExcite(8)), IMAGE, fusions=[SQUEEZE], qconfig_mapping=mapping)
    bits = {name: config.bits for name, config in planned.weights.items()}
    assert bits["blocks.0.reduce.weight"] == 6 and bits["blocks.0.expand.weight"] == 4
    assert bits["stem.weight"] == 8


def test_a_sequence_has_the_qconfig_of_the_module_that_holds_it() -> None:
    mapping = eq.QConfigMapping().set_object_type(ConvBnSilu, None)
    planned = eq.plan(network(ConvBnSilu(8, 8)), IMAGE, fusions=[SILU], qconfig_mapping=mapping)
    assert {row.runs for row in planned.rows() if row.group} == {"float"}


def test_blocks_that_share_a_batch_norm_stay_in_float_together() -> None:
    class Shared(nn.Module):
        """Two blocks with one batch norm, and only one of them has an integer form as a whole."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first, self.last = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(self.norm(self.last(F.silu(self.norm(self.first(x))))))

    sine = eq.FusionPattern("conv-bn-sine", ops=("conv2d", "batch_norm", "sin"))
    planned = eq.plan(Shared(), IMAGE, fusions=[SILU, sine])
    assert planned.folded == ()
    assert {row.runs for row in planned.rows()} == {"float"}
    reasons = {row.group: row.reason for row in planned.rows()}
    assert "because of first: its norm also follows last" in reasons["first (conv-bn-silu)"]
    assert "because of sin: aten.sin has no integer form here" in reasons["last (conv-bn-sine)"]
    assert set(groups(eq.plan(Shared(), IMAGE, fusions=[SILU]))) == {"", "first (conv-bn-silu)"}


def test_a_check_sees_the_block_and_its_refusal_is_reported() -> None:
    seen: list[eq.FusionMatch] = []

    def check(match: eq.FusionMatch) -> str:
        seen.append(match)
        return "" if match.outputs[0][1] == 8 else f"{match.outputs[0][1]} channels are too few"

    model = network(SqueezeExcite(8), nn.Conv2d(8, 4, 1), SqueezeExcite(4), channels=8)
    model.head = nn.Linear(4, 5)
    pattern = eq.FusionPattern("squeeze-excite", modules="SqueezeExcite", check=check)
    planned = eq.plan(model, IMAGE, fusions=[pattern])
    assert set(groups(planned)) == {"", "blocks.0 (squeeze-excite)"}
    (refusal,) = planned.refusals
    assert (refusal.name, refusal.reason) == (
        "blocks.2",
        "refused by the check of squeeze-excite: 4 channels are too few",
    )
    assert f"not fused blocks.2: {refusal.reason}" in str(planned)
    first = seen[0]
    assert (first.pattern, first.name) == ("squeeze-excite", "blocks.0")
    assert list(first.modules) == ["blocks.0", "blocks.0.reduce", "blocks.0.act", "blocks.0.expand"]
    assert isinstance(first.modules["blocks.0.expand"], nn.Conv2d)
    assert first.inputs == first.outputs == (("batch", 8, 12, 12),)


def test_a_place_with_another_reader_is_refused() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.act = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            return self.act(y) + y

    for pattern in (SILU, SILU_MODULES):
        planned = eq.plan(Read(), IMAGE, fusions=[pattern])
        assert set(groups(planned)) == {""}
        (refusal,) = planned.refusals
        assert refusal.reason.startswith("not grouped as conv-bn-silu: add reads it too")


def test_an_op_belongs_to_the_block_of_the_first_pattern() -> None:
    outer = eq.FusionPattern("outer", modules=Blocks)
    model = nn.Sequential(network(SqueezeExcite(8)), nn.Linear(5, 5))
    planned = eq.plan(model, IMAGE, fusions=[outer, SQUEEZE])
    assert set(groups(planned)) == {"", "0 (outer)"}
    assert [r.reason for r in planned.refusals] == [
        "not grouped as squeeze-excite: some of its ops belong to 0 (outer)"
    ]
    assert set(groups(eq.plan(model, IMAGE, fusions=[SQUEEZE]))) == {"", "0.blocks.0 (squeeze-excite)"}


def test_a_module_called_twice_is_two_blocks() -> None:
    block = SqueezeExcite(8)
    sim = eq.prepare(network(block, block), IMAGE, fusions=[SQUEEZE])
    assert len(sim.fused.groups) == 2


def test_patterns_and_lists_of_names_mix() -> None:
    lists = [["blocks.0.0", "blocks.0.1"]]
    assert len(groups(eq.plan(network(ConvBnSilu(8, 8)), IMAGE, fusions=[*lists, SILU]))) == 2
    with pytest.raises(PlanError, match="these modules are not one conv or linear"):
        eq.plan(network(ConvBnSilu(8, 8)), IMAGE, fusions=[SILU, ["blocks.0.0", "blocks.0.2"]])


def test_a_replaced_block_computes_the_same_and_stays_replaced() -> None:
    model = network(RepBlock(8))
    sim = eq.prepare(model, IMAGE, fusions=[REP])
    assert [op.kind.value for op in sim.plan.program.ops].count("conv") == 2
    back = sim.to_float()
    assert isinstance(back.get_submodule("blocks.0"), nn.Sequential)
    with torch.no_grad():
        expected = model(IMAGE)
        for found in (sim(IMAGE), back(IMAGE)):
            # float32 sums of some 200 products in another order
            assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert isinstance(model.get_submodule("blocks.0"), RepBlock)
    assert not any(module.training for module in back.modules())
    trained = eq.prepare(model.train(), IMAGE, fusions=[REP])
    assert trained.training and all(module.training for module in trained.to_float().modules())


def test_a_check_can_refuse_a_replacement() -> None:
    pattern = eq.FusionPattern("repvgg", modules=RepBlock, replace=one_conv, check=lambda match: f"{match.inputs}")
    planned = eq.plan(network(RepBlock(8)), IMAGE, fusions=[pattern])
    assert [(r.name, r.reason) for r in planned.refusals] == [
        ("blocks.0", "refused by the check of repvgg: (('batch', 8, 12, 12),)")
    ]


def halved(block: nn.Module) -> nn.Module:
    made = one_conv(block)
    made[0].weight.data.mul_(0.5)  # type: ignore[index]
    return made


def fails(block: nn.Module) -> nn.Module:
    raise ValueError("no\nsuch thing")


REP_BLOCK = "the replacement of blocks.0 by fusion pattern 'p' "


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"modules": "RepBlok"},
            "fusion pattern 'p' matches nothing: the model has no RepBlok; did you mean RepBlock or ",
        ),
        ({"modules": SqueezeExcite}, "matches nothing: the model has no SqueezeExcite; found "),
        ({"ops": ("conv2d", "silo")}, "the model has no silo; "),
        ({"ops": ("conv2d", "relu", "add")}, "nowhere do conv2d, relu, add follow one another"),
        ({"modules": (nn.Conv2d, nn.Linear)}, "nowhere do Conv2d, Linear follow one another"),
        ({"modules": "RepBlok", "replace": one_conv}, "the model has no RepBlok; did you mean RepBlock or "),
        ({"modules": RepBlock, "replace": halved}, REP_BLOCK + "computes something else: outputs of up to "),
        ({"modules": RepBlock, "replace": lambda m: nn.Conv2d(8, 4, 1)}, "it returns ((4, 4, 12, 12), torch.float32)"),
        ({"modules": RepBlock, "replace": fails}, REP_BLOCK + "failed: ValueError: no such thing"),
        ({"modules": RepBlock, "replace": lambda m: None}, REP_BLOCK + "is a NoneType, wanted an nn.Module"),
        ({"modules": RepBlock, "check": lambda m: True}, "returned True for blocks.0, wanted a text"),
        ({"modules": RepBlock, "check": fails}, "failed on blocks.0: ValueError: no such thing"),
        ({}, "FusionPattern 'p': found neither, wanted modules or ops"),
        ({"modules": RepBlock, "ops": ("add",)}, "found both, wanted modules or ops"),
        ({"ops": ("add",), "replace": one_conv}, "replace wants modules to be one class or its name"),
        ({"modules": (RepBlock,), "replace": one_conv}, "replace wants modules to be one class or its name"),
        ({"modules": 3}, "found 3 among its modules, wanted an nn.Module class or its name"),
        ({"modules": ()}, "found an empty sequence"),
        ({"ops": "conv2d"}, "found ops='conv2d', wanted a tuple of ATen names"),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else "",
)
def test_a_pattern_that_cannot_be_used_is_refused_in_one_line(settings: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError) as caught:
        eq.plan(network(RepBlock(8)), IMAGE, fusions=[eq.FusionPattern("p", **settings)])  # type: ignore[arg-type]
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fusion", ["conv1", 3, ["conv1", 4]])
def test_what_is_no_fusion_is_refused(fusion: object) -> None:
    with pytest.raises(PlanError, match="wanted a FusionPattern or a list of module names"):
        eq.plan(network(RepBlock(8)), IMAGE, fusions=[fusion])  # type: ignore[list-item]


@pytest.mark.parametrize("columns", [80, 250])
def test_inspect_says_which_block_an_op_belongs_to(columns: int) -> None:
    text = io.StringIO()
    print_plan(
        eq.plan(network(SqueezeExcite(8)), IMAGE, fusions=[SQUEEZE]),
        Console(file=text, width=columns, highlight=False),
    )
    words = " ".join(text.getvalue().split())
    listed = "block blocks.0 (squeeze-excite): blocks.0.adaptive_avg_pool2d, blocks.0.reduce," in words
    assert listed == (columns == 80)
    assert ("fused with block why" in words) == (columns == 250)
    assert words.count("blocks.0 (squeeze-excite)") == (1 if columns == 80 else 7)


def test_a_dropout_in_a_block_is_no_reason_for_float() -> None:
    block = nn.Sequential(nn.Dropout(0.1), nn.Conv2d(8, 8, 1), nn.Dropout(0.1), nn.SiLU())
    pattern = eq.FusionPattern("dropped", modules=nn.Sequential)
    planned = eq.plan(network(block), IMAGE, fusions=[pattern])
    assert planned.program.float_origins() == []


def test_functional_ops_of_one_module_are_told_apart() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(F.conv2d(F.silu(F.conv2d(x, self.weight)), self.weight))

    pattern = eq.FusionPattern("conv-silu", ops=("aten.conv2d", "silu_"))
    found = groups(eq.plan(Functional(), IMAGE, fusions=[pattern]))
    assert {"conv2d (conv-silu)", "conv2d_1 (conv-silu)"} <= set(found)


class OneOp(nn.Module):
    """An op that a ReLU follows."""

    def __init__(self, op: Callable[[Tensor], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.op, self.modules_in_front = op, nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.op(self.modules_in_front(x)))


@pytest.mark.parametrize(
    ("op", "modules", "kinds"),
    [
        (lambda x: x, [nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)], ["conv_transpose"]),
        (lambda x: x, [nn.Flatten(), nn.Linear(432, 4), nn.BatchNorm1d(4)], ["view", "linear"]),
        (lambda x: x + x.flip(0), [nn.Conv2d(3, 3, 1)], ["conv", "add"]),
        (lambda x: x * x.flip(0), [nn.Conv2d(3, 3, 1)], ["conv", "mul"]),
        (lambda x: torch.cat([x, x], 1), [nn.Conv2d(3, 3, 1)], ["conv", "concat"]),
        (lambda x: x + 1.0, [nn.Conv2d(3, 3, 1)], ["conv", "lookup", "clamp"]),
    ],
    ids=["conv_transpose-bn-relu", "linear-bn-relu", "add-relu", "mul-relu", "concat-relu", "a table and a clamp"],
)
def test_the_built_in_patterns(op: Callable[[Tensor], Tensor], modules: list[nn.Module], kinds: list[str]) -> None:
    planned = eq.plan(OneOp(op, *modules), IMAGE)
    moved = ("quantize", "dequantize", "float")  # flip, and what is before a linear
    assert [o.kind.value for o in planned.program.ops if o.kind.value not in moved] == kinds
    assert planned.refusals == ()
