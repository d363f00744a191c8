from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.program import Kind, QuantizedProgram
from edgeqat.zoo import edge_model, resnet20
from models import Branches, FloatMiddle, SmallNet

IMAGE = torch.zeros(2, 3, 16, 16)


def kinds(program: QuantizedProgram) -> list[str]:
    return [op.kind.value for op in program.ops]


def test_a_conv_net_is_integer_from_the_first_quantize_to_the_logits() -> None:
    program = eq.plan(SmallNet(), IMAGE).program
    assert kinds(program) == (
        ["quantize", "conv", "conv", "add", "slice", "slice", "pad", "conv", "add", "max_pool"]
        + ["average_pool", "view", "linear"]
    )
    assert program.float_origins() == []
    assert program.values["fc"].grid is None  # ONNX Runtime's last linear gives float
    assert program.outputs == ("fc",)


def test_what_moves_integers_shares_its_input_s_grid() -> None:
    values = eq.plan(SmallNet(), IMAGE).program.values
    assert values["slice"].grid is values["slice_1"].grid is values["pad"].grid is values["add"].grid
    assert values["pool"].grid is values["add_1"].grid
    assert values["mean"].grid is values["mean:pooled"].grid
    assert values["mean:pooled"].grid is not values["pool"].grid


def test_every_float_op_has_its_reason() -> None:
    planned = eq.plan(FloatMiddle(), IMAGE)
    reasons = {row.kind: row.reason for row in planned.rows() if row.runs == "float"}
    assert reasons["sin"] == "aten.sin has no integer form here"
    assert reasons["mul.Tensor"] == "its input is float"
    assert kinds(planned.program) == ["quantize", "conv", "dequantize", "float", "quantize", "conv", "dequantize"]


def test_a_float_model_is_one_island() -> None:
    planned = eq.plan(edge_model(), torch.zeros(1, 3, 32, 32), qconfig_mapping=eq.QConfigMapping().set_global(None))
    assert kinds(planned.program) == ["float"]
    assert {o.reason for o in planned.program.float_origins()} == {"its QConfig is None"}
    assert planned.folded == ()


def test_a_sensitive_layer_is_left_in_float() -> None:
    mapping = eq.QConfigMapping().set_module_name("fc", None)
    program = eq.plan(edge_model(), torch.zeros(1, 3, 32, 32), qconfig_mapping=mapping).program
    assert kinds(program)[-2:] == ["dequantize", "float"]
    assert [o.module for o in program.float_origins()] == ["fc"]


def test_float_islands_are_joined_where_they_touch() -> None:
    mapping = eq.QConfigMapping().set_object_type(nn.Conv2d, None)
    program = eq.plan(SmallNet(), IMAGE, qconfig_mapping=mapping).program
    assert kinds(program).count("float") == 1
    assert kinds(program)[-2:] == ["quantize", "linear"]


def test_several_outputs_are_dequantized_once_each() -> None:
    program = eq.plan(Branches(), (IMAGE, IMAGE)).program
    assert len(program.inputs) == 2 and len(program.outputs) == 2
    assert kinds(program).count("dequantize") == 2


def test_the_hash_depends_on_the_plan_and_not_on_names() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, image: Tensor) -> Tensor:
            return torch.relu(self.conv(image))

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.conv(x))

    assert eq.plan(Renamed(), IMAGE).program.plan_hash == eq.plan(Other(), IMAGE).program.plan_hash
    six_bits = eq.QConfig(weight=eq.WeightConfig(bits=6))
    per_tensor = eq.QConfig(weight=eq.WeightConfig(per_channel=False))
    hashes = {eq.plan(Other(), IMAGE, qconfig_mapping=q).program.plan_hash for q in (None, six_bits, per_tensor)}
    assert len(hashes) == 3


def test_a_plan_prints_compares_and_serialises() -> None:
    one = eq.plan(edge_model(), torch.zeros(1, 3, 32, 32))
    two = eq.plan(
        edge_model(), torch.zeros(1, 3, 32, 32), qconfig_mapping=eq.QConfigMapping().set_module_name("fc", None)
    )
    assert one.diff(one) == ""
    assert "-  fc: linear INT8" in one.diff(two) and "+  fc: linear float" in one.diff(two)
    data = json.loads(json.dumps(one.to_dict()))
    assert data["plan_hash"] == one.program.plan_hash and len(data["ops"]) == len(one.program.ops)
    assert "folded entry_block.1" in str(one)


