"""Editors: one file each, on one base class with the turn loop."""

from stableedit_cpp.editors.alphaedit import AlphaEdit, AlphaEditConfig
from stableedit_cpp.editors.applied import AppliedPass, AppliedTurn
from stableedit_cpp.editors.choice import ModuleChoice, choose_modules, remembered_choice
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.edit_report import EditReport, TurnReport
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.fine_tune import FineTune, FineTuneConfig
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.editors.guard import LocalityGuard
from stableedit_cpp.editors.interrupt import EditInterrupted
from stableedit_cpp.editors.lora import LoRA, LoRAConfig
from stableedit_cpp.editors.malmen import MALMEN, MALMENConfig
from stableedit_cpp.editors.memit import MEMIT, MEMITConfig
from stableedit_cpp.editors.prune import prune
from stableedit_cpp.editors.rect import rect
from stableedit_cpp.editors.registry import (
    EDITORS,
    NamedEditor,
    load_config,
    load_editor,
    make_editor,
    named_editor,
    parse_config,
    register_editor,
)
from stableedit_cpp.editors.rledit import RLEdit, RLEditConfig
from stableedit_cpp.editors.stableedit import StableEdit, StableEditConfig
from stableedit_cpp.editors.ultraedit import UltraEdit, UltraEditConfig
from stableedit_cpp.errors import DriftLimitReached

__all__ = [
    "EDITORS",
    "MALMEN",
    "MEMIT",
    "AlphaEdit",
    "AlphaEditConfig",
    "AppliedPass",
    "AppliedTurn",
    "DriftLimitReached",
    "EditInterrupted",
    "EditReport",
    "Editor",
    "EditorConfig",
    "FineTune",
    "FineTuneConfig",
    "Follower",
    "LoRA",
    "LoRAConfig",
    "LocalityGuard",
    "MALMENConfig",
    "MEMITConfig",
    "ModuleChoice",
    "NamedEditor",
    "RLEdit",
    "RLEditConfig",
    "StableEdit",
    "StableEditConfig",
    "TurnReport",
    "UltraEdit",
    "UltraEditConfig",
    "choose_modules",
    "load_config",
    "load_editor",
    "make_editor",
    "named_editor",
    "parse_config",
    "prune",
    "rect",
    "register_editor",
    "remembered_choice",
]
