"""Snapshots: the whole state after some record, so that not everything has to be done again from the beginning."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from stableedit_cpp.core import load_state, save_state
from stableedit_cpp.errors import DamagedSnapshot
from stableedit_cpp.files.digest import fingerprint, tensor_digests

__all__ = ["Snapshots", "State", "is_state", "state_digests", "state_fingerprints"]

# As Editor.state_dict() gives it.
State = Mapping[str, Mapping[str, torch.Tensor]]


def state_fingerprints(state: State) -> dict[str, str]:
    """``fingerprint`` of each tensor of a state in hexadecimal digits, by "<component>/<name>": what a record says of
    the state after it."""
    return {name: fingerprint(tensor).hex() for name, tensor in _tensors(state).items()}


def state_digests(state: State) -> dict[str, str]:
    """``tensor_digest`` of each tensor of a state, by "<component>/<name>": what records of version 1 say."""
    return tensor_digests(_tensors(state))


def is_state(state: State, recorded: Mapping[str, str]) -> bool:
    """Whether a state is, bit for bit, the one that was recorded, in either way.

    Earlier records (state files of version 1) describe whiteners by other fields, and these were renewed at other
    turns: of such a record all else is compared.
    """
    strong = any(len(digest) == 64 for digest in recorded.values())
    found = (state_digests if strong else state_fingerprints)(state)
    if any(name.endswith(("/sample", "/whitener_energy")) for name in recorded):
        found, recorded = _without_whiteners(found), _without_whiteners(recorded)
    return found == recorded


def _without_whiteners(digests: Mapping[str, str]) -> dict[str, str]:
    own = ("sample", "decompositions", "whitener")
    return {name: digest for name, digest in digests.items() if not name.rpartition("/")[2].startswith(own)}


def _tensors(state: State) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": tensor for part, fields in state.items() for name, tensor in fields.items()}


class Snapshots:
    """The snapshots in a directory, by the number of the record whose state they hold.

    Args:
        keep: so many of the newest are kept, besides the first.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep

    def numbers(self) -> list[int]:
        """Records that there is a snapshot of, in order."""
        return sorted(int(path.stem.removeprefix("record-")) for path in self.directory.glob("record-*.safetensors"))

    def sizes(self) -> dict[int, int]:
        """Bytes of each snapshot, by the number of its record; a writer may be removing some."""
        sizes = {}
        for number in self.numbers():
            with contextlib.suppress(FileNotFoundError):
                sizes[number] = self.path(number).stat().st_size
        return sizes

    def path(self, number: int) -> Path:
        return self.directory / f"record-{number:06d}.safetensors"

    def save(self, number: int, state: State) -> None:
        """Write a snapshot, whole or not at all.

        Raises:
            OSError: as the system says; nothing is left behind.
        """
        self.directory.mkdir(exist_ok=True)
        save_state(self.path(number), state)

    def remove_unfinished(self) -> None:
        """Remove what was being written in a crash; for who holds the session's lock."""
        for path in self.directory.glob(".record-*.tmp"):
            path.unlink()

    def load(self, number: int, digests: Mapping[str, str]) -> State:
        """Read a snapshot.

        Args:
            digests: of the state's tensors, as the record has them (``is_state``).

        Raises:
            DamagedSnapshot: unless it is exactly that state.
        """
        path = self.path(number)
        try:
            state, _config = load_state(path)
        except (OSError, ValueError) as error:
            raise DamagedSnapshot(f"the snapshot cannot be used: {error}") from None
        if not is_state(state, digests):
            raise DamagedSnapshot(f"the snapshot {path} does not hold the state of record {number}")
        return state

    def prune(self, line: Collection[int]) -> None:
        """Remove all but the first and the newest of the records in the model's ``line``."""
        numbers = self.numbers()
        usable = [number for number in numbers if number in line]
        wanted = {*usable[:1], *usable[-self.keep :]}
        for number in numbers:
            if number not in wanted:
                self.path(number).unlink(missing_ok=True)
