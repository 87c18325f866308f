"""The tokens of what requests state: all checked before the first turn, those of a long stream made turn by turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.stream import parts_of
from stableedit_cpp.editors.ahead import AHEAD
from stableedit_cpp.editors.stream import names_of
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.tokens import TokenSequence, context_length, tokenize

__all__ = ["Statements"]


@dataclass(frozen=True)
class Statements:
    """As a model and its tokenizer see them, in a form."""

    model: torch.nn.Module
    tokenizer: object
    form: Form

    def tokens(self, requests: Sequence[EditRequest], names: Sequence[str] | None = None) -> list[TokenSequence]:
        """Of each request prompt and target, then its variants.

        Args:
            names: what to call each statement in an error message (``stream.names_of``).

        Raises:
            ValueError: as ``model.tokens.tokenize``.
        """
        pairs = [statement for request in requests for statement in request.statements]
        return tokenize(self.tokenizer, pairs, context_length(self.model), names or names_of(requests), self.form)

    def check(self, requests: Sequence[EditRequest], progress: bool | None = None) -> None:
        """Raise what is wrong with any of the requests; of a long stream one part after the other."""
        shown = None if progress is None else not progress
        long = isinstance(requests, Spool)
        with tqdm(total=len(requests), desc="Checking", unit="request", disable=shown if long else True) as bar:
            for begin, part in parts_of(requests):
                places = requests.places(begin, begin + len(part)) if long else None
                self.tokens(part, names_of(part, begin, places))
                bar.update(len(part))

    def of_turns(
        self,
        requests: Sequence[EditRequest],
        turn_size: int,
        progress: bool | None,
        whole: Callable[[Sequence[EditRequest]], list[TokenSequence]],
    ) -> Callable[[Sequence[EditRequest], int], list[TokenSequence]]:
        """Checks all requests, and gives what gives the tokens of a turn from its requests and the number of the first
        one: those are kept of a few turns only.

        Args:
            whole: gives those of a short stream; ``Editor.tokenize``, which an editor may have made its own.
        """
        if len(requests) <= AHEAD * turn_size:
            every = whole(requests)
            begins = list(accumulate((len(request.statements) for request in requests), initial=0))
            return lambda part, begin: every[begins[begin] : begins[begin + len(part)]]
        self.check(requests, progress)
        # Of tokenizers one thread each: what others ask of this one meanwhile may change its settings.
        own = replace(self, tokenizer=copy.deepcopy(self.tokenizer))
        return lambda part, begin: own.tokens(part, names_of(part, begin))
