"""What is done to a model once its stream is at its end: repairs, and making what was added smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import Editor, make_editor, prune
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.files.words import check_whole, with_nearest
from stableedit_cpp.lifelong.repair import repair
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """A round of repair, a shrinking, or PRUNE.

    Attributes:
        amount: of a repair: how many requests at most are solved again, those nearest to holding first; None takes all.
            Of a shrinking: the share of what editing has added that is kept.
        changes: of a repair: fields of the editor's config that are different meanwhile.
    """

    kind: Literal["repair", "shrink", "prune"]
    amount: float | None = None
    changes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind == "repair":
            check_whole("repair", self.amount, none=True)
            return
        if self.kind == "prune":
            if self.amount is not None or self.changes:
                raise ValueError(f"prune takes no amount and no fields of a config, not {self.to_dict()!r}")
            return
        if not isinstance(self.amount, (int, float)) or isinstance(self.amount, bool) or not 0 < self.amount <= 1:
            raise ValueError(f"shrink must be greater than 0 and at most 1, not {self.amount!r}")
        if self.changes:
            raise ValueError(f"shrink takes no fields of a config, not {', '.join(self.changes)}")

    @classmethod
    def parse(cls, item: str | Mapping[str, object]) -> Step:
        """``repair``, ``repair=280`` (a budget), ``shrink=0.9`` or ``prune``; or as a mapping with fields of the config
        beside it, e.g. ``{"repair": 280, "step_size": 1e-4}``, where None stands for no budget.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(item, str):
            kind, equals, value = item.partition("=")
            item = {kind: _number(value) if equals else None}
        kinds = [kind for kind in ("repair", "shrink", "prune") if isinstance(item, Mapping) and kind in item]
        if len(kinds) != 1:
            raise ValueError(
                f"a step after the stream is 'repair', 'repair=BUDGET', 'shrink=SHARE' or 'prune', not {item!r}"
            )
        (kind,) = kinds
        return cls(kind, item[kind], {name: value for name, value in item.items() if name != kind})

    def __str__(self) -> str:
        return self.kind if self.amount is None else f"{self.kind}={self.amount}"

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON, and for ``parse``."""
        return {self.kind: self.amount, **self.changes}

    def config(self, config: EditorConfig) -> EditorConfig:
        """Of the editor that takes the step.

        Raises:
            ValueError: for a field that the config does not have, or a bad value.
        """
        known = [one.name for one in dataclasses.fields(config)]
        for name in self.changes:
            if name not in known:
                raise ValueError(f"the step {self} has an unknown field of the config {with_nearest(name, known)}")
        return dataclasses.replace(config, **self.changes)

    def run(
        self,
        editor: Editor,
        requests: Sequence[EditRequest],
        before: Step | None,
        *,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> dict[str, object]:
        """Do it.

        Args:
            requests: of the whole stream, in order.
            before: the last step; shares that follow each other are of the same whole.

        Returns:
            For its line in ``turns.jsonl``: ``kind``, ``requests`` solved again, ``seconds`` by part.
        """
        if self.kind == "shrink":
            kept = before.amount if before is not None and before.kind == "shrink" else 1.0
            editor.shrink(self.amount / kept)
            return {"kind": "shrink", "requests": 0, "seconds": {}}
        if self.kind == "prune":
            return {"kind": "prune", "requests": 0, "singular_values": prune(editor), "seconds": {}}
        config = self.config(editor.config)
        worker = editor
        if config != editor.config:
            worker = make_editor(editor.model, editor.tokenizer, config)
            worker.guard = editor.guard
            worker.keep_original_weights(editor.original_weights())
            worker.load_state_dict(editor.state_dict())
        report = repair(worker, requests, budget=self.amount, trunk=trunk, progress=progress)
        if worker is not editor:
            editor.load_state_dict(worker.state_dict())
        solved, seconds = (sum(getattr(done, what) for done in report.rounds) for what in ("edits", "seconds"))
        return {"kind": "repair", "requests": solved, "left_out": report.left_out, "seconds": {"repair": seconds}}


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
