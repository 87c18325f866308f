"""All that an editor's future depends on: to go back to, to save, and to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeVar

import torch

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.identity import identity
from stableedit_cpp.editors.saved import SavedEditor
from stableedit_cpp.editors.solver import Solver
from stableedit_cpp.editors.weights import Checkpoint, EditedWeights
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.split import refuse_split

__all__ = ["SavedState"]

_Editor = TypeVar("_Editor", bound="SavedState")


class SavedState:
    """The part of ``Editor`` that is written down, and read back."""

    config_class: ClassVar[type[EditorConfig]]
    model: torch.nn.Module
    modules: list[EditModule]
    form: Form
    solver: Solver
    weights: EditedWeights

    def checkpoint(self) -> Checkpoint:
        """Weights and statistics as they are now, to go back to."""
        self.weights.attach()
        return Checkpoint(self.weights)

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that edits change and later edits depend on, as ``core.save_state`` takes it.

        "weights" holds the edited weights by module name (float32 for half-precision ones, from which those are
        rounded), in the layout of the module; "normalizer/<group>" the running statistics and "past_keys/<module>" the
        past keys. They share memory with the editor: look, do not write.

        Raises:
            ValueError: for weights that are split over processes, or within ``unedited()``.
        """
        refuse_split(self.modules, "a state")
        self.weights.attach()
        statistics = {name: part.state_dict() for name, part in self.solver.statistics().items()}
        return {"weights": {name: weight.master for name, weight in self.weights.items()}, **statistics}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Become what the editor that gave ``state_dict()`` was, bit for bit; the tensors may be on any device.

        Raises:
            ValueError: if it belongs to other modules or another config, or a follower refuses, a session say; nothing
                is changed then.
        """
        own = self.state_dict()
        shapes = {name: weight.shape for name, weight in own["weights"].items()}
        if state.keys() != own.keys() or {name: weight.shape for name, weight in state["weights"].items()} != shapes:
            raise ValueError(f"the state is not one of an editor of {', '.join(shapes)}")
        devices = self.solver.devices()

        def work(_before: Checkpoint) -> None:
            for name, part in self.solver.statistics().items():
                # Counts and options are tensors without a dimension, read on the host.
                placed = {key: field.to(devices[name]) if field.ndim else field for key, field in state[name].items()}
                part.restore(type(part).from_state_dict(placed))
            self.weights.load(state["weights"])

        self.weights.change(work, "loading a state")

    def save(self, path: str | Path) -> None:
        """Write a file that ``load`` goes on from: config, edited weights, statistics, and what tells the model and the
        tokenizer from others. It is there whole or not at all; a file that was there is replaced.

        The file holds the edited weights and statistics only (see ``state_dict``). Every weight of the model is read
        once, for its digest. The guard, and who follows the editor, are not in it.

        Raises:
            OSError: if it cannot be written; a file that was there is as it was. ValueError: within ``unedited()``.
        """
        model = identity(self.model, self.tokenizer, self.modules, self.form, self.original_weights())
        SavedEditor(self.config.placed().to_json(), self.state_dict(), model).write(path)

    @classmethod
    def load(cls: type[_Editor], model: torch.nn.Module, tokenizer, path: str | Path | SavedEditor) -> _Editor:
        """The editor that ``save`` wrote, on the model that it began with. It goes on as if there had been no break:
        bit for bit on the same machine, or with anchors up to rounding: those that had been answered before the break
        share their batches with others after it. ``load_editor`` loads that of any class.

        Args:
            model: unedited; it becomes the edited one.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is damaged, of another editor, or of another model or tokenizer, or if the model is edited
                already; the model is then as it was.
        """
        saved = path if isinstance(path, SavedEditor) else SavedEditor.read(path)
        editor = cls(model, tokenizer, cls.config_class.from_json(saved.config))
        saved.check(model, tokenizer, editor.modules, editor.form)
        editor.load_state_dict(saved.state)
        return editor
