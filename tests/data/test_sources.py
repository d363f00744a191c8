from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from parquet_folders import SIZE, encode, load_folder, noise, write, write_both
from PIL import Image
from sklearn.datasets import load_digits

from edgeqat.data import tables
from edgeqat.data.dataset import Dataset, Split
from edgeqat.data.sources import load
from edgeqat.errors import DataError
from helpers import run_python

SPLITS = ("train", "calibration", "validation", "test")


def hashes(split: Split) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in split.inputs]


def assert_disjoint(dataset: Dataset, n: int) -> None:
    """All splits together hold n images, each of them once."""
    every = [digest for name in SPLITS for digest in hashes(getattr(dataset, name))]
    assert len(every) == n
    assert len(set(every)) == n


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits", image_size=32, mean=None, std=None, calibration_n=512)


# Digits.


def test_digits_splits_have_the_documented_sizes(digits: Dataset) -> None:
    assert [len(getattr(digits, name)) for name in SPLITS] == [1797 - 600 - 512 - 119, 512, 119, 600]
    assert digits.labels == tuple("0123456789")
    assert digits.mean == digits.std == (0.5, 0.5, 0.5)
    for name in SPLITS:
        split = getattr(digits, name)
        assert split.inputs.shape == (len(split), 3, 32, 32)
        assert split.inputs.is_contiguous()


def test_digits_splits_are_disjoint_and_complete(digits: Dataset) -> None:
    assert_disjoint(digits, 1797)


def test_digits_test_split_is_stratified(digits: Dataset) -> None:
    counts = np.bincount(load_digits().target)
    expected = torch.from_numpy(counts * 600 / 1797)
    assert (digits.test.targets.bincount() - expected).abs().max() <= 1


def test_digits_keep_their_labels_and_span_the_grey_levels(digits: Dataset) -> None:
    """At 8x8 nothing is resized, so every image can be looked up in the original."""
    dataset = load("digits", image_size=8, mean=None, std=None, calibration_n=10)
    original = load_digits()
    pixels = np.rint(original.images * 255 / 16).astype(np.uint8)
    table = {x.tobytes(): y for x, y in zip(pixels, original.target, strict=True)}
    for name in SPLITS:
        split = getattr(dataset, name)
        assert torch.equal(split.inputs[:, 0], split.inputs[:, 2])
        assert [table[x[0].numpy().tobytes()] for x in split.inputs] == split.targets.tolist()
    assert dataset.test.inputs.min() == 0
    assert dataset.test.inputs.max() == 255


def test_digits_upsampling_interpolates(digits: Dataset) -> None:
    """Pillow puts pixel centres at (i + 0.5) * 4: a flat corner stays flat, and the mean is kept."""
    small = load("digits", image_size=8, mean=None, std=None, calibration_n=512)
    assert torch.equal(small.test.inputs[:, :, 0, 0], digits.test.inputs[:, :, 0, 0])
    means = [x.inputs.double().mean((1, 2, 3)) for x in (small.test, digits.test)]
    assert (means[0] - means[1]).abs().max() < 4


def test_splits_never_change(digits: Dataset) -> None:
    """Published figures rest on these very splits; labels in order stand for them, whatever Pillow does."""
    digest = hashlib.sha256(b"".join(getattr(digits, name).targets.numpy().tobytes() for name in SPLITS))
    assert digest.hexdigest() == "8c536540b5dce2ae4fa5ff60d46e8242e8314267aac9aa09ae85ff554d99cae7"


def test_splits_ignore_the_global_seed(digits: Dataset) -> None:
    torch.manual_seed(99)
    np.random.seed(99)
    again = load("digits", image_size=32, mean=None, std=None, calibration_n=512)
    for name in SPLITS:
        assert torch.equal(getattr(again, name).inputs, getattr(digits, name).inputs)


def test_validation_and_test_do_not_depend_on_calibration_n(digits: Dataset) -> None:
    other = load("digits", image_size=32, mean=None, std=None, calibration_n=100)
    assert torch.equal(other.validation.inputs, digits.validation.inputs)
    assert torch.equal(other.test.inputs, digits.test.inputs)
    assert torch.equal(other.calibration.inputs, digits.calibration.inputs[:100])


def test_given_mean_and_std_win() -> None:
    dataset = load("digits", image_size=8, mean=[0.1, 0.2, 0.3], std=[1, 2, 3], calibration_n=1)
    assert dataset.mean == (0.1, 0.2, 0.3)
    assert dataset.std == (1.0, 2.0, 3.0)


# A folder of Parquet files.


def test_folder_is_decoded_exactly(tmp_path: Path) -> None:
    pixels = noise(6, 1)
    write_both(tmp_path, names=["cat", "dog"])
    dataset = load_folder(tmp_path)
    assert dataset.source == str(tmp_path)
    assert dataset.labels == ("cat", "dog")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [32, 4, 4, 6]
    assert_disjoint(dataset, 46)
    expected = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    assert torch.equal(dataset.test.inputs, expected)
    assert dataset.test.targets.tolist() == [0, 1, 0, 1, 0, 1]


