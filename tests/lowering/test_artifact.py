"""Artifact folders: what is in them, that the same program gives the same bytes, and how they are read again."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import edgeqat as eq
from edgeqat.errors import InputError, OutputError, PlanError, TamperedError
from helpers import EXACT_ARITHMETIC, digests, flip_byte
from models import Branches

FILES = ["golden.safetensors", "manifest.json", "model.onnx", "verify.py"]


def test_folder_holds_what_the_manifest_says(small_artifact: eq.Artifact) -> None:
    folder, manifest = small_artifact.folder, small_artifact.manifest
    assert sorted(p.name for p in folder.iterdir()) == FILES
    assert json.loads((folder / "manifest.json").read_text()) == manifest
    for name in FILES:
        if name != "manifest.json":
            data = (folder / name).read_bytes()
            assert manifest["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert sorted(manifest["files"]) == sorted(set(FILES) - {"manifest.json"})
    assert (manifest["runtime"], manifest["engine"]) == ("onnxruntime", "CPUExecutionProvider")
    assert small_artifact.path == folder / "model.onnx"
    assert small_artifact.file_bytes == small_artifact.path.stat().st_size
    assert small_artifact.runtime == "onnxruntime"


def test_manifest_says_how_the_model_was_quantized(
    small_artifact: eq.Artifact, small_program: eq.QuantizedProgram
) -> None:
    manifest = small_artifact.manifest
    assert manifest["plan_hash"] == small_program.plan_hash
    assert manifest["coverage"]["float"] == 0
    assert manifest["coverage"]["integer"] == len(small_program.integer_ops())
    assert manifest["coverage"]["runtime_ops"]["QLinearConv"] == 3
    assert "Conv" not in manifest["coverage"]["runtime_ops"]
    gridded = {value.name for value in small_program.values.values() if value.grid is not None}
    assert set(manifest["grids"]) == gridded == {row["value"] for row in manifest["checks"]}
    scale, zero_point = small_program.grid_of("conv2").per_tensor()
    assert manifest["grids"]["conv2"] == {"scale": scale, "zero_point": zero_point, "qmin": 0, "qmax": 255}
    assert {"torch", "onnx", "onnxruntime"} <= set(manifest["versions"])


def test_preprocessing_is_kept(small_program: eq.QuantizedProgram, tmp_path: Path) -> None:
    wanted = {"mean": [0.5] * 3, "std": [0.25] * 3, "layout": "NCHW", "labels": [*"äbcdefghij"]}
    artifact = eq.lower(small_program, "onnxruntime", tmp_path / "a", preprocessing=wanted)
    assert json.loads((artifact.folder / "manifest.json").read_text(encoding="utf-8"))["preprocessing"] == wanted


def test_same_program_gives_the_same_bytes_and_no_time_is_in_them(
    small_program: eq.QuantizedProgram, small_artifact: eq.Artifact, tmp_path: Path
) -> None:
    again = eq.lower(small_program, "onnxruntime", tmp_path / "elsewhere")
    assert digests(again.folder) == digests(small_artifact.folder)
    text = (again.folder / "manifest.json").read_text()
    assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d", text)
    assert str(tmp_path) not in text


def test_lowering_again_replaces_the_folder(small_program: eq.QuantizedProgram, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for preprocessing in (None, {"labels": list("abcdefghij")}):
        artifact = eq.lower(small_program, "onnxruntime", str(folder), preprocessing=preprocessing)
        assert eq.load_artifact(folder).manifest["preprocessing"] == artifact.manifest["preprocessing"]
        assert sorted(p.name for p in folder.iterdir()) == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_edgeqat_did_not_write_is_never_replaced(
    small_program: eq.QuantizedProgram, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine")
    (tmp_path / "forged").mkdir()
    (tmp_path / "forged" / "manifest.json").write_text('{"files": {}}')
    before = digests(tmp_path)
    cases = ((mine, r"notes\.txt \(2 such"), (folder, r"notes\.txt \(1 such"), (tmp_path / "forged", "manifest"))
    for place, found in cases:
        with pytest.raises(OutputError, match=f"^cannot write {place}: it holds {found}.*; choose another place$"):
            eq.lower(small_program, "onnxruntime", place)
    monkeypatch.chdir(mine / "sub")
    for place in (".", ".."):
        with pytest.raises(OutputError, match=r"^cannot write \.+: .* holds the working directory; name a folder"):
            eq.lower(small_program, "onnxruntime", place)
    assert digests(tmp_path) == before
    assert (mine / "sub").is_dir()


def test_a_link_to_a_folder_stays_one(small_program: eq.QuantizedProgram, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    eq.lower(small_program, "onnxruntime", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == FILES


def test_golden_inputs_are_the_users_or_16_on_the_input_grid(
    small_program: eq.QuantizedProgram, small_artifact: eq.Artifact, tmp_path: Path
) -> None:
    scale, zero_point = small_program.grid_of("x:quantized").per_tensor()
    own = safetensors.torch.load_file(small_artifact.folder / "golden.safetensors")["inputs/x"]
    assert own.shape == (16, 3, 8, 8)
    assert float(own.min()) >= (0 - zero_point) * scale
    assert float(own.max()) <= (255 - zero_point) * scale
    given = torch.randn(3, 3, 8, 8)
    artifact = eq.lower(small_program, "onnxruntime", tmp_path / "a", golden_inputs=given)
    golden = safetensors.torch.load_file(artifact.folder / "golden.safetensors")
    assert torch.equal(golden["inputs/x"], given)
    expected = eq.reference(small_program, given, arithmetic="onnxruntime/x86")
    assert torch.equal(golden["onnxruntime/x86/outputs/fc"], expected)


@EXACT_ARITHMETIC
def test_loaded_artifact_computes_the_reference(
    small_program: eq.QuantizedProgram, small_artifact: eq.Artifact
) -> None:
    batch = torch.randn(5, 3, 8, 8)
    expected = eq.reference(small_program, batch, arithmetic="onnxruntime/x86")
    assert torch.equal(small_artifact.run(batch), expected)
    loaded = eq.load_artifact(small_artifact.folder)
    assert loaded.manifest == small_artifact.manifest
    for call in (batch, (batch,), {"x": batch}):
        (found,) = loaded.run(call)
        assert torch.equal(found, expected)


@EXACT_ARITHMETIC
def test_an_artifact_is_loaded_by_a_string_too(small_artifact: eq.Artifact) -> None:
    loaded = eq.load_artifact(str(small_artifact.folder))
    assert loaded.path == small_artifact.path and loaded.manifest == small_artifact.manifest


def test_artifact_returns_the_models_own_structure(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    left, right = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6)
    sim = eq.calibrate(eq.prepare(model, (left, right)), [(left, right)])
    program = eq.convert(sim)
    artifact = eq.lower(program, "onnxruntime", tmp_path / "a")
    expected = eq.reference(program, (left, right), arithmetic="onnxruntime/x86")
    found = artifact.run((left, right))
    assert list(found) == list(expected) == ["sum", "map"]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    loaded = eq.load_artifact(artifact.folder)
    by_name = loaded.run({"right": right, "left": left})
    assert all(torch.equal(a, b) for a, b in zip(by_name, expected.values(), strict=True))


@pytest.mark.parametrize("name", ["golden.safetensors", "model.onnx", "verify.py"])
def test_changed_file_is_refused_on_loading(folder: Path, name: str) -> None:
    flip_byte(folder / name)
    with pytest.raises(TamperedError, match=f"{name} has sha256 "):
        eq.load_artifact(folder)
    assert eq.load_artifact(folder, check=False).folder == folder


def test_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no manifest\.json, wanted an artifact folder"):
        eq.load_artifact(tmp_path, check=False)


def test_verify_checks_the_hashes(folder: Path, small_program: eq.QuantizedProgram) -> None:
    artifact, batches = eq.load_artifact(folder), [torch.randn(2, 3, 8, 8)]
    flip_byte(folder / "verify.py")
    with pytest.raises(TamperedError, match=r"verify\.py has sha256 "):
        eq.verify(artifact, small_program, batches)
    assert eq.verify(artifact, small_program, batches, check_hashes=False).n == 2


def test_unknown_runtime_and_bad_golden_inputs_write_nothing(
    small_program: eq.QuantizedProgram, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="found the runtime 'tensorrt', wanted one of onnxruntime"):
        eq.lower(small_program, "tensorrt", tmp_path / "a")
    with pytest.raises(InputError, match="found NaN or infinite golden inputs"):
        eq.lower(small_program, "onnxruntime", tmp_path / "a", torch.full((1, 3, 8, 8), float("nan")))
    assert list(tmp_path.iterdir()) == []


def test_place_that_cannot_be_written(small_program: eq.QuantizedProgram, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"^cannot (write|replace) .*; choose another place$"):
            eq.lower(small_program, "onnxruntime", place)
    assert (tmp_path / "file").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        ({"meen": [0.5] * 3}, "^preprocessing: unknown key 'meen'; did you mean mean[?]$"),
        ({"size": [8, 8]}, "^preprocessing: unknown key 'size'; did you mean resize[?]$"),
        ({"mean": 0.5, "std": 0.5}, "^preprocessing: found mean 0.5, wanted a list of numbers, one a channel$"),
        ({"mean": [0.5] * 3}, "^preprocessing: found mean alone, wanted mean and std"),
        ({"mean": [0.5], "std": [0.5]}, "^preprocessing: mean has 1 figures, and the input 3 channels$"),
        (
            {"mean": [0.5] * 3, "std": [0.5, 0, 0.5]},
            r"^preprocessing: found std \[0.5, 0, 0.5\], wanted figures above 0$",
        ),
        ({"resize": 8}, r'^preprocessing: found resize 8, wanted \{"size": \[height, width\]\}, or \{"shorter_side":'),
        (
            {"resize": {"shorter_side": 7, "center_crop": [8, 8]}},
            "^preprocessing: found shorter_side 7, wanted pixels, 8 or more$",
        ),
        (
            {"resize": {"shorter_side": 9, "center_crop": [8, 8], "size": [8, 8]}},
            "^preprocessing: resize: unknown key 'size'",
        ),
        (
            {"resize": {"size": [9, 8]}},
            r"^preprocessing: resize makes images of \[9, 8\], and the model takes \[8, 8\]$",
        ),
        (
            {"resize": {"size": [8, 8], "method": "cubic"}},
            "^preprocessing: found the resize method 'cubic', wanted 'bil",
        ),
        ({"layout": "NHWC"}, "^preprocessing: found the layout 'NHWC', wanted 'NCHW'"),
        (
            {"labels": ["a", "b"]},
            "^preprocessing: found 2 labels, and the model has 10 outputs; wanted a name for each$",
        ),
        ({"labels": "ab"}, "^preprocessing: found labels 'ab', wanted a list of class names$"),
        ({"inputs": {"x": {"maen": 1}}}, "^preprocessing: inputs: x: unknown key 'maen'; did you mean mean[?]$"),
        ([0.5], r"^preprocessing: found \[0.5\], wanted a dict with any of input, mean, std, layout, resize"),
    ],
)
def test_preprocessing_that_no_device_could_do(
    small_program: eq.QuantizedProgram, tmp_path: Path, preprocessing: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        eq.lower(small_program, "onnxruntime", tmp_path / "a", preprocessing=preprocessing)
    assert not (tmp_path / "a").exists()


def test_printed_in_a_line(small_program: eq.QuantizedProgram, small_artifact: eq.Artifact) -> None:
    assert repr(small_artifact) == (
        f"Artifact({str(small_artifact.path)!r}, runtime='onnxruntime', engine='CPUExecutionProvider')"
    )
    found = repr(small_program)
    assert found.startswith("QuantizedProgram(x ['batch', 3, 8, 8] -> fc; ")
    assert found.endswith(f" integer ops, 0 float ops; plan {small_program.plan_hash[:12]})")
