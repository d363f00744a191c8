"""Data from the user's own code: what is taken, and how each wrong return is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgeqat.data import decode
from edgeqat.data.dataset import Dataset
from edgeqat.data.sources import load
from edgeqat.errors import DataError, InputError, ModelError

HEAD = """
import numpy as np
import torch

g = torch.Generator().manual_seed(0)

def images(n, channels=1, size=4):
    return torch.randint(0, 256, (n, channels, size, size), generator=g, dtype=torch.uint8)

def classes(n):
    return torch.arange(n) % 3

def floats(n, *shape):
    return torch.randn(n, *shape, generator=g)

"""
SPLITS = ("train", "calibration", "validation", "test")


def load_code(folder: Path, code: str, **settings: Any) -> Dataset:
    """Loads what `make` returns; `code` is its body, or the expression that it returns."""
    body = code if "return" in code else f"    return {code}"
    path = folder / "mine.py"
    path.write_text(f"{HEAD}def make():\n{body}\n", encoding="utf-8")
    arguments: dict[str, Any] = {"image_size": 32, "mean": None, "std": None, "calibration_n": 4}
    return load(f"{path}:make", **(arguments | settings))


def refusal(folder: Path, code: str, **settings: Any) -> str:
    with pytest.raises(InputError) as caught:
        load_code(folder, code, **settings)
    assert isinstance(caught.value, (DataError, ModelError))
    message = str(caught.value).replace(str(folder), "")
    assert "\n" not in message
    return message


# What is taken.


def test_images_of_one_channel(tmp_path: Path) -> None:
    found = load_code(tmp_path, "{'train': (images(30), classes(30)), 'test': (images(6), classes(6))}")
    assert [len(getattr(found, name)) for name in SPLITS] == [23, 4, 3, 6]
    assert found.test.inputs.shape == (6, 1, 4, 4)  # type: ignore[union-attr]
    assert found.labels == ("0", "1", "2")
    assert found.mean is not None
    assert found.std is not None
    every = torch.cat([getattr(found, name).inputs for name in SPLITS[:3]]).double() / 255
    assert found.mean == pytest.approx([float(every.mean())])
    assert found.std == pytest.approx([float(every.std(correction=0))])
    assert found.sizing is None


def test_without_a_test_part_a_fifth_of_each_class_is_set_aside(tmp_path: Path) -> None:
    found = load_code(tmp_path, "{'train': (images(30), classes(30))}")
    assert [len(getattr(found, name)) for name in SPLITS] == [18, 4, 2, 6]
    assert found.test.classes is not None
    assert found.test.classes.bincount().tolist() == [2, 2, 2]


def test_names_and_normalisation_of_its_own_and_those_of_the_recipe(tmp_path: Path) -> None:
    code = (
        "{'train': (images(30), classes(30)), 'test': (images(6), classes(6)), "
        "'labels': ['a', 'b', 'c', 'd'], 'mean': [0.25], 'std': np.array([2.0])}"
    )
    found = load_code(tmp_path, code)
    assert (found.labels, found.mean, found.std) == (("a", "b", "c", "d"), (0.25,), (2.0,))
    assert load_code(tmp_path, code, mean=[0.5]).mean == (0.5,)


def test_numpy_arrays_and_small_integers(tmp_path: Path) -> None:
    code = """
    frozen = np.zeros((12, 2, 3, 3), np.uint8) + 7
    frozen.flags.writeable = False
    labels = (np.arange(12) % 2).astype(np.uint8)
    return {'train': (frozen, labels), 'test': (frozen, labels), 'std': [1.0, 1.0]}
    """
    found = load_code(tmp_path, code)
    assert found.test.classes is not None
    assert found.test.targets.tolist() == [0, 1] * 6
    assert found.mean == pytest.approx((7 / 255, 7 / 255))


def test_float_inputs_are_used_as_they_are(tmp_path: Path) -> None:
    found = load_code(tmp_path, "{'train': (floats(30, 7), floats(30, 2)), 'test': (floats(6, 7), floats(6, 2))}")
    assert (found.mean, found.std, found.labels) == (None, None, None)
    assert found.test.targets.shape == (6, 2)
    assert found.preprocessing() == {"input": "float32 as given", "layout": None, "resize": None, "labels": None}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    code = """
    def part(n):
        return {'x': images(n), 'state': floats(n, 3)}, (classes(n), {'box': floats(n, 4)})
    return {'train': part(30), 'test': part(6)}
    """
    found = load_code(tmp_path, code)
    assert isinstance(found.test.inputs, dict)
    assert found.test.inputs["state"].shape == (6, 3)
    assert found.test.targets[1]["box"].shape == (6, 4)
    assert found.mean is not None
    assert len(found.mean) == 1


def test_a_torch_dataset_of_pairs(tmp_path: Path) -> None:
    code = """
    class Mine(torch.utils.data.Dataset):
        def __init__(self, n):
            self.n = n
        def __len__(self):
            return self.n
        def __getitem__(self, i):
            return (torch.full((1, 2, 2), i, dtype=torch.uint8), {'age': np.float32(i)}), i % 2
    return {'train': Mine(20), 'test': torch.utils.data.Subset(Mine(20), [3, 5, 4])}
    """
    found = load_code(tmp_path, code, mean=[0.0], std=[1.0])
    assert isinstance(found.test.inputs, tuple)
    assert found.test.inputs[0][:, 0, 0, 0].tolist() == [3, 5, 4]
    assert found.test.inputs[1]["age"].tolist() == [3, 5, 4]
    assert found.test.targets.tolist() == [1, 1, 0]
    assert found.test.classes is not None


def test_two_pairs_in_a_list_are_no_inputs_and_targets(tmp_path: Path) -> None:
    code = "{'train': (floats(20, 2), classes(20)), 'test': [(torch.zeros(2), 1), (torch.ones(2), 2)]}"
    found = load_code(tmp_path, code)
    assert isinstance(found.test.inputs, Tensor)
    assert found.test.inputs.tolist() == [[0, 0], [1, 1]]
    assert found.test.targets.tolist() == [1, 2]


@pytest.mark.parametrize(
    "test", ["(images(6), None)", "[(x, None) for x in images(6)]"], ids=["inputs and None", "pairs with None"]
)
def test_unlabelled(tmp_path: Path, test: str) -> None:
    code = f"{{'train': (images(10), None), 'test': {test}}}"
    found = load_code(tmp_path, code, needs_labels=False)
    assert [len(getattr(found, name)) for name in SPLITS] == [6, 4, 0, 6]
    assert found.test.targets is None
    assert found.labels is None


def test_a_callable_in_a_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_own_data.py").write_text(
        HEAD + "def make():\n    return {'train': (images(30), classes(30)), 'test': (images(6), classes(6))}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = load("my_own_data:make", image_size=8, mean=None, std=None, calibration_n=4)
    assert len(found.test) == 6


# What is refused.

GOOD = "'test': (images(6), classes(6))"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", "mine.py:make failed: ZeroDivisionError: division by zero"),
        ("[1]", "returned a list, wanted a mapping with train, and perhaps test"),
        ("None", "returned a NoneType, wanted a mapping"),
        ("{}", "returned a mapping of nothing, wanted train, and perhaps test"),
        (f"{{{GOOD}}}", "returned a mapping of test, wanted train, and perhaps test"),
        (f"{{'train': 1, 'valid': 2, {GOOD}}}", "a mapping of train, valid, test, wanted train, and perhaps test"),
        (f"{{'train': images(30), {GOOD}}}", "train: sample 0 is uint8 [1, 4, 4], wanted an (input, target) pair"),
        (f"{{'train': 5, {GOOD}}}", "train is a int, wanted (inputs, targets) or a sequence of"),
        (f"{{'train': 'ab', {GOOD}}}", "train is a str, wanted"),
        (f"{{'train': {{'x': images(3)}}, {GOOD}}}", "train is a dict, wanted"),
        (f"{{'train': (images(30), classes(29)), {GOOD}}}", "train: 30 inputs have 29 targets, wanted one each"),
        (f"{{'train': (images(30), list(range(30))), {GOOD}}}", "train: targets[0] are a int, wanted a tensor"),
        (f"{{'train': ([images(3)], classes(3)), {GOOD}}}", "train: inputs are a list, wanted a tensor, or a"),
        (f"{{'train': (images(30)[:, 0], classes(30)), {GOOD}}}", "train: inputs are uint8 [30, 4, 4], wanted images"),
        (f"{{'train': (images(30).double(), classes(30)), {GOOD}}}", "train: inputs are float64 [30, 1, 4, 4]"),
        (f"{{'train': (np.array(['a']), classes(1)), {GOOD}}}", "train: inputs are a ndarray, wanted a tensor"),
        (f"{{'train': (images(0), classes(0)), {GOOD}}}", "train is empty, wanted at least one sample"),
        (f"{{'train': torch.tensor(1), {GOOD}}}", "train has no length: TypeError: len() of a 0-d tensor"),
        (f"{{'train': [], {GOOD}}}", "train is empty, wanted at least one sample"),
        (f"{{'train': (images(9, 0), classes(9)), {GOOD}}}", "inputs are uint8 [9, 0, 4, 4], wanted no empty dim"),
        (f"{{'train': (images(30, 3), classes(30)), {GOOD}}}", "inputs of train are uint8 [30, 3, 4, 4] and those of"),
        (f"{{'train': (images(30, 1, 5), classes(30)), {GOOD}}}", "one shape but for the number of samples"),
        (f"{{'train': ((images(30),), classes(30)), {GOOD}}}", "inputs of train and test differ in structure"),
        (f"{{'train': (images(30), None), {GOOD}}}", "test has targets and train has none, wanted both labelled or"),
        (f"{{'train': (images(30), classes(30) - 1), {GOOD}}}", "training split has labels -1 to 1, wanted 0 to 1"),
        (f"{{'train': (images(30), classes(30) * 0), {GOOD}}}", "one class only (label 0)"),
        (f"{{'train': (images(30), classes(30) % 2), {GOOD}}}", "test split has labels 0 to 2, wanted 0 to 1"),
        (f"{{'train': (images(30), classes(30)), 'labels': ['a', 'b'], {GOOD}}}", "labels 0 to 2, wanted 0 to 1"),
        (f"{{'train': (images(30), classes(30)), 'labels': 'abc', {GOOD}}}", "returned labels 'abc', wanted a seq"),
        (f"{{'train': (images(30), classes(30)), 'labels': [1, 2, 3], {GOOD}}}", "returned labels [1, 2, 3], wanted"),
        (f"{{'train': (images(30), classes(30)), 'mean': 0.5, {GOOD}}}", "returned mean 0.5, wanted one number a"),
        (
            f"{{'train': (images(30), classes(30)), 'mean': [0.5, 0.5], {GOOD}}}",
            "a mean that is [0.5, 0.5], wanted 1",
        ),
        (f"{{'train': (images(30), classes(30)), 'std': [float('nan')], {GOOD}}}", "std [nan], wanted finite numbers"),
        (
            f"{{'train': (images(30), classes(30)), 'std': [0], {GOOD}}}",
            "returned a std that is [0.0], wanted figures",
        ),
        (f"{{'train': (images(30) * 0, classes(30)), {GOOD}}}", "the std of the training images is [0.0], wanted"),
        (f"{{'train': (images(9), classes(9)), {GOOD}}}", "9 training samples, wanted at least 10"),
    ],
)
def test_wrong_returns(tmp_path: Path, code: str, words: str) -> None:
    assert words in refusal(tmp_path, code)


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ("[(images(1)[0], 0)] * 4 + [5]", "train: sample 4 is a int, wanted an (input, target) pair"),
        ("[(torch.zeros(2), 0), (torch.zeros(3), 0)]", "train: sample 1 is float32 [3], but sample 0 is float32 [2]"),
        ("[(torch.zeros(2), 0), (torch.zeros(2), 0.5)]", "sample 1 is float32 [], but sample 0 is int64 []"),
        ("[(torch.zeros(2), 0), (torch.zeros(2), None)]", "sample 1 has no target, unlike sample 0"),
        ("[(torch.zeros(2), None), (torch.zeros(2), 0)]", "sample 1 has a target, unlike sample 0"),
        ("[(torch.zeros(2), 0), ((torch.zeros(2),), 0)]", "sample 1 has another structure than sample 0"),
        ("[('x', 0)]", "sample 0 holds a str, wanted tensors, arrays or numbers"),
        ("[(torch.zeros(2), 0), (torch.zeros(2), 'cat')]", "sample 1 holds a str, wanted tensors"),
    ],
    ids=["no pair", "shape", "type", "unlabelled", "labelled", "structure", "text input", "text target"],
)
def test_wrong_pairs(tmp_path: Path, pairs: str, words: str) -> None:
    assert words in refusal(tmp_path, f"{{'train': {pairs}, {GOOD}}}")


def test_sample_that_raises_is_named(tmp_path: Path) -> None:
    code = """
    class Mine:
        def __len__(self):
            return 3
        def __getitem__(self, i):
            if i == 2:
                raise OSError('gone')
            return torch.zeros(2), 0
    return {'train': Mine(), 'test': Mine()}
    """
    assert refusal(tmp_path, code).endswith("train: sample 2 failed: OSError: gone")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(("where", "name"), [("x", "inputs"), ("y", "targets")])
def test_nan_and_infinity_are_found_with_their_sample(tmp_path: Path, value: str, where: str, name: str) -> None:
    code = f"""
    x, y = floats(20, 3), floats(20)
    {where}[7] = float('{value}')
    {where}[9] = float('{value}')
    return {{'train': (x, y), 'test': (floats(6, 3), floats(6))}}
    """
    assert f"train: {name}: sample 7 holds NaN or infinity (2 in all); clean the data" in refusal(tmp_path, code)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_float_inputs_have_no_normalisation(tmp_path: Path, name: str) -> None:
    code = "{'train': (floats(20, 3), floats(20)), 'test': (floats(6, 3), floats(6))}"
    found = refusal(tmp_path, code, **{name: [0.5]})
    assert found == f"data.{name} is [0.5], but float32 inputs are used as they are; set it to null"


def test_labels_that_are_needed(tmp_path: Path) -> None:
    found = refusal(tmp_path, "{'train': (images(20), None), 'test': (images(6), None)}")
    assert "has no labels, which training and every metric but agreement need; set train: null" in found


def test_images_of_different_channel_counts_have_no_common_mean(tmp_path: Path) -> None:
    code = "{p: ((images(20, 1), images(20, 3)), classes(20)) for p in ('train', 'test')}"
    assert "images of different channel counts; give them as normalised float32" in refusal(tmp_path, code)


def test_more_than_the_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "available_memory", lambda: 10_000)
    pairs = "[(torch.zeros(100, 100), 0)] * 5"
    assert "train needs 0.0004 GB in memory, but 1e-05 GB are free" in refusal(
        tmp_path, f"{{'train': {pairs}, {GOOD}}}"
    )


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere.py:make", "data.source: found no file nowhere.py"),
        ("no_such_module_at_all:make", "data.source: cannot import no_such_module_at_all"),
        ("os:nothing", "data.source: os has no callable 'nothing'"),
    ],
)
def test_callable_that_cannot_be_imported(target: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load(target, image_size=8, mean=None, std=None, calibration_n=4)


def test_code_that_exits_does_not_end_the_run(tmp_path: Path) -> None:
    found = refusal(tmp_path, "    import sys\n    sys.exit(7)\n    return {}")
    assert found.endswith("failed: SystemExit: 7")
    pairs = "type('P', (), {'__len__': lambda p: 3, '__getitem__': lambda p, i: exit(7)})()"
    assert "train: sample 0 failed: SystemExit: 7" in refusal(tmp_path, f"{{'train': {pairs}, {GOOD}}}")
