"""Lower: a quantized program becomes an artifact folder for one runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from edgeqat.arguments import check_made
from edgeqat.errors import EdgeqatError, InputError
from edgeqat.files import replace_folder, sha256_of, to_json, write_atomically
from edgeqat.interpreter.arithmetic import ARITHMETICS
from edgeqat.interpreter.run import Interpreter
from edgeqat.lowering import to_aoti, to_executorch, to_litert, to_onnx, to_openvino, to_torchscript
from edgeqat.lowering.artifact import Artifact, check_replaceable
from edgeqat.lowering.golden import golden_vectors, sample_inputs, what_is_owed
from edgeqat.lowering.own_target import check_clamps, check_follows
from edgeqat.lowering.preprocessing import check_preprocessing
from edgeqat.lowering.session import open_session
from edgeqat.lowering.spelling import Spelling
from edgeqat.machine import describe_machine
from edgeqat.portability import hazards
from edgeqat.program import Kind, Op, QuantizedProgram
from edgeqat.replay.folder import UNSEALED, reason_of, seal_of
from edgeqat.replay.script import verify_script
from edgeqat.signature import Batch
from edgeqat.target_rules import resolve_targets
from edgeqat.target_table import Target, engine_of
from edgeqat.version import __version__

__all__ = ["lower"]

SPELLINGS: Mapping[str, Callable[[QuantizedProgram, str | None], Spelling]] = {
    "onnxruntime": to_onnx.spell,
    "torchscript": to_torchscript.spell,
    "executorch": to_executorch.spell,
    "litert": to_litert.spell,
    "openvino": to_openvino.spell,
    "aoti": to_aoti.spell,
}
"""By runtime: a program and an engine to a model file."""

BATCHES_TRIED = (1, 3)
"""Batches that a written file must take: neither is that of the example it was written with, which is 2."""

VERSIONS_KEPT = ("torch", "onnx", "onnxruntime", "onnxscript", "executorch", "ai-edge-litert", "openvino")


def lower(
    program: QuantizedProgram,
    runtime: str,
    out_dir: str | Path,
    golden_inputs: Batch | None = None,
    preprocessing: dict[str, Any] | None = None,
) -> Artifact:
    """Writes a program as an artifact folder: model file, manifest, golden vectors, verify.py.

    A program that is one float island is the FP32 twin. The same program gives the same bytes,
    but for "aoti", which is compiled code.

    Args:
        program: What `convert` returned.
        runtime: A runtime of `edgeqat.targets()`, or "torchscript/ENGINE" for a file of one engine; or the YAML file
            of a target of your own, which gets an ONNX file in QDQ form.
        out_dir: The folder; an artifact folder that is there is replaced whole, once everything is written.
        golden_inputs: A batch to verify with; by default 16 seeded samples over the input grid.
        preprocessing: What a device does to an image, and the classes' names: mean, std, resize, layout, labels, as
            docs/runtimes.md says; of an input that takes pixels, neither mean nor std.

    Raises:
        InputError: It is no program, or the golden inputs or the preprocessing are not those of its inputs.
        PlanError: The runtime is unknown, or the program is not what your own target takes; or it has activations of
            fewer than 8 bits, which the runtime does not clamp.
        MissingRuntimeError: Its packages are not installed.
        EdgeqatError: The runtime cannot load what was written, or cannot run it with a batch of any size.
        OutputError: The folder cannot be written, or holds something else than an artifact.
    """
    check_made(program, QuantizedProgram)
    folder = Path(out_dir)
    check_replaceable(folder)
    (target,) = resolve_targets(runtime)
    inputs = sample_inputs(program) if golden_inputs is None else program.signature.flatten(golden_inputs)
    for tensor in inputs:
        if not bool(torch.isfinite(tensor).all()):
            raise InputError("found NaN or infinite golden inputs, wanted finite ones")
    check_preprocessing(program, preprocessing)
    spelling = _spell(program, target)
    with replace_folder(folder.resolve()) as temporary:
        write_atomically(temporary / spelling.file_name, spelling.data)
        _check_runs(program, target.runtime, spelling, temporary, inputs)
        golden, places = golden_vectors(
            program, inputs, spelling.arithmetics, spelling.taps, preprocessing, spelling.unseen
        )
        write_atomically(temporary / "golden.safetensors", safetensors.torch.save(golden))
        write_atomically(temporary / "verify.py", verify_script(target.runtime))
        manifest = _manifest(program, target, spelling, temporary, inputs, preprocessing) | {"golden": places}
        manifest["sha256"] = seal_of(to_json(manifest).encode(), UNSEALED)
        write_atomically(temporary / "manifest.json", to_json(manifest))
    return Artifact(folder, manifest, program.signature)


def _spell(program: QuantizedProgram, target: Target) -> Spelling:
    if target.file is None:
        check_clamps(program, target)
        return SPELLINGS[target.runtime](program, engine_of(target.name))
    check_follows(program, target)
    return to_onnx.spell(program, None, target.storage, packs=target.packs_weights)


def _check_runs(
    program: QuantizedProgram, runtime: str, spelling: Spelling, folder: Path, inputs: list[Tensor]
) -> None:
    """Loads the file that was written and runs it, so that none is shipped that does neither."""
    ops, path = ", ".join(sorted({o.aten for o in program.float_origins()})), folder / spelling.file_name
    # Float ops alone have results whose size a runtime's exporter might get wrong.
    reference = Interpreter(program, ARITHMETICS[spelling.arithmetics[0]]) if ops and spelling.arithmetics else None
    try:
        session = open_session(runtime, path, spelling.engine, 1, spelling.taps)
    except InputError as error:
        reason = str(error).removesuffix("; fetch the artifact again").replace(str(path), path.name)
        raise EdgeqatError(
            f"the file for {runtime} cannot be loaded: {reason}; it has the float ops {ops or 'none'}"
        ) from error
    for n in BATCHES_TRIED:
        batch = [tensor[torch.arange(n) % len(tensor)] for tensor in inputs]
        try:
            # Looking inside takes some runtimes a model of its own for each value: once is enough.
            found = session.run_with_taps(batch)[0] if n == BATCHES_TRIED[0] else session.run(batch)
        except Exception as error:
            # The runtime raises whatever its kernels do.
            raise EdgeqatError(
                f"the file for {runtime} does not run with a batch of {n} ({reason_of(error)}); it has the "
                f"float ops {ops or 'none'}: write those that read the batch's size another way"
            ) from error
        wanted = [] if reference is None else torch.utils._pytree.tree_leaves(reference.run(batch))
        for name, made, expected in zip(program.outputs, found, wanted, strict=reference is not None):
            if made.shape != expected.shape:
                raise EdgeqatError(
                    f"the file for {runtime} gives {name} the shape {list(made.shape)} with a batch of {n}, wanted "
                    f"{list(expected.shape)}; it has the float ops {ops}: write those that compute sizes another way"
                )


def _manifest(
    program: QuantizedProgram,
    target: Target,
    spelling: Spelling,
    folder: Path,
    inputs: list[Tensor],
    preprocessing: dict[str, Any] | None,
) -> dict[str, Any]:
    owed = what_is_owed(program)
    makers = {name: op.name for op in program.ops for name in op.outputs}
    versions = describe_machine(threads=1).versions
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {
        "schema": 1,
        "sha256": UNSEALED,
        "edgeqat": __version__,
        "runtime": target.runtime,
        "target": target.name,
        "storage": target.storage,
        "engine": spelling.engine,
        "model": spelling.file_name,
        "plan_hash": program.plan_hash,
        "grid_hash": program.grid_hash,
        "arithmetics": list(spelling.arithmetics),
        "versions": {name: versions[name] for name in VERSIONS_KEPT if name in versions},
        "files": {path.name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files},
        "inputs": {
            name: {"shape": list(program.values[name].shape), "dtype": str(t.dtype).removeprefix("torch.")}
            for name, t in zip(program.inputs, inputs, strict=True)
        },
        "outputs": {n: {"op": _maker(program, n).name, "owed": owed[n]} for n in program.outputs},
        "returns": [
            {"key": key, "output": name}
            for key, name in zip(program.signature.output_keys(), program.outputs, strict=True)
        ],
        "preprocessing": preprocessing,
        "payload_bytes": spelling.payload_bytes,
        "coverage": {
            "integer": len(program.integer_ops()),
            "float": len(program.float_origins()),
            "float_ops": [{"op": o.aten, "module": o.module, "reason": o.reason} for o in program.float_origins()],
            "runtime_ops": dict(sorted(spelling.runtime_ops.items())),
        },
        "grids": {
            value.name: dict(zip(("scale", "zero_point"), value.grid.per_tensor(), strict=True))
            | {"qmin": value.grid.qmin, "qmax": value.grid.qmax}
            for value in program.values.values()
            if value.grid is not None
        },
        "hazards": [asdict(found) for found in hazards(program, target.runtime if target.file else target.name)],
        "checks": [
            {"op": makers[name], "value": name, "exact": owed[name] == "exact"}
            for name in program.tapped()
            if name not in spelling.unseen
        ],
    }


def _maker(program: QuantizedProgram, value: str) -> Op:
    """The op that computes a value, seen through a final dequantize."""
    for op in program.ops:
        if value in op.outputs:
            return _maker(program, op.inputs[0]) if op.kind is Kind.DEQUANTIZE else op
    return Op(Kind.FLOAT, (), (value,))  # an output that is an input
