"""Every bundled recipe that trains, from end to end, on digits and with one epoch of each training."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import edgeqat as eq
from edgeqat.errors import DataError, MissingRuntimeError, ModelError, OutputError, RecipeError
from edgeqat.machine import arithmetic_here
from edgeqat.measuring import latency, memory
from edgeqat.recipe import Recipe, bundled_recipes, load_recipe
from edgeqat.replay.script import replay
from edgeqat.reporting.pictures import flipped, picture_path
from edgeqat.reporting.schema import Report, read_report
from helpers import EXACT_ARITHMETIC, digests

TINY = [
    "data.source=digits",
    "data.image_size=16",
    "data.calibration_n=64",
    "model.weights=null",
    "train.float_epochs=1",
    "train.qat_epochs=1",
]
NARROW = {"cifar10-mobilenetv2": ["model.args.width=0.25"]}
"""Deep networks take their time here even on small images."""
ROUNDS = 40
ELSEWHERE = {"folder-ptq": "test_pipeline_data.py", "imagenet-mobilenetv2": "test_pipeline_imagenet.py"}
VARIANTS = ["float", "ptq", "float_finetuned", "qat"]
UNTRAINED = ["float", "ptq"]


MODEL_FILES = {"onnxruntime": "model.onnx", "torchscript": "model.pt"}


def files_of(variants: list[str], runtimes: Sequence[str] = ("onnxruntime",), epochs: int = 1) -> set[str]:
    """The files of section 4 of the design, and the raw timings that the report points to."""
    files = {"recipe.yaml", "report.json", "report.html"}
    for variant in variants:
        trained = [] if variant == "ptq" or epochs == 0 else [f"epochs/{variant}-0001"]
        files |= {f"checkpoints/{name}.{kind}" for name in (variant, *trained) for kind in ("json", "safetensors")}
        for runtime in runtimes:
            files.add(f"latency/{variant}-{runtime}.csv")
            for name in (MODEL_FILES[runtime], "manifest.json", "golden.safetensors", "verify.py"):
                files.add(f"artifacts/{variant}/{runtime}/{name}")
    return files


@pytest.fixture(scope="module", autouse=True)
def few_rounds() -> Iterator[None]:
    """How long and how often is measured is not what is tested here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(latency, "MIN_ROUNDS", ROUNDS)
        patched.setattr(latency, "MAX_ROUNDS", ROUNDS)
        patched.setattr(memory, "PROCESSES", 1)
        yield


@pytest.fixture(scope="module", params=[name for name in bundled_recipes() if name not in ELSEWHERE])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Report]:
    """(recipe, directory, report) of one run of each of them."""
    recipe = load_recipe(request.param, [*TINY, *NARROW.get(request.param, ())])
    folder = tmp_path_factory.mktemp("run") / "deep" / request.param
    return recipe, folder, eq.run(recipe, folder)


def pictures_of(report: Report) -> set[str]:
    """The files of the samples that changed sides, which are images here."""
    return {picture_path(index) for index in flipped(report)}


# report.json, structure.


def optional(kind: object) -> list[object]:
    return [kind, None]


