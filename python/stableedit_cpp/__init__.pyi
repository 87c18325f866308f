"""The public names and where they live: what type checkers and editors read, and what ``__init__.py`` loads from, each
at its first use."""

from . import core, data, editors, errors, evaluation, experiments, export, files, lifelong, model, report, sideeffects
from .data import iter_requests, read_requests
from .data.request import EditRequest
from .editors import (
    EDITORS,
    MALMEN,
    MEMIT,
    AlphaEdit,
    AlphaEditConfig,
    EditInterrupted,
    Editor,
    EditorConfig,
    EditReport,
    FineTune,
    FineTuneConfig,
    LocalityGuard,
    LoRA,
    LoRAConfig,
    MALMENConfig,
    MEMITConfig,
    ModuleChoice,
    NamedEditor,
    RLEdit,
    RLEditConfig,
    StableEdit,
    StableEditConfig,
    TurnReport,
    UltraEdit,
    UltraEditConfig,
    choose_modules,
    load_config,
    load_editor,
    register_editor,
    remembered_choice,
)
from .errors import (
    DamagedJournal,
    DamagedSnapshot,
    DriftLimitReached,
    ModelBroken,
    OtherBits,
    SessionBusy,
    SessionClosed,
    SessionWriteError,
    StableEditError,
)
from .evaluation import Scores, evaluate, generate
from .export.patch_recorder import PatchRecorder
from .lifelong import LifelongSession
from .lifelong.audit import audit
from .lifelong.repair import repair
from .model.gather import gather_statistics
from .model.load import load_model
from .model.modules import find_modules
from .model.outputs import default_edit_modules
from .model.text_statistics import TextStatistics, load_statistics
from .model.trunk import TrunkCache

__version__: str

__all__ = [
    "EDITORS",
    "MALMEN",
    "MEMIT",
    "AlphaEdit",
    "AlphaEditConfig",
    "DamagedJournal",
    "DamagedSnapshot",
    "DriftLimitReached",
    "EditInterrupted",
    "EditReport",
    "EditRequest",
    "Editor",
    "EditorConfig",
    "FineTune",
    "FineTuneConfig",
    "LifelongSession",
    "LoRA",
    "LoRAConfig",
    "LocalityGuard",
    "MALMENConfig",
    "MEMITConfig",
    "ModelBroken",
    "ModuleChoice",
    "NamedEditor",
    "OtherBits",
    "PatchRecorder",
    "RLEdit",
    "RLEditConfig",
    "Scores",
    "SessionBusy",
    "SessionClosed",
    "SessionWriteError",
    "StableEdit",
    "StableEditConfig",
    "StableEditError",
    "TextStatistics",
    "TrunkCache",
    "TurnReport",
    "UltraEdit",
    "UltraEditConfig",
    "__version__",
    "audit",
    "choose_modules",
    "core",
    "data",
    "default_edit_modules",
    "editors",
    "errors",
    "evaluate",
    "evaluation",
    "experiments",
    "export",
    "files",
    "find_modules",
    "gather_statistics",
    "generate",
    "iter_requests",
    "lifelong",
    "load_config",
    "load_editor",
    "load_model",
    "load_statistics",
    "model",
    "read_requests",
    "register_editor",
    "remembered_choice",
    "repair",
    "report",
    "sideeffects",
]
