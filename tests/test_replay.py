"""Replaying an artifact folder, with the package's copy of the verifier and with the one that is shipped."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import safetensors.numpy
import torch
from PIL import Image

import edgeqat as eq
from edgeqat.data.batches import normalise
from edgeqat.replay import kernels
from edgeqat.replay.command import describe
from edgeqat.replay.folder import MANIFEST_KEYS, UNSEALED, FolderError, read_manifest, reason_of, seal_of
from edgeqat.replay.kernels import arithmetic_here
from edgeqat.replay.pixels import preprocess, steps_of
from edgeqat.replay.script import RUNNERS, replay, verify_script
from emulation import HASWELL, verify_on_haswell
from helpers import EXACT_ARITHMETIC, CommandLine, digests, flip_byte, run_edgeqat, run_python
from models import SmallNet

SHIPPED = ["golden.safetensors", "model.onnx", "verify.py"]
RUN_SHIPPED = """
import runpy, sys
sys.modules["edgeqat"] = sys.modules["torch"] = None
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def refusal(folder: Path, check: bool = True) -> str:
    before = digests(folder)
    with pytest.raises(FolderError) as caught:
        replay(folder, check)
    assert digests(folder) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if isinstance(manifest.get("sha256"), str):  # whoever can change a manifest can give it a new hash
        manifest["sha256"] = UNSEALED
        manifest["sha256"] = seal_of(json.dumps(manifest).encode(), UNSEALED)
    path.write_text(json.dumps(manifest))


# What is as it was passes.


def test_untouched_folder_passes(small_artifact: eq.Artifact) -> None:
    found = replay(small_artifact.folder)
    assert found.against == "onnxruntime/x86"
    assert found.samples == 16
    assert found.passed or not found.exact_here
    assert found.exact_here == (arithmetic_here("onnxruntime") == "onnxruntime/x86")


@EXACT_ARITHMETIC
def test_every_integer_is_as_expected(small_artifact: eq.Artifact) -> None:
    found = replay(small_artifact.folder)
    assert (found.identical, found.max_difference, found.first_difference) == (1.0, 0.0, None)
    assert found.passed
    assert describe(found) == ("verified: 100.00% of outputs bit-identical to onnxruntime/x86 on 16 samples")


def test_shipped_script_is_the_packages_own_and_stands_alone(small_artifact: eq.Artifact) -> None:
    source = (small_artifact.folder / "verify.py").read_text(encoding="utf-8")
    assert source == verify_script("onnxruntime")
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "torch", "PIL"}


@pytest.mark.parametrize("runtime", list(RUNNERS))
def test_no_two_parts_of_a_shipped_script_define_the_same_name(runtime: str) -> None:
    body = ast.parse(verify_script(runtime)).body
    defined = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    defined += [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets]  # type: ignore[attr-defined]
    assert len(defined) == len(set(defined))


