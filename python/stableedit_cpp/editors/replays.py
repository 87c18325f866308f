"""Replays: statements of earlier turns that are solved for again beside those of a turn, lest they are forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from stableedit_cpp.editors.drawing import drawn_by, share_of
from stableedit_cpp.model.capture import CapturedTurn, capture, join
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["PastRequests", "Replays"]

# Replays for each sequence of a pass. Of 1,000 requests of ZsRE .91 hold at the end with 48 a turn of 100, .97 with 96.
_EACH = 2
_KEPT = 2**29  # bytes of trunk output after which it is forgotten: 10,000 statements of SmolLM2, 3,000 of a 7B model


class PastRequests:
    """The statements that were edited so far and still count, as token sequences: part of an editor's state.

    Of statements with one prompt the last one counts. Whoever asks a request's own prompt anew replaces the request,
    variants included (``data.superseding``).
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, ...], tuple[TokenSequence, int]] = {}  # by prompt; with the number of its request

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[TokenSequence]:
        return (sequence for sequence, _ in self._held.values())

    def add(self, sequences: Sequence[TokenSequence], owners: Sequence[int]) -> None:
        """Remember what was edited; it takes the place of what asked the same before.

        Args:
            owners: number of the request that each of the sequences belongs to, whose own prompt comes first.
        """
        self.forget(sequences)
        begin = max((number + 1 for _, number in self._held.values()), default=0)
        for sequence, owner in zip(sequences, owners, strict=True):
            self._held[_prompt(sequence)] = (sequence, begin + owner)

    def forget(self, sequences: Iterable[TokenSequence]) -> None:
        """Leave out what has the prompt of one of these, and the variants of requests whose own prompt it is."""
        asked = {_prompt(sequence) for sequence in sequences}
        own: dict[int, tuple[int, ...]] = {}
        for prompt, (_, number) in self._held.items():
            own.setdefault(number, prompt)
        gone = {number for number, prompt in own.items() if prompt in asked}
        self._held = {
            prompt: held for prompt, held in self._held.items() if prompt not in asked and held[1] not in gone
        }

    def beside(self, sequences: Iterable[TokenSequence]) -> list[TokenSequence]:
        """Those that these leave standing."""
        left = self.copy()
        left.forget(sequences)
        return list(left)

    def copy(self) -> PastRequests:
        """Another one that holds the same."""
        other = PastRequests()
        other.restore(self)
        return other

    def restore(self, other: PastRequests) -> None:
        """Hold what another one holds."""
        self._held = dict(other._held)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tokens of all, one after the other, int32; and as parts, int32 ``[n, 3]``, of each the lengths of prompt
        and answer and the number of its request, counted from 0."""
        tokens = [token for sequence in self for token in (*_prompt(sequence), *sequence.answer)]
        numbers = {
            number: rank for rank, number in enumerate(dict.fromkeys(number for _, number in self._held.values()))
        }
        parts = [
            (len(prompt), len(sequence.answer), numbers[number]) for prompt, (sequence, number) in self._held.items()
        ]
        return {
            "tokens": torch.tensor(tokens, dtype=torch.int32, device="cpu"),
            "parts": torch.tensor(parts, dtype=torch.int32, device="cpu").reshape(-1, 3),
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> PastRequests:
        """
        Raises:
            ValueError: if the lengths do not fit the tokens.
        """
        tokens, parts = state["tokens"].tolist(), state["parts"].tolist()
        stated = sum(prompt + answer for prompt, answer, _ in parts)
        if stated != len(tokens):
            raise ValueError(f"past requests have {len(tokens)} tokens, not the {stated} of their lengths")
        past, place = cls(), 0
        for prompt, answer, number in parts:
            ids = tokens[place : place + prompt + answer]
            sequence = TokenSequence(tuple(ids[:-1]), tuple(ids[prompt:]))
            past._held[_prompt(sequence)] = (sequence, number)
            place += prompt + answer
        return past


class Replays:
    """Adds to the rows of a pass those of statements of earlier turns, with the loss of their own answers.

    Where such an answer still holds its gradients are small, and its rows hold what the module gives for their keys;
    where it does not any more, it is solved for again. Experience replay for continual learning (Rolnick et al. 2019,
    arXiv 1811.11682); as rows of the same ridge system it is ours.

    Args:
        model, modules: those of the editor.
        count: the most replays that a pass may have, two for each of its sequences but no fewer than 16.
        micro_batch: as in ``capture``.
        max_tokens: tokens, padding included, in one forward pass.
    """

    def __init__(
        self, model: nn.Module, modules: Sequence[EditModule], *, count: int, micro_batch: int, max_tokens: int
    ) -> None:
        self._model, self._modules, self.count = model, modules, count
        self._how = {"micro_batch": micro_batch, "max_tokens": max_tokens}
        self.trunk = TrunkCache.where_possible(model, modules)
        self._turn: list[TokenSequence] = []

    def begin(self, sequences: Sequence[TokenSequence], past: PastRequests) -> None:
        """Draw the replays of a turn over ``sequences``: by their tokens, so that the same turn has the same ones."""
        if (
            self.trunk is not None and not self.trunk.renew() and self.trunk.bytes > _KEPT
        ):  # else statements are drawn again
            self.trunk.clear()
        held = past.beside(sequences)
        self._turn = drawn_by(sequences).sample(held, min(len(held), 2 * share_of(len(sequences), self.count, _EACH)))

    def join(self, captured: CapturedTurn, sequences: Sequence[TokenSequence]) -> CapturedTurn:
        """The rows of a pass over ``sequences``, and behind them those of some replays of the turn, which belong to
        none of its requests (-1)."""
        number = min(share_of(len(sequences), self.count, _EACH), len(self._turn))
        chosen = drawn_by(sequences).sample(self._turn, number)
        if not chosen:
            return captured
        names = [f"an earlier request, replayed ({number} of {len(chosen)})" for number in range(1, len(chosen) + 1)]
        rows = capture(self._model, self._modules, chosen, names=names, trunk=self.trunk, **self._how)
        return join(captured, rows)


def _prompt(sequence: TokenSequence) -> tuple[int, ...]:
    return sequence.ids[: sequence.first + 1]
