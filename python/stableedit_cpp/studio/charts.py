"""Drift along the edits, and which edits are held, by their age and along the audits."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

from stableedit_cpp.lifelong import SessionView
from stableedit_cpp.report.pictures import GREY, PALETTE, Picture, draw, edits_axis, style, thinned
from stableedit_cpp.studio.known import Looked
from stableedit_cpp.studio.rows import Row

__all__ = ["CHART_CSS", "charts_of", "drift_points"]

_BINS = 8  # of ages
_LOOKED = ("holds", "forgotten")

# The colours of the charts are variables of the page; gradio marks its dark theme with a class.
CHART_CSS = (
    ":root {" + " ".join(f"{name}: {light};" for name, (light, _) in PALETTE.items()) + "}\n"
    ".dark {" + " ".join(f"{name}: {dark};" for name, (_, dark) in PALETTE.items()) + "}\n"
    ".charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 1rem; }\n"
    ".charts figure { margin: 0; }\n.charts svg { width: 100%; height: auto; }\n"
)


class DriftPoint(NamedTuple):
    """After a turn: edits and repairs that were solved for by then, and what the guard measured, in nats."""

    edits: int
    drift: float
    limit: float


def drift_points(view: SessionView) -> list[DriftPoint]:
    """Of the turns in the model that a guard looked at."""
    found, edits = [], 0
    for turn in view.history.line:
        report = view.history.steps[turn].record.content["report"]
        edits += report.get("requests", 0) if isinstance(report.get("requests"), int) else 0
        if report.get("drift") is not None and report.get("drift_limit") is not None:
            found.append(DriftPoint(edits, report["drift"], report["drift_limit"]))
    return found


def charts_of(drift: Sequence[DriftPoint], rows: Sequence[Row], audits: Sequence[Looked]) -> str:
    """The charts there is something to draw for, as HTML.

    Args:
        rows: in the order in which they were edited.
    """
    pictures = [picture for picture in (_drift(drift), _retention(rows), _audits(audits)) if picture is not None]
    figures = (f'<figure role="img" aria-label="{escape(p.alt)}">{p.svg}</figure>' for p in pictures)
    return f'<div class="charts">{"".join(figures)}</div>' if pictures else ""


def _drift(points: Sequence[DriftPoint]) -> Picture | None:
    if not points:
        return None
    last = points[-1]
    alt = f"Drift of unrelated answers: {last.drift:.2g} of at most {last.limit:.2g} nats after {last.edits} edits."

    def paint(axes) -> None:
        shown = thinned([(point.edits, point.drift) for point in points])
        axes.plot(*zip(*shown, strict=True), **_marked(len(shown)))
        axes.axhline(last.limit, color=GREY, linestyle="--", linewidth=1.2)
        axes.annotate(
            f"limit {last.limit:.2g}",
            (1, last.limit),
            xycoords=("axes fraction", "data"),
            xytext=(-2, -12),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
        axes.set_ylim(0, 1.15 * max(last.limit, max(y for _, y in shown)))
        _whole_axis(axes, "edits", [x for x, _ in shown])

    return draw("drift", "Drift of unrelated answers (nats)", alt, paint, height=2.4)


def _retention(rows: Sequence[Row]) -> Picture | None:
    """Share of the edits that held when somebody looked last, by how many edits came since."""
    ages = [(len(rows) - 1 - index, row.state == "holds") for index, row in enumerate(rows) if row.state in _LOOKED]
    if not ages:
        return None
    size = -(-len(ages) // _BINS)
    bins = [ages[max(0, end - size) : end] for end in range(len(ages), 0, -size)]  # the youngest first
    points = [(fmean(age for age, _ in part), fmean(holds for _, holds in part)) for part in bins]
    held = sum(holds for _, holds in ages)
    alt = f"Edits that hold by age: {held} of {len(ages)}; from the youngest to the oldest "
    alt += ", ".join(f"{share:.2f}" for _, share in points) + "."

    def paint(axes) -> None:
        axes.plot(*zip(*points, strict=True), **_marked(len(points)))
        axes.set_ylim(-0.03, 1.05)
        _whole_axis(axes, "age: edits since", [x for x, _ in points])

    return draw("retention", f"Edits that hold, by age ({held} of {len(ages)})", alt, paint, height=2.4)


def _audits(audits: Sequence[Looked]) -> Picture | None:
    if len(audits) < 2:
        return None
    points = thinned([(looked.turn, looked.held / max(1, looked.requests)) for looked in audits])
    alt = f"Share of edits that held at each of {len(audits)} audits, the last {points[-1][1]:.2f}."

    def paint(axes) -> None:
        axes.plot(*zip(*points, strict=True), **_marked(len(points)))
        axes.set_ylim(-0.03, 1.05)
        _whole_axis(axes, "turn of the audit", [x for x, _ in points])

    return draw("audits", "Edits that hold, audit by audit", alt, paint, height=2.4)


def _whole_axis(axes, label: str, places: Sequence[float]) -> None:
    """An axis of whole numbers, also where there is one of them, or a few."""
    edits_axis(axes, label)
    axes.set_xlim(min(places) - 0.5, max(places) + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)


def _marked(count: int) -> dict[str, object]:
    """The first series, with markers where there are few points."""
    look = style(0)._asdict()
    return look if count <= 40 else look | {"marker": None}
