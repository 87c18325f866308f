"""What edits have added to a model: looked at, taken back for a while, shrunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from stableedit_cpp.editors.applied import AppliedTurn
from stableedit_cpp.editors.weights import EditedWeights
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.split import refuse_split

__all__ = ["SeenUnedited"]


class SeenUnedited:
    """The part of ``Editor`` that knows the model as it was."""

    model: torch.nn.Module
    modules: list[EditModule]
    weights: EditedWeights
    on_turn: Callable[[AppliedTurn], object] | None

    @contextmanager
    def unedited(self) -> Iterator[torch.nn.Module]:
        """The model as it was before this editor's first edit, without a second copy of it; yields ``self.model``.

        Within the block the edited modules hold their original weights; afterwards, also after an exception, they hold
        the edited ones again, bit for bit. Blocks may be nested; editing inside one raises ValueError. What is kept for
        it, see ``OriginalWeights``.
        """
        with self.weights.originals.shown():
            yield self.model

    def keep_original_weights(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take the modules' present weights, or those given by module name, as the unedited ones.

        The first ``edit`` or ``warm_up`` does this by itself; call it where the model was edited before, by what a
        session replays, say.

        Raises:
            ValueError: for weights that are not those of the edited modules; or within ``unedited()``.
        """
        self.weights.keep_originals(weights)

    def original_weights(self) -> dict[str, torch.Tensor]:
        """Unedited weights by module name, in host memory and the layout and dtype of the module; not to be changed.

        Raises:
            ValueError: for weights that are split over processes, or within ``unedited()``.
        """
        refuse_split(self.modules, "looking at the unedited weights")
        self.weights.attach()
        return {module.name: self.weights.originals[module.name] for module in self.modules}

    def weight_changes(self) -> dict[str, torch.Tensor]:
        """What all edits together have added to the weights, by module name, in the layout of the module.

        In float32 (float64 for a float64 model), from the float32 master of a half-precision weight.

        Raises:
            ValueError: for weights that are split over processes, or within ``unedited()``.
        """
        refuse_split(self.modules, "looking at what was added to the weights")
        return self.weights.changes()

    def shrink(self, share: float) -> None:
        """Keep only this share of what all edits together have added: W <- W0 + share (W - W0).

        After a stream it gives back much of what the edits cost other answers, for few of the edits, and for more of
        their generalization (docs/closed-loop.md). The statistics stay as they are.

        Raises:
            ValueError: for a share that is not in (0, 1]; where a follower refuses it, a session say, or ``on_turn``
                is set, which would not see it; or within ``unedited()``.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be greater than 0 and at most 1, not {share!r}")
        if self.on_turn is not None:
            raise ValueError("the editor is followed turn by turn (on_turn); what shrinks would be missing there")
        self.weights.shrink(share)