FRACTION = "fraction"
INTERVAL = "interval"
REPORT: dict[str, object] = {
    "schema": 1,
    "edgeqat": str,
    "recipe": dict,
    "recipe_sha256": str,
    "machine": {"cpu": str, "arch": str, "features": list, "threads": int, "versions": dict},
    "data": {"source": str, "train_n": int, "calibration_n": int, "eval_n": int},
    "results": list,
    "gate": {"passed": bool, "checks": list},
    "ptq_aids": list,
    "auto": None,
    "plan": str,
    "network": {"variant": str, "n": int, "ops": list, "distributions": list},
    "training": list,
}
ROW: dict[str, object] = {
    "variant": str,
    "runtime": str,
    "engine": optional(str),
    "arithmetic": optional(str),
    "metric": {
        "name": "top1",
        "value": FRACTION,
        "ci95": INTERVAL,
        "n": int,
        "higher_is_better": True,
        "is_share": True,
    },
    "drop": optional(float),
    "drop_ci95": optional(INTERVAL),
    "file_bytes": optional(int),
    "payload_bytes": optional(int),
    "latency_ms": optional(
        {"batch": 1, "threads": 1, "n": int, "p50": float, "p90": float, "p99": float, "samples": str}
    ),
    "speedup_ci95": optional(INTERVAL),
    "peak_memory_bytes": optional(int),
    "parity": optional(
        {
            "against": str,
            "n": int,
            "bit_identical": FRACTION,
            "max_error_steps": float,
            "agreement": FRACTION,
            "first_difference": optional(str),
            "output_error": float,
            "histogram": dict,
            "values": list,
            "unseen": list,
        }
    ),
    "ops": optional({"integer": int, "float": int}),
    "profile": list,
    "artifact": optional(str),
    "sha256": optional(str),
    "changes": optional(
        {
            "flips": {"right_to_wrong": int, "wrong_to_right": int, "wrong_to_wrong": int, "samples": list},
            "largest": None,
            "per_class": list,
        }
    ),
    "hazards": list,
}
CHECK: dict[str, object] = {
    "name": str,
    "variant": str,
    "runtime": str,
    "limit": float,
    "value": float,
    "passed": bool,
}


def assert_shape(found: object, wanted: object, path: str) -> None:
    """`wanted` is a type, a value, a mapping with exactly these keys in this order, or a list of alternatives."""
    if isinstance(wanted, list):
        if found is None:
            assert None in wanted, path
        else:
            assert_shape(found, wanted[0], path)
    elif isinstance(wanted, dict):
        assert isinstance(found, dict), path
        assert list(found) == list(wanted), path
        for key, inner in wanted.items():
            assert_shape(found[key], inner, f"{path}.{key}")
    elif wanted is FRACTION:
        assert type(found) is float, path
        assert 0 <= found <= 1, path
    elif wanted is INTERVAL:
        assert isinstance(found, list), path
        assert [type(end) for end in found] == [float, float], path
        assert found[0] <= found[1], path
    elif isinstance(wanted, type):
        assert type(found) is wanted, path
    else:
        assert found == wanted, path


def test_report_has_exactly_the_keys_and_types_of_the_contract(finished: tuple[Recipe, Path, Report]) -> None:
    report = json.loads((finished[1] / "report.json").read_text(encoding="utf-8"))
    assert_shape(report, REPORT, "report")
    for i, row in enumerate(report["results"]):
        assert_shape(row, ROW, f"results.{i}")
    for i, check in enumerate(report["gate"]["checks"]):
        assert_shape(check, CHECK, f"checks.{i}")
    assert report == finished[2].to_dict()


def test_every_file_of_the_contract_and_no_other_is_there(finished: tuple[Recipe, Path, Report]) -> None:
    assert set(digests(finished[1])) == files_of(VARIANTS, finished[0].export) | pictures_of(finished[2])
    assert [p.name for p in finished[1].parent.iterdir()] == [finished[1].name]


def test_recipe_is_written_resolved_and_reported(finished: tuple[Recipe, Path, Report]) -> None:
    recipe, folder, report = finished
    assert load_recipe(str(folder / "recipe.yaml")) == recipe
    assert (folder / "recipe.yaml").read_text(encoding="utf-8") == recipe.to_yaml()
    assert report.recipe == recipe.model_dump()
    assert report.recipe_sha256 == recipe.sha256()
    assert report.edgeqat == eq.__version__
    assert report.data == {"source": "digits", "train_n": 1197 - 119 - 64, "calibration_n": 64, "eval_n": 600}


