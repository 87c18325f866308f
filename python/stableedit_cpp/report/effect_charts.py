"""Maps of hidden states, perplexity along the stream, time and memory."""

from __future__ import annotations

from stableedit_cpp.experiments.groups import Group
from stableedit_cpp.experiments.results import Run
from stableedit_cpp.experiments.run_tables import edits_of
from stableedit_cpp.report.pictures import GREY, Picture, draw, edits_axis, logarithmic, style, thinned

__all__ = ["hidden_state_maps", "memory", "perplexity_curves", "time_by_part"]

_GIB = 2**30


def hidden_state_maps(run: Run, index: int) -> list[Picture]:
    """PCA and UMAP of unrelated prompts before and after all edits.

    Args:
        index: of the run's colour.
    """
    measured = [(place, found) for place, found in run.side_effects("hidden_states") if found.get("layers")]
    if not measured:
        return []
    checkpoint, found = measured[-1]
    pictures = []
    for layer, figures in found["layers"].items():
        for method, places in (figures.get("maps") or {}).items():
            shift, cka = figures["relative_shift"], figures["cka"]
            alt = (
                f"Scatter plot, {method.upper()} of the hidden states of {found['prompts']} unrelated prompts in layer "
                f"{layer} before and after the edits ({edits_of(checkpoint)}) by {run.label}. They moved by "
                f"{shift:.3g} of their norm; linear CKA {cka:.3f}."
            )

            def paint(axes, places=places, method=method) -> None:
                before, after = (list(zip(*places[name], strict=True)) for name in ("before", "after"))
                # plot, not scatter: as SVG it takes half of the bytes, and a page has many maps.
                small = {"linestyle": "none", "markersize": 3.7, "markeredgewidth": 0.8}
                axes.plot(*before, marker="o", markerfacecolor="none", color=GREY, label="before", **small)
                axes.plot(*after, marker="x", color=style(index).color, label="after", **small)
                axes.set_xticks([])
                axes.set_yticks([])
                axes.set_xlabel(f"{method.upper()} 1")
                axes.set_ylabel(f"{method.upper()} 2")

            title = f"{run.label}, layer {layer}, {method.upper()}"
            name = f"map {run.settings['dataset']} {run.settings['model']} {run.label} {layer} {method}"
            pictures.append(draw(name, title, alt, paint, height=3.3, legend=2))
    return pictures


def perplexity_curves(group: Group) -> list[Picture]:
    """One panel a text, one line a run."""
    texts = {text: None for run in group.runs for _, found in run.side_effects("perplexity") for text in found}
    pictures = []
    for text in texts:

        def points_of(run: Run, text=text) -> list[tuple]:
            measured = [(place, found) for place, found in run.side_effects("perplexity") if "step" not in place]
            points = [(place["edits"], found.get(text)) for place, found in measured]
            return [(edits, f["perplexity"]) for edits, f in points if f and f["perplexity"] is not None]

        lines = group.lines(points_of)
        if not lines:
            continue
        said = ", ".join(f"{run.label} {points[0][1]:.3g} to {points[-1][1]:.3g}" for _, run, points in lines)
        alt = f"Line chart, {group.title}: perplexity on {text} along the stream: {said}."

        def paint(axes, lines=lines) -> None:
            for index, run, points in lines:
                axes.plot(*zip(*points, strict=True), label=run.label, **style(index)._asdict())
            values = [y for *_, points in lines for _, y in points]
            if max(values) > 5 * min(values):
                logarithmic(axes.yaxis)
            edits_axis(axes, "edits of the stream")
            axes.set_xlim(left=0)

        pictures.append(draw(f"perplexity {group.title} {text}", f"perplexity, {text}", alt, paint, legend=len(lines)))
    return pictures


def memory(group: Group) -> list[Picture]:
    """Resident memory along the stream."""
    lines = []
    for index, run in enumerate(group.runs):
        points = [(t["edits"] + t["warm_up"], t["resident_bytes"] / _GIB) for t in run.turns if t.get("resident_bytes")]
        if points:
            lines.append((index, run, thinned(points)))
    if not lines:
        return []
    said = ", ".join(f"{run.label} {points[0][1]:.2f} to {points[-1][1]:.2f} GiB" for _, run, points in lines)

    def paint(axes) -> None:
        for index, run, points in lines:
            look = style(index)
            axes.plot(*zip(*points, strict=True), label=run.label, color=look.color, linestyle=look.linestyle)
        axes.set_ylim(bottom=0)
        edits_axis(axes, "edits, warm-up included")
        axes.set_ylabel("GiB")

    alt = f"Line chart, {group.title}: resident memory of the process along the stream: {said}."
    return [draw(f"memory {group.title}", "resident memory", alt, paint, legend=len(lines))]


def time_by_part(group: Group) -> list[Picture]:
    """Where the editing time went."""
    rows = [(run, run.editing_seconds) for run in group.runs if run.editing_seconds]
    if not rows:
        return []
    names = list({name: None for _, parts in rows for name in parts})
    said = "; ".join(f"{run.label}: " + ", ".join(f"{n} {s:.0f} s" for n, s in parts.items()) for run, parts in rows)

    def paint(axes) -> None:
        for index, name in enumerate(names):
            starts = [sum(parts.get(other, 0) for other in names[:index]) for _, parts in rows]
            widths = [parts.get(name, 0) for _, parts in rows]
            axes.barh(range(len(rows)), widths, left=starts, label=name, color=style(index).color, height=0.7)
        axes.set_yticks(range(len(rows)), [run.label for run, _ in rows])
        axes.invert_yaxis()
        axes.set_xlabel("seconds")
        axes.grid(axis="y", visible=False)

    alt = f"Stacked bar chart, {group.title}: editing time by part. {said}."
    height = 1.1 + 0.34 * len(rows)
    return [draw(f"time {group.title}", "editing time by part", alt, paint, height=height, legend=len(names))]
