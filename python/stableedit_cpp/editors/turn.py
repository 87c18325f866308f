"""One turn: solve, look what has taken, solve again for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.applied import AppliedPass, AppliedTurn
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.edit_report import Failure, TurnReport
from stableedit_cpp.editors.interrupt import InterruptGuard, undisturbed
from stableedit_cpp.editors.solver import Solver
from stableedit_cpp.editors.weights import Checkpoint, EditedWeights
from stableedit_cpp.evaluation.answers import answer_scores, token_accuracy
from stableedit_cpp.evaluation.generation import generate_continuations
from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache, trusted

__all__ = ["Guard", "Turn", "Work"]


class Guard(Protocol):
    """Measures after every pass whether it may stay (``LocalityGuard``)."""

    limit: float
    back_offs: int
    step_factor: float
    ridge_factor: float

    def drift(self): ...

    def refusal(self, drift: float) -> Exception: ...


@dataclass(frozen=True)
class Work:
    """What a stream works on, and with.

    Attributes:
        form: of prompts and answers.
        trunk: outputs of the layers below the edited ones; None where there is no use for them.
        trunk_is_lent: whether it belongs to the caller, who wants to find in it what the turns have put there.
        outcomes: find out which requests took. answers: and what the model answers to the others.
    """

    model: torch.nn.Module
    tokenizer: object
    config: EditorConfig
    form: Form
    weights: EditedWeights
    solver: Solver
    guard: Guard | None
    trunk: TrunkCache | None
    trunk_is_lent: bool
    outcomes: bool
    answers: bool

    def accuracy(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Share of each answer's tokens that are the model's top choice; NaN where the model is broken."""
        limit = self.config.max_tokens_per_forward
        return token_accuracy(self.model, sequences, max_tokens=limit, trunk=self.trunk)


