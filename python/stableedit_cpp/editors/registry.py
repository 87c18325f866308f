"""Which editor a config is for."""

from __future__ import annotations

import torch

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.stableedit import StableEdit
from stableedit_cpp.editors.ultraedit import UltraEdit

__all__ = ["EDITORS", "make_editor"]

EDITORS: dict[str, type[Editor]] = {"stableedit": StableEdit, "ultraedit": UltraEdit}


def make_editor(model: torch.nn.Module, tokenizer, config: EditorConfig) -> Editor:
    """The editor that ``config`` belongs to."""
    return EDITORS[config.editor](model, tokenizer, config)
