"""The scripts of examples/deploy on real artifacts, where edgeqat, and torch unless the runtime needs it, is not."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.replay.pixels import preprocess, steps_of
from helpers import run_python

DEPLOY = Path(__file__).parents[2] / "examples" / "deploy"
RUNTIMES = ["onnxruntime", "executorch", "litert", "openvino", "torchscript"]
WITH_TORCH = ("executorch", "torchscript")
LABELS = [f"class {i}" for i in range(6)]
UNSAID = "does not say how an image becomes the model's input: no mean and std"
# Imports of the blocked modules fail as if they were not installed.
BLOCKED = """
import runpy, sys
from pathlib import Path
script, blocked, *sys.argv[1:] = sys.argv[1:]
sys.modules |= dict.fromkeys(blocked.split(","))
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randint(256, (16, 20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 12, 3, 2)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(12 * 4 * 5, 6)).eval()


STEPS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "layout": "NCHW", "resize": None, "labels": LABELS}


@pytest.fixture(scope="module")
def folders(images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, eq.Artifact]:
    """By runtime, and one that takes pixels."""
    place = tmp_path_factory.mktemp("artifacts")
    batch = images.permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(STEPS[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    real = (batch / 255 - mean) / std
    program = eq.convert(eq.calibrate(eq.prepare(network(), real, target=["portable", "openvino"]), [real]))
    made = {runtime: eq.lower(program, runtime, place / runtime, preprocessing=STEPS) for runtime in RUNTIMES}
    taken = eq.Pixels(tuple(STEPS["mean"]), tuple(STEPS["std"]))
    program = eq.convert(eq.calibrate(eq.prepare(network(), batch, pixels=taken), [batch]))
    steps = STEPS | {"mean": None, "std": None, "labels": None}
    return made | {"pixels": eq.lower(program, "onnxruntime", place / "pixels", preprocessing=steps)}


def expected(artifact: eq.Artifact, image: Tensor) -> str:
    """The best classes by edgeqat's own session of the runtime."""
    (name,) = artifact.manifest["inputs"]
    steps = steps_of(dict(artifact.manifest), name)
    assert steps is not None
    (scores,) = artifact.session().run([torch.from_numpy(preprocess(image.numpy()[None], steps))])
    labels = artifact.manifest["preprocessing"]["labels"] or [str(i) for i in range(6)]
    best = np.argsort(-scores[0].numpy(), kind="stable")[:3]
    return "".join(f"{labels[i]}\t{float(scores[0, i]):.6g}\n" for i in best)


@pytest.mark.parametrize("name", [*RUNTIMES, "pixels"])
def test_a_script_finds_what_the_session_finds(
    name: str, folders: dict[str, eq.Artifact], images: Tensor, tmp_path: Path
) -> None:
    artifact = folders[name]
    np.save(tmp_path / "image.npy", images[3].numpy())
    blocked = "edgeqat" if artifact.runtime in WITH_TORCH else "edgeqat,torch"
    script = DEPLOY / f"run_{artifact.runtime}.py"
    ended = run_python(BLOCKED, script, blocked, artifact.folder, tmp_path / "image.npy", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert ended.out == expected(artifact, images[3])


def test_an_image_file_is_resized(folders: dict[str, eq.Artifact], images: Tensor, tmp_path: Path) -> None:
    """To the very pixels that verify.py makes of it."""
    from PIL import Image

    artifact = folders["onnxruntime"]
    steps = STEPS | {"resize": {"size": [20, 24], "method": "bilinear"}}
    program = eq.convert(eq.calibrate(eq.prepare(network(), torch.zeros(2, 3, 20, 24)), [torch.randn(4, 3, 20, 24)]))
    artifact = eq.lower(program, "onnxruntime", tmp_path / "resizes", preprocessing=steps)
    Image.fromarray(images.view(4, 80, 24, 3)[0].numpy()).save(tmp_path / "image.png")
    script = DEPLOY / "run_onnxruntime.py"
    ended = run_python(BLOCKED, script, "edgeqat,torch", artifact.folder, tmp_path / "image.png", cwd=tmp_path)
    assert ended.code == 0, ended.err
    words = [sys.executable, artifact.folder / "verify.py", "--image", tmp_path / "image.png"]
    own = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    theirs = [line.split("\t") for line in ended.out.splitlines()]
    ours = [line.split("\t") for line in own.splitlines()[:3]]
    assert [(label, f"{float(score):.4f}") for label, score in theirs] == [tuple(row) for row in ours]


def test_an_image_of_another_size_is_refused(folders: dict[str, eq.Artifact], tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.zeros((9, 7, 3), np.uint8))
    ended = run_python(
        BLOCKED, DEPLOY / "run_onnxruntime.py", "edgeqat", folders["onnxruntime"].folder, tmp_path / "image.npy"
    )
    (line,) = ended.err.splitlines()
    assert ended.code == 1
    assert "image.npy is 7x9, the model wants " in line and "the manifest has no resize" in line


def test_a_folder_of_another_runtime_is_refused(folders: dict[str, eq.Artifact], tmp_path: Path) -> None:
    ended = run_python(BLOCKED, DEPLOY / "run_litert.py", "edgeqat", folders["onnxruntime"].folder, "x.npy")
    assert ended.code == 1
    assert ended.err == f"{folders['onnxruntime'].folder} is for onnxruntime, this script runs litert\n"


def test_a_folder_without_preprocessing_is_refused(small_artifact: eq.Artifact) -> None:
    ended = run_python(BLOCKED, DEPLOY / "run_onnxruntime.py", "edgeqat,torch", small_artifact.folder, "x.npy")
    assert (ended.code, ended.err) == (1, f"{small_artifact.folder} {UNSAID}\n")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, linked with the library in onnxruntime's wheel."""
    place = tmp_path_factory.mktemp("build")
    library = next(str(file.locate()) for file in distribution("onnxruntime").files or [] if ".so.1." in file.name)
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (place / name).symlink_to(library)
    build = place / "build"
    words = ["cmake", "-S", DEPLOY, "-B", build, f"-DONNXRUNTIME_LIBRARY={place}/libonnxruntime.so"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("cmake is not installed: apt-get install cmake g++")
    if "Could not find" in done.stderr or "No CMAKE_CXX_COMPILER" in done.stderr:
        pytest.skip("headers or a compiler are missing: apt-get install g++ libonnxruntime-dev nlohmann-json3-dev")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", build], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout + done.stderr
    return build / "run_onnxruntime"


@pytest.mark.parametrize("name", ["onnxruntime", "pixels"])
def test_the_program_in_cpp_finds_the_same(
    built: Path, name: str, folders: dict[str, eq.Artifact], images: Tensor, tmp_path: Path
) -> None:
    height, width, _ = images[3].shape
    header = f"P6\n{width} {height}\n255\n".encode()
    (tmp_path / "image.ppm").write_bytes(header + images[3].numpy().tobytes())
    environment = {**os.environ, "LD_LIBRARY_PATH": str(built.parents[1])}
    words = [built, folders[name].folder, tmp_path / "image.ppm"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(folders[name], images[3])


def test_the_program_in_cpp_says_what_it_lacks(built: Path, small_artifact: eq.Artifact, tmp_path: Path) -> None:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(built.parents[1])}
    image = tmp_path / "image.ppm"
    image.write_bytes(b"P6\n8 8\n255\n" + bytes(192))
    lacks = {
        tmp_path / "none.ppm": f"{tmp_path}/none.ppm is no binary PPM file of 8 bits",
        image: f"{small_artifact.folder} {UNSAID}",
    }
    for path, words in lacks.items():
        command = [built, small_artifact.folder, path]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.returncode, done.stderr) == (1, f"error: {words}\n")
