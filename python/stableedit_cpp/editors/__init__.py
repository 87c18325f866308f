"""Editors: one file each, on one base class with the turn loop."""

from stableedit_cpp.editors.applied import AppliedPass, AppliedTurn
from stableedit_cpp.editors.edit_report import EditReport, TurnReport
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.interrupt import EditInterrupted
from stableedit_cpp.editors.registry import EDITORS, make_editor
from stableedit_cpp.editors.stableedit import StableEdit
from stableedit_cpp.editors.ultraedit import UltraEdit
from stableedit_cpp.errors import DriftLimitReached

__all__ = [
    "EDITORS",
    "AppliedPass",
    "AppliedTurn",
    "DriftLimitReached",
    "EditInterrupted",
    "EditReport",
    "Editor",
    "StableEdit",
    "TurnReport",
    "UltraEdit",
    "make_editor",
]
