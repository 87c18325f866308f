"""What an editor adds to its weights, as a patch at any moment (docs/file-formats.md)."""

from __future__ import annotations

from collections import Counter

import torch

from stableedit_cpp.core import LowRankUpdate, Patch, WeightChange
from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.export.change import weight_change
from stableedit_cpp.export.patch import summary_of_requests
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.files.words import now

__all__ = ["PatchRecorder"]

_SHOWN = 5  # requests that the summary in a patch quotes


class PatchRecorder(Follower):
    """Gives what was added to an editor's weights, warm-up included, as they are at the moment that it is asked.

    The factors of the updates are kept as long as there was nothing but turns, and they are smaller than the whole
    change of a module; from then on the patch holds that change itself. Either way it equals the difference of the
    weights up to the rounding of the additions, half a unit in the last place of the float32 (float64) weight for each
    pass of each turn.

        recorder = PatchRecorder(editor, base_model="smollm2-135m")
        editor.edit(requests)
        core.save_patch("facts.safetensors", recorder.patch("facts"))

    Args:
        editor: one that has not edited yet.
        base_model: what the patch shall call the model.
        base_digest: the model's ``model_digest``, where it is known already.

    Raises:
        ValueError: if the editor has changed the model already.
    """

    def __init__(self, editor: Editor, base_model: str = "", base_digest: str | None = None) -> None:
        if any(bool(change.any()) for change in editor.weight_changes().values()):
            raise ValueError("the editor has changed the model already; make its PatchRecorder before the first edit")
        self._editor = editor
        self._base_model = base_model
        self._base_digest = base_digest or model_digest(editor.model)
        self._counts: Counter[str] = Counter()
        self._quoted: list[dict[str, str]] = []
        self._other_changes: list[str] = []
        # By module name; without an entry: larger than the change itself, or not all of it.
        self._factors: dict[str, list[LowRankUpdate]] = {module.name: [] for module in editor.modules}
        self._revision = editor.weights.revision  # of the weights that the factors add up to
        editor.followers.add(self)

    def final(self, turn: AppliedTurn) -> None:
        self._counts[turn.kind] += len(turn.requests)
        if turn.kind == "edit":
            room = _SHOWN - len(self._quoted)
            self._quoted += [{"prompt": r.prompt, "target": r.target} for r in turn.requests[:room]]
        if self._editor.weights.revision != self._revision + 1:
            return
        after = {}
        for module in self._editor.modules:
            if module.name in self._factors:
                updates = [applied.updates[module.name] for applied in turn.passes]
                kept = [LowRankUpdate(update.left.cpu(), update.right.cpu()) for update in updates]
                kept = self._factors[module.name] + kept
                key_dim, value_dim = module.shape
                if sum(update.rank for update in kept) * (key_dim + value_dim) < key_dim * value_dim:
                    after[module.name] = kept
        self._factors, self._revision = after, self._revision + 1

    def after(self, change: str) -> None:
        self._other_changes.append(change)

    def patch(self, id: str = "") -> Patch:
        """What the weights have more than before the first edit.

        Args:
            id: name under which a server keeps the patch.
        """
        differences = self._editor.weight_changes()  # which also notices a change that went past the editor
        factors = self._factors if self._editor.weights.revision == self._revision else {}
        changes = {
            module.name: WeightChange(_sum(factors[module.name], *module.shape), module.layout)
            if module.name in factors
            else weight_change(module, differences[module.name].cpu())
            for module in self._editor.modules
        }
        return Patch(
            changes,
            id=id,
            created=now(),
            base_model=self._base_model,
            base_digest=self._base_digest,
            config=self._editor.config.to_json(),
            requests=summary_of_requests(
                self._counts["edit"],
                self._counts["warm_up"],
                first=self._quoted,
                other_changes=self._other_changes,
            ),
        )


def _sum(updates: list[LowRankUpdate], key_dim: int, value_dim: int) -> LowRankUpdate:
    left = torch.cat(
        [torch.empty(value_dim, 0, dtype=torch.float32, device="cpu"), *(update.left for update in updates)], dim=1
    )
    right = torch.cat(
        [torch.empty(0, key_dim, dtype=torch.float32, device="cpu"), *(update.right for update in updates)]
    )
    return LowRankUpdate(left, right)
