"""The tables of a report: what is shown in a cell, and what it is sorted by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from stableedit_cpp.report.results import Group, Results, Run
from stableedit_cpp.report.stream_charts import metric_title, metrics_of

__all__ = ["Cell", "Table", "comparison", "cost", "downstream", "hidden_states", "over_seeds", "provenance", "theory"]

_GIB = 2**30


class Cell(NamedTuple):
    """
    Attributes:
        value: what the column is sorted by; None goes last. best: whether to point it out.
    """

    text: str
    value: float | str | None = None
    best: bool = False


@dataclass
class Table:
    """
    Attributes:
        caption: what the rows are and how to read a cell. rows: the first cell of each is its header.
    """

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Cell]]

    def is_text(self, column: int) -> bool:
        return any(isinstance(row[column].value, str) for row in self.rows)


def _text(text: object) -> Cell:
    return Cell(str(text), str(text))


def _number(value: float | None, pattern: str = "{:,}") -> Cell:
    return Cell("-" if value is None else pattern.format(value), value)


def _score(score: dict | None) -> Cell:
    if not score or score["mean"] is None:
        return _number(None)
    error = score.get("standard_error")
    return Cell(f"{score['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}"), score["mean"])


def comparison(results: Results) -> Table:
    """All runs and the unedited models, at the end of the stream."""
    metrics = metrics_of(results.runs)
    rows = []
    for group in results.groups:
        first = next((run for run in group.runs if run.unedited), None)
        if first:
            scores = [_score(first.unedited["scores"].get(metric)) for metric in metrics]
            rows.append(
                [_text("unedited model"), _text(group.dataset), _text(group.model), Cell("-"), _number(0), *scores]
            )
        best = {metric: _best(group, metric) for metric in ("efficacy", "generalization", "specificity")}
        for run in group.runs:
            cells = [_score(run.last["scores"].get(metric)) for metric in metrics]
            cells = [c._replace(best=best.get(m) is run) for m, c in zip(metrics, cells, strict=True)]
            settings = run.settings
            edits = Cell(_progress(run), run.last["edits"])
            head = [Cell(run.label, run.label), _text(settings["dataset"]), _text(settings["model"])]
            rows.append([*head, _number(settings["seed"], "{}"), edits, *cells])
    caption = "Scores of all scored requests on the model after the last edit, ± one standard error. "
    caption += "The best of a data set and model is marked with ★."
    return Table(
        "comparison", caption, ["editor", "data set", "model", "seed", "edits", *map(metric_title, metrics)], rows
    )


def _best(group: Group, metric: str) -> Run | None:
    """None where there is nothing to compare with."""
    found = [(run.last["scores"].get(metric), run) for run in group.runs if run.finished]
    found = [(score["mean"], run) for score, run in found if score and score["mean"] is not None]
    return max(found, key=lambda pair: pair[0])[1] if len(found) > 1 else None


def _progress(run: Run) -> str:
    edits = run.last["edits"]
    if run.finished and "collapsed" not in run.document:
        return f"{edits:,}"
    state = "broke down" if run.finished else "unfinished"
    return f"{edits:,} of {run.settings['data']['edits']:,}, {state}"


def over_seeds(results: Results) -> Table | None:
    """Means over runs that differ in nothing but the seed; None where no run has such a sibling."""
    metrics = metrics_of(results.runs)
    rows = []
    for group in results.groups:
        siblings: dict[str, list[Run]] = {}
        for run in group.runs:
            same = {name: value for name, value in run.settings.items() if name != "seed"}
            siblings.setdefault(repr(sorted(same.items())), []).append(run)
        for runs in siblings.values():
            if len(runs) > 1 and all(run.finished for run in runs):
                cells = [_spread([run.last["scores"].get(metric) for run in runs]) for metric in metrics]
                head = [runs[0].settings["editor"], group.dataset, group.model]
                rows.append([*map(_text, head), _number(len(runs)), *cells])
    caption = "Mean over seeds ± standard deviation between seeds, at the end of the stream."
    columns = ["editor", "data set", "model", "seeds", *map(metric_title, metrics)]
    return Table("over-seeds", caption, columns, rows) if rows else None


def _spread(scores: list[dict | None]) -> Cell:
    means = [score["mean"] for score in scores if score and score["mean"] is not None]
    return Cell(f"{fmean(means):.3f} ± {stdev(means):.3f}", fmean(means)) if len(means) > 1 else _number(None)


def downstream(group: Group) -> Table | None:
    """Downstream accuracy and perplexity, unedited and at the last measurement."""
    measured = {
        part: {run.label: run.side_effects(part) for run in group.runs} for part in ("downstream", "perplexity")
    }
    tasks = _names(measured["downstream"].values())
    texts = _names(measured["perplexity"].values())
    if not tasks and not texts:
        return None
    rows: list[list[Cell]] = []
    for run in group.runs:
        points = {part: found[run.label] for part, found in measured.items()}
        for edits in sorted({edits for found in points.values() for edits, _ in found[:1] + found[-1:]}):
            if edits == 0 and rows:  # the same model for all runs
                continue
            at = {part: dict(found).get(edits) or {} for part, found in points.items()}
            before = {part: dict(found).get(0) or {} for part, found in points.items()}
            cells = [_accuracy(at["downstream"].get(t), before["downstream"].get(t), edits) for t in tasks]
            cells += [_perplexity(at["perplexity"].get(t)) for t in texts]
            rows.append([_text(run.label if edits else "unedited model"), _number(edits), *cells])
    caption = f"{group.title}. Tasks: accuracy ± one standard error (difference to the unedited model). "
    caption += "Perplexity: lower is better."
    return Table(
        f"downstream-{group.title}", caption, ["editor", "edits", *tasks, *(f"{t} perplexity" for t in texts)], rows
    )


def _names(measured: Iterable[list[tuple[int, dict]]]) -> list[str]:
    return list({name: None for found in measured for _, figures in found for name in figures})


def _accuracy(figures: dict | None, before: dict | None, edits: int) -> Cell:
    if not figures or figures.get("accuracy") is None:
        return _number(None)
    cell = _score({"mean": figures["accuracy"], "standard_error": figures.get("standard_error")})
    if edits == 0 or not before or before.get("accuracy") is None:
        return cell
    return cell._replace(text=f"{cell.text} ({figures['accuracy'] - before['accuracy']:+.3f})")


def _perplexity(figures: dict | None) -> Cell:
    if figures is None:
        return _number(None)
    value = figures["perplexity"]
    return Cell("not finite", float("inf")) if value is None else _number(value, "{:,.4g}")


def hidden_states(results: Results) -> Table | None:
    """How far the hidden states of unrelated prompts have moved at the last measurement."""
    rows = []
    for run in results.runs:
        for edits, found in run.side_effects("hidden_states")[-1:]:
            for layer, figures in found["layers"].items():
                names = ("relative_shift", "cka", "mmd2", "p_value", "p_value_paired")
                patterns = ("{:.4f}", "{:.4f}", "{:.3g}", "{:.3g}", "{:.3g}")
                cells = [_number(figures[n], pattern) for n, pattern in zip(names, patterns, strict=True)]
                head = [_text(run.label), _text(run.settings["dataset"]), _number(edits), _number(int(layer))]
                rows.append([*head, _number(found["prompts"]), *cells])
    caption = (
        "Hidden states of unrelated prompts, last token, against those of the unedited model. Shift: mean of "
        "‖after - before‖ / ‖before‖. p: permutation test of the MMD over all states; paired: exchanging before and "
        "after of the same prompt, which notices any systematic change."
    )
    columns = ["editor", "data set", "edits", "layer", "prompts", "shift", "linear CKA", "MMD²", "p", "p, paired"]
    return Table("hidden-states", caption, columns, rows) if rows else None


def theory(theories: list[tuple[Path, dict]], labels: dict[str, str]) -> Table | None:
    """Norms of updates, cosines between them, and fitted rates of convergence."""
    rows = []
    for _, found in theories:
        for run in found["runs"]:
            geometry = run.get("geometry") or {}
            norm = geometry.get("norm") or {}
            cells = [_text(labels.get(run["run"], run["run"])), _number(geometry.get("turns"))]
            cells += [_number(norm.get(name), "{:.4g}") for name in ("first_tenth", "last_tenth")]
            for name in ("cosine_last", "cosine_earlier"):
                cosines = geometry.get(name) or {"mean": None}
                cells += [_score(cosines), _number(cosines.get("mean_abs"), "{:.3f}")]
            rates = [(group, _rate(fit)) for group, fit in (run.get("convergence") or {}).items()]
            text = "; ".join(f"{rate.text} ({group})" for group, rate in rates) or "-"
            rows.append([*cells, Cell(text, rates[0][1].value if rates else None)])
    caption = (
        "Theory expects updates of a bounded norm that are nearly orthogonal (cosines around 0), and a covariance that "
        "converges with the rate 1/2 (its error falls as 1/√samples)."
    )
    columns = ["run", "updates", "norm, first tenth", "norm, last tenth", "cosine to last", "|cosine| to last"]
    columns += ["cosine to earlier", "|cosine| to earlier", "rate of convergence"]
    return Table("theory", caption, columns, rows) if rows else None


def _rate(fit: dict) -> Cell:
    return _score({"mean": fit.get("rate"), "standard_error": fit.get("rate_standard_error")})


def cost(results: Results) -> Table:
    """Time and memory."""
    parts = list({name: None for run in results.runs for name in run.document["cost"].get("seconds_by_part") or {}})
    rows = []
    for run in results.runs:
        found = run.document["cost"]
        by_part = found.get("seconds_by_part") or {}
        whole = sum(by_part.values())
        shares = [_number(100 * by_part[n] / whole if whole and n in by_part else None, "{:.1f} %") for n in parts]
        memory = [found.get("peak_resident_bytes"), found.get("peak_device_bytes")]
        cells = [_text(run.label), _text(run.settings["dataset"]), _number(found.get("edits"))]
        cells += [_number(found.get("seconds"), "{:,.0f}"), _number(found.get("edits_per_second"), "{:,.1f}"), *shares]
        cells += [
            _number(found.get("scoring_seconds"), "{:,.0f}"),
            _number(found.get("side_effects_seconds"), "{:,.0f}"),
        ]
        rows.append([*cells, *(_number(None if size is None else size / _GIB, "{:.2f}") for size in memory)])
    columns = ["editor", "data set", "edits", "editing, s", "edits/s", *parts, "scoring, s", "side effects, s"]
    caption = (
        "Editing alone is counted in edits/s; parts are shares of it. Memory: highest of the process and the device."
    )
    return Table("cost", caption, [*columns, "memory, GiB", "device, GiB"], rows)


def provenance(results: Results) -> Table:
    """Where each run comes from."""
    rows = []
    for run in results.runs:
        found, settings = run.document["provenance"], run.settings
        machine = found.get("environment") or {}
        git = (found.get("git") or "-")[:10] + (" + changes" if found.get("git_dirty") else "")
        data = settings["data"]
        texts = [
            run.document["name"],
            run.document["status"],
            found.get("started") or "-",
            len(found.get("stints") or [1]),
        ]
        texts += [git, machine.get("stableedit_cpp", "-"), machine.get("torch", "-"), machine.get("processor", "-")]
        texts += [data.get("source", "-"), (data.get("digest") or "-")[:12], " ".join(found.get("command") or [])]
        rows.append([_text(text) for text in texts])
    columns = [
        "run",
        "status",
        "started",
        "stints",
        "git",
        "stableedit",
        "torch",
        "machine",
        "data",
        "digest",
        "command",
    ]
    caption = "A stint is one process that worked on the run: more than one means that it was resumed."
    return Table("provenance", caption, columns, rows)