def test_the_network_is_that_of_the_judged_variant_and_training_is_told(finished: tuple[Recipe, Path, Report]) -> None:
    network, report = finished[2].network, finished[2]
    assert network is not None and network.variant == "qat" and 1 <= network.n <= 64
    assert sum(op.runs == "float" for op in network.ops) == 0 and "INT8" in report.plan
    assert {row.name for row in network.distributions if row.part == "activation"} <= {op.name for op in network.ops}
    assert all(sum(row.counts) > 0 for row in network.distributions if row.low < row.high)
    stages = {stage.stage: stage.epochs for stage in report.training}
    assert {name: len(epochs) for name, epochs in stages.items()} == {"float": 1, "float_finetuned": 1, "qat": 1}
    assert all(epoch.metric is not None and epoch.loss > 0 for epochs in stages.values() for epoch in epochs)


def test_a_row_per_variant_and_runtime(finished: tuple[Recipe, Path, Report]) -> None:
    recipe, _, report = finished
    places = [(row.variant, row.runtime) for row in report.results]
    assert places == [(variant, runtime) for variant in VARIANTS for runtime in ("simulation", *recipe.export)]
    for row in report.results:
        assert row.metric.n == 600
        assert row.metric.ci95[0] <= row.metric.value <= row.metric.ci95[1]
        on_runtime = row.runtime != "simulation"
        artifact_fields = [row.engine, row.file_bytes, row.payload_bytes, row.latency_ms, row.parity, row.artifact]
        assert [field is not None for field in [*artifact_fields, row.sha256]] == [on_runtime] * 7
        assert (row.drop is None) == (row.drop_ci95 is None) == row.variant.startswith("float")
        assert row.ops is not None
        assert (row.ops.integer > 0, row.ops.float > 0) == (
            (False, True) if row.variant.startswith("float") else (True, False)
        )


@pytest.mark.parametrize(("variant", "twin"), [("ptq", "float"), ("qat", "float_finetuned")])
def test_drop_is_against_the_float_twin_on_the_same_runtime(
    finished: tuple[Recipe, Path, Report], variant: str, twin: str
) -> None:
    for runtime in ("simulation", *finished[0].export):
        row, other = finished[2].row(variant, runtime), finished[2].row(twin, runtime)
        assert row is not None
        assert other is not None
        assert row.drop == pytest.approx(other.metric.value - row.metric.value, abs=1e-9)
        assert row.drop_ci95 is not None
        assert row.drop_ci95[0] <= row.drop <= row.drop_ci95[1]


@EXACT_ARITHMETIC
@pytest.mark.parametrize("variant", ["ptq", "qat"])
def test_artifacts_compute_the_reference_to_the_bit(finished: tuple[Recipe, Path, Report], variant: str) -> None:
    for runtime in finished[0].export:
        row = finished[2].row(variant, runtime)
        assert row is not None
        assert row.parity is not None
        values = row.parity.values
        assert row.parity.histogram == {0: sum(value.histogram[0] for value in values)}
        assert len(values) > 5 and all(set(value.histogram) == {0} for value in values)
        assert row.parity.model_dump(exclude={"values", "histogram"}) == {
            "against": f"reference:{arithmetic_here(runtime)}",
            "n": 600,
            "bit_identical": 1.0,
            "max_error_steps": 0.0,
            "agreement": 1.0,
            "first_difference": None,
            "output_error": 0.0,
            "unseen": [],
        }
        assert row.arithmetic == arithmetic_here(runtime)


@pytest.mark.parametrize("variant", ["float", "float_finetuned"])
def test_float_artifacts_are_compared_with_the_model(finished: tuple[Recipe, Path, Report], variant: str) -> None:
    row, model = finished[2].row(variant, "onnxruntime"), finished[2].row(variant, "simulation")
    assert row is not None
    assert model is not None
    assert row.parity is not None
    assert (row.parity.against, row.parity.n, row.parity.first_difference) == ("simulation", 600, None)
    assert row.parity.agreement >= 598 / 600  # two float kernels may part on a tie
    assert row.metric.value == pytest.approx(model.metric.value, abs=2 / 600)


