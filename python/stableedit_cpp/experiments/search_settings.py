"""What a search tries, and how it judges."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from stableedit_cpp.files.words import check_whole, with_nearest

__all__ = ["SearchSettings"]

# The edits, their paraphrases and everything else weigh the same; the first two half teacher-forced, half free.
_WEIGHTS = {"efficacy": 1.0, "efficacy_free": 1.0, "generalization": 1.0, "generalization_free": 1.0}
_WEIGHTS |= {"locality_agreement": 2.0}
_FIXED = ("edit_modules", "turn_size")  # a run is planned with them


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """
    Attributes:
        values: fields of the editor's config, each with the values to try; every combination is a trial.
        edits: so many requests that follow the stream in the data set, and are no part of it, are edited in a trial.
        score: weights of the scores whose weighted mean a trial is judged by; those that no request has a prompt for
            are left out.
        found: the values of the best trial; None before it.
    """

    values: Mapping[str, list]
    edits: int = 200
    score: Mapping[str, float] = field(default_factory=lambda: dict(_WEIGHTS))
    found: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping) or not self.values:
            raise ValueError(f"search must map fields of the editor's config to lists of values, not {self.values!r}")
        for name, values in self.values.items():
            if name in _FIXED:
                raise ValueError(f"a search cannot try {name}; make each an editor of its own")
            if not isinstance(values, list) or not values:
                raise ValueError(f"search of {name} must be a list of values, e.g. [1.0e-4, 3.0e-4], not {values!r}")
        check_whole("edits of the search", self.edits)
        if not isinstance(self.score, Mapping) or not self.score:
            raise ValueError(f"score of the search must map scores to weights, not {self.score!r}")
        for name, weight in self.score.items():
            if name == "locality_kl":
                raise ValueError("more locality_kl is worse; the score of a search takes locality_agreement")
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name} in the score of the search must be positive, not {weight!r}")

    def grid(self) -> Iterator[dict[str, object]]:
        """Every combination of the values, in order."""
        for chosen in itertools.product(*self.values.values()):
            yield dict(zip(self.values, chosen, strict=True))

    def score_of(self, means: Mapping[str, float]) -> float | None:
        """The weighted mean of the scores that there are.

        Raises:
            ValueError: where there is none of them.
        """
        held = {name: weight for name, weight in self.score.items() if name in means}
        if not held:
            raise ValueError(f"the search has no score: {with_nearest(next(iter(self.score)), means)}")
        return sum(weight * means[name] for name, weight in held.items()) / sum(held.values())

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return asdict(self)
