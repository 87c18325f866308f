"""One turn: solve, look what has taken, solve again for the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.anchors import Anchors
from stableedit_cpp.editors.applied import AppliedPass, AppliedTurn
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.edit_report import Failure, TurnReport
from stableedit_cpp.editors.interrupt import InterruptGuard, undisturbed
from stableedit_cpp.editors.solver import NoStep, Solution, Solver
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
    trunk: TrunkCache | None

    def look(self, edited: Sequence[TokenSequence]) -> float: ...

    def refusal(self, drift: float) -> Exception: ...


class _Refused(Exception):
    """The guard tolerates no form of a pass; ``error`` is for the user."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Work:
    """What a stream works on, and with.

    Attributes:
        form: of prompts and answers.
        anchors: add unrelated prompts to each pass (not in a warm-up); None adds none.
        trunk: outputs of the layers below the edited ones; None where there is no use for them.
        trunk_is_lent: whether it belongs to the caller, who wants to find in it what the turns have put there.
        outcomes: find out which requests took. answers: and what the model answers to the others.
        passes: as many as a turn had that is edited again; None for as many as it takes.
    """

    model: torch.nn.Module
    tokenizer: object
    config: EditorConfig
    form: Form
    weights: EditedWeights
    solver: Solver
    guard: Guard | None
    anchors: Anchors | None
    trunk: TrunkCache | None
    trunk_is_lent: bool
    outcomes: bool
    answers: bool
    passes: int | None = None

    def accuracy(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        """Share of each answer's tokens that are the model's top choice; NaN where the model is broken."""
        limit = self.config.max_tokens_per_forward
        return token_accuracy(self.model, sequences, max_tokens=limit, trunk=self.trunk)


class _Best(NamedTuple):
    """The pass of a turn after which most requests had taken, or where none did, the answers were likeliest; and the
    way back to it."""

    rank: tuple[int, float]
    passes: int
    pending: list[int]
    norms: dict[str, float]
    drift: float | None
    weights: Checkpoint | None


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
        holding = self.work.anchors.trunk if self.work.anchors is not None else None
        # Nobody but us can change weights before the followers are called: reading them once is enough.
        with trusted(self.work.trunk, guarding, holding):
            passes = self._passes(interrupts, bar, keep=followers.hear_turns)
        turn = AppliedTurn(self.kind, self.requests, passes, self.report)
        followers.applied(turn)
        with undisturbed():  # nothing may come between what is written down and what stays in the model
            followers.record(turn)
            change.settle()
            self.final = True
        return turn

    def _passes(self, interrupts: InterruptGuard, bar: tqdm, *, keep: bool) -> list[AppliedPass]:
        """Apply one pass after the other, up to the one after which most requests have taken; ``keep`` the passes if
        somebody wants to see them."""
        report, weights, count = self.report, self.work.weights, len(self.requests)
        allowed = self.work.passes or (1 if self.kind == "warm_up" else self.work.config.max_passes)
        pending = list(range(len(self.sequences)))
        passes: list[AppliedPass] = []
        best: _Best | None = None
        stuck = False
        for number in range(allowed):
            try:
                captured, solution, ridge = self._solve(pending, number, interrupts)
            except (NoStep, _Refused) as stop:
                if best is None or self.work.passes is not None:
                    raise getattr(stop, "error", stop) from None
                stuck = True
                break
            if number == 0:
                first = captured
            if keep:
                # A row that belongs to no request, -1, finds the last of these.
                owners = torch.tensor([*(self.owners[index] for index in pending), -1], device="cpu")[captured.request]
                past_keys = any(past.count > 0 for past in self.work.solver.past_keys.values())
                passes.append(AppliedPass(captured, solution.updates, owners, ridge, past_keys, solution.step_size))
            if allowed == 1:
                break
            with report.timed("capture"):
                pending, likely = self._look()
            taken = count - len({self.owners[index] for index in pending})
            report.taken.append(taken)
            bar.set_postfix({"pass": f"{number + 1}/{allowed}", "taken": f"{taken}/{count}"})
            if best is None or (taken, likely) > best.rank:
                back = Checkpoint(weights) if pending else None
                best = _Best((taken, likely), number + 1, pending, dict(report.update_norms), report.drift, back)
            if not pending:
                break
        # What came after it was no better; a turn that is edited again has as many passes as it had.
        if best is not None and self.work.passes is None and (stuck or best.passes < report.passes):
            weights.put_back(best.weights)
            report.passes, pending = best.passes, best.pending
            report.update_norms, report.drift = best.norms, best.drift
        if self.work.outcomes:
            with report.timed("outcomes"):
                report.failed = self._failures(pending if best is not None else self._look()[0])
        self.work.solver.remember(self.kind, first)
        return passes[: report.passes]

    def _solve(
        self, pending: Sequence[int], number: int, interrupts: InterruptGuard
    ) -> tuple[CapturedTurn, Solution, float]:
        """Capture, fold in, solve and apply one pass; the last of the result is the ridge."""
        work, report, ridge = self.work, self.report, self.work.config.ridge
        with interrupts.droppable():
            with report.timed("capture"):
                sequences = [self.sequences[index] for index in pending]
                captured = capture(
                    work.model,
                    work.weights.modules,
                    sequences,
                    micro_batch=work.config.micro_batch,
                    max_tokens=work.config.max_tokens_per_forward,
                    prompt_rows=work.config.prompt_rows,
                    names=[self.names[index] for index in pending],
                    trunk=work.trunk,
                )
                if work.anchors is not None and self.kind != "warm_up":
                    captured = work.anchors.join(captured, sequences)
            with report.timed("mathematics"):
                report.whitening |= work.solver.observe(self.kind, number, captured)
                solution = self._solution(captured)
            with report.timed("apply"):  # much that can go wrong does so here, where nothing has to be taken back
                for name, update in solution.updates.items():
                    work.weights[name].check(update)
        if work.guard is None:
            self._apply(solution)
        else:
            solution, ridge = self._apply_guarded(work.guard, sequences, captured, solution)
        work.solver.accept(solution.step_size)
        if number == 0:
            report.answer_tokens = sum(len(sequence.answer) for sequence in self.sequences)
            report.loss_before = float(captured.losses.mean())
            report.efficacy_before = float(captured.correct.mean())
        report.passes += 1
        return captured, solution, ridge

    def _solution(self, captured: CapturedTurn, step: float = 1.0, ridge: float = 1.0) -> Solution:
        """Solve with so many times the step size and ridge."""
        solver = self.work.solver
        solution = solver.solve(captured, solver.mode(self.kind), step=step, ridge=ridge)
        self.report.update_norms |= {name: update.norm() for name, update in solution.updates.items()}
        return solution

    def _apply(self, solution: Solution) -> None:
        with self.report.timed("apply"):
            self.work.weights.apply(solution.updates)

    def _apply_guarded(
        self, guard: Guard, sequences: Sequence[TokenSequence], captured: CapturedTurn, solution: Solution
    ) -> tuple[Solution, float]:
        """Apply what the guard tolerates: the solution, or that of a smaller step and a stronger ridge."""
        report, weights = self.report, self.work.weights
        before = Checkpoint(weights)
        for back_offs in range(guard.back_offs + 1):
            ridge = guard.ridge_factor**back_offs
            if back_offs > 0:
                report.back_offs += 1
                weights.put_back(before)
                with report.timed("mathematics"):
                    solution = self._solution(captured, guard.step_factor**back_offs, ridge)
            self._apply(solution)
            with report.timed("guard"):
                report.drift = guard.look(sequences)
            if report.drift <= guard.limit:
                return solution, self.work.config.ridge * ridge
        raise _Refused(guard.refusal(report.drift))

    def _look(self) -> tuple[list[int], float]:
        """Indices of the sequences that have not taken, and how likely the least likely tokens of all are: the mean of
        their log-probabilities, for which a gain far from taking counts like one near it."""
        config, trunk = self.work.config, self.work.trunk
        scores = answer_scores(self.work.model, self.sequences, max_tokens=config.max_tokens_per_forward, trunk=trunk)
        taken = (scores.accuracy == 1.0) & (scores.probability >= config.take_probability)
        pending = [index for index in range(len(self.sequences)) if not taken[index]]
        return pending, float(scores.probability.nan_to_num(0.0).clamp_min(sys.float_info.min).log().mean())

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
