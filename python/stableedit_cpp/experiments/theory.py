"""What a run with geometry shows of the theory: updates, drift, convergence, and the positive cumulative effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from stableedit_cpp.evaluation.scores import mean_and_error
from stableedit_cpp.experiments.results import Run
from stableedit_cpp.experiments.run_tables import score_cell
from stableedit_cpp.files.table import Cell, Table, label, number, score

__all__ = ["cumulative_tables", "theory_of", "theory_table"]


def theory_of(directory: str | Path) -> dict[str, object]:
    """Sums a run directory up; ready for JSON. docs/file-formats.md lists the fields."""
    run = Run.read(directory)
    document, turns = run.document, [turn for turn in run.turns if turn["geometry"]]
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


def theory_table(theories: Sequence[Mapping], labels: Mapping[str, str] | None = None) -> Table:
    """Norms of updates, cosines between them, drift, and fitted rates of convergence.

    Args:
        theories: of ``theory_of``. labels: what to call a run instead of its name.
    """
    rows = []
    for found in theories:
        geometry, drift = found.get("geometry") or {}, found.get("drift") or {}
        norm = geometry.get("norm") or {}
        cells = [label((labels or {}).get(found["run"], found["run"])), number(geometry.get("turns"))]
        cells += [number(norm.get(name), "{:.4g}") for name in ("first_tenth", "last_tenth")]
        for name in ("cosine_last", "cosine_earlier"):
            cosines = geometry.get(name) or {"mean": None}
            cells += [score(cosines["mean"], cosines.get("standard_error")), number(cosines.get("mean_abs"), "{:.3f}")]
        cells += [_ends(drift, name) for name in ("mean_drift", "covariance_drift")]
        rates = [(group, fit["rate"], fit["rate_standard_error"]) for group, fit in _fits(found)]
        text = "; ".join(f"{score(rate, error).text} ({group})" for group, rate, error in rates) or "-"
        rows.append([*cells, Cell(text, rates[0][1] if rates else None)])
    caption = (
        "Theory expects updates of a bounded norm that are nearly orthogonal (cosines around 0), statistics that drift "
        "less and less (from the first turn to the last, by group), and a covariance that converges with the rate 1/2 "
        "(its error falls as 1/√samples)."
    )
    columns = ["run", "updates", "norm, first tenth", "norm, last tenth", "cosine to last", "|cosine| to last"]
    columns += ["cosine to earlier", "|cosine| to earlier", "drift of the mean", "drift of the covariance"]
    return Table([*columns, "rate of convergence"], rows, caption, "theory")


def cumulative_tables(theories: Sequence[Mapping]) -> list[Table]:
    """For each run that has them: scores of the same edits, made after none and after more and more others."""
    tables = []
    for found in theories:
        if not found.get("cumulative"):
            continue
        edits, points = found["cumulative"]["edits"], found["cumulative"]["points"]
        names = [name for name, value in points[0]["after"].items() if value["mean"] is not None]
        rows = [
            [label(_prior(point)), *(score_cell(point["before"].get(name)) for name in names[:1])]
            + [score_cell(point["after"].get(name)) for name in names]
            for point in points
        ]
        heads = ["edited before", *(f"{name} before" for name in names[:1]), *(f"{name} after" for name in names)]
        tables.append(
            Table(heads, rows, f"{found['run']}: the same {edits} edits after others:", f"cumulative-{found['run']}")
        )
    return tables


def _fits(theory: Mapping) -> list[tuple[str, Mapping]]:
    found = (theory.get("convergence") or {}).items()
    return [(group, fit) for group, fit in found if fit.get("rate") is not None]


def _ends(drift: Mapping[str, Sequence[Mapping]], name: str) -> Cell:
    """The first and the last value of each group."""
    moved = {group: [point[name] for point in points if point.get(name) is not None] for group, points in drift.items()}
    texts = [f"{values[0]:.3g} to {values[-1]:.3g} ({group})" for group, values in moved.items() if values]
    return Cell("; ".join(texts) or "-", next((values[-1] for values in moved.values() if values), None))


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
