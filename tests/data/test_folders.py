"""Folders of images, with classes and without; and each way in which one can be wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_folders import fill, load_images
from parquet_folders import SIZE, noise
from torch import Tensor

from edgeqat.data import decode
from edgeqat.data.dataset import Dataset, Split
from edgeqat.data.folders import describe_parts
from edgeqat.data.sizing import Sizing
from edgeqat.data.sources import load
from edgeqat.data.splitting import hold_out
from edgeqat.errors import DataError

SPLITS = ("train", "calibration", "validation", "test")


def refusal(folder: Path, calibration_n: int = 4, needs_labels: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        load_images(folder, calibration_n, needs_labels)
    message = str(caught.value)
    assert "\n" not in message
    return message


def hashes(split: Split) -> list[str]:
    assert isinstance(split.inputs, Tensor)
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in split.inputs]


def assert_disjoint(dataset: Dataset, n: int) -> None:
    every = [digest for name in SPLITS for digest in hashes(getattr(dataset, name))]
    assert len(every) == len(set(every)) == n


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """cat/ of 30 images, dog/ of 20, without parts."""
    fill(tmp_path / "cat", 30, seed=0)
    fill(tmp_path / "dog", 20, seed=1)
    return tmp_path


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """The same in train/, and 3 of each in test/."""
    fill(tmp_path / "train" / "cat", 30, seed=0)
    fill(tmp_path / "train" / "dog", 20, seed=1)
    fill(tmp_path / "test" / "cat", 3, seed=2)
    fill(tmp_path / "test" / "dog", 3, seed=3)
    return tmp_path


# With classes.


def test_a_stratified_fifth_is_set_aside_for_the_test(classes: Path) -> None:
    dataset = load_images(classes)
    assert dataset.labels == ("cat", "dog")
    assert dataset.sizing == Sizing(SIZE)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [32, 4, 4, 10]
    assert dataset.test.targets.bincount().tolist() == [6, 4]
    assert_disjoint(dataset, 50)
    again = load_images(classes)
    assert all(hashes(getattr(again, name)) == hashes(getattr(dataset, name)) for name in SPLITS)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.data())
def test_held_out_classes_have_their_share_to_within_one(sizes: list[int], data: st.DataObject) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    whole = Split(torch.arange(len(labels), dtype=torch.float32), labels)
    n = data.draw(st.integers(0, len(labels)))
    rest, test = hold_out(whole, n)
    assert (len(rest), len(test)) == (len(labels) - n, n)
    assert isinstance(rest.inputs, Tensor)
    assert isinstance(test.inputs, Tensor)
    assert sorted([*rest.inputs.tolist(), *test.inputs.tolist()]) == list(range(len(labels)))
    share = torch.tensor(sizes) * n / len(labels)
    assert (test.targets.bincount(minlength=len(sizes)) - share).abs().max() <= 1


def test_pixels_keep_their_class(classes: Path) -> None:
    dataset = load_images(classes)
    known = {hashlib.sha256(x.transpose(2, 0, 1).tobytes()).hexdigest(): 0 for x in noise(30, 0)}
    known |= {hashlib.sha256(x.transpose(2, 0, 1).tobytes()).hexdigest(): 1 for x in noise(20, 1)}
    for name in SPLITS:
        split = getattr(dataset, name)
        assert [known[digest] for digest in hashes(split)] == split.targets.tolist()


@pytest.mark.parametrize("name", ["test", "val", "validation", "valid"])
def test_parts(parts: Path, name: str) -> None:
    (parts / "test").rename(parts / name)
    dataset = load_images(parts)
    assert [len(getattr(dataset, part)) for part in SPLITS] == [41, 4, 5, 6]
    assert dataset.test.targets.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(dataset.test.inputs[3], torch.from_numpy(noise(3, 3)[0]).permute(2, 0, 1))  # type: ignore[index]


def test_train_part_alone_gives_up_a_share(parts: Path) -> None:
    shutil.rmtree(parts / "test")
    dataset = load_images(parts)
    assert dataset.labels == ("cat", "dog")
    assert len(dataset.test) == 10


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    fill(tmp_path / "train", 20, seed=0)
    fill(tmp_path / "bus", 20, seed=1)
    assert load_images(tmp_path).labels == ("bus", "train")


def test_a_class_may_have_folders_of_its_own(classes: Path) -> None:
    fill(classes / "cat" / "2024" / "may", 10, seed=4)
    assert_disjoint(load_images(classes), 60)


def test_what_is_hidden_or_no_image_is_left_out(classes: Path) -> None:
    fill(classes / ".thumbnails", 3)
    for place in (classes, classes / "cat"):
        (place / ".DS_Store").write_bytes(b"\x00")
        (place / "._0.png").write_bytes(b"\x00")
        (place / "README.txt").write_text("about")
        os.mkfifo(place / "pipe.png")
    assert_disjoint(load_images(classes), 50)


def test_links_to_folders_are_followed(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    fill(elsewhere, 10, seed=5)
    (classes / "fox").symlink_to(elsewhere)
    dataset = load_images(classes)
    assert dataset.labels == ("cat", "dog", "fox")
    assert_disjoint(dataset, 60)


def test_statistics_are_measured_on_what_is_not_tested(classes: Path) -> None:
    dataset = load_images(classes)
    seen = torch.cat([getattr(dataset, name).inputs for name in SPLITS[:3]]).double() / 255
    assert dataset.mean == pytest.approx(seen.mean((0, 2, 3)).tolist(), abs=1e-12)
    calibration = load_images(classes, needs_labels=False)
    seen = calibration.calibration.inputs.double() / 255  # type: ignore[union-attr]
    assert calibration.mean == pytest.approx(seen.mean((0, 2, 3)).tolist(), abs=1e-12)


# Without labels.


def test_flat_folder_is_calibration_and_test(tmp_path: Path) -> None:
    fill(tmp_path, 12)
    fill(tmp_path / "more" / "deep", 8, seed=1, suffix=".jpg")
    dataset = load_images(tmp_path, needs_labels=False)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [0, 4, 0, 16]
    assert dataset.labels is None
    assert dataset.test.targets is None
    assert_disjoint(dataset, 20)
    assert hashes(load_images(tmp_path, needs_labels=False).calibration) == hashes(dataset.calibration)


def test_unlabelled_parts(tmp_path: Path) -> None:
    fill(tmp_path / "train", 12)
    fill(tmp_path / "test", 5, seed=1)
    dataset = load_images(tmp_path, needs_labels=False)
    assert [len(getattr(dataset, name)) for name in SPLITS] == [8, 4, 0, 5]
    assert hashes(dataset.test) == [hashlib.sha256(x.transpose(2, 0, 1).tobytes()).hexdigest() for x in noise(5, 1)]


def test_classes_are_not_read_where_no_labels_are_needed(classes: Path) -> None:
    dataset = load_images(classes, needs_labels=False)
    assert dataset.labels is None
    assert len(dataset.test) == 46


# Refusals.


def test_flat_folder_where_labels_are_needed(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds 3 images without labels, wanted one subfolder a class; only train: null with "
        "task.metric: agreement needs none"
    )


@pytest.mark.parametrize("calibration_n", [5, 6])
def test_calibration_n_that_leaves_nothing_to_evaluate(tmp_path: Path, calibration_n: int) -> None:
    fill(tmp_path, 5)
    found = refusal(tmp_path, calibration_n, needs_labels=False)
    assert found == (
        f"data.calibration_n is {calibration_n}, but {tmp_path} has 5 samples, and some must be left to evaluate; "
        "lower it"
    )


def test_calibration_n_beyond_an_unlabelled_train_part(tmp_path: Path) -> None:
    fill(tmp_path / "train", 5)
    fill(tmp_path / "test", 5, seed=1)
    assert len(load_images(tmp_path, 5, needs_labels=False).calibration) == 5
    assert "has 5 samples; lower it" in refusal(tmp_path, 6, needs_labels=False)


@pytest.mark.parametrize("needs_labels", [True, False])
def test_empty_folder(tmp_path: Path, needs_labels: bool) -> None:
    assert refusal(tmp_path, needs_labels=needs_labels).startswith(f"{tmp_path} holds no images, wanted ")


def test_class_folder_without_images(classes: Path) -> None:
    (classes / "fox").mkdir()
    (classes / "fox" / "about.txt").touch()
    assert refusal(classes).startswith(f"the class folder {classes / 'fox'} holds no images, wanted .bmp, ")


def test_one_class(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 20)
    assert "the training split has samples of one class only (label 0), wanted at least two" in refusal(tmp_path)


def test_images_with_a_class_and_without(classes: Path) -> None:
    fill(classes, 1)
    assert "holds class folders (cat, ...) and images without a class (0.png, ...), wanted one or the" in refusal(
        classes
    )


def test_parts_with_different_classes(parts: Path) -> None:
    (parts / "test" / "dog").rename(parts / "test" / "fox")
    assert refusal(parts).endswith(
        "train and test have different classes (dog, fox are in one of them only), wanted the same subfolders in both"
    )


@pytest.mark.parametrize(
    ("name", "other", "wanted"),
    [("training", "test", "train"), ("Train", "Test", "test"), ("train", "testing", "test"), ("train", "Val", "val")],
)
def test_parts_of_other_names_are_no_classes(parts: Path, name: str, other: str, wanted: str) -> None:
    (parts / "train").rename(parts / name)
    (parts / "test").rename(parts / other)
    found = refusal(parts)
    assert found.startswith(f"{parts} holds {' and '.join(sorted((name, other)))}, wanted class folders, or train and")
    assert found.endswith(f" to {wanted}")


def test_a_class_of_folders_alone(parts: Path) -> None:
    """What its classes are cannot be told."""
    (parts / "test").rename(parts / "more")
    assert refusal(parts) == (
        f"the class folder {parts / 'more'} holds no images but the folders cat, dog, wanted the images of the class; "
        "move them up, or make cat, dog the class folders"
    )


def test_the_parts_that_are_read_are_told(parts: Path) -> None:
    assert describe_parts(parts) == "trained on train, test is the test"
    fill(parts / "val" / "cat", 1)
    assert describe_parts(parts) == "trained on train, test is the test; val is not read"
    shutil.rmtree(parts / "test")
    assert describe_parts(parts) == "trained on train, val is the test"
    assert describe_parts(parts / "train") is None


def test_parts_without_train(parts: Path) -> None:
    (parts / "train").rename(parts / "val")
    assert "holds test and val and no train; add it" in refusal(parts)


@pytest.mark.parametrize("needs_labels", [True, False])
@pytest.mark.parametrize("data", [b"", b"junk", None], ids=["empty", "junk", "truncated"])
def test_image_that_cannot_be_decoded(classes: Path, data: bytes | None, needs_labels: bool) -> None:
    file = classes / "dog" / "7.png"
    file.write_bytes(file.read_bytes()[:80] if data is None else data)
    assert refusal(classes, needs_labels=needs_labels).startswith(f"{file} cannot be decoded, wanted PNG")


@given(st.binary(max_size=60), st.integers(0, 120), st.integers(0, 40))
def test_a_damaged_image_decodes_or_is_refused_in_one_line(junk: bytes, start: int, length: int) -> None:
    """Whatever Pillow's decoders trip over, nothing but a DataError comes out."""
    from parquet_folders import encode

    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = encode(noise(1, 0)[0], kind)
        damaged = data[:start] + junk + data[start + length :]
        try:
            assert decode.decode("x.png", damaged, Sizing(SIZE)).shape == (SIZE, SIZE, 3)
        except DataError as error:
            assert str(error).startswith("x.png ")


