"""Edits as a patch: the file that a C++ program adds to a running model (docs/file-formats.md)."""

from __future__ import annotations

import json
from collections import Counter

import torch

from stableedit_cpp.core import LowRankUpdate, Patch, WeightChange
from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.files.words import now

__all__ = ["PatchRecorder"]

_SHOWN = 5  # requests that the summary in a patch quotes


class PatchRecorder:
    """Records everything that an editor adds to its weights, warm-up included.

    The factors of the updates are kept as long as they are smaller than the whole change of a module; from then on the
    patch holds that change itself. Either way it equals the difference of the weights up to the rounding of the
    additions, half a unit in the last place of the float32 (float64) weight for each pass of each turn.

        recorder = PatchRecorder(editor, base_model="smollm2-135m")
        editor.edit(requests)
        core.save_patch("facts.safetensors", recorder.patch("facts"))

    Args:
        editor: one that has not edited yet; its ``on_turn`` still calls what it called before.
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
        # None: larger than the change itself.
        self._factors: dict[str, list[LowRankUpdate] | None] = {module.name: [] for module in editor.modules}
        self._next = editor.on_turn
        editor.on_turn = self._record

    def _record(self, turn: AppliedTurn) -> None:
        if self._next is not None:
            self._next(turn)
        self._counts[turn.kind] += len(turn.requests)
        if turn.kind == "edit":
            room = _SHOWN - len(self._quoted)
            self._quoted += [{"prompt": r.prompt, "target": r.target} for r in turn.requests[:room]]
        for module in self._editor.modules:
            kept = self._factors[module.name]
            if kept is None:
                continue
            updates = [applied.updates[module.name] for applied in turn.passes]
            kept += [LowRankUpdate(update.left.cpu(), update.right.cpu()) for update in updates]
            key_dim, value_dim = module.shape
            if sum(update.rank for update in kept) * (key_dim + value_dim) >= key_dim * value_dim:
                self._factors[module.name] = None

    def patch(self, id: str = "") -> Patch:
        """What was added so far.

        Args:
            id: name under which a server keeps the patch.
        """
        dense = any(factors is None for factors in self._factors.values())
        deltas = self._editor.weight_changes() if dense else {}
        changes = {}
        for module in self._editor.modules:
            factors = self._factors[module.name]
            if factors is None:
                delta = deltas[module.name].cpu()
                change = delta.T.contiguous() if module.layout == "conv1d" else delta
            else:
                key_dim, value_dim = module.shape
                left = torch.cat([torch.empty(value_dim, 0), *(update.left for update in factors)], dim=1)
                right = torch.cat([torch.empty(0, key_dim), *(update.right for update in factors)])
                change = LowRankUpdate(left, right)
            changes[module.name] = WeightChange(change, module.layout)
        return Patch(
            changes,
            id=id,
            created=now(),
            base_model=self._base_model,
            base_digest=self._base_digest,
            config=self._editor.config.to_json(),
            requests=json.dumps(
                {"edits": self._counts["edit"], "warm_up_edits": self._counts["warm_up"], "first": self._quoted},
                ensure_ascii=False,
            ),
        )
