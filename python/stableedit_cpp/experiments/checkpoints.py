"""What is measured of a model at a checkpoint: scores, side effects, and how well it takes more edits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from stableedit_cpp import sideeffects
from stableedit_cpp.editors import Editor
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.experiments.cost import Cost
from stableedit_cpp.experiments.cumulative import CumulativeProbe
from stableedit_cpp.experiments.run_directory import RunDirectory
from stableedit_cpp.experiments.scorer import Scorer
from stableedit_cpp.experiments.settings import RunSettings
from stableedit_cpp.files.environment import resident_bytes
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of a run, as its settings ask for them.

    Args:
        editor: of the run; its model is measured as it is.
        cost: where the stream is, and what it has cost. trunk, answers, progress: as for ``StreamRun``.
    """

    def __init__(
        self,
        settings: RunSettings,
        directory: RunDirectory,
        editor: Editor,
        cost: Cost,
        *,
        trunk: TrunkCache | None,
        answers: dict | None,
        progress: bool | None,
    ) -> None:
        self._settings, self._directory, self._editor, self._cost = settings, directory, editor, cost
        self._trunk, self._progress = trunk, progress
        self._scorer = Scorer(
            editor.model,
            editor.tokenizer,
            settings.source,
            turn_size=settings.editor.config.turn_size,
            sample=settings.sample,
            age_sample=settings.age_sample,
            metrics=settings.metrics,
            unedited=UneditedAnswers(editor.unedited, known=answers),
            asked=editor.form.asked,
            max_tokens=settings.editor.config.max_tokens_per_forward,
            trunk=trunk,
            progress=progress,
        )
        self._cumulative = self._cumulative_probe()

    def taken(self) -> bool:
        """Whether there is one at this place already."""
        return self._directory.checkpoint(self._cost.turns) is not None

    def due(self) -> bool:
        """Whether one is to be taken here, unless a warm-up comes first."""
        return (self._cost.steps > 0 or self._cost.edits in self._settings.checkpoints) and not self.taken()

    def take_over(self, siblings: Sequence[Path]) -> bool:
        """Take over the one before the first edit, which is the same for all editors of a stream."""
        cost = self._cost.to_dict()
        return any(self._directory.adopt_baseline(sibling, cost) for sibling in siblings)

    def take(self) -> None:
        """Score the model as it is, and keep what was found."""
        cost, settings, seconds = self._cost, self._settings, {}
        begin = time.perf_counter()
        score = self._scorer.edited if cost.turns else self._scorer.unedited
        scores, ages, records = score(cost.edits if cost.turns else settings.edits)
        seconds["scoring"] = time.perf_counter() - begin
        side_effects = cumulative = None
        if self._wants_side_effects():
            begin = time.perf_counter()
            side_effects = self._measure_side_effects()
            seconds["side_effects"] = time.perf_counter() - begin
        if self._cumulative:
            begin = time.perf_counter()
            cumulative = self._cumulative.measure(self._editor, fresh=cost.turns == 0)
            seconds["cumulative"] = time.perf_counter() - begin
        entry = {
            "edits": cost.edits,
            "warm_up": cost.warm_up,
            "turn": cost.turns,
            "scores": scores,
            "broken": sum("broken" in record for record in records),
            "ages": ages,
            "side_effects": side_effects,
            "cumulative": cumulative,
            "seconds": seconds,
            "resident_bytes": resident_bytes(),
        }
        if cost.steps:
            entry |= {"after": str(settings.after[cost.steps - 1]), "step": cost.steps}
        cost.add_checkpoint(entry)
        self._directory.add_checkpoint(entry, records, cost.to_dict())

    def _wants_side_effects(self) -> bool:
        options = self._settings.side_effects
        cost, settings = self._cost, self._settings
        at_end = cost.turns == 0 or "collapsed" in self._directory.document
        at_end = at_end or (cost.edits == settings.edits and cost.steps == len(settings.after))
        return options is not None and (at_end or options.get("at", "checkpoints") == "checkpoints")

    def _measure_side_effects(self) -> dict:
        place = self._directory.path / "side_effects"
        place.mkdir(parents=True, exist_ok=True)
        how = {"directory": place, "edits": self._cost.edits, "trunk": self._trunk, "progress": self._progress}
        how["allow_broken"] = True  # what is left of a model that has collapsed is measured like any other
        return sideeffects.measure(self._editor.model, self._editor.tokenizer, self._settings.side_effects, **how)

    def _cumulative_probe(self) -> CumulativeProbe | None:
        settings = self._settings
        if not settings.cumulative:
            return None
        end = settings.edits
        requests = list(settings.source.requests(end, end + settings.cumulative))
        warm_up = list(settings.source.warm_up_requests(0, settings.warm_up.size)) if settings.warm_up else []
        return CumulativeProbe(requests, warm_up, self._scorer.of)
