"""Markdown tables of runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

__all__ = ["comparison_table", "markdown", "run_table", "score_cell"]

Score = Mapping[str, float | int | None]


def run_table(document: Mapping) -> str:
    """One run, checkpoint by checkpoint, and retention by age."""
    entries = document["checkpoints"]
    names = _names(entries)
    rows = [
        [
            "unedited" if entry["edits"] == 0 else f"{entry['edits']:,}",
            *(score_cell(entry["scores"].get(n)) for n in names),
        ]
        for entry in entries
    ]
    parts = [f"# {document['name']}", _settings(document), markdown(["edits", *names], rows)]
    if entries and entries[-1]["ages"]:
        last = entries[-1]
        rows = [
            [f"{age['from']:,} to {age['to'] - 1:,}", *(score_cell(age["scores"].get(name)) for name in names)]
            for age in last["ages"]
        ]
        parts += [f"After {last['edits']:,} edits, by how many edits ago:", markdown(["age", *names], rows)]
    if document["cost"]:
        parts.append(_cost(document["cost"]))
    if "collapsed" in document:
        broken = document["collapsed"]
        parts.append(f"The model broke down after {broken['edits']:,} edits: {broken['reason']}")
    if document["status"] != "done":
        parts.append("This run is not finished.")
    return "\n\n".join(parts) + "\n"


def comparison_table(documents: Sequence[Mapping]) -> str:
    """The latest checkpoint of several runs, one table a data set, model and seed, each with the unedited model."""
    groups: dict[tuple, list[Mapping]] = {}
    for document in documents:
        settings = document["settings"]
        groups.setdefault((settings["dataset"], settings["model"], settings["seed"]), []).append(document)
    parts = []
    for (dataset, model, seed), group in groups.items():
        group = [document for document in group if document["checkpoints"]]
        if not group:
            continue
        names = _names([document["checkpoints"][-1] for document in group])
        first = group[0]["checkpoints"][0]
        rows = [["unedited", "", *(score_cell(first["scores"].get(name)) for name in names), "", ""]]
        for document in group:
            last, cost = document["checkpoints"][-1], document["cost"]
            scores = [score_cell(last["scores"].get(name)) if last["edits"] else "" for name in names]
            speed = cost["edits_per_second"] if cost else None
            state = " (broke down)" if "collapsed" in document else ""
            label = document["settings"]["editor"] + (state if document["status"] == "done" else " (not finished)")
            memory = f"{cost['peak_resident_bytes'] / 2**20:,.0f}" if cost else ""
            rows.append([label, f"{last['edits']:,}", *scores, "" if speed is None else f"{speed:.1f}", memory])
        heads = ["editor", "edits", *names, "edits/s", "peak memory (MiB)"]
        parts.append(f"## {dataset}, {model}, seed {seed}\n\n{markdown(heads, rows)}")
    return "\n\n".join(["Means with standard errors over the scored requests.", *parts]) + "\n"


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _names(entries: Iterable[Mapping]) -> list[str]:
    """Scores that at least one request has the prompt for."""
    found = {name: None for e in entries for name, score in e["scores"].items() if score["mean"] is not None}
    return list(found)


def score_cell(score: Score | None) -> str:
    if score is None or score["mean"] is None:
        return "-"
    return f"{score['mean']:.3f} ± {score['standard_error']:.3f}"


def _settings(document: Mapping) -> str:
    settings, warm = document["settings"], document["settings"]["warm_up"]
    config = settings["config"]
    sample = "all edits scored" if settings["sample"] is None else f"{settings['sample']:,} of the edits scored"
    before = f"{warm['size']:,} warm-up edits ({warm['position']})" if warm["size"] else "no warm-up"
    return (
        f"{settings['data']['edits']:,} edits of {settings['dataset']} in turns of {config['turn_size']} after "
        f"{before}; {settings['model']}, seed {settings['seed']}, step size {config['step_size']:g}; {sample}. "
        "Means with standard errors."
    )


def _cost(cost: Mapping) -> str:
    speed = f", {cost['edits_per_second']:.1f} edits/s" if cost["edits_per_second"] else ""
    return (
        f"Editing took {cost['seconds']:.0f} s{speed}, scoring {cost['scoring_seconds']:.0f} s; peak resident memory "
        f"{cost['peak_resident_bytes'] / 2**20:,.0f} MiB."
    )
