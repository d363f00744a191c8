"""Tables with an image and a label column, read through the datasets library.

A name of the hub, a folder that `save_to_disk` wrote, a folder of *.parquet in the hub's layout, or a folder of
images with a metadata file, which the library reads itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgeqat.data.corrupt import Skipped
from edgeqat.data.dataset import Samples, Source, Split
from edgeqat.data.decode import allocate, bytes_of_cell, decode
from edgeqat.data.readers import TableReader
from edgeqat.data.reading import Reading
from edgeqat.data.streamed import StreamedSplit
from edgeqat.errors import DataError

__all__ = ["is_table_folder", "read_hub", "read_table_folder"]

CIFAR10_HUB = "uoft-cs/cifar10"
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "labels", "fine_label")
TEST_PARTS = ("test", "validation", "valid", "val")
"""What a test part may be called; the first that is there is taken."""
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
READ_BATCH = 1000
HUB_SECONDS = 5.0
"""How long the hub may take to say whether it has a data set."""


def read_hub(source: str, name: str, reading: Reading, advice: str) -> Source:
    """Downloads a data set of the hub, or takes it from the datasets library's cache.

    Args:
        source: How messages call it.
        name: Its name on the hub.
        reading: How images are read.
        advice: What a message says to do where it cannot be had.

    Raises:
        DataError: it cannot be had, or its tables do not fit.
    """
    import datasets  # heavy: a second on its own

    if reading.storage == "stream":
        raise DataError(f"data.storage: stream reads folders of shards, and {source} is none; use disk, or fetch them")
    _check_plain_name(name, advice)
    try:
        parts = datasets.load_dataset(name)
    except Exception as error:
        # The library raises whatever its builders, its parsers and its HTTP client raise.
        raise DataError(f"the hub's {name} cannot be read ({_first_line(error)}); {advice}") from error
    return _read_parts(source, parts, reading)


def _check_plain_name(name: str, advice: str) -> None:
    """Asks the hub once whether it has a name without its owner: a misspelt one would be asked for again and again."""
    import datasets
    import huggingface_hub

    cached = Path(datasets.config.HF_DATASETS_CACHE) / name
    if "/" in name or datasets.config.HF_HUB_OFFLINE or cached.exists():
        return
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=HUB_SECONDS)
    except Exception as error:
        # As below: whatever its HTTP client raises.
        missing = isinstance(error, huggingface_hub.errors.RepositoryNotFoundError)
        found = "has no data set of that name" if missing else f"cannot be asked ({_first_line(error)})"
        raise DataError(f"data.source {name!r}: the hub {found}; {advice}") from error


def is_table_folder(folder: Path) -> bool:
    """Whether a folder is one that `read_table_folder` reads."""
    return _is_saved(folder) or bool(_parquet_parts(folder)) or _has_metadata(folder)


def read_table_folder(source: str, folder: Path, reading: Reading) -> Source:
    """Reads a local folder of the datasets library's.

    Raises:
        DataError: it cannot be read, or its tables do not fit.
    """
    import datasets  # heavy: a second on its own

    parts = _parquet_parts(folder)
    if parts and not _is_saved(folder):
        return _read_parquet(source, parts, reading)
    if reading.storage == "stream":
        raise DataError(f"data.storage: stream reads folders of shards, and {source} holds none; use disk")
    with tempfile.TemporaryDirectory() as cache:  # a copy kept in the user's cache could outlive what it was made of
        try:
            if _is_saved(folder):
                found = datasets.load_from_disk(str(folder))
            else:
                found = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=_cache(reading, cache))
        except Exception as error:
            # As above: whatever its builders and parsers raise.
            raise DataError(f"{source} cannot be read ({_first_line(error)}); fetch or save it again") from error
        return _read_parts(source, found, reading)


def _cache(reading: Reading, temporary: str) -> str | None:
    """Where the library writes a table that it maps into memory; its own cache where the table is to stay."""
    return None if reading.storage == "disk" else temporary


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _has_metadata(folder: Path) -> bool:
    return any((place / name).is_file() for place in (folder, folder / "train") for name in METADATA)


def _parquet_parts(folder: Path) -> dict[str, list[Path]]:
    """The shards of each part, in the order of their names; the hub keeps them in the folder itself or in data/."""
    for place in (folder, folder / "data"):
        found = {part: sorted(place.glob(f"{part}-*.parquet")) for part in ("train", *TEST_PARTS)}
        if any(found.values()):
            return {part: files for part, files in found.items() if files}
    return {}


def _choose_parts(source: str, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The training part, and the test part where there is one."""
    if "train" not in parts:
        raise DataError(f"{source} has the parts {', '.join(map(str, parts))}, wanted train, and test or validation")
    test = next((part for part in TEST_PARTS if part in parts), None)
    return {part: parts[part] for part in ("train", test) if part is not None}


