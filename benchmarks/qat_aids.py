"""What each aid for quantization-aware training brings at few bits: ResNet-8 on CIFAR-10, several seeds.

    python benchmarks/qat_aids.py --data CIFAR [--seeds 0 1 2] [--aids none distill ...] [--epochs 4] [--out FOLDER]
    python benchmarks/qat_aids.py --data CIFAR --cost

All variants of a seed start from one float model, which is trained once and kept in FOLDER, and have the same number
of epochs. Weights have 4 bits and learned scales, activations 4 bits and learned ranges (8 bits where the plan takes
no 4, or with --activations 8), in every layer, batch norms folded, but for what an aid changes; training computes in
bfloat16 where autocast allows it. A finished run is one JSON file, and is not run again; the table is printed from all
of them: top-1 in the exact arithmetic, its standard deviation over seeds, the difference from "none" of the same seed,
and the 95% interval of its mean (Student's t).

    float         the float model, fine-tuned with the same budget
    none          nothing
    fixed         ranges and scales as calibration found them, not learned
    live          batch norms live, statistics estimated afresh over 50 batches
    distill       the float model as teacher, half of the loss, temperature 1
    ema           moving averages, decay 0.999
    freeze        oscillating weights are frozen, threshold 0.1 to 0.01 from a quarter on
    dampen        oscillation is dampened, factor 0 to 0.1 from a quarter on
    progressive   weights of 8, then of 6 bits, a quarter of the epochs each
    first-last    first and last layers at 8 bits
    sums          sums at 8 bits, of activations at 4
    all           live, distill, ema, freeze and first-last

--cost takes steps of all variants in turn instead, in an order drawn anew each round, and prints the median of the
ratios to "none" of a round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import edgeqat as eq
from common import print_machine
from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.errors import PlanError
from edgeqat.metrics import evaluate, resolve_metric
from edgeqat.signature import call
from edgeqat.train.aids import AidsAtWork
from edgeqat.train.checkpoint import load_weights, save_weights
from edgeqat.zoo import resnet8

OUT = Path(__file__).parent / "results" / "qat_aids"
BATCH, CALIBRATION_N = 128, 512
FLOAT_LR, QAT_LR, WEIGHT_DECAY, GRAD_NORM = 0.1, 0.01, 5e-4, 1.0
PRECISION = "bf16-mixed"
BASE, FLOAT = "none", "float"


@dataclass(frozen=True)
class Recipe:
    """How a variant is trained: `wide` are the weights' bits of earlier stages, which get half of the epochs."""

    aids: Callable[[nn.Module], eq.QatAids] = lambda teacher: eq.QatAids()
    live: bool = False
    first_last: bool = False
    sums: bool = False
    learned: bool = True
    wide: tuple[int, ...] = field(default=())


def _distilled(teacher: nn.Module) -> eq.Distillation:
    return eq.Distillation(teacher, weight=0.5, temperature=1.0)


FREEZE, DAMPEN = eq.Annealed(0.1, 0.01), eq.Annealed(0.0, 0.1)
WATCH = eq.Oscillation()

RECIPES: Mapping[str, Recipe] = {
    BASE: Recipe(lambda teacher: eq.QatAids(oscillation=WATCH)),
    "fixed": Recipe(lambda teacher: eq.QatAids(oscillation=WATCH), learned=False),
    "live": Recipe(lambda teacher: eq.QatAids(oscillation=WATCH), live=True),
    "distill": Recipe(lambda teacher: eq.QatAids(_distilled(teacher), WATCH)),
    "ema": Recipe(lambda teacher: eq.QatAids(oscillation=WATCH, ema=eq.Ema())),
    "freeze": Recipe(lambda teacher: eq.QatAids(oscillation=eq.Oscillation(freeze=FREEZE))),
    "dampen": Recipe(lambda teacher: eq.QatAids(oscillation=eq.Oscillation(dampen=DAMPEN))),
    "progressive": Recipe(lambda teacher: eq.QatAids(oscillation=WATCH), wide=(8, 6)),
    "first-last": Recipe(lambda teacher: eq.QatAids(oscillation=WATCH), first_last=True),
    "sums": Recipe(lambda teacher: eq.QatAids(oscillation=WATCH), sums=True),
    "all": Recipe(
        lambda teacher: eq.QatAids(_distilled(teacher), eq.Oscillation(freeze=FREEZE), eq.Ema()),
        live=True,
        first_last=True,
    ),
}


