"""What exact evaluation costs: `sim.exact(arithmetic)` against the plain simulated evaluation of the same batch.

    python benchmarks/exact_cost.py [--models resnet20 ...] [--batch 128] [--rounds 15] [--threads 2]

The two are timed in turn, on a calibrated simulation in eval mode without gradients. Printed: both medians and the
median of the rounds' ratios, with its smallest and largest. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import edgeqat as eq
from common import print_machine
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.zoo import edge_model, mobilenetv2_cifar, resnet8, resnet20

MODELS = {"edge": edge_model, "resnet8": resnet8, "resnet20": resnet20, "mobilenetv2": mobilenetv2_cifar}
TARGET_OF = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
"""Which target's plan an arithmetic is for, by the runtime in its name; "portable" for all others."""

WARM_UP = 2


def seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """One call."""
    started = time.perf_counter()
    with torch.no_grad():
        call(x)
    return time.perf_counter() - started


def measure(name: str, arithmetic: str, batch: int, rounds: int) -> None:
    """Prints one line."""
    torch.manual_seed(0)
    x = torch.randn(batch, 3, 32, 32)
    target = TARGET_OF.get(arithmetic.partition("/")[0], "portable")
    sim = eq.calibrate(eq.prepare(MODELS[name]().eval(), x[:8], target), [x]).eval()
    simulated, plain, exact = copy.deepcopy(sim), [], []
    with sim.exact(arithmetic) as integers:
        for i in range(WARM_UP + rounds):
            pair = seconds(simulated, x), seconds(integers, x)
            if i >= WARM_UP:
                plain.append(pair[0])
                exact.append(pair[1])
    ratios = [b / a for a, b in zip(plain, exact, strict=True)]
    print(
        f"{name}, batch {batch}, {arithmetic}: simulated {1000 * statistics.median(plain):.1f} ms, exact "
        f"{1000 * statistics.median(exact):.1f} ms, ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)",
        flush=True,
    )


def main() -> None:
    """One line a model and arithmetic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet20", "mobilenetv2"])
    parser.add_argument("--arithmetics", nargs="+", choices=list(ARITHMETICS), default=list(ARITHMETICS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_machine(options.threads)
    for name in options.models:
        for arithmetic in options.arithmetics:
            measure(name, arithmetic, options.batch, options.rounds)


if __name__ == "__main__":
    main()
