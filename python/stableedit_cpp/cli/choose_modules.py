"""``stableedit choose-modules``: which modules of a model take edits best; and the choice that other commands make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from torch import nn

from stableedit_cpp.cli.datasets import reading_settings
from stableedit_cpp.cli.options import editor_config, load, note, show
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import EditorConfig, ModuleChoice, choose_modules, remembered_choice
from stableedit_cpp.editors.choice import ENOUGH
from stableedit_cpp.model.ranks import ranks

__all__ = ["choose_for", "run"]


def run(options: argparse.Namespace) -> int:
    config = editor_config(options)
    requests = read_requests(options.requests, options.limit, **reading_settings(options))
    model, tokenizer = load(options)
    choice = choose_modules(model, tokenizer, requests, config, cached=False)
    document = {"model": options.model, "requests": options.requests, **choice.to_dict()}
    show(options, document, choice)
    return 0


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
    note("stableedit: measuring which modules take edits best; --no-choose-modules takes a fixed rule")
    try:
        found = choose_modules(model, tokenizer, requests, config, cached=False)
    except ValueError as error:
        if asked:
            raise
        return None, f"the fixed rule; nothing could be measured: {str(error).splitlines()[0]}"
    return found, found.why
