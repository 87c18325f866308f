"""Every editor by its name in the registry, small enough for a tiny model: a new one is at most a line of ``OWN``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import stableedit_cpp as se
from stableedit_cpp.editors import make_editor
from stableedit_cpp.editors.hypernetwork.editor import HypernetworkEditor
from stableedit_cpp.editors.registry import CLASSES, EDITORS
from support.hypernetworks import stir
from support.tiny import FACTS, tiny_model, tiny_tokenizer

__all__ = ["KINDS", "LIVES", "Life", "stream"]

MODULES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
TEXT = [f"Line {number} says that {number} times {number} is {number * number}." for number in range(40)]

# What an editor's class wants beside ``_ALL`` to be quick on a tiny model, and to be felt there, by its name.
_LOCATED = {"contexts": ["I see. "], "target_steps": 3}
_TRAINED = {"step_size": 1e-2, "epochs": 2, "micro_batch": 2}
OWN: dict[str, dict[str, object]] = {
    # Anchors are up to rounding what they were, once others share their batch.
    "stableedit": {"anchors": 0, "max_passes": 2},
    "ultraedit": {"step_size": 1e-2},
    "memit": {"text_weight": 0.1, **_LOCATED},
    "alphaedit": {"threshold": 0.5, "threshold_mode": "relative", "ridge": 0.1, **_LOCATED},
    "rledit": {"step_size": 2e-2, "rank": 6},
    "malmen": {"step_size": 2e-2, "rank": 6},
    "fine-tune": _TRAINED,
    "lora": {**_TRAINED, "step_size": 5e-2},
}
_ALL = {"edit_modules": MODULES, "turn_size": 2}
# Wrappers that are settings of an editor.
LIVES = {name: (name, {}) for name in EDITORS} | {"rect": ("fine-tune", {"keep_share": 0.5})}
# One of each kind: it locates facts, has a hypernetwork, trains.
KINDS = ["alphaedit", "rledit", "lora"]


class Life:
    """An editor that was never used before, as often as one likes.

    Args:
        name: one of ``LIVES``.  directory: for the files that it begins with; those that are there already are used.

    Attributes:
        name, named: of the life, and of its editor in the registry.
        changes: of the settings there.  config: what it begins with.  kind: its class.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.named, more = LIVES[name]
        config = EDITORS[self.named].config
        self.kind = CLASSES[config.editor]
        fields = {field.name for field in dataclasses.fields(config)}
        self.changes: dict[str, object] = _ALL | OWN.get(config.editor, {}) | more
        if "text_statistics" in fields:
            (directory / "text.txt").write_text("\n".join(TEXT))
            self.changes["texts"] = [str(directory / "text.txt")]
            self.changes["text_statistics"] = str(directory / "text.safetensors")
        self.config: se.EditorConfig = dataclasses.replace(config, **self.changes)
        if issubclass(self.kind, HypernetworkEditor):
            path = directory / f"{name}.safetensors"
            if not path.exists():
                editor = self.editor()
                stir(editor)
                editor.save_hypernetwork(path)
            self.changes |= {"edit_modules": None, "hypernetwork": str(path)}
            self.config = dataclasses.replace(config, **self.changes)

    @property
    def paths(self) -> dict[str, str]:
        """The files that the config names, by field."""
        return {name: value for name, value in self.changes.items() if name in ("text_statistics", "hypernetwork")}

    def editor(self) -> se.Editor:
        """On a model of its own. Without a guard: a random model has nothing to lose."""
        editor = make_editor(tiny_model("llama"), tiny_tokenizer(), self.config)
        editor.guard = None
        return editor


def stream(count: int, begin: int = 0) -> list[dict[str, str]]:
    """So many requests with prompts of their own, and a subject in each."""
    short = [fact for fact in FACTS if len(fact["prompt"]) < 12]
    facts = [(number, short[number % len(short)]) for number in range(begin, begin + count)]
    return [
        {
            "id": f"f{number}",
            "prompt": f"{number}. {fact['prompt']}",
            "target": fact["target"],
            "subject": str(number),
        }
        for number, fact in facts
    ]
