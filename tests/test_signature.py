"""How a model is called: what fits its signature and what is refused, wherever a batch comes in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import edgeqat as eq
from edgeqat.errors import InputError
from edgeqat.replay.script import replay
from helpers import EXACT_ARITHMETIC
from models import SmallNet, Tokens


@pytest.fixture(scope="module")
def sim() -> eq.SimulatedModel:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    return eq.calibrate(eq.prepare(SmallNet().eval(), x), [x])


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (torch.zeros(2, 1, 8, 8), r"float32 \[2, 1, 8, 8\]"),
        (torch.zeros(2, 3, 8), r"float32 \[2, 3, 8\]"),
        (torch.zeros(3, 8, 8), r"float32 \[3, 8, 8\]"),
        (torch.zeros(2, 3, 16, 16), r"float32 \[2, 3, 16, 16\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 \[2, 3, 8, 8\]"),
        (torch.zeros(()), r"float32 \[\]"),
    ],
    ids=["channels", "rank", "no batch", "size", "integers", "number"],
)
def test_inputs_of_another_shape_or_type(
    sim: eq.SimulatedModel, small_artifact: eq.Artifact, small_program: eq.QuantizedProgram, batch: Tensor, found: str
) -> None:
    words = rf"^input 'x' is {found}, wanted float32 \[N, 3, 8, 8\] as in the example inputs$"
    with pytest.raises(InputError, match=words):
        sim(batch)
    with pytest.raises(InputError, match=words), sim.exact("onnxruntime/x86"):
        sim(batch)
    with pytest.raises(InputError, match=words):
        eq.reference(small_program, batch)
    with pytest.raises(InputError, match=words):
        eq.verify(small_artifact, small_program, [batch])
    with pytest.raises(InputError, match=words):
        small_artifact.run(batch)


def test_any_batch_and_any_floating_type_fit(sim: eq.SimulatedModel) -> None:
    signature = sim.plan.program.signature
    for batch in (torch.zeros(1, 3, 8, 8), torch.zeros(7, 3, 8, 8, dtype=torch.bfloat16)):
        assert signature.flatten(batch)[0] is batch


def test_indices_are_of_the_examples_type() -> None:
    sim = eq.prepare(Tokens().eval(), torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(InputError, match=r"^input 'indices' is float32 \[2, 5\], wanted int64 \[N, 5\] as in"):
        sim(torch.zeros(2, 5))


class Heads(nn.Module):
    """Outputs at every depth, one of them an input, and two that are one value."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = self.body(x)
        scores = self.head(features)
        both = [scores.flatten(1), scores + 0]
        return {"boxes": torch.sigmoid(scores), "scores": both, "maps": (features, features)}


@EXACT_ARITHMETIC
@pytest.mark.parametrize("runtime", ["onnxruntime", "torchscript"])
def test_a_file_says_which_output_is_which(runtime: str, small_artifact: eq.Artifact, tmp_path: Path) -> None:
    """Outputs have names of their own in a model file; a device cannot guess which are the boxes."""
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    program = eq.convert(eq.calibrate(eq.prepare(Heads().eval(), x, target=runtime), [x]))
    artifact = eq.lower(program, runtime, tmp_path / "heads")
    assert replay(artifact.folder).passed
    expected, found = artifact.run(x), eq.load_artifact(artifact.folder).run(x)
    keys = [row["key"] for row in artifact.manifest["returns"]]
    assert keys == ["boxes", "scores.0", "scores.1", "maps.0", "maps.1"]
    wanted = [expected["boxes"], *expected["scores"], *expected["maps"]]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert [row["key"] for row in small_artifact.manifest["returns"]] == [None]


def test_pairs_where_inputs_are_wanted(
    sim: eq.SimulatedModel, small_artifact: eq.Artifact, small_program: eq.QuantizedProgram
) -> None:
    """A DataLoader gives lists, a list of tuples does not: both are what whoever trains has at hand."""
    pair, words = (torch.zeros(2, 3, 8, 8), torch.zeros(2)), r"pass the inputs: \[inputs for inputs, _ in loader\]$"
    for batch in (pair, list(pair)):
        with pytest.raises(InputError, match=words):
            eq.calibrate(copy.deepcopy(sim), [batch])
        with pytest.raises(InputError, match=words):
            eq.verify(small_artifact, small_program, [batch])