def test_shipped_script_runs_without_edgeqat_and_torch(small_artifact: eq.Artifact, tmp_path: Path) -> None:
    ended = run_python(RUN_SHIPPED, small_artifact.folder / "verify.py", cwd=tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count("\n") == 1
    assert "bit-identical to onnxruntime/x86 on 16 samples" in ended.out


def test_shipped_script_times_calls(folder: Path) -> None:
    ended = run_python(RUN_SHIPPED, folder / "verify.py", "--bench", "--calls", "20", "--threads", "2")
    assert (ended.code, ended.err) == (0, "")
    figure = r"\d+\.\d{4}"
    assert re.fullmatch(
        rf"{figure} ms a call \(p90 {figure}, p99 {figure}; 20 calls, batch 1, 2 thread\(s\)\)\n", ended.out
    )
    flip_byte(folder / "model.onnx")
    assert "model.onnx has sha256" in run_python(RUN_SHIPPED, folder / "verify.py", "--bench").refusal(2)


def test_shipped_script_refuses_and_fails_as_the_command_does(folder: Path) -> None:
    flip_byte(folder / "model.onnx")
    ended = run_python(RUN_SHIPPED, folder / "verify.py")
    assert ended.out == ""
    assert "model.onnx has sha256" in ended.refusal(2)


def test_shipped_script_without_the_runtime(folder: Path) -> None:
    ended = run_python(RUN_SHIPPED.replace('["edgeqat"]', '["onnxruntime"]'), folder / "verify.py")
    assert "onnxruntime" in ended.refusal(4)
    assert ended.refusal(4).endswith("pip install onnxruntime")


# What is not as it was, with hashes.


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("at", [0, -1], ids=["first byte", "last byte"])
def test_changed_file_is_named(folder: Path, name: str, at: int) -> None:
    flip_byte(folder / name, at)
    found = refusal(folder)
    assert found.startswith(f"{folder / name} has sha256 ")
    assert found.endswith("fetch the artifact again, or pass --no-hash to see what it computes")


@pytest.mark.parametrize("at", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_any_changed_byte_of_the_manifest_is_found(folder: Path, at: float) -> None:
    path = folder / "manifest.json"
    text = bytearray(path.read_bytes())
    # A letter or digit becomes another one, so that the file is still a manifest.
    place = next(i for i in range(int(at * len(text)), len(text)) if chr(text[i]) in "123456")
    text[place] += 1
    path.write_bytes(text)
    assert refusal(folder).startswith(f"{path} does not match its own sha256")
    with pytest.raises(eq.EdgeqatError, match="does not match its own sha256"):
        eq.load_artifact(folder)


def test_a_changed_hash_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    own = json.loads(path.read_text())["sha256"]
    path.write_text(path.read_text().replace(own, own[::-1]))
    assert refusal(folder).startswith(f"{path} does not match its own sha256")


@pytest.mark.parametrize("part", ["weights", "graph"])
def test_a_flipped_byte_inside_the_model_is_found(folder: Path, part: str) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path)
    weights = next(t.raw_data for t in model.graph.initializer if t.name == "conv2.weight")
    sought = weights if part == "weights" else b"QuantizeLinear"
    flip_byte(path, path.read_bytes().index(sought) + 2)
    assert f"{path} has sha256 " in refusal(folder)


@pytest.mark.parametrize("name", SHIPPED)
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert refusal(folder) == f"{folder / name} is missing; fetch the artifact again"


@pytest.mark.parametrize("name", SHIPPED)
def test_changed_hash_in_the_manifest(folder: Path, name: str) -> None:
    edit_manifest(folder, lambda m: m["files"][name].update(sha256="0" * 64))
    found = refusal(folder)
    assert found.startswith(f"{folder / name} has sha256 ")
    assert "the manifest says 000000000000..." in found


@pytest.mark.parametrize("name", ["model.onnx", "golden.safetensors"])
@pytest.mark.parametrize("entry", ["removed", {}, "text", {"sha256": 3}], ids=str)
def test_file_without_a_hash_is_not_trusted(folder: Path, name: str, entry: object) -> None:
    edit_manifest(folder, lambda m: m["files"].update({name: entry}))
    if entry == "removed":
        edit_manifest(folder, lambda m: m["files"].pop(name))
    assert refusal(folder) == f"{folder / 'manifest.json'} has no sha256 of {name}; fetch the artifact again"


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "sub/../model.onnx"])
def test_names_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("x")
    edit_manifest(folder, lambda m: m["files"].update({name: m["files"]["model.onnx"]}))
    assert f"names the file '{name}', which is outside the folder" in refusal(folder)


@pytest.mark.parametrize("check", [True, False], ids=["hash", "no hash"])
def test_model_outside_the_folder_is_refused(folder: Path, check: bool) -> None:
    (folder / "model.onnx").rename(folder.parent / "model.onnx")
    edit_manifest(folder, lambda m: m.update(model="../model.onnx"))
    assert "names the file '../model.onnx', which is outside the folder" in refusal(folder, check)


