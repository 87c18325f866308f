"""What editing does to everything that was not edited: perplexity, downstream tasks and hidden states."""

from stableedit_cpp.sideeffects.measurement import check, measure
from stableedit_cpp.sideeffects.options import SideEffectOptions

__all__ = ["SideEffectOptions", "check", "measure"]
