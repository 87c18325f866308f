"""RLEdit: a hypernetwork that is trained along a stream of edits which stay in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stableedit_cpp.editors.config import PLAIN
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig, modules_of_family
from stableedit_cpp.editors.hypernetwork.editor import HypernetworkEditor
from stableedit_cpp.editors.registry import NamedEditor, register_editor

__all__ = ["RLEdit", "RLEditConfig"]

_FAMILIES = {
    "llama-3-8b": ["model.layers.{11..15}.mlp.gate_proj", "model.layers.{18..24}.mlp.up_proj"],
    "gemma-2-9b": ["model.layers.{32..40}.mlp.gate_proj", "model.layers.{32..40}.mlp.up_proj"],
    "mistral-7b": ["model.layers.{17,18}.mlp.down_proj"],
    "qwen2.5-7b": ["model.layers.{18..26}.mlp.gate_proj", "model.layers.{18..26}.mlp.up_proj"],
    "gpt-j-6b": ["transformer.h.{22..27}.mlp.fc_out"],
}


@dataclass(frozen=True, kw_only=True)
class RLEditConfig(HypernetworkConfig):
    """RLEdit (arXiv 2502.05759). The defaults are the published sizes, with the training corrected: the optimiser makes
    a step after every turn, and the penalty of the updates has a gradient. Of earlier turns a sample is in the loss.

    Attributes:
        horizon: so many turns, the present one included, whose rephrases and unrelated prompts are in the loss.
        past_sample: so many requests of the earlier turns of the horizon are in the loss of a turn, drawn anew each
            time and weighted up; None takes all of them, as published, which costs up to ``horizon`` times as much.
        discount: of the loss at a turn, for each turn that came after it.
        turns_per_step: training turns whose gradients are summed for a step of the optimiser; None makes one step at
            the end of an epoch.
        clip_each_turn: clip the running sum of gradients after every turn, as published, and not that of a step.
    """

    editor: ClassVar[str] = "rledit"
    keeps_edits: ClassVar[bool] = True

    rank: int = 1024
    blocks: int = 4
    locality_weight: float = 0.6
    update_penalty: float = 1e-4
    horizon: int = 10
    discount: float = 0.95
    past_sample: int | None = 50
    turns_per_step: int | None = 1
    clip_each_turn: bool = False

    @classmethod
    def published(cls, model_family: str | None = None, **changes) -> RLEditConfig:
        """What the published code does: turns of 20 in micro-batches of 4, variance unbiased within these, and one step
        of Adam after the whole training stream, whose gradient is clipped after each turn. The network hardly leaves
        the identity so: each entry, the modules' steps included, moves by the learning rate. The penalty of the
        updates, 1e-4 there, has no gradient there; here it is 0.

        Two faults are not copied: the gradient at unrelated prompts is taken at the weights of their activations (the
        code has put the unedited weights back by then), and edits do not come and go in half precision.

        Args:
            model_family: one of llama-3-8b, gemma-2-9b, mistral-7b, qwen2.5-7b and gpt-j-6b, for its modules.
            changes: other fields.

        Raises:
            ValueError: for another family, or a bad field.
        """
        preset = {"turn_size": 20, "micro_batch": 4, "unbiased_batches": True, "update_penalty": 0.0}
        preset |= {"turns_per_step": None, "clip_each_turn": True, "past_sample": None, **PLAIN}
        return cls(**(preset | modules_of_family(_FAMILIES, model_family) | changes))


class RLEdit(HypernetworkEditor):
    """RLEdit (arXiv 2502.05759): the hypernetwork of MALMEN, trained on a stream whose edits stay in the model, with
    the losses of the last ten turns at every turn. As published, an edit of keys H and value gradients G in one module
    is equivalent to

        normalizer.observe(H, G)                                  # running mean and std of both
        h_tilde, g_tilde = network([h_hat; g_hat])
        V = -step_j * (H * h_tilde).sum(1, keepdim=True) * g_tilde
        weight += torch.linalg.solve(H.T @ H + ridge_j * I, H.T @ V).T
    """

    config: RLEditConfig
    config_class = RLEditConfig


register_editor(
    RLEdit,
    NamedEditor("rledit", RLEditConfig(), False, "RLEdit: a hypernetwork, trained along a stream; identity untrained"),
    NamedEditor(
        "rledit-published",
        RLEditConfig.published(),
        False,
        "RLEdit as its code has it: one step of the optimiser after the training stream",
    ),
)
