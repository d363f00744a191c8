"""Data that is broken or slow: skipped with a count as far as that was allowed, else one line and exit code 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from edgeqat.data.batches import Batches
from edgeqat.data.dataset import Dataset
from edgeqat.data.loading import Loading
from edgeqat.data.share import Share
from edgeqat.data.sources import load
from edgeqat.errors import DataError, SkippedWarning
from helpers import ENVIRONMENT, CommandLine
from imagenet_stand_in import Layout, draw, write

CLASSES, TRAIN, VAL, SIDE = 3, 12, 4, 16
FIGURES = (0.5, 0.5, 0.5)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library writes the tables that it maps into memory there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def make(folder: Path, layout: Layout = "folder") -> Path:
    for part, n in (("train", TRAIN), ("val", VAL)):
        write(folder, part, draw(part, CLASSES, n, 24, 0), CLASSES, layout, shard=40)
    return folder


def open_set(folder: Path | str, **more: Any) -> Dataset:
    settings: dict[str, Any] = {"mean": FIGURES, "std": FIGURES, "calibration_n": 4, "storage": "disk"}
    return load(str(folder), image_size=SIDE, **settings | more)


def batches(data: Dataset, **more: Any) -> Batches:
    settings: dict[str, Any] = {"batch_size": 8, "shuffle": True, "augment": ("random_resized_crop", "flip")}
    return Batches(data.train, mean=FIGURES, std=FIGURES, **settings | more)


def trained_on(data: Dataset) -> list[Path]:
    """The files of the training split."""
    return [Path(data.train.reader.name(index)) for index in data.train.indices.tolist()]  # type: ignore[attr-defined]


def children() -> set[str]:
    """The processes that this one has started, but for one that it has for all of them."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


# Skipping.


def test_a_sample_that_cannot_be_read_is_refused_by_its_name(tmp_path: Path) -> None:
    data = open_set(make(tmp_path))
    broken = trained_on(data)[3]
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=f"^{broken} cannot be decoded"):
        list(batches(data))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_of_the_batch_takes_the_place_on_every_process(tmp_path: Path, workers: int) -> None:
    data = open_set(make(tmp_path), max_corrupt=2)
    whole = batches(data)
    order = torch.cat([whole.samples_of(batch) for batch in range(len(whole))])
    before = list(whole)
    broken = [trained_on(data)[order[place]] for place in (2, 7)]  # the last of the first batch, and one within
    for file in broken:
        file.write_bytes(b"junk")
    with pytest.warns(SkippedWarning, match=rf"skipped 2 samples that cannot be read: .*{broken[0].name}"):
        after = list(batches(data, loading=Loading(workers, timeout=60)))
    assert [len(y) for _, y in after] == [len(y) for _, y in before]
    (x, y), (x_before, y_before) = after[0], before[0]
    kept = [0, 1, 3, 4, 5, 6]
    assert torch.equal(x[kept], x_before[kept])
    assert y.tolist() == [y_before[place] for place in (0, 1, 3, 3, 4, 5, 6, 0)]
    half = len(order) // 2
    with warnings.catch_warnings(action="ignore"):
        all_x, all_y = next(iter(batches(data, batch_size=len(order))))
    for rank in range(2):
        with warnings.catch_warnings(action="ignore"):  # a process counts what it meets
            own_x, own_y = next(iter(batches(data, batch_size=len(order), share=Share(rank, 2))))
        assert torch.equal(own_x, all_x[:half] if rank == 0 else all_x[half:])
        assert torch.equal(own_y, all_y[:half] if rank == 0 else all_y[half:])


def test_more_than_may_be_skipped(tmp_path: Path) -> None:
    data = open_set(make(tmp_path), max_corrupt=2)
    for file in trained_on(data)[:3]:
        file.unlink()
    words = r"cannot be read \(No such file or directory\).*\(3 samples cannot be read, and data.max_corrupt is 2\)$"
    with pytest.raises(DataError, match=words):
        list(batches(data))


def test_a_batch_without_a_single_sample(tmp_path: Path) -> None:
    data = open_set(make(tmp_path), max_corrupt=100)
    for file in trained_on(data):
        file.unlink()
    with pytest.raises(DataError, match="none of the 8 samples of a batch can be read"):
        list(batches(data))


