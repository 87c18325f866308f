"""``stableedit side-effects``: what editing has done to everything else."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from stableedit_cpp.cli.options import (
    DTYPES,
    add_json_option,
    add_model_options,
    load,
    load_any,
    new_parser,
    note,
    show,
)
from stableedit_cpp.files.atomic import check_writable_file, write_json
from stableedit_cpp.files.environment import environment
from stableedit_cpp.files.table import Cell, Table, label, number
from stableedit_cpp.sideeffects import SideEffectOptions, measure
from stableedit_cpp.sideeffects.downstream import TASKS
from stableedit_cpp.sideeffects.maps import MAPS

_EXAMPLE = """\
  stableedit side-effects --model edited/ --reference smollm2-135m --downstream data/downstream/ --limit 100 \\
      --perplexity wikitext2=wikitext2_test_raw.txt me_ppl=me_ppl_1k.json --prompts known_1000.json \\
      --output side_effects.json"""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "measure perplexity, downstream tasks and hidden states, before and after editing"
    parser = new_parser(commands, "side-effects", summary, _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the unedited model, as for --model; measured first")
    parser.add_argument("--options", metavar="FILE", help="JSON with the options below by name; these override it")
    parser.add_argument(
        "--perplexity", nargs="+", metavar="NAME=FILE", help=".txt with a running text, or records with a field text"
    )
    parser.add_argument("--perplexity-tokens", type=int, metavar="N", help="tokens of each text file (default 20000)")
    parser.add_argument(
        "--downstream", metavar="DIR", help="directory with sst2.json and so on; or lm-eval, which loads its own data"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), metavar="NAME", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--few-shots", type=int, metavar="N", help="examples in the prompts of the tasks (default 0)")
    parser.add_argument("--limit", type=int, metavar="N", help="records a task (default all)")
    parser.add_argument("--prompts", metavar="FILE", help="unrelated prompts: .txt, or records with a field prompt")
    parser.add_argument("--prompt-count", type=int, metavar="N", help="at most so many of them (default 500)")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="compare these hidden states (default -1)")
    parser.add_argument("--maps", nargs="+", choices=MAPS, metavar="NAME", help=f"of {', '.join(MAPS)} (default both)")
    parser.add_argument("--seed", type=int, metavar="N", help="of permutations and maps (default 0)")
    parser.add_argument("--output", metavar="FILE", help="save everything as JSON")
    add_json_option(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    if options.output:
        check_writable_file(options.output)
    chosen = _chosen(options)
    chosen.check()
    if chosen.prompts and not options.reference:
        raise ValueError("--prompts compares with the unedited model; say with --reference which that is")
    before = None
    with tempfile.TemporaryDirectory() as states:
        if options.reference:
            model, tokenizer = load_any(options.reference, options, dtype=DTYPES[options.dtype])
            before = measure(model, tokenizer, chosen, directory=states, edits=0, progress=True)
            del model  # the two need not be in memory together
        model, tokenizer = load(options)
        after = measure(model, tokenizer, chosen, directory=states, edits=1, progress=True)
    document = {"model": options.model, "reference": options.reference, "before": before, "after": after}
    document["environment"] = environment()
    show(options, document, "" if options.json else _table(before, after))
    if options.output:
        write_json(options.output, document)
        note(options, f"everything is in {options.output}")
    return 0


def _chosen(options: argparse.Namespace) -> SideEffectOptions:
    given: dict[str, object] = {}
    if options.options:
        try:
            given = json.loads(Path(options.options).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{options.options} is not valid JSON: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"{options.options} holds {type(given).__name__}; expected an object with options")
    names = ("perplexity_tokens", "downstream", "tasks", "few_shots", "limit", "prompts", "prompt_count", "layers")
    for name in (*names, "maps", "seed"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if options.perplexity:
        pairs = [text.partition("=") for text in options.perplexity]
        for name, _, path in pairs:
            if not (name and path):
                raise ValueError(f"--perplexity {name}: expected NAME=FILE, e.g. wikitext2=wikitext2_test_raw.txt")
        given["perplexity"] = {name: path for name, _, path in pairs}
    return SideEffectOptions.from_dict(given)


def _table(before: dict | None, after: dict) -> str:
    rows = []
    for part, figure in (("perplexity", "perplexity"), ("downstream", "accuracy")):
        for name, figures in after.get(part, {}).items():
            old = [_number(before[part][name][figure])] if before else []
            rows.append([label(f"{name}, {figure}"), *old, _number(figures[figure])])
    for layer, figures in after.get("hidden_states", {}).get("layers", {}).items():
        for name in ("relative_shift", "cka", "mmd2", "p_value", "p_value_paired"):
            rows.append([label(f"hidden states, layer {layer}, {name}"), Cell(""), _number(figures[name])])
    return Table(["", "before", "after"] if before else ["", ""], rows).plain()


def _number(value: float | None) -> Cell:
    return number(value, "{:.4g}")
