"""The results of ``stableedit bench``: what its files are called, their formats, and how they are read.

docs/file-formats.md lists what is in them; ``RunDirectory`` writes those of a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from stableedit_cpp.files.atomic import write_json
from stableedit_cpp.files.words import check_format

__all__ = [
    "MEASUREMENTS",
    "RUN",
    "RUN_FILE",
    "TURNS_FILE",
    "Results",
    "Run",
    "read_results",
    "read_run",
    "records_file",
    "write_theory",
]

RUN_FILE, TURNS_FILE = "run.json", "turns.jsonl"
RUN = {"format": "stableedit-bench-run", "version": 1}
_THEORY_FILE, _THEORY = "theory.json", {"format": "stableedit-bench-theory", "version": 1}
MEASUREMENTS = ("geometry", "probe")  # parts of a turn's seconds that are not editing
# In earlier versions of the program locality was measured along the data set's answer to the unrelated prompt.
_ALONG_THE_TARGET = {"locality_agreement": "locality_target_agreement", "locality_kl": "locality_target_kl"}
_NEEDED = ("name", "status", "settings.editor", "settings.dataset", "settings.model", "settings.seed")
_NEEDED += ("settings.data.edits", "settings.config", "provenance", "checkpoints", "cost")


@dataclass
class Run:
    """One run directory.

    Attributes:
        document: ``run.json``. label: its name among the runs that it is shown with.
    """

    path: Path
    document: dict
    label: str = ""

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Errors as ``read_run``."""
        return cls(Path(directory), read_run(directory))

    @property
    def settings(self) -> dict:
        return self.document["settings"]

    @property
    def checkpoints(self) -> list[dict]:
        return self.document["checkpoints"]

    @property
    def last(self) -> dict:
        return self.checkpoints[-1]

    @property
    def stream(self) -> list[dict]:
        """The checkpoints along the stream, without those of the steps after it."""
        return [found for found in self.checkpoints if "step" not in found]

    @property
    def unedited(self) -> dict | None:
        """The checkpoint before the first edit."""
        return next((found for found in self.checkpoints if found["edits"] == 0 and not found.get("warm_up")), None)

    @property
    def finished(self) -> bool:
        return self.document["status"] == "done"

    @property
    def editing_seconds(self) -> dict[str, float]:
        """By part; without what was only measured along the way."""
        parts = (self.document["cost"] or {}).get("seconds_by_part") or {}
        return {part: seconds for part, seconds in parts.items() if part not in MEASUREMENTS}

    def side_effects(self, part: str) -> list[tuple[dict, dict]]:
        """``(checkpoint, figures)`` of each checkpoint where a part of the side effects was measured."""
        found = ((checkpoint, (checkpoint.get("side_effects") or {})) for checkpoint in self.checkpoints)
        return [(checkpoint, effects[part]) for checkpoint, effects in found if effects.get(part)]

    def records(self, checkpoint: dict) -> list[dict]:
        """One record a request that was scored at a checkpoint."""
        text = (self.path / records_file(checkpoint)).read_text(encoding="utf-8")
        return [_by_present_names(json.loads(line)) for line in text.splitlines()]

    @cached_property
    def turns(self) -> list[dict]:
        """The lines of ``turns.jsonl``.

        Raises:
            ValueError: for a line that is not JSON, unless it is the last of a run that is not finished.
        """
        path = self.path / TURNS_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        turns = []
        for number, line in enumerate(lines, start=1):
            try:
                turns.append(json.loads(line))
            except ValueError as error:
                if number == len(lines) and not self.finished:  # being written, or cut off: resuming drops it too
                    break
                raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
        return turns

    @cached_property
    def geometry(self) -> list[dict]:
        """Of the turns that have it: its fields and ``position``, the edits up to there, warm-up included."""
        turns = [turn for turn in self.turns if turn.get("geometry")]
        return [{"position": turn["edits"] + turn["warm_up"], **turn["geometry"]} for turn in turns]


