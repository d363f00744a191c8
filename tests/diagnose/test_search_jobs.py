"""Searches in jobs: they find what one job finds, with the user's own code too, and go on where they were killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import SATURATING, batches, digits, trained, with_outlier

import edgeqat as eq
from edgeqat.diagnose.jobs import Jobs
from edgeqat.diagnose.plan_trials import Material, PlanTrials
from edgeqat.diagnose.search import SearchResult, search_trials
from edgeqat.diagnose.treatments import BASE, FLOAT, Choice
from edgeqat.errors import DataError
from edgeqat.factory import build_metric, build_model
from edgeqat.metrics import METRICS
from edgeqat.recipe import ModelSection
from edgeqat.recipe_quantize import QuantizeSection
from helpers import ENVIRONMENT


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs(2) as found:
        yield found


def material(overrides: Sequence[dict[str, Any]] = (), batch_norm: str = "fold") -> Material:
    """One with an outlier channel, and what `overrides` do."""
    base = QuantizeSection.model_validate({"overrides": list(overrides), "batch_norm": batch_norm})
    calibration, held_out = batches(digits().calibration).inputs(), batches(digits().validation)
    return Material(with_outlier(trained()), calibration, held_out, base, ["onnxruntime"], METRICS["top1"])


def found(trials: PlanTrials) -> SearchResult:
    return search_trials(trials, eq.Limits(max_drop=0.02))


def of_kind(log: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, log.read_text().splitlines()) if record["kind"] == kind]


def test_the_same_trials_lead_to_the_same_plan(jobs: Jobs, tmp_path: Path) -> None:
    given = material([SATURATING], "live")
    log = tmp_path / "trials.jsonl"
    alone, together = found(PlanTrials(given)), found(PlanTrials(given, log, jobs=jobs))
    assert (together.trials, together.best, together.quantize) == (alone.trials, alone.best, alone.quantize)
    assert str(together) == str(alone)
    trials = of_kind(log, "trial")
    assert len(trials) >= len(alone.trials)  # with those that were foreseen and not needed
    assert len({record["key"] for record in trials}) == len(trials)
    before = log.read_bytes()
    assert found(PlanTrials(given, log, jobs=jobs)).trials == found(PlanTrials(given, log)).trials == alone.trials
    assert log.read_bytes() == before


CODE = """
import torch
import edgeqat as eq
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(self.conv(x))

def merged(block):
    assert isinstance(block, Block)  # the class of this very import
    return nn.Sequential(block.conv, nn.ReLU())

def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Flatten(), nn.Linear(8 * 64, 10)).eval()

def score(outputs, targets):
    return outputs.gather(1, targets[:, None])[:, 0] / CALLS

score.higher_is_better = True
CALLS = 2.0
block = eq.FusionPattern("mine", modules=Block, replace=merged)
"""


def test_models_metrics_and_patterns_of_a_file_work_in_jobs(jobs: Jobs, tmp_path: Path) -> None:
    place = tmp_path / "net.py"
    place.write_text(CODE)
    model = build_model(ModelSection(factory=f"{place}:network"), 0)
    base = QuantizeSection.model_validate({"fusions": [f"{place}:block"]})
    calibration, held_out = batches(digits().calibration).inputs(), batches(digits().validation)
    given = Material(model, calibration, held_out, base, ["onnxruntime"], build_metric(f"{place}:score"))
    choices, log = [BASE, Choice(("mse",))], tmp_path / "log.jsonl"
    together = PlanTrials(given, log, jobs=jobs)
    place.write_text("raise ValueError('edited while it runs')\n")
    together.evaluate_all(choices)
    assert len(of_kind(log, "trial")) == 2  # neither of them was left to be made here
    for choice in choices:
        assert together.evaluate(choice).drop == together.candidates.measure(choice)["drop"]
    assert together.ranking(BASE) == PlanTrials(given).ranking(BASE)


def test_a_trial_that_fails_counts_only_where_it_is_asked_for(jobs: Jobs) -> None:
    trials = PlanTrials(material(), jobs=jobs)
    nonsense = Choice(layers=(("no such layer", FLOAT),))
    trials.evaluate_all([BASE, nonsense])
    assert trials.evaluate(BASE).n == len(digits().validation)
    with pytest.raises(KeyError, match="no such layer"):
        trials.evaluate(nonsense)


def test_a_trial_s_own_error_is_the_one_that_is_raised(jobs: Jobs) -> None:
    given = material()
    broken = [(x, torch.full((len(x),), 99)) for x, _ in given.batches]
    trials = PlanTrials(
        Material(given.model, given.calibration, broken, given.base, given.targets, given.metric), jobs=jobs
    )
    with pytest.raises(DataError):
        found(trials)


SEARCH = """
import sys, torch
sys.path[:0] = sys.argv[2].split(":")
torch.set_num_threads(1)
from test_search_jobs import Jobs, PlanTrials, found, material
from faults import SATURATING
from pathlib import Path

with Jobs(2) as jobs:
    print(found(PlanTrials(material([SATURATING]), Path(sys.argv[1]), jobs=jobs)))
"""


def searching(log: Path) -> subprocess.Popen[str]:
    places = ":".join(str(path) for path in (Path(__file__).parent, Path(__file__).parent.parent))
    command = [sys.executable, "-c", SEARCH, str(log), places]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_a_search_that_is_killed_goes_on_and_makes_no_trial_twice(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    killed = searching(log)
    while not log.exists() or len(of_kind(log, "trial")) < 3:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    before = log.read_bytes()
    told, _ = (resumed := searching(log)).communicate(timeout=200)
    assert resumed.returncode == 0
    assert log.read_bytes().startswith(before)
    keys = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert len(keys) == len(set(keys)) > len(before.splitlines())
    assert told.rstrip() == str(found(PlanTrials(material([SATURATING]))))
