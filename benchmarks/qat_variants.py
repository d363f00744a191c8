"""The training steps that benchmarks/qat_step.py compares: FP32, edgeqat's simulations, and other libraries' QAT."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import PlanError
from edgeqat.zoo import edge_model, mobilenetv2_cifar, resnet20

MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "mobilenetv2": partial(mobilenetv2_cifar, width=0.5),
    "edge": edge_model,
}
LEARNING_RATE, MOMENTUM = 1e-3, 0.9
WARM_UP_STEPS = 3
CLASSES = 10


class NotAvailable(Exception):
    """This version of edgeqat, or this environment, does not have a variant."""


@dataclass(frozen=True)
class Setting:
    """What all variants have in common.

    Attributes:
        model: The float model, in training mode, on the device.
        x: Images, [N, 3, 32, 32].
        y: Classes, int64 [N].
        compile: Whether FP32 and edgeqat are compiled.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    compile: bool

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return self.x.device.type


@dataclass(frozen=True)
class Variant:
    """One way to take a training step.

    Attributes:
        build: Makes its module, from a copy of the model.
        quantized: Whether convs and linears must get what lies on a grid.
        autocast: Whether it runs under torch.autocast in bfloat16.
        compiled: Whether `--compile` is meant for it.
        settle: Called on the module after the warm-up.
        channel_inputs: Whether an input may have a grid for each of its channels.
    """

    build: Callable[[Setting], nn.Module]
    quantized: bool
    autocast: bool = False
    compiled: bool = True
    settle: Callable[[nn.Module], None] | None = None
    channel_inputs: bool = False


class Step:
    """A module, its optimizer and its data: a call is one training step, left to run on the device."""

    def __init__(self, variant: Variant, setting: Setting) -> None:
        self.variant, self.setting = variant, setting
        self.module = variant.build(setting)
        compiled = setting.compile and variant.compiled
        self.run: Callable[[Tensor], Tensor] = self.module
        if compiled:
            # All simulations share the code of one forward; they must not share what is compiled of it.
            self.run = torch.compile(self.module, isolate_recompiles=True)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, LEARNING_RATE, MOMENTUM)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """What the forward pass runs under."""
        if not self.variant.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.setting.device, torch.bfloat16)

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = F.cross_entropy(self.run(self.setting.x), self.setting.y)
        loss.backward()
        self.optimizer.step()

    def warm_up(self) -> None:
        """The first steps: allocate the optimizer's state, fill the observers of libraries that have some."""
        for _ in range(WARM_UP_STEPS):
            self()
        if self.variant.settle is not None:
            self.variant.settle(self.module)
            self()


def make_step(name: str, setting: Setting) -> Step:
    """A variant's training step, warmed up.

    Raises:
        NotAvailable: It cannot be built or run here; the message says why.
    """
    try:
        with _quiet():
            step = Step(VARIANTS[name], setting)
            step.warm_up()
    except NotAvailable:
        raise
    except Exception as error:
        # Other libraries raise whatever they like; a benchmark of ten variants does without the one that fails.
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise NotAvailable(f"{type(error).__name__}: {reason[:200]}") from error
    return step


def make_setting(model: str, batch: int, device: str, compiled: bool) -> Setting:
    """A model with random weights whose batch norms have seen some data, and random data; always the same."""
    torch.manual_seed(0)
    net = MODELS[model]().train()
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, CLASSES, (batch,))
    _let_norms_see(net, [torch.randn(32, 3, 32, 32) for _ in range(4)])
    return Setting(net.to(device), x.to(device), y.to(device), compiled)


def _let_norms_see(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Makes running statistics the mean over batches; else evaluation, which calibrates, is unlike training."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the screen what torch.ao and torchao have to say of their own future."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _float(setting: Setting) -> nn.Module:
    return copy.deepcopy(setting.model)


def _simulation(setting: Setting, qconfig: eq.QConfig | None = None, **settings: Any) -> eq.SimulatedModel:
    """In phase "float", in training mode; made on the CPU."""
    model = copy.deepcopy(setting.model).cpu()
    sim = eq.prepare(model, setting.x[:2].cpu(), "onnxruntime", qconfig, **settings)
    return sim.to(setting.device).train()


def _folded(setting: Setting) -> nn.Module:
    return _simulation(setting)


def _fold(setting: Setting) -> nn.Module:
    return eq.calibrate(_simulation(setting), [setting.x])


def _live(setting: Setting) -> nn.Module:
    if "batch_norm" not in inspect.signature(eq.prepare).parameters:
        raise NotAvailable("prepare of this version has no argument batch_norm")
    return eq.calibrate(_simulation(setting, batch_norm="live"), [setting.x])


def _lsq(setting: Setting) -> nn.Module:
    try:
        qconfig = eq.QConfig(eq.ActivationConfig(learned=True), eq.WeightConfig(learned=True))
    except PlanError as error:
        raise NotAvailable(str(error)) from error
    return eq.calibrate(_simulation(setting, qconfig), [setting.x])


def _torch_fx(setting: Setting) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    model = copy.deepcopy(setting.model)
    made: nn.Module = prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (setting.x,))
    return made.to(setting.device).train()


def _freeze_torch_fx(module: nn.Module) -> None:
    module.apply(torch.ao.quantization.disable_observer)


def _pt2e(setting: Setting) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    exported = torch.export.export(copy.deepcopy(setting.model), (setting.x,)).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    made: nn.Module = prepare_qat_pt2e(exported, quantizer)
    made = move_exported_model_to_train(made)
    return made.to(setting.device)


def _freeze_pt2e(module: nn.Module) -> None:
    from torchao.quantization.pt2e import disable_observer

    module.apply(disable_observer)


def _nncf(setting: Setting) -> nn.Module:
    if importlib.util.find_spec("nncf") is None:
        raise NotAvailable("nncf is not installed")
    import nncf

    data = nncf.Dataset([setting.x])
    made: nn.Module = nncf.quantize(copy.deepcopy(setting.model).eval(), data, subset_size=1)
    return made.train()


FP32, FP32_BF16 = "fp32", "fp32-bf16"

VARIANTS: Mapping[str, Variant] = {
    FP32: Variant(_float, quantized=False),
    # What folding alone changes: no batch norm is left to train.
    "fp32-folded": Variant(_folded, quantized=False),
    "fold": Variant(_fold, quantized=True),
    "live": Variant(_live, quantized=True),
    "lsq": Variant(_lsq, quantized=True),
    FP32_BF16: Variant(_float, quantized=False, autocast=True),
    "fold-bf16": Variant(_fold, quantized=True, autocast=True),
    "fx": Variant(_torch_fx, quantized=True, compiled=False),
    "pt2e": Variant(_pt2e, quantized=True, compiled=False),
    # Their observers look at every step unless they are told to stop; ours do not run in training.
    "fx-frozen": Variant(_torch_fx, quantized=True, compiled=False, settle=_freeze_torch_fx),
    "pt2e-frozen": Variant(_pt2e, quantized=True, compiled=False, settle=_freeze_pt2e),
    # It gives depthwise convs inputs with a scale for each channel.
    "nncf": Variant(_nncf, quantized=True, compiled=False, channel_inputs=True),
}
"""By name."""
