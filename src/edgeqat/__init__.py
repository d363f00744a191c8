"""edgeqat: quantization-aware training for edge devices, proved on the target runtime to the integer.

import edgeqat as eq

sim = eq.prepare(model, example_inputs, target="onnxruntime")
eq.calibrate(sim, batches)
eq.fit(sim, train_batches, epochs=4, lr=0.005)
program = eq.convert(sim)
artifact = eq.lower(program, "onnxruntime", "out")
parity = eq.verify(artifact, program, batches)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from edgeqat.version import __version__

if TYPE_CHECKING:
    from edgeqat.diagnose.cheapest import Limits
    from edgeqat.diagnose.search import SearchResult, search
    from edgeqat.diagnose.sensitivity import sensitivity
    from edgeqat.diagnose.sensitivity_table import Sensitivity
    from edgeqat.errors import EdgeqatError
    from edgeqat.graph.patterns import FusionMatch, FusionPattern
    from edgeqat.graph.pixels import Pixels
    from edgeqat.interpreter.run import reference
    from edgeqat.lowering.artifact import Artifact, load_artifact
    from edgeqat.lowering.lower import lower
    from edgeqat.measuring.measure import Measurement, measure
    from edgeqat.measuring.parity import Parity, verify
    from edgeqat.measuring.qdq_file import QdqParity, verify_qdq
    from edgeqat.pipeline import run
    from edgeqat.planning import Plan, plan
    from edgeqat.portability import Hazard, SaturationCost, hazards, saturation_cost
    from edgeqat.program import QuantizedProgram
    from edgeqat.ptq.adaround import AdaRound, AdaRoundConfig, adaround
    from edgeqat.ptq.correct_bias import BiasCorrection, correct_biases
    from edgeqat.ptq.equalize import Equalization, equalize
    from edgeqat.qconfig import ActivationConfig, QConfig, WeightConfig
    from edgeqat.qconfig_mapping import QConfigMapping
    from edgeqat.simulate.build import prepare
    from edgeqat.simulate.freeze import convert
    from edgeqat.simulate.model import SimulatedModel
    from edgeqat.target_rules import targets
    from edgeqat.train.aids import QatAids
    from edgeqat.train.batch_norm import BatchNormSchedule, reestimate_batch_norm
    from edgeqat.train.calibrate import calibrate
    from edgeqat.train.distillation import Distillation
    from edgeqat.train.ema import Ema
    from edgeqat.train.loop import History, fit
    from edgeqat.train.oscillation import Annealed, Oscillation
    from edgeqat.train.progressive import carry_weights

__all__ = [
    # stages, in pipeline order
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
    # what they take and return
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

_HOMES = {
    "plan": "planning",
    "Plan": "planning",
    "prepare": "simulate.build",
    "SimulatedModel": "simulate.model",
    "equalize": "ptq.equalize",
    "Equalization": "ptq.equalize",
    "calibrate": "train.calibrate",
    "adaround": "ptq.adaround",
    "AdaRound": "ptq.adaround",
    "AdaRoundConfig": "ptq.adaround",
    "correct_biases": "ptq.correct_bias",
    "BiasCorrection": "ptq.correct_bias",
    "fit": "train.loop",
    "BatchNormSchedule": "train.batch_norm",
    "reestimate_batch_norm": "train.batch_norm",
    "History": "train.loop",
    "QatAids": "train.aids",
    "Distillation": "train.distillation",
    "Ema": "train.ema",
    "Oscillation": "train.oscillation",
    "Annealed": "train.oscillation",
    "carry_weights": "train.progressive",
    "convert": "simulate.freeze",
    "reference": "interpreter.run",
    "hazards": "portability",
    "Hazard": "portability",
    "saturation_cost": "portability",
    "SaturationCost": "portability",
    "lower": "lowering.lower",
    "Artifact": "lowering.artifact",
    "load_artifact": "lowering.artifact",
    "verify": "measuring.parity",
    "Parity": "measuring.parity",
    "verify_qdq": "measuring.qdq_file",
    "QdqParity": "measuring.qdq_file",
    "search": "diagnose.search",
    "SearchResult": "diagnose.search",
    "Limits": "diagnose.cheapest",
    "measure": "measuring.measure",
    "Measurement": "measuring.measure",
    "sensitivity": "diagnose.sensitivity",
    "Sensitivity": "diagnose.sensitivity_table",
    "run": "pipeline",
    "EdgeqatError": "errors",
    "FusionMatch": "graph.patterns",
    "FusionPattern": "graph.patterns",
    "Pixels": "graph.pixels",
    "ActivationConfig": "qconfig",
    "QConfig": "qconfig",
    "QConfigMapping": "qconfig_mapping",
    "WeightConfig": "qconfig",
    "QuantizedProgram": "program",
    "targets": "target_rules",
}


def __getattr__(name: str) -> Any:
    # Names are imported when first used: `edgeqat --help` needs no torch. For this to work no module may have the
    # name of a public function: importing the module would put it in the function's place.
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeqat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"edgeqat.{_HOMES[name]}"), name)
