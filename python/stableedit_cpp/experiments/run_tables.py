"""Tables of runs: one along its stream, many at the ends of theirs, and what each has cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

from stableedit_cpp.experiments.groups import Group
from stableedit_cpp.experiments.results import Run
from stableedit_cpp.files.table import Cell, Table, label, number, score

__all__ = [
    "best_of",
    "comparison",
    "cost",
    "edits_of",
    "found_by_search",
    "metric_title",
    "metrics_of",
    "over_seeds",
    "run_page",
    "score_cell",
]

_TITLES = {
    "locality_same": "locality: same answer",
    "locality_kl": "locality: KL, nats",
    "locality_agreement": "locality: top-1 agreement",
    "locality_target_kl": "KL along the data set's unrelated answer, nats",  # as earlier versions measured it
    "locality_target_agreement": "top-1 agreement along the data set's unrelated answer",
}
_ENDINGS = {"_exact_match": ", all tokens", "_free": ", free answer", "_contains": ", free answer contains it"}
_ENDINGS |= {"_contains_and_stops": ", contains it, then stops"}
# More of these is better.
_COMPARED = ("efficacy", "generalization", "specificity", "portability", "locality_same", "locality_agreement")
_COMPARED += ("efficacy_free", "generalization_free", "portability_free")
_BEST = "The best of a data set and model is marked with ★, unless all are alike."
_SEARCHED = "Found by the search: on held-out edits, before the stream."
_EXPLAINED = {
    "efficacy_free": "Free answer: what the model writes by itself is the answer, and then it stops.",
    "locality_same": "Locality: against the unedited model's own answers to unrelated prompts.",
}


def metric_title(name: str) -> str:
    for ending, text in _ENDINGS.items():
        if name.endswith(ending):
            return metric_title(name.removesuffix(ending)) + text
    return _TITLES.get(name, name.replace("_", " "))


def metrics_of(checkpoints: Sequence[dict]) -> list[str]:
    """Scores that some checkpoint has a value of, in the order of the results."""
    found: dict[str, None] = {}
    for checkpoint in checkpoints:
        found |= {name: None for name, score in checkpoint["scores"].items() if score["mean"] is not None}
    return list(found)


def score_cell(found: dict | None) -> Cell:
    """Of a score as the results have it."""
    return score(found["mean"], found.get("standard_error")) if found else score(None)


def run_page(run: Run) -> str:
    """One run in Markdown: checkpoint by checkpoint, retention by age, and what it cost."""
    document, metrics = run.document, metrics_of(run.checkpoints)
    rows = [[_place(c), *(score_cell(c["scores"].get(metric)) for metric in metrics)] for c in run.checkpoints]
    titles = list(map(metric_title, metrics))
    parts = [f"# {document['name']}", Table(["edits", *titles], rows, _settings(run)).markdown()]
    if run.checkpoints and run.last["ages"]:
        ages = run.last["ages"]
        rows = [[_age(age), *(score_cell(age["scores"].get(metric)) for metric in metrics)] for age in ages]
        caption = f"After {run.last['edits']:,} edits, by how many edits ago:"
        parts.append(Table(["age", *titles], rows, caption).markdown())
    if document["cost"]:
        parts.append(cost([run]).markdown())
    if "collapsed" in document:
        broken = document["collapsed"]
        parts.append(f"The model broke down after {broken['edits']:,} edits: {broken['reason']}")
    if not run.finished:
        parts.append("This run is not finished.")
    return "\n\n".join(parts) + "\n"


def _place(checkpoint: dict) -> Cell:
    edits = checkpoint["edits"]
    return Cell(edits_of(checkpoint) if edits or checkpoint["warm_up"] else "unedited", edits)


def edits_of(checkpoint: dict) -> str:
    """How many, and the step after the stream, if it is that of one."""
    return f"{checkpoint['edits']:,}" + (f", {checkpoint['after']}" if "after" in checkpoint else "")


def _age(age: dict) -> Cell:
    return Cell(f"{age['from']:,} to {age['to'] - 1:,}", age["from"])


def _settings(run: Run) -> str:
    settings, warm, config = run.settings, run.settings["warm_up"], run.settings["config"]
    sample = "all edits scored" if settings["sample"] is None else f"{settings['sample']:,} of the edits scored"
    before = f"{warm['size']:,} warm-up edits ({warm['position']})" if warm["size"] else "no warm-up"
    return (
        f"{settings['data']['edits']:,} edits of {settings['dataset']} in turns of {config['turn_size']} after "
        f"{before}; {settings['model']}, seed {settings['seed']}, {_chosen(settings)}; {sample}. "
        "Means ± standard errors."
    )


def _chosen(settings: dict) -> str:
    """What a search has found, or else the step; what is learnt begins with the step of the config."""
    found, config = found_by_search(settings.get("search")), settings["config"]
    if found:
        return f"{found} (found by the search)"
    if config.get("hypernetwork"):
        return f"hypernetwork {Path(config['hypernetwork']).stem}"
    size = config["step_size"]
    return f"step size {size if isinstance(size, str) else f'{size:g}'}"


def found_by_search(search: dict | None) -> str:
    """The fields that a search before the stream has chosen; of files the names. Empty where there was none."""
    found = (search or {}).get("found") or {}
    return ", ".join(f"{name} {Path(value).stem if isinstance(value, str) else value}" for name, value in found.items())


def comparison(groups: Sequence[Group]) -> Table:
    """All runs and the unedited models, at the end of the stream and of what was done after it."""
    metrics = metrics_of([checkpoint for group in groups for checkpoint in group.checkpoints])
    searched = any(found_by_search(run.settings.get("search")) for group in groups for run in group.runs)
    rows = []
    for group in groups:
        first = next((run.unedited for run in group.runs if run.unedited), None)
        if first:
            scores = [score_cell(first["scores"].get(metric)) for metric in metrics]
            head = [label("unedited model"), label(group.dataset), label(group.model), number(None)]
            rows.append([*head, *[label("-")] * searched, number(0), *scores])
        best = {metric: _best(group, metric) for metric in _COMPARED}
        for run in group.runs:
            cells = [score_cell(run.last["scores"].get(metric)) for metric in metrics]
            cells = [c._replace(best=run.label in best.get(m, ())) for m, c in zip(metrics, cells, strict=True)]
            head = [label(run.label), label(group.dataset), label(group.model), number(run.settings["seed"], "{}")]
            found = [label(found_by_search(run.settings.get("search")) or "-")] * searched
            rows.append([*head, *found, Cell(_progress(run), run.last["edits"]), *cells])
    caption = "Scores of all scored requests on the model after the last edit, ± one standard error. "
    caption += " ".join(
        [*(text for name, text in _EXPLAINED.items() if name in metrics), *[_SEARCHED] * searched, _BEST]
    )
    columns = ["editor", "data set", "model", "seed", *["found by the search"] * searched, "edits"]
    return Table([*columns, *map(metric_title, metrics)], rows, caption, "comparison")


def _best(group: Group, metric: str) -> set[str]:
    found = {run.label: run.last["scores"].get(metric) for run in group.runs if run.finished}
    return best_of({name: score["mean"] for name, score in found.items() if score and score["mean"] is not None})


def best_of(means: Mapping[str, float]) -> set[str]:
    """Those with the highest mean; none where all have the same, or there is nothing to compare with."""
    highest = max(means.values(), default=None)
    return {name for name, mean in means.items() if mean == highest} if len(set(means.values())) > 1 else set()


def _progress(run: Run) -> str:
    if run.finished and "collapsed" not in run.document:
        return edits_of(run.last)
    state = "broke down" if run.finished else "unfinished"
    return f"{edits_of(run.last)} of {run.settings['data']['edits']:,}, {state}"


def over_seeds(groups: Sequence[Group]) -> Table:
    """Means over runs that differ in nothing but the seed; no rows where no run has such a sibling."""
    metrics = metrics_of([checkpoint for group in groups for checkpoint in group.checkpoints])
    rows = []
    for group in groups:
        siblings: dict[str, list[Run]] = {}
        for run in group.runs:
            same = {name: value for name, value in run.settings.items() if name != "seed"}
            siblings.setdefault(repr(sorted(same.items())), []).append(run)
        for runs in siblings.values():
            if len(runs) > 1 and all(run.finished for run in runs):
                cells = [_spread([run.last["scores"].get(metric) for run in runs]) for metric in metrics]
                head = [runs[0].settings["editor"], group.dataset, group.model]
                rows.append([*map(label, head), number(len(runs)), *cells])
    caption = "Mean over seeds ± standard deviation between seeds, at the end of the stream."
    return Table(["editor", "data set", "model", "seeds", *map(metric_title, metrics)], rows, caption, "over-seeds")


def _spread(scores: list[dict | None]) -> Cell:
    means = [score["mean"] for score in scores if score and score["mean"] is not None]
    return score(fmean(means), stdev(means)) if len(means) > 1 else score(None)


def cost(runs: Sequence[Run]) -> Table:
    """Time and memory."""
    parts = list({name: None for run in runs for name in run.editing_seconds})
    apart = ["scoring", "side_effects"] + ["after"] * any(run.document["cost"].get("after_seconds") for run in runs)
    rows = []
    for run in runs:
        found, by_part = run.document["cost"], run.editing_seconds
        whole = sum(by_part.values())
        shares = [number(100 * by_part[n] / whole if whole and n in by_part else None, "{:.1f} %") for n in parts]
        cells = [label(run.label or run.settings["editor"]), label(run.settings["dataset"]), number(found.get("edits"))]
        cells += [number(found.get("seconds"), "{:,.0f}"), number(found.get("edits_per_second"), "{:,.1f}"), *shares]
        cells += [number(found.get(f"{part}_seconds"), "{:,.0f}") for part in apart]
        memory = [(found.get("turn_extra_bytes"), 2**20, "{:,.0f}")]
        memory += [(found.get(f"peak_{where}_bytes"), 2**30, "{:.2f}") for where in ("resident", "device")]
        rows.append([*cells, *(number(None if size is None else size / unit, way) for size, unit, way in memory)])
    titles = {"scoring": "scoring, s", "side_effects": "side effects, s", "after": "after the stream, s"}
    columns = ["editor", "data set", "edits", "editing, s", "edits/s", *parts, *(titles[part] for part in apart)]
    caption = (
        "Editing alone is counted in edits/s; parts are shares of it. A turn, MiB: the most that one took beyond what "
        "was resident when it began. Memory: highest of the process, with what it ran before, and the device."
    )
    return Table([*columns, "a turn, MiB", "memory, GiB", "device, GiB"], rows, caption, "cost")
