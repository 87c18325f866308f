"""StableEdit: lifelong editing of facts in language models, on a C++ core.

import stableedit_cpp as se

editor = se.StableEdit(model, tokenizer, se.StableEditConfig())
editor.warm_up(training_requests)
editor.edit([{"prompt": "The capital of Australia is", "target": "Canberra"}])
"""

# The public names stand in __init__.pyi. Each is loaded at its first use, so that `stableedit --help` answers before
# torch is loaded, and the command line can settle torch's threads before that.
import lazy_loader

from stableedit_cpp._build_info import version as __version__
from stableedit_cpp._torch_check import check_torch

check_torch()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*__all__, "__version__"]
