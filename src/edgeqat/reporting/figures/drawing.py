"""How figures are drawn: SVG with text as text, the same bytes for the same data, in the ink of the page around it.

Names come from users: no mathematics is parsed in them, and long ones are shortened in the middle.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["INK", "QUIET", "VARIANT_COLOURS", "drawn", "embedded", "milliseconds", "no_more_than_all", "shortened"]

INK = "#010203"
"""Drawn with this colour, and in the file `currentColor`: text and lines are dark on light and light on dark."""

QUIET = "#888888"
"""Of what matters less: seen on dark and on light."""

VARIANT_COLOURS = {"float": "#888888", "float_finetuned": "#4c9f70", "ptq": "#e08214", "qat": "#3d85c6"}

LONGEST_NAME = 44

HEADROOM = 0.1
"""Of an axis, above 100%."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": QUIET,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor"), INK
    ),
}


def drawn(draw: Callable[[Figure], None], width: float, height: float, name: str) -> str:
    """A figure as an SVG file.

    Args:
        draw: Puts axes on an empty figure.
        width: In inches.
        height: In inches.
        name: Decides the ids inside, so that the same data gives the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = STYLE | {"svg.hashsalt": name}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue().replace(INK, "currentColor")


def embedded(svg: str, name: str, label: str) -> str:
    """An SVG file as an element of an HTML page.

    Args:
        svg: From `drawn`.
        name: Letters and dashes; prefixed to the ids inside, which are then unique on the page.
        label: What the figure shows, for those who cannot see it.
    """
    text = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)  # HTML knows them without
    own = set(re.findall(r'\bid="([^"]+)"', text))

    def renamed(match: re.Match[str]) -> str:
        return f"{match[1]}{name}-{match[2]}{match[3]}" if match[2] in own else match[0]

    text = re.sub(r'(\bid=")([^"]+)(")', renamed, text)
    text = re.sub(r'(href="#)([^"]+)(")', renamed, text)
    text = re.sub(r"(url\(#)([^)]+)(\))", renamed, text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def milliseconds(axis: Axis, shortest: float, longest: float) -> None:
    """Scales an axis of latencies: by powers where some took many times as long as others."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if longest > 5 * shortest > 0:
        axis.axes.set_xscale("log")
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:g}")  # that of powers writes mathematics, which is not parsed here


def no_more_than_all(axes: Axes, is_share: bool) -> None:
    """Names nothing above 100% on the axis of a share, and leaves room there for what is drawn at 100%."""
    bottom, top = axes.get_ylim()
    if is_share and top > 100:
        axes.set_ylim(bottom, 100 + HEADROOM * (100 - bottom))
        axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 100])


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that fits beside a figure: the middle of a long one is left out.

    >>> shortened("abcdefghij", 7)
    'abc…hij'
    """
    name = " ".join(name.split())
    if len(name) <= longest:
        return name
    half = (longest - 1) // 2
    return f"{name[: longest - 1 - half]}…{name[len(name) - half :]}"
