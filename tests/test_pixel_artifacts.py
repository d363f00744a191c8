"""Files that take pixels: exact on their runtimes, replayed and timed anywhere, made by a recipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import InputError, RecipeError
from edgeqat.measuring.bench import bench
from edgeqat.program import Kind
from edgeqat.recipe import load_recipe
from edgeqat.replay.kernels import EXACT_ENGINES
from edgeqat.replay.script import replay
from helpers import ENVIRONMENT, EXACT_ARITHMETIC, CommandLine
from models import SmallNet, shake
from own_targets import write_target

PIXELS = eq.Pixels((0.49, 0.48, 0.44), (0.25, 0.24, 0.26))
RUNTIMES = ["onnxruntime", "torchscript"]


def images(n: int, seed: int) -> Tensor:
    return torch.randint(256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def converted(model: nn.Module, target: str | list[str], batch_norm: str = "fold") -> eq.QuantizedProgram:
    sim = eq.prepare(shake(model).eval(), images(2, 0), target, batch_norm=batch_norm, pixels=PIXELS)
    return eq.convert(eq.calibrate(sim, [images(32, 1)]))


@pytest.fixture(scope="module")
def program() -> eq.QuantizedProgram:
    """SmallNet for both runtimes."""
    torch.manual_seed(0)
    return converted(SmallNet(), RUNTIMES)


@pytest.fixture(scope="module", params=RUNTIMES)
def artifact(
    program: eq.QuantizedProgram, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> eq.Artifact:
    """Its file for each."""
    folder = tmp_path_factory.mktemp("pixels") / str(request.param)
    return eq.lower(program, str(request.param), folder, preprocessing={"labels": list("abcdefghij")})


@EXACT_ARITHMETIC
def test_every_integer_is_the_reference_s(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    found = eq.verify(artifact, program, [images(64, 2), images(3, 3)])
    assert (found.bit_identical, found.max_error_steps, found.first_difference) == (1.0, 0.0, None)
    assert replay(artifact.folder).passed


@EXACT_ARITHMETIC
@pytest.mark.parametrize("engine", EXACT_ENGINES)
def test_every_engine_takes_pixels(engine: str, program: eq.QuantizedProgram, tmp_path: Path) -> None:
    artifact = eq.lower(program, "torchscript", tmp_path / "a")
    assert eq.verify(artifact, program, [images(32, 2)], engine=engine).bit_identical == 1.0


@pytest.mark.parametrize("runtime", ["executorch", "openvino", "litert"])
def test_runtimes_that_store_them_otherwise(runtime: str, tmp_path: Path) -> None:
    """Integers of ExecuTorch and LiteRT are 128 less: their files take the pixels, and take 128 away first."""
    program = converted(SmallNet(), runtime)
    artifact = eq.lower(program, runtime, tmp_path / "a")
    found = eq.verify(artifact, program, [images(32, 2), images(3, 3)])
    assert found.bit_identical == 1.0 or not found.exact_here
    assert replay(artifact.folder).passed or not found.exact_here
    assert artifact.manifest["inputs"]["x"]["dtype"] == "uint8"


@EXACT_ARITHMETIC
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_live_batch_norm_behind_the_first_convolution(runtime: str, tmp_path: Path) -> None:
    program = converted(SmallNet(), runtime, "live")
    assert eq.verify(eq.lower(program, runtime, tmp_path / "a"), program, [images(32, 2)]).bit_identical == 1.0


@EXACT_ARITHMETIC
def test_a_target_of_one_s_own(tmp_path: Path) -> None:
    target = write_target(tmp_path, "activations: {symmetric: true, power_of_two: true}\n")
    program = converted(SmallNet(), target)
    assert eq.verify(eq.lower(program, target, tmp_path / "a"), program, [images(32, 2)]).bit_identical == 1.0


class WithVector(nn.Module):
    """An image and a vector of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(5, 8)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        return torch.relu(self.conv(image)).mean((2, 3)) + self.fc(vector)


@EXACT_ARITHMETIC
def test_inputs_that_are_no_images_stay_as_they_are(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"image": images(16, 1), "vector": torch.randn(16, 5)}
    sim = eq.prepare(WithVector().eval(), batch, pixels=PIXELS)
    program = eq.convert(eq.calibrate(sim, [batch]))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    assert {name: entry["dtype"] for name, entry in artifact.manifest["inputs"].items()} == {
        "image": "uint8",
        "vector": "float32",
    }
    assert eq.verify(artifact, program, [batch]).bit_identical == 1.0


