"""``stableedit side-effects``: what editing has done to everything else."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from stableedit_cpp.cli.options import DTYPES, load, load_any, note, show
from stableedit_cpp.cli.together import writes
from stableedit_cpp.files.atomic import check_writable_file, write_json
from stableedit_cpp.files.environment import environment
from stableedit_cpp.files.table import Cell, Table, label, number
from stableedit_cpp.sideeffects import SideEffectOptions, measure


def run(options: argparse.Namespace) -> int:
    if options.output and writes():
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
    if options.output and writes():
        write_json(options.output, document)
        note(f"everything is in {options.output}")
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