def test_a_stage_that_was_left_out_is_named(sim: eq.SimulatedModel, tmp_path: Path) -> None:
    model: Any = SmallNet()
    wanted = r"wanted what edgeqat.prepare\(model, example_inputs\) returns$"
    with pytest.raises(InputError, match=f"^found a SmallNet, {wanted}"):
        eq.calibrate(model, [torch.zeros(2, 3, 8, 8)])
    with pytest.raises(InputError, match=f"^found a SmallNet, {wanted}"):
        eq.convert(model)
    unconverted: Any = sim
    with pytest.raises(InputError, match=r"^found a SimulatedModel, wanted what edgeqat.convert\(sim\) returns$"):
        eq.lower(unconverted, "onnxruntime", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_another_stage_returns_is_named(
    sim: eq.SimulatedModel, small_artifact: eq.Artifact, small_program: eq.QuantizedProgram
) -> None:
    given: Any = {
        "sim": sim,
        "program": small_program,
        "artifact": small_artifact,
        "path": "runs/a",
        "model": SmallNet(),
    }
    x, of_program = torch.zeros(2, 3, 8, 8), r"wanted what edgeqat.convert\(sim\) returns$"
    of_lower = r"wanted what edgeqat.lower\(program, runtime, folder\) or edgeqat.load_artifact\(folder\) returns$"
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: eq.verify(given["program"], given["artifact"], [x]), f"^found a QuantizedProgram, {of_lower}"),
        (lambda: eq.verify(given["path"], small_program, [x]), f"^found 'runs/a', {of_lower}"),
        (lambda: eq.verify(small_artifact, given["sim"], [x]), f"^found a SimulatedModel, {of_program}"),
        (lambda: eq.measure([given["path"]], [(x, x)]), f"^found 'runs/a', {of_lower}"),
        (lambda: eq.measure(given["path"], [(x, x)]), f"^found 'runs/a', {of_lower}"),
        (
            lambda: eq.measure(given["artifact"], [(x, x)]),
            r"^found an Artifact, wanted a list of them; pass \[artifact\]$",
        ),
        (lambda: eq.reference(given["sim"], x), f"^found a SimulatedModel, {of_program}"),
        (lambda: eq.hazards(given["sim"]), f"^found a SimulatedModel, {of_program}"),
        (lambda: eq.saturation_cost(given["sim"], [x]), f"^found a SimulatedModel, {of_program}"),
        (lambda: eq.run({}, "out"), "^found a dict, wanted a bundled recipe's name or a YAML file"),  # type: ignore[arg-type]
        (lambda: eq.prepare(given["sim"], x), "^found a SimulatedModel, which is prepared already, wanted the float"),
        (lambda: eq.plan(given["sim"], x), "^found a SimulatedModel, which is prepared already, wanted the float"),
    ]
    stages: list[Callable[[Any], Any]] = [
        eq.equalize,
        lambda model: eq.adaround(model, [x]),
        lambda model: eq.correct_biases(model, [x]),
        lambda model: eq.sensitivity(model, [x]),
    ]
    of_prepare = r"^found a SmallNet, wanted what edgeqat.prepare\(model, example_inputs\) returns$"
    cases += [(lambda stage=stage: stage(given["model"]), of_prepare) for stage in stages]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()


def test_a_batch_where_batches_are_wanted(
    sim: eq.SimulatedModel, small_artifact: eq.Artifact, small_program: eq.QuantizedProgram
) -> None:
    x: Any = torch.zeros(2, 3, 8, 8)
    of_inputs = r"^batches is a tensor \[2, 3, 8, 8\], wanted a list or DataLoader of inputs; pass \[tensor\]$"
    of_pairs = of_inputs.replace("inputs; pass \\[tensor", "\\(inputs, targets\\); pass \\[\\(inputs, targets\\)")
    for call in (
        lambda: eq.calibrate(copy.deepcopy(sim), x),
        lambda: eq.verify(small_artifact, small_program, x),
        lambda: eq.adaround(copy.deepcopy(sim), x),
        lambda: eq.correct_biases(copy.deepcopy(sim), x),
        lambda: eq.saturation_cost(small_program, x),
        lambda: eq.reestimate_batch_norm(SmallNet(), x),
        lambda: eq.sensitivity(sim, x),
    ):
        with pytest.raises(InputError, match=of_inputs):
            call()
    for call in (
        lambda: eq.fit(copy.deepcopy(sim), x, epochs=1, lr=0.1),
        lambda: eq.measure([small_artifact], x),
        lambda: eq.sensitivity(sim, x, "top1"),
    ):
        with pytest.raises(InputError, match=of_pairs):
            call()
    with pytest.raises(InputError, match="^batches is a dict, wanted a list or DataLoader of inputs; pass "):
        eq.calibrate(copy.deepcopy(sim), {"x": x})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batch", "found"),
    [(torch.zeros(2, 3, 8, 8), r"a tensor \[2, 3, 8, 8\]"), ((torch.zeros(2, 3, 8, 8),), "a tuple of 1")],
)
def test_batches_without_targets(sim: eq.SimulatedModel, small_artifact: eq.Artifact, batch: Any, found: str) -> None:
    words = rf"^found a batch that is {found}, wanted \(inputs, targets\); give each batch its targets$"
    with pytest.raises(InputError, match=words):
        eq.fit(copy.deepcopy(sim), [batch], epochs=1, lr=0.1)
    with pytest.raises(InputError, match=words):
        eq.measure([small_artifact], [batch])
    with pytest.raises(InputError, match=words):
        eq.fit(
            SmallNet(),
            [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())],
            epochs=1,
            lr=0.1,
            validation_batches=[batch],
        )