def test_folder_is_relative_to_base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set").mkdir()
    write_both(tmp_path / "set")
    arguments = {"image_size": SIZE, "mean": None, "std": None, "calibration_n": 4}
    assert len(load("set", base_dir=tmp_path, **arguments).test) == 6
    monkeypatch.chdir(tmp_path)
    assert len(load("set", **arguments).test) == 6


def test_folder_statistics_are_those_of_its_training_split(tmp_path: Path) -> None:
    write_both(tmp_path)
    dataset = load_folder(tmp_path)
    everything = torch.from_numpy(np.stack(noise(40, 0))).double() / 255
    assert dataset.mean == pytest.approx(everything.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert dataset.std == pytest.approx(everything.std((0, 1, 2), correction=0).tolist(), abs=1e-12)
    assert dataset.labels == ("0", "1")


def test_shards_are_read_in_order_and_empty_ones_skipped(tmp_path: Path) -> None:
    write_both(tmp_path)
    pixels = noise(4, 2)
    write(tmp_path, "test", [], [], shard=1)
    write(tmp_path, "test", [encode(x) for x in pixels], [1, 1, 0, 0], shard=2)
    test = load_folder(tmp_path).test
    assert test.targets.tolist() == [0, 1, 0, 1, 0, 1, 1, 1, 0, 0]
    assert torch.equal(test.inputs[9], torch.from_numpy(pixels[3]).permute(2, 0, 1))


def test_reading_spans_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "READ_BATCH", 7)
    write_both(tmp_path)
    dataset = load_folder(tmp_path)
    assert_disjoint(dataset, 46)
    assert dataset.test.targets.tolist() == [0, 1, 0, 1, 0, 1]


def test_column_image_jpeg_grey_and_other_sizes(tmp_path: Path) -> None:
    """Constant images survive JPEG, conversion and resizing unchanged."""
    greys = [10 * i for i in range(20)]
    data = [encode(np.full((16, 12), grey, np.uint8), "JPEG") for grey in greys]
    write(tmp_path, "train", data, [i % 2 for i in range(20)], column="image")
    write(tmp_path, "test", data, [i % 2 for i in range(20)], column="image")
    test = load_folder(tmp_path, image_size=9).test
    assert test.inputs.shape == (20, 3, 9, 9)
    expected = torch.tensor(greys)[:, None, None, None].expand_as(test.inputs)
    assert torch.equal(test.inputs.long(), expected)