def main() -> None:
    """Runs what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--aids", nargs="+", choices=[FLOAT, *RECIPES], default=[FLOAT, *RECIPES])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--float-epochs", type=int, default=15)
    parser.add_argument("--activations", type=int, help="bits; 4 where the plan takes them, else 8")
    parser.add_argument("--train-n", type=int, help="training images, all by default")
    parser.add_argument("--test-n", type=int, help="test images, all by default")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=20, help="of --cost")
    options = parser.parse_args()
    if options.activations is None:
        options.activations = 4 if takes_four_bits() else 8
    print_machine(torch.get_num_threads())
    print(f"ResNet-8, weights of 4 bits, activations of {options.activations}", flush=True)
    data = load(options.data, image_size=32, mean=None, std=None, calibration_n=CALIBRATION_N)
    if options.cost:
        print_cost(options, data)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {key: getattr(options, key) for key in ("epochs", "float_epochs", "activations", "train_n", "test_n")}
    for seed in options.seeds:
        for aid in options.aids:
            place = options.out / f"{aid}-{seed}.json"
            if finished(place, settings) is None:
                found = run(aid, seed, options, data)
                place.write_text(json.dumps({"aid": aid, "seed": seed, "settings": settings} | found, indent=1) + "\n")
                print(f"{aid}, seed {seed}: {100 * found['top1']:.2f}%, {found['seconds']:.0f} s", flush=True)
    print_table(options, settings)


def takes_four_bits() -> bool:
    """Whether a plan for ONNX Runtime takes activations of 4 bits."""
    try:
        eq.plan(resnet8().eval(), torch.zeros(2, 3, 32, 32), qconfig_mapping=mapping(Recipe(), 4))
    except PlanError:
        return False
    return True


def mapping(recipe: Recipe, activations: int) -> eq.QConfigMapping:
    """Learned scales at few bits, but for what a recipe keeps at 8."""

    def qconfig(weight_bits: int, activation_bits: int) -> eq.QConfig:
        weight = eq.WeightConfig(bits=weight_bits, observer="mse", learned=recipe.learned)
        return eq.QConfig(eq.ActivationConfig(bits=activation_bits, observer="mse", learned=recipe.learned), weight)

    found = eq.QConfigMapping().set_global(qconfig(4, activations))
    if recipe.first_last:
        found.set_first_last(qconfig(8, 8))
    if recipe.sums:
        found.set_object_type(torch.add, qconfig(4, 8))
    return found


def batches(data: Dataset, options: argparse.Namespace, seed: int) -> Batches:
    """The training images, or the first of them, shuffled and augmented."""
    split = data.train if options.train_n is None else data.train.take(torch.arange(options.train_n))
    augment = ("crop", "flip")
    return Batches(split, batch_size=BATCH, mean=data.mean, std=data.std, augment=augment, shuffle=True, seed=seed)


def float_model(seed: int, options: argparse.Namespace, data: Dataset) -> nn.Module:
    """The float model of a seed: trained once."""
    torch.manual_seed(seed)
    model = resnet8()
    size = "all" if options.train_n is None else options.train_n
    place = options.out / f"float-{size}x{options.float_epochs}-{seed}.safetensors"
    if place.exists():
        load_weights(model, place)
    else:
        eq.fit(
            model,
            batches(data, options, seed),
            epochs=options.float_epochs,
            lr=FLOAT_LR,
            weight_decay=WEIGHT_DECAY,
            precision=PRECISION,
            seed=seed,
        )
        save_weights(model, place)
    return model.eval()


def simulation(recipe: Recipe, model: nn.Module, data: Dataset, activations: int, wide: int = 2) -> eq.SimulatedModel:
    """A prepared simulation whose weights have `wide` bits or more."""
    example, _ = next(iter(Batches(data.calibration, batch_size=2, mean=data.mean, std=data.std)))
    bits = mapping(recipe, activations).at_least(weights=wide)
    return eq.prepare(model, example, qconfig_mapping=bits, batch_norm="live" if recipe.live else "fold")


def run(aid: str, seed: int, options: argparse.Namespace, data: Dataset) -> dict[str, Any]:
    """Trains one variant; what is found of it."""
    model, train = float_model(seed, options, data), batches(data, options, seed)
    settings = {
        "lr": QAT_LR,
        "weight_decay": WEIGHT_DECAY,
        "precision": PRECISION,
        "max_grad_norm": GRAD_NORM,
        "seed": seed,
    }
    test = data.test if options.test_n is None else data.test.take(torch.arange(options.test_n))
    evaluated = Batches(test, batch_size=BATCH, mean=data.mean, std=data.std)
    started, metric = time.perf_counter(), resolve_metric("top1")
    if aid == FLOAT:
        eq.fit(model, train, epochs=options.epochs, **settings)
        seconds = time.perf_counter() - started
        with torch.no_grad():
            top1 = evaluate(lambda x: call(model, x), evaluated, metric).statistics.double().mean()
        return {"top1": float(top1), "seconds": seconds}
    recipe = RECIPES[aid]
    norms = eq.BatchNormSchedule(reestimate_batches=50 if recipe.live else 0)
    quarter = options.epochs // 4
    stages = [(bits, quarter) for bits in recipe.wide] + [(2, options.epochs - quarter * len(recipe.wide))]
    sim: eq.SimulatedModel | None = None
    for wide, epochs in stages:
        fresh = simulation(recipe, model, data, options.activations, wide)
        sim = fresh if sim is None else eq.carry_weights(sim, fresh)
        eq.calibrate(sim, Batches(data.calibration, batch_size=BATCH, mean=data.mean, std=data.std).inputs())
        history = eq.fit(sim, train, epochs=epochs, batch_norm=norms, aids=recipe.aids(model), **settings)
    assert sim is not None
    seconds = time.perf_counter() - started
    with sim.exact("onnxruntime"):
        top1 = evaluate(lambda x: call(sim, x), evaluated, metric).statistics.double().mean()
    counts = {name: sum(getattr(one, name) for one in history.oscillating) for name in ("n", "oscillating", "frozen")}
    return {"top1": float(top1), "loss": history.epochs[-1].loss, "seconds": seconds, "weights": counts}


def finished(place: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What was found of a run before, None if it was not made yet; a run of other settings ends the script."""
    if not place.exists():
        return None
    found: dict[str, Any] = json.loads(place.read_text())
    if found["settings"] != settings:
        raise SystemExit(f"{place} was made with other settings; give another --out")
    return found


