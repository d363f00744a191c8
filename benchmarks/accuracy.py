"""Accuracy of float, PTQ and QAT at 8 and 4 bits on CIFAR-10: trains what is missing, keeps it, prints the table.

    python benchmarks/accuracy.py --data CIFAR10 --weights FOLDER [--models resnet20 ...] [--settings w8a8 ...]
                                  [--seeds 0 1 2] [--threads 2] [--table]

A cell is a model, a setting and a seed. What it found is a JSON file in benchmarks/results/accuracy, which is not made
again; a killed script goes on with the next cell. Weights in between are kept in runs/accuracy. --table trains
nothing and prints what there is. Accuracies are those of ONNX Runtime on all 10,000 test images, and each file is
verified against the integer reference over the same images.

A drop is against the float twin: the same float model, fine-tuned with the same epochs, learning rate, batches and
seed. The drop of PTQ is against the float model that both start from. The mean of the seeds has the interval of the
test images (paired, on the mean over seeds of each image), and the range over the seeds beside it.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.files import to_json, write_atomically
from edgeqat.intervals import mean_interval
from edgeqat.machine import describe_machine
from edgeqat.metrics import evaluate, resolve_metric
from edgeqat.signature import call
from parity import BATCH, CALIBRATION_N, MEAN, STD
from runtimes import MODELS

RESULTS = Path(__file__).parent / "results" / "accuracy"
CACHE = Path("runs") / "accuracy"
FLOAT_EPOCHS, FLOAT_LR, WEIGHT_DECAY = 15, 0.1, 5e-4
"""Of models without weights in --weights, which are trained from scratch with seed 0."""

GRAD_NORM = 1.0


@dataclass(frozen=True)
class Budget:
    """What fine-tuning may cost, QAT's and its float twin's."""

    epochs: int
    lr: float

    def __str__(self) -> str:
        return f"{self.epochs}x{self.lr}"


@dataclass(frozen=True)
class Network:
    """A model's parts, as regexes of module names, and its budgets.

    Attributes:
        edges: The first and the last layer.
        stream: The layers whose output is added, so that it belongs to the residual stream.
        at_8_bits: The budget where weights have 8 bits.
        below: The budget where they have fewer.
    """

    edges: str
    stream: str
    at_8_bits: Budget
    below: Budget


NETWORKS: Mapping[str, Network] = {
    "edge": Network(r"entry_block\.0|fc", r"residual_block\.conv\.6", Budget(5, 0.002), Budget(5, 0.01)),
    "resnet8": Network("conv1|linear", r"block\d\.(conv2|shortcut)", Budget(5, 0.002), Budget(5, 0.01)),
    "resnet20": Network("conv1|linear", r"layer\d\.\d\.conv2", Budget(5, 0.002), Budget(5, 0.01)),
    "mobilenetv2": Network(
        r"features\.0\.0|classifier", r"features\.\d+\.conv\.6", Budget(1, 0.002), Budget(3, 0.005)
    ),
}


@dataclass(frozen=True)
class Setting:
    """Bits of weights and activations.

    Attributes:
        weights, activations: Their bits.
        edges: Whether the first and last layer, and the residual stream, stay at 8 bits.
        learned: Whether ranges are learned.
        batch_norm: "fold" or "live".
    """

    weights: int
    activations: int
    edges: bool
    learned: bool
    batch_norm: str

    def budget(self, network: Network) -> Budget:
        """What it may cost."""
        return network.at_8_bits if self.weights == 8 else network.below


SETTINGS: Mapping[str, Setting] = {
    "w8a8": Setting(8, 8, False, False, "fold"),
    "w4a8": Setting(4, 8, True, True, "live"),
    "w4a4": Setting(4, 4, True, True, "live"),
    "w4a8-all": Setting(4, 8, False, True, "live"),
    "w4a4-all": Setting(4, 4, False, True, "live"),
}


def mapping(network: Network, setting: Setting) -> eq.QConfigMapping:
    """The settings of every layer."""

    def config(weights: int, activations: int, output: int) -> eq.QConfig:
        low = weights < 8
        weight = eq.WeightConfig(bits=weights, observer="mse" if low else "minmax", learned=setting.learned)
        inside, result = (
            eq.ActivationConfig(bits=bits, observer="mse" if bits < 8 else "histogram", learned=setting.learned)
            for bits in (activations, output)
        )
        return eq.QConfig(inside, weight, output=None if output == activations else result)

    found = eq.QConfigMapping().set_global(config(setting.weights, setting.activations, setting.activations))
    if not setting.edges:
        return found
    found = found.set_object_type(torch.add, config(setting.weights, 8, 8))
    found = found.set_module_name_regex(network.stream, config(setting.weights, setting.activations, 8))
    return found.set_module_name_regex(network.edges, config(8, 8, 8))


@dataclass(frozen=True)
class Data:
    """CIFAR-10 in batches."""

    dataset: Dataset

    def train(self, seed: int) -> Batches:
        """Augmented, in an order of the seed's."""
        return Batches(
            self.dataset.train,
            batch_size=BATCH,
            mean=MEAN,
            std=STD,
            augment=("crop", "flip"),
            shuffle=True,
            seed=seed,
            drop_last=True,
        )

    def test(self) -> Batches:
        """All 10,000 images."""
        return Batches(self.dataset.test, batch_size=BATCH, mean=MEAN, std=STD)

    def calibration(self) -> list[Tensor]:
        """Images alone."""
        return [x for x, _ in Batches(self.dataset.calibration, batch_size=BATCH, mean=MEAN, std=STD)]


