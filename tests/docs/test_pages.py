"""What the pages show is executed, and what they name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from edgeqat.cli import app
from helpers import EXACT_ARITHMETIC, run_python
from pages import DOCS, PAGES, ROOT, blocks
from recipe_keys import recipe_keys

ELSEWHERE = {
    "README.md": "test_readme",
    "guide.md": "test_guide",
    "tutorial.md": "test_tutorial",
    "data.md": "test_data_page",
}
"""Pages whose blocks have tests of their own, which look at what is printed too."""

NOT_RUN = 'title="not run"'
WITH_CODE = [page for page in PAGES if page.name not in ELSEWHERE and blocks(page, "python")]
PROGRAMS = ("edgeqat", "torchrun", "python", "pip", "make", "sudo")


@EXACT_ARITHMETIC
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda p: p.name)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path) -> None:
    found = blocks(page, "python")
    assert {block.info for block in found} <= {"", NOT_RUN}
    code = "\n".join(block.code for block in found if not block.info)
    if code:
        ended = run_python(code, cwd=tmp_path)
        assert ended.code == 0, ended.err


def test_few_blocks_are_not_run() -> None:
    marked = [page.name for page in PAGES for block in blocks(page, "python") if block.info == NOT_RUN]
    assert set(marked) <= {"design.md", "sensitivity.md"}, "they show signatures"


def command_lines(page: Path) -> list[str]:
    """The lines of shell blocks, and of blocks without a language where they begin with a program of ours."""
    lines = [line for block in blocks(page, "bash") for line in block.code.splitlines() if line]
    plain = [line for block in blocks(page, "") for line in block.code.splitlines()]
    return lines + [line for line in plain if program_of(line) in PROGRAMS]


def words_of(line: str) -> list[str]:
    """Its words, without a comment and without variables set in front."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def program_of(line: str) -> str | None:
    try:
        words = words_of(line)
    except ValueError:  # no command: a quote of a language
        return None
    return words[0] if words else None


LINES = [(page, line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[f"{page.name}-{line[:60]}" for page, line in LINES])
def test_command_lines_name_real_commands_and_options(page: Path, line: str) -> None:
    program, *words = words_of(line)
    assert program in PROGRAMS
    if program == "torchrun":
        program, words = "edgeqat", words[words.index("edgeqat") + 1 :]
    if program == "edgeqat":
        check_edgeqat(words)
    elif program in ("python", "sudo"):
        check_script([word for word in words if word != "python"])
    elif program == "pip":
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        named = re.findall(r"edgeqat\[([\w,]+)\]", line)
        for extra in [extra for group in named for extra in group.split(",")]:
            assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra
    else:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for target in words:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def check_edgeqat(words: list[str]) -> None:
    """The command line's own parser takes the words, and `--set` names keys of a recipe."""
    root = get_command(app)
    command = root.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(f"edgeqat {words[0]}", words[1:])  # parses, runs nothing
    keys = [words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "--set"]
    sections = {key.rpartition(".")[0] for key in recipe_keys()} | {"model.args", "train"}
    assert all(key in recipe_keys() or key in sections or key.startswith("model.args.") for key in keys), keys


def check_script(words: list[str]) -> None:
    """It is a script of the project, or an artifact's verify.py, and knows the options."""
    path, *rest = words
    if path.endswith("/verify.py"):
        path = "src/edgeqat/replay/command.py"
    source = (ROOT / path).read_text(encoding="utf-8")
    for option in rest:
        if option.startswith("--"):
            assert f'"{option}"' in source, option


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_named_files_exist(page: Path) -> None:
    """Anchors and the links between pages of docs/ are held by the site's own strict build too."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for name in re.findall(r"`((?:docs|benchmarks|tests|examples|tools|src)/[\w/.]+\.\w+)`", text):
        assert (ROOT / name).is_file(), name


def test_every_page_has_its_place() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))