@pytest.mark.parametrize(("layout", "storage"), [("folder", "memory"), ("folder", "disk"), ("parquet", "memory")])
def test_what_is_held_and_what_is_judged_leaves_it_out(tmp_path: Path, layout: Layout, storage: str) -> None:
    """Every variant is judged on the same samples, each of them once."""
    make(tmp_path, "folder")
    file = tmp_path / "val" / "n00000001" / "n00000001_2.jpg"
    file.write_bytes(b"junk")
    folder = tmp_path
    if layout == "parquet":
        folder = tmp_path / "tables"
        for part in ("train", "val"):
            samples = [
                (f.stem, f.read_bytes(), int(f.parent.name[1:])) for f in sorted((tmp_path / part).rglob("*.jpg"))
            ]
            write(folder, part, iter(samples), CLASSES, "parquet", shard=40)
    with pytest.raises(DataError, match="cannot be decoded"):
        list(Batches(open_set(folder, storage=storage).test, batch_size=8, mean=FIGURES, std=FIGURES))
    with pytest.warns(SkippedWarning, match="skipped 1 sample that cannot be read"):
        data = open_set(folder, storage=storage, max_corrupt=1)
    assert len(data.test) == CLASSES * VAL - 1
    assert data.test.classes is not None
    assert data.test.classes.bincount().tolist() == [4, 3, 4]
    assert sum(len(y) for _, y in Batches(data.test, batch_size=8, mean=FIGURES, std=FIGURES)) == 11


def test_a_stream_skips_as_well(tmp_path: Path) -> None:
    samples = [(n, b"junk" if i == 5 else d, c) for i, (n, d, c) in enumerate(draw("train", CLASSES, 40, 24, 0))]
    write(tmp_path, "train", iter(samples), CLASSES, "tar", shard=50)
    write(tmp_path, "val", draw("val", CLASSES, 4, 24, 0), CLASSES, "tar")
    data = open_set(tmp_path, storage="stream", max_corrupt=1)
    with pytest.warns(SkippedWarning, match=r"train-00000.tar: sample 5$"):
        found = list(batches(data))
    assert sum(len(y) for _, y in found) == len(data.train)


# Shards and labels.


def damage(folder: Path, fault: str) -> None:
    shard = folder / "train-00000.tar"
    if fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:20_000])
    elif fault == "empty file":
        shard.write_bytes(b"")
    elif fault == "a flipped bit":  # in the header of the third member of several
        raw = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            raw[tar.getmembers()[2].offset + 150] ^= 1
        shard.write_bytes(raw)
    elif fault == "no end":
        with tarfile.open(shard) as tar:
            end = tar.getmembers()[4].offset
        shard.write_bytes(shard.read_bytes()[:end])
    elif fault == "no samples":
        write(folder, "train", iter(()), CLASSES, "tar")
        shard.write_bytes(bytes(10240))
    else:
        data = next(draw("train", CLASSES, 1, 24, 0))[1]
        label: Any = {"text": "cat", "negative": -1, "large": 10**6, "huge": 10**30}[fault]
        write(folder, "train", iter([("a", data, label), ("b", data, 0)]), CLASSES, "tar")


@pytest.mark.parametrize("storage", ["disk", "stream"])
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("truncated", "train-00000.tar cannot be read as a tar shard (unexpected end of data); fetch it again"),
        ("empty file", "train-00000.tar cannot be read as a tar shard (empty file); fetch it again"),
        ("a flipped bit", "train-00000.tar is damaged or cut short at byte"),
        ("no end", "train-00000.tar is damaged or cut short at byte"),
        ("huge", "a.cls holds b'10000000000000000000', wanted a class number such as 7"),
        ("no samples", "train-*.tar holds no samples, wanted key.jpg and key.cls"),
        ("text", "a.cls holds b'cat', wanted a class number such as 7"),
        ("negative", "labels -1 to 0, wanted"),
        ("large", "label 1000000 among 2 samples"),
    ],
)
def test_broken_shards(tmp_path: Path, fault: str, words: str, storage: str) -> None:
    make(tmp_path, "tar")
    damage(tmp_path, fault)
    with pytest.raises(DataError) as caught:
        open_set(tmp_path, storage=storage)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shard_that_shrank_after_it_was_indexed(tmp_path: Path) -> None:
    data = open_set(make(tmp_path, "tar"))
    os.truncate(tmp_path / "train-00000.tar", 30_000)
    with pytest.raises(DataError, match=r"train-00000.tar: n\d+_\d+ has \d+ of \d+ bytes; fetch the shard again"):
        list(batches(data))


