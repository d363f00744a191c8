from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import edgeqat as eq
from edgeqat.errors import InputError
from edgeqat.measuring.bench import bench, find_artifacts, latency_ratio
from edgeqat.measuring.latency import MIN_ROUNDS
from helpers import MAIN, CommandLine, flip_byte, run_python
from models import Branches


@pytest.fixture(scope="module")
def two_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with other inputs than `small_artifact`."""
    torch.manual_seed(0)
    batch = (torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6))
    program = eq.convert(eq.calibrate(eq.prepare(Branches().eval(), batch), [batch]))
    return eq.lower(
        program, "onnxruntime", tmp_path_factory.mktemp("run") / "artifacts" / "qat" / "onnxruntime"
    ).folder


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeqat.measuring.latency.BUDGET_S", 0.0)


# The ratio.


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=60), st.floats(0.1, 10.0))
def test_ratio_of_proportional_samples_is_certain(samples: list[float], factor: float) -> None:
    """Pairing takes all that both artifacts share out of the interval."""
    ratio = latency_ratio([factor * sample for sample in samples], samples)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((factor, factor, factor))


def test_interval_covers_under_noise_that_lasts() -> None:
    """Latencies that drift together over some twenty rounds, each with noise of its own; the truth is 2."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        shared = np.exp(np.repeat(generator.normal(0, 0.3, 30), 20))
        ours, theirs = (shared * np.exp(generator.normal(0, 0.1, 600)) for _ in range(2))
        ratio = latency_ratio(list(2 * ours), list(theirs))
        assert ratio.low < ratio.high
        covered += ratio.low <= 2 <= ratio.high
    assert covered >= 88  # of 100 draws at 95%, fewer come once in 700 such tests


# What is timed.


def test_folders_with_other_inputs_get_their_own(two_inputs: Path, small_artifact: eq.Artifact) -> None:
    first, second, again = bench([small_artifact.folder, two_inputs, small_artifact.folder], batch=20)
    (shape,) = first.inputs.values()
    assert shape == (20, 3, 8, 8)
    assert list(second.inputs.values()) == [(20, 3, 6, 6)] * 2
    assert [r.latency.batch for r in (first, second, again)] == [20, 20, 20]
    assert {len(r.latency.samples_ms) for r in (first, second, again)} == {MIN_ROUNDS}
    assert first.ratio is None
    assert second.ratio is not None and second.ratio.low <= second.ratio.value <= second.ratio.high
    assert again.ratio is not None  # a folder may be given twice, to see the noise
    assert first.file_bytes == small_artifact.path.stat().st_size


def test_run_directory_stands_for_all_of_its_artifacts(two_inputs: Path, small_artifact: eq.Artifact) -> None:
    run = two_inputs.parents[2]
    assert find_artifacts([run, small_artifact.folder]) == [two_inputs, small_artifact.folder]


@pytest.mark.parametrize(
    ("name", "words"), [("empty", "holds no artifact"), ("missing", "is no directory")], ids=["empty", "missing"]
)
def test_folder_without_artifact(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"{name} {words}, wanted an artifact folder"):
        find_artifacts([tmp_path / name])


def test_a_folder_of_artifact_folders_names_them(tmp_path: Path, small_artifact: eq.Artifact) -> None:
    for name in ("b", "a"):
        shutil.copytree(small_artifact.folder, tmp_path / name)
    words = rf"is no artifact, but holds some: name them \({tmp_path / 'a'} {tmp_path / 'b'}\), wanted an artifact"
    with pytest.raises(InputError, match=words):
        find_artifacts([tmp_path])


def test_an_unfinished_run_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(
        InputError, match="holds an unfinished run without artifacts: finish it with edgeqat run --resume"
    ):
        find_artifacts([tmp_path])


# The command.


def test_bench_prints_a_table(command: CommandLine, two_inputs: Path, small_artifact: eq.Artifact) -> None:
    ended = command("bench", small_artifact.folder, two_inputs.parents[2], "--batch", "2")
    assert (ended.code, ended.err) == (0, "")
    for words in (
        "2x3x8x8",
        "2x3x6x6, 2x3x6x6",
        "p50 / first",
        "(95%)",
        "2 sample(s) a call",
        "1 thread(s), onnxruntime ",
    ):
        assert words in ended.out


def test_bench_as_json(command: CommandLine, small_artifact: eq.Artifact) -> None:
    ended = command("bench", small_artifact.folder, small_artifact.folder, "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert found["machine"]["threads"] == 1
    first, second = found["results"]
    assert first["artifact"] == str(small_artifact.folder)
    assert (first["runtime"], first["p50_ratio"], first["p50_ratio_ci95"]) == ("onnxruntime", None, None)
    for result in (first, second):
        latency = result["latency_ms"]
        assert (latency["batch"], latency["threads"], latency["n"]) == (1, 1, MIN_ROUNDS)
        assert latency["p50"] == pytest.approx(np.median(latency["samples"]))
        assert latency["p50"] <= latency["p90"] <= latency["p99"]
    medians = [result["latency_ms"]["p50"] for result in (first, second)]
    assert second["p50_ratio"] == pytest.approx(medians[1] / medians[0])
    assert second["p50_ratio_ci95"][0] <= second["p50_ratio"] <= second["p50_ratio_ci95"][1]


def test_bench_refuses_a_folder_that_was_changed(command: CommandLine, folder: Path) -> None:
    flip_byte(folder / "model.onnx")
    assert "it was changed or damaged" in command("bench", folder).refusal(2)


@pytest.mark.parametrize("value", ["0", "1000000000"])
@pytest.mark.parametrize("option", ["--threads", "--batch"])
def test_bench_refuses_none_and_far_too_many(command: CommandLine, folder: Path, option: str, value: str) -> None:
    assert f"Invalid value for '{option}'" in command("bench", folder, option, value).refusal(2)


def test_bench_without_the_runtime_is_exit_4(folder: Path) -> None:
    ended = run_python(f"import sys; sys.modules['onnxruntime'] = None; {MAIN}", "bench", folder)
    assert ended.refusal(4).endswith("install it: pip install 'edgeqat[onnxruntime]'")
