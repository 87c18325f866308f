"""``stableedit choose-modules``: which modules of a model take edits best; and the choice that other commands make."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from torch import nn

from stableedit_cpp.cli.datasets import add_format_options, reading_settings
from stableedit_cpp.cli.options import (
    FILES,
    add_editor_options,
    add_model_options,
    editor_config,
    load,
    new_parser,
    positive,
)
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import EditorConfig, ModuleChoice, choose_modules, remembered_choice
from stableedit_cpp.editors.choice import ENOUGH
from stableedit_cpp.model.ranks import ranks

__all__ = ["add_choice_option", "add_parser", "choose_for", "run"]

_EXAMPLE = """\
  stableedit choose-modules --model smollm2-135m --requests edits.jsonl
  stableedit choose-modules --model smollm2-135m --requests zsre_edit.json --limit 64 --json

  Tries a few sets of modules, depth by depth, on up to 64 of the requests, and takes each trial back. The star marks
  the set that is chosen; what was measured on 50 requests or more is remembered for this model, and
  `stableedit edit` edits in it."""


def add_parser(commands) -> argparse.ArgumentParser:
    parser = new_parser(commands, "choose-modules", "measure which modules of a model take edits best", _EXAMPLE)
    add_model_options(parser)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    parser.add_argument("--limit", type=positive, metavar="N", help="look only at the first N requests")
    add_format_options(parser)
    add_editor_options(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def run(options: argparse.Namespace) -> int:
    config = editor_config(options)
    requests = read_requests(options.requests, options.limit, **reading_settings(options))
    model, tokenizer = load(options)
    choice = choose_modules(model, tokenizer, requests, config, cached=False)
    document = {"model": options.model, "requests": options.requests, **choice.to_dict()}
    print(json.dumps(document, indent=2, ensure_ascii=False) if options.json else choice)
    return 0


def add_choice_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--choose-modules",
        action=argparse.BooleanOptionalAction,
        help="measure which modules are best, or take those named or the fixed rule (default: measure where none are "
        "named, the step size is automatic and there are 50 requests or more, unless it was measured before)",
    )


def choose_for(
    options: argparse.Namespace, model: nn.Module, tokenizer, requests: Sequence[EditRequest], config: EditorConfig
) -> tuple[ModuleChoice | None, str]:
    """The choice of modules that is to be edited in, None for those of the config, named or by the fixed rule; and why,
    for people.

    Raises:
        ValueError: where measuring was asked for and cannot be done.
    """
    asked = options.choose_modules
    if not asked:
        if config.edit_modules is not None:
            return None, "as named"
        if config.step_size != "auto" or asked is False:
            return None, "the fixed rule"
        # By one process for all: another may come when it was measured meanwhile.
        found = ranks().by_lead("looking up modules", lambda: remembered_choice(model, tokenizer, config))
        if found is not None:
            return found, f"{found.why}, measured earlier"
        if len(requests) < ENOUGH:
            return None, f"the fixed rule; {ENOUGH} requests or more are needed to measure"
    print(
        "stableedit: measuring which modules take edits best; --no-choose-modules takes a fixed rule", file=sys.stderr
    )
    try:
        found = choose_modules(model, tokenizer, requests, config, cached=False)
    except ValueError as error:
        if asked:
            raise
        return None, f"the fixed rule; nothing could be measured: {str(error).splitlines()[0]}"
    return found, found.why
