"""A training that was stopped, in a file: the same call goes on from there, bit for bit."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.identity import identity
from stableedit_cpp.editors.saved import SavedEditor

__all__ = ["TrainingFile"]

_SECONDS = 300.0  # between two writes: each holds three times the network, and the edited weights


class TrainingFile:
    """Written now and then, whole or not at all.

    Args:
        requests: that are trained on.

    Raises:
        ValueError: if the file is of another training: of another model, config or requests.
    """

    def __init__(self, path: str | Path, editor: Editor, requests: Sequence[EditRequest]) -> None:
        self.path = Path(path)
        self._config = editor.config.to_json()
        text = json.dumps([request.to_dict() for request in requests], sort_keys=True)
        self._begin = identity(editor.model, editor.tokenizer, editor.modules, editor.form)
        self._requests = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._written = time.monotonic()
        self.found: SavedEditor | None = None
        if self.path.exists():
            self.found = SavedEditor.read(self.path)
            self.found.check(editor.model, editor.tokenizer, editor.modules, editor.form)
            if (self.found.model.get("requests"), self.found.config) != (self._requests, self._config):
                raise ValueError(
                    f"{self.path} is of a training on other requests, or with another config; go on with those, or "
                    "remove it"
                )

    def due(self) -> bool:
        """Whether it is time to write."""
        return time.monotonic() - self._written >= _SECONDS

    def write(self, state: Mapping[str, Mapping[str, torch.Tensor]], turns: int, report: object) -> None:
        """Where the training stands: after so many turns, those of earlier epochs included.

        Raises:
            OSError: if the file cannot be written; the one that was there is as it was.
        """
        where = {"requests": self._requests, "turns": turns, "report": asdict(report)}
        SavedEditor(self._config, state, self._begin | where).write(self.path)
        self._written = time.monotonic()
