"""A small search before a run: which value of a step size, or of what a method has in its place, does best on edits
that the stream does not hold."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import EditorConfig, make_editor
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.experiments.scorer import Scorer, summary
from stableedit_cpp.experiments.settings import RunSettings, differences
from stableedit_cpp.files.atomic import write_json
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.files.words import check_format
from stableedit_cpp.model.capture import NotFiniteError
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["SearchFile", "search"]

_FORMAT = {"format": "stableedit-bench-search", "version": 1}


class SearchFile:
    """``OUTPUT/search/RUN.json``: the trials of a run's search, and what was found; written after each trial.

    Raises:
        ValueError: if it is damaged, or that of another configuration (which settings differ).
    """

    def __init__(self, output: Path, run: RunSettings) -> None:
        self.path, self.run = output / "search" / f"{run.name}.json", run
        self.document: dict = {**_FORMAT, "name": run.name, "settings": run.to_dict(), "trials": [], "found": None}
        if self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{self.path} is not valid JSON: {error}") from None
            check_format(found, **_FORMAT, what=str(self.path), writer="stableedit bench")
            self.check(found["settings"])
            self.document = found

    def check(self, before: Mapping[str, object]) -> None:
        """Refuse what would mix two searches."""
        apart = differences(before, self.document["settings"])
        if apart:
            raise ValueError(
                f"{self.path} holds a search of another configuration: {'; '.join(apart)}; choose another --output, or "
                "remove that file"
            )

    @property
    def settled(self) -> RunSettings | None:
        """The run with what was found; None as long as it is not."""
        if self.document["found"] is None:
            return None
        return self.run.with_found(self.document["found"])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.document)


def search(
    file: SearchFile,
    model: torch.nn.Module,
    tokenizer,
    *,
    trunk: TrunkCache | None = None,
    answers: dict | None = None,
    progress: bool | None = None,
) -> RunSettings:
    """Do the trials that are left: each edits the held-out requests into the unedited model, after the run's warm-up,
    scores them, and puts the weights back. The best is found; of equal ones the first.

    Args:
        trunk, answers: as for ``StreamRun``.

    Returns:
        The run with what was found.

    Raises:
        ValueError: if no value leaves a model that can be scored, with the last reason.
    """
    run, document = file.run, file.document
    document["settings"] = {**run.to_dict(), "model_digest": model_digest(model)}
    begin = run.edits + run.cumulative
    requests = list(run.source.requests(begin, begin + run.search.edits))
    done = [trial["values"] for trial in document["trials"]]
    for values in run.search.grid():
        if values not in done:
            config = dataclasses.replace(run.editor.config, **values)
            how = {"trunk": trunk, "answers": answers, "progress": progress}
            document["trials"].append({"values": values, **_trial(run, config, requests, model, tokenizer, **how)})
            file.save()
    scored = [trial for trial in document["trials"] if trial["score"] is not None]
    if not scored:
        raise ValueError(f"the search of {run.name} found nothing: {document['trials'][-1]['reason']}")
    document["found"] = max(scored, key=lambda trial: trial["score"])["values"]
    file.save()
    return file.settled


def _trial(
    run: RunSettings,
    config: EditorConfig,
    requests: Sequence[EditRequest],
    model: torch.nn.Module,
    tokenizer,
    *,
    trunk: TrunkCache | None,
    answers: dict | None,
    progress: bool | None,
) -> dict[str, object]:
    editor = make_editor(model, tokenizer, config)
    editor.guard = None
    originals, start = editor.original_weights(), time.perf_counter()
    try:
        if run.warm_up:
            editor.warm_up(list(run.source.warm_up_requests(0, run.warm_up.size)), progress=progress)
        report = editor.edit(requests, outcomes=False, progress=progress)
        scorer = Scorer(
            model,
            tokenizer,
            run.source,
            turn_size=config.turn_size,
            sample=None,
            age_sample=0,
            metrics=run.metrics,
            unedited=UneditedAnswers(editor.unedited, known=answers),
            asked=editor.form.asked,
            max_tokens=config.max_tokens_per_forward,
            trunk=trunk,
            progress=progress,
        )
        scores = summary(scorer.of(requests))
    except (NotFiniteError, torch.linalg.LinAlgError) as error:
        return {"score": None, "reason": str(error), "seconds": time.perf_counter() - start}
    finally:
        for module in editor.modules:
            module.write(originals[module.name])
    means = {name: found["mean"] for name, found in scores.items() if found["mean"] is not None}
    return {
        "score": run.search.score_of(means),
        "means": means,
        "edits_per_second": report.edits_per_second,
        "seconds": time.perf_counter() - start,
    }
