"""What processes that edit together must have in common, and how a difference is found before it does harm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from torch import nn

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.stream import digest_of
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.weights import EditedWeights
from stableedit_cpp.files.digest import checksum
from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.split import refuse_split

__all__ = ["check_together", "check_weights"]

# The weights after every turn: their checksums are known. Those of the statistics have to be read.
_STATISTICS_EVERY = 10


class Together(Protocol):
    """What of an editor is compared."""

    model: nn.Module
    weights: EditedWeights

    @property
    def config(self) -> EditorConfig: ...


def check_together(
    editor: Together, kind: str, requests: Sequence[EditRequest], settings: object, *, whole: bool
) -> None:
    """Before the first turn of a stream: all processes have the same requests, settings, model, weights and statistics.

    Args:
        settings: whatever else the stream depends on.
        whole: compare all weights of the model, each of which is read once for it, and not the edited ones alone.

    Raises:
        RanksDiffer: naming what differs, and in which process.
        ValueError: for more processes than a turn has requests.
    """
    refuse_split(editor.weights.modules, "editing with several processes at once (data_parallel)")
    group, config = ranks(), editor.config
    if group.size > config.turn_size:
        raise ValueError(
            f"{group.size} processes for turns of {config.turn_size} requests: some would have nothing to do; start at "
            f"most {config.turn_size}, or set a larger turn_size"
        )
    editor.weights.attach()
    weights = [one.hex() for one in editor.weights.known.values()]
    if whole:
        weights += [checksum(one).hex() for one in editor.model.parameters() if not one.is_meta]
    parts = {
        "requests": digest_of(requests),
        "settings": _digest([config.to_json(), kind, settings]),
        "weights": _digest(weights),
        "statistics": _digest(_checksums(editor.weights)),
    }
    remedy = "start all with the same command, model and files"
    group.check_same(parts, remedy)


def check_weights(weights: EditedWeights, turn: int) -> None:
    """After a turn of this number, from 1: the edited weights, and now and then the running statistics, are the same
    in all processes, bit for bit.

    Raises:
        RanksDiffer: where they are not.
    """
    if ranks().size > 1:
        parts: dict[str, object] = {f"weights of {name}": known for name, known in weights.known.items()}
        if turn % _STATISTICS_EVERY == 0:
            parts["statistics"] = _digest(_checksums(weights))
        ranks().check_same(
            parts,
            f"after turn {turn} they must be the same, bit for bit, which takes processes on one kind of machine; the "
            "turns before it stand, where a session has them",
        )


def _checksums(weights: EditedWeights) -> list[str]:
    """Of every tensor of the running statistics, in order."""
    found = [
        f"{name} {key} {checksum(field).hex()}"
        for name, part in weights.statistics.items()
        for key, field in part.state_dict().items()
    ]
    return sorted(found)


def _digest(content: object) -> str:
    return blake2b(json.dumps(content, default=str).encode(), digest_size=16).hexdigest()
