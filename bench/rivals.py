"""All editors under one roof: the runs of experiments/rivals.yaml, summed up, and as the tables of docs/rivals.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import finish, new_parser, start
from stableedit_cpp.experiments import Run, read_results
from stableedit_cpp.experiments.run_tables import best_of, found_by_search
from stableedit_cpp.files.atomic import write_text
from stableedit_cpp.files.table import Cell, Table, label, number, score

SCORES = {
    "efficacy": "edits: token accuracy",
    "efficacy_exact_match": "all tokens",
    "efficacy_free": "free answer, then stops",
    "generalization": "paraphrases: token accuracy",
    "generalization_free": "free answer, then stops ",
    "locality_same": "unrelated: same answer",
    "locality_agreement": "top-1 agreement",
    "locality_kl": "KL, nats",
}
HIGHER = [name for name in SCORES if name != "locality_kl"]
MARKS = "<!-- rivals: filled by bench/rivals.py -->", "<!-- rivals: end -->"


def main() -> None:
    parser = new_parser(
        "Sums up runs of `stableedit bench --matrix bench/experiments/rivals.yaml`: scores at the end of each stream,\n"
        "what the search found, perplexity, seconds and memory; and fills the tables of a page, between its marks.",
        "rivals.py --runs runs/rivals/ --json bench/results/rivals.json --page docs/rivals.md\n"
        "  python bench/rivals.py --kept bench/results/rivals.json --page docs/rivals.md",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--runs", nargs="+", metavar="DIR", help="directories of runs")
    what.add_argument("--kept", metavar="FILE", help="instead, what an earlier --json has kept")
    parser.add_argument("--page", metavar="FILE", help="Markdown page whose tables are filled")
    options = parser.parse_args()
    if options.kept and options.json:
        parser.error("--json is of --runs: --kept is such a file already")
    device = start(options)
    if options.kept:
        document = json.loads(Path(options.kept).read_text(encoding="utf-8"))
        if document.get("benchmark") != "rivals":
            raise ValueError(f"{options.kept} was not written by bench/rivals.py --json")
        streams = document["streams"]
    else:
        streams = summed_up(read_results(options.runs).runs)
        finish("rivals", options, device, {"streams": streams})
    if options.page:
        fill(Path(options.page), "\n\n".join(table(name, rows).markdown() for name, rows in streams.items()))


def summed_up(runs: list[Run]) -> dict[str, dict[str, dict]]:
    """By data set and model, of the unedited model and each editor: its figures at the end of the stream."""
    streams: dict[str, dict[str, dict]] = {}
    for run in runs:
        settings = run.settings
        rows = streams.setdefault(f"{settings['dataset']}, {Path(settings['model']).name}", {})
        if run.unedited and "unedited model" not in rows:
            rows["unedited model"] = {**figures(run.unedited), "edits": 0}
        cost = run.document["cost"] or {}
        edited = (cost.get("edits") or 0) + (cost.get("warm_up_edits") or 0)
        search = settings.get("search")
        rows[settings["editor"]] = {
            **figures(run.last),
            "edits": run.last["edits"],
            "of": settings["data"]["edits"],
            "collapsed": run.document.get("collapsed"),
            "finished": run.finished,
            "searched": search and search["values"],
            "found": search and search["found"],
            "config": settings["config"],
            "seconds_per_edit": cost["seconds"] / edited if edited else None,
            "turn_extra_bytes": cost.get("turn_extra_bytes"),
            "peak_device_bytes": cost.get("peak_device_bytes"),
        }
    return {name: dict(sorted(rows.items(), key=_place)) for name, rows in streams.items()}


def _place(row: tuple[str, dict]) -> tuple[bool, bool]:
    """The unedited model, the default of this library, and the others as they came."""
    return row[0] != "unedited model", row[0] != "stableedit"


def figures(checkpoint: dict) -> dict[str, object]:
    """Of a checkpoint: scores with their standard errors, and perplexities."""
    effects = (checkpoint.get("side_effects") or {}).get("perplexity") or {}
    scores = {name: found for name, found in checkpoint["scores"].items() if found["mean"] is not None}
    return {"scores": scores, "perplexity": {name: found["perplexity"] for name, found in effects.items()}}


def table(name: str, rows: dict[str, dict]) -> Table:
    """A stream's rows; the best editor of each score is marked."""
    texts = list(dict.fromkeys(text for row in rows.values() for text in row["perplexity"]))
    shown = [score for score in SCORES if any(score in row["scores"] for row in rows.values())]
    best = {score: _best(rows, score) for score in shown if score in HIGHER}
    lines = []
    for editor, row in rows.items():
        cells = [_score(row, score)._replace(best=editor in best.get(score, ())) for score in shown]
        cells += [number(row["perplexity"].get(text), "{:,.1f}") for text in texts]
        memory = row.get("turn_extra_bytes")
        cells += [number(row.get("seconds_per_edit"), "{:.2f}")]
        cells += [number(None if memory is None else memory / 2**20, "{:,.0f}")]
        lines.append([label(editor), label(found_by_search(row) or "-"), Cell(_edits(row), row["edits"]), *cells])
    edits = max(row["edits"] for row in rows.values())
    columns = ["", "found by the search", "edits", *(SCORES[score] for score in shown)]
    columns += [*(f"perplexity, {text}" for text in texts), "s an edit", "MiB a turn"]
    return Table(columns, lines, f"### {name}, {edits:,} edits", name)


def _best(rows: dict[str, dict], name: str) -> set[str]:
    edited = {editor: row["scores"] for editor, row in rows.items() if row["edits"]}
    return best_of({editor: scores[name]["mean"] for editor, scores in edited.items() if name in scores})


def _score(row: dict, name: str) -> Cell:
    found = row["scores"].get(name)
    return score(found["mean"], found.get("standard_error")) if found else score(None)


def _edits(row: dict) -> str:
    state = "" if row.get("finished", True) else ", unfinished"
    state = ", broke down" if row.get("collapsed") else state
    return f"{row['edits']:,}{state}"


def fill(page: Path, tables: str) -> None:
    """Put the tables between the marks of a page.

    Raises:
        ValueError: for a page without the marks.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = MARKS
    pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no lines {begin} and {end} to fill tables in between")
    write_text(page, pattern.sub(lambda _: f"{begin}\n\n{tables}\n\n{end}", text))


if __name__ == "__main__":
    main()
