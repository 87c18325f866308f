"""``stableedit train-hypernetwork``: train the hypernetwork of RLEdit or MALMEN, into a file to begin with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stableedit_cpp.cli.datasets import add_format_options, reading_settings
from stableedit_cpp.cli.options import (
    add_editor_options,
    add_model_options,
    editor_config,
    load,
    new_parser,
    positive,
)
from stableedit_cpp.cli.sentence import plain_warnings
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import Editor, make_editor
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.files.atomic import check_writable_file
from stableedit_cpp.model.outputs import as_patterns

_EXAMPLE = """\
  stableedit train-hypernetwork --model smollm2-135m --requests zsre_train.json --limit 2000 --output rledit.safetensors
  stableedit edit --model smollm2-135m --hypernetwork rledit.safetensors --requests edits.jsonl --output edited/

  Every request needs a rephrase and an unrelated prompt with its answer (rephrase, locality_prompt, locality_target, or
  what these are called in a published data set). The model is left as it is; the file holds the network, the running
  statistics, and what tells this model and its edited modules from others. A training that was stopped goes on."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "train-hypernetwork", "train the hypernetwork of RLEdit or MALMEN", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=".json, .jsonl or .csv, also with .gz")
    parser.add_argument("--limit", type=positive, metavar="N", help="train on only the first N requests")
    parser.add_argument("--output", required=True, metavar="FILE", help="safetensors file for what was trained")
    add_format_options(parser)
    add_editor_options(parser, default="rledit")
    return parser


def run(options: argparse.Namespace) -> int:
    config = editor_config(options)
    if not isinstance(config, HypernetworkConfig):
        raise ValueError(f"{config.editor} has no hypernetwork to train; --editor takes rledit or malmen here")
    check_writable_file(options.output)
    kept = Path(options.output).absolute().with_name(f"{Path(options.output).name}.unfinished")
    requests = read_requests(options.requests, options.limit, **reading_settings(options))
    model, tokenizer = load(options)
    with plain_warnings():
        editor = make_editor(model, tokenizer, config)
        kept.parent.mkdir(parents=True, exist_ok=True)
        report = _train(editor, requests, kept)
    editor.save_hypernetwork(options.output)
    kept.unlink(missing_ok=True)
    print(f"{config.editor} for {as_patterns([module.name for module in editor.modules])}: {report}.")
    print(f"The hypernetwork is in {options.output}")
    return 0


def _train(editor: Editor, requests: Sequence[EditRequest], kept: Path) -> object:
    try:
        return editor.train(requests, checkpoint=kept, progress=True)
    except KeyboardInterrupt:
        if not kept.exists():
            raise
        raise KeyboardInterrupt(f"the same command goes on from what {kept} has of the training") from None