def _read_parts(source: str, found: Any, reading: Reading) -> Source:
    """Reads what the library loaded: a table, which is then all training, or a mapping of tables."""
    parts = _choose_parts(source, found if isinstance(found, Mapping) else {"train": found})
    read = {part: _read_table(f"{source}: {part}", table, len(table), reading) for part, table in parts.items()}
    return _join(source, list(read.values()), reading)


def _read_parquet(source: str, parts: Mapping[str, list[Path]], reading: Reading) -> Source:
    import datasets

    read: list[tuple[Samples, tuple[str, ...] | None]] = []
    for part, files in _choose_parts(source, parts).items():
        what = f"{source}: {part}-*.parquet"
        rows = {str(file): _count_rows(file) for file in files}
        filled = [file for file, n in rows.items() if n > 0]  # the library cannot read an empty shard
        if not filled:
            raise DataError(f"{what} holds no rows, wanted images of at least two classes")
        try:
            with tempfile.TemporaryDirectory() as cache:
                if reading.storage == "disk":
                    table = datasets.Dataset.from_parquet(filled, part)
                    read.append(_read_table(what, table, len(table), reading))
                    continue
                table = datasets.Dataset.from_parquet(filled, part, cache_dir=cache, streaming=True)
                if reading.storage == "stream":
                    read.append(_stream(what, table, {Path(file): rows[file] for file in filled}, reading))
                else:
                    read.append(_read_table(what, table, sum(rows.values()), reading))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"{what} cannot be read ({_first_line(error)}); fetch it again") from error
    return _join(source, read, reading)


def _count_rows(file: Path) -> int:
    import pyarrow.parquet

    try:
        return int(pyarrow.parquet.read_metadata(file).num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} is not readable as Parquet ({_first_line(error)}); fetch it again") from error


def _join(source: str, read: Sequence[tuple[Samples, tuple[str, ...] | None]], reading: Reading) -> Source:
    training, names = read[0]
    test, test_names = read[1] if len(read) > 1 else (None, None)
    if names is not None and test_names is not None and names != test_names:
        raise DataError(f"{source}: train and test have different label names, wanted the same in one order")
    return Source(training, test, names, sizing=reading.sizing)


def _read_table(what: str, table: Any, rows: int, reading: Reading) -> tuple[Samples, tuple[str, ...] | None]:
    """Decodes a table, unless its images are read when they are needed; also gives the label names that it carries.

    Args:
        what: How messages call the table.
        table: A datasets.Dataset or IterableDataset, which have no types.
        rows: How many rows it has.
        reading: How images are read.
    """
    columns = table.features
    image_column, label_column = _find_columns(what, columns)
    table = _undecoded(table, image_column)
    if reading.storage == "disk":
        labels = _integers(what, label_column, table[label_column][:])
        reader = TableReader(what, table, image_column)
        return reading.stored(what, reader, torch.from_numpy(labels)), _names(columns[label_column])

    images, view = allocate(what, rows, reading.sizing.side)
    skipped, seen = Skipped(what, reading.max_corrupt), 0
    kept: list[object] = []
    for batch in table.iter(batch_size=READ_BATCH):
        for cell, label in zip(batch[image_column], batch[label_column], strict=True):
            name = f"{what}: image {seen}"
            try:
                view[len(kept)] = decode(name, bytes_of_cell(name, cell), reading.sizing)
            except DataError as error:
                skipped.add(name, str(error))
            else:
                kept.append(label)
            seen += 1
    skipped.tell()
    labels = _integers(what, label_column, kept)
    return Split(images[: len(kept)], torch.from_numpy(labels)), _names(columns[label_column])


