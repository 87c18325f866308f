"""Perplexity on texts that have nothing to do with the edits, e.g. WikiText-2 and ME-PPL."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from stableedit_cpp.data.file_types import read_records
from stableedit_cpp.data.texts import text_of
from stableedit_cpp.evaluation.answers import read_answers
from stableedit_cpp.model.form import PARSED
from stableedit_cpp.model.tokens import TokenSequence, prompt_ids
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["perplexity", "read_texts"]


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: a ``.txt`` file is one running text, records of JSON are one each.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for a file without text, or a record without a field ``Text`` or ``text``.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        try:
            texts = [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    else:
        texts = []
        for place, record in read_records(path):
            try:
                texts.append(text_of(record))
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {error}") from None
    if not any(text.strip() for text in texts):
        raise ValueError(f"{path} has no text")
    return texts


def perplexity(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    *,
    window: int,
    tokens: int | None = None,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> dict[str, float | int]:
    """exp of the mean negative log-likelihood of tokens, each given what comes before it in its window.

    Args:
        texts: each is cut into windows; the first token of a window is context only.
        window: tokens of a window, at most the context of the model.
        tokens: stop after so many scored tokens; None scores all.
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.
        on_done: called with the number of windows after each forward pass.

    Returns:
        ``perplexity`` over all tokens, its ``standard_error`` with the windows as the sample (delta method; None for a
        single window), ``mean_perplexity`` over windows, as ME-PPL was published, and how many ``tokens`` and
        ``windows`` were scored. Infinite where the model rules out a token; NaN where it answers NaN, and ``broken``
        says in how many windows.

    Raises:
        ValueError: if no text has two tokens.
    """
    windows = _windows(tokenizer, texts, window, tokens)
    if not windows:
        raise ValueError("no text has two tokens, so none has a perplexity")
    read = read_answers(model, windows, max_tokens=max_tokens, trunk=trunk, on_done=on_done)
    found = [answer.log_probability for answer in read]
    losses = torch.stack([-values.sum() for values in found])
    sizes = torch.tensor([len(values) for values in found], dtype=torch.float64, device="cpu")
    mean = losses.sum() / sizes.sum()
    error = None
    if len(found) > 1:
        residuals = losses - mean * sizes
        variance = residuals.square().sum() / (len(found) * (len(found) - 1))
        error = float(mean.exp() * variance.sqrt() / sizes.mean())
    broken = sum(answer.broken for answer in read)
    return {
        "perplexity": float(mean.exp()),
        "standard_error": error,
        "mean_perplexity": float((losses / sizes).exp().mean()),
        "tokens": int(sizes.sum()),
        "windows": len(found),
        **({"broken": broken} if broken else {}),
    }


def _windows(tokenizer, texts: Sequence[str], window: int, tokens: int | None) -> list[TokenSequence]:
    left = math.inf if tokens is None else tokens
    windows = []
    for text in texts:
        ids = prompt_ids(tokenizer, [text], PARSED)[0]
        for begin in range(0, len(ids), window):
            if left < 1:
                return windows
            piece = tuple(ids[begin : begin + min(window, left + 1)])
            if len(piece) > 1:
                windows.append(TokenSequence(piece[:-1], piece[1:]))
                left -= len(piece) - 1
    return windows
