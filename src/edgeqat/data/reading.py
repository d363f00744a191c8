"""How the samples of a source are read: the recipe's keys of the `data` section that say so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from edgeqat.data.loading import IN_PROCESS, Loading
from edgeqat.data.readers import Reader
from edgeqat.data.sizing import Sizing
from edgeqat.data.stored import StoredSplit

__all__ = ["Reading", "Storage"]

Storage = Literal["memory", "disk", "stream"]


@dataclass(frozen=True)
class Reading:
    """What `load` was asked for.

    Attributes:
        sizing: How images come to their size.
        storage: Where samples are while a run goes on.
        shuffle_buffer: How many samples of a stream are held, undecoded, to draw the next ones from.
        max_corrupt: How many samples that cannot be read may be skipped, in a load or an epoch.
        loading: Who decodes what is looked through when it is loaded.
    """

    sizing: Sizing
    storage: Storage = "memory"
    shuffle_buffer: int = 10_000
    max_corrupt: int = 0
    loading: Loading = IN_PROCESS

    def stored(self, what: str, reader: Reader, targets: Any) -> StoredSplit:
        """All samples of a reader."""
        return StoredSplit(what, reader, torch.arange(len(reader)), targets, self.sizing, self.max_corrupt)
