"""Charts as inline SVG, whose colours follow the page's light or dark theme, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import sha256
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "GREY",
    "INK",
    "PALETTE",
    "Picture",
    "chart_settings",
    "draw",
    "edits_axis",
    "logarithmic",
    "new_figure",
    "png_of",
    "style",
    "thinned",
]

# CSS variable -> (light, dark). Charts are drawn in the light colours; in the SVG each is replaced by its variable.
PALETTE = {
    "--page": ("#ffffff", "#14181d"),
    "--panel": ("#f6f7f9", "#1c2229"),
    "--ink": ("#1c2126", "#e8ebee"),
    "--muted": ("#4f5963", "#aab4bf"),
    "--line": ("#7d8791", "#737f8b"),
    "--grid": ("#e3e6ea", "#313a44"),
    "--link": ("#0a58a0", "#7fbcff"),
    "--s0": ("#0b62a9", "#6cb4f5"),
    "--s1": ("#c2410d", "#ff9a6b"),
    "--s2": ("#0f7b57", "#5fd0a5"),
    "--s3": ("#8b3fa8", "#d39bf0"),
    "--s4": ("#8a6101", "#e3b341"),
    "--s5": ("#00748a", "#5cc8dc"),
    "--s6": ("#b8336a", "#f58fb8"),
    "--s7": ("#5b6470", "#b9c2cc"),
}
_SERIES = [light for name, (light, _) in PALETTE.items() if name.startswith("--s")]
INK, GREY = PALETTE["--ink"][0], PALETTE["--line"][0]
_MARKERS, _LINES = "osD^vPX*", ("-", "--", "-.", ":")
_POINTS = 100  # more turns than this are averaged over: nobody could see them apart
_WIDTH = 4.6  # inches: readable when it fills a phone

_MARKS = re.compile(r"(<g[^>]*)>((?:\s*<use [^>]*/>)+\s*)</g>")
_STYLE = re.compile(r' style="[^"]*"')

_SETTINGS = {
    "font.size": 10,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # an SVG names the whole list with every text
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": PALETTE["--grid"][0],
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",  # text stays text: sharp, selectable, and in the theme's colour
}


class Picture(NamedTuple):
    """
    Attributes:
        name: of its PNG file, without suffix; unique on the page. alt: what it shows, in words and figures.
    """

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


class Style(NamedTuple):
    """How a series is told apart: by colour, by marker and by line."""

    color: str
    marker: str
    linestyle: str


def style(index: int) -> Style:
    """Of one of several series; where the colours begin again, markers and lines are others."""
    shifted = index + index // len(_SERIES)
    return Style(_SERIES[index % len(_SERIES)], _MARKERS[shifted % len(_MARKERS)], _LINES[shifted % len(_LINES)])


def edits_axis(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    # Five numbers like 20,000 have room; more of them overlap.
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``_POINTS`` points: means over stretches of the stream, each placed at its end."""
    size = max(1, -(-len(points) // _POINTS))
    chunks = [points[begin : begin + size] for begin in range(0, len(points), size)]
    return [(chunk[-1][0], fmean(y for _, y in chunk)) for chunk in chunks]


def logarithmic(axis: Axis) -> None:
    """Make an axis logarithmic, once everything is drawn, with ticks that are numbers and do not overlap."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.set_major_formatter("{x:,.10g}")
    axis.set_minor_formatter(NullFormatter())


def chart_settings(salt: str = "") -> AbstractContextManager:
    """Within it charts look alike; ``salt`` makes the ids of an SVG its own."""
    import matplotlib

    return matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": salt})


def new_figure(panels: int = 1, *, height: float = 3.0, width: float = _WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure of panels side by side, within ``chart_settings``; height and width of each in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panels * width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def png_of(figure: Figure) -> bytes:
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=160, facecolor=PALETTE["--page"][0])
    return pixels.getvalue()


def draw(
    name: str,
    title: str,
    alt: str,
    paint: Callable[[Axes], object],
    *,
    height: float = 3.0,
    legend: int = 0,
    columns: int = 2,
) -> Picture:
    """Draw one panel.

    Args:
        paint: draws into the axes. height: inches. legend: how many entries a legend below the axes has.
        columns: of the legend.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    with chart_settings(slug):
        figure, (axes,) = new_figure(height=height + 0.22 * -(-legend // columns))
        paint(axes)
        figure.suptitle(title, x=0.02, ha="left", fontsize=10.5, fontweight="bold")
        if legend:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=columns)
        vector = io.StringIO()
        figure.savefig(vector, format="svg", transparent=True, metadata={"Date": None})
        return Picture(slug, title, alt, _themed(vector.getvalue(), slug), png_of(figure))


def _themed(svg: str, slug: str) -> str:
    """For use within a page: colours by variable, ids that no other picture has, size left to the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{sha256(slug.encode()).hexdigest()[:8]}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*" ([^>]*?)width="[^"]*"', r"<svg \1\2", svg, count=1)
    svg = _MARKS.sub(_styled_once, svg).replace("xlink:href=", "href=")
    for variable, (light, _) in PALETTE.items():
        svg = svg.replace(light, f"var({variable})")
    return svg


def _styled_once(found: re.Match[str]) -> str:
    """The style that all marks of a group have, on the group: a map has hundreds of them."""
    styles = set(_STYLE.findall(found[2]))
    if len(styles) != 1 or found[2].count("<use") != found[2].count("style="):
        return found[0]
    return f"{found[1]}{styles.pop()}>{_STYLE.sub('', found[2])}</g>"
