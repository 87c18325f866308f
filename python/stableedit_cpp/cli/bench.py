"""``stableedit bench``: streams of edits with checkpoints, ablations, and what the theory predicts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stableedit_cpp.cli.datasets import add_variants_option, variants_of
from stableedit_cpp.cli.options import (
    DTYPES,
    add_form_options,
    add_json_option,
    add_trust_option,
    form_settings,
    hyphened,
    load_any,
    new_parser,
    note,
    positive,
    show,
    step_size,
)
from stableedit_cpp.data import parse_fields
from stableedit_cpp.editors.registry import load_plugins
from stableedit_cpp.evaluation import METRICS
from stableedit_cpp.experiments import EDITORS, Matrix, read_results, read_yaml, run_matrix

__all__ = ["add_parser", "run"]

_EXAMPLE = """\
  stableedit bench --editor one-pass ultraedit-published --dataset zsre --data data/ --model smollm2-135m \\
      --edits 5000 --output runs/
  stableedit bench ablations --dataset zsre --data data/ --model smollm2-135m --edits 5000 --output ablations/
  stableedit bench theory --dataset zsre --data data/ --model smollm2-135m --edits 4000 --output theory/
  stableedit bench --editor closed-loop --after repair shrink=0.9 --dataset zsre --data data/ --model smollm2-135m \\
      --edits 1000 --output runs/
  stableedit bench --matrix experiments.yaml --output runs/     # keys as the options, e.g. editors: [stableedit]

  The same command goes on where it was interrupted. Editors:
"""
_EXPERIMENTS = ("run", "ablations", "theory")
# What an experiment has instead of the defaults of a matrix.
_DEFAULTS = {
    "run": {},
    "ablations": {"editors": ["one-pass", *(editor.name for editor in EDITORS.values() if editor.ablation)]},
    # Of updates, whose effect token accuracy shows; the cumulative effect scores many requests over and over.
    "theory": {"geometry": 8, "convergence": True, "cumulative": 500, "metrics": ["accuracy"]},
}


def add_parser(commands) -> argparse.ArgumentParser:
    load_plugins()
    width = max(map(len, EDITORS))
    listing = "\n".join(f"    {editor.name:<{width}}  {editor.summary}" for editor in EDITORS.values())
    parser = new_parser(commands, "bench", "edit streams of requests and measure along them", _EXAMPLE + listing)
    parser.add_argument(
        "experiment",
        nargs="?",
        default="run",
        choices=_EXPERIMENTS,
        help="run (default): editors x data sets x models x seeds; ablations: each part of the method left out; "
        "theory: updates, drift, convergence, cumulative effect",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="one directory a run is made in it")
    parser.add_argument("--matrix", metavar="FILE", help="YAML with settings; the options below override it")
    what = parser.add_argument_group("what is run")
    what.add_argument("--editor", nargs="+", dest="editors", metavar="NAME", help="see below; or a JSON config file")
    what.add_argument("--dataset", nargs="+", dest="datasets", metavar="NAME", help="name, file or hub:OWNER/NAME")
    what.add_argument("--model", nargs="+", dest="models", metavar="NAME", help="as for `stableedit edit`")
    what.add_argument("--seed", nargs="+", type=int, dest="seeds", metavar="N", help="default 0")
    what.add_argument("--data", metavar="DIR", help="directory of data sets: DIR/zsre/*.json and so on")
    what.add_argument("--warm-up-data", metavar="FILE", help="training stream (default: beside the data set)")
    format_ = what.add_mutually_exclusive_group()
    format_.add_argument("--format", metavar="NAME", help="data set format (default: told from the first record)")
    format_.add_argument(
        "--fields", metavar="MAP", help="fields of any other data set, e.g. prompt=question,target=answer"
    )
    what.add_argument(
        "--shuffle", type=int, metavar="N", help="draw from a seeded buffer of N records (default 0: none)"
    )
    add_variants_option(what)
    what.add_argument("--edits", type=positive, metavar="N", help="length of the stream (default: the whole data set)")
    what.add_argument(
        "--warm-up", metavar="WHERE", help="start (default), q1, middle, q3, end or none; of editors with one"
    )
    what.add_argument("--warm-up-size", type=int, metavar="N", help="warm-up edits (default 500; 0 is none)")
    what.add_argument(
        "--after",
        nargs="+",
        metavar="STEP",
        help="at the end of the stream, scored after each: repair, repair=N (the N nearest to holding), shrink=SHARE, "
        "prune",
    )
    how = parser.add_argument_group("how it edits")
    how.add_argument("--edit-modules", nargs="+", metavar="NAME", help="linear maps to edit, names or patterns")
    how.add_argument("--step-size", type=step_size, metavar="X", help="of every editor: a number, or auto")
    how.add_argument("--turn-size", type=positive, metavar="N", help="requests a turn (default 100)")
    add_form_options(how, chat="as each editor says", end="as each editor says")
    how.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="any other field of the editors' config"
    )
    how.add_argument("--dtype", choices=list(DTYPES), help="load the weights as (default: as saved)")
    how.add_argument("--device", help="torch device, e.g. cuda (default: cuda if there is one, else cpu)")
    add_trust_option(how)
    measured = parser.add_argument_group("what is measured")
    points = measured.add_mutually_exclusive_group()
    points.add_argument("--checkpoints", type=positive, metavar="N", help="evenly spaced (default 5)")
    points.add_argument(
        "--checkpoint-at", nargs="+", type=positive, metavar="EDITS", help="instead, after so many edits"
    )
    measured.add_argument("--sample", type=positive, metavar="N", help="edits scored at a checkpoint (default: all)")
    measured.add_argument("--age-sample", type=positive, metavar="N", help="in each bin of ages (default 100)")
    names = [metric.replace("_", "-") for metric in METRICS]
    measured.add_argument(
        "--metrics", nargs="+", type=hyphened, choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    measured.add_argument(
        "--geometry", type=int, metavar="N", help="compare updates with N earlier ones (0: not at all)"
    )
    measured.add_argument(
        "--cumulative", type=int, metavar="N", help="edit N more requests at each checkpoint, for a look"
    )
    measured.add_argument("--side-effects", metavar="FILE", help="YAML or JSON with options of their measurement")
    parser.add_argument(
        "--trunk-cache",
        type=float,
        default=4.0,
        metavar="GIB",
        help="of memory, for scoring, and as much for editing where several editors have one stream (default 4)",
    )
    parser.add_argument(
        "--snapshot-every", type=float, default=60.0, metavar="SECONDS", help="a kill costs at most that"
    )
    add_json_option(parser)
    parser.add_argument("--keep-state", action="store_true", help="keep weights and statistics of finished runs")
    return parser


def run(options: argparse.Namespace) -> int:
    matrix = Matrix.from_mapping(_settings(options))
    run_matrix(
        matrix.runs(),
        options.output,
        lambda name: load_any(name, options, dtype=DTYPES[matrix.dtype]),
        trunk_bytes=int(options.trunk_cache * 2**30),
        snapshot_seconds=options.snapshot_every,
        keep_state=options.keep_state,
    )
    output = Path(options.output)
    files = ["table.md", *(["theory.md"] if options.experiment == "theory" else [])]
    documents = [run.document for run in read_results([output]).runs] if options.json else []
    show(options, documents, "\n".join((output / name).read_text(encoding="utf-8") for name in files))
    note(options, f"Results are in {output}; table.md compares the runs")
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
