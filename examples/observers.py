"""Observers, schemes and a sensitive layer: which settings each layer gets, and that the plan says so.

    python examples/observers.py

The strategy: histogram observers everywhere, per-channel weights in convs, per-tensor weights in linear layers, the
classifier `fc` left in float. It is written twice, in torch.ao's objects and in edgeqat's, with the same plan.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.ao.quantization import FakeQuantize, HistogramObserver, MinMaxObserver
from torch.ao.quantization import QConfig as TorchQConfig
from torch.ao.quantization import QConfigMapping as TorchQConfigMapping

import edgeqat as eq
from edgeqat.zoo import edge_model_with_stubs


def in_torch_objects() -> TorchQConfigMapping:
    """The mapping in torch.ao's words; MinMaxObserver with a per-channel scheme, which torch.ao rejects, works."""
    activation = FakeQuantize.with_args(observer=HistogramObserver, quant_min=0, quant_max=255, dtype=torch.quint8)
    convs, linears = (
        FakeQuantize.with_args(
            observer=MinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8, qscheme=scheme
        )
        for scheme in (torch.per_channel_symmetric, torch.per_tensor_symmetric)
    )
    return (
        TorchQConfigMapping()
        .set_global(TorchQConfig(activation=activation, weight=convs))
        .set_object_type(nn.Linear, TorchQConfig(activation=activation, weight=linears))
        .set_module_name("fc", None)
    )


def in_own_objects() -> eq.QConfigMapping:
    """The same in edgeqat's words."""
    activation = eq.ActivationConfig(observer="histogram")
    return (
        eq.QConfigMapping()
        .set_global(eq.QConfig(activation, eq.WeightConfig(per_channel=True)))
        .set_object_type(nn.Linear, eq.QConfig(activation, eq.WeightConfig(per_channel=False)))
        .set_module_name("fc", None)
    )


def main() -> None:
    """Prints the plan, and what the two mappings differ in: nothing."""
    torch.manual_seed(0)
    # A head of two linear layers, so that there is a linear beside the one that stays in float.
    model = edge_model_with_stubs().eval()
    model.avgpool = nn.Sequential(
        model.avgpool, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Unflatten(1, (64, 1, 1))
    )
    images = torch.randn(16, 3, 32, 32)

    plan = eq.plan(model, images, qconfig_mapping=in_own_objects())
    same = eq.plan(model, images, qconfig_mapping=in_torch_objects())
    print(plan)
    print(f"torch.ao's objects give {'the same plan' if plan.diff(same) == '' else plan.diff(same)}")

    sim = eq.calibrate(eq.prepare(model, images, qconfig_mapping=in_own_objects()), [images])
    print(f"{len(sim.activation_quantizers())} grids of values, {len(sim.weight_quantizers())} of weights")


if __name__ == "__main__":
    main()
