"""Arguments of observers: what fits, and how it is said what does not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.observer_args import ACTIVATION_ARGUMENTS, WEIGHT_ARGUMENTS
from edgeqat.qconfig import REUSE_INPUT
from edgeqat.simulate.range_methods import METHODS


def test_every_observer_is_in_the_table() -> None:
    assert set(ACTIVATION_ARGUMENTS) == set(METHODS)
    for name, arguments in ACTIVATION_ARGUMENTS.items():
        METHODS[name](**{key: int(argument.high) for key, argument in arguments.items()})


def test_they_are_kept_in_one_order_and_can_be_hashed() -> None:
    one = eq.WeightConfig(observer="percentile", observer_args={"percentile": 99.9, "eps": 1e-6})
    other = eq.WeightConfig(observer="percentile", observer_args={"eps": 1e-6, "percentile": 99.9})
    assert one == other and hash(one) == hash(other)
    assert one.arguments == {"percentile": 99.9, "eps": 1e-6}
    assert one != eq.WeightConfig(observer="percentile")
    assert eq.ActivationConfig(observer_args=eq.ActivationConfig(observer_args={"bins": 64}).observer_args) == (
        eq.ActivationConfig(observer_args={"bins": 64})
    )


def test_a_description_says_what_differs_from_the_default() -> None:
    assert eq.ActivationConfig().describe() == "histogram"
    config = eq.ActivationConfig(
        observer="percentile", symmetric=True, signed=True, observer_args={"percentile": 99.9}
    )
    assert config.describe() == "symmetric signed percentile (percentile=99.9)"
    assert eq.ActivationConfig(observer=REUSE_INPUT).describe() == "reuse_input"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: eq.ActivationConfig(observer="percentile", observer_args={"percentil": 99.9}),
            "ActivationConfig: found percentil=99.9, but 'percentile' takes percentile (above 50 up to 100)",
        ),
        (
            lambda: eq.ActivationConfig(observer="percentile", observer_args={"percentile": 50.0}),
            "ActivationConfig: found percentile=50.0, but 'percentile' takes percentile (above 50 up to 100)",
        ),
        (
            lambda: eq.ActivationConfig(observer_args={"bins": 2.5}),
            "ActivationConfig: found bins=2.5, but 'histogram' takes bins (a whole number from 2 to 65536)",
        ),
        (
            lambda: eq.ActivationConfig(observer="moving_average", observer_args={"averaging_constant": True}),
            "ActivationConfig: found averaging_constant=True, but 'moving_average' takes "
            "averaging_constant (above 0 up to 1)",
        ),
        (
            lambda: eq.ActivationConfig(observer="minmax", observer_args={"bins": 16}),
            "ActivationConfig: found bins=16, but 'minmax' takes no arguments",
        ),
        (
            lambda: eq.WeightConfig(observer_args={"eps": float("nan")}),
            "WeightConfig: found eps=nan, but 'minmax' takes eps (1e-10 to 1)",
        ),
        (
            lambda: eq.ActivationConfig(observer=object, observer_args={"bins": 16}),
            "ActivationConfig: found observer_args for object, which is no name; pass functools.partial, or the "
            "observer's with_args(...)",
        ),
    ],
    ids=["name", "range", "whole", "bool", "none", "nan", "factory"],
)
def test_what_does_not_fit_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value) == message


def test_weights_take_no_activation_arguments() -> None:
    assert not {"bins", "averaging_constant"} & {name for known in WEIGHT_ARGUMENTS.values() for name in known}