@pytest.mark.parametrize("check", [True, False], ids=["hash", "no hash"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"not json", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "holds no JSON object"),
        (b"null", "holds no JSON object"),
        (b"{}", "lacks sha256, runtime, engine, model, files, arithmetics, inputs, outputs, checks"),
    ],
    ids=["empty", "text", "bytes", "list", "null", "object"],
)
def test_manifest_that_is_none(folder: Path, check: bool, content: bytes, words: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    found = refusal(folder, check)
    assert found.startswith(f"{folder / 'manifest.json'} {words}")
    assert "wanted a" in found


@pytest.mark.parametrize("key", list(MANIFEST_KEYS))
def test_manifest_that_lacks_a_key_or_has_another_type_there(folder: Path, key: str) -> None:
    edit_manifest(folder, lambda m: m.update({key: 3}))
    assert f"manifest.json lacks {key}; wanted a manifest made by edgeqat" in refusal(folder)
    edit_manifest(folder, lambda m: m.pop(key))
    assert f"manifest.json lacks {key}; wanted a manifest made by edgeqat" in refusal(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"none/manifest\.json cannot be read .*wanted an artifact folder made by"):
        replay(tmp_path / "none")


def test_recomputed_hashes_do_not_hide_a_changed_model(folder: Path) -> None:
    """Whoever can change the manifest too is caught by the integers, not by the hashes."""
    edit_model(folder, lambda model: set_initializer(model, "conv2.weight", lambda w: -w))
    path = folder / "model.onnx"
    edit_manifest(folder, lambda m: m["files"]["model.onnx"].update(sha256=digests(folder)[path.name]))
    assert not replay(folder).passed


# What is not as it was, without hashes.


def edit_model(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    path = folder / "model.onnx"
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())


def set_initializer(model: onnx.ModelProto, name: str, change: Callable[[Any], Any]) -> None:
    found = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    old = onnx.numpy_helper.to_array(found)
    new = change(old.copy()).astype(old.dtype)
    assert not np.array_equal(old, new)
    found.CopyFrom(onnx.numpy_helper.from_array(new, name))


def grow_scale(model: onnx.ModelProto, op: str) -> None:
    """Gives the quantizer of an op's output a scale of its own, a tenth larger."""
    node = next(node for node in model.graph.node if node.output[0] == op)
    assert node.op_type == "QuantizeLinear"
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == node.input[1])
    larger = (onnx.numpy_helper.to_array(scale) * np.float32(1.1)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(larger, "larger"))
    node.input[1] = "larger"


def one_weight(weight: Any) -> Any:
    """Moves one weight as far as it goes."""
    weight.flat[5] = -127 if weight.flat[5] > 0 else 127
    return weight


def one_bias(bias: Any) -> Any:
    bias[1] += 4000
    return bias


def scale_of(model: onnx.ModelProto, weight: str) -> str:
    """The initializer that holds a weight's scales."""
    return next(str(node.input[1]) for node in model.graph.node if node.input[:1] == [weight])


EDITS: dict[str, tuple[str, Callable[[onnx.ModelProto], object]]] = {
    "first weight": ("conv1", lambda model: set_initializer(model, "conv1.weight", one_weight)),
    "weight": ("conv2", lambda model: set_initializer(model, "conv2.weight", one_weight)),
    "bias": ("conv3", lambda model: set_initializer(model, "conv3:bias", one_bias)),
    "scale of the input": ("x:quantized", lambda model: grow_scale(model, "x:quantized")),
    "scale of an addition": ("add", lambda model: grow_scale(model, "add")),
    "scale of the pool": ("mean:pooled", lambda model: grow_scale(model, "mean:pooled")),
    "scale of a weight": (
        "conv2",
        lambda model: set_initializer(model, scale_of(model, "conv2.weight"), lambda s: s * 1.1),
    ),
    "last weight": ("fc", lambda model: set_initializer(model, "fc.weight", one_weight)),
    "last bias": ("fc", lambda model: set_initializer(model, "fc:bias", one_bias)),
}