def _stream(
    what: str, table: Any, rows: Mapping[Path, int], reading: Reading
) -> tuple[Samples, tuple[str, ...] | None]:
    """Shards of Parquet, of which nothing but the labels is read now."""
    import pyarrow.parquet

    image_column, label_column = _find_columns(what, table.features)
    found: list[object] = []
    for file in rows:
        found += pyarrow.parquet.read_table(file, columns=[label_column])[label_column].to_pylist()
    targets = torch.from_numpy(_integers(what, label_column, found))
    shards = ParquetStream(rows, image_column)
    split = StreamedSplit(
        what,
        shards,
        torch.arange(len(targets)),
        targets,
        reading.sizing,
        reading.max_corrupt,
        shards,
        reading.shuffle_buffer,
    )
    return split, _names(table.features[label_column])


class ParquetStream:
    """Shards read from their beginning by the library; also tells its samples from others."""

    def __init__(self, rows: Mapping[Path, int], image_column: str) -> None:
        self.files, self.counts, self._column = tuple(rows), tuple(rows.values()), image_column

    def __len__(self) -> int:
        return sum(self.counts)

    def name(self, index: int) -> str:
        """Its number."""
        return f"sample {index}"

    def read(self, index: int) -> bytes:
        """Not to be had."""
        raise NotImplementedError("a stream has no random access")

    def identity(self) -> Any:
        """Names and sizes of the shards."""
        return [(file.name, file.stat().st_size, n) for file, n in zip(self.files, self.counts, strict=True)]

    def walk(self, chosen: Sequence[int]) -> Iterator[Any]:
        """The images of the chosen shards."""
        import datasets

        files = [str(self.files[shard]) for shard in chosen]
        try:
            with tempfile.TemporaryDirectory() as cache:
                table = datasets.Dataset.from_parquet(
                    files, "train", cache_dir=cache, columns=[self._column], streaming=True
                )
                for row in _undecoded(table, self._column):
                    yield row[self._column]
        except Exception as error:
            # The library raises whatever its readers raise.
            what = f"{files[0]} or a shard after it"
            raise DataError(f"{what} cannot be read ({_first_line(error)}); fetch it again") from error


def _undecoded(table: Any, image_column: str) -> Any:
    """A table that gives images as they were stored."""
    import datasets

    if isinstance(table.features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def _integers(what: str, label_column: str, labels: Sequence[object]) -> npt.NDArray[np.int64]:
    wrong = [label for label in labels if not isinstance(label, int) or isinstance(label, bool)]
    if wrong:
        raise DataError(f"{what} has labels such as {wrong[0]!r} in {label_column}, wanted integers")
    return np.asarray(labels, dtype=np.int64)


def _names(feature: Any) -> tuple[str, ...] | None:
    """The label names that a column carries."""
    import datasets

    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _find_columns(what: str, columns: Mapping[str, Any]) -> tuple[str, str]:
    """The image and the label column: by the usual names, else the only one of the type."""
    import datasets

    def choose(kind: type, usual: tuple[str, ...]) -> list[str]:
        named = [name for name in usual if name in columns]
        return named or [name for name, feature in columns.items() if isinstance(feature, kind)]

    images, labels = choose(datasets.Image, IMAGE_COLUMNS), choose(datasets.ClassLabel, LABEL_COLUMNS)
    for found, kind, usual in ((images, "image", IMAGE_COLUMNS), (labels, "label", LABEL_COLUMNS)):
        if len(found) != 1:
            several = f", of which {' and '.join(found)} could be the {kind}" if found else ""
            raise DataError(
                f"{what} has columns {', '.join(columns)}{several}, wanted one {kind} column, "
                f"{', '.join(usual[:-1])} or {usual[-1]}; rename or remove columns"
            )
    return images[0], labels[0]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
