"""By what the text statistics of an editor are known again: its state is good with no others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

__all__ = ["TextMark"]


class TextMark:
    """Digest of the mean squares of keys over text, a part of the state of an editor that rests on them; all zero
    before ``set``."""

    def __init__(self, digest: bytes = bytes(32)) -> None:
        self._digest = digest

    def set(self, squares: Mapping[str, torch.Tensor]) -> None:
        """Of each module's keys, by its name, ``[k]``."""
        digest = hashlib.blake2b(digest_size=32)
        for name, values in sorted(squares.items()):
            digest.update(name.encode() + b"\0" + values.cpu().double().contiguous().numpy().tobytes())
        self._digest = digest.digest()

    def copy(self) -> TextMark:
        return TextMark(self._digest)

    def restore(self, snapshot: TextMark) -> None:
        """
        Raises:
            ValueError: if the other is of other text statistics.
        """
        if snapshot._digest != self._digest:
            raise ValueError(
                "the state was made with other text statistics than those of text_statistics; give the file that the "
                "editor began with"
            )

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"digest": torch.frombuffer(bytearray(self._digest), dtype=torch.uint8)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> TextMark:
        return cls(bytes(state["digest"].tolist()))