@EXACT_ARITHMETIC
@pytest.mark.parametrize(("op", "change"), EDITS.values(), ids=EDITS)
def test_changed_model_fails_and_the_op_is_named(
    folder: Path, op: str, change: Callable[[onnx.ModelProto], object]
) -> None:
    edit_model(folder, change)
    found = replay(folder, check=False)
    assert not found.passed
    assert found.first_difference == op
    assert found.identical < 1
    assert found.max_difference > 0
    assert describe(found).startswith("FAILED: ")
    assert describe(found).endswith(f"; the first op that differs is {op}")


@EXACT_ARITHMETIC
def test_a_single_step_of_one_weight_is_seen(folder: Path) -> None:
    def step(weight: Any) -> Any:
        weight[0, 0, 1, 1] -= 1
        return weight

    edit_model(folder, lambda model: set_initializer(model, "conv1.weight", step))
    assert replay(folder, check=False).first_difference == "conv1"


@EXACT_ARITHMETIC
def test_the_command_says_which_op_and_exits_with_3(folder: Path) -> None:
    edit_model(folder, EDITS["bias"][1])
    ended = run_edgeqat("verify", folder, "--no-hash")
    assert (ended.code, ended.err) == (3, "")
    assert ended.out.startswith("FAILED: ")
    assert ended.out.endswith("; the first op that differs is conv3\n")


@EXACT_ARITHMETIC
def test_the_shipped_script_says_which_op_and_exits_with_3(folder: Path) -> None:
    edit_model(folder, EDITS["bias"][1])
    ended = run_python(RUN_SHIPPED, folder / "verify.py", folder, "--no-hash")
    assert (ended.code, ended.err) == (3, "")
    assert ended.out.endswith("; the first op that differs is conv3\n")


def test_a_machine_of_another_arithmetic_is_told_so_and_does_not_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: CommandLine
) -> None:
    edit_model(folder, EDITS["bias"][1])
    monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset({"sse4_1"}))
    ended = command("verify", folder, "--no-hash")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("differs, first at conv3: ")
    assert ended.out.endswith("this machine's kernels have another arithmetic\n")


@pytest.mark.skipif(not kernels.is_x86(), reason="this is no x86 machine")
def test_a_machine_without_vnni_is_held_to_its_own_integers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = arithmetic_here("onnxruntime")
    monkeypatch.setattr(kernels, "cpu_flags", lambda: frozenset({"avx2"}))
    found = replay(folder)
    assert (found.against, found.exact_here) == ("onnxruntime/x86-avx2", True)
    assert found.passed == (own == found.against)


@HASWELL
def test_the_shipped_script_verifies_without_vnni(folder: Path) -> None:
    code, out = verify_on_haswell(folder)
    assert code == 0
    assert out.startswith("verified: 100.00% of outputs bit-identical to onnxruntime/x86-avx2 on 16 samples")


@pytest.mark.skipif(not kernels.is_x86(), reason="this is no x86 machine")
def test_which_arithmetic_a_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        ({"avx2", "avx512f", "avx512_vnni"}, "onnxruntime/x86"),
        ({"avx2", "avx_vnni"}, "onnxruntime/x86"),
        ({"avx2", "avx512f"}, "onnxruntime/x86-avx2"),
        ({"sse4_1"}, None),
    ):
        monkeypatch.setattr(kernels, "cpu_flags", lambda found=flags: frozenset(found))
        assert arithmetic_here("onnxruntime") == expected


def test_arithmetics_that_make_the_same_of_the_inputs_share_their_vectors(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(golden=dict.fromkeys(m["golden"], "onnxruntime/elsewhere")))
    with pytest.raises(FolderError, match="do not belong together"):
        replay(folder, check=False)