def right(run: Callable[[Any], Any], data: Data) -> Tensor:
    """Which test images are classified rightly: bool [10000]."""
    return evaluate(run, data.test(), resolve_metric("top1")).statistics


def packed(found: Tensor) -> str:
    """bool [N] as base64."""
    return base64.b64encode(np.packbits(found.numpy()).tobytes()).decode()


def unpacked(text: str, n: int) -> Tensor:
    """What `packed` packed: float64 [N]."""
    return torch.from_numpy(np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:n]).double()


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result from its file, or made and written."""
    if not path.is_file():
        started = time.perf_counter()
        found = make()
        found |= {"seconds": round(time.perf_counter() - started), "machine": describe_machine(2).to_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(found))
        print(f"{path.stem}: top1 {100 * found['top1']:.2f}%, {found['seconds']} s", flush=True)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def float_model(name: str, weights: Path, data: Data) -> nn.Module:
    """The model that everything starts from, trained from scratch where there are no weights."""
    torch.manual_seed(0)
    model, given = MODELS[name](), weights / f"{name}-cifar10-float.safetensors"
    path = given if given.is_file() else CACHE / f"{name}-float.safetensors"
    if not path.is_file():
        eq.fit(model, data.train(0), epochs=FLOAT_EPOCHS, lr=FLOAT_LR, weight_decay=WEIGHT_DECAY)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, safetensors.torch.save(model.state_dict()))
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def of_float(model: nn.Module, data: Data) -> dict[str, Any]:
    """The result of a float model."""
    found = right(lambda x: call(model, x), data)
    return {"top1": float(found.double().mean()), "right": packed(found)}


def of_simulation(sim: eq.SimulatedModel, data: Data) -> dict[str, Any]:
    """The result of a simulation's file on ONNX Runtime."""
    program = eq.convert(sim.eval())
    with tempfile.TemporaryDirectory() as folder:
        artifact = eq.lower(program, "onnxruntime", Path(folder) / "artifact")
        parity = eq.verify(artifact, program, data.test().inputs())
        session = artifact.session(threads=2)
        found = right(lambda x: session.run([x])[0], data)
    return {
        "top1": float(found.double().mean()),
        "right": packed(found),
        "bit_identical": parity.bit_identical,
        "max_error_steps": parity.max_error_steps,
        "file_bytes": artifact.file_bytes,
        "payload_bytes": artifact.manifest["payload_bytes"],
        "float_ops": len(program.float_origins()),
    }


