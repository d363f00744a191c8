"""docs/recipes.md has every key of a recipe with its default, and no other."""

from __future__ import annotations

import re

import yaml

from edgeqat.recipe_quantize import Section
from pages import DOCS
from recipe_keys import recipe_keys

ROW = re.compile(r"^\| `([\w.\[\]]+)` \| (.*?) \| .*\|$", flags=re.MULTILINE)


def test_every_key_stands_there_with_its_default() -> None:
    rows = dict(ROW.findall((DOCS / "recipes.md").read_text(encoding="utf-8")))
    assert sorted(rows) == sorted(recipe_keys())
    for key, default in recipe_keys().items():
        wanted = {} if isinstance(default, Section) else default  # a section that is explained elsewhere
        assert yaml.safe_load(rows[key].strip("`")) == wanted, key
