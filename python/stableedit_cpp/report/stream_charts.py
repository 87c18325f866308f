"""Scores along the stream, by age of an edit, and at its end."""

from __future__ import annotations

from stableedit_cpp.experiments.groups import Group
from stableedit_cpp.experiments.results import Run
from stableedit_cpp.experiments.run_tables import metric_title, metrics_of
from stableedit_cpp.report.pictures import GREY, INK, Picture, draw, edits_axis, logarithmic, style

__all__ = ["along_the_stream", "final_bars", "retention"]


def along_the_stream(group: Group) -> list[Picture]:
    """One panel a metric, one line a run, with a band of one standard error."""
    pictures = []
    for metric in metrics_of(group.checkpoints):

        def points_of(run: Run, metric=metric) -> list[tuple]:
            points = [(c["edits"], c["scores"].get(metric)) for c in run.stream]
            return [(edits, score) for edits, score in points if score and score["mean"] is not None]

        lines = group.lines(points_of)
        ends = ", ".join(f"{run.label} {points[-1][1]['mean']:.3f}" for _, run, points in lines)
        alt = f"Line chart, {group.title}: {metric_title(metric)} against the number of edits. At the end: {ends}."

        def paint(axes, lines=lines) -> None:
            for index, run, points in lines:
                edits = [place for place, _ in points]
                means = [score["mean"] for _, score in points]
                errors = [score["standard_error"] or 0 for _, score in points]
                look = style(index)
                axes.plot(edits, means, label=run.label, **look._asdict())
                bands = ([m - s * e for m, e in zip(means, errors, strict=True)] for s in (1, -1))
                axes.fill_between(edits, *bands, color=look.color, alpha=0.15, linewidth=0)
            edits_axis(axes, "edits of the stream")
            axes.set_xlim(left=0)

        pictures.append(draw(f"curve {group.title} {metric}", metric_title(metric), alt, paint, legend=len(lines)))
    return pictures


def retention(group: Group) -> list[Picture]:
    """Scores at the last checkpoint by the age of the edit."""
    pictures = []
    for metric in ("efficacy", "generalization", "specificity", "efficacy_free", "locality_same"):
        lines = []
        for index, run in enumerate(group.runs):
            bins = [(b["from"], b["to"], b["scores"].get(metric)) for b in run.last.get("ages") or []]
            bins = [(low, high, score) for low, high, score in bins if score and score["mean"] is not None]
            if bins:
                lines.append((index, run, bins))
        if not lines:
            continue
        said = [f"{run.label} {bins[0][2]['mean']:.3f} to {bins[-1][2]['mean']:.3f}" for _, run, bins in lines]
        alt = (
            f"Line chart, {group.title}: {metric_title(metric)} of edits by their age at the last checkpoint. "
            f"From the youngest to the oldest: {', '.join(said)}."
        )

        def paint(axes, lines=lines) -> None:
            for index, run, bins in lines:
                middles = [(low + high) / 2 for low, high, _ in bins]
                means = [score["mean"] for *_, score in bins]
                errors = [score["standard_error"] or 0 for *_, score in bins]
                axes.errorbar(middles, means, errors, label=run.label, capsize=2, **style(index)._asdict())
            logarithmic(axes.xaxis)
            axes.set_xlabel("age: edits since (logarithmic)")

        title = f"{metric_title(metric)} by age"
        pictures.append(draw(f"retention {group.title} {metric}", title, alt, paint, legend=len(lines)))
    return pictures


def final_bars(group: Group) -> list[Picture]:
    """One panel a metric: the last checkpoint of each run, and the unedited model as a line."""
    pictures = []
    for metric in metrics_of(group.checkpoints):
        rows = [(index, run, run.last["scores"].get(metric)) for index, run in enumerate(group.runs)]
        rows = [(index, run, score) for index, run, score in rows if score and score["mean"] is not None]
        before = next((run.unedited["scores"].get(metric) for run in group.runs if run.unedited), None)
        before = before["mean"] if before else None
        if not rows:
            continue
        said = ", ".join(f"{run.label} {score['mean']:.3f}" for _, run, score in rows)
        unedited = f" Unedited model: {before:.3f}." if before is not None else ""
        alt = f"Bar chart, {group.title}: {metric_title(metric)} at the end of the stream: {said}.{unedited}"

        def paint(axes, rows=rows, before=before) -> None:
            for place, (index, _run, score) in enumerate(rows):
                error = score["standard_error"] or 0
                axes.barh(place, score["mean"], xerr=error, color=style(index).color, ecolor=INK, height=0.7)
                end = (score["mean"] + error, place)
                beside = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
                axes.annotate(f"{score['mean']:.3f}", end, **beside)
            if before is not None:
                axes.vlines(before, -0.6, len(rows) - 0.45, color=GREY, linestyle="--", linewidth=1.2)
                axes.text(before, len(rows) - 0.4, "unedited", fontsize=9, ha="center", va="top")
            axes.set_yticks(range(len(rows)), [run.label for _, run, _ in rows])
            axes.set_ylim(len(rows) + 0.25, -0.6)
            axes.margins(x=0.18)
            axes.locator_params(axis="x", nbins=5)  # more numbers of three places overlap
            axes.grid(axis="y", visible=False)

        height = 0.9 + 0.34 * len(rows)
        pictures.append(draw(f"final {group.title} {metric}", metric_title(metric), alt, paint, height=height))
    return pictures