# The command line.


def test_command_passes(command: CommandLine, small_artifact: eq.Artifact) -> None:
    ended = command("verify", small_artifact.folder)
    assert (ended.code, ended.err) == (0, "")
    assert "on 16 samples" in ended.out
    shown = command("verify", small_artifact.folder, "--json")
    assert (shown.code, shown.err) == (0, "")
    found = json.loads(shown.out)
    keys = ["against", "exact_here", "samples", "identical", "max_difference", "first_difference", "passed"]
    assert list(found) == [*keys, "owed", "inside"]
    assert (found["owed"], found["inside"]) == ("exact", len(small_artifact.manifest["checks"]))
    assert found["samples"] == 16


@pytest.mark.parametrize("name", SHIPPED)
def test_command_refuses_a_changed_file(command: CommandLine, folder: Path, name: str) -> None:
    flip_byte(folder / name)
    before = digests(folder)
    ended = command("verify", folder)
    assert name in ended.refusal(2)
    assert (ended.out, len(ended.err.splitlines())) == ("", 1)
    assert digests(folder) == before


@pytest.mark.parametrize("args", [[], ["--no-hash"]], ids=["hash", "no hash"])
def test_command_refuses_what_is_no_artifact(command: CommandLine, tmp_path: Path, args: list[str]) -> None:
    assert "has no manifest.json, wanted an artifact folder" in command("verify", tmp_path, *args).refusal(2)
    assert list(tmp_path.iterdir()) == []


def test_folders_own_code_is_never_run(command: CommandLine, folder: Path) -> None:
    (folder / "verify.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    (folder / "onnxruntime.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    assert "verify.py has sha256" in command("verify", folder).refusal(2)
    assert command("verify", folder, "--no-hash").code == 0
    assert not (folder / "executed").exists()


# Damaged files that hashes would have caught, seen with --no-hash.


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


@pytest.mark.parametrize("keep", [0, 4, 100, -10], ids=["empty", "in the length", "in the header", "in the data"])
def test_damaged_golden_vectors(folder: Path, keep: int) -> None:
    cut(folder / "golden.safetensors", keep)
    assert f"{folder / 'golden.safetensors'} cannot be read as safetensors" in refusal(folder, check=False)


@pytest.mark.parametrize("keep", [100, -100])
def test_damaged_model(folder: Path, keep: int) -> None:
    cut(folder / "model.onnx", keep)
    assert refusal(folder, check=False).startswith("ONNX Runtime refuses the model: ")


@pytest.mark.parametrize("name", ["golden.safetensors", "model.onnx"])
def test_missing_file_without_hashes(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert f"{folder / name} " in refusal(folder, check=False)


@pytest.mark.parametrize("lost", ["inputs/x", "taps", "onnxruntime/x86/outputs/fc", "onnxruntime/x86/crc32/conv2"])
def test_golden_vectors_of_another_model(folder: Path, lost: str) -> None:
    path = folder / "golden.safetensors"
    tensors = safetensors.numpy.load_file(path)
    del tensors[lost]
    safetensors.numpy.save_file(tensors, path)
    found = refusal(folder, check=False)
    assert re.search(f"model, manifest and golden vectors do not belong together .*{lost}", found)


@pytest.mark.parametrize(
    "change", [{"inputs": {"y": {}}}, {"outputs": {"gone": True}}, {"checks": [{}]}, {"checks": []}], ids=str
)
def test_manifest_of_another_model(folder: Path, change: dict[str, Any]) -> None:
    edit_manifest(folder, lambda m: m.update(change))
    assert "do not belong together" in refusal(folder, check=False)


def test_a_check_that_was_taken_out_is_missed(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["checks"].pop(3))
    found = refusal(folder)
    assert "do not belong together (LookupError: only one of them has onnxruntime/x86/crc32/" in found


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema", 99, "has the schema 99, wanted 1; fetch"),
        ("schema", None, "has the schema None, wanted 1; fetch"),
        ("runtime", "foo", "has the runtime 'foo', wanted onnxruntime or torchscript or "),
        (
            "runtime",
            "torchscript",
            "has the engine 'CPUExecutionProvider', wanted fbgemm or x86 or onednn or",
        ),
        ("engine", "foo", "has the engine 'foo', wanted CPUExecutionProvider; fetch"),
        ("arithmetics", [], "names no arithmetics, wanted at least one; fetch"),
        ("inputs", {}, "names no inputs, wanted at least one; fetch"),
        ("outputs", {}, "names no outputs, wanted at least one; fetch"),
    ],
)
def test_manifest_that_says_what_none_says(
    folder: Path, command: CommandLine, key: str, value: object, words: str
) -> None:
    edit_manifest(folder, lambda m: m.update({key: value}))
    assert f"{folder / 'manifest.json'} {words}" in command("verify", folder).refusal(2)