class Turn:
    """A turn, from the first capture to the last update: all of it is applied or nothing.

    Args:
        kind: of the call that it belongs to.
        sequences, names: tokens of the requests' statements, and what to call each in an error message.

    Attributes:
        owners: index of the request that each sequence belongs to.
        report: what it does. final: whether it stays in the model, whatever is raised now.
    """

    def __init__(
        self,
        work: Work,
        kind: Literal["edit", "warm_up", "repair"],
        requests: Sequence[EditRequest],
        sequences: Sequence[TokenSequence],
        names: Sequence[str],
    ) -> None:
        self.work = work
        self.kind = kind
        self.requests = requests
        self.sequences = sequences
        self.names = names
        self.owners = [index for index, request in enumerate(requests) for _ in request.statements]
        self.final = False
        self.report = TurnReport(requests=len(requests), seconds={"capture": 0.0, "mathematics": 0.0, "apply": 0.0})

    def run(self, interrupts: InterruptGuard, bar: tqdm) -> None:
        """Do it; ``bar`` shows the passes."""
        work = self.work
        if work.trunk is not None and not work.trunk_is_lent:
            work.trunk.clear()  # of use within the turn: its checks and retries repeat the same prompts
        turn = work.weights.change(lambda change: self._apply_all(change, interrupts, bar))
        work.weights.followers.final(turn)

    def _apply_all(self, change: Checkpoint, interrupts: InterruptGuard, bar: tqdm) -> AppliedTurn:
        followers = self.work.weights.followers
        guarding = self.work.guard.trunk if self.work.guard is not None else None
        # Nobody but us can change weights before the followers are called: reading them once is enough.
        with trusted(self.work.trunk, guarding):
            passes = self._passes(interrupts, bar, keep=followers.hear_turns)
        turn = AppliedTurn(self.kind, self.requests, passes, self.report)
        followers.applied(turn)
        with undisturbed():  # nothing may come between what is written down and what stays in the model
            followers.record(turn)
            change.settle()
            self.final = True
        return turn

    def _passes(self, interrupts: InterruptGuard, bar: tqdm, *, keep: bool) -> list[AppliedPass]:
        """Apply one pass after the other; ``keep`` them if somebody wants to see them."""
        report, count = self.report, len(self.requests)
        allowed = 1 if self.kind == "warm_up" else self.work.config.max_passes
        pending = list(range(len(self.sequences)))
        passes: list[AppliedPass] = []
        for number in range(allowed):
            captured, updates, ridge = self._solve(pending, number, interrupts)
            if number == 0:
                first = captured
            if keep:
                owners = torch.tensor([self.owners[index] for index in pending], device="cpu")[captured.request]
                past_keys = any(past.count > 0 for past in self.work.solver.past_keys.values())
                passes.append(AppliedPass(captured, updates, owners, ridge, past_keys))
            if number + 1 < allowed:
                with report.timed("capture"):
                    pending = self._not_taken()
                report.taken.append(count - len({self.owners[index] for index in pending}))
                bar.set_postfix({"pass": f"{number + 1}/{allowed}", "taken": f"{report.taken[-1]}/{count}"})
                if not pending:
                    break
        if self.work.outcomes:
            with report.timed("outcomes"):
                report.failed = self._failures(self._not_taken() if pending else [])
        self.work.solver.remember(self.kind, first)
        return passes

    def _solve(
        self, pending: Sequence[int], number: int, interrupts: InterruptGuard
    ) -> tuple[CapturedTurn, dict[str, LowRankUpdate], float]:
        """Capture, fold in, solve and apply one pass; the last of the result is the ridge."""
        work, report, ridge = self.work, self.report, self.work.config.ridge
        with interrupts.droppable():
            with report.timed("capture"):
                captured = capture(
                    work.model,
                    work.weights.modules,
                    [self.sequences[index] for index in pending],
                    micro_batch=work.config.micro_batch,
                    max_tokens=work.config.max_tokens_per_forward,
                    names=[self.names[index] for index in pending],
                    trunk=work.trunk,
                )
            with report.timed("mathematics"):
                report.whitening |= work.solver.observe(self.kind, number, captured)
                updates = self._updates(captured)
            with report.timed("apply"):  # much that can go wrong does so here, where nothing has to be taken back
                for name, update in updates.items():
                    work.weights[name].check(update)
        if work.guard is None:
            self._apply(updates)
        else:
            updates, ridge = self._apply_guarded(work.guard, captured, updates)
        if number == 0:
            report.answer_tokens = len(captured.request)
            report.loss_before = float(captured.losses.mean())
            report.efficacy_before = float(captured.correct.mean())
        report.passes += 1
        return captured, updates, ridge

    def _updates(self, captured: CapturedTurn, step: float = 1.0, ridge: float = 1.0) -> dict[str, LowRankUpdate]:
        """Solve with so many times the configured step size and ridge."""
        solver, config = self.work.solver, self.work.config
        editors = None if step == ridge == 1.0 else solver.with_strength(config.step_size * step, config.ridge * ridge)
        updates = solver.solve(captured, editors, solver.mode(self.kind))
        self.report.update_norms |= {name: update.norm() for name, update in updates.items()}
        return updates

    def _apply(self, updates: dict[str, LowRankUpdate]) -> None:
        with self.report.timed("apply"):
            self.work.weights.apply(updates)

    def _apply_guarded(
        self, guard: Guard, captured: CapturedTurn, updates: dict[str, LowRankUpdate]
    ) -> tuple[dict[str, LowRankUpdate], float]:
        """Apply what the guard tolerates: the updates, or those of a smaller step and a stronger ridge."""
        report, weights = self.report, self.work.weights
        before = Checkpoint(weights)
        for back_offs in range(guard.back_offs + 1):
            ridge = guard.ridge_factor**back_offs
            if back_offs > 0:
                report.back_offs += 1
                weights.put_back(before)
                with report.timed("mathematics"):
                    updates = self._updates(captured, guard.step_factor**back_offs, ridge)
            self._apply(updates)
            with report.timed("guard"):
                report.drift = guard.drift().mean
            if report.drift <= guard.limit:
                return updates, self.work.config.ridge * ridge
        raise guard.refusal(report.drift)

    def _not_taken(self) -> list[int]:
        """Indices of the sequences that have not taken."""
        config = self.work.config
        if config.take_probability == 0.0:
            taken = self.work.accuracy(self.sequences) == 1.0
        else:
            limit, trunk = config.max_tokens_per_forward, self.work.trunk
            scores = answer_scores(self.work.model, self.sequences, max_tokens=limit, trunk=trunk)
            taken = (scores.accuracy == 1.0) & (scores.probability >= config.take_probability)
        return [index for index in range(len(self.sequences)) if not taken[index]]

    def _failures(self, indices: Sequence[int]) -> list[Failure]:
        """The requests that these sequences belong to, and what the model answers to them."""
        work, texts = self.work, [None] * len(indices)
        asked = [prompt for request in self.requests for prompt, _ in request.statements]
        prompts = [asked[index] for index in indices]
        if work.answers:
            lengths = [len(self.sequences[index].answer) for index in indices]
            how = {"form": work.form, "max_tokens": work.config.max_tokens_per_forward}
            answers = generate_continuations(work.model, work.tokenizer, prompts, lengths, **how)
            texts = [answer.text.strip() for answer in answers]
        found: dict[int, dict[str, str | None]] = {}
        for index, prompt, text in zip(indices, prompts, texts, strict=True):
            found.setdefault(self.owners[index], {})[prompt] = text
        return [Failure.of(index, self.requests[index], answers) for index, answers in found.items()]