def test_latencies_are_those_of_the_sample_files(finished: tuple[Recipe, Path, Report]) -> None:
    for row in finished[2].results:
        if row.latency_ms is None:
            continue
        head, *lines = (finished[1] / row.latency_ms.samples).read_text().splitlines()
        samples = sorted(float(line) for line in lines)
        assert head == "ms"
        assert len(samples) == row.latency_ms.n == ROUNDS
        assert 0 < samples[0] <= row.latency_ms.p50 <= row.latency_ms.p90 <= row.latency_ms.p99 <= samples[-1] + 1e-6
        middle = (samples[ROUNDS // 2 - 1] + samples[ROUNDS // 2]) / 2
        assert row.latency_ms.p50 == pytest.approx(middle, abs=2e-6)  # the file keeps nanoseconds


def test_artifacts_are_the_reported_files_and_replay(finished: tuple[Recipe, Path, Report]) -> None:
    _, folder, report = finished
    for row in report.results:
        if row.artifact is None:
            continue
        assert row.artifact == f"artifacts/{row.variant}/{row.runtime}/{MODEL_FILES[row.runtime]}"
        data = (folder / row.artifact).read_bytes()
        assert row.sha256 == hashlib.sha256(data).hexdigest()
        assert row.file_bytes == len(data)
        assert row.payload_bytes is not None
        assert 0.3 * len(data) < row.payload_bytes < len(data)
        found = replay((folder / row.artifact).parent)
        assert found.passed or not found.exact_here
        assert found.samples == 16


def test_manifests_say_how_images_become_inputs(finished: tuple[Recipe, Path, Report]) -> None:
    recipe, folder, _ = finished
    for variant in VARIANTS:
        manifest = json.loads((folder / "artifacts" / variant / "onnxruntime" / "manifest.json").read_text())
        assert manifest["preprocessing"] == {
            "input": "RGB in 0..1",
            "mean": recipe.data.mean or [0.5, 0.5, 0.5],
            "std": recipe.data.std or [0.5, 0.5, 0.5],
            "layout": "NCHW",
            "resize": {"size": [recipe.data.image_size] * 2, "method": "bilinear"},
            "labels": [str(digit) for digit in range(10)],
        }


def test_gate_holds_the_qat_rows_against_the_recipe(finished: tuple[Recipe, Path, Report]) -> None:
    recipe, _, report = finished
    limits = {name: limit for name, limit in recipe.gate.model_dump().items() if name != "runtimes"}
    for runtime in recipe.export:
        checks = [check for check in report.gate.checks if check.runtime == runtime]
        assert {check.name: check.limit for check in checks} == {
            name: limit for name, limit in limits.items() if limit is not None
        }
        values = {check.name: check.value for check in checks}
        row, twin = report.row("qat", runtime), report.row("float_finetuned", runtime)
        assert row is not None
        assert twin is not None
        assert row.file_bytes is not None
        assert twin.file_bytes is not None
        assert row.parity is not None
        assert values["max_drop"] == row.drop
        assert values["min_size_ratio"] == twin.file_bytes / row.file_bytes
        assert values["min_agreement"] == row.parity.agreement
        for check in checks:
            within = check.value <= check.limit if check.name == "max_drop" else check.value >= check.limit
            assert (check.variant, check.passed) == ("qat", within)
    assert {check.runtime for check in report.gate.checks} == set(recipe.export)
    assert report.gate.passed == all(check.passed for check in report.gate.checks)


def test_page_shows_every_row(finished: tuple[Recipe, Path, Report]) -> None:
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    for row in finished[2].results:
        assert f"{100 * row.metric.value:.2f}%" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script src" not in page


# One small recipe, changed.

SMALL = ["data.image_size=8", "data.calibration_n=900", "train.float_epochs=1", "train.qat_epochs=1"]


def small(*settings: str) -> Recipe:
    return load_recipe("digits-edge", [*SMALL, *settings])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one run of it; read only."""
    folder = tmp_path_factory.mktemp("small") / "run"
    eq.run(small(), folder)
    return folder


def lasting(folder: Path) -> dict[str, str]:
    """What does not depend on when, or how fast, a run was made; the JSON files of epochs hold their seconds."""
    timed = re.compile(r"latency/|report\.|checkpoints/epochs/.*\.json")
    return {name: digest for name, digest in digests(folder).items() if timed.match(name) is None}


def test_same_seed_gives_the_same_bytes_and_overwrite_leaves_nothing_of_the_old_run(
    small_run: Path, tmp_path: Path
) -> None:
    folder, first = Path(shutil.copytree(small_run, tmp_path / "run")), lasting(small_run)
    (folder / "artifacts" / "stale").write_text("of the old run")
    with pytest.raises(OutputError, match="holds a finished run; pass --overwrite to replace it"):
        eq.run(small(), folder)
    assert (folder / "artifacts" / "stale").exists()

    eq.run(small(), str(folder), overwrite=True)
    assert lasting(folder) == first
    assert set(digests(folder)) == files_of(VARIANTS) | pictures_of(read_report(folder))

    eq.run(small("train.seed=1"), folder, overwrite=True)
    other = lasting(folder)
    changed = {name for name in first if other.get(name) != first[name]}
    assert {f"checkpoints/{variant}.safetensors" for variant in VARIANTS} <= changed
    assert {f"artifacts/{variant}/onnxruntime/model.onnx" for variant in VARIANTS} <= changed
    assert {name for name in first if name.endswith("verify.py")}.isdisjoint(changed)


def test_without_training_there_is_ptq_alone_and_the_gate_is_on_it(small_run: Path, tmp_path: Path) -> None:
    weights = f"model.weights={small_run / 'checkpoints' / 'float.safetensors'}"
    report = eq.run(small("train=null", weights, "gate={max_drop: -1, min_size_ratio: 1.0}"), tmp_path / "run")
    assert set(digests(tmp_path / "run")) == files_of(UNTRAINED, epochs=0) | pictures_of(report)
    places = [(row.variant, row.runtime) for row in report.results]
    assert places == [(variant, runtime) for variant in UNTRAINED for runtime in ("simulation", "onnxruntime")]
    verdicts = {check.name: (check.variant, check.passed) for check in report.gate.checks}
    assert verdicts == {
        "max_drop": ("ptq", False),
        "min_size_ratio": ("ptq", True),
        "min_agreement": ("ptq", True),
    }
    assert not report.gate.passed


def test_weights_are_where_training_starts(tmp_path: Path) -> None:
    eq.run(small(), tmp_path / "first")
    weights = tmp_path / "first" / "checkpoints" / "float.safetensors"
    eq.run(small(f"model.weights={weights}", "train.float_epochs=0"), tmp_path / "second")
    first, second = lasting(tmp_path / "first"), lasting(tmp_path / "second")
    # Checkpoints name their recipe, and there is none of an epoch that was not trained.
    made = [name for name in first if re.match(r"checkpoints/(epochs/|.*\.json)", name) is None]
    for name in made:
        assert name == "recipe.yaml" or second[name] == first[name], name


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("task.metric=f1", RecipeError, "task.metric: found the metric 'f1', wanted one of top1"),
        ("gate.runtimes=[litert]", RecipeError, "gate.runtimes: found 'litert', wanted runtimes of export"),
        ("measure.batch=601", DataError, "measure.batch is 601, but there are 600 test samples"),
        ("data.augment=[spin]", DataError, "data.augment has 'spin'"),
        ("model.args.num_classes=9", ModelError, "check model.args and task.loss against the 10 classes"),
        ("task.loss=os:getcwd", ModelError, "the loss os:getcwd of one batch of digits fails: TypeError"),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) and "=" in value else "",
)
def test_what_would_fail_later_is_found_first(
    tmp_path: Path, setting: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as caught:
        eq.run(small(setting), tmp_path / "run")
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_missing_runtime_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeqat.pipeline.installed_runtimes", lambda: {"onnxruntime": None})
    with pytest.raises(MissingRuntimeError, match=r"onnxruntime is not usable here .*pip install 'edgeqat\[onnxr"):
        eq.run(small(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
