"""A turn of an editor that locates facts: find what is to be said, then write it layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.applied import AppliedPass
from stableedit_cpp.editors.interrupt import InterruptGuard
from stableedit_cpp.editors.locating import Locator
from stableedit_cpp.editors.targets import Targets
from stableedit_cpp.editors.turn import Turn
from stableedit_cpp.editors.weights import Checkpoint
from stableedit_cpp.model.capture import CapturedTurn

__all__ = ["LocateTurn"]


@dataclass(frozen=True)
class _Written:
    """What was added to the weights, by module name: one row a statement.

    Attributes:
        keys: that were solved with. residuals: what was to be added to the modules' outputs for them.
    """

    updates: dict[str, LowRankUpdate]
    keys: dict[str, torch.Tensor]
    residuals: dict[str, torch.Tensor]


class LocateTurn(Turn):
    """One pass, of which each row belongs to a statement: targets for all of them at once, then module by module keys
    and what is left to be written, both looked at in the model as the modules below have just become.

    A module's keys depend on the layers below it alone, so that they are the same after the turn; released code reads
    them again for the past keys.

    Args:
        locator: looks at the model. Others as for ``Turn``.
    """

    def __init__(self, locator: Locator, *arguments: object) -> None:
        super().__init__(*arguments)
        self.locator = locator

    def _passes(self, interrupts: InterruptGuard, bar: tqdm, *, keep: bool) -> list[AppliedPass]:
        work, report, locator = self.work, self.report, self.locator
        locator.begin()
        with interrupts.droppable(), report.timed("targets"):
            prefixes = locator.prefixes(self.requests, self.names)
            facts = locator.facts(self.requests, prefixes, self.names)
            targets = locator.targets(facts, self.names)
        report.answer_tokens = sum(len(sequence.answer) for sequence in self.sequences)
        report.loss_before = float(targets.losses_before.mean())
        report.efficacy_before = float(targets.correct_before.mean())
        written, step, ridge = self._write_guarded(interrupts, prefixes, targets)
        report.passes = 1
        if work.outcomes:
            with report.timed("outcomes"):
                self._look()
                report.failed = self._failures([index for index, holds in enumerate(self.holds) if not holds])
        captured, past_keys = self._captured(written, targets), work.solver.holds_keys
        owners = torch.tensor(self.owners, device="cpu")
        work.solver.remember(self.kind, captured, self.sequences, self.owners)
        return [AppliedPass(captured, written.updates, owners, ridge, past_keys, step)] if keep else []

    def _write_guarded(
        self, interrupts: InterruptGuard, prefixes: Sequence[Sequence[tuple[int, ...]]], targets: Targets
    ) -> tuple[_Written, float, float]:
        """Write as much as the guard tolerates; returns with which step and ridge."""
        work, report, guard = self.work, self.report, self.work.guard
        before = Checkpoint(work.weights)
        if guard is not None:
            with report.timed("guard"):
                guard.begin(self.sequences)
        for back_offs in range(1 if guard is None else guard.back_offs + 1):
            step = 1.0 if guard is None else guard.step_factor**back_offs
            ridge = 1.0 if guard is None else guard.ridge_factor**back_offs
            if back_offs > 0:
                report.back_offs += 1
                work.weights.put_back(before)
            with interrupts.droppable():
                written = self._write(prefixes, targets, step, ridge)
            found = written, work.config.step_size * step, work.config.ridge * ridge
            if guard is None:
                return found
            with report.timed("guard"):
                seen = guard.look()
            report.drift, report.drift_limit = seen.drift, guard.limit
            if seen.within:
                return found
        raise guard.refusal(seen)

    def _write(
        self, prefixes: Sequence[Sequence[tuple[int, ...]]], targets: Targets, step: float, ridge: float
    ) -> _Written:
        """Module by module, the last of which is to write what those before it have left: with so many times the
        configured step and ridge."""
        work, report, written = self.work, self.report, _Written({}, {}, {})
        for number, module in enumerate(work.weights.modules):
            with report.timed("capture"):
                keys, states = self.locator.look(module, prefixes)
            with report.timed("mathematics"):
                share = work.config.step_size * step / (len(work.weights.modules) - number)
                residual = ((targets.z - states) * share).to(keys.device)
                update, keys = work.solver.solve_located(module.name, keys, residual, ridge)
                update = module.at_home(update)
            with report.timed("apply"):
                work.weights[module.name].check(update)
                work.weights.apply({module.name: update})
            report.update_norms[module.name] = update.norm()
            written.updates[module.name], written.keys[module.name] = update, keys
            written.residuals[module.name] = residual
        return written

    def _captured(self, written: _Written, targets: Targets) -> CapturedTurn:
        """The rows as those who keep a record know them. Value gradients are those of half the squared residual."""
        count = len(self.sequences)
        return CapturedTurn(
            written.keys,
            {name: -residual for name, residual in written.residuals.items()},
            torch.arange(count, device="cpu"),
            torch.zeros(count, dtype=torch.long, device="cpu"),
            targets.losses_before,
            targets.correct_before,
        )
