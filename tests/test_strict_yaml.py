"""YAML that is refused in one line, where PyYAML raises something else or takes it."""

from __future__ import annotations

import pytest

from edgeqat.errors import RecipeError
from edgeqat.recipe import load_recipe
from edgeqat.strict_yaml import MAX_DEPTH, dump_yaml, parse_yaml

DEEP = f"lists and mappings are nested deeper than {MAX_DEPTH}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 3000 + "]" * 3000, DEEP),
        ("\n".join(" " * i + "a:" for i in range(MAX_DEPTH + 1)), DEEP),
        ("!!int x", "invalid literal for int"),
        ("!!float x", "could not convert string to float"),
        ("!!bool x", "x"),
        ("!!timestamp x", "NoneType"),
        ("2024-13-01", "month must be in 1..12"),
        ("1" * 5000, "Exceeds the limit"),
        ("a: 1\nb: 2\na: 3\n", "found the key a twice, again in line 3"),
        ("a: {b: 1, 'b': 2}", "found the key b twice, again in line 1"),
    ],
    ids=["lists", "mappings", "int", "float", "bool", "timestamp", "date", "digits", "twice", "twice inside"],
)
def test_what_is_wrong_is_one_line(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match="^it is not valid YAML: ") as caught:
        parse_yaml(text, "it")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match="^--set train.seed: .* is not valid YAML: "):
        load_recipe("digits-edge", [f"train.seed={text}"])


def test_what_is_fine_is_read() -> None:
    nested = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    deep = parse_yaml(nested, "it")
    assert parse_yaml(dump_yaml(deep), "it") == deep
    assert parse_yaml("{a: {x: 1}, b: {x: 1}, 1: c, '1': d}", "it") == {"a": {"x": 1}, "b": {"x": 1}, 1: "c", "1": "d"}
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 1e-3}", "it")["b"] == {"x": 1, "y": 0.001}
    assert parse_yaml(dump_yaml({"a": "1e-3"}), "it") == {"a": "1e-3"}


def test_a_path_of_many_keys() -> None:
    with pytest.raises(RecipeError, match=f"with a path of 3000 keys, wanted at most {MAX_DEPTH}"):
        load_recipe("digits-edge", [".".join(["model", "args", *["a"] * 2998]) + "=1"])