# Float artifacts have nothing to be exact in.


def test_float_twin_is_held_to_a_tolerance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sim = eq.prepare(SmallNet().eval(), torch.randn(4, 3, 8, 8), "onnxruntime", eq.QConfigMapping().set_global(None))
    artifact = eq.lower(eq.convert(sim), "onnxruntime", tmp_path / "float")
    found = replay(artifact.folder)
    assert found.passed
    assert found.first_difference is None
    assert found.max_difference < 1e-5
    assert re.fullmatch(
        r"verified: outputs on 16 samples differ by at most \S+ \(wanted at most 0\.0001 of the largest one: .*\)",
        describe(found),
    )

    def shift(bias: Any) -> Any:
        bias[0] += 0.01
        return bias

    def shift_logits(model: onnx.ModelProto) -> None:
        (gemm,) = [node for node in model.graph.node if node.op_type == "Gemm"]
        set_initializer(model, gemm.input[2], shift)

    edit_model(artifact.folder, shift_logits)
    changed = replay(artifact.folder, check=False)
    assert not changed.passed
    assert changed.first_difference == next(iter(artifact.manifest["outputs"].values()))["op"]
    assert changed.max_difference == pytest.approx(0.01, rel=1e-2)


def test_what_was_compared_where_floats_are_left_is_said(small_artifact: eq.Artifact) -> None:
    found = replay(small_artifact.folder)
    assert describe(replace(found, passed=True, owed="reported", inside=5, max_difference=0.25)) == (
        "verified: 5 inner values bit-identical to onnxruntime/x86, outputs on 16 samples differ by at most 0.25 "
        "(not bounded, since floats were quantized again before them)"
    )


def test_a_runtimes_reason_is_one_line() -> None:
    text = "The following operation failed in the TorchScript interpreter.\nTraceback\nRuntimeError: Sizes must match"
    assert reason_of(RuntimeError(text)) == "Sizes must match"
    assert reason_of(RuntimeError("\nfirst\nsecond")) == "first"
    assert reason_of(RuntimeError()) == "RuntimeError"


# Preprocessing: the manifest says it, the golden vectors hold it to the bit.


@pytest.fixture
def image_folder(small_program: eq.QuantizedProgram, tmp_path: Path) -> Path:
    """An artifact made from pixels."""
    pixels = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    mean, std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
    steps = {"input": "RGB in 0..1", "mean": list(mean), "std": list(std), "layout": "NCHW"}
    steps |= {"resize": {"size": [8, 8], "method": "bilinear"}, "labels": [f"class {i}" for i in range(10)]}
    inputs = normalise(pixels, mean, std)
    return eq.lower(small_program, "onnxruntime", tmp_path / "images", inputs, steps).folder


