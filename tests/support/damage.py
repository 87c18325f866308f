"""Ways in which a file can be damaged."""

from __future__ import annotations

import random

__all__ = ["KINDS", "mutate"]

KINDS = ("flip", "overwrite", "truncate", "delete", "insert", "duplicate", "swap", "drop_tail", "append", "zero_tail")


def mutate(data: bytes, records: list[tuple[int, int]], kind: str, source: random.Random) -> bytes:
    """A damaged copy of a journal.

    Args:
        records: (begin, end) of each of its records, for damage that respects their limits.
    """
    place = source.randrange(len(data))
    end = min(len(data), place + source.randint(1, 300))
    first, second = sorted(source.sample(records, 2))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << source.randrange(8)]) + data[place + 1 :]
    if kind == "overwrite":
        return data[:place] + bytes(255 - byte for byte in data[place:end]) + data[end:]
    if kind == "truncate":
        return data[:place]
    if kind == "delete":  # a whole record, or any bytes
        begin, end = source.choice([first, (place, end)])
        return data[:begin] + data[end:]
    if kind == "insert":
        return data[:place] + source.randbytes(end - place) + data[place:]
    if kind == "duplicate":
        begin, end = source.choice([first, second])
        return data[:end] + data[begin:end] + data[end:]
    if kind == "swap":
        a, b = data[slice(*first)], data[slice(*second)]
        return data[: first[0]] + b + data[first[1] : second[0]] + a + data[second[1] :]
    if kind == "drop_tail":  # cut exactly between two records
        return data[: second[0]]
    if kind == "append":
        return data + source.randbytes(end - place)
    if kind == "zero_tail":  # what a power failure can leave
        return data[:place] + bytes(len(data) - place)
    raise ValueError(kind)
