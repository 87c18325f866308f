"""Geometry of the updates along the stream, and what theory says about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from stableedit_cpp.experiments.groups import Group
from stableedit_cpp.experiments.results import Run
from stableedit_cpp.report.pictures import GREY, Picture, draw, edits_axis, logarithmic, style, thinned

__all__ = ["theory_charts", "update_geometry"]

Value = Callable[[dict], float | None]


def update_geometry(group: Group) -> list[Picture]:
    """Norm of each turn's update and of the whole change, cosines between updates, drift of the statistics."""

    def earlier(turn: dict) -> float | None:
        return fmean(turn["cosine_earlier"]) if turn["cosine_earlier"] else None

    def drift(name: str) -> Value:
        def value(turn: dict) -> float | None:
            found = [group[name] for group in (turn.get("statistics") or {}).values() if group[name] is not None]
            return fmean(found) if found else None

        return value

    panels: list[tuple[str, str, Value, bool]] = [
        ("norm", "norm of a turn's update", lambda turn: turn["norm"], False),
        ("cumulative-norm", "norm of the whole change", lambda turn: turn["cumulative_norm"], False),
        ("cosine-last", "cosine to the update before", lambda turn: turn["cosine_last"], False),
        ("cosine-earlier", "mean cosine to random earlier updates", earlier, False),
        ("mean-drift", "drift of the mean in a turn", drift("mean_drift"), True),
        ("covariance-drift", "drift of the covariance in a turn", drift("covariance_drift"), True),
    ]
    pictures = []
    for name, title, value, steep in panels:

        def points_of(run: Run, value=value) -> list[tuple]:
            points = [(turn["position"], value(turn)) for turn in run.geometry]
            return thinned([(place, y) for place, y in points if y is not None and math.isfinite(y)])

        lines = group.lines(points_of)
        if not lines:
            continue
        said = ", ".join(f"{run.label} {fmean(y for _, y in points):.3g}" for _, run, points in lines)
        alt = f"Line chart, {group.title}: {title} against edits, warm-up included. Mean over the stream: {said}."

        def paint(axes, lines=lines, name=name, steep=steep) -> None:
            for index, run, points in lines:
                look = style(index)
                axes.plot(*zip(*points, strict=True), label=run.label, color=look.color, linestyle=look.linestyle)
            if name.startswith("cosine"):
                axes.axhline(0, color=GREY, linewidth=1)
            if steep and all(y > 0 for *_, points in lines for _, y in points):
                logarithmic(axes.yaxis)
            edits_axis(axes, "edits, warm-up included")

        pictures.append(draw(f"geometry {group.title} {name}", title, alt, paint, legend=len(lines)))
    return pictures


def theory_charts(path: Path, theory: dict, labels: dict[str, str]) -> list[Picture]:
    """Convergence of the running covariance, and scores of the same edits after more and more others.

    Args:
        labels: of runs, by name; other runs go by their name.
    """
    runs = [(labels.get(run["run"], run["run"]), run) for run in theory["runs"]]
    return [*_convergence(path, runs), *_cumulative(path, runs)]


def _convergence(path: Path, runs: list[tuple[str, dict]]) -> list[Picture]:
    lines = []
    for label, run in runs:
        for group, found in (run.get("convergence") or {}).items():
            points = [(point["samples"], point["distance"]) for point in found["points"] if point["distance"] > 0]
            if points:
                lines.append((f"{label}, {group}: rate {_rate(found)}", points))
    if not lines:
        return []

    def paint(axes) -> None:
        for index, (label, points) in enumerate(lines):
            axes.plot(*zip(*points, strict=True), label=label, **style(index)._asdict())
        logarithmic(axes.xaxis)
        logarithmic(axes.yaxis)
        axes.set_xlabel("samples")

    said = "; ".join(label for label, _ in lines)
    alt = f"Logarithmic line chart: distance of the running covariance to that of the whole stream. {said}."
    title = "distance to the whole stream's covariance"
    return [draw(f"convergence {path.name}", title, alt, paint, legend=len(lines), columns=1)]


def _cumulative(path: Path, runs: list[tuple[str, dict]]) -> list[Picture]:
    runs = [(label, run["cumulative"]) for label, run in runs if run.get("cumulative")]
    pictures = []
    for metric in ("efficacy", "generalization", "specificity"):
        lines = []
        for index, (label, found) in enumerate(runs):
            points = [(p["prior_edits"] + p["warm_up"], p["after"].get(metric)) for p in found["points"]]
            points = [(prior, score) for prior, score in points if score and score["mean"] is not None]
            if points:
                lines.append((index, label, sorted(points, key=lambda point: point[0])))
        if not lines:
            continue
        ends = [f"{label} {points[0][1]['mean']:.3f} to {points[-1][1]['mean']:.3f}" for _, label, points in lines]
        edits = runs[0][1]["edits"]
        alt = f"Line chart: {metric} of the same {edits} edits, made after none and after more and more others: "

        def paint(axes, lines=lines) -> None:
            for index, label, points in lines:
                prior = [place for place, _ in points]
                values = ([score[key] or 0 for _, score in points] for key in ("mean", "standard_error"))
                axes.errorbar(prior, *values, label=label, capsize=2, **style(index)._asdict())
            edits_axis(axes, "edits before, warm-up included")

        title = f"{metric} of the same {edits} edits after others"
        name = f"cumulative {path.name} {metric}"
        pictures.append(draw(name, title, alt + ", ".join(ends) + ".", paint, legend=len(lines)))
    return pictures


def _rate(found: dict) -> str:
    if found.get("rate") is None:
        return "unknown"
    error = found.get("rate_standard_error")
    return f"{found['rate']:.2f}" + ("" if error is None else f" ± {error:.2f}")
