"""What a trial of a set of modules is worth, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import torch

__all__ = ["Shares", "Trial"]

_RESAMPLES = 1000


@dataclass(frozen=True)
class Shares:
    """What came of a trial, float64 on the CPU; each in [0, 1], the more the better.

    Attributes:
        taken: ``[requests]``, 1 where the greedy answers to a request and all its variants are the targets and, with
            ``end_of_answer``, stop there.
        paraphrases: ``[requests]``, the same of the rephrased prompt, which is not edited; NaN where there is none.
        kept: ``[prompts]``, share of the unedited model's own greedy answer to an unrelated prompt of which every token
            is still the top choice when the answer so far is given.
    """

    taken: torch.Tensor
    paraphrases: torch.Tensor
    kept: torch.Tensor

    @property
    def score(self) -> float:
        """The harmonic mean of the means, as the field's score S has it (ROME, arXiv 2202.05262): one of them alone
        near 0 makes it small."""
        return float(
            self._scores(
                *(torch.arange(len(part), device=part.device).unsqueeze(0) for part in (self.taken, self.kept))
            )
        )

    def noise(self, other: Shares) -> float:
        """Standard error of the difference of two scores: both trials have the same requests and unrelated prompts,
        which are drawn again together (paired bootstrap, seeded)."""
        draw = torch.Generator(device="cpu").manual_seed(0)
        drawn = [
            torch.randint(len(part), (_RESAMPLES, len(part)), generator=draw, device="cpu")
            for part in (self.taken, self.kept)
        ]
        return float((self._scores(*drawn) - other._scores(*drawn)).std())

    def _scores(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Of samples of requests and of prompts, by their indices ``[samples, ...]``."""
        means = torch.stack([self.taken[rows].mean(1), self.paraphrases[rows].nanmean(1), self.kept[columns].mean(1)])
        given = means.isfinite()  # there need not be a paraphrase in a sample
        return given.sum(0) / torch.where(given, 1.0 / means, 0.0).sum(0)


@dataclass(frozen=True)
class Trial:
    """How a set of modules did.

    Attributes:
        name, modules: what the set is called, and the full names of what is in it.
        requests: that were edited in it.
        taken, paraphrases, kept, score: see ``Shares``, means; None where nothing could be measured, or no request has
            a paraphrase.
        drift: mean KL divergence from the unedited model along its own answers to unrelated prompts, in nats.
        seconds: that editing took.
        behind, noise: by how much the score is below the best one of as many requests, and the standard error of that.
        reason: why nothing could be measured; None where it could.
        shares: what the scores are means of; None for what comes out of a file.
    """

    name: str
    modules: list[str]
    requests: int
    taken: float | None = None
    paraphrases: float | None = None
    kept: float | None = None
    drift: float | None = None
    score: float | None = None
    seconds: float = 0.0
    behind: float | None = None
    noise: float | None = None
    reason: str | None = None
    shares: Shares | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, name: str, modules: list[str], requests: int, shares: Shares, drift: float, seconds: float) -> Trial:
        paraphrases = float(shares.paraphrases.nanmean())
        return cls(
            name,
            modules,
            requests,
            taken=float(shares.taken.mean()),
            paraphrases=None if math.isnan(paraphrases) else paraphrases,
            kept=float(shares.kept.mean()),
            drift=drift if math.isfinite(drift) else None,
            score=shares.score,
            seconds=seconds,
            shares=shares,
        )

    def against(self, best: Trial) -> Trial:
        """With its distance to the best one."""
        if self.shares is None:
            return self
        return dataclasses.replace(self, behind=best.score - self.score, noise=best.shares.noise(self.shares))

    @property
    def in_the_running(self) -> bool:
        """Whether it is not behind the best one by more than noise, two standard errors."""
        return self.behind is not None and self.behind <= 2.0 * self.noise

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {one.name: getattr(self, one.name) for one in dataclasses.fields(self) if one.name != "shares"}
