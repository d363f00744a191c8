"""Which layer a rule matches: by object type, function and order, as torch.ao counts them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import MinMaxObserver
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import QConfigMapping as TorchQConfigMapping
from torch.ao.quantization.quantize_fx import prepare_fx

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.qconfig_mapping import LayerId, as_mapping

FOUR, FIVE, SIX = (eq.QConfig(weight=eq.WeightConfig(bits=b)) for b in (4, 5, 6))


def named(value: object) -> str:
    """A test's id: addresses in it would differ from worker to worker."""
    return re.sub(r" (of type object )?at 0x[0-9a-f]+", "", str(value))


class Block(nn.Module):
    """Two additions around two convs, spelled in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4, H, W] -> [N, 4, H, W]"""
        y = x + self.body(x)
        return torch.add(y, x)


class Net(nn.Module):
    """Two blocks, a functional linear and an nn.Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.first, self.second = Block(), Block()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 5]"""
        x = self.second(self.first(self.stem(x)))
        return self.fc(F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), self.weight))


def in_float(mapping: Any) -> list[str]:
    """What a plan leaves in float because its QConfig is None, "<module>/<op>"."""
    planned = eq.plan(Net(), torch.zeros(2, 3, 8, 8), qconfig_mapping=mapping)
    found = [o for o in planned.program.float_origins() if o.reason == "its QConfig is None"]
    return [f"{o.module}/{o.aten.removeprefix('aten.').split('.')[0]}" for o in found]


CONVS = ["stem/conv2d", *(f"{block}.body.{i}/conv2d" for block in ("first", "second") for i in (0, 2))]
ADDITIONS = ["first/add", "first/add", "second/add", "second/add"]


@pytest.mark.parametrize(
    ("object_type", "expected"),
    [
        (torch.add, ADDITIONS),
        (operator.add, ADDITIONS),
        (operator.iadd, ADDITIONS),
        (torch.Tensor.add, ADDITIONS),
        (torch.ops.aten.add.Tensor, ADDITIONS),
        ("add", ADDITIONS),
        ("add_", ADDITIONS),
        (F.linear, ["/linear"]),
        ("linear", ["/linear"]),
        (nn.Linear, ["fc/linear"]),
        (F.adaptive_avg_pool2d, ["/adaptive_avg_pool2d"]),
        (Block, ADDITIONS),
        ("Conv2d", CONVS),
    ],
    ids=named,
)
def test_an_object_type_may_be_a_class_a_function_or_a_name(object_type: Any, expected: list[str]) -> None:
    assert in_float(eq.QConfigMapping().set_object_type(object_type, None)) == expected


def test_the_class_around_a_function_beats_the_function_as_in_torch() -> None:
    mapping = eq.QConfigMapping().set_object_type(torch.add, FOUR).set_object_type(Block, FIVE)
    assert mapping.lookup(LayerId("first", "Block", "add")) == FIVE
    assert mapping.lookup(LayerId("", "Net", "add")) == FOUR
    assert mapping.lookup(LayerId("fc", "Linear", "linear")) == eq.QConfig()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (("first", torch.add, 1), ["first/add"]),
        (("first|second", "add", 0), ["first/add", "second/add"]),
        ((r"first\.body", nn.Conv2d, 1), ["first.body.2/conv2d"]),
        (("", nn.Linear, 0), ["fc/linear"]),
        (("", F.linear, 0), ["/linear"]),
        ((".*", nn.Conv2d, 0), ["stem/conv2d", "first.body.0/conv2d", "second.body.0/conv2d"]),
    ],
    ids=named,
)
def test_a_layer_may_be_named_by_its_order(rule: tuple[str, Any, int], expected: list[str]) -> None:
    assert in_float(eq.QConfigMapping().set_module_name_object_type_order(*rule, None)) == expected


def test_the_order_beats_every_other_rule() -> None:
    mapping = (
        eq.QConfigMapping()
        .set_module_name("stem", FOUR)
        .set_module_name_regex("stem", FIVE)
        .set_module_name_object_type_order("", nn.Conv2d, 0, SIX)
    )
    assert mapping.lookup(LayerId("stem", "Conv2d", "conv2d", 0)) == SIX
    assert mapping.lookup(LayerId("stem", "Conv2d", "conv2d", 1)) == FOUR