def test_resizing_is_pillows_bilinear(tmp_path: Path) -> None:
    pixels = noise(20, 3, size=16)
    write(tmp_path, "train", [encode(x) for x in pixels], [i % 2 for i in range(20)])
    write(tmp_path, "test", [encode(x) for x in pixels], [i % 2 for i in range(20)])
    expected = Image.fromarray(pixels[0]).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert np.array_equal(load_folder(tmp_path).test.inputs[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_plain_bytes_are_read_too(tmp_path: Path) -> None:
    write_both(tmp_path)
    pixels = noise(3, 5)
    table = pa.table({"img": [encode(x) for x in pixels], "label": [1, 0, 1]})
    pq.write_table(table, tmp_path / "test-00000-of-00001.parquet")
    assert torch.equal(load_folder(tmp_path).test.inputs[2], torch.from_numpy(pixels[2]).permute(2, 0, 1))


def test_without_a_test_part_a_fifth_is_set_aside(tmp_path: Path) -> None:
    write_both(tmp_path)
    next(tmp_path.glob("test-*")).unlink()
    dataset = load_folder(tmp_path)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [25, 4, 3, 8]
    assert dataset.test.targets.bincount().tolist() == [4, 4]
    assert_disjoint(dataset, 40)


@pytest.mark.parametrize("part", ["validation", "valid", "val"])
def test_validation_stands_in_for_a_test_part(tmp_path: Path, part: str) -> None:
    (tmp_path / "data").mkdir()  # where the hub's own folders have it
    write_both(tmp_path / "data")
    (tmp_path / "data" / "test-00000-of-00001.parquet").rename(tmp_path / "data" / f"{part}-0.parquet")
    assert len(load_folder(tmp_path).test) == 6


@pytest.mark.parametrize(
    ("image", "label", "kind"),
    [("img", "fine_label", None), ("image", "labels", None), ("picture", "breed", ["cat", "dog"])],
)
def test_columns_by_name_or_by_being_the_only_ones(
    tmp_path: Path, image: str, label: str, kind: list[str] | None
) -> None:
    class_label = datasets.Value("int64") if kind is None else datasets.ClassLabel(names=kind)
    features = datasets.Features(
        {"id": datasets.Value("int64"), image: datasets.Image(), label: class_label, "coarse": datasets.Value("int64")}
    )
    cells = [{"bytes": encode(x), "path": None} for x in noise(20, 0)]
    columns = {"id": list(range(20)), image: cells, label: [i % 2 for i in range(20)], "coarse": [0] * 20}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train-0.parquet"))
    dataset = load_folder(tmp_path)
    assert dataset.labels == (("0", "1") if kind is None else ("cat", "dog"))
    assert dataset.test.targets.bincount().tolist() == [2, 2]


# Other local folders of the datasets library.


def table(n: int, seed: int) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    cells = [{"bytes": encode(x), "path": None} for x in noise(n, seed)]
    return datasets.Dataset.from_dict({"image": cells, "label": [i % 2 for i in range(n)]}, features=features)


def test_saved_to_disk(tmp_path: Path) -> None:
    both = {"train": table(40, 0), "validation": table(4, 2), "test": table(6, 1)}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "all")
    dataset = load_folder(tmp_path / "all")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [32, 4, 4, 6]
    assert dataset.labels == ("cat", "dog")
    assert torch.equal(dataset.test.inputs, torch.from_numpy(np.stack(noise(6, 1))).permute(0, 3, 1, 2))


def test_saved_to_disk_as_one_table(tmp_path: Path) -> None:
    table(40, 0).save_to_disk(tmp_path / "one")
    dataset = load_folder(tmp_path / "one")
    assert [len(getattr(dataset, name)) for name in SPLITS] == [25, 4, 3, 8]
    assert_disjoint(dataset, 40)


def test_images_with_a_metadata_file(tmp_path: Path) -> None:
    """The library reads these itself: the labels stand in the file, the images by path."""
    for part, n in (("train", 20), ("test", 4)):
        (tmp_path / part).mkdir()
        for index, pixels in enumerate(noise(n, n)):
            (tmp_path / part / f"{index:02}.png").write_bytes(encode(pixels))
        lines = [json.dumps({"file_name": f"{index:02}.png", "label": index % 2}) for index in range(n)]
        (tmp_path / part / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    dataset = load_folder(tmp_path)
    assert torch.equal(dataset.test.inputs, torch.from_numpy(np.stack(noise(4, 4))).permute(0, 3, 1, 2))
    assert dataset.test.targets.tolist() == [0, 1, 0, 1]


def test_damaged_save_is_refused(tmp_path: Path) -> None:
    table(40, 0).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"one cannot be read \(.*\); fetch or save it again") as caught:
        load_folder(tmp_path / "one")
    assert "\n" not in str(caught.value)


# The hub.


def test_any_name_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake(name: str) -> dict[str, datasets.Dataset]:
        asked.append(name)
        return {"train": table(30, 0), "validation": table(5, 1)}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    dataset = load("org/pets-2", image_size=SIZE, mean=None, std=None, calibration_n=3)
    assert asked == ["org/pets-2"]
    assert_disjoint(dataset, 35)
    assert len(dataset.test) == 5
    assert dataset.mean == pytest.approx((np.stack(noise(30, 0)) / 255).mean((0, 1, 2)))


@pytest.mark.parametrize("error", [RuntimeError("Dataset scripts are no longer supported"), KeyError("config")])
def test_whatever_the_library_raises_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"the hub's org/x cannot be read"):
        load("org/x", image_size=32, mean=None, std=None, calibration_n=512)


@pytest.mark.parametrize("name", ["imagez", "imags", "photo/imagez"])
def test_a_misspelt_folder_is_not_asked_for_at_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    near = Path(name).with_name("images")
    (tmp_path / near).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=f"^data.source: found no folder '{name}'; did you mean {near}[?] A data set of"
    ):
        load(name, image_size=32, mean=None, std=None, calibration_n=4)


ASKS = """
import os
os.environ |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
from edgeqat.data.sources import load
try:
    load("no_such_name", image_size=32, mean=None, std=None, calibration_n=4)
except Exception as error:
    print(error)
"""


def test_a_name_without_an_owner_is_asked_for_once(tmp_path: Path) -> None:
    """The library would ask six times, over 25 seconds, and tell of each."""
    ended = run_python(ASKS, cwd=tmp_path)
    assert re.fullmatch(r"data.source 'no_such_name': the hub cannot be asked \(.*refused.*\); .* exists\n", ended.out)
    assert ended.err == ""


# CIFAR-10 from the hub.


def test_cifar10_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def table(n: int, seed: int) -> datasets.Dataset:
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        images = [{"bytes": encode(x), "path": None} for x in noise(n, seed)]
        return datasets.Dataset.from_dict({"img": images, "label": [i % 2 for i in range(n)]}, features=features)

    asked: list[str] = []

    def fake(name: str) -> dict[str, datasets.Dataset]:
        asked.append(name)
        return {"train": table(30, 0), "test": table(5, 1)}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    dataset = load("cifar10", image_size=SIZE, mean=None, std=None, calibration_n=3)
    assert asked == ["uoft-cs/cifar10"]
    assert dataset.mean == (0.4914, 0.4822, 0.4465)
    assert dataset.std == (0.2470, 0.2435, 0.2616)
    assert dataset.labels == ("a", "b")
    assert_disjoint(dataset, 35)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it\nsecond line"),
        datasets.exceptions.DatasetGenerationError("half a download"),
        ConnectionError(),
    ],
    ids=["offline", "broken download", "no message"],
)
def test_unreachable_hub_points_to_a_folder(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"uoft-cs/cifar10 cannot be read .*set data.source to a local folder") as e:
        load("cifar10", image_size=32, mean=None, std=None, calibration_n=512)
    assert "\n" not in str(e.value)