def test_link_to_nothing(classes: Path) -> None:
    (classes / "cat" / "lost.png").symlink_to(classes / "nowhere.png")
    assert refusal(classes).startswith(f"{classes / 'cat' / 'lost.png'} cannot be read (No such file or directory)")


@pytest.mark.parametrize("needs_labels", [True, False])
def test_loop_of_links(classes: Path, needs_labels: bool) -> None:
    (classes / "cat" / "again").symlink_to(classes / "cat")
    found = refusal(classes, needs_labels=needs_labels)
    assert found.startswith(f"{classes / 'cat' / 'again'} leads back to a folder that it is in: a loop of symbolic")


def test_link_to_itself(classes: Path) -> None:
    (classes / "cat" / "self").symlink_to(classes / "cat" / "self")
    (classes / "cat" / "self.png").symlink_to(classes / "cat" / "self.png")
    assert refusal(classes).startswith(f"{classes / 'cat' / 'self.png'} cannot be read (")


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind the superuser, who runs these tests")
@pytest.mark.parametrize("name", ["dog", "dog/3.png"])
def test_no_permission(classes: Path, name: str) -> None:
    (classes / name).chmod(0)
    try:
        assert "cannot be read (Permission denied)" in refusal(classes)
    finally:
        (classes / name).chmod(0o700)


def test_folder_that_cannot_be_listed(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the system while listing, as without permission, for those who run the tests as superuser."""

    def fail(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", fail)
    assert refusal(classes) == f"the folder {classes} cannot be read (Permission denied); check it"


def test_more_than_the_free_memory(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 2 * 50 * 3 * SIZE * SIZE
    monkeypatch.setattr(decode, "available_memory", lambda: needed)
    load_images(classes)
    monkeypatch.setattr(decode, "available_memory", lambda: needed - 1)
    words = (
        "in memory, but 1.92e-05 GB are free; lower data.image_size, use fewer samples, or set data.storage to disk"
    )
    assert words in refusal(classes)


def test_impossible_size_is_refused_before_it_is_allocated(classes: Path) -> None:
    with pytest.raises(DataError, match=r"needs 3e\+05 GB in memory"):
        load(str(classes), image_size=1_000_000, mean=None, std=None, calibration_n=4)


def test_decoded_arrays_are_right_way_up(classes: Path) -> None:
    pixels = noise(30, 0)[0]
    assert np.array_equal(decode.decode("x", (classes / "cat" / "0.png").read_bytes(), Sizing(SIZE)), pixels)
