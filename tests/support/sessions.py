"""Tiny sessions."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

import stableedit_cpp as se
from stableedit_cpp.lifelong import LifelongSession
from support.editors import MODULES, assert_same_bits, state_of
from support.tiny import FACTS, tiny_model

__all__ = ["FACTS", "MODULES", "assert_same_bits", "config_of", "create", "reopen", "state_of", "stream"]

TURN = 3


def config_of(editor: str = "stableedit", **changes) -> se.EditorConfig:
    settings = {"edit_modules": MODULES, "step_size": 1e-2, "turn_size": TURN} | changes
    return {"stableedit": se.StableEditConfig.one_pass, "ultraedit": se.UltraEditConfig}[editor](**settings)


def create(directory: Path, tokenizer, *, dtype=torch.float32, config=None, **options) -> LifelongSession:
    """Without a guard, as ``support.editors.make``."""
    session = LifelongSession.create(directory, tiny_model("llama", dtype), tokenizer, config or config_of(), **options)
    session.editor.guard = None
    return session


def reopen(directory: Path, tokenizer, *, dtype=torch.float32, **options) -> LifelongSession:
    """With a model that was loaded anew."""
    session = LifelongSession.open(directory, tiny_model("llama", dtype), tokenizer, **options)
    session.editor.guard = None
    return session


def stream(count: int, begin: int = 0) -> list[dict[str, str]]:
    """So many requests, all with prompts of their own."""
    facts = []
    for number in range(begin, begin + count):
        fact = FACTS[number % len(FACTS)]
        facts.append({"id": f"f{number}", "prompt": f"{number}. {fact['prompt']}", "target": fact["target"]})
    return facts


@contextlib.contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def without_closing(session: LifelongSession) -> None:
    """What the end of a process does: the lock is gone, and nothing else happens."""
    session._lock.release()
    session._lock = None
