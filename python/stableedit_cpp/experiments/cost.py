"""What a run has cost so far."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stableedit_cpp.experiments.results import MEASUREMENTS
from stableedit_cpp.files.environment import reserved_peak_bytes, resident_bytes

__all__ = ["Cost"]


class Cost:
    """Adds up turns and checkpoints, also those of earlier processes; ``to_dict`` is ready for JSON.

    Args:
        device: where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.edits = self.warm_up = self.turns = self.steps = 0
        self._parts: dict[str, float] = {}
        self._apart = {"scoring": 0.0, "side_effects": 0.0, "cumulative": 0.0, "after": 0.0}
        self._peak = resident_bytes()
        self._extra: int | None = None

    def add_turn(self, line: Mapping[str, object]) -> None:
        """A line of ``turns.jsonl``: a turn of the stream or its warm-up, or a step after it."""
        self.turns, self.edits, self.warm_up = line["turn"], line["edits"], line["warm_up"]
        if line["kind"] in ("edit", "warm_up"):
            for part, seconds in line["seconds"].items():
                self._parts[part] = self._parts.get(part, 0.0) + seconds
        else:
            self.steps += 1
            self._apart["after"] += sum(line["seconds"].values())
        self._peak = max(self._peak, line["resident_bytes"])
        if line.get("extra_bytes") is not None:
            self._extra = max(self._extra or 0, line["extra_bytes"])

    def add_checkpoint(self, entry: Mapping[str, object]) -> None:
        """An entry of ``checkpoints``."""
        for part, seconds in entry["seconds"].items():
            self._apart[part] += seconds
        self._peak = max(self._peak, entry["resident_bytes"])

    def to_dict(self) -> dict[str, object]:
        editing = sum(seconds for part, seconds in self._parts.items() if part not in MEASUREMENTS)
        return {
            "edits": self.edits,
            "warm_up_edits": self.warm_up,
            "seconds": editing,
            "edits_per_second": (self.edits + self.warm_up) / editing if editing > 0 else None,
            "seconds_by_part": dict(self._parts),
            **{f"{part}_seconds": seconds for part, seconds in self._apart.items()},
            "peak_resident_bytes": self._peak,
            "peak_device_bytes": reserved_peak_bytes(self._device),
            "turn_extra_bytes": self._extra,
        }