@EXACT_ARITHMETIC
def test_images_of_any_size(tmp_path: Path) -> None:
    sim = eq.prepare(shake(SmallNet()).eval(), images(2, 0), dynamic_size=True, pixels=PIXELS)
    program = eq.convert(eq.calibrate(sim, [images(32, 1)]))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    for size in (8, 24):
        given = torch.randint(256, (4, 3, size, size + 4), dtype=torch.uint8)
        assert eq.verify(artifact, program, [given]).bit_identical == 1.0


def test_nothing_is_quantized_on_the_way_in(artifact: eq.Artifact, program: eq.QuantizedProgram) -> None:
    ran = artifact.manifest["coverage"]["runtime_ops"]
    assert not {"QuantizeLinear", "Cast", "aten::quantize_per_tensor"} & set(ran)
    assert all(op.kind is not Kind.QUANTIZE for op in program.ops)
    assert artifact.manifest["inputs"] == {"x": {"shape": ["batch", 3, 16, 16], "dtype": "uint8"}}
    assert artifact.manifest["grids"]["x"] == {"scale": 2.0**-6, "zero_point": 120, "qmin": 0, "qmax": 255}


@EXACT_ARITHMETIC
def test_simulation_exact_mode_and_file_are_one(program: eq.QuantizedProgram, tmp_path: Path) -> None:
    sim = eq.prepare(shake(SmallNet()).eval(), images(2, 0), pixels=PIXELS).eval()
    eq.calibrate(sim, [images(32, 1)])
    artifact = eq.lower(eq.convert(sim), "onnxruntime", tmp_path / "a")
    given = images(16, 4)
    with torch.no_grad():
        simulated = sim(given)
    with sim.exact("onnxruntime/x86"):
        exact = sim(given)
    assert torch.equal(artifact.run(given), exact) or EXACT_ARITHMETIC.args[0] is not False
    assert float((simulated - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_normalised_floats_are_refused(artifact: eq.Artifact) -> None:
    floats = PIXELS.normalised(images(2, 0))
    for held, said in (
        (artifact, r"input 'x' is float32 \[2, 3, 16, 16\], wanted uint8 \[N, 3, 16, 16\]"),
        (eq.load_artifact(artifact.folder), r"input 'x' is float32, wanted uint8 \['batch', 3, 16, 16\]"),
    ):
        with pytest.raises(InputError, match=said):
            held.run(floats)


def test_pixels_are_refused_by_a_file_of_normalised_floats(small_artifact: eq.Artifact) -> None:
    with pytest.raises(InputError, match="input 'x' is uint8, wanted float32"):
        eq.load_artifact(small_artifact.folder).run(images(2, 0))


def test_a_normalisation_that_a_device_would_do_twice_is_refused(program: eq.QuantizedProgram, tmp_path: Path) -> None:
    twice = {"mean": [0.5] * 3, "std": [0.5] * 3, "layout": "NCHW"}
    for preprocessing in (twice, {"inputs": {"x": twice}}):
        with pytest.raises(InputError, match="in the preprocessing of 'x', which takes pixels"):
            eq.lower(program, "onnxruntime", tmp_path / "a", preprocessing=preprocessing)


def test_golden_inputs_are_pixels(artifact: eq.Artifact) -> None:
    from safetensors.torch import load_file

    golden = load_file(artifact.folder / "golden.safetensors")
    assert golden["inputs/x"].dtype == torch.uint8 and "pixels/x" not in golden
    assert int(golden["inputs/x"].min()) == 0 and int(golden["inputs/x"].max()) == 255


def test_the_script_on_a_device(artifact: eq.Artifact, tmp_path: Path) -> None:
    pixels = images(1, 5)
    np.save(tmp_path / "photo.npy", pixels[0].permute(1, 2, 0).numpy())

    def script(*args: str | Path) -> str:
        command = [sys.executable, "-P", artifact.folder / "verify.py", *args]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert script().startswith(("verified: 100.00%", "differs"))
    scores = artifact.run(pixels)[0]
    first = int(scores.argmax())
    assert script("--image", tmp_path / "photo.npy").splitlines()[0] == f"{'abcdefghij'[first]}\t{scores[first]:.4f}"
    assert "ms a call" in script("--bench", "--calls", "5")
    (wrong := tmp_path / "grey.npy").write_bytes(b"")
    np.save(wrong, np.zeros((16, 16, 1), np.uint8))
    command = [sys.executable, "-P", artifact.folder / "verify.py", "--image", wrong]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "wanted uint8 [H, W, 3]" in done.stderr


def test_files_of_either_input_are_timed_together(
    artifact: eq.Artifact, small_artifact: eq.Artifact, few_rounds: None
) -> None:
    found = bench([artifact.folder, small_artifact.folder])
    assert [row.inputs["x"][0] for row in found] == [1, 1] and found[1].ratio is not None


def test_training_takes_pixels_too() -> None:
    torch.manual_seed(0)
    sim = eq.prepare(shake(SmallNet()), images(2, 0), pixels=PIXELS)
    eq.calibrate(sim, [images(32, 1)])
    before = sim.get_parameter("conv1.weight").detach().clone()
    batches = [(images(16, seed), torch.arange(16) % 10) for seed in range(3)]
    history = eq.fit(sim, batches, epochs=2, lr=0.01, validation_batches=batches, exact="onnxruntime/x86")
    assert len(history.epochs) == 2
    assert not torch.equal(sim.get_parameter("conv1.weight"), before)
    assert sim.quantizer_of("x").grid()[1] == 120


SETTINGS = [
    "data.input=pixels",
    "data.image_size=8",
    "data.calibration_n=900",  # leaves 178 images to train on
    "train.float_epochs=1",
    "train.qat_epochs=1",
    "gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]


@pytest.fixture(scope="module")
def run_folder(few_rounds: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of digits-edge whose files take pixels."""
    folder = tmp_path_factory.mktemp("recipe") / "run"
    eq.run(load_recipe("digits-edge", SETTINGS), folder)
    return folder


@EXACT_ARITHMETIC
def test_a_recipe_makes_files_that_take_pixels(run_folder: Path) -> None:
    report = json.loads((run_folder / "report.json").read_text())
    for row in report["results"]:
        if row["runtime"] == "simulation":
            continue
        folder = run_folder / "artifacts" / row["variant"] / row["runtime"]
        manifest = json.loads((folder / "manifest.json").read_text())
        assert [entry["dtype"] for entry in manifest["inputs"].values()] == ["uint8"]
        steps = manifest["preprocessing"]
        assert (steps["input"], steps["mean"], steps["std"]) == ("RGB, pixels in 0..255", None, None)
        assert steps["in_the_model"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
        exact = row["variant"] in ("ptq", "qat")
        assert row["parity"]["agreement"] == 1.0
        assert not exact or EXACT_ARITHMETIC.args[0] is not False or row["parity"]["bit_identical"] == 1.0
        twin = {r["variant"]: r["metric"]["value"] for r in report["results"] if r["runtime"] == "simulation"}
        assert row["metric"]["value"] == pytest.approx(twin[row["variant"]], abs=0.01)


def test_the_float_file_computes_what_the_user_s_model_does(run_folder: Path) -> None:
    """Its normalisation is exact, at the border too, so that the drop holds all that pixels cost."""
    manifest = json.loads((run_folder / "artifacts" / "float" / "onnxruntime" / "manifest.json").read_text())
    ran = manifest["coverage"]["runtime_ops"]
    assert (ran["Cast"], ran["Mul"]) == (1, 1)
    assert manifest["coverage"]["float_ops"][0]["op"] == "normalise_pixels"


def test_data_without_images_has_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "data.py").write_text(
        "import torch\n\ndef points():\n    x = torch.rand(40, 4)\n    y = torch.arange(40) % 2\n"
        "    return {'train': (x, y), 'test': (x, y)}\n"
    )
    settings = [f"data.source={tmp_path}/data.py:points", "data.input=pixels", "data.calibration_n=4"]
    with pytest.raises(RecipeError, match="data.input: pixels wants images, and .* holds none; use normalised"):
        eq.run(load_recipe("digits-edge", settings), tmp_path / "run")


def test_inspect_shows_the_grid_of_pixels(command: CommandLine) -> None:
    shown = command("inspect", "digits-edge", "--json", "--set=data.input=pixels")
    assert shown.code == 0 and "u8 scale 0.007812 zero 128" in shown.out
    given = ["--set=data.mean=[0.1, 0.1, 0.1]", "--set=data.std=[0.2, 0.2, 0.2]", "--set=data.source=nowhere"]
    shown = command("inspect", "digits-edge", "--json", "--set=data.input=pixels", *given)
    assert shown.code == 0 and "u8 scale 0.01562 zero 26" in shown.out
