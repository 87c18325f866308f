"""Tables of what a page adds to those of the runs: side effects, and where each run comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stableedit_cpp.experiments.groups import Group
from stableedit_cpp.experiments.results import Run
from stableedit_cpp.experiments.run_tables import edits_of
from stableedit_cpp.files.table import Cell, Table, label, number, score

__all__ = ["downstream", "hidden_states", "provenance"]


def downstream(group: Group) -> Table:
    """Downstream accuracy and perplexity, unedited and at the last measurement; no rows where nothing was measured."""
    measured = {
        part: {run.label: run.side_effects(part) for run in group.runs} for part in ("downstream", "perplexity")
    }
    tasks = _names(measured["downstream"].values())
    texts = _names(measured["perplexity"].values())
    rows: list[list[Cell]] = []
    for run in group.runs:
        points = {
            part: {
                (place["edits"], place.get("step", 0), edits_of(place)): figures for place, figures in found[run.label]
            }
            for part, found in measured.items()
        }
        unedited = (0, 0, edits_of({"edits": 0}))
        for place in sorted({place for found in points.values() for place in (*found,)[:1] + (*found,)[-1:]}):
            edits, _, said = place
            if edits == 0 and rows:  # the same model for all runs
                continue
            at = {part: found.get(place) or {} for part, found in points.items()}
            before = {part: found.get(unedited) or {} for part, found in points.items()}
            cells = [_accuracy(at["downstream"].get(t), before["downstream"].get(t), edits) for t in tasks]
            cells += [_perplexity(at["perplexity"].get(t)) for t in texts]
            rows.append([label(run.label if edits else "unedited model"), Cell(said, edits), *cells])
    caption = f"{group.title}. Tasks: accuracy ± one standard error (difference to the unedited model). "
    caption += "Perplexity: lower is better."
    columns = ["editor", "edits", *tasks, *(f"{text} perplexity" for text in texts)]
    return Table(columns, rows, caption, f"downstream-{group.title}")


def _names(measured: Iterable[list[tuple[int, dict]]]) -> list[str]:
    return list({name: None for found in measured for _, figures in found for name in figures})


def _accuracy(figures: dict | None, before: dict | None, edits: int) -> Cell:
    if not figures or figures.get("accuracy") is None:
        return number(None)
    cell = score(figures["accuracy"], figures.get("standard_error"))
    if edits == 0 or not before or before.get("accuracy") is None:
        return cell
    return cell._replace(text=f"{cell.text} ({figures['accuracy'] - before['accuracy']:+.3f})")


def _perplexity(figures: dict | None) -> Cell:
    if figures is None:
        return number(None)
    value = figures["perplexity"]
    return Cell("not finite", float("inf")) if value is None else number(value, "{:,.4g}")


def hidden_states(runs: Sequence[Run]) -> Table:
    """How far the hidden states of unrelated prompts have moved at the last measurement."""
    rows = []
    for run in runs:
        for place, found in run.side_effects("hidden_states")[-1:]:
            for layer, figures in found["layers"].items():
                names = ("relative_shift", "cka", "mmd2", "p_value", "p_value_paired")
                patterns = ("{:.4f}", "{:.4f}", "{:.3g}", "{:.3g}", "{:.3g}")
                cells = [number(figures[n], pattern) for n, pattern in zip(names, patterns, strict=True)]
                head = [label(run.label), label(run.settings["dataset"]), Cell(edits_of(place), place["edits"])]
                rows.append([*head, number(int(layer)), number(found["prompts"]), *cells])
    caption = (
        "Hidden states of unrelated prompts, last token, against those of the unedited model. Shift: mean of "
        "‖after - before‖ / ‖before‖. p: permutation test of the MMD over all states; paired: exchanging before and "
        "after of the same prompt, which notices any systematic change."
    )
    columns = ["editor", "data set", "edits", "layer", "prompts", "shift", "linear CKA", "MMD²", "p", "p, paired"]
    return Table(columns, rows, caption, "hidden-states")


def provenance(runs: Sequence[Run]) -> Table:
    """Where each run comes from."""
    rows = []
    for run in runs:
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
        rows.append([label(text) for text in texts])
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
    return Table(columns, rows, caption, "provenance")