def test_a_stream_that_vanished(tmp_path: Path) -> None:
    for layout in ("tar", "parquet"):
        folder = make(tmp_path / layout, layout)  # type: ignore[arg-type]
        data = open_set(folder, storage="stream")
        for shard in folder.glob("train-*"):
            shard.unlink()
        with pytest.raises(DataError, match="cannot be read") as caught:
            list(batches(data))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "storage", "words"),
    [("folder", "stream", "stream reads folders of shards, and .* holds files; use disk")],
)
def test_storage_that_does_not_fit(tmp_path: Path, layout: Layout, storage: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_set(make(tmp_path, layout), storage=storage)


def test_digits_come_from_memory() -> None:
    with pytest.raises(DataError, match="data.storage is disk, and digits come from memory; set it to memory"):
        open_set("digits")


def test_random_resized_crop_wants_images_as_they_were_stored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set data.storage to disk or stream, or use crop"):
        batches(open_set(make(tmp_path), storage="memory"))


# Workers.

USER_DATA = """
import os, signal, time
import numpy as np

class Samples:
    def __init__(self, n):
        self.targets = [i % 2 for i in range(n)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if MODE == "hang" and index == HIT and os.getpid() != {parent}:
            time.sleep(600)
        if MODE == "killed" and index == HIT and os.getpid() != {parent}:
            os.kill(os.getpid(), signal.SIGKILL)
        if MODE == "raises" and index == HIT:
            raise KeyError("no such row")
        return np.full((3, 8, 8), index % 251, dtype=np.uint8), self.targets[index]

def make():
    return {{"train": Samples(60), "test": Samples(12)}}
"""


def user_data(folder: Path, mode: str, hit: int = -1) -> str:
    file = folder / f"{mode}.py"
    file.write_text(f"MODE, HIT = {mode!r}, {hit}\n" + USER_DATA.format(parent=os.getpid()))
    return f"{file}:make"


def hit_of(folder: Path) -> int:
    """A sample that is trained on."""
    data = open_set(user_data(folder, "fine"))
    return int(data.train.indices[5])  # type: ignore[attr-defined]


def test_a_users_own_dataset_is_read_when_it_is_needed(tmp_path: Path) -> None:
    data = open_set(user_data(tmp_path, "fine"))
    found = batches(data, augment=(), pixels=True, loading=Loading(2, timeout=60))
    for number, (x, y) in enumerate(found):
        own = data.train.indices[found.samples_of(number)]  # type: ignore[attr-defined]
        assert x[:, 0, 3, 3].tolist() == own.tolist()
        assert y.tolist() == (own % 2).tolist()
    assert data.labels == ("0", "1")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("hang", "train: the loader workers gave no batch for 1 s; look at what reading a sample waits for, or raise"),
        ("killed", "train: a loader worker ended while a batch was waited for (DataLoader worker (pid(s) "),
        ("raises", "sample {hit} failed: KeyError: 'no such row'"),
    ],
)
def test_a_worker_that_hangs_or_dies(tmp_path: Path, mode: str, words: str) -> None:
    hit, before = hit_of(tmp_path), children()
    data = open_set(user_data(tmp_path, mode, hit))
    handlers = [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGTERM)]
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(batches(data, loading=Loading(2, timeout=1 if mode == "hang" else 30)))
    assert words.format(hit=hit) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert children() <= before, "workers are left behind"
    assert [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGTERM)] == handlers
    assert time.monotonic() - started < 60


