"""Checkpoints on disk: a pair is whole or does not count, and one of another run is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import edgeqat as eq
from edgeqat.errors import CheckpointError, ModelError
from edgeqat.train.state import TrainingState, Underway
from edgeqat.train.store import CheckpointStore, RunIdentity, first_difference
from helpers import digests, flip_byte, run_python

IDENTITY = RunIdentity({"train": {"seed": 0}, "export": ["onnxruntime"]}, "r" * 64, "p" * 64, "d" * 64)
BATCHES = [(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2)]


def states(metrics: list[float]) -> list[TrainingState]:
    """After each epoch, with these validation metrics."""
    found: list[TrainingState] = []
    torch.manual_seed(0)
    eq.fit(nn.Linear(4, 2), BATCHES, epochs=len(metrics), lr=0.1, on_checkpoint=found.append)
    return [
        replace(s, history=tuple(replace(e, metric=m) for e, m in zip(s.history, metrics, strict=False)))
        for s in found
    ]


def store(folder: Path, told: list[str] | None = None, identity: RunIdentity = IDENTITY) -> CheckpointStore:
    return CheckpointStore(folder, identity, True, (lambda _: None) if told is None else told.append)


def same(one: TrainingState, other: TrainingState) -> bool:
    assert (one.settings, one.history) == (other.settings, other.history)
    pairs = [(one.model, other.model), (one.rng, other.rng)]
    pairs += [(one.optimizer[name], other.optimizer[name]) for name in one.optimizer]
    return one.optimizer.keys() == other.optimizer.keys() and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) for a, b in pairs
    )


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Two epochs of a stage."""
    for state in states([0.1, 0.2]):
        store(tmp_path).save_state("float", state)
    return tmp_path


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    (state,) = states([0.5])
    store(tmp_path).save_state("float", state)
    found = store(tmp_path).latest("float")
    assert found is not None
    assert same(found, state)
    assert store(tmp_path).latest("qat") is None
    record = json.loads((tmp_path / "epochs" / "float-0001.json").read_text())
    assert record["recipe"] == IDENTITY.recipe
    assert record["training"]["next"] == {"epoch": 1, "step": 0}


@pytest.mark.parametrize(
    ("metrics", "higher", "kept"),
    [
        ([0.1, 0.9, 0.3, 0.4, 0.5], True, [2, 4, 5]),
        ([0.1, 0.9, 0.3, 0.4, 0.5], False, [1, 4, 5]),
        ([0.1, 0.2, 0.3, 0.4], True, [3, 4]),
        ([float("nan"), 0.2, float("nan"), 0.1], True, [2, 3, 4]),
    ],
)
def test_the_last_two_and_the_best_are_kept(
    tmp_path: Path, metrics: list[float], higher: bool, kept: list[int]
) -> None:
    own = CheckpointStore(tmp_path, IDENTITY, higher, lambda _: None)
    for state in states(metrics):
        own.save_state("float", state)
    assert sorted(path.name for path in (tmp_path / "epochs").iterdir()) == [
        f"float-{epoch:04d}.{kind}" for epoch in kept for kind in ("json", "safetensors")
    ]
    assert own.last_good("float") == tmp_path / "epochs" / f"float-{len(metrics):04d}.safetensors"


def within(state: TrainingState, steps: int) -> TrainingState:
    return replace(state, underway=Underway(steps, 0.1 + 0.2, 1.5))


