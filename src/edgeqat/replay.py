"""Replays the golden vectors of an artifact folder on this device's runtime.

    python verify.py [FOLDER] [--no-hash]          compares
    python verify.py [FOLDER] --image PHOTO.png    runs the model on one image, prepared as the manifest says

Needs numpy and the artifact's runtime (onnxruntime or torch), nothing else; --image needs Pillow too, unless it is
given a .npy array (uint8 [H, W, C]). This file is shipped, as it stands, as `verify.py` in every artifact folder, for
a device without edgeqat. `edgeqat verify` runs the package's own copy, never code from the folder.

Exit codes: 0 every integer as expected; 2 a file is missing or does not match its hash; 3 the runtime computes
other integers than the reference; 4 the runtime is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "i1", "I32": "<i4", "I64": "<i8", "U8": "u1", "BOOL": "?"}

FLOAT_TOLERANCE = 1e-4
"""Relative to the largest expected output: what two float32 kernels may differ by, for float islands only."""

OWED = ("exact", "close", "reported")
"""What an output owes: every bit; FLOAT_TOLERANCE; nothing, since a float was quantized again on the way."""

EXACT_ENGINES = ("fbgemm", "x86", "onednn", "qnnpack")
"""Engines of torch whose arithmetic is known exactly, the fastest on small models first."""

ENGINES = {"onnxruntime": ("CPUExecutionProvider",), "torchscript": EXACT_ENGINES}
"""By runtime: the engines that a manifest may name."""

MANIFEST_KEYS = {"runtime": str, "engine": str, "model": str, "files": dict, "arithmetics": list}
MANIFEST_KEYS |= {"inputs": dict, "outputs": dict, "checks": list}
"""What replaying reads of a manifest, with its JSON type."""


class FolderError(Exception):
    """An artifact folder that is incomplete, damaged or tampered with."""


@dataclass(frozen=True)
class Replay:
    """What replaying found.

    Attributes:
        against: Name of the arithmetic whose golden vectors were used.
        exact_here: Whether this machine's kernels are the ones of that arithmetic, so that a difference is a failure.
        samples: Number of golden inputs.
        identical: Share of output elements that are bit-identical.
        max_difference: Largest difference among the outputs, in their own unit.
        first_difference: First op, in program order, whose integers differ; None if none does.
        passed: Whether everything that must be equal is.
        owed: The least that an output owes, see OWED.
        inside: Number of inner values that must be, and were, compared to the bit.
    """

    against: str
    exact_here: bool
    samples: int
    identical: float
    max_difference: float
    first_difference: str | None
    passed: bool
    owed: str
    inside: int


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty where it does not tell."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset()
    for line in info.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def arithmetic_here(runtime: str) -> str | None:
    """The arithmetic of a runtime's kernels on this machine; None where it is not known exactly.

    Args:
        runtime: "onnxruntime", "torchscript" (the first of its exact engines) or "torchscript/ENGINE".
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    runtime, _, engine = runtime.partition("/")
    flags = cpu_flags()
    if runtime == "onnxruntime":
        return "onnxruntime/x86" if flags & {"avx512_vnni", "avx_vnni"} else None
    if runtime != "torchscript":
        return None
    # Sums saturate without VNNI, and torch's own additions depend on the width of its vectors.
    wide = "avx512_vnni" in flags and os.environ.get("ATEN_CPU_CAPABILITY", "avx512") == "avx512"
    exact = [name for name in EXACT_ENGINES if name == "qnnpack" or wide]
    if not engine:
        return exact[0]
    return engine if engine in exact else None


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a safetensors file: a JSON header and raw bytes, nothing is executed."""
    try:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        body = memoryview(raw)[8 + size :]
        return {
            name: np.frombuffer(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read as safetensors ({error}); fetch the artifact again") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact folder."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read ({error}); wanted an artifact folder made by edgeqat") from error
    if not isinstance(manifest, dict):
        raise FolderError(f"{path} holds no JSON object; wanted a manifest made by edgeqat")
    lacking = [name for name, kind in MANIFEST_KEYS.items() if not isinstance(manifest.get(name), kind)]
    if lacking:
        raise FolderError(f"{path} lacks {', '.join(lacking)}; wanted a manifest made by edgeqat")
    runtime, engine = manifest["runtime"], manifest["engine"]
    wanted = {"schema": (1,), "runtime": tuple(ENGINES), "engine": ENGINES.get(runtime, (engine,))}
    for key, values in wanted.items():
        if manifest.get(key) not in values:
            names = " or ".join(map(str, values))
            raise FolderError(f"{path} has the {key} {manifest.get(key)!r}, wanted {names}; fetch the artifact again")
    for key in ("arithmetics", "inputs", "outputs"):
        if not manifest[key]:
            raise FolderError(f"{path} names no {key}, wanted at least one; fetch the artifact again")
    for name in (manifest["model"], *manifest["files"]):
        if Path(name).name != name:
            raise FolderError(f"{path} names the file {name!r}, which is outside the folder; fetch the artifact again")
    return manifest


def check_hashes(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises FolderError for the first file that is missing or is not the one the manifest was written for."""
    for name in sorted({manifest["model"], "golden.safetensors", *manifest["files"]}):
        path, entry = folder / name, manifest["files"].get(name)
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            raise FolderError(f"{folder / 'manifest.json'} has no sha256 of {name}; fetch the artifact again")
        if not path.is_file():
            raise FolderError(f"{path} is missing; fetch the artifact again")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise FolderError(
                f"{path} has sha256 {found[:12]}..., the manifest says {entry['sha256'][:12]}...: it was changed "
                "or damaged; fetch the artifact again, or pass --no-hash to see what it computes"
            )


