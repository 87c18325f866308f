"""What a run with geometry shows of the theory: updates, drift, convergence, and the positive cumulative effect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from stableedit_cpp.evaluation.scores import mean_and_error
from stableedit_cpp.experiments.results import read_run
from stableedit_cpp.experiments.tables import markdown, score_cell

__all__ = ["theory_of", "theory_table"]


def theory_of(directory: str | Path) -> dict[str, object]:
    """Sums a run directory up; ready for JSON. docs/file-formats.md lists the fields."""
    document = read_run(directory)
    lines = (Path(directory) / "turns.jsonl").read_text(encoding="utf-8").splitlines()
    turns = [turn for turn in map(json.loads, lines) if turn["geometry"]]
    edits = [turn["geometry"] for turn in turns if turn["kind"] == "edit"]
    norms = [one["norm"] for one in edits]
    tenth = max(len(norms) // 10, 1)
    return {
        "run": document["name"],
        "geometry": {
            "turns": len(edits),
            "norm": {
                "mean": fmean(norms),
                "max": max(norms),
                "first_tenth": fmean(norms[:tenth]),
                "last_tenth": fmean(norms[-tenth:]),
            }
            if norms
            else None,
            "cosine_last": _cosines([one["cosine_last"] for one in edits]),
            "cosine_earlier": _cosines([cosine for one in edits for cosine in one["cosine_earlier"]]),
        },
        "drift": {
            group: [
                {"edits": turn["edits"] + turn["warm_up"], **turn["geometry"]["statistics"][group]} for turn in turns
            ]
            for group in (turns[0]["geometry"]["statistics"] if turns else ())
        },
        "convergence": document.get("convergence"),
        "cumulative": _cumulative(document),
    }


def theory_table(theories: Sequence[Mapping]) -> str:
    """Markdown for people."""
    parts = []
    for theory in theories:
        geometry, norm = theory["geometry"], theory["geometry"]["norm"]
        rows = []
        if norm:
            rows.append(["norm of a turn's update, first tenth of the stream", f"{norm['first_tenth']:.4g}"])
            rows.append(["the same, last tenth", f"{norm['last_tenth']:.4g}"])
        for name, label in (("cosine_last", "the update before"), ("cosine_earlier", "random earlier updates")):
            if geometry[name]:
                found = geometry[name]
                rows.append([f"cosine to {label}", f"{found['mean']:.4f} ± {found['standard_error']:.4f}"])
                rows.append(["the same, mean of absolute values", f"{found['mean_abs']:.4f}"])
        for group, drift in theory["drift"].items():
            moved = [point for point in drift if point["mean_drift"] is not None]
            if moved:
                ends = f"{moved[0]['mean_drift']:.3g} to {moved[-1]['mean_drift']:.3g}"
                rows.append([f"drift of the mean a turn, {group}, first to last", ends])
            moved = [point for point in drift if point["covariance_drift"] is not None]
            if moved:
                ends = f"{moved[0]['covariance_drift']:.3g} to {moved[-1]['covariance_drift']:.3g}"
                rows.append([f"drift of the covariance a turn, {group}, first to last", ends])
        for group, found in (theory["convergence"] or {}).items():
            if found["rate"] is not None:
                rate = f"{found['rate']:.3f} ± {found['rate_standard_error']:.3f}"
                rows.append([f"rate of convergence of the covariance, {group} (1/2: as 1/sqrt(n))", rate])
        parts.append(f"## {theory['run']}\n\n{markdown(['', ''], rows)}")
        if theory["cumulative"]:
            points = theory["cumulative"]["points"]
            names = [name for name, score in points[0]["after"].items() if score["mean"] is not None]
            body = [
                [_prior(point), *(score_cell(point["before"].get(name)) for name in names[:1])]
                + [score_cell(point["after"].get(name)) for name in names]
                for point in points
            ]
            heads = ["edited before", f"{names[0]} before", *(f"{name} after" for name in names)]
            edits = theory["cumulative"]["edits"]
            parts.append(f"The same {edits} edits after others:\n\n{markdown(heads, body)}")
    return "\n\n".join(parts) + "\n"


def _cosines(values: Sequence[float | None]) -> dict[str, float] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    mean, error = mean_and_error(found)
    return {"mean": mean, "standard_error": error, "mean_abs": fmean(map(abs, found)), "count": len(found)}


def _cumulative(document: Mapping) -> dict[str, object] | None:
    points = []
    for entry in document["checkpoints"]:
        found = entry["cumulative"]
        if found is None:
            continue
        prior = {"prior_edits": entry["edits"], "warm_up": entry["warm_up"]}
        points.append({**prior, "before": found["before"], "after": found["after"]})
        if "after_warm_up" in found:
            warm = document["settings"]["warm_up"]["size"]
            points.append(
                {"prior_edits": 0, "warm_up": warm, "before": found["before"], "after": found["after_warm_up"]}
            )
    return {"edits": document["settings"]["cumulative"], "points": points} if points else None


def _prior(point: Mapping) -> str:
    warm = f"{point['warm_up']:,} of the warm-up" if point["warm_up"] else ""
    edits = f"{point['prior_edits']:,} of the stream" if point["prior_edits"] else ""
    return " and ".join(part for part in (warm, edits) if part) or "none"
