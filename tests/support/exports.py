"""What the tests of exports share: edited tiny models, saved base models, and the code of a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

import stableedit_cpp as se
from support.tiny import FACTS, pattern_of, tiny_model, tiny_tokenizer

# Settings with which a tiny model learns the facts.
TAKES = {"step_size": 0.02, "ridge": 1.0, "turn_size": 13, "max_passes": 5}


def edited(architecture: str = "llama", dtype: torch.dtype = torch.float32, modules=None, **changes) -> se.StableEdit:
    """An editor that has edited all facts, with a step that is felt in half precision too."""
    settings = {"edit_modules": modules or [pattern_of(architecture)], "step_size": 1e-2, "turn_size": 5} | changes
    editor = se.StableEdit(tiny_model(architecture, dtype), tiny_tokenizer(), se.StableEditConfig.one_pass(**settings))
    editor.edit(FACTS)
    return editor


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 43).view(4, 10)).logits


def card_of(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def facts_of(directory: Path) -> dict:
    return json.loads((directory / "stableedit_export.json").read_text(encoding="utf-8"))


def load_as_the_card_says(directory: Path, monkeypatch) -> torch.nn.Module:
    """Runs the Python code of the model card, in its directory."""
    monkeypatch.chdir(directory)
    code = re.search(r"```python\n(.*?)```", card_of(directory), re.DOTALL).group(1)
    names: dict[str, object] = {}
    exec(code, names)
    return names["model"].eval()