def test_a_state_within_an_epoch_is_the_last_until_the_next_one(tmp_path: Path) -> None:
    own, (first, second) = store(tmp_path), states([0.1, 0.2])
    begun = replace(within(first, 7), history=())

    def names() -> list[str]:
        return sorted(path.name for path in (tmp_path / "epochs").glob("*.json"))

    own.save_state("float", begun)
    assert names() == ["float-0000-000007.json"]
    found = store(tmp_path).latest("float")
    assert found is not None and found.underway == begun.underway and same(found, begun)
    own.save_state("float", first)
    own.save_state("float", within(first, 12))
    own.save_state("float", within(first, 130))
    assert names() == ["float-0001-000130.json", "float-0001.json"]
    assert own.last_good("float") == tmp_path / "epochs" / "float-0001-000130.safetensors"
    flip_byte(tmp_path / "epochs" / "float-0001-000130.safetensors", at=99)
    found = store(tmp_path).latest("float")
    assert found is not None and found.underway is None and same(found, first)
    own.save_state("float", second)
    assert names() == ["float-0001.json", "float-0002.json"]


def test_a_state_under_the_name_of_another_step_does_not_count(tmp_path: Path) -> None:
    told: list[str] = []
    (state,) = states([0.1])
    store(tmp_path).save_state("float", within(state, 7))
    for kind in ("json", "safetensors"):
        path = tmp_path / "epochs" / f"float-0001-000007.{kind}"
        text = path.read_bytes().replace(b"float-0001-000007", b"float-0001-000008")
        path.with_stem("float-0001-000008").write_bytes(text)
        path.unlink()
    assert store(tmp_path, told).latest("float") is None
    assert told[0].endswith("is passed over: it does not describe training after its step")


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    flip_byte(path, at=len(path.read_bytes()) // 2)


def replace_by_junk(path: Path) -> None:
    path.write_text("[1, 2, 3]")


@pytest.mark.parametrize("part", ["json", "safetensors"])
@pytest.mark.parametrize("damage", [remove, truncate, empty, flip, replace_by_junk])
def test_a_damaged_pair_is_passed_over(filled: Path, damage: Callable[[Path], None], part: str) -> None:
    told: list[str] = []
    damage(filled / "epochs" / f"float-0002.{part}")
    try:
        found = store(filled, told).latest("float")
    except CheckpointError as error:  # a flipped byte may make another recipe or hash of it, which is refused
        assert (damage, part) == (flip, "json")
        assert str(filled / "epochs" / "float-0002.json") in str(error)
        return
    assert found is not None
    assert len(found.history) == 1
    if (damage, part) != (remove, "json"):
        (line,) = told
        assert line.startswith(f"{filled / 'epochs' / 'float-0002.json'} is passed over: ")
        assert "\n" not in line


def test_a_pair_of_another_stage_does_not_count(filled: Path) -> None:
    for kind in ("json", "safetensors"):
        (filled / "epochs" / f"float-0002.{kind}").rename(filled / "epochs" / f"qat-0002.{kind}")
    told: list[str] = []
    assert store(filled, told).latest("qat") is None
    assert "describes float-0002.safetensors of the stage float" in told[0]


@pytest.mark.parametrize("n", range(0, 400, 7))
def test_a_pair_with_any_bytes_changed_never_gives_other_weights(filled: Path, n: int) -> None:
    """Whatever happens to a file: it is passed over or refused, or what is read is what was written."""
    path = filled / "epochs" / ("float-0002.json" if n % 2 else "float-0002.safetensors")
    raw = path.read_bytes()
    path.write_bytes(raw[: n % len(raw)] + bytes([raw[n % len(raw)] ^ 0x11]) + raw[n % len(raw) + 1 :])
    try:
        found = store(filled).latest("float")
    except CheckpointError:
        return
    assert found is not None
    expected = states([0.1, 0.2])[len(found.history) - 1]
    assert all(torch.equal(found.model[name], expected.model[name]) for name in expected.model)


def rewritten(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        (
            replace(IDENTITY, recipe={"train": {"seed": 1}, "export": ["onnxruntime"]}, recipe_sha256="x" * 64),
            "was made with another recipe: train.seed is 0 there, 1 here; restore it, or start afresh",
        ),
        (replace(IDENTITY, plan_hash="x" * 64), "was made with another plan: the model's code has changed since"),
        (replace(IDENTITY, data_sha256="x" * 64), "was made with other data than there is now"),
    ],
    ids=["recipe", "plan", "data"],
)
def test_a_checkpoint_of_another_run_is_refused(filled: Path, identity: RunIdentity, words: str) -> None:
    store(filled).save_final("float", nn.Linear(4, 2), 2)
    own = store(filled, identity=identity)
    for read in (lambda: own.latest("float"), lambda: own.load_final("float", nn.Linear(4, 2))):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2


