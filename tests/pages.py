"""Blocks of code in the project's pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block; `info` is what stands behind the fence's first word."""

    language: str
    info: str
    code: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in their order; of the given languages, or all."""
    found = [(info.partition(" "), code) for info, code in FENCE.findall(page.read_text(encoding="utf-8"))]
    every = [Block(language, rest, code) for (language, _, rest), code in found]
    return [block for block in every if not languages or block.language in languages]
