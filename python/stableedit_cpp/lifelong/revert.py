"""Takes single requests out of a model again, and says what that did to them and to the others.

Two steps. The first takes out what the requests added (``AppliedPass.contribution``); the model then treats their
prompts like any other that was never edited. After a long stream that is not what the unedited model answered, because
every edit moves all prompts a little. So the second step solves for the answers that are to come back, like an edit,
with the keys of other current requests held in place: D = (H^T H + P^T P + ridge I)^(-1) H^T V for protected keys P.
Neither feeds the running statistics, which keep what they have seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import LowRankUpdate, ModuleEditor, PastKeys
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.evaluation.answers import greedy_answers, token_accuracy
from stableedit_cpp.lifelong.history import History, RequestEntry
from stableedit_cpp.lifelong.journal.restore import applied_turn
from stableedit_cpp.lifelong.view import SessionView
from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["RevertReport", "RevertedRequest", "check_revertible", "revert"]

Updates = dict[str, LowRankUpdate]
_PASSES = 20  # to bring answers back; 13 were the most in 50 reverts after 1,000 edits of SmolLM2


@dataclass(frozen=True)
class RevertedRequest:
    """What became of one request, or of one of its variants.

    Attributes:
        id: of the request. prompt, target: its own, or those of the variant.
        wanted: the answer that was to come back: that of the unedited model, or the target of the request that asked
            the same before (``follows``); None if a later one that asks the same is there anyway.
        before, after: the model's free answer, as many tokens as the wanted one (the target, if none is wanted) has.
        back: whether ``after`` is ``wanted``, token by token; None if none is wanted.
        variants: the same of each variant, in order.
    """

    id: str
    prompt: str
    target: str
    wanted: str | None
    follows: str | None
    before: str
    after: str
    back: bool | None
    variants: list[RevertedRequest] = field(default_factory=list)


@dataclass(frozen=True)
class RevertReport:
    """What a revert did. ``str()`` is for people, ``asdict`` for JSON.

    Attributes:
        turn: its number in the session.
        passes: solutions that it took to bring the answers back.
        others: how many of the other current requests were protected and scored.
        others_before, others_after: their efficacy (teacher-forced token accuracy, on variants, too); None if there are
            none.
    """

    turn: int
    requests: list[RevertedRequest]
    passes: int
    others: int
    others_before: float | None
    others_after: float | None

    @property
    def back(self) -> tuple[int, int]:
        """How many answers came back, and how many were to; those to variants count, too."""
        wanted = [answer.back for answer in self._answers if answer.back is not None]
        return sum(wanted), len(wanted)

    @property
    def again(self) -> list[tuple[str, str]]:
        """Requests that answer a question again, each with that question."""
        answers = [answer for answer in self._answers if answer.follows is not None and answer.back is not None]
        return [(answer.follows, answer.prompt.strip()) for answer in answers]

    @property
    def _answers(self) -> list[RevertedRequest]:
        return [answer for request in self.requests for answer in (request, *request.variants)]

    def __str__(self) -> str:
        lines = [
            f"{request.id}: {request.prompt!r:.60} answered {request.before!r}, now {request.after!r}"
            + ("" if request.back is not False else f" instead of {request.wanted!r}")
            for request in self._answers
        ]
        lines.append(f"turn {self.turn}: {self.back[0]} of {self.back[1]} answers are back ({self.passes} passes)")
        if self.others:
            efficacy = f"{self.others_before:.3f} before, {self.others_after:.3f} after"
            lines.append(f"efficacy of {self.others} other requests: {efficacy}")
        return "\n".join(lines)


def check_revertible(history: History, editor: Editor, ids: Sequence[str]) -> None:
    """Whether requests are in the model, and can be taken out of it alone.

    Raises:
        ValueError: naming the one that is not, or cannot.
    """
    for id in ids:
        entry = history.entries.get(id)
        if entry is None and id in history.warm_up:
            raise ValueError(f"request {id!r} belongs to the warm-up, which stays in the model; only edits can go")
        if entry is None or entry.reverted_in is not None:
            what = entry.state if entry else "not in the model (`stableedit session log --requests` lists what is)"
            raise ValueError(f"request {id!r} is {what}")
    if not ids:
        raise ValueError("request_ids is empty; name at least one request to revert")
    if not editor.owns_rows:
        turn = min(history.entries[id].turn for id in ids)
        whose = type(editor).__name__
        raise ValueError(
            f"request {ids[0]!r} cannot be reverted alone: a turn of {whose} changes the weights as one whole, of "
            f"which no part belongs to one request; rollback({turn - 1}) takes back turn {turn} and all that came "
            "after it"
        )


def revert(
    view: SessionView,
    editor: Editor,
    ids: Sequence[str],
    others: Sequence[EditRequest],
    *,
    bring_back: bool,
    progress: bool | None,
) -> tuple[RevertReport, list[Updates]]:
    """Take requests out of the editor's model.

    Args:
        ids: of requests in the model.
        others: to be protected and scored.
        bring_back: False leaves out the second step.

    Returns:
        What happened, and what was added to the weights, in order.
    """
    entries = [view.history.entries[id] for id in ids]
    own = editor.tokenize([entry.request for entry in entries])
    work = _Revert(editor, editor.tokenize(others))
    wanted, follows = _wanted(view, editor, entries, own, work)
    asked = [want or sequence for want, sequence in zip(wanted, own, strict=True)]
    answers_before = work.answers(asked)

    gone = view.history.reverted()
    for turn in sorted({turn for entry in entries for turn in (entry.turn, *entry.repairs)}, reverse=True):
        work.take_out(applied_turn(view, editor, turn), set(ids), gone)
    passes = work.bring_back([want for want in wanted if want is not None], progress) if bring_back else 0

    decode = partial(editor.form.text, editor.tokenizer)
    found = iter(
        RevertedRequest(
            id=entry.id,
            prompt=prompt,
            target=target,
            wanted=decode(want.answer) if want else None,
            follows=predecessor,
            before=decode(before),
            after=decode(after),
            back=after == want.answer if want else None,
        )
        for (entry, prompt, target), want, predecessor, before, after in zip(
            _statements(entries), wanted, follows, answers_before, work.answers(asked), strict=True
        )
    )
    requests = [replace(next(found), variants=[next(found) for _ in entry.request.variants]) for entry in entries]
    turn = view.history.next_turn
    report = RevertReport(turn, requests, passes, len(others), work.efficacy_before, work.efficacy_now())
    return report, work.added


def _statements(entries: Sequence[RequestEntry]) -> list[tuple[RequestEntry, str, str]]:
    """Entry, prompt and target of each statement, in the order of their tokens."""
    return [(entry, *statement) for entry in entries for statement in entry.request.statements]


def _wanted(
    view: SessionView, editor: Editor, entries: Sequence[RequestEntry], own: Sequence[TokenSequence], work: _Revert
) -> tuple[list[TokenSequence | None], list[str | None]]:
    """The answer that is to come back to each statement, and the id of the request that asks for it."""
    with editor.unedited():
        unedited = work.answers(own)
    wanted: list[TokenSequence | None] = []
    follows: list[str | None] = []
    ids = {entry.id for entry in entries}
    for (entry, prompt, _), sequence, answer in zip(_statements(entries), own, unedited, strict=True):
        question = prompt.strip()
        other = view.history.predecessor(question, ids)
        follows.append(other)
        if not view.history.holds(entry.id, question):
            wanted.append(None)
        elif other is not None:
            request = view.history.entries[other].request
            wanted.append(editor.tokenize([request])[list(request.answers).index(question)])
        else:
            prompt, answer = sequence.ids[: sequence.first + 1], editor.form.cut(answer)
            wanted.append(TokenSequence(prompt + answer[:-1], answer))
    return wanted, follows


class _Revert:
    """Changes the weights of an editor's model and keeps what it added.

    Attributes:
        added: the updates, in order. efficacy_before: of the others.
    """

    def __init__(self, editor: Editor, others: Sequence[TokenSequence]) -> None:
        self.editor = editor
        self.others = others
        self.added: list[Updates] = []
        self._trunk = editor.make_trunk_cache()
        self._arguments = {"max_tokens": editor.config.max_tokens_per_forward, "trunk": self._trunk}
        captured = self._capture(others) if others else None
        self.efficacy_before = float(captured.correct.double().mean()) if captured else None
        self._editors = self._module_editors(captured)

    def take_out(self, turn: AppliedTurn, ids: set[str], gone: set[str]) -> None:
        """Subtract what the requests with these ids contributed to a turn.

        Args:
            gone: ids that were taken out before: a contribution is a difference to what is there without them.
        """
        for applied in reversed(turn.passes):
            for share, sign in ((ids | gone, -1.0), (gone, 1.0)):
                # The last is that of rows that belong to no request, those of anchors: they stay.
                flags = [*(request.id in share for request in turn.requests), False]
                owned = torch.tensor(flags, device="cpu")[applied.request]
                if owned.any():
                    shares = self.editor.solver.contribution(applied, owned)
                    self._add({name: LowRankUpdate(u.left * sign, u.right) for name, u in shares.items()})

    def bring_back(self, wanted: Sequence[TokenSequence], progress: bool | None) -> int:
        """Solve until the model gives these answers; returns how many passes that took."""
        shown = None if progress is None else not progress
        with tqdm(total=len(wanted), desc="Bringing answers back", unit="answer", disable=shown, leave=False) as bar:
            for number in range(_PASSES):
                accuracy = token_accuracy(self.editor.model, wanted, **self._arguments).tolist()
                pending = [sequence for sequence, share in zip(wanted, accuracy, strict=True) if share != 1.0]
                bar.n = len(wanted) - len(pending)
                bar.set_postfix({"pass": number})
                if not pending:
                    return number
                self._add(self.editor.solver.solve(self._capture(pending), editors=self._editors).updates)
        return _PASSES

    def answers(self, sequences: Sequence[TokenSequence]) -> list[tuple[int, ...]]:
        """Free answers of the model as it is."""
        return greedy_answers(self.editor.model, sequences, **self._arguments)

    def efficacy_now(self) -> float | None:
        """Of the others."""
        return float(token_accuracy(self.editor.model, self.others, **self._arguments).mean()) if self.others else None

    def _add(self, updates: Updates) -> None:
        self.editor.weights.add(updates)
        self.added.append(updates)

    def _capture(self, sequences: Sequence[TokenSequence]) -> CapturedTurn:
        config = self.editor.config
        return capture(
            self.editor.model,
            self.editor.modules,
            sequences,
            micro_batch=config.micro_batch,
            max_tokens=config.max_tokens_per_forward,
            trunk=self._trunk,
        )

    def _module_editors(self, others: CapturedTurn | None) -> Mapping[str, ModuleEditor]:
        """Editors that hold the outputs for the others' keys in place."""
        protected: dict[str, PastKeys | None] = dict.fromkeys(self.editor.solver.module_editors)
        if others is not None:
            for name, keys in others.keys.items():
                rows, dim = keys.shape
                # So many rows, or the whole k x k moment where that is smaller: exact in both cases.
                protected[name] = PastKeys(dim, (rows + 1) // 2 if rows < dim else None)
            self.editor.solver.fold_keys(others, protected)
        return self.editor.solver.holding(protected)