def test_the_calls_of_one_module_are_counted_and_what_one_call_computes_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
            self.b = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.a(x)))

    mapping = eq.QConfigMapping().set_module_name_object_type_order("", nn.Conv2d, 2, None)
    planned = eq.plan(Twice(), torch.zeros(2, 3, 8, 8), qconfig_mapping=mapping)
    assert [o.module for o in planned.program.float_origins()] == ["b"]


def weights_of(bits: int) -> TorchQConfig:
    """A torch.ao QConfig that its bits tell from others."""
    top = 2 ** (bits - 1)
    weight = MinMaxObserver.with_args(
        dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-top, quant_max=top - 1
    )
    return TorchQConfig(activation=MinMaxObserver.with_args(dtype=torch.quint8), weight=weight)


def test_every_module_gets_the_qconfig_that_torch_gives_it() -> None:
    by_bits = {bits: weights_of(bits) for bits in range(3, 9)}
    mapping = (
        TorchQConfigMapping()
        .set_global(by_bits[8])
        .set_object_type(nn.Conv2d, by_bits[7])
        .set_object_type(F.linear, by_bits[6])
        .set_module_name_regex("sec", by_bits[5])  # torch matches the beginning of a name
        .set_module_name("first.body.0", by_bits[4])
        .set_module_name_object_type_order("second.body", nn.Conv2d, 1, by_bits[3])
    )
    prepared = prepare_fx(Net().eval(), mapping, (torch.zeros(2, 3, 8, 8),))
    planned = eq.plan(Net(), torch.zeros(2, 3, 8, 8), "torchscript", mapping)
    for name in ("stem", "first.body.0", "first.body.2", "second.body.0", "second.body.2", "fc"):
        expected = prepared.get_submodule(name).qconfig.weight()
        assert planned.weights[f"{name}.weight"].bits == (expected.quant_max - expected.quant_min).bit_length(), name
    assert [planned.weights[f"{n}.weight"].bits for n in ("first.body.2", "second.body.0", "fc")] == [7, 5, 8]
    assert planned.weights["weight"].bits == 6


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            eq.QConfigMapping().set_object_type(torch.mul, None),
            "the rule for type 'mul' matches nothing; found ['Block', 'Conv2d', 'Dropout', 'Linear', 'Net', "
            "'adaptive_avg_pool2d', 'add', 'flatten']",
        ),
        (
            eq.QConfigMapping().set_object_type(F.conv2d, None),
            "the rule for type 'conv2d' matches nothing; did you mean 'Conv2d'?",
        ),
        (
            eq.QConfigMapping().set_module_name_object_type_order("firs", torch.add, 0, None),
            "the rule for 'add' number 0 in modules like 'firs' matches no module that computes anything; "
            "did you mean 'first' or 'first.body'?",
        ),
        (
            eq.QConfigMapping().set_module_name_object_type_order("first", nn.Conv2d, 0, None),
            "the rule for 'Conv2d' number 0 in modules like 'first' matches nothing; found ['add']",
        ),
        (
            eq.QConfigMapping().set_module_name_object_type_order("first", torch.add, 2, None),
            "the rule for 'add' number 2 in modules like 'first' matches nothing; they are numbered 0 to 1",
        ),
        (
            TorchQConfigMapping().set_module_name_regex("irst", None),
            "the rule for regex 'irst' matches no module; names look like ''",
        ),
    ],
    ids=["function", "module, not function", "module", "type in module", "index", "torch.ao's regex"],
)
def test_a_rule_that_matches_nothing_is_an_error(mapping: Any, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        eq.plan(Net(), torch.zeros(2, 3, 8, 8), qconfig_mapping=mapping)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: eq.QConfigMapping().set_object_type(3, None),  # type: ignore[arg-type]
            "found a int as object type, wanted a module class, a function, or the name of one",
        ),
        (
            lambda: eq.QConfigMapping().set_module_name_object_type_order("a", nn.Linear, -1, None),
            "found the index -1 of Linear, wanted 0 or above",
        ),
        (
            lambda: eq.QConfigMapping().set_module_name_object_type_order("(", nn.Linear, 0, None),
            "found the regex '(', which is not one: missing ), unterminated subpattern at position 0",
        ),
    ],
    ids=["object type", "index", "regex"],
)
def test_a_rule_that_makes_no_sense_is_an_error(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value) == message


def test_setting_the_same_again_replaces_it_as_in_torch() -> None:
    mapping = as_mapping(None).set_module_name_regex("a", FOUR).set_module_name_regex("a", FIVE)
    assert mapping.lookup(LayerId("a", "Conv2d")) == FIVE
