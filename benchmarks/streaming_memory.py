"""What data costs that does not fit: memory over an epoch of 200,000 images, images a second, and a loader's share.

    python benchmarks/streaming_memory.py                              # generates shards in a temporary folder
    python benchmarks/streaming_memory.py --n 20000 --workers 1
    python benchmarks/streaming_memory.py --cifar10 FOLDER             # only the loader's share of a ResNet-20 step

Each storage has a process of its own, whose resident memory is read from /proc: before data is opened, at the start
(after 1 % of the batches), in the middle and at the end of an epoch of batches as training takes them. `anonymous` is
what the process holds itself; the rest is files that the system maps for it and takes back at need. Workers count.

The loader's share is the time of the next batch by the time of a training step, both medians over pairs of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from common import print_machine

STORAGES = (("tar", "disk"), ("tar", "stream"), ("parquet", "disk"), ("parquet", "stream"))
CLASSES, SIDE, BATCH, CALIBRATION_N = 10, 32, 128, 512
FIGURES = (0.5, 0.5, 0.5)
SHARD = 10_000


def main() -> None:
    """Generates, measures each storage in a process of its own, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200_000, help="images to train on")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10's parquet files")
    parser.add_argument("--pairs", type=int, default=40, help="batches and steps of the loader's share")
    parser.add_argument("--epoch", nargs=2, metavar=("FOLDER", "STORAGE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epoch is not None:
        print(json.dumps(epoch(Path(options.epoch[0]), options.epoch[1], options.workers)))
        return
    print_machine(torch.get_num_threads())
    if options.cifar10 is not None:
        print(loader_share(options.cifar10, options.pairs))
        return
    with tempfile.TemporaryDirectory() as place:
        generate(Path(place), options.n)
        print(
            f"{options.n} JPEGs of about {SIDE}x{SIDE}, batches of {BATCH}, {options.workers} worker(s); MiB resident"
        )
        print(
            "layout   storage |  before   start  middle     end |  anonymous: start  middle     end | images/s  open"
        )
        for layout, storage in STORAGES:
            print(measured(Path(place), layout, storage, options.workers), flush=True)


def generate(place: Path, n: int) -> None:
    """The same images in both layouts; a thousand more for the test."""
    sys.path.append(str(Path(__file__).parents[1] / "tools"))
    from imagenet_stand_in import draw, write

    free = shutil.disk_usage(place).free
    if free < 10_000 * n:
        sys.exit(f"{place} has {free / 1e9:.1f} GB free, wanted {10_000 * n / 1e9:.1f}; set TMPDIR to another place")
    for layout in ("tar", "parquet"):
        for part, count in (("train", n), ("val", 1000)):
            write(place / layout, part, draw(part, CLASSES, count // CLASSES, SIDE, 0), CLASSES, layout, SHARD)


def measured(place: Path, layout: str, storage: str, workers: int) -> str:
    """A row of the table."""
    command = [sys.executable, __file__, "--workers", str(workers), "--epoch", str(place / layout), storage]
    cache = {"HF_DATASETS_CACHE": str(place / "cache")}  # the library maps its own copy of a table into memory
    found = json.loads(subprocess.run(command, env=os.environ | cache, check=True, stdout=subprocess.PIPE).stdout)
    resident = "".join(f"{found[at][0]:8.0f}" for at in ("before", "start", "middle", "end"))
    own = "".join(f"{found[at][1]:8.0f}" for at in ("start", "middle", "end"))
    rates = f"{found['rate']:9.0f} {found['open']:4.0f} s"
    return f"{layout:<8} {storage:<7} |{resident} |          {own} |{rates}"


def epoch(folder: Path, storage: str, workers: int) -> dict[str, object]:
    """(resident, anonymous) MiB at four moments, images a second, and the seconds that opening took."""
    from edgeqat.data.batches import Batches
    from edgeqat.data.loading import Loading
    from edgeqat.data.sources import load

    torch.set_num_threads(1)
    found: dict[str, object] = {"before": memory()}
    started = time.perf_counter()
    data = load(
        str(folder),
        image_size=SIDE,
        mean=FIGURES,
        std=FIGURES,
        calibration_n=CALIBRATION_N,
        storage=storage,  # type: ignore[arg-type]
    )
    found["open"] = time.perf_counter() - started
    batches = Batches(
        data.train,
        batch_size=BATCH,
        mean=FIGURES,
        std=FIGURES,
        augment=("random_resized_crop", "flip"),
        shuffle=True,
        loading=Loading(workers),
    )
    moments = {max(len(batches) // 100, 1): "start", len(batches) // 2: "middle", len(batches): "end"}
    started, seen = time.perf_counter(), 0
    for number, (_, targets) in enumerate(batches, 1):
        seen += len(targets)
        if number in moments:
            found[moments[number]] = memory()
    found["rate"] = seen / (time.perf_counter() - started)
    return found


def memory() -> tuple[float, float]:
    """MiB that this process and its children hold: resident, and of that anonymous."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    total = {"VmRSS": 0.0, "RssAnon": 0.0}
    for process in (own, *children):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in total:
                total[name] += int(value.split()[0]) / 1024
    return total["VmRSS"], total["RssAnon"]


def loader_share(folder: Path, pairs: int) -> str:
    """The next batch of CIFAR-10 in memory by a training step of ResNet-20, batch and step in turn."""
    from edgeqat import zoo
    from edgeqat.data.batches import Batches
    from edgeqat.data.sources import load

    data = load(str(folder), image_size=SIDE, mean=FIGURES, std=FIGURES, calibration_n=CALIBRATION_N)
    batches = Batches(data.train, batch_size=BATCH, mean=FIGURES, std=FIGURES, augment=("crop", "flip"), shuffle=True)
    model = zoo.resnet20().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    waited, stepped, source = [], [], iter(batches)
    for _ in range(pairs):
        started = time.perf_counter()
        inputs, targets = next(source)
        between = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        waited.append(between - started)
        stepped.append(time.perf_counter() - between)
    batch, step = (1000 * statistics.median(times[2:]) for times in (waited, stepped))  # the first ones warm up
    return (
        f"CIFAR-10 in memory, batch {BATCH}, {pairs - 2} pairs: next batch {batch:.2f} ms, ResNet-20 step "
        f"{step:.1f} ms, the loader {batch / step:.1%} of a step"
    )


if __name__ == "__main__":
    main()
