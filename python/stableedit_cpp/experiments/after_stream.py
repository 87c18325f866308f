"""What is done to a model once its stream is at its end: repairs, and keeping a share of what was added."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import Editor, make_editor
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.files.words import check_whole, with_nearest
from stableedit_cpp.lifelong.repair import repair
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Step"]


@dataclass(frozen=True)
class Step:
    """A round of repair, or a shrinking.

    Attributes:
        budget: of a repair: how many requests at most are solved again, those nearest to holding first; None takes all.
        share: of what editing has added, that is kept; None for a repair.
        changes: of a repair: fields of the editor's config that are different meanwhile.
    """

    budget: int | None = None
    share: float | None = None
    changes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_whole("repair", self.budget, none=True)
        if self.share is not None and not (isinstance(self.share, float) and 0 < self.share <= 1):
            raise ValueError(f"shrink must be greater than 0 and at most 1, not {self.share!r}")
        if self.share is not None and self.changes:
            raise ValueError(f"shrink takes no fields of a config, not {', '.join(self.changes)}")

    @classmethod
    def parse(cls, item: str | Mapping[str, object]) -> Step:
        """``repair``, ``repair=280`` (a budget) or ``shrink=0.9``; or as a mapping with fields of the config beside it,
        e.g. ``{"repair": 280, "step_size": 1e-4}``, where None stands for no budget.

        Raises:
            ValueError: for anything else.
        """
        if isinstance(item, str):
            kind, equals, value = item.partition("=")
            item = {kind: _number(value) if equals else None}
        kinds = [kind for kind in ("repair", "shrink") if isinstance(item, Mapping) and kind in item]
        if len(kinds) != 1:
            raise ValueError(f"a step after the stream is 'repair', 'repair=BUDGET' or 'shrink=SHARE', not {item!r}")
        changes = {name: value for name, value in item.items() if name != kinds[0]}
        value = item[kinds[0]]
        if kinds == ["shrink"]:
            return cls(share=float(value) if isinstance(value, int) and value is not True else value, changes=changes)
        return cls(budget=value, changes=changes)

    def __str__(self) -> str:
        if self.share is not None:
            return f"shrink={self.share:g}"
        return "repair" if self.budget is None else f"repair={self.budget}"

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON, and for ``parse``."""
        return {"shrink": self.share} if self.share is not None else {"repair": self.budget, **self.changes}

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
        self, editor: Editor, requests: Sequence[EditRequest], before: Step | None, trunk: TrunkCache | None
    ) -> dict[str, object]:
        """Do it.

        Args:
            requests: of the whole stream, in order.
            before: the last step; shares that follow each other are of the same whole.

        Returns:
            For its line in ``turns.jsonl``: ``kind``, ``requests`` solved again, ``seconds`` by part.
        """
        if self.share is not None:
            kept = before.share if before is not None and before.share is not None else 1.0
            editor.shrink(self.share / kept)
            return {"kind": "shrink", "requests": 0, "share": self.share, "seconds": {}}
        config = self.config(editor.config)
        worker = editor
        if config != editor.config:
            worker = make_editor(editor.model, editor.tokenizer, config)
            worker.keep_original_weights(editor.original_weights())
            worker.load_state_dict(editor.state_dict())
        report = repair(worker, requests, budget=self.budget, trunk=trunk, progress=False)
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
