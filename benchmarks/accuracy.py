"""Accuracy of float, PTQ and QAT at 8 and 4 bits on CIFAR-10: makes what is missing, keeps it, prints the table.

    python benchmarks/accuracy.py --data CIFAR10 --weights FOLDER [--models resnet20 ...] [--settings w8a8 ...]
                                  [--seeds 0 1 2] [--threads 2]
    python benchmarks/accuracy.py --table

A cell is a model, a setting and a seed. What it found is a JSON file in benchmarks/results/accuracy, which is not made
again; a killed script goes on with the next cell. Weights in between are kept in runs/accuracy. --table makes nothing
and prints what there is. --data is a recipe's data.source, --weights holds NAME-cifar10-float.safetensors; a model
without is trained from scratch. Accuracies are those of ONNX Runtime on all 10,000 test images, and each file is
verified against the integer reference over the same images.

PTQ is calibration on 512 training images, below 8 bits with AdaRound; its drop is against the float model. QAT goes on
from there; its drop is against the float twin: the same float model, fine-tuned with the same epochs, learning rate,
batches and seed. Training computes in bfloat16 where autocast allows it, both alike. The mean over seeds has the 95%
interval of the test images (paired, on each image's mean over seeds), and the range over the seeds beside it.

    w8a8        weights and activations of 8 bits, everywhere
    w4a8, w4a4  weights of 4 bits, activations of 8 or 4; but the first and last layer, the residual stream (what
                blocks give, and sums) and what the last layer reads are at 8
    -all        everything at 4, or 4 and 8
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from edgeqat.train.checkpoint import load_weights, save_weights
from parity import BATCH, MEAN, STD
from runtimes import MODELS

RESULTS = Path(__file__).parent / "results" / "accuracy"
CACHE = Path("runs") / "accuracy"
FLOAT_EPOCHS, FLOAT_LR, WEIGHT_DECAY = 15, 0.1, 5e-4
"""Of models without weights in --weights, which are trained from scratch with seed 0."""

GRAD_NORM, PRECISION, CALIBRATION_N = 1.0, "bf16-mixed", 512


@dataclass(frozen=True)
class Budget:
    """What fine-tuning may cost, QAT's and its float twin's."""

    epochs: int
    lr: float

    def __str__(self) -> str:
        return f"{self.epochs}x{self.lr}"


@dataclass(frozen=True)
class Network:
    """A model's parts, as regexes of module names, and its budget.

    Attributes:
        stem: The first layer, where its output is in the residual stream.
        stream: The last layers of the blocks, whose outputs are the residual stream.
        budget: Of QAT and of the float twin.
    """

    stem: str | None
    stream: str
    budget: Budget


NETWORKS: Mapping[str, Network] = {
    "edge": Network(r"entry_block\.0", r"residual_block\.conv\.6", Budget(3, 0.005)),
    "resnet8": Network("conv1", r"block\d\.(conv2|shortcut)", Budget(3, 0.005)),
    "resnet20": Network("conv1", r"layer\d\.\d\.conv2", Budget(3, 0.002)),
    "mobilenetv2": Network(None, r"features\.(3\.conv\.3|\d+\.conv\.6)", Budget(1, 0.002)),
}


@dataclass(frozen=True)
class Setting:
    """Bits of weights and activations.

    Attributes:
        weights, activations: Their bits.
        edges: Whether the first and last layer, and the residual stream, stay at 8 bits.
    """

    weights: int
    activations: int
    edges: bool

    @property
    def learned(self) -> bool:
        """Whether ranges are learned: where activations have so few points that training moves them far."""
        return self.activations < 8


SETTINGS: Mapping[str, Setting] = {
    "w8a8": Setting(8, 8, False),
    "w4a8": Setting(4, 8, True),
    "w4a4": Setting(4, 4, True),
    "w4a8-all": Setting(4, 8, False),
    "w4a4-all": Setting(4, 4, False),
}


def mapping(network: Network, setting: Setting) -> eq.QConfigMapping:
    """The settings of every layer."""

    def config(weights: int, activations: int, output: int) -> eq.QConfig:
        weight = eq.WeightConfig(bits=weights, observer="mse" if weights < 8 else "minmax", learned=setting.learned)
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
    if network.stem is not None:
        found = found.set_module_name_regex(network.stem, config(8, 8, 8))
    return found.set_first_last(config(8, 8, 8))


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


def kept(path: Path, threads: int, make: Callable[[], dict[str, Any]]) -> None:
    """Makes a result and writes it, unless its file is there."""
    if path.is_file():
        return
    started = time.perf_counter()
    found = make()
    found |= {"seconds": round(time.perf_counter() - started), "machine": describe_machine(threads).to_dict()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, to_json(found))
    print(f"{path.stem}: top1 {100 * found['top1']:.2f}%, {found['seconds']} s", flush=True)


def float_model(name: str, weights: Path, data: Data) -> nn.Module:
    """The model that everything starts from, trained from scratch where there are no weights."""
    torch.manual_seed(0)
    model, given = MODELS[name](), weights / f"{name}-cifar10-float.safetensors"
    path = given if given.is_file() else CACHE / f"{name}-float.safetensors"
    if not path.is_file():
        train = data.train(0)
        eq.fit(model, train, epochs=FLOAT_EPOCHS, lr=FLOAT_LR, weight_decay=WEIGHT_DECAY, precision=PRECISION)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(model, path)
    load_weights(model, path)
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
        session = artifact.session(threads=1)
        found = right(lambda x: session.run([x])[0], data)
        sizes = {"file_bytes": artifact.file_bytes, "payload_bytes": artifact.manifest["payload_bytes"]}
    accuracy = {"top1": float(found.double().mean()), "right": packed(found)}
    proof = {"bit_identical": parity.bit_identical, "max_error_steps": parity.max_error_steps}
    return accuracy | proof | sizes | {"float_ops": len(program.float_origins())}


def tune(model: nn.Module, budget: Budget, data: Data, seed: int) -> None:
    """Fine-tuning."""
    eq.fit(
        model,
        data.train(seed),
        epochs=budget.epochs,
        lr=budget.lr,
        weight_decay=WEIGHT_DECAY,
        precision=PRECISION,
        max_grad_norm=GRAD_NORM,
        seed=seed,
    )


def run(name: str, settings: list[str], seeds: list[int], weights: Path, data: Data, threads: int) -> None:
    """Makes every missing cell of a model."""
    network, calibration = NETWORKS[name], data.calibration()

    def start() -> nn.Module:
        return float_model(name, weights, data)

    def quantized(key: str) -> eq.SimulatedModel:
        """After PTQ, which is done once."""
        setting, path = SETTINGS[key], CACHE / f"{name}-{key}-ptq.safetensors"
        sim = eq.prepare(start(), calibration[0], "onnxruntime", mapping(network, setting))
        if path.is_file():
            load_weights(sim, path)
            sim.set_phase("quantized")
            return sim
        eq.calibrate(sim, calibration)
        if setting.weights < 8:
            eq.adaround(sim, calibration, eq.AdaRoundConfig())
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights(sim, path)
        return sim

    def twin(seed: int) -> dict[str, Any]:
        model = start()
        tune(model, network.budget, data, seed)
        return of_float(model, data) | {"budget": str(network.budget)}

    def qat(key: str, seed: int) -> dict[str, Any]:
        sim = quantized(key)
        tune(sim, network.budget, data, seed)
        return of_simulation(sim, data) | {"budget": str(network.budget)}

    kept(RESULTS / f"{name}-float.json", threads, lambda: of_float(start(), data))
    for key in settings:
        kept(RESULTS / f"{name}-{key}-ptq.json", threads, lambda k=key: of_simulation(quantized(k), data))
    for seed in seeds:
        kept(RESULTS / f"{name}-twin-{seed}.json", threads, lambda n=seed: twin(n))
        for key in settings:
            kept(RESULTS / f"{name}-{key}-qat-{seed}.json", threads, lambda k=key, n=seed: qat(k, n))


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
    print("| model | setting | float | ptq: drop (95%) | seeds | float twin | qat | drop (95%) | bytes | float ops |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in NETWORKS:
        start = read(name, "float")
        for key in SETTINGS:
            ptq = read(name, key, "ptq")
            if start is None or ptq is None:
                continue
            found = [(read(name, "twin", seed), read(name, key, "qat", seed)) for seed in range(10)]
            pairs = [(twin, qat) for twin, qat in found if twin is not None and qat is not None]
            twin, qat = (
                f"{100 * sum(pair[i]['top1'] for pair in pairs) / len(pairs):.2f}%" if pairs else "-" for i in (0, 1)
            )
            cells = [name, key, f"{100 * start['top1']:.2f}%", drop([(start, ptq)]), str(len(pairs)), twin, qat]
            cells += [drop(pairs) if pairs else "-", f"{ptq['file_bytes']:,}", str(ptq["float_ops"])]
            print("| " + " | ".join(cells) + " |")
    checked = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    verified = [one for one in checked if "bit_identical" in one]
    equal = sum(one["bit_identical"] == 1.0 and one["max_error_steps"] == 0 for one in verified)
    print(f"{equal} of {len(verified)} files bit-identical to the reference over all 10,000 images")


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
    if not options.table:
        if options.data is None:
            parser.error("wanted --data, or --table")
        warnings.simplefilter("ignore")  # calibration says of every layer that clips that it does
        torch.set_num_threads(options.threads)
        print_machine(options.threads)
        data = Data(load(options.data, image_size=32, mean=MEAN, std=STD, calibration_n=CALIBRATION_N))
        for name in options.models:
            run(name, options.settings, options.seeds, options.weights, data, options.threads)
    print_table()


if __name__ == "__main__":
    main()
