"""What the session commands share."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from stableedit_cpp.cli.options import add_trust_option, load_any, new_parser
from stableedit_cpp.lifelong import LifelongSession, SessionView

__all__ = ["add_opening_options", "new_action", "opened", "print_json"]


def new_action(
    actions, name: str, summary: str, example: str, action: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """A session command; the first argument of each is the directory."""
    parser = new_parser(actions, name, summary, example)
    parser.set_defaults(action=action)
    parser.add_argument("directory", metavar="DIR", help="directory of the session")
    return parser


def add_opening_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="where the session's model is now (default: where it was created from)")
    parser.add_argument("--device", help="torch device, e.g. cuda (default: cuda if there is one, else cpu)")
    add_trust_option(parser)
    parser.add_argument(
        "--inexact",
        action="store_true",
        help="accept other last digits where another machine has to do turns again",
    )


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[LifelongSession]:
    """The session, open for writing, with its model."""
    found = SessionView(options.directory).manifest["model"]
    options.model = options.model or found["source"]
    if options.model is None:
        raise ValueError(f"the session {options.directory} does not say where its model is; add --model")
    dtype = getattr(torch, found["dtype"])
    try:
        model, tokenizer = load_any(options.model, options, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{error}; --model says where the session's model is now") from error
    with LifelongSession.open(options.directory, model, tokenizer, exact=not options.inexact) as session:
        yield session


def print_json(document: object) -> None:
    if dataclasses.is_dataclass(document):
        document = dataclasses.asdict(document)
    print(json.dumps(document, indent=2, ensure_ascii=False))