def test_resnet20_is_integer_throughout() -> None:
    planned = eq.plan(resnet20(), torch.zeros(1, 3, 32, 32))
    found = kinds(planned.program)
    assert (found.count("conv"), found.count("add"), found.count("float")) == (19, 9, 0)
    assert all(row.reason for row in planned.rows())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "abacus"}, "found the runtime 'abacus', wanted one of onnxruntime"),
        ({"target": []}, "found no target"),
        (
            {"qconfig_mapping": eq.QConfig(activation=eq.ActivationConfig(bits=4)), "target": "torchscript"},
            "found 4-bit activations, but torchscript takes 8 bits",
        ),
        (
            {"qconfig_mapping": eq.QConfigMapping().set_module_name("conv9", None)},
            "the rule for module 'conv9' matches nothing; did you mean",
        ),
    ],
    ids=["unknown", "none", "bits", "no match"],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        eq.plan(SmallNet(), IMAGE, **settings)  # type: ignore[arg-type]


def test_one_weight_with_two_settings_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    mapping = eq.QConfigMapping().set_module_name("b", eq.QConfig(weight=eq.WeightConfig(bits=4)))
    message = r"^b.weight is used by layers with different weight settings; give them one QConfig$"
    with pytest.raises(PlanError, match=message):
        eq.plan(Tied(), IMAGE, qconfig_mapping=mapping)
    tied = eq.plan(Tied(), IMAGE).program
    assert len(tied.consts) == 1 and [op.kind for op in tied.ops].count(Kind.CONV) == 2


def test_targets_lists_what_each_runtime_allows() -> None:
    assert "uint8 activations" in eq.targets()["onnxruntime"]


# Several targets.


def test_torchscript_quantizes_logits_keeps_the_grid_of_pools_and_limits_depthwise_weights() -> None:
    images = torch.zeros(2, 3, 32, 32)
    planned = eq.plan(edge_model(), images, ["onnxruntime", "torchscript"])
    program = planned.program
    assert planned.targets == ("onnxruntime", "torchscript")
    assert program.values["fc"].grid is not None
    assert program.grid_of("avgpool") is program.grid_of("downsample_block.conv.6")
    limits = {name: const.grid.qmax for name, const in program.consts.items()}
    depthwise = {"residual_block.conv.3.weight", "downsample_block.conv.3.weight"}
    assert {name for name, limit in limits.items() if limit == 63} == depthwise
    assert {limit for name, limit in limits.items() if name not in depthwise} == {127}


def test_portable_means_every_runtime_that_is_known_exactly() -> None:
    images = torch.zeros(2, 3, 32, 32)
    portable = eq.plan(edge_model(), images, "portable")
    assert (
        portable.program.plan_hash == eq.plan(edge_model(), images, ["torchscript", "onnxruntime"]).program.plan_hash
    )
    assert "portable" in eq.targets()


@pytest.mark.parametrize(
    ("targets", "rule"),
    [
        (["torchscript/fbgemm", "torchscript/qnnpack"], "largest depthwise weight: torchscript/fbgemm 63, .* any"),
        (["torchscript", "torchscript/qnnpack"], "largest depthwise weight"),
        (["torchscript/onednn", "torchscript/qnnpack"], "only torchscript/qnnpack counts padding in averages"),
        (["torchscript/fbgemm", "torchscript/x86"], "they load with different engines"),
    ],
    ids=str,
)
def test_targets_that_conflict_are_named_with_the_rule(targets: list[str], rule: str) -> None:
    with pytest.raises(PlanError, match=f"the targets {targets[0]} and {targets[1]} conflict \\({rule}"):
        eq.plan(edge_model(), torch.zeros(2, 3, 32, 32), targets)


def test_an_average_that_leaves_the_padding_out_stays_float_where_qnnpack_may_run_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, 1, count_include_pad=False))
    images = torch.zeros(2, 3, 8, 8)
    (row,) = [row for row in eq.plan(model, images, "torchscript").rows() if row.runs == "float"]
    assert row.reason == "torchscript counts the padding in averages"
    assert all(row.runs == "INT8" for row in eq.plan(model, images, "torchscript/fbgemm").rows())


