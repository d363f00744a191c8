"""Nonsense through the command line, one kind after another: a clear line, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import edgeqat as eq
from edgeqat.errors import InputError, OutputError, TamperedError
from edgeqat.run_folder import claimed
from edgeqat.zoo import edge_model
from helpers import CommandLine, digests

TINY = [
    "--set=data.image_size=8",
    "--set=data.calibration_n=8",
    "--set=train.float_epochs=1",
    "--set=train.qat_epochs=1",
    "--set=gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]
CODE = '''
import torch

def part(n, labels):
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8), labels

def beyond():
    return {"train": part(40, torch.arange(40) % 10), "test": part(20, torch.arange(20)), "labels": list("0123456789")}

def negative():
    return {"train": part(40, torch.arange(40) % 10 - 1), "test": part(20, torch.arange(20) % 10)}

def empty():
    return {"train": part(40, torch.arange(40) % 10), "test": part(0, torch.arange(0))}

def not_a_number():
    images = torch.rand(40, 3, 8, 8)
    images[7, 1, 2, 3] = float("nan")
    return {"train": (images, torch.arange(40) % 10), "test": (torch.rand(20, 3, 8, 8), torch.arange(20) % 10)}

def four_channels():
    images = torch.rand(40, 4, 8, 8)
    return {"train": (images, torch.arange(40) % 10), "test": (images[:20], torch.arange(20) % 10)}

def shapes_differ():
    return {"train": part(40, torch.arange(40) % 10), "test": (torch.zeros(20, 3, 9, 8, dtype=torch.uint8),
                                                               torch.arange(20) % 10)}

def zero_by_zero(outputs, targets):
    return (outputs * 0).sum() / 0

calls = 0

def breaks(outputs, targets):
    """Is NaN from its 51st call on; an epoch has 34 steps."""
    global calls
    calls += 1
    return torch.nn.functional.cross_entropy(outputs, targets) * (float("nan") if calls > 50 else 1)
'''


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read and write everything; what others may not is only seen as one of them."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Where everybody may read: pytest's own place is private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """20 images of two classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        path = tmp_path / "photos" / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return tmp_path / "photos"


def truncated(path: Path) -> None:
    safetensors.torch.save_file(edge_model().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])


def foreign(path: Path) -> None:
    safetensors.torch.save_file({"layer.weight": torch.zeros(3)}, path)


def code_inside(path: Path) -> None:
    torch.save(edge_model(), path)


@pytest.mark.parametrize(
    ("write", "name", "words"),
    [
        (truncated, "w.safetensors", "w.safetensors cannot be read as weights: SafetensorError"),
        (foreign, "w.safetensors", "w.safetensors does not fit the model: missing "),
        (code_inside, "w.pt", "w.pt holds pickled code, which edgeqat does not run"),
    ],
    ids=["truncated", "foreign", "code"],
)
def test_weights(command: CommandLine, tmp_path: Path, write: Callable[[Path], None], name: str, words: str) -> None:
    write(tmp_path / name)
    ended = command("run", *TINY, f"--set=model.weights={tmp_path / name}", "-o", tmp_path / "out")
    assert words in ended.refusal(2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("beyond", "the test split has labels 0 to 19, wanted 0 to 9; fix the labels"),
        ("negative", "the training split has labels -1 to 8, wanted 0 to 8; fix the labels"),
        ("empty", "test is empty, wanted at least one sample"),
        ("not_a_number", "train: inputs: sample 7 holds NaN or infinity (1 in all)"),
        ("four_channels", "to have 3 channels, but got 4 channels instead"),
        ("shapes_differ", "inputs of train are uint8 [40, 3, 8, 8] and those of test uint8 [20, 3, 9, 8]"),
    ],
)
def test_data_of_a_callable(command: CommandLine, code: Path, tmp_path: Path, source: str, words: str) -> None:
    more = ["--set=data.augment=null", f"--set=data.source={code}:{source}"]
    ended = command("run", *TINY, *more, "-o", tmp_path / "out")
    assert words in ended.refusal(2)
    assert not (tmp_path / "out").exists()


def damage(photos: Path) -> str:
    (photos / "cat" / "1.png").write_bytes(b"\x89PNG and then nothing")
    return f"{photos / 'cat' / '1.png'} cannot be decoded, wanted PNG"


def lock_up(photos: Path) -> str:
    (photos / "cat").chmod(0)
    return f"the folder {photos / 'cat'} cannot be read (Permission denied)"


def one_class(photos: Path) -> str:
    shutil.rmtree(photos / "dog")
    return "the training split has samples of one class only (label 0), wanted at least two"


def nothing(photos: Path) -> str:
    shutil.rmtree(photos)
    photos.mkdir()
    return f"{photos} holds no images, wanted "


@pytest.mark.parametrize("spoil", [damage, lock_up, one_class, nothing])
def test_folder_of_images(command: CommandLine, photos: Path, tmp_path: Path, spoil: Callable[[Path], str]) -> None:
    words = spoil(photos)
    try:
        with without_privileges():
            ended = command("run", *TINY, f"--set=data.source={photos}", "-o", tmp_path / "out")
    finally:
        (photos / "cat").exists() and (photos / "cat").chmod(0o755)
    assert words in ended.refusal(2)
    assert not (tmp_path / "out").exists()


def test_directory_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with without_privileges(), pytest.raises(OutputError) as caught, claimed(tmp_path / "out"):
        pass
    assert str(caught.value).startswith(f"cannot make the directory {tmp_path / 'out'}: Permission denied; ")
    tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_read(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0)
    try:
        with without_privileges():
            ended = command("run", *TINY, "-o", tmp_path / "closed" / "out")
    finally:
        (tmp_path / "closed").chmod(0o755)
    assert f"cannot read the directory {tmp_path}/closed/out: Permission denied" in ended.refusal(2)


