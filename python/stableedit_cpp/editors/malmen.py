"""MALMEN: a hypernetwork that is trained on edits of the unedited model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stableedit_cpp.editors.config import PLAIN
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig, modules_of_family
from stableedit_cpp.editors.hypernetwork.editor import HypernetworkEditor
from stableedit_cpp.editors.registry import NamedEditor, register_editor

__all__ = ["MALMEN", "MALMENConfig"]

_FAMILIES = {
    "gpt-j-6b": ["transformer.h.{22..27}.mlp.fc_out"],
    "gpt2": ["transformer.h.{6..11}.mlp.c_proj"],
    "gpt2-xl": ["transformer.h.{42..47}.mlp.c_proj"],
}


@dataclass(frozen=True, kw_only=True)
class MALMENConfig(HypernetworkConfig):
    """MALMEN (arXiv 2311.04661), with the published sizes; the variance of the running statistics is exact, and they go
    on over the turns of a stream (EasyEdit's port begins them anew with every turn)."""

    editor: ClassVar[str] = "malmen"

    @classmethod
    def published(cls, model_family: str | None = None, **changes) -> MALMENConfig:
        """What the published code does: turns of 512 (its setting for ZsRE) in micro-batches of 32, and variance
        unbiased within these.

        Args:
            model_family: one of gpt-j-6b, gpt2 and gpt2-xl, for its modules.
            changes: other fields.

        Raises:
            ValueError: for another family, or a bad field.
        """
        preset = {"turn_size": 512, "micro_batch": 32, "unbiased_batches": True, **PLAIN}
        return cls(**(preset | modules_of_family(_FAMILIES, model_family) | changes))


class MALMEN(HypernetworkEditor):
    """MALMEN (arXiv 2311.04661): the rule of ``RLEdit``, with a network that was trained on single turns of the
    unedited model, one step of the optimiser each; on a stream it is out of its place more with every turn."""

    config: MALMENConfig
    config_class = MALMENConfig


register_editor(
    MALMEN,
    NamedEditor("malmen", MALMENConfig(), False, "MALMEN: a hypernetwork, trained on the unedited model"),
    NamedEditor("malmen-published", MALMENConfig.published(), False, "MALMEN as its code has it: turns of 512"),
)
