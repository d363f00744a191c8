"""What a plan is said to cost, against the files that are really written."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import batches, digits, trained

import edgeqat as eq
from edgeqat.diagnose.costs import weight_bytes
from edgeqat.diagnose.plan_trials import Material, PlanTrials
from edgeqat.diagnose.treatments import BASE, FEWER_BITS, FLOAT, Choice
from edgeqat.metrics import METRICS
from edgeqat.recipe_quantize import QuantizeSection
from edgeqat.target_rules import resolve_targets

CHOICES = [
    BASE,
    BASE.treating({"conv2": FLOAT, "conv3": FLOAT, "conv4": "mse"}),
    BASE.treating({"conv3": FEWER_BITS, "conv4": FEWER_BITS}),
]


def trials(target: str, log: Path | None = None) -> PlanTrials:
    data = digits()
    calibration, held_out = batches(data.calibration).inputs(), batches(data.validation)
    material = Material(trained(), calibration, held_out, QuantizeSection(), [target], METRICS["top1"])
    return PlanTrials(material, log)


@pytest.mark.parametrize("target", ["onnxruntime", "torchscript"])
def test_weights_are_counted_as_files_hold_them(target: str, tmp_path: Path) -> None:
    own = trials(target)
    (rule,) = resolve_targets(target)
    payload, counted = [], []
    for i, choice in enumerate(CHOICES):
        artifact = eq.lower(eq.convert(own.candidates.simulation(choice)), target, tmp_path / str(i))
        payload.append(artifact.manifest["payload_bytes"])
        counted.append(weight_bytes(own.candidates.plan(choice), own.layers, rule))
    biases = 4 * (4 * 16 + 10)
    assert payload == [n + biases for n in counted]


@pytest.mark.parametrize("choice", CHOICES[1:], ids=Choice.describe)
def test_a_file_has_the_size_that_was_predicted_but_for_its_graph(choice: Choice, tmp_path: Path) -> None:
    own = trials("onnxruntime")
    cost = own.cost(choice, timed=False)
    artifact = eq.lower(eq.convert(own.candidates.simulation(choice)), "onnxruntime", tmp_path / "one")
    twin = eq.lower(eq.convert(own.candidates.float_simulation()), "onnxruntime", tmp_path / "float")
    # Scales, zero points and nodes of a layer in float are not there, and a conversion more may be.
    assert abs(cost.file_bytes - artifact.file_bytes) < 700 * max(1, len(choice.layers))
    assert cost.size_ratio == twin.file_bytes / cost.file_bytes
    assert cost.speedup is None


def test_each_layer_is_timed_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    own = trials("onnxruntime", path)
    one = own.cost(BASE.treating({"conv3": FLOAT, "conv1": "mse"}), timed=True)
    lines = len(path.read_text().splitlines())
    assert one.speedup is not None and one.speedup > 0
    assert own.cost(BASE.treating({"conv3": FLOAT}), timed=True).speedup == one.speedup
    assert len(path.read_text().splitlines()) == lines == 3  # sizes, the float model, conv3
    assert trials("onnxruntime", path).cost(BASE.treating({"conv3": FLOAT}), timed=True) == own.cost(
        BASE.treating({"conv3": FLOAT}), timed=True
    )
