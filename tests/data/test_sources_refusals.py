"""Each kind of bad input, and the line it is refused with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_folders import SIZE, encode, load_folder, noise, write, write_both

from edgeqat.data.sources import load
from edgeqat.errors import DataError
from edgeqat.recipe import load_recipe


def assert_refused(folder: Path, *words: str, calibration_n: int = 4) -> None:
    with pytest.raises(DataError) as caught:
        load_folder(folder, calibration_n)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("source", ["./nowhere", "/no/where", "a/b/c", "~/no_such_folder", "file.parquet", "a b", ""])
def test_unknown_source_says_what_is_accepted(tmp_path: Path, source: str) -> None:
    (tmp_path / "file.parquet").touch()
    with pytest.raises(DataError, match=r"is not digits, cifar10, a folder \(looked for .*\), a callable or the name"):
        load(source, image_size=SIZE, mean=None, std=None, calibration_n=4, base_dir=tmp_path)


@pytest.mark.parametrize("source", ["/" + "x" * 300, "y" * 300, "~no_such_user_at_all/pictures"])
def test_name_that_the_system_refuses(source: str) -> None:
    with pytest.raises(DataError, match="cannot be read|is not digits") as caught:
        load(source, image_size=SIZE, mean=None, std=None, calibration_n=4)
    assert "\n" not in str(caught.value)
    assert load_recipe("digits-edge", [f"data.source={source}"]).data.source.endswith(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser, who runs these tests")
@pytest.mark.parametrize("below", ["", "images"])
def test_folder_that_may_not_be_entered(tmp_path: Path, below: str) -> None:
    folder = tmp_path / "closed"
    (folder / "images").mkdir(parents=True)
    folder.chmod(0)
    try:
        source = str(folder / below)
        assert load_recipe("digits-edge", [f"data.source={source}"]).data.source == source
        with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
            load(source, image_size=SIZE, mean=None, std=None, calibration_n=4)
    finally:
        folder.chmod(0o700)


def test_folder_without_parquet(tmp_path: Path) -> None:
    (tmp_path / "all.parquet").touch()
    assert_refused(tmp_path, "holds no images, wanted a subfolder a class with .bmp, ", ".webp, or train-*.parquet")


def test_folder_without_a_training_part(tmp_path: Path) -> None:
    write_both(tmp_path)
    next(tmp_path.glob("train-*")).unlink()
    assert_refused(tmp_path, "has the parts test, wanted train, and test or validation")


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "train-0.parquet").write_bytes(b"hello")
    assert_refused(tmp_path, "train-0.parquet is not readable as Parquet")


def test_damaged_parquet(tmp_path: Path) -> None:
    """The footer is whole, the pages before it are not."""
    write_both(tmp_path)
    file = next(tmp_path.glob("train-*"))
    data = bytearray(file.read_bytes())
    data[4:2000] = bytes(1996)
    file.write_bytes(data)
    assert_refused(tmp_path, "train-*.parquet cannot be read")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["picture", "label"], "wanted one image column, img or image"),
        (["img", "kind"], "wanted one label column, label, labels or fine_label"),
        (["img", "image", "label"], "of which img and image could be the image, wanted one image column"),
        (["img", "label", "fine_label"], "of which label and fine_label could be the label, wanted one label column"),
    ],
    ids=["no image", "no label", "two images", "two labels"],
)
def test_columns_that_are_missing_or_ambiguous(tmp_path: Path, columns: list[str], words: str) -> None:
    table = pa.table({name: [0 if "label" in name else b"x"] for name in columns})
    for part in ("train", "test"):
        pq.write_table(table, tmp_path / f"{part}-0.parquet")
    assert_refused(tmp_path, "has columns " + ", ".join(columns), words, "rename or remove columns")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not an image", "image 1 cannot be decoded"),
        (encode(noise(1, 0)[0])[:100], "image 1 cannot be decoded"),
        (None, "image 1 holds no bytes"),
        (encode(np.full((8, 8), 40000, np.uint16)), "image 1 has Pillow mode I;16, wanted 8 bits"),
    ],
    ids=["junk", "truncated", "path only", "16 bits"],
)
def test_bad_image(tmp_path: Path, data: bytes | None, words: str) -> None:
    write_both(tmp_path)
    good = encode(noise(1, 0)[0])
    cells = [{"bytes": item, "path": "x.png"} for item in (good, data, good)]
    pq.write_table(pa.table({"img": cells, "label": [0, 1, 0]}), tmp_path / "train-00000-of-00001.parquet")
    assert_refused(tmp_path, words)


@pytest.mark.parametrize("part", ["train", "test"])
def test_empty_split(tmp_path: Path, part: str) -> None:
    write_both(tmp_path)
    write(tmp_path, part, [], [])
    assert_refused(tmp_path, f"{part}-*.parquet holds no rows")


@pytest.mark.parametrize("part", ["train", "test"])
def test_split_of_one_class(tmp_path: Path, part: str) -> None:
    write_both(tmp_path, names=["cat", "dog"])
    write(tmp_path, part, [encode(x) for x in noise(12, 0)], [1] * 12, ["cat", "dog"])
    assert_refused(tmp_path, "one class only (label 1)")


def test_train_left_with_one_class(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(tmp_path, "train", [encode(x) for x in noise(20, 0)], [0] + [1] * 19)
    assert_refused(tmp_path, "the 1 samples left to train on have one class", calibration_n=17)


@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (["cat", "dog"], [0, 1, 2], "labels 0 to 2, wanted 0 to 1"),
        (None, [0, -1, 1], "labels -1 to 1, wanted 0 to 1"),
        (None, [0, 1, 1000], "label 1000 among 3 samples"),
        (None, ["cat", "dog", "cat"], "labels such as 'cat' in label, wanted integers"),
        (None, [0, None, 1], "labels such as None in label, wanted integers"),
        (None, [0.5, 1.0, 2.0], "labels such as 0.5 in label"),
    ],
    ids=["beyond the names", "negative", "no classes", "text", "missing", "fractions"],
)
def test_bad_labels(tmp_path: Path, names: list[str] | None, labels: list[object], words: str) -> None:
    write_both(tmp_path, names=names)
    file = tmp_path / "train-00000-of-00001.parquet"
    cells = [{"bytes": encode(x), "path": None} for x in noise(3, 0)]
    metadata = pq.read_schema(file).metadata if names is not None else None
    pq.write_table(pa.table({"img": cells, "label": labels}).replace_schema_metadata(metadata), file)
    assert_refused(tmp_path, words)


def test_test_label_that_training_does_not_have(tmp_path: Path) -> None:
    write_both(tmp_path)
    write(tmp_path, "test", [encode(x) for x in noise(3, 0)], [0, 1, 2])
    assert_refused(tmp_path, "the test split has labels 0 to 2, wanted 0 to 1")


def test_label_names_that_differ(tmp_path: Path) -> None:
    write_both(tmp_path, names=["cat", "dog"])
    write(tmp_path, "test", [encode(x) for x in noise(2, 0)], [0, 1], ["dog", "cat"])
    assert_refused(tmp_path, "different label names")


def test_too_few_images_for_validation(tmp_path: Path) -> None:
    write_both(tmp_path, train_n=9)
    assert_refused(tmp_path, "9 training samples, wanted at least 10")


@pytest.mark.parametrize("calibration_n", [36, 1000])
def test_calibration_n_too_large(tmp_path: Path, calibration_n: int) -> None:
    write_both(tmp_path)
    words = f"calibration_n is {calibration_n}, but"
    assert_refused(tmp_path, words, "40 training samples, 4 of them", calibration_n=calibration_n)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"calibration_n": 0}, "data.calibration_n is 0, wanted at least 1"),
        ({"image_size": 0}, "data.image_size is 0"),
        ({"mean": [0.5]}, r"data.mean is \[0.5\], wanted 3 finite numbers"),
        ({"mean": [0.5, 0.5, float("nan")]}, "data.mean is"),
        ({"std": [1.0, 1.0, 0.0]}, r"data.std is \[1.0, 1.0, 0.0\], wanted figures above 0"),
    ],
    ids=["calibration_n", "image_size", "short mean", "nan mean", "zero std"],
)
def test_bad_settings(change: dict[str, object], words: str) -> None:
    settings: dict[str, object] = {"image_size": 8, "mean": None, "std": None, "calibration_n": 4}
    with pytest.raises(DataError, match=words):
        load("digits", **(settings | change))
