"""PRUNE: the largest singular values of what all edits have added, made smaller after the stream."""

from __future__ import annotations

import torch

from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.weights import Checkpoint

__all__ = ["prune"]


def prune(editor: Editor) -> dict[str, int]:
    """Restrain the condition of the edited weights (Ma et al. 2024, arXiv 2405.16821): of the change W - W0 of each
    module, singular values s above the largest singular value m of W0 become m + log(s / m). The statistics stay.

    The released code of a comparison adds the restrained change to the full one; here it takes its place.

    Returns:
        How many singular values were restrained, by module name.

    Raises:
        ValueError: where a follower refuses it, a session say, or ``on_turn`` is set, which would not see it; or within
            ``unedited()``.
    """
    if editor.on_turn is not None:
        raise ValueError("the editor is followed turn by turn (on_turn); what is pruned would be missing there")
    weights = editor.weights
    originals = editor.original_weights()

    def work(_before: Checkpoint) -> dict[str, int]:
        masters, restrained = {}, {}
        for name, change in weights.changes().items():
            original = originals[name].to(change)
            left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
            largest = torch.linalg.matrix_norm(original.double(), 2)
            above = values > largest
            values = torch.where(above, largest + (values / largest).log(), values)
            restrained[name] = int(above.sum())
            masters[name] = original + ((left * values) @ right).to(change) if above.any() else weights[name].master
        weights.load(masters)
        return restrained

    return weights.change(work, "pruning what was added")
