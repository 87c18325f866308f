"""The directory of a run: what was measured, and where to go on. Whatever is killed leaves it whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from stableedit_cpp.experiments.results import RUN, RUN_FILE, TURNS_FILE, read_run, records_file
from stableedit_cpp.experiments.settings import baseline, differences
from stableedit_cpp.files.atomic import new_file, write_json, write_text
from stableedit_cpp.files.environment import provenance
from stableedit_cpp.files.words import now
from stableedit_cpp.lifelong.journal.snapshots import Snapshots, State, state_digests
from stableedit_cpp.sideeffects.measurement import HIDDEN_STATES

__all__ = ["RunDirectory"]

_EARLIER_STATE = "state.safetensors"  # of version 0.1.0


class RunDirectory:
    """One run's directory. docs/file-formats.md lists what is in it.

    Attributes:
        document: the content of ``run.json``.

    Raises:
        ValueError: if the directory holds something else, a run with other settings (which ones), or an unfinished one
            of an earlier version.
    """

    def __init__(self, path: str | Path, name: str, settings: Mapping[str, object]) -> None:
        self.path, self.settings = Path(path), dict(settings)
        self._snapshots = Snapshots(self.path / "snapshots", keep=1)
        if (self.path / RUN_FILE).exists():
            self.document = read_run(self.path)
            self.check(settings)
            if not self.done and (self.path / _EARLIER_STATE).exists():
                raise ValueError(
                    f"{self.path} holds an unfinished run of an earlier version, which edited otherwise; finish it "
                    "with that version, choose another --output, or remove that directory"
                )
            return
        # A process that was killed may have left its lock, and what it was about to rename.
        others = [path for path in self.path.glob("*") if path.name != "lock" and not path.name.startswith(".")]
        if others or (self.path.exists() and not self.path.is_dir()):
            raise ValueError(f"{self.path} is there, but is no run of `stableedit bench`; choose another --output")
        self.document = {
            **RUN,
            "status": "running",
            "name": name,
            "settings": self.settings,
            "provenance": {**provenance(), "finished": None, "stints": []},
            "checkpoints": [],
            "cost": None,
        }

    @property
    def done(self) -> bool:
        return self.document["status"] == "done"

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
        self.document["provenance"]["stints"].append({**provenance(), "from_edits": edits})
        self.path.mkdir(parents=True, exist_ok=True)
        self._save()

    def finish(self, cost: Mapping[str, object], *, keep_state: bool) -> None:
        self.document |= {"status": "done", "cost": dict(cost)}
        self.document["provenance"]["finished"] = now()
        if not keep_state:
            self.document.pop("snapshot", None)
        self._save()
        if not keep_state:
            shutil.rmtree(self._snapshots.directory, ignore_errors=True)

    def checkpoint(self, turn: int) -> dict | None:
        """What was measured after a turn."""
        return next((entry for entry in self.document["checkpoints"] if entry["turn"] == turn), None)

    def add_checkpoint(self, entry: dict, records: Iterable[Mapping], cost: Mapping[str, object]) -> None:
        """Keep what was measured at a checkpoint; the same once more takes the place of what is there."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_text(self.path / records_file(entry), lines)
        others = [old for old in self.document["checkpoints"] if old["turn"] != entry["turn"]]
        self.document["checkpoints"] = sorted([*others, entry], key=lambda one: one["turn"])
        self.document["cost"] = dict(cost)
        self._save()

    def adopt_baseline(self, other: Path, cost: Mapping[str, object]) -> bool:
        """Take over what another run has measured of the unedited model, if it would be the same here.

        Its seconds are left out: this run does not spend them.
        """
        document = read_run(other) if (other / RUN_FILE).exists() else {"checkpoints": []}
        entry = next((entry for entry in document["checkpoints"] if entry["turn"] == 0), None)
        own = baseline(self.document["settings"])
        if entry is None or own is None or baseline(document["settings"]) != own:
            return False
        for name in (records_file(entry), f"side_effects/{HIDDEN_STATES.format(0)}"):
            if (other / name).exists():
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(other / name, self.path / name)
        self.document["checkpoints"] = [{**entry, "seconds": {}, "from_run": document["name"]}]
        self.document["cost"] = dict(cost)
        self._save()
        return True

    def add_turn(self, line: Mapping[str, object]) -> None:
        with (self.path / TURNS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def save_state(self, turn: int, state: State) -> None:
        """Where a later process goes on: after a turn, whose line is on the disk before the state is."""
        with (self.path / TURNS_FILE).open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())
        self._snapshots.save(turn, state)
        self.document["snapshot"] = {"turn": turn, "digests": state_digests(state)}
        self._save()
        self._snapshots.prune([turn])

    def load_state(self) -> State | None:
        """What was saved last, or None where nothing was: then the run begins anew.

        Raises:
            SnapshotDamaged: if it is not exactly that state.
        """
        self._snapshots.remove_unfinished()
        found = self.document.get("snapshot")
        if found is not None:
            return self._snapshots.load(found["turn"], found["digests"])
        self.document["checkpoints"] = []
        for part in ("requests", "side_effects", "covariance"):
            shutil.rmtree(self.path / part, ignore_errors=True)
        (self.path / TURNS_FILE).unlink(missing_ok=True)
        return None

    def turns_so_far(self) -> Iterator[dict]:
        """Yields the turns up to the saved state, and drops those after it, which are going to be done again; to be
        read to the end.

        Turns that a kill has cut off half-written are among the dropped: the state is written after its turns.
        """
        last, path = self.document["snapshot"]["turn"], self.path / TURNS_FILE
        with new_file(path) as scratch, scratch.open("w", encoding="utf-8") as kept, path.open(encoding="utf-8") as old:
            for line in old:
                try:
                    turn = json.loads(line)
                except json.JSONDecodeError:
                    break
                if turn["turn"] > last:
                    break
                kept.write(line if line.endswith("\n") else line + "\n")
                yield turn

    def _save(self) -> None:
        write_json(self.path / RUN_FILE, self.document)