@pytest.mark.parametrize("out", ["file", "file/out", "file/deep/out"])
def test_a_file_where_a_directory_is_wanted(command: CommandLine, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path}/file is a file, wanted a directory" in command("run", *TINY, "-o", tmp_path / out).refusal(2)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("arguments", [("verify",), ("bench",), ("compare",), ("inspect",)])
def test_paths_of_other_commands_that_cannot_be_read(
    command: CommandLine, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    place = tmp_path / "closed"
    (place / "run").mkdir(parents=True)
    (place / "recipe.yaml").write_text("model: {}")
    place.chmod(0)
    path = place / ("recipe.yaml" if arguments == ("inspect",) else "run")
    try:
        with without_privileges():
            ended = command(*arguments, path)
    finally:
        place.chmod(0o755)
    line = ended.refusal(2)
    assert str(place) in line
    assert "ermission" in line


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.calibration_n=0", "data.calibration_n: found 0"),
        ("export=[torchscript/fbgemm, torchscript/qnnpack]", "torchscript/fbgemm and torchscript/qnnpack"),
        ("export=[torchscript/tpu]", "found the runtime 'torchscript/tpu', wanted one of "),
        ("export=[onnx]", "found the runtime 'onnx', wanted one of "),
        ("export=[onnx]", "; did you mean onnxruntime?"),
        ("export=[tflite]", "; did you mean litert?"),
        ("export=[xnnpack]", "; did you mean executorch?"),
        ("export=[onnxruntim]", "; did you mean onnxruntime?"),
        ("export=onnxruntime", "export: found 'onnxruntime': wanted a list, write [onnxruntime]"),
    ],
)
def test_settings(command: CommandLine, tmp_path: Path, setting: str, words: str) -> None:
    ended = command("run", *TINY, f"--set={setting}", "-o", tmp_path / "out")
    assert words in ended.refusal(2)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number(command: CommandLine, code: Path, tmp_path: Path) -> None:
    ended = command("run", *TINY, f"--set=task.loss={code}:zero_by_zero", "-o", tmp_path / "out")
    line = ended.refusal(2)
    assert "epoch 1, step 1: the loss is nan" in line
    assert "there is no checkpoint yet" in line


def test_a_loss_that_breaks_later_keeps_the_last_good_checkpoint(
    command: CommandLine, code: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["run", *TINY, f"--set=task.loss={code}:breaks", "--set=train.float_epochs=3", "-o", out]
    line = command(*arguments).refusal(2)
    kept = out / "checkpoints" / "epochs" / "float-0001.safetensors"
    assert "error: epoch 2, step " in line
    assert "every layer's output is finite: it comes from the loss itself" in line
    assert f"(stage float; the last good checkpoint is {kept})" in line
    assert all(bool(tensor.isfinite().all()) for tensor in safetensors.torch.load_file(kept).values())
    assert not (out / "report.json").exists()
    code.write_text(CODE.replace("calls > 50", "False"), encoding="utf-8")
    ended = command(*arguments, "--resume")
    assert ended.code == 0
    assert "resumed after epoch 1/3" in ended.err


def test_checkpoint_of_another_version(command: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("run", *TINY, "-o", out).code == 0
    (out / "report.json").unlink()
    path = out / "checkpoints" / "float.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    before = digests(out)
    assert f"{path} has checkpoint schema 99, this edgeqat reads 1" in command(
        "run", *TINY, "-o", out, "--resume"
    ).refusal(2)
    # Whatever can be made again may be gone; the checkpoints are as they were.
    assert {k: v for k, v in digests(out).items() if k.startswith("checkpoints")} == {
        k: v for k, v in before.items() if k.startswith("checkpoints")
    }


def test_a_place_that_is_no_artifact_folder(command: CommandLine, small_artifact: eq.Artifact, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for variant in ("ptq", "qat"):
        shutil.copytree(small_artifact.folder, run / "artifacts" / variant / "onnxruntime")
    (run / "recipe.yaml").write_text("model: {}")
    below = ", ".join(str(run / "artifacts" / variant / "onnxruntime") for variant in ("ptq", "qat"))
    places = {
        run: f"{run} has no manifest.json, wanted an artifact folder; below it are {below}",
        tmp_path / "nowhere": f"{tmp_path / 'nowhere'} does not exist, wanted an artifact folder; edgeqat.lower",
        small_artifact.path: f"{small_artifact.path} is a file, wanted an artifact folder; edgeqat.lower",
    }
    for place, words in places.items():
        with pytest.raises(InputError) as caught:
            eq.load_artifact(place)
        assert not isinstance(caught.value, TamperedError)
        assert str(caught.value).startswith(words)
        if place.suffix != ".onnx":  # verify takes such a file from any tool
            assert command("verify", place).refusal(2).startswith(f"error: {words}")
    assert f"wanted a recipe; did you mean {run / 'recipe.yaml'}?" in command("inspect", run).refusal(2)


def test_a_misspelt_folder(
    command: CommandLine, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("run", *TINY, "--set=data.source=photoz", "-o", tmp_path / "out")
    assert "found no folder 'photoz'; did you mean photos?" in ended.refusal(2)
    assert photos.is_dir() and not (tmp_path / "out").exists()


def test_a_model_beside_its_modules(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "edgeqat_test_blocks.py").write_text("from edgeqat.zoo import edge_model\n")
    (tmp_path / "mine.py").write_text("from edgeqat_test_blocks import edge_model\n")
    assert command("inspect", f"--set=model.factory={tmp_path / 'mine.py'}:edge_model").code == 0