def test_a_worker_that_is_killed_during_a_step_is_noticed_at_the_next_batch(tmp_path: Path) -> None:
    data, before = open_set(user_data(tmp_path, "fine")), children()
    epoch = iter(batches(data, batch_size=2, loading=Loading(2, timeout=30)))
    next(epoch)
    for worker in children() - before:
        os.kill(int(worker), signal.SIGKILL)
    time.sleep(0.2)  # the step, which goes on undisturbed
    with pytest.raises(DataError, match="a loader worker ended while a batch was waited for"):
        list(epoch)
    assert children() <= before


def test_workers_end_when_an_epoch_is_given_up(tmp_path: Path) -> None:
    data, before = open_set(user_data(tmp_path, "fine")), children()
    epoch = iter(batches(data, loading=Loading(2, timeout=60)))
    next(epoch)
    assert len(children() - before) >= 2
    with pytest.raises(KeyboardInterrupt):
        epoch.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    assert children() <= before
    epoch = iter(batches(data, loading=Loading(2, timeout=60)))
    next(epoch)
    del epoch
    assert children() <= before


# The command line.


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("image", "cannot be decoded, wanted PNG, JPEG or the like; replace it"),
        ("class", "train and val have different classes (n00000002 are in one of them only)"),
        ("shard", "cannot be read as a tar shard (unexpected end of data); fetch it again"),
    ],
)
def test_nothing_is_written_where_loading_fails(tmp_path: Path, command: CommandLine, fault: str, words: str) -> None:
    folder = make(tmp_path / "data", "tar" if fault == "shard" else "folder")
    if fault == "image":
        for file in (folder / "train").rglob("*.jpg"):  # some of them are in the validation set, which is held
            file.write_bytes(b"junk")
    elif fault == "class":
        for file in (folder / "val" / "n00000002").iterdir():
            file.unlink()
        (folder / "val" / "n00000002").rmdir()
    else:
        damage(folder, "truncated")
    out = tmp_path / "out"
    settings = [
        f"data.source={folder}",
        "data.image_size=32",
        "data.max_corrupt=0",
        "data.calibration_n=4",
        "model.args={num_classes: 3, width: 0.25}",
    ]
    ended = command("run", "imagenet-mobilenetv2", "-o", out, *(f"--set={setting}" for setting in settings))
    assert words in ended.refusal(2)
    assert not out.exists()


KILLED = """
import os, signal, sys
from edgeqat.data.batches import Batches
from edgeqat.data.loading import Loading
from edgeqat.data.sources import load

signal.signal(signal.SIGTERM, lambda *_: None)
figures = (0.5, 0.5, 0.5)
data = load(sys.argv[1], image_size=8, mean=figures, std=figures, calibration_n=4, storage="disk")
epoch = iter(Batches(data.train, batch_size=8, mean=figures, std=figures, loading=Loading(2, 60)))
next(epoch)
print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_leaves_no_workers(tmp_path: Path) -> None:
    source = user_data(tmp_path, "fine")
    command = [sys.executable, "-c", KILLED, source]
    ended = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL
    workers = ended.stdout.split()
    assert len(workers) == 2
    until = time.monotonic() + 20
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < until, "workers are left behind"
        time.sleep(0.05)


def alive(process: str) -> bool:
    """Whether it runs; one that has ended and whose parent has not asked how is a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_run_whose_worker_hangs_ends_in_one_line(tmp_path: Path, command: CommandLine) -> None:
    out, before = tmp_path / "out", children()
    settings = [
        f"data.source={user_data(tmp_path, 'hang', hit_of(tmp_path))}",
        "data.storage=disk",
        "data.image_size=8",
        "data.batch_size=8",
        "data.calibration_n=4",
        "data.augment=null",
        "model.args={num_classes: 2}",
        "compute.workers=1",
        "compute.timeout=1",
        "train.float_epochs=1",
    ]
    ended = command("run", "digits-edge", "-o", out, *(f"--set={setting}" for setting in settings))
    assert "the loader workers gave no batch for 1 s" in ended.refusal(2)
    assert children() <= before
    left = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert left <= {"recipe.yaml", ".edgeqat-lock"}, "what there is can be resumed, and nothing of it is half written"