@dataclass
class Results:
    """
    Attributes:
        theories: of each ``theory.json`` its directory and its content.
    """

    runs: list[Run]
    theories: list[tuple[Path, dict]]


def records_file(checkpoint: dict) -> str:
    """Where the records of a checkpoint are, below the run's directory."""
    return f"requests/{checkpoint['edits']:08d}" + (f"-{checkpoint['step']}" if "step" in checkpoint else "") + ".jsonl"


def read_run(directory: str | Path) -> dict:
    """The content of a run directory's ``run.json``; scores of earlier versions by their names of today.

    Raises:
        FileNotFoundError: if there is none. ValueError: if it is damaged, lacks something, or is of another format or
            version.
    """
    document = _read(Path(directory) / RUN_FILE, RUN, _NEEDED)
    for checkpoint in document["checkpoints"]:
        for part in (checkpoint, *(checkpoint.get("ages") or [])):
            if "scores" in part:
                part["scores"] = _by_present_names(part["scores"])
        if checkpoint.get("cumulative"):
            found = checkpoint["cumulative"].items()
            checkpoint["cumulative"] = {when: scores and _by_present_names(scores) for when, scores in found}
    return document


def _by_present_names(scores: Mapping[str, object]) -> dict[str, object]:
    """Scores, or a request's values of them, by the names that they have now: what earlier versions measured otherwise
    under a name of today gets a name of its own."""
    earlier = {} if "locality_same" in scores else _ALONG_THE_TARGET
    return {earlier.get(name, name.replace("multi_hop", "portability")): value for name, value in scores.items()}


def read_results(paths: Iterable[str | Path]) -> Results:
    """Find the runs, by data set, model, editor and seed, and the theory files, in directories and below them.

    Raises:
        ValueError: for a path that is no directory or holds no results, a run without a checkpoint, and as
            ``read_run``.
    """
    runs: dict[Path, Run] = {}
    theories: dict[Path, tuple[Path, dict]] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ValueError(f"{path} is not a directory; expected one that stableedit bench has written")
        found, others = _below(path, RUN_FILE), _below(path, _THEORY_FILE)
        if not found and not others:
            raise ValueError(f"{path} holds no results: there is no {RUN_FILE} and no {_THEORY_FILE} in it or below it")
        runs |= {directory.resolve(): _with_checkpoints(directory) for directory in found}
        for directory in others:
            theories[directory.resolve()] = (directory, _read(directory / _THEORY_FILE, _THEORY, ("runs",)))
    names = ("dataset", "model", "editor", "seed")
    return Results(sorted(runs.values(), key=lambda run: [run.settings[n] for n in names]), list(theories.values()))


def write_theory(directory: Path, theories: Sequence[dict]) -> None:
    """One summary a run, as ``theory_of`` gives it."""
    write_json(directory / _THEORY_FILE, {**_THEORY, "runs": list(theories)})


def _below(path: Path, name: str) -> list[Path]:
    """Directories with a file of that name, but not hidden ones: there results are only being written."""
    found = [file.parent for file in sorted(path.rglob(name))]
    return [place for place in found if not any(part.startswith(".") for part in place.relative_to(path).parts)]


def _with_checkpoints(directory: Path) -> Run:
    run = Run.read(directory)
    if not run.checkpoints:
        raise ValueError(f"{directory / RUN_FILE}: the run has no checkpoint yet; wait for the first one")
    for number, checkpoint in enumerate(run.checkpoints):
        missing = [name for name in ("edits", "scores") if name not in checkpoint]
        if missing:
            raise ValueError(f"{directory / RUN_FILE}: checkpoint {number} lacks {', '.join(missing)}")
    return run


def _read(path: Path, format_: dict[str, object], needed: tuple[str, ...]) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    check_format(document, **format_, what=str(path), writer="stableedit bench")
    for name in needed:
        value: object = document
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"{path} lacks {name}")
            value = value[part]
    return document
