"""How many of others are solved for beside the sequences of a pass, and which: always the same beside the same."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["drawn_by", "share_of"]

_FEWEST = 16  # also beside a single sequence


def drawn_by(sequences: Sequence[TokenSequence]) -> random.Random:
    """A source of random choices that depends on nothing but these sequences."""
    tokens = [token for sequence in sequences for token in sequence.ids + sequence.answer]
    return random.Random(zlib.crc32(repr(tokens).encode()))


def share_of(sequences: int, most: int, each: int) -> int:
    """So many for ``each`` sequence, but no fewer than 16 and no more than ``most``."""
    return min(most, max(_FEWEST, each * sequences))