def test_another_schema_is_refused(filled: Path) -> None:
    rewritten(filled / "epochs" / "float-0002.json", schema=2)
    with pytest.raises(CheckpointError, match="has checkpoint schema 2, this edgeqat reads 1"):
        store(filled).latest("float")


def test_another_machine_is_told_once(filled: Path) -> None:
    for epoch in (1, 2):
        path = filled / "epochs" / f"float-000{epoch}.json"
        environment = json.loads(path.read_text())["environment"]
        rewritten(path, environment={**environment, "torch": "2.0.0", "threads": 64})
    told: list[str] = []
    own = store(filled, told)
    assert own.latest("float") is not None
    assert own.latest("float") is not None
    (line,) = told
    assert line.startswith("warning: torch 2.0.0 then and ")
    assert ", threads 64 then and 1 now: the last bits may differ" in line


def test_final_weights(tmp_path: Path) -> None:
    model, other, told = nn.Linear(4, 2), nn.Linear(4, 2), list[str]()
    own = store(tmp_path, told)
    assert not own.load_final("qat", other)
    own.save_final("qat", model, 3)
    assert own.load_final("qat", other)
    assert torch.equal(model.weight, other.weight)
    assert safetensors.torch.load_file(tmp_path / "qat.safetensors").keys() == {"weight", "bias"}
    with pytest.raises(ModelError, match="does not fit the model: weight has shape"):
        own.load_final("qat", nn.Linear(5, 2))
    flip_byte(tmp_path / "qat.safetensors")
    assert not own.load_final("qat", other)
    assert "its sha256 differs" in told[-1]


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from torch import nn
import edgeqat as eq
from edgeqat.errors import OutputError
from edgeqat.train.store import CheckpointStore, RunIdentity

own = CheckpointStore(Path(sys.argv[1]), RunIdentity({}, "r", "p", "d"), True, print)
model = nn.Linear(64, 64)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

def keep(state):
    if len(state.history) == 2:  # from now on the system refuses to write this much
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    own.save_state("float", state)

try:
    eq.fit(model, [(torch.ones(4, 64), torch.arange(4))], epochs=3, lr=0.1, on_checkpoint=keep)
except OutputError as error:
    print(error)
print(len(own.latest("float").history), sorted(path.name for path in Path(sys.argv[1]).rglob("*") if path.is_file()))
"""


def test_a_write_that_the_system_refuses_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    ended = run_python(FULL, tmp_path)
    assert (ended.code, ended.err) == (0, "")
    line, kept = ended.out.splitlines()
    assert line.startswith(f"cannot write {tmp_path}/epochs/float-0002.safetensors: File too large; ")
    assert kept == "1 ['float-0001.json', 'float-0001.safetensors']"
    assert set(digests(tmp_path)) == {"epochs/float-0001.json", "epochs/float-0001.safetensors"}


TREES = st.recursive(
    st.one_of(st.integers(), st.text(max_size=3), st.none(), st.booleans()),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner),
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), TREES, min_size=1), st.data())
def test_the_first_difference_is_a_key_that_differs(tree: dict[str, Any], data: st.DataObject) -> None:
    assert first_difference(tree, json.loads(json.dumps(tree))) is None
    key = data.draw(st.sampled_from(sorted(tree)))
    found = first_difference({**tree, key: "another value"}, tree)
    assert found is not None
    assert found.startswith(key)
    gone = first_difference({k: v for k, v in tree.items() if k != key}, tree)
    assert gone == f"{key} is missing there"
