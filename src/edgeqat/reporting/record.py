"""What every part of report.json is: frozen, and of no other keys than its own."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Record"]


class Record(BaseModel):
    """A part of report.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)
