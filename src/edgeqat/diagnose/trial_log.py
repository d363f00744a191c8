"""Logs of measurements, a line each, so that a search or analysis that was killed makes none of them twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeqat.errors import OutputError

__all__ = ["TrialLog"]


class TrialLog:
    """What was measured, by what it was measured of; kept in a file where there is one.

    A line that a killed process left half written does not count, nor do those of another model, recipe or data.

    Args:
        path: The file; None keeps nothing.
        identity: What every measurement depends on: JSON-ready.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._identity = _sha256(identity)
        self._known: dict[str, dict[str, Any]] = {}
        self._torn = False
        if path is not None and path.exists():
            self._read(path)

    def once(self, kind: str, of: Any, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A measurement: as it was logged, else made now and logged.

        Args:
            kind: What is measured.
            of: What it is measured of, JSON-ready.
            measure: Makes it; JSON-ready.

        Raises:
            OutputError: The file cannot be written.
        """
        known = self.known(kind, of)
        if known is None:
            known = measure()
            self.keep([(kind, of, known)])
        return known

    def known(self, kind: str, of: Any) -> dict[str, Any] | None:
        """A measurement as it was logged; None where it was not."""
        return self._known.get(self._key(kind, of))

    def keep(self, found: Sequence[tuple[str, Any, dict[str, Any]]]) -> None:
        """Logs measurements, those that are known already left out: of which kind, what of, and what was found.

        Raises:
            OutputError: The file cannot be written.
        """
        new = {self._key(kind, of): (kind, of, own) for kind, of, own in found}
        for key in new.keys() & self._known.keys():
            del new[key]
        self._append([{"key": key, "kind": kind, "of": of, "found": own} for key, (kind, of, own) in new.items()])
        self._known.update({key: own for key, (_, _, own) in new.items()})

    def _key(self, kind: str, of: Any) -> str:
        return _sha256([self._identity, kind, of])

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            try:
                record = json.loads(line)
                self._known[record["key"]] = record["found"]
            except (ValueError, KeyError, TypeError):
                continue  # half written: it is measured again

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self._path is None or not records:
            return
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror or error}; free space") from error
        self._torn = False


def _sha256(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
