"""What several commands do with their options."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from stableedit_cpp.cli.loading import DTYPES, default_device, load, load_any
from stableedit_cpp.editors import Editor, EditorConfig, LocalityGuard, load_config, named_editor
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.editors.registry import parse_config
from stableedit_cpp.editors.saved import SavedEditor
from stableedit_cpp.evaluation.scores import known_metrics

__all__ = [
    "DTYPES",
    "default_device",
    "editor_config",
    "form_settings",
    "load",
    "load_any",
    "metrics_of",
    "note",
    "set_guard",
    "show",
]


def form_settings(options: argparse.Namespace) -> dict[str, bool]:
    """What ``add_form_options`` was given, by the names that ``EditorConfig`` and ``evaluate`` have for it."""
    given = {name: getattr(options, name, None) for name in ("chat_template", "end_of_answer", "split_special_tokens")}
    return {name: value for name, value in given.items() if value is not None}


def metrics_of(options: argparse.Namespace) -> tuple[str, ...]:
    """What ``add_metrics_option`` was given, as ``evaluate`` takes it.

    Raises:
        ValueError: for one that is not known.
    """
    return known_metrics(options.metrics)


def set_guard(editor: Editor, options: argparse.Namespace) -> None:
    """Give the editor what ``add_guard_options`` was given; without them it has its own."""
    if options.no_guard:
        editor.guard = None
    elif options.guard_limit is not None:
        editor.guard = LocalityGuard(editor, limit=options.guard_limit)


def editor_config(options: argparse.Namespace) -> EditorConfig:
    """What ``add_editor_options`` was given."""
    if options.config:
        config, whose = load_config(options.config), f"{options.config} is a config"
    else:
        name = options.preset or options.editor or options.default_editor
        config, whose = named_editor(name).config, f"--preset {name} is one"
        if options.preset is None and options.editor is not None:
            options.editor = config.editor  # which may be named by settings of its own, as for bench
    if options.hypernetwork:
        if not options.config and not options.preset:
            config, whose = parse_config(SavedEditor.read(options.hypernetwork).config), f"{options.hypernetwork} is"
        if not isinstance(config, HypernetworkConfig):
            raise ValueError(f"--hypernetwork is for --editor rledit and malmen; {config.editor} has none")
        if options.step_size is not None:
            raise ValueError("--step-size is of no use with --hypernetwork, which has learnt a step for each module")
        config = dataclasses.replace(config, hypernetwork=options.hypernetwork)
    if options.editor not in (None, config.editor):
        raise ValueError(f"--editor {options.editor}, but {whose} of {config.editor}")
    names = ("edit_modules", "step_size", "turn_size")
    changes = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(config, **changes, **form_settings(options))


def show(options: argparse.Namespace, document: object, text: object) -> None:
    """Print a result: as JSON with ``--json``, else for people."""
    if options.json:
        document = dataclasses.asdict(document) if dataclasses.is_dataclass(document) else document
        text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    print(text)


def note(text: str) -> None:
    """Say where a result is, or how it was found: on the standard error, where it is in nobody's way."""
    print(text, file=sys.stderr)
