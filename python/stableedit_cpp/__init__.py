"""StableEdit: lifelong editing of facts in language models, on a C++ core.

import stableedit_cpp as se

editor = se.StableEdit(model, tokenizer, se.StableEditConfig())
editor.warm_up(training_requests)
editor.edit([{"prompt": "The capital of Australia is", "target": "Canberra"}])
"""

from stableedit_cpp._torch_check import check_torch

check_torch()

from stableedit_cpp import core, export  # noqa: E402
from stableedit_cpp._build_info import version as __version__  # noqa: E402
from stableedit_cpp.data import iter_requests, read_requests  # noqa: E402
from stableedit_cpp.data.request import EditRequest  # noqa: E402
from stableedit_cpp.editors import (  # noqa: E402
    EditInterrupted,
    Editor,
    EditReport,
    StableEdit,
    TurnReport,
    UltraEdit,
)
from stableedit_cpp.editors.config import EditorConfig, StableEditConfig, UltraEditConfig  # noqa: E402
from stableedit_cpp.errors import (  # noqa: E402
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
from stableedit_cpp.evaluation import Scores, evaluate, generate  # noqa: E402
from stableedit_cpp.export.patch_recorder import PatchRecorder  # noqa: E402
from stableedit_cpp.lifelong import LifelongSession  # noqa: E402
from stableedit_cpp.model.load import load_model  # noqa: E402
from stableedit_cpp.model.modules import default_edit_modules, find_modules  # noqa: E402
from stableedit_cpp.model.trunk import TrunkCache  # noqa: E402

__all__ = [
    "DamagedJournal",
    "DamagedSnapshot",
    "DriftLimitReached",
    "EditInterrupted",
    "EditReport",
    "EditRequest",
    "Editor",
    "EditorConfig",
    "LifelongSession",
    "ModelBroken",
    "OtherBits",
    "PatchRecorder",
    "Scores",
    "SessionBusy",
    "SessionClosed",
    "SessionWriteError",
    "StableEdit",
    "StableEditConfig",
    "StableEditError",
    "TrunkCache",
    "TurnReport",
    "UltraEdit",
    "UltraEditConfig",
    "__version__",
    "core",
    "default_edit_modules",
    "evaluate",
    "export",
    "find_modules",
    "generate",
    "iter_requests",
    "load_model",
    "read_requests",
]
