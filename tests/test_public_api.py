from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import pytest

import edgeqat

PUBLIC = [
    "plan",
    "prepare",
    "equalize",
    "calibrate",
    "adaround",
    "correct_biases",
    "fit",
    "reestimate_batch_norm",
    "carry_weights",
    "convert",
    "reference",
    "hazards",
    "saturation_cost",
    "lower",
    "verify",
    "verify_qdq",
    "measure",
    "search",
    "sensitivity",
    "run",
    "ActivationConfig",
    "AdaRound",
    "AdaRoundConfig",
    "Annealed",
    "Artifact",
    "BatchNormSchedule",
    "BiasCorrection",
    "Distillation",
    "EdgeqatError",
    "Ema",
    "Equalization",
    "FusionMatch",
    "FusionPattern",
    "Hazard",
    "History",
    "Limits",
    "Measurement",
    "Oscillation",
    "Parity",
    "Pixels",
    "Plan",
    "QdqParity",
    "QConfig",
    "QConfigMapping",
    "QatAids",
    "QuantizedProgram",
    "SaturationCost",
    "SearchResult",
    "Sensitivity",
    "SimulatedModel",
    "WeightConfig",
    "load_artifact",
    "targets",
    "__version__",
]


def test_all_is_frozen() -> None:
    """A name added or removed here changes the contract: docs/design.md, CHANGELOG.md and this list go together."""
    assert edgeqat.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    found = getattr(edgeqat, name)
    assert isinstance(found, str) or (found.__doc__ or "").strip()


def test_importing_every_module_leaves_the_public_functions_in_place() -> None:
    for module in pkgutil.walk_packages(edgeqat.__path__, "edgeqat."):
        importlib.import_module(module.name)
    for name in ("plan", "prepare", "calibrate", "fit", "convert", "reference", "lower", "verify", "measure", "run"):
        assert callable(getattr(edgeqat, name)), name
    assert callable(edgeqat.targets)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'edgeqat' has no attribute 'quantise'"):
        edgeqat.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_every_module_imports_without_a_runtime() -> None:
    """Runtimes are optional: with them hidden, every module still imports."""
    code = (
        "import sys, importlib, pkgutil\n"
        "for name in ('onnx', 'onnxruntime', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "import edgeqat\n"
        "for module in pkgutil.walk_packages(edgeqat.__path__, 'edgeqat.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