def tune(model: nn.Module, budget: Budget, data: Data, seed: int) -> None:
    """Fine-tuning."""
    eq.fit(
        model,
        data.train(seed),
        epochs=budget.epochs,
        lr=budget.lr,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=GRAD_NORM,
        seed=seed,
    )


def run(name: str, settings: list[str], seeds: list[int], weights: Path, data: Data) -> None:
    """Makes every missing cell of a model."""
    network, start = NETWORKS[name], lambda: float_model(name, weights, data)
    calibration = data.calibration()
    kept(RESULTS / f"{name}-float.json", lambda: of_float(start(), data))

    def calibrated(setting: Setting) -> eq.SimulatedModel:
        sim = eq.prepare(
            start(), calibration[0], "onnxruntime", mapping(network, setting), batch_norm=setting.batch_norm
        )
        return eq.calibrate(sim, calibration)

    def twin(budget: Budget, seed: int) -> dict[str, Any]:
        model = start()
        tune(model, budget, data, seed)
        return of_float(model, data)

    def qat(setting: Setting, seed: int) -> dict[str, Any]:
        sim = calibrated(setting)
        tune(sim, setting.budget(network), data, seed)
        return of_simulation(sim, data) | {"budget": str(setting.budget(network))}

    for key in settings:
        kept(RESULTS / f"{name}-{key}-ptq.json", lambda s=SETTINGS[key]: of_simulation(calibrated(s), data))
    for seed in seeds:
        for key in settings:
            setting = SETTINGS[key]
            budget = setting.budget(network)
            kept(RESULTS / f"{name}-twin-{budget}-{seed}.json", lambda b=budget, n=seed: twin(b, n))
            kept(RESULTS / f"{name}-{key}-qat-{seed}.json", lambda s=setting, n=seed: qat(s, n))


def read(name: str, *parts: object) -> dict[str, Any] | None:
    """A result, if it was made."""
    path = RESULTS / ("-".join([name, *map(str, parts)]) + ".json")
    return json.loads(path.read_text()) if path.is_file() else None


def drop(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Of (float, quantized) results: the mean over seeds in points, its interval over images, its range over seeds."""
    n = 10_000
    each = torch.stack([unpacked(a["right"], n) - unpacked(b["right"], n) for a, b in pairs])
    found, seeds = mean_interval(each.mean(0)), [100 * float(d) for d in each.mean(1)]
    text = f"{100 * found.value:+.2f} ({100 * found.low:+.2f} to {100 * found.high:+.2f})"
    return text if len(seeds) == 1 else f"{text}; seeds {min(seeds):+.2f} to {max(seeds):+.2f}"


def print_table() -> None:
    """Markdown of all results."""
    print("| model | setting | float | ptq, drop (95%) | float twin | qat | drop (95%) | bytes | float ops |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, network in NETWORKS.items():
        start = read(name, "float")
        for key, setting in SETTINGS.items():
            ptq = read(name, key, "ptq")
            if start is None or ptq is None:
                continue
            found = [(read(name, "twin", setting.budget(network), n), read(name, key, "qat", n)) for n in range(10)]
            pairs = [(a, b) for a, b in found if a is not None and b is not None]
            twin, qat = (
                f"{100 * sum(pair[i]['top1'] for pair in pairs) / len(pairs):.2f}%" if pairs else "-" for i in (0, 1)
            )
            print(
                f"| {name} | {key} | {100 * start['top1']:.2f}% | {drop([(start, ptq)])} | {twin} | {qat} | "
                f"{drop(pairs) if pairs else '-'} | {ptq['file_bytes']:,} | {ptq['float_ops']} |"
            )


def main() -> None:
    """Makes what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--weights", type=Path, default=CACHE)
    parser.add_argument("--models", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    if not options.table:
        data = Data(load(options.data, image_size=32, mean=MEAN, std=STD, calibration_n=CALIBRATION_N))
        for name in options.models:
            run(name, options.settings, options.seeds, options.weights, data)
    print_table()


if __name__ == "__main__":
    main()