def checksums(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """CRC-32 of each sample's bytes: int64 [N]."""
    return np.array([zlib.crc32(np.ascontiguousarray(sample).tobytes()) for sample in array], np.int64)


def replay(folder: Path, check: bool = True) -> Replay:
    """Runs the golden inputs through the model file and compares.

    Args:
        folder: An artifact folder.
        check: Whether to check the files' hashes first.

    Raises:
        FolderError: A file is missing, unreadable or changed.
        ImportError: The runtime is not installed.
    """
    manifest = read_manifest(folder)
    if check:
        check_hashes(folder, manifest)
    golden = read_safetensors(folder / "golden.safetensors")
    if not (folder / manifest["model"]).is_file():
        raise FolderError(f"{folder / manifest['model']} is missing; fetch the artifact again")
    try:
        return compare(manifest, golden, folder / manifest["model"])
    except (LookupError, TypeError, StopIteration) as error:
        raise FolderError(
            f"{folder}: model, manifest and golden vectors do not belong together ({type(error).__name__}: {error}); "
            "fetch the artifact again"
        ) from error


def compare(manifest: dict[str, Any], golden: dict[str, Any], model: Path) -> Replay:
    """Runs the golden inputs through a model file and compares."""
    engine, against = choose_engine(manifest)
    feed = {name: golden[f"inputs/{name}"] for name in manifest["inputs"]}
    check_complete(manifest, golden, against)
    check_preprocessing(manifest, golden)
    samples = len(next(iter(feed.values())))
    inside = sum(row["exact"] for row in manifest["checks"])
    taps = golden["taps"].tobytes() if inside else b""
    outputs, values = run_model(manifest, model, engine, feed, taps)
    identical, worst, wrong = compare_outputs(manifest, golden, against, outputs)
    first = first_difference(manifest["checks"], golden, against, values) if inside else None
    first = wrong if first is None else first
    runtime = manifest["runtime"] if manifest["runtime"] == "onnxruntime" else f"{manifest['runtime']}/{engine}"
    # ONNX Runtime computes layers over int8 activations in float: none of its integer kernels on x86 take them.
    here = arithmetic_here(runtime) == against and manifest.get("storage") != "int8"
    owed = max((entry["owed"] for entry in manifest["outputs"].values()), key=OWED.index)
    return Replay(against, here, samples, identical, worst, first, first is None, owed, inside)


def check_complete(manifest: dict[str, Any], golden: dict[str, Any], against: str) -> None:
    """Raises LookupError where the manifest does not list what the golden vectors hold: it would go unchecked."""
    rows = {"outputs": manifest["outputs"], "crc32": {row["value"] for row in manifest["checks"]}}
    for part, listed in rows.items():
        prefix = f"{against}/{part}/"
        odd = {key.removeprefix(prefix) for key in golden if key.startswith(prefix)} ^ set(listed)
        if odd:
            raise LookupError(f"only one of them has {prefix}{min(odd)}")


def choose_engine(manifest: dict[str, Any]) -> tuple[str, str]:
    """(engine, arithmetic to compare with): the manifest's engine where this device has it, else another exact one."""
    engine, known = str(manifest["engine"]), [str(name) for name in manifest["arithmetics"]]
    if manifest["runtime"] != "torchscript":
        return engine, known[0]
    import torch

    supported = torch.backends.quantized.supported_engines
    if engine in supported and (engine in known or engine not in EXACT_ENGINES):
        return engine, engine if engine in known else known[0]
    usable = [name for name in known if name in supported]
    if not usable:
        raise FolderError(f"torch here has the engines {', '.join(supported)}, wanted one of {', '.join(known)}")
    return usable[0], usable[0]


def compare_outputs(
    manifest: dict[str, Any], golden: dict[str, Any], against: str, outputs: dict[str, Any]
) -> tuple[float, float, str | None]:
    """(share of identical elements, largest difference, op of the first output that is not as it must be)."""
    equal, total, worst, wrong = 0, 0, 0.0, None
    for name, entry in manifest["outputs"].items():
        expected, found = golden[f"{against}/outputs/{name}"], outputs[name]
        if expected.shape != found.shape:
            return 0.0, float("inf"), str(entry["op"])
        difference = np.abs(expected.astype(np.float64) - found)
        equal, total = equal + int((expected == found).sum()), total + expected.size
        worst = max(worst, float(difference.max(initial=0.0)))
        close = FLOAT_TOLERANCE * float(np.abs(expected).max(initial=0.0))
        allowed = {"exact": 0.0, "close": close, "reported": float("inf")}[entry["owed"]]
        if wrong is None and not bool((difference <= allowed).all()):
            wrong = str(entry["op"])
    return equal / max(total, 1), worst, wrong


def first_difference(
    checks: list[dict[str, Any]], golden: dict[str, Any], against: str, values: dict[str, Any]
) -> str | None:
    """The first op, in program order, whose integers are not the expected ones."""
    for row in checks:
        expected = golden[f"{against}/crc32/{row['value']}"]
        if row["exact"] and not np.array_equal(checksums(values[row["value"]]), expected):
            return str(row["op"])
    return None


def run_model(
    manifest: dict[str, Any], model: Path, engine: str, feed: dict[str, Any], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    if manifest["runtime"] == "torchscript":
        return run_torchscript(model, engine, feed, list(manifest["outputs"]), taps)
    return run_onnx(model, feed, taps)


def steps_of(manifest: dict[str, Any], name: str) -> dict[str, Any] | None:
    """How pixels become an input, None where they do not."""
    steps = manifest.get("preprocessing") or {}
    steps = steps.get("inputs", {}).get(name, {}) if "inputs" in steps else steps
    return steps if steps.get("mean") and steps.get("std") else None


def preprocess(pixels: np.ndarray[Any, Any], steps: dict[str, Any]) -> np.ndarray[Any, Any]:
    """uint8 [N, H, W, C] to float32 [N, C, H, W]: (pixels / 255 - mean) / std, to the bit as in training."""
    mean, std = (np.asarray(steps[key], np.float32) for key in ("mean", "std"))
    real = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(real.transpose(0, 3, 1, 2))


def check_preprocessing(manifest: dict[str, Any], golden: dict[str, Any]) -> None:
    """Raises FolderError where the manifest's preprocessing does not make the golden inputs of the golden pixels."""
    for name in manifest["inputs"]:
        pixels, steps = golden.get(f"pixels/{name}"), steps_of(manifest, name)
        if pixels is None:
            continue
        if steps is None or not np.array_equal(preprocess(pixels, steps), golden[f"inputs/{name}"]):
            raise FolderError(
                f"the manifest's preprocessing of {name} does not give the golden inputs; fetch the artifact again"
            )


def predict(folder: Path, image: Path) -> str:
    """The labels of one image, best first, with the model's figures for them."""
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    name = next(iter(manifest["inputs"]))
    steps = steps_of(manifest, name)
    if steps is None or len(manifest["inputs"]) != 1:
        raise FolderError("the manifest does not say how one image becomes this model's input")
    engine, _ = choose_engine(manifest)
    feed = {name: preprocess(read_image(image, steps)[None], steps)}
    outputs, _ = run_model(manifest, folder / manifest["model"], engine, feed, b"")
    scores = next(iter(outputs.values()))[0].ravel()
    labels = (manifest["preprocessing"] or {}).get("labels") or [str(i) for i in range(len(scores))]
    best = np.argsort(-scores, kind="stable")[:5]
    return "\n".join(f"{labels[i] if i < len(labels) else i}\t{scores[i]:.4f}" for i in best)


def read_image(path: Path, steps: dict[str, Any]) -> np.ndarray[Any, Any]:
    """uint8 [H, W, C] of a .npy file as it is, or of an image file, in RGB and resized; Pillow is needed for those."""
    try:
        if path.suffix == ".npy":
            pixels: np.ndarray[Any, Any] = np.load(path, allow_pickle=False)
        else:
            from PIL import Image

            with Image.open(path) as image:
                rgb = image.convert("RGB")
                resize = steps.get("resize")
                pixels = np.asarray(rgb.resize(resize["size"][::-1], Image.Resampling.BILINEAR) if resize else rgb)
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} cannot be read as an image ({error})") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != len(steps["mean"]):
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise FolderError(f"{path} holds {found}, wanted uint8 [H, W, {len(steps['mean'])}]")
    return pixels


def run_onnx(path: Path, feed: dict[str, Any], taps: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    model = path.read_bytes()
    # The taps turn every integer tensor of the very same file into an output.
    values = _run_onnx(model + taps, feed) if taps else {}
    # int8 activations are stored 128 less.
    return _run_onnx(model, feed), {n: v.view(np.uint8) ^ 128 if v.dtype == np.int8 else v for n, v in values.items()}


def _run_onnx(model: bytes, feed: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = session.run(None, feed)
    except Exception as error:
        raise FolderError(f"ONNX Runtime refuses the model: {reason_of(error)}") from error
    return dict(zip((o.name for o in session.get_outputs()), found, strict=True))


def run_torchscript(
    path: Path, engine: str, feed: dict[str, Any], outputs: list[str], taps: bytes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every output by name, and every inner value if there are taps; one thread."""
    import torch

    module = load_torchscript(path, engine)
    inputs = tuple(torch.from_numpy(array.copy()) for array in feed.values())
    threads = torch.get_num_threads()
    try:
        with on_engine(engine), torch.no_grad():
            torch.set_num_threads(1)
            found = [tensor.numpy() for tensor in module(*inputs)]
            values = tapped_torchscript(module, taps.decode().split("\n"), inputs) if taps else {}
    except RuntimeError as error:
        raise FolderError(f"torch refuses the model: {reason_of(error)}") from error
    finally:
        torch.set_num_threads(threads)
    return dict(zip(outputs, found, strict=True)), {name: value.numpy() for name, value in values.items()}


def reason_of(error: Exception) -> str:
    """The line of a runtime's message that says what is wrong; TorchScript puts a traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    marked = [line.removeprefix("RuntimeError: ") for line in lines if line.startswith("RuntimeError: ")]
    return marked[-1] if marked else lines[0]


def load_torchscript(path: Path, engine: str) -> Any:
    """A TorchScript file, its weights packed for an engine.

    Raises:
        FolderError: torch has no such engine, or cannot read the file.
    """
    import torch

    if engine not in torch.backends.quantized.supported_engines:
        supported = ", ".join(torch.backends.quantized.supported_engines)
        raise FolderError(f"torch here has no engine {engine!r}, wanted one of {supported}")
    try:
        # torch announces that TorchScript and its quantized tensors will go; who runs this file has chosen them.
        with on_engine(engine), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # The second announcement comes once, with the first quantized tensor, and from inside a model it could
            # not be kept off standard error.
            torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise FolderError(
            f"{path} cannot be read as TorchScript ({reason_of(error)}); fetch the artifact again"
        ) from error


@contextlib.contextmanager
def on_engine(engine: str) -> Iterator[None]:
    """Within it, torch's INT8 kernels and packing are an engine's."""
    import torch

    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        yield
    finally:
        torch.backends.quantized.engine = previous


def tapped_torchscript(module: Any, names: list[str], inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The integers of the named values, from a module's own graph with other outputs.

    The i-th line names the value `v<i>`, as the file was written; loading appends a number to it. Names between tabs
    have one value.
    """
    import torch

    graph = module.graph.copy()
    found = {value.debugName().partition(".")[0]: value for node in graph.nodes() for value in node.outputs()}
    graph.eraseOutput(0)
    together = graph.appendNode(graph.create("prim::ListConstruct", [found[f"v{i}"] for i in range(len(names))]))
    together.output().setType(torch._C.ListType(torch._C.TensorType.get()))
    graph.registerOutput(together.output())
    graph.eraseInput(0)  # the module itself: a frozen graph does not read it
    with torch.no_grad():
        tensors = torch._C._create_function_from_graph("taps", graph)(*inputs)
    lines = zip(names, tensors, strict=True)
    return {name: tensor.int_repr().contiguous() for line, tensor in lines for name in line.split("\t")}


def tensor_kinds(graph: Any) -> list[str]:
    """The kind of every node of a TorchScript graph that computes a tensor, in order."""
    return [node.kind() for node in graph.nodes() if not node.kind().startswith("prim::")]


def describe(result: Replay) -> str:
    """One line for a person."""
    share = f"{100 * result.identical:.2f}% of outputs bit-identical to {result.against} on {result.samples} samples"
    if result.passed and result.owed != "exact":
        inner = f"{result.inside} inner values bit-identical to {result.against}, " if result.inside else ""
        bound = f"wanted at most {FLOAT_TOLERANCE:g} of the largest one: two float32 libraries may round differently"
        if result.owed == "reported":
            bound = "not bounded, since floats were quantized again before them"
        worst = f"outputs on {result.samples} samples differ by at most {result.max_difference:.3g}"
        return f"verified: {inner}{worst} ({bound})"
    if result.passed:
        return f"verified: {share}"
    if not result.exact_here:
        return f"differs, first at {result.first_difference}: {share}; this machine's kernels have another arithmetic"
    return f"FAILED: {share}; the first op that differs is {result.first_difference}"


def main() -> int:
    """The command line of verify.py."""
    parser = argparse.ArgumentParser(description="Replay an artifact's golden vectors on this device.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--no-hash", action="store_true", help="do not check the files' hashes first")
    parser.add_argument("--image", type=Path, help="an image (needs Pillow) or a .npy array to run on instead")
    options = parser.parse_args()
    try:
        if options.image is not None:
            print(predict(options.folder, options.image))
            return 0
        result = replay(options.folder, check=not options.no_hash)
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}; pip install {'pillow' if error.name == 'PIL' else error.name}", file=sys.stderr)
        return 4
    print(describe(result))
    return 0 if result.passed or not result.exact_here else 3


if __name__ == "__main__":
    sys.exit(main())
