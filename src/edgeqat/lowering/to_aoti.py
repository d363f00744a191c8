"""Spelling a quantized program as an AOTInductor package, `model.pt2`: compiled code with its weights inside.

The code is compiled by the C++ compiler of this machine for its own processor, and holds weights in the order of
memory that oneDNN wants here: a package is for processors like the one that it was made on. A compiler promises no
deterministic bytes, so two packages of one program may differ. Loading one executes it, as with any compiled code; an
artifact's hashes are checked first.

Nothing inside can be looked at: a value that became an output would be another package.
"""

from __future__ import annotations

import io
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from edgeqat.errors import EdgeqatError, MissingRuntimeError, PlanError
from edgeqat.lowering.aoti_network import Network, register_shapes
from edgeqat.lowering.own_target import check_follows
from edgeqat.lowering.spelling import Spelling, payload_bytes
from edgeqat.machine import cpp_compiler
from edgeqat.program import BATCH_DIM, QuantizedProgram
from edgeqat.replay.folder import reason_of
from edgeqat.target_table import TARGETS

__all__ = ["check_compiler", "spell"]

FILE_NAME = "model.pt2"
ENGINE = "inductor"
PERMANENT = (1980, 1, 1, 0, 0, 0)
"""The date of every record in the package."""

SETTINGS: Mapping[str, Any] = {
    # Weights become constants, packed when the package is made.
    "freezing": True,
    # As many threads as torch has when the package runs, not as it had when the package was made.
    "cpp.dynamic_threads": True,
    # Each float operation is rounded on its own: the arithmetic depends on it.
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.enable_unsafe_math_opt_flag": False,
    # For debuggers: four fifths of a small package, and paths of this machine.
    "aot_inductor.enable_line_tables": False,
    "aot_inductor.enable_frame_pointer": False,
}

CALL = re.compile(r"(?<![\w:])(?:aoti_torch_(?:cpu_+)?|cpp_)(\w+?)(?:_\d+)?\(")
BOOKKEEPING = re.compile(
    r"^(empty_|get_|delete_|create_|new_|assign_|clone|as_strided|_reinterpret|device_|dtype_|check)"
)


def spell(program: QuantizedProgram, engine: str | None) -> Spelling:
    """The package of a program; `engine` is of no meaning here.

    Raises:
        MissingRuntimeError: There is no C++ compiler.
        PlanError: The program is for images of any size.
        EdgeqatError: torch.export or inductor refuses the program's float ops.
    """
    check_compiler()
    _check_fixed_size(program)
    check_follows(program, TARGETS["aoti"])
    data, source = _without_sources(_compiled(program))
    return Spelling(
        file_name=FILE_NAME,
        data=data,
        engine=ENGINE,
        arithmetics=("aoti",),
        payload_bytes=payload_bytes(program),
        runtime_ops=_calls(source),
        taps=b"",
        unseen=frozenset(program.tapped()),
    )


def check_compiler() -> None:
    """Whether packages can be made here.

    Raises:
        MissingRuntimeError: There is no C++ compiler.
    """
    if cpp_compiler() is None:
        raise MissingRuntimeError("aoti", "aoti", "no C++ compiler was found", "install g++, or set CXX to a compiler")


def _check_fixed_size(program: QuantizedProgram) -> None:
    for name in program.inputs:
        found = [size for size in program.values[name].shape if isinstance(size, str) and size != BATCH_DIM]
        if found:
            raise PlanError(
                f"input {name!r} has a dynamic {' and '.join(found)}, and an AOTInductor package one size: prepare "
                "without dynamic_size for aoti, or lower to onnxruntime"
            )


def _compiled(program: QuantizedProgram) -> bytes:
    """What inductor makes of a program."""
    register_shapes()
    network = Network(program).eval()
    examples = network.examples()
    batch = Dim("batch", min=1)
    # inductor freezes only where no gradient is asked for; torch warns of tensors of its own that it copies.
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        path = Path(folder) / FILE_NAME
        try:
            exported = torch.export.export(network, examples, dynamic_shapes=(tuple({0: batch} for _ in examples),))
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=dict(SETTINGS))
        except Exception as error:
            # Both raise whatever they stumble over; the user needs to know which ops.
            ops = ", ".join(sorted({origin.aten for origin in program.float_origins()})) or "none"
            raise EdgeqatError(
                f"AOTInductor cannot compile the model ({reason_of(error)}); it has the float ops {ops}: rewrite "
                "those, or lower to onnxruntime"
            ) from error
        return path.read_bytes()


def _without_sources(package: bytes) -> tuple[bytes, str]:
    """The package without the C++ code and identity, which loading does not read; and the code that calls kernels."""
    source, target, code = zipfile.ZipFile(io.BytesIO(package)), io.BytesIO(), ""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as copy:
        for entry in source.infolist():
            _, _, name = entry.filename.partition("/")
            raw = source.read(entry)
            if name.endswith(".wrapper.cpp"):
                code = raw.decode()
            if name.endswith((".cpp", ".kernel_metadata.json", "serialization_id")):
                continue
            copy.writestr(zipfile.ZipInfo(f"model/{name}", PERMANENT), _without_paths(raw))
    return target.getvalue(), code


def _without_paths(compiled: bytes) -> bytes:
    """Without where sources lay on this machine, which checks in the code mention; as long as before."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    for folder in (cache_dir(), str(Path(torch.__file__).parent)):
        compiled = compiled.replace(folder.encode(), b"/" * len(folder.encode()))
    return compiled


def _calls(code: str) -> dict[str, int]:
    """How often the generated code calls each of torch's kernels, and compiled loops of its own: `loop`."""
    _, _, body = code.partition("::run_impl(")
    names = [name for name in CALL.findall(body) if not BOOKKEEPING.match(name)]
    return dict(Counter("loop" if name.startswith("fused") else name for name in names))
