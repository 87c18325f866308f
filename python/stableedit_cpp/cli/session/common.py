"""What the session commands share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stableedit_cpp.cli.options import load_any
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.view import manifest_of

__all__ = ["opened"]


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[LifelongSession]:
    """The session, open for writing, with its model."""
    found = manifest_of(options.directory)["model"]
    options.model = options.model or found["source"]
    if options.model is None:
        raise ValueError(f"the session {options.directory} does not say where its model is; add --model")
    options.keep_packed = options.keep_packed or found.get("keep_packed", False)
    dtype = getattr(torch, found["dtype"])
    try:
        model, tokenizer = load_any(options.model, options, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{error}; --model says where the session's model is now") from error
    with LifelongSession.open(options.directory, model, tokenizer, exact=not options.inexact) as session:
        yield session
