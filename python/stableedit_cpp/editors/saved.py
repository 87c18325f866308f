"""An editor in a file: all that it needs to go on, beside the model and the tokenizer that it began with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stableedit_cpp.core import load_state, save_state
from stableedit_cpp.editors.identity import check_identity, identity
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.modules import EditModule

__all__ = ["SavedEditor"]


@dataclass(frozen=True)
class SavedEditor:
    """What ``Editor.save`` writes: a state file (docs/file-formats.md) with one more component, "model".

    Attributes:
        config: of the editor, JSON.
        state: its ``state_dict()``.
        model: ``identity`` of its model and tokenizer, with the unedited weights.
    """

    config: str
    state: Mapping[str, Mapping[str, torch.Tensor]]
    model: Mapping[str, object]

    def write(self, path: str | Path) -> None:
        """Whole or not at all.

        Raises:
            OSError: as the system says; a file that was there is as it was.
        """
        text = torch.frombuffer(bytearray(json.dumps(self.model).encode()), dtype=torch.uint8)
        save_state(path, {**self.state, "model": {"identity": text}}, self.config)

    @classmethod
    def read(cls, path: str | Path) -> SavedEditor:
        """
        Raises:
            OSError: if the file cannot be read. ValueError: if it is damaged, or not of an editor.
        """
        state, config = load_state(path)
        text = state.pop("model", {}).get("identity")
        if text is None:
            raise ValueError(f"{path} holds a state, but was not written by an editor's save()")
        return cls(config, state, json.loads(bytes(text.tolist())))

    def check(self, model: torch.nn.Module, tokenizer, modules: Sequence[EditModule], form: Form) -> None:
        """Refuse another model or tokenizer, or one that is edited already.

        Raises:
            ValueError: with what differs.
        """
        found, remedy = identity(model, tokenizer, modules, form), "load what the editor began with"
        check_identity(found, self.model, remedy)
        if found["edited"] != self.model["edited"]:
            raise ValueError(f"the edited modules of the model do not hold their unedited weights; {remedy}")
