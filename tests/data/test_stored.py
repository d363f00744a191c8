"""Splits that are read when they are needed: the same samples as in memory, whoever reads them and from where on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor

from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset, Samples
from edgeqat.data.fingerprint import fingerprint
from edgeqat.data.loading import Loading
from edgeqat.data.share import Share
from edgeqat.data.sources import load
from edgeqat.errors import DataError
from imagenet_stand_in import LAYOUTS, Layout, draw, write

CLASSES, TRAIN, VAL = 3, 12, 4
SIDE = 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """One data set in every layout; several shards of each part."""
    found: dict[Layout, Path] = {}
    for layout in LAYOUTS:
        found[layout] = tmp_path_factory.mktemp(layout)
        for part, n in (("train", TRAIN), ("val", VAL)):
            write(found[layout], part, draw(part, CLASSES, n, 24, 0), CLASSES, layout, shard=7)
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library writes the tables that it maps into memory there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def open_set(folder: Path, **more: Any) -> Dataset:
    figures = (0.5, 0.5, 0.5)
    return load(str(folder), image_size=SIDE, mean=figures, std=figures, calibration_n=5, **more)


def batches(split: Samples, **more: Any) -> Batches:
    settings: dict[str, Any] = {
        "batch_size": 8,
        "shuffle": True,
        "seed": 3,
        "augment": ("random_resized_crop", "flip"),
    }
    return Batches(split, mean=(0.5,) * 3, std=(0.5,) * 3, **settings | more)


def rows(found: Any) -> list[tuple[Tensor, Tensor]]:
    return list(found)


def assert_same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> None:
    assert len(a) == len(b)
    for (x, y), (u, v) in zip(a, b, strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)


ALL = [("folder", "disk"), ("tar", "disk"), ("parquet", "disk"), ("tar", "stream"), ("parquet", "stream")]


@pytest.mark.parametrize(("layout", "storage"), ALL)
def test_splits_are_those_of_memory(folders: dict[Layout, Path], layout: Layout, storage: str) -> None:
    kept, stored = open_set(folders[layout]), open_set(folders[layout], storage=storage)
    assert stored.labels == kept.labels
    for name in ("calibration", "validation", "test"):
        one, other = getattr(kept, name), getattr(stored, name)
        assert len(one) == len(other)
        plain = {"shuffle": False, "augment": ()}
        assert_same(rows(batches(one, **plain)), rows(batches(other, **plain)))
    # A stream keeps the order of its shards, so samples are compared without regard to order.
    one, other = (
        sorted(
            (int(y), int(x.sum()))
            for inputs, targets in batches(data.train, augment=(), pixels=True)
            for x, y in zip(inputs, targets, strict=True)
        )
        for data in (kept, stored)
    )
    assert one == other
    assert fingerprint(stored) == fingerprint(open_set(folders[layout], storage=storage))


@pytest.mark.parametrize(("layout", "storage"), ALL)
def test_an_epoch_is_a_permutation_of_its_own(folders: dict[Layout, Path], layout: Layout, storage: str) -> None:
    found = batches(open_set(folders[layout], storage=storage, shuffle_buffer=5).train)
    orders = []
    for epoch in range(3):
        found.set_epoch(epoch)
        order = torch.cat([found.samples_of(batch) for batch in range(len(found))])
        assert sorted(order.tolist()) == list(range(len(order)))
        assert torch.cat([y for _, y in found]).tolist() == found._split.targets[order].tolist()
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == 3


@pytest.mark.parametrize(("layout", "storage"), ALL)
def test_ranks_and_resumption_give_the_same_samples(folders: dict[Layout, Path], layout: Layout, storage: str) -> None:
    train = open_set(folders[layout], storage=storage, shuffle_buffer=5).train
    whole = rows(batches(train))
    for first in range(len(whole) + 1):
        assert_same(rows(batches(train).from_batch(first)), whole[first:])
    parts = [rows(batches(train, share=Share(rank, 3))) for rank in range(3)]
    joined = [tuple(torch.cat(leaves) for leaves in zip(*same, strict=True)) for same in zip(*parts, strict=True)]
    assert_same(joined, whole)  # type: ignore[arg-type]
    for rank in range(3):
        dealt = batches(train, share=Share(rank, 3, within=False))
        assert_same(rows(dealt), whole[rank::3])
        assert_same(rows(dealt.from_batch(1)), whole[rank::3][1:])


@pytest.mark.parametrize(("layout", "storage"), [("folder", "disk"), ("tar", "disk"), ("tar", "stream")])
def test_any_number_of_workers_gives_the_same(folders: dict[Layout, Path], layout: Layout, storage: str) -> None:
    train = open_set(folders[layout], storage=storage).train
    before = torch.random.get_rng_state()
    alone, two = rows(batches(train)), rows(batches(train, loading=Loading(workers=2, timeout=60)))
    assert_same(alone, two)
    assert torch.equal(torch.random.get_rng_state(), before), "loading must not touch the training's random figures"


@pytest.mark.parametrize("storage", ["memory", "disk", "stream"])
def test_labels_in_json_beside_images_of_any_name(tmp_path: Path, storage: str) -> None:
    for part, n in (("train", 12), ("val", 4)):
        with tarfile.open(tmp_path / f"{part}-0.tar", "w") as tar:
            for name, data, label in draw(part, CLASSES, n, 24, 0):
                about = json.dumps({"label": label, "where": "here"}).encode()
                for member, content in ((f"./a/{name}.JPG", data), (f"./a/{name}.json", about)):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    data = open_set(tmp_path, storage=storage)
    assert len(data.test) == CLASSES * 4
    for x, y in batches(data.train, augment=(), pixels=True):
        assert x.float().std() > 1
        assert set(y.tolist()) <= set(range(CLASSES))
    assert (
        torch.cat([y for _, y in batches(data.test, shuffle=False, augment=())]).tolist() == list(range(CLASSES)) * 4
    )


def test_a_stream_that_changed_since_it_was_opened(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write(tmp_path, part, draw(part, CLASSES, 12, 24, 0), CLASSES, "tar")
    data = open_set(tmp_path, storage="stream")
    write(tmp_path, "train", iter(list(draw("train", CLASSES, 12, 24, 0))[::-1]), CLASSES, "tar")
    with pytest.raises(DataError, match=r"n00000000_0 is no longer where it was; load the data again"):
        list(batches(data.train))
