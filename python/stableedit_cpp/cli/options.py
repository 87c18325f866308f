"""Options that several commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence

from stableedit_cpp.cli.models import DTYPES, add_model_options, add_trust_option, default_device, load, load_any
from stableedit_cpp.editors import EDITORS, Editor, EditorConfig, LocalityGuard, load_config
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.editors.registry import CLASSES, load_plugins, parse_config
from stableedit_cpp.editors.saved import SavedEditor
from stableedit_cpp.evaluation import METRICS

__all__ = [
    "DTYPES",
    "FILES",
    "OWN_TEMPLATE",
    "add_editor_options",
    "add_form_options",
    "add_guard_options",
    "add_json_option",
    "add_metrics_option",
    "add_model_options",
    "add_trust_option",
    "default_device",
    "editor_config",
    "form_settings",
    "hyphened",
    "load",
    "load_any",
    "new_parser",
    "note",
    "number",
    "positive",
    "set_guard",
    "show",
    "step_size",
]

FILES = ".json, .jsonl, .csv as spreadsheets write it, .xlsx or .parquet, also with .gz; or hub:OWNER/NAME[:SPLIT]"
# When the default editor edits chats.
OWN_TEMPLATE = "where the template is the model's own, as that of an instruct model is"


def new_parser(commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand with an example in its help."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_metrics_option(parser: argparse.ArgumentParser, locality: str, default: Sequence[str]) -> None:
    """
    Args:
        locality: what it compares with. default: metrics of ``evaluate``.
    """
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=hyphened,
        choices=[metric.replace("_", "-") for metric in METRICS],
        default=[metric.replace("_", "-") for metric in default],
        metavar="NAME",
        help="beside token accuracy: generation (free answers: are the answer and stop, contain it), "
        f"locality ({locality}), exact-match (all tokens, when the answer so far is given); default: "
        f"{' '.join(metric.replace('_', '-') for metric in default)}; accuracy alone is fastest",
    )


def add_form_options(parser, *, chat: str, end: str | None) -> None:
    """Of prompts and answers; what is not given is left to the config, or to what is called.

    Args:
        chat, end: what the help says of the default; None is no option for the end of answers.
    """
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="prompts are a user's turn, rendered by the tokenizer's chat template, and targets the assistant's; or "
        f"plain text, in which the target follows the prompt (default: {chat})",
    )
    if end is not None:
        parser.add_argument(
            "--end-of-answer",
            action=argparse.BooleanOptionalAction,
            help=f"the token that ends an answer belongs to it (default: {end})",
        )


def form_settings(options: argparse.Namespace) -> dict[str, bool]:
    """What ``add_form_options`` was given, by the names that ``EditorConfig`` and ``evaluate`` have for it."""
    given = {name: getattr(options, name, None) for name in ("chat_template", "end_of_answer")}
    return {name: value for name, value in given.items() if value is not None}


def add_editor_options(parser: argparse.ArgumentParser, *, default: str = "stableedit") -> None:
    """
    Args:
        default: name of the settings that are taken where none are named.
    """
    parser.set_defaults(default_editor=default)
    load_plugins()
    presets = [editor for editor in EDITORS.values() if not editor.ablation]
    parser.add_argument("--editor", choices=list(CLASSES), help=f"default: {default}, or what the settings say")
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument("--config", metavar="FILE", help="JSON config; the options below override it")
    settings.add_argument(
        "--preset",
        type=hyphened,
        choices=[editor.name for editor in presets],
        metavar="NAME",
        help="settings by name. " + ". ".join(f"{editor.name}: {editor.summary}" for editor in presets),
    )
    parser.add_argument(
        "--edit-modules",
        nargs="+",
        metavar="NAME",
        help="linear maps to edit: names or patterns like '*.{22,24}.mlp.down_proj' (default: chosen for the model)",
    )
    parser.add_argument(
        "--step-size", type=step_size, metavar="X", help="a number, or auto (default: the preset's, auto without one)"
    )
    parser.add_argument(
        "--hypernetwork",
        metavar="FILE",
        help="of stableedit train-hypernetwork: what rledit and malmen begin with, in place of an untrained network; "
        "without --config or --preset the settings are those that it was trained with",
    )
    parser.add_argument("--turn-size", type=positive, metavar="N", help="requests a turn (default 100)")
    form = {"chat": f"as the preset says, without one {OWN_TEMPLATE}", "end": "as the preset says, without one yes"}
    add_form_options(parser, **form)


def add_guard_options(parser: argparse.ArgumentParser) -> None:
    """Of commands that edit."""
    guard = parser.add_mutually_exclusive_group()
    guard.add_argument(
        "--guard-limit",
        type=number,
        metavar="X",
        help="how far the answers to unrelated prompts may drift, as mean KL divergence in nats, before steps are made "
        "smaller and editing stops (default: two thirds of what a prompt tells the model about its answer)",
    )
    guard.add_argument("--no-guard", action="store_true", help="edit on, whatever becomes of other answers")


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
        config, whose = EDITORS[name].config, f"--preset {name} is one"
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


def step_size(text: str) -> float | str:
    """argparse type: a number or "auto"."""
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'auto'") from None


def hyphened(text: str) -> str:
    """argparse type: a name as the command line spells it, exact-match for exact_match."""
    return text.replace("_", "-")


def add_json_option(parser) -> None:
    parser.add_argument("--json", action="store_true", help="results as JSON on the standard output, and nothing else")


def show(options: argparse.Namespace, document: object, text: object) -> None:
    """Print a result: as JSON with ``--json``, else for people."""
    print(json.dumps(document, indent=2, ensure_ascii=False, default=str) if options.json else text)


def note(options: argparse.Namespace, text: str) -> None:
    """Say where a result is, or how it was found: beside it for people, on the standard error with ``--json``."""
    print(text, file=sys.stderr if options.json else sys.stdout)


def number(text: str) -> float:
    """argparse type: a finite number greater than 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number greater than 0")
    return value


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
