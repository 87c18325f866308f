"""One turn: solve, look what has taken, solve again for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.applied import AppliedPass, AppliedTurn
from stableedit_cpp.editors.checkpoint import Checkpoint
from stableedit_cpp.editors.edit_report import TurnReport
from stableedit_cpp.editors.interrupt import InterruptGuard
from stableedit_cpp.evaluation.teacher_forcing import answer_scores
from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.tokens import TokenSequence

if TYPE_CHECKING:
    from stableedit_cpp.editors.editor import Editor

__all__ = ["Turn"]


class Turn:
    """A turn of an editor, from the first capture to the last update: all of it is applied or nothing.

    Args:
        kind: "edit", "warm_up" or "repair".
        sequences, names: the requests' tokens, and what to call each in an error message.
    """

    def __init__(
        self,
        editor: Editor,
        kind: str,
        requests: Sequence[EditRequest],
        sequences: Sequence[TokenSequence],
        names: Sequence[str],
    ) -> None:
        self.editor = editor
        self.kind = kind
        self.requests = requests
        self.sequences = sequences
        self.names = names
        self.report = TurnReport(requests=len(sequences), seconds={"capture": 0.0, "mathematics": 0.0, "apply": 0.0})

    def run(self, interrupts: InterruptGuard, bar: tqdm) -> TurnReport:
        """Do it; ``bar`` shows the passes."""
        editor, report, count = self.editor, self.report, len(self.sequences)
        if editor.trunk is not None and not editor.trunk_is_lent:
            editor.trunk.clear()  # of use within the turn: its checks and retries repeat the same prompts
        # A later pass, or whoever keeps a record, can fail after a pass was applied; then the weights go back as well.
        revocable = editor.config.max_passes > 1 or editor.on_turn is not None
        before = Checkpoint(editor.weights if revocable else {}, editor.statistics())
        allowed = 1 if self.kind == "warm_up" else editor.config.max_passes
        pending = list(range(count))
        passes: list[AppliedPass] = []
        try:
            for number in range(allowed):
                captured, updates, ridge = self._solve(pending, number, interrupts)
                if number == 0:
                    first = captured
                if editor.on_turn is not None:
                    passes.append(AppliedPass(captured, updates, torch.tensor(pending)[captured.request], ridge))
                if number + 1 < allowed:
                    with report.timed("capture"):
                        pending = self._not_taken()
                    report.taken.append(count - len(pending))
                    bar.set_postfix({"pass": f"{number + 1}/{allowed}", "taken": f"{report.taken[-1]}/{count}"})
                    if not pending:
                        break
            editor.remember(self.kind, first)
            if editor.on_turn is not None:
                editor.on_turn(AppliedTurn(self.kind, self.requests, passes, report))
        except BaseException:
            before.restore()
            raise
        return report

    def _solve(
        self, pending: Sequence[int], number: int, interrupts: InterruptGuard
    ) -> tuple[CapturedTurn, dict[str, LowRankUpdate], float]:
        """Capture, fold in, solve and, only when all of it has worked, apply; the last of the result is the ridge."""
        editor, report, ridge = self.editor, self.report, self.editor.config.ridge
        with interrupts.droppable():
            with report.timed("capture"):
                captured = capture(
                    editor.model,
                    editor.modules,
                    [self.sequences[index] for index in pending],
                    micro_batch=editor.config.micro_batch,
                    max_tokens=editor.config.max_tokens_per_forward,
                    names=[self.names[index] for index in pending],
                    trunk=editor.trunk,
                )
            with report.timed("mathematics"):
                updates = editor.compute_updates(self.kind, number, captured, report)
            with report.timed("apply"):
                for name, update in updates.items():
                    editor.weights[name].check(update)
        if editor.guard is None:
            self._apply(updates)
        else:
            updates, ridge = self._apply_guarded(captured, number, updates)
        if number == 0:
            report.answer_tokens = len(captured.request)
            report.loss_before = float(captured.losses.mean())
            report.efficacy_before = float(captured.correct.mean())
        report.passes += 1
        return captured, updates, ridge

    def _apply(self, updates: Mapping[str, LowRankUpdate]) -> None:
        with self.report.timed("apply"):
            for name, update in updates.items():
                self.editor.weights[name].apply(update)

    def _apply_guarded(
        self, captured: CapturedTurn, number: int, updates: dict[str, LowRankUpdate]
    ) -> tuple[dict[str, LowRankUpdate], float]:
        """Apply what the guard tolerates: the updates, or those of a smaller step and a stronger ridge."""
        editor, guard, report = self.editor, self.editor.guard, self.report
        before = Checkpoint(editor.weights, {})
        try:
            for back_offs in range(guard.back_offs + 1):
                if back_offs > 0:
                    report.back_offs += 1
                    before.restore()
                    with report.timed("mathematics"):
                        updates = editor.compute_updates(self.kind, number, captured, report, back_offs)
                self._apply(updates)
                with report.timed("guard"):
                    report.drift = guard.drift().mean
                if report.drift <= guard.limit:
                    return updates, editor.config.ridge * guard.ridge_factor**back_offs
            raise guard.refusal(report.drift)
        except BaseException:
            before.restore()
            raise

    def _not_taken(self) -> list[int]:
        """Indices of the requests that have not taken."""
        config = self.editor.config
        if config.take_probability == 0.0:
            taken = self.editor.accuracy(self.sequences) == 1.0
        else:
            limit, trunk = config.max_tokens_per_forward, self.editor.trunk
            scores = answer_scores(self.editor.model, self.sequences, max_tokens=limit, trunk=trunk)
            taken = (scores.accuracy == 1.0) & (scores.probability >= config.take_probability)
        return [index for index in range(len(self.sequences)) if not taken[index]]
