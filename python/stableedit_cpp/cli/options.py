"""Options that several commands share."""

from __future__ import annotations

import argparse

import torch

from stableedit_cpp.models import SMOLLM2, load_model

__all__ = ["add_model_options", "load", "new_parser", "positive"]

_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def new_parser(commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """A subcommand with an example in its help."""
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_options(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    parser.add_argument(
        "--model",
        required=default is None,
        default=default,
        help=f"directory of a saved model, hub name, or {SMOLLM2}" + (f" (default {default})" if default else ""),
    )
    parser.add_argument("--device", help="torch device, e.g. cuda (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="auto", help="load the weights as (default: as saved)"
    )


def load(options: argparse.Namespace):
    """(model, tokenizer) as the options say."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(options.model, device=device, dtype=_DTYPES[options.dtype])


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