# Convolutions of every rank, padding, batch norms that are called more than once.


VOLUME = torch.zeros(2, 3, 6, 6, 6)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("onnxruntime", None),
        ("torchscript", "torchscript has no exact integer conv3d"),
        ("torchscript/fbgemm", "torchscript/fbgemm has no exact integer conv3d"),
        ("portable", "torchscript has no exact integer conv3d"),
    ],
)
def test_conv3d_is_integer_where_the_target_computes_it_exactly(target: str, reason: str | None) -> None:
    planned = eq.plan(nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), VOLUME, target)
    assert [row.reason for row in planned.rows() if row.runs == "float"] == ([] if reason is None else [reason] * 2)


def test_conv1d_is_integer_everywhere() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())
    for target in ("onnxruntime", "portable", "torchscript/qnnpack"):
        assert kinds(eq.plan(model, torch.zeros(2, 3, 9), target).program) == ["quantize", "conv", "dequantize"]


def test_a_grouped_transposed_conv_and_a_batch_norm_without_statistics_say_why_they_stay_in_float() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 2, groups=3), nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False)
    )
    assert [row.reason for row in eq.plan(model, IMAGE).rows()] == [
        "it is a transposed convolution of 3 groups, wanted 1",
        "not folded: conv_transpose2d before it is no conv or linear with an integer form",
        "it normalises by the statistics of each batch",
    ]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_before_convs_alone_moves_the_integers_of_the_input(mode: str) -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)
    program = eq.plan(conv, IMAGE).program
    assert kinds(program) == ["quantize", "pad", "conv", "dequantize"]
    assert program.grid_of(program.ops[1].name) is program.grid_of(program.ops[0].name)
    left_in_float = eq.plan(conv, IMAGE, qconfig_mapping=eq.QConfigMapping().set_global(None)).program
    assert kinds(left_in_float) == ["float"]


class PadForTwo(nn.Module):
    """Padding that a conv reads, and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.pad(x, (1, 1, 1, 1))
        return self.conv(x), torch.tanh(x)


def test_padding_that_a_float_op_reads_too_stays_in_float() -> None:
    program = eq.plan(PadForTwo(), IMAGE).program
    assert {o.aten: o.reason for o in program.float_origins()}["aten.pad"] == "its input is float"


class SharedNorm(nn.Module):
    """Two convs with one batch norm; the right one's output may be read by an addition too."""

    def __init__(self, read_twice: bool) -> None:
        super().__init__()
        self.left, self.right, self.bn = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.read_twice = read_twice

    def forward(self, x: Tensor) -> Tensor:
        right = self.right(x)
        y = self.bn(self.left(x)) + self.bn(right)
        return y + right if self.read_twice else y


def test_a_shared_batch_norm_is_folded_into_each_of_its_convs_or_into_none() -> None:
    planned = eq.plan(SharedNorm(False), IMAGE)
    assert planned.folded == ("bn", "bn") and kinds(planned.program).count("conv") == 2
    right_in_float = eq.plan(
        SharedNorm(False), IMAGE, qconfig_mapping=eq.QConfigMapping().set_module_name("right", None)
    )
    reasons = {row.op: row.reason for row in right_in_float.rows()}
    assert right_in_float.folded == () and reasons["left"] == "its bn also follows right, which stays in float"
    read_twice = eq.plan(SharedNorm(True), IMAGE)
    reasons = {row.op: row.reason for row in read_twice.rows()}
    assert read_twice.folded == () and reasons["left"] == "its bn is called again where it cannot be folded"


def test_openvino_leaves_products_and_concatenations_in_float() -> None:
    class Joins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y = self.b(x) + x
            return self.c(torch.cat([x * y, y], 1))

    found = eq.plan(Joins().eval(), torch.randn(2, 3, 8, 8), "openvino")
    reasons = {origin.reason for origin in found.program.float_origins()}
    assert reasons == {"openvino has no integer mul", "openvino has no integer concat"}
    assert [op.name for op in found.program.ops if op.kind is Kind.ADD] == ["add"]
    both = eq.plan(Joins().eval(), torch.randn(2, 3, 8, 8), ["onnxruntime", "openvino"])
    assert both.program.plan_hash == found.program.plan_hash
