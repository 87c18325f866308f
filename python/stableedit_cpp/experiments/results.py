"""The directory of a run: what was measured, and where to go on. Whatever is killed leaves it whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from stableedit_cpp.experiments.settings import baseline, differences
from stableedit_cpp.files.atomic import write_json, write_text
from stableedit_cpp.files.environment import environment
from stableedit_cpp.sideeffects.measurement import HIDDEN_STATES

__all__ = ["FORMAT", "RunDirectory", "command_line", "now", "read_run"]

_RECORDS = "requests/{:08d}.jsonl"
FORMAT = {"format": "stableedit-bench-run", "version": 1}


class RunDirectory:
    """One run's directory. docs/file-formats.md lists what is in it.

    Attributes:
        document: the content of ``run.json``.

    Raises:
        ValueError: if the directory holds something else, or a run with other settings (which ones).
    """

    def __init__(self, path: str | Path, name: str, settings: Mapping[str, object], command: list[str]) -> None:
        self.path = Path(path)
        self.document = read_run(self.path) if (self.path / "run.json").exists() else None
        if self.document is not None:
            self.check(settings)
            self.settings = dict(settings)
            return
        # A process that was killed may have left its lock, and what it was about to rename.
        others = [path for path in self.path.glob("*") if path.name != "lock" and not path.name.startswith(".")]
        if others or (self.path.exists() and not self.path.is_dir()):
            raise ValueError(f"{self.path} is there, but is no run of `stableedit bench`; choose another --output")
        self.settings = dict(settings)
        self.document = {
            **FORMAT,
            "status": "running",
            "name": name,
            "settings": self.settings,
            "provenance": {
                "started": now(),
                "finished": None,
                "command": command,
                **_git(),
                "environment": environment(),
                "stints": [],
            },
            "checkpoints": [],
            "cost": None,
        }

    @property
    def done(self) -> bool:
        return self.document["status"] == "done"

    @property
    def state_file(self) -> Path:
        return self.path / "state.safetensors"

    def check(self, settings: Mapping[str, object]) -> None:
        """Refuse what would mix two experiments."""
        found = differences(self.document["settings"], settings)
        if found:
            raise ValueError(
                f"{self.path} holds a run of another configuration: {'; '.join(found)}; choose another --output, or "
                "remove that directory"
            )

    def begin(self, settings: Mapping[str, object], edits: int) -> None:
        """A process begins to work on it, from so many edits on."""
        self.check(settings)
        self.document["settings"] = dict(settings)
        stint = {"started": now(), "from_edits": edits, **_git(), "environment": environment()}
        self.document["provenance"]["stints"].append(stint)
        self.path.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        write_json(self.path / "run.json", self.document)

    def finish(self, cost: Mapping[str, object], *, keep_state: bool) -> None:
        self.document |= {"status": "done", "cost": dict(cost)}
        self.document["provenance"]["finished"] = now()
        self.save()
        if not keep_state:
            self.state_file.unlink(missing_ok=True)

    def checkpoint(self, edits: int) -> dict | None:
        """What was measured after so many edits."""
        return next((entry for entry in self.document["checkpoints"] if entry["edits"] == edits), None)

    def add_checkpoint(self, entry: dict, records: Iterable[Mapping], cost: Mapping[str, object]) -> None:
        """Keep what was measured at a checkpoint; the same once more takes the place of what is there."""
        self.write_records(entry["edits"], records)
        others = [old for old in self.document["checkpoints"] if old["edits"] != entry["edits"]]
        self.document["checkpoints"] = sorted([*others, entry], key=lambda one: one["edits"])
        self.document["cost"] = dict(cost)
        self.save()

    def adopt_baseline(self, other: Path, cost: Mapping[str, object]) -> bool:
        """Take over what another run has measured of the unedited model, if it would be the same here.

        Its seconds are left out: this run does not spend them.
        """
        document = read_run(other) if (other / "run.json").exists() else {"checkpoints": []}
        entry = next((entry for entry in document["checkpoints"] if entry["edits"] == 0), None)
        own = baseline(self.document["settings"])
        if entry is None or own is None or baseline(document["settings"]) != own:
            return False
        for name in (_RECORDS.format(0), f"side_effects/{HIDDEN_STATES.format(0)}"):
            if (other / name).exists():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(other / name, self.path / name)
        self.document["checkpoints"] = [{**entry, "seconds": {}, "from_run": document["name"]}]
        self.document["cost"] = dict(cost)
        self.save()
        return True

    def write_records(self, edits: int, records: Iterable[Mapping]) -> None:
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(self.path / _RECORDS.format(edits), lines)

    def add_turn(self, line: Mapping[str, object]) -> None:
        with (self.path / "turns.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync_turns(self) -> None:
        """Make sure that the lines so far survive also a failure of power."""
        with (self.path / "turns.jsonl").open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())

    def keep_turns(self, last: int) -> Iterator[dict]:
        """Drop the turns after one, which are going to be done again, and yield those before; to be read to the end.

        Turns that a kill has cut off half-written are among the dropped: the state is written after its turns.
        """
        path, scratch = self.path / "turns.jsonl", self.path / ".turns.jsonl.tmp"
        with scratch.open("w", encoding="utf-8") as kept:
            for line in path.open(encoding="utf-8") if path.exists() else ():
                try:
                    turn = json.loads(line)
                except json.JSONDecodeError:
                    break
                if turn["turn"] > last:
                    break
                kept.write(line if line.endswith("\n") else line + "\n")
                yield turn
            kept.flush()
            os.fsync(kept.fileno())
        scratch.replace(path)

    def clear(self) -> None:
        """Nothing can be gone on from: begin anew."""
        self.document["checkpoints"] = []
        for part in ("requests", "side_effects", "covariance"):
            shutil.rmtree(self.path / part, ignore_errors=True)
        (self.path / "turns.jsonl").unlink(missing_ok=True)


def read_run(directory: str | Path) -> dict:
    """The content of a run directory's ``run.json``.

    Raises:
        FileNotFoundError: if there is none. ValueError: if it is not one of ours, or of a newer version.
    """
    path = Path(directory) / "run.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    found = {key: document.get(key) for key in FORMAT} if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is no run of `stableedit bench` that this version can read")
    return document


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _git() -> dict[str, object]:
    """The commit of the source tree that this package runs from, if it does; and whether files differ from it."""

    def ask(*arguments: str) -> str | None:
        home = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", home, *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", Path(__file__).name) is None:  # installed somewhere within another repository
        return {"git": None, "git_dirty": None}
    return {"git": ask("rev-parse", "HEAD"), "git_dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}


def command_line() -> list[str]:
    """What this process was called with."""
    return ["stableedit", *sys.argv[1:]]
