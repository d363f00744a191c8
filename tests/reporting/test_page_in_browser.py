"""The page of a real run, opened from disk in a real browser without a network."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import edgeqat as eq
from browser import CHROMIUM, Browser, browsing
from edgeqat.analysis import analyse
from edgeqat.recipe import load_recipe

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium"),
    pytest.mark.usefixtures("few_rounds"),
]

HOSTILE = "<script>document.title = 'hacked'</script> \"'&$_^$ größe 你好 " + "long" * 30
"""Part of the path of the model's file, which the page shows."""

SETTINGS = [
    "train.float_epochs=2",
    "train.qat_epochs=1",
    "data.calibration_n=64",
    "quantize.weights.bits=2",  # so that samples change sides
    "gate.max_drop=null",
    "export=[onnxruntime, torchscript]",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a sensitivity analysis, whose model's file has a hostile name."""
    place = tmp_path_factory.mktemp("page") / HOSTILE.replace("/", "_")
    place.mkdir()
    (place / "model.py").write_text("from edgeqat.zoo import edge_model\n", encoding="utf-8")
    recipe = load_recipe("digits-edge", SETTINGS)
    model = recipe.model.model_copy(update={"factory": f"{place / 'model.py'}:edge_model"})
    recipe = recipe.model_copy(update={"model": model})
    folder = tmp_path_factory.mktemp("run") / "run"
    eq.run(recipe, folder)
    analyse(recipe, folder, n=16)
    return folder


@pytest.fixture(scope="module")
def page(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page, opened; moved to where nothing else is, for it needs nothing else."""
    alone = tmp_path_factory.mktemp("alone") / "report.html"
    shutil.copy(run_folder / "report.html", alone)
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(alone)
        yield browser


def test_nothing_is_complained_of_and_nothing_asked_for(page: Browser) -> None:
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in page.requests if url.startswith("file:")]) == 1


def test_every_figure_is_there(page: Browser) -> None:
    wanted = ["metric", "tradeoff", "latency", "parity", "graph-grids", "graph-error", "values", "weights"]
    found = page.run(
        "[...document.querySelectorAll('figure')].filter(f => f.querySelector('svg path')).map(f => f.id)"
    )
    assert sorted(found) == sorted(f"figure-{name}" for name in [*wanted, "training", "sensitivity"])
    # A figure that refers to something refers to something of its own.
    ids = page.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    dangling = """[...document.querySelectorAll('svg use')].map(u => u.href.baseVal.slice(1))
                  .filter(id => document.getElementById(id) === null)"""
    assert page.run(dangling) == []
    pictures = page.run("[...document.images].map(i => [i.naturalWidth, i.alt])")
    assert pictures and all(width > 0 and text.startswith("test sample") for width, text in pictures)


COLUMN = "[...document.querySelectorAll('#ops tbody tr')].map(r => r.cells[{}].textContent.trim())"


def test_the_table_sorts_numbers_as_numbers_and_empty_cells_last(page: Browser) -> None:
    click = "[...document.querySelectorAll('#ops th button')].find(b => b.textContent.startsWith('SQNR')).click()"
    before = page.run(COLUMN.format(0))
    for direction in (1, -1):
        page.run(click)
        found = [float(text) if text else None for text in page.run(COLUMN.format(8))]
        known = [value for value in found if value is not None]
        assert len(known) > 3 and known == sorted(known, reverse=direction == -1)
        assert found[: len(known)] == known
    assert page.run("document.querySelectorAll('#ops th[aria-sort]').length") == 1
    page.run("document.querySelector('#ops th button').click()")
    assert page.run(COLUMN.format(0)) == before  # by number, so 10 after 9


def test_the_table_filters_by_all_words(page: Browser) -> None:
    typed = "(f => {{ f.value = {!r}; f.dispatchEvent(new Event('input')); }})"
    fill = typed + "(document.querySelector('[data-filters=ops]'))"
    shown = (
        "[...document.querySelectorAll('#ops tbody tr')].filter(r => !r.hidden).map(r => r.textContent.toLowerCase())"
    )
    every = page.run(shown)
    page.run(fill.format("CONV residual"))
    found = page.run(shown)
    assert found == [text for text in every if "conv" in text and "residual" in text]
    assert 0 < len(found) < len(every)
    assert page.run("document.getElementById('ops-count').textContent") == f"{len(found)} of {len(every)} rows"
    page.run(fill.format("no such op"))
    assert page.run(shown) == []
    page.run(fill.format(""))
    assert page.run(shown) == every


def test_one_colouring_of_the_graph_is_seen_at_a_time(page: Browser) -> None:
    seen = "['grids', 'error'].map(n => document.getElementById('figure-graph-' + n).offsetHeight > 0)"
    chosen = "(s => {{ s.selectedIndex = {}; s.dispatchEvent(new Event('change')); }})"
    choose = chosen + "(document.querySelector('[data-shows]'))"
    assert page.run(seen) == [True, False]
    page.run(choose.format(1))
    assert page.run(seen) == [False, True]
    page.run(choose.format(0))


def test_a_hostile_name_is_text(page: Browser) -> None:
    assert page.run("document.scripts.length") == 1
    assert page.run("document.title").startswith("edgeqat: ")
    assert page.run("document.querySelector('header p').textContent.includes(\"<script>document.title\")")
    assert page.run("document.querySelector('header p').textContent.includes('größe 你好')")


@pytest.mark.parametrize("width", [1280, 390])
def test_light_and_dark_and_on_a_phone(page: Browser, width: int) -> None:
    """Nothing is wider than the screen; and dark is dark, figures included."""
    brightness = {}
    for dark in (False, True):
        drawn = Image.open(io.BytesIO(page.look(width, dark))).convert("L")
        assert drawn.width == width
        brightness[dark] = float(torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).float().mean())
        assert page.run("document.documentElement.scrollWidth") <= width
        ink = page.run("getComputedStyle(document.querySelector('#figure-metric svg text')).fill")
        assert ink == ("rgb(255, 255, 255)" if dark else "rgb(0, 0, 0)")
    assert brightness[False] > 200 and brightness[True] < 80


def test_on_paper_nothing_is_cut_and_no_controls_are_left(page: Browser) -> None:
    """A landscape A4 page with margins is 1032 CSS pixels wide, a portrait one 700."""
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        for width, selector in ((1032, "#ops"), (700, "table:not(#ops)"), (700, "figure svg"), (700, "pre")):
            page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            page.run("dispatchEvent(new Event('beforeprint'))")  # unfolds everything
            wide = (
                f"[...document.querySelectorAll('{selector}')].filter(e => e.getBoundingClientRect().right > {width})"
            )
            assert page.run(f"{wide}.map(e => e.outerHTML.slice(0, 200))") == []
            assert page.run(f"document.querySelectorAll('{selector}').length") > 0
        assert page.run("getComputedStyle(document.querySelector('th button'), '::after').content") == "none"
        assert page.run("getComputedStyle(document.querySelector('.controls')).display") == "none"
        assert page.run("getComputedStyle(document.querySelector('pre')).whiteSpace") == "pre-wrap"
    finally:
        page.call("Emulation.setEmulatedMedia", media="")
