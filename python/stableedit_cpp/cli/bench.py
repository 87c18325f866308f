"""``stableedit bench``: streams of edits with checkpoints, ablations, and what the theory predicts."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from stableedit_cpp.cli.datasets import variants_of
from stableedit_cpp.cli.options import DTYPES, form_settings, load_any, note, show
from stableedit_cpp.cli.together import own_copy, writes
from stableedit_cpp.data import parse_fields
from stableedit_cpp.experiments import EDITORS, Matrix, read_results, read_yaml, run_matrix

__all__ = ["run"]

# What an experiment has instead of the defaults of a matrix.
_DEFAULTS = {
    "run": {},
    "ablations": {"editors": ["one-pass", *(editor.name for editor in EDITORS.values() if editor.ablation)]},
    # Of updates, whose effect token accuracy shows; the cumulative effect scores many requests over and over.
    "theory": {"geometry": 8, "convergence": True, "cumulative": 500, "metrics": ["accuracy"]},
}


def run(options: argparse.Namespace) -> int:
    matrix = Matrix.from_mapping(_settings(options))
    with own_copy(options.output) as directory:
        run_matrix(
            matrix.runs(),
            directory,
            lambda name: load_any(name, options, dtype=DTYPES[matrix.dtype]),
            trunk_bytes=int(options.trunk_cache * 2**30),
            snapshot_seconds=options.snapshot_every if writes() else math.inf,
            keep_state=options.keep_state,
        )
    if not writes():
        return 0
    output = Path(options.output)
    files = ["table.md", *(["theory.md"] if options.experiment == "theory" else [])]
    documents = [run.document for run in read_results([output]).runs] if options.json else []
    show(options, documents, "\n".join((output / name).read_text(encoding="utf-8") for name in files))
    note(f"Results are in {output}; table.md compares the runs")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, object]:
    """The matrix file's settings, overridden by the options that were given."""
    given = vars(options)
    settings = {**_DEFAULTS[options.experiment], **(read_yaml(options.matrix) if options.matrix else {})}
    for name in (
        *("editors", "datasets", "models", "seeds", "data", "warm_up_data", "format", "shuffle", "edits", "warm_up"),
        *(
            "warm_up_size",
            "dtype",
            "checkpoints",
            "checkpoint_at",
            "sample",
            "age_sample",
            "geometry",
            "cumulative",
            "after",
        ),
    ):
        if given[name] is not None:
            settings[name] = given[name]
    if options.checkpoints is not None:
        settings.pop("checkpoint_at", None)
    if options.fields is not None:
        settings["format"] = parse_fields(options.fields)
    if options.variants is not None:
        settings["variants"] = variants_of(options)
    if options.metrics is not None:
        settings["metrics"] = [metric.replace("-", "_") for metric in options.metrics]
    if options.side_effects is not None:
        settings["side_effects"] = read_yaml(options.side_effects)
    own = {name: given[name] for name in ("edit_modules", "step_size", "turn_size") if given[name] is not None}
    own |= form_settings(options) | dict(map(_assignment, options.set))
    settings["editor_options"] = {**(settings.get("editor_options") or {}), **own}
    return settings


def _assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--set has {text!r}; expected FIELD=VALUE, e.g. floor=0.3")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
