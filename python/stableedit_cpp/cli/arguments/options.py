"""Options that several commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from stableedit_cpp.cli.arguments.placement import add_placement_options

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
    "hyphened",
    "new_parser",
    "number",
    "positive",
    "step_size",
]

DTYPES = ("auto", "float32", "bfloat16", "float16")

FILES = ".json, .jsonl, .csv as spreadsheets write it, .xlsx or .parquet, also with .gz; or hub:OWNER/NAME[:SPLIT]"


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
        default=list(default),
        metavar="NAME",
        help="beside token accuracy: generation (free answers: are the answer and stop, contain it), "
        f"locality ({locality}), exact-match (all tokens, when the answer so far is given); default: "
        f"{' '.join(default)}; accuracy alone is fastest",
    )


def add_form_options(parser, *, chat: str, end: str | None, split: str) -> None:
    """Of prompts and answers; what is not given is left to the config, or to what is called.

    Args:
        chat, end, split: what the help says of the default; None is no option for the end of answers.
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
    parser.add_argument(
        "--split-special-tokens",
        action=argparse.BooleanOptionalAction,
        help="what prompts and targets spell is text, also the name of a control token, </s> or <|im_end|>; or such "
        f"names are parsed, for prompts that are rendered already, with --no-chat-template (default: {split})",
    )


def add_editor_options(parser: argparse.ArgumentParser, *, default: str = "stableedit") -> None:
    """
    Args:
        default: name of the settings that are taken where none are named.
    """
    parser.set_defaults(default_editor=default)
    parser.add_argument(
        "--editor",
        type=hyphened,
        metavar="NAME",
        help=f"default: {default}, or what the settings say; stableedit editors lists them",
    )
    settings = parser.add_mutually_exclusive_group()
    settings.add_argument("--config", metavar="FILE", help="JSON config; the options below override it")
    settings.add_argument(
        "--preset",
        type=hyphened,
        metavar="NAME",
        help="settings by name, e.g. one-pass or ultraedit-published; stableedit editors lists them",
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
    form["split"] = "as the preset says, without one text"
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


def add_model_options(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        help="directory of a saved model, hub name, .gguf file or smollm2-135m; an exported adapter, delta or patch, "
        "or a session" + (f" (default {default})" if default else ""),
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="base model of an adapter, delta, patch or session, if it is not where that says",
    )
    add_placement_options(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="load the weights as (default: as saved)")
    add_trust_option(parser)


def add_trust_option(parser) -> None:
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that comes with a model, if its author is trusted",
    )
