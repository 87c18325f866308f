"""One turn: solve, look what has taken, solve again for the rest."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.applied import AppliedPass, AppliedTurn
from stableedit_cpp.editors.edit_report import Failure, TurnReport
from stableedit_cpp.editors.interrupt import InterruptGuard, undisturbed
from stableedit_cpp.editors.replays import PastRequests
from stableedit_cpp.editors.solver import NoStep, Solution
from stableedit_cpp.editors.weights import Checkpoint
from stableedit_cpp.editors.work import Guard, Work
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.evaluation.generation import generate_continuations
from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import trusted

__all__ = ["Turn", "owners_of"]


def owners_of(requests: Sequence[EditRequest]) -> list[int]:
    """Index of the request that each statement belongs to."""
    return [index for index, request in enumerate(requests) for _ in request.statements]


class _Refused(Exception):
    """The guard tolerates no form of a pass; ``error`` is for the user."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class _Best(NamedTuple):
    """The pass of a turn after which most requests seemed to hold, or where none did, the answers were likeliest; and
    the way back to it."""

    rank: tuple[int, float]
    passes: int
    norms: dict[str, float]
    drift: float | None
    weights: Checkpoint


class Turn:
    """A turn, from the first capture to the last update: all of it is applied or nothing.

    Args:
        kind: of the call that it belongs to.
        sequences, names: tokens of the requests' statements, and what to call each in an error message.

    Attributes:
        owners: index of the request that each sequence belongs to.
        holds, likely: of each sequence, as far as it was seen: whether it holds (the greedy answer is the target, with
            at least ``take_probability``), and the log-probability of the least likely token of its answer.
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
        self.owners = owners_of(requests)
        self.holds = [False] * len(sequences)
        self.likely = torch.full((len(sequences),), math.log(sys.float_info.min), dtype=torch.float64, device="cpu")
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
        work, followers = self.work, self.work.weights.followers
        guarding = work.guard.trunk if work.guard is not None else None
        # Nobody but us can change weights before the followers are called: reading them once is enough.
        with trusted(work.trunk, guarding, *(companion.trunk for companion in work.beside)):
            for companion in work.beside:
                companion.begin(self.sequences, work.solver.past_requests or PastRequests())
            passes = self._passes(interrupts, bar, keep=followers.hear_turns)
        turn = AppliedTurn(self.kind, self.requests, passes, self.report)
        ranks().everywhere("applying a turn", lambda: followers.applied(turn))
        with undisturbed():  # nothing may come between what is written down and what stays in the model
            followers.record(turn)
            change.settle()
            self.final = True
        return turn

    def _passes(self, interrupts: InterruptGuard, bar: tqdm, *, keep: bool) -> list[AppliedPass]:
        """Apply one pass after the other until all requests hold; ``keep`` the passes if somebody wants to see them.

        The capture of a pass shows which of its sequences hold already, and these are not in the next one. Once all of
        them do, or the passes are used up, all sequences of the turn are looked at: a pass for some can undo others.
        """
        work, report = self.work, self.report
        allowed = 1 if self.kind == "warm_up" else work.config.max_passes
        allowed = allowed if work.passes is None else work.passes
        pending = list(range(len(self.sequences)))
        passes: list[AppliedPass] = []
        first: CapturedTurn | None = None
        best: _Best | None = None
        done = False
        for number in range(allowed):
            norms, drift = dict(report.update_norms), report.drift
            statistics = [(part, part.copy()) for part in work.weights.statistics.values()]
            try:
                with interrupts.droppable():
                    captured = self._capture(pending)
                    if number == 0:
                        self._note_before(captured, allowed)
                        if report.held == len(self.requests):
                            done = True
                            break
                    else:
                        captured, pending, left = self._left(captured, pending)
                        self._show(bar, allowed)
                        if not left:
                            done = True
                            break
                        if best is None or self._rank() > best.rank:
                            best = _Best(self._rank(), number, norms, drift, Checkpoint(work.weights))
                    captured = self._with_companions(captured, pending)
                    solution = self._solve(captured, number)
                solution = self._apply_pass(captured, solution)
            except (NoStep, _Refused) as stop:
                if number == 0 or work.passes is not None:
                    raise getattr(stop, "error", stop) from None
                report.update_norms, report.drift = norms, drift
                for part, before in statistics:
                    part.restore(before)
                break
            if number == 0:
                first, left = captured, pending
            if keep:
                # A row that belongs to no request, -1, finds the last of these.
                owners = torch.tensor([*(self.owners[index] for index in pending), -1], device="cpu")[captured.request]
                past_keys = any(past.count > 0 for past in work.solver.past_keys.values())
                solved = (past_keys, solution.step_size)
                passes.append(AppliedPass(captured, solution.updates, owners, solution.ridge, *solved))
            pending = left
        if allowed > 1 and not done:
            self._look()
            self._show(bar, allowed)
            if best is not None and work.passes is None:
                self._return_to(best)
        if work.outcomes:
            with report.timed("outcomes"):
                if allowed == 1:
                    self._look()
                report.failed = self._failures([index for index, holds in enumerate(self.holds) if not holds])
        work.solver.remember(self.kind, first, self.sequences, self.owners)
        return passes[: report.passes]

    def _note_before(self, captured: CapturedTurn, allowed: int) -> None:
        """What the first capture shows of the model before the turn."""
        report = self.report
        report.answer_tokens = sum(len(sequence.answer) for sequence in self.sequences)
        report.loss_before = float(captured.losses.mean())
        report.efficacy_before = float(captured.correct.mean())
        # A repair may ask for more than the config does, and a turn that is done again had passes.
        if self.kind == "edit" and allowed > 1 and self.work.passes is None:
            self._note(range(len(self.sequences)), captured.correct == 1.0, captured.probability)
            report.held = self._taken()

    def _left(self, captured: CapturedTurn, pending: list[int]) -> tuple[CapturedTurn, list[int], list[int]]:
        """What is to be solved for, as it was captured, and which sequences of it do not hold; where all of it does,
        whatever of the whole turn does not."""
        self._note(pending, captured.correct == 1.0, captured.probability)
        left = [index for index in pending if not self.holds[index]]
        if not left:
            left = pending = self._look()
            if left:
                captured = self._capture(left)
        return captured, pending, left

    def _return_to(self, best: _Best) -> None:
        """Go back to the pass that seemed the best, if what came after it is worse."""
        report, weights, rank = self.report, self.work.weights, self._rank()
        if best.passes == report.passes or best.rank <= rank:
            return
        last, holds, likely = Checkpoint(weights), list(self.holds), self.likely.clone()
        weights.put_back(best.weights)
        self._look()
        if self._rank() > rank:
            report.passes, report.update_norms, report.drift = best.passes, best.norms, best.drift
        else:  # it seemed so only because nobody had looked at the others
            weights.put_back(last)
            self.holds, self.likely = holds, likely

    def _capture(self, pending: Sequence[int]) -> CapturedTurn:
        work = self.work
        with self.report.timed("capture"):
            sequences = [self.sequences[index] for index in pending]
            return capture(
                work.model,
                work.weights.modules,
                sequences,
                micro_batch=work.config.micro_batch,
                max_tokens=work.config.max_tokens_per_forward,
                prompt_rows=work.config.prompt_rows,
                names=[self.names[index] for index in pending],
                trunk=work.trunk,
            )

    def _with_companions(self, captured: CapturedTurn, pending: Sequence[int]) -> CapturedTurn:
        """The rows of anchors and replays behind those of the turn's own."""
        with self.report.timed("capture"):
            sequences = [self.sequences[index] for index in pending]
            for companion in self.work.beside:
                captured = companion.join(captured, sequences)
            return captured

    def _solve(self, captured: CapturedTurn, number: int) -> Solution:
        """Fold in and solve one pass, and look whether it can be applied."""
        work, report = self.work, self.report
        with report.timed("mathematics"):
            report.whitening |= work.solver.observe(self.kind, number, captured)
            solution = self._solution(captured, ridge=self._easing())
        with report.timed("apply"):  # much that can go wrong does so here, where nothing has to be taken back
            work.weights.check(solution.updates)
        return solution

    def _apply_pass(self, captured: CapturedTurn, solution: Solution) -> Solution:
        """Apply one pass; returns what was applied."""
        work, report = self.work, self.report
        if work.guard is None:
            self._apply(solution)
        else:
            solution = self._apply_guarded(work.guard, captured, solution)
        work.solver.accept(solution.step_size, solution.ridge)
        report.passes += 1
        return solution

    def _easing(self) -> float:
        """How many times the configured ridge the next pass has: a tenth for each pass from the third on after which
        no more requests held than after the one before. Where the keys of requests are much alike, as those of some
        attention outputs are, what tells them apart is small beside a ridge that suits other models. Only with an
        automatic step, which fits any ridge; a number is stated for one."""
        if self.work.solver.step is None:
            return 1.0
        return 0.1 ** sum(after <= before for before, after in pairwise(self.report.taken[1:]))

    def _solution(self, captured: CapturedTurn, step: float = 1.0, ridge: float = 1.0) -> Solution:
        """Solve with so many times the step size and ridge."""
        solver = self.work.solver
        solution = solver.solve(captured, solver.mode(self.kind), step=step, ridge=ridge)
        updates = list(solution.updates.values())
        norms = ranks().shared("measuring updates", [1.0] * len(updates), lambda number: updates[number].norm())
        self.report.update_norms |= dict(zip(solution.updates, norms, strict=True))
        return solution

    def _apply(self, solution: Solution) -> None:
        with self.report.timed("apply"):
            self.work.weights.apply(solution.updates)

    def _apply_guarded(self, guard: Guard, captured: CapturedTurn, solution: Solution) -> Solution:
        """Apply what the guard tolerates: the solution, or that of a smaller step and a stronger ridge."""
        report, weights = self.report, self.work.weights
        before = Checkpoint(weights)
        if report.passes == 0:
            with report.timed("guard"):
                guard.begin(self.sequences)
        for back_offs in range(guard.back_offs + 1):
            if back_offs > 0:
                report.back_offs += 1
                weights.put_back(before)
                ridge = self._easing() * guard.ridge_factor**back_offs
                with report.timed("mathematics"):
                    solution = self._solution(captured, guard.step_factor**back_offs, ridge)
            self._apply(solution)
            with report.timed("guard"):
                seen = guard.look()
            report.drift, report.drift_limit = seen.drift, guard.limit
            if seen.within:
                return solution
        weights.put_back(before)
        raise _Refused(guard.refusal(seen))

    def _look(self) -> list[int]:
        """Look at all sequences; returns the indices of those that do not hold."""
        config, trunk = self.work.config, self.work.trunk
        with self.report.timed("capture"):
            how = {"max_tokens": config.max_tokens_per_forward, "trunk": trunk}
            scores = answer_scores(self.work.model, self.sequences, **how)
        self._note(range(len(self.sequences)), scores.accuracy == 1.0, scores.probability)
        return [index for index, holds in enumerate(self.holds) if not holds]

    def _note(self, indices: Sequence[int], right: torch.Tensor, probability: torch.Tensor) -> None:
        """What was seen of these sequences: whether all answer tokens are the top choice, and how likely the least
        likely one of them is."""
        holds = right & (probability >= self.work.config.take_probability)
        for index, one in zip(indices, holds.tolist(), strict=True):
            self.holds[index] = one
        self.likely[list(indices)] = probability.double().nan_to_num(0.0).clamp_min(sys.float_info.min).log()

    def _taken(self) -> int:
        left = {owner for owner, holds in zip(self.owners, self.holds, strict=True) if not holds}
        return len(self.requests) - len(left)

    def _rank(self) -> tuple[int, float]:
        """How many requests hold, and the mean log-probability of the least likely token of each answer, for which a
        gain far from holding counts like one near it; as far as it was seen."""
        return self._taken(), float(self.likely.mean())

    def _show(self, bar: tqdm, allowed: int) -> None:
        """Note, and show, how many requests hold after the passes so far."""
        taken, report = self._taken(), self.report
        report.taken = [*report.taken[: report.passes - 1], taken]
        bar.set_postfix({"pass": f"{report.passes}/{allowed}", "taken": f"{taken}/{len(self.requests)}"})

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