def test_golden_pixels_become_the_golden_inputs_to_the_bit(image_folder: Path) -> None:
    golden = safetensors.numpy.load_file(image_folder / "golden.safetensors")
    assert golden["pixels/x"].shape == (16, 8, 8, 3)
    manifest = read_manifest(image_folder)
    steps = steps_of(manifest, "x")
    assert steps is not None
    assert np.array_equal(preprocess(golden["pixels/x"], steps), golden["inputs/x"])
    assert replay(image_folder).samples == 16


@pytest.mark.parametrize("key", ["mean", "std"])
def test_changed_preprocessing_is_refused(image_folder: Path, key: str) -> None:
    edit_manifest(image_folder, lambda m: m["preprocessing"].update({key: [0.5, 0.5, 0.5]}))
    assert refusal(image_folder).startswith("the manifest's preprocessing of x does not give the golden inputs")


def test_inputs_that_are_no_pixels_have_none(small_artifact: eq.Artifact) -> None:
    assert "pixels/x" not in safetensors.numpy.load_file(small_artifact.folder / "golden.safetensors")


def test_shipped_script_names_the_class_of_an_image(image_folder: Path, tmp_path: Path) -> None:
    golden = safetensors.numpy.load_file(image_folder / "golden.safetensors")
    Image.fromarray(golden["pixels/x"][5]).save(tmp_path / "photo.png")
    np.save(tmp_path / "photo.npy", golden["pixels/x"][5])
    scores = eq.load_artifact(image_folder).run(torch.from_numpy(golden["inputs/x"][5:6]))[0][0]
    for name in ("photo.png", "photo.npy"):
        ended = run_python(RUN_SHIPPED, image_folder / "verify.py", "--image", tmp_path / name)
        assert (ended.code, ended.err) == (0, "")
        lines = ended.out.splitlines()
        assert len(lines) == 5
        assert lines[0] == f"class {int(scores.argmax())}\t{float(scores.max()):.4f}"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.png", b"junk", "cannot be read as an image"),
        ("a.npy", b"junk", "cannot be read as an image"),
        ("gone.png", None, "cannot be read as an image"),
    ],
)
def test_image_that_is_none(image_folder: Path, tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    ended = run_python(RUN_SHIPPED, image_folder / "verify.py", "--image", tmp_path / name)
    assert words in ended.refusal(2)


def test_images_need_pillow_and_the_script_says_so(image_folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    without = RUN_SHIPPED.replace("= None", "= sys.modules['PIL'] = None")
    ended = run_python(without, image_folder / "verify.py", "--image", tmp_path / "a.png")
    assert (ended.code, ended.err.splitlines()[-1].endswith("; pip install pillow")) == (4, True)
    assert "--image needs Pillow" in " ".join((image_folder / "verify.py").read_text().split())


def test_array_of_the_wrong_shape(image_folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 4), np.uint8))
    ended = run_python(RUN_SHIPPED, image_folder / "verify.py", "--image", tmp_path / "a.npy")
    assert "holds uint8 [8, 8, 4], wanted uint8 [H, W, 3]" in ended.refusal(2)


def test_images_of_another_size(image_folder: Path, tmp_path: Path) -> None:
    """The runtime would complain about a dimension of a tensor."""
    edit_manifest(image_folder, lambda m: m["preprocessing"].update({"resize": None}))
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((9, 7, 3), np.uint8))
    for name, why in (("a.png", "the manifest has no resize"), ("a.npy", "a .npy file is not resized")):
        ended = run_python(RUN_SHIPPED, image_folder / "verify.py", "--image", tmp_path / name)
        assert f"{name} is 7x9, the model wants 8x8, and {why}; give it in that size" in ended.refusal(2)


def test_no_image_without_preprocessing(folder: Path, tmp_path: Path) -> None:
    ended = run_python(RUN_SHIPPED, folder / "verify.py", "--image", tmp_path / "a.npy")
    assert "does not say how one image becomes this model's input" in ended.refusal(2)
