"""What prompts are about, told by their tokens: which unrelated prompts are near a request, and which too near."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["Topics"]

_RARE = 0.02  # a token in no more than this share of the prompts says what a prompt is about


class Topics:
    """Compares requests with fixed prompts.

    Args:
        prompts: token ids, in the form of the requests, so that what a form adds is in all of them and weighs nothing.
    """

    def __init__(self, prompts: Sequence[tuple[int, ...]]) -> None:
        counts = Counter(token for prompt in prompts for token in set(prompt))
        self._with: dict[int, list[int]] = {}
        for index, prompt in enumerate(prompts):
            for token in set(prompt):
                self._with.setdefault(token, []).append(index)
        self._weight = {token: math.log(len(prompts) / count) ** 2 for token, count in counts.items()}
        self._norm = [math.sqrt(sum(self._weight[token] for token in set(prompt))) for prompt in prompts]
        self._rare = [{t for t in prompt if counts[t] <= max(1, _RARE * len(prompts))} for prompt in prompts]
        fewest = [min((counts[token] for token in rare), default=0) for rare in self._rare]
        self._rarest = [{t for t in rare if counts[t] == least} for rare, least in zip(self._rare, fewest, strict=True)]
        self._found: dict[TokenSequence, tuple[int, ...]] = {}  # a stream asks for its past again and again

    def about(self, sequence: TokenSequence) -> tuple[int, ...]:
        """The prompts that ask for what the sequence does: one of their rarest tokens, and half of their rare ones, are
        in its prompt."""
        if sequence not in self._found:
            asked = _asked(sequence)
            close = {index for token in asked for index in self._with.get(token, ()) if token in self._rarest[index]}
            self._found[sequence] = tuple(i for i in close if 2 * len(self._rare[i] & asked) >= len(self._rare[i]))
        return self._found[sequence]

    def nearest(self, sequences: Iterable[TokenSequence], count: int, among: Collection[int]) -> list[int]:
        """The ``count`` prompts of ``among`` that are nearest to one of the sequences: by the cosine of their sets of
        tokens, each weighted by its inverse document frequency. Fewer, where fewer share a token with any."""
        best: dict[int, float] = {}
        for sequence in sequences:
            shared: Counter[int] = Counter()
            asked = _asked(sequence)
            for token in asked:
                for index in self._with.get(token, ()):
                    shared[index] += self._weight[token]
            size = math.sqrt(sum(self._weight.get(token, 0.0) for token in asked))
            for index, weight in shared.items():
                if weight > 0:
                    best[index] = max(best.get(index, 0.0), weight / (size * self._norm[index]))
        ranked = sorted((index for index in among if index in best), key=lambda index: (-best[index], index))
        return ranked[:count]


def _asked(sequence: TokenSequence) -> set[int]:
    return set(sequence.ids[: sequence.first + 1])