def print_table(options: argparse.Namespace, settings: Mapping[str, Any]) -> None:
    """One line an aid, of the seeds asked for that are there."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for aid in (FLOAT, *RECIPES):
        runs = {seed: finished(options.out / f"{aid}-{seed}.json", settings) for seed in options.seeds}
        found[aid] = {seed: one for seed, one in runs.items() if one is not None}
    print("| aid | seeds | top-1 | sd | against none | 95% | oscillating | frozen | minutes |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for aid, of_seed in found.items():
        if not of_seed:
            continue
        scores = [100 * one["top1"] for one in of_seed.values()]
        paired = [100 * (one["top1"] - found[BASE][s]["top1"]) for s, one in of_seed.items() if s in found[BASE]]
        weights = [one["weights"] for one in of_seed.values() if one.get("weights", {}).get("n")]
        shares = [
            f"{statistics.mean(one[key] / one['n'] for one in weights):.2%}" if weights else ""
            for key in ("oscillating", "frozen")
        ]
        minutes = statistics.mean(one["seconds"] for one in of_seed.values()) / 60
        cells = [
            aid,
            str(len(of_seed)),
            f"{statistics.mean(scores):.2f}",
            spread(scores),
            *difference(paired),
            *shares,
        ]
        print("| " + " | ".join([*cells, f"{minutes:.1f}"]) + " |")


def spread(values: list[float]) -> str:
    """The standard deviation, where there is one."""
    return f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""


def difference(paired: list[float]) -> tuple[str, str]:
    """The mean of differences in points, and its 95% interval."""
    if not paired:
        return "", ""
    mean = statistics.mean(paired)
    if len(paired) < 2:
        return f"{mean:+.2f}", ""
    half = stats.t.ppf(0.975, len(paired) - 1) * statistics.stdev(paired) / len(paired) ** 0.5
    return f"{mean:+.2f}", f"{mean - half:+.2f} to {mean + half:+.2f}"


def print_cost(options: argparse.Namespace, data: Dataset) -> None:
    """The time of a step of each variant against that of "none", and of QAT without any watch over oscillation."""
    torch.manual_seed(0)
    model = resnet8().eval()
    x, y = next(iter(Batches(data.calibration, batch_size=BATCH, mean=data.mean, std=data.std)))
    plain = Recipe()
    names = [aid for aid in RECIPES if aid not in ("progressive", "sums")]
    steps = {"without": _step(plain, model, data, options, x, y)}
    steps |= {aid: _step(RECIPES[aid], model, data, options, x, y) for aid in names}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(options.rounds + 3):
        for name in random.Random(index).sample(list(steps), len(steps)):
            started = time.perf_counter()
            steps[name]()
            if index >= 3:  # the first rounds allocate
                times[name].append(time.perf_counter() - started)
    for name, found in times.items():
        ratios = [a / b for a, b in zip(found, times["without"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:<12} {1000 * statistics.median(found):8.1f} ms, {statistics.median(ratios):.3f} of a step without "
            f"(half of the rounds: {low:.3f} to {high:.3f})"
        )


def _step(
    recipe: Recipe, model: nn.Module, data: Dataset, options: argparse.Namespace, x: Any, y: Any
) -> Callable[[], None]:
    """A training step of a variant in the middle of its schedules."""
    sim = eq.calibrate(simulation(recipe, model, data, options.activations), [x]).train()
    optimizer = torch.optim.SGD(sim.parameters(), lr=1e-3, momentum=0.9)
    work = AidsAtWork(recipe.aids(model), sim, steps=1000)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        outputs = sim(x)
        work.loss(F.cross_entropy(outputs, y), x, outputs, y, step=500).backward()
        optimizer.step()
        work.after_step(500)

    return step


if __name__ == "__main__":
    main()
