"""The weights of the edited modules: one owner, through which every change goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

import torch

from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate, MasterWeight, PastKeys
from stableedit_cpp.editors.followers import Follower, Followers
from stableedit_cpp.editors.interrupt import undisturbed
from stableedit_cpp.editors.originals import OriginalWeights
from stableedit_cpp.files.digest import fingerprint
from stableedit_cpp.model.modules import EditModule

__all__ = ["Checkpoint", "EditedWeights"]

Statistics = Mapping[str, LifelongNormalizer | PastKeys]
_TURN = "a turn"


class EditedWeights(Mapping[str, MasterWeight]):
    """Owns the edited weights: their masters by module name (from the first use on), and the original ones.

    Whatever changes them does so within ``change``, which makes it all or nothing, together with the running
    statistics, and asks and tells the followers. A change that goes past it is noticed at the next use: without a
    follower that refuses, what the caller has put there is the new present.

    Args:
        modules: the edited modules.
        statistics: what belongs to the weights and goes back with them, by any name.

    Attributes:
        originals: the weights before the first edit.
        followers: who hears of changes.
    """

    def __init__(self, modules: Sequence[EditModule], statistics: Statistics) -> None:
        self.modules = modules
        self.statistics = statistics
        self.originals = OriginalWeights(modules)
        self.followers = Followers()
        self._held: dict[str, MasterWeight] = {}
        self._known: dict[str, bytes] = {}  # fingerprints of the weights as they were left
        self._open: str | None = None  # the change that is under way

    def __getitem__(self, name: str) -> MasterWeight:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def attach(self) -> None:
        """Take hold of the weights: for the first time, and where the caller has moved or changed them since.

        Raises:
            ValueError: within ``unedited``, or where a follower refuses what the caller has changed.
        """
        self.originals.refuse_if_shown("edit or export it")
        if self._open:
            return
        if not self.originals:
            self.originals.keep()
        found = self._fingerprints()
        changed = [name for name, known in self._known.items() if found[name] != known]
        what = f"a change of {', '.join(changed)} that went past the editor"
        if changed:
            self.followers.before(what)
        self._held = {module.name: self._hold(module, module.name in changed) for module in self.modules}
        self._known = found
        if changed:
            self.followers.after(what)

    @contextmanager
    def change(self, what: str | None = None, by: Follower | None = None) -> Iterator[Checkpoint]:
        """One change: if the block raises, weights and statistics are what they were, bit for bit, unless the
        checkpoint that it yields was told to ``settle``. Within another change the followers are not asked or told.

        Args:
            what: it is, for the followers; None for a turn, which tells them itself.
            by: the follower that makes the change.

        Raises:
            ValueError: see ``attach``; if a follower refuses; or within a turn.
        """
        around = self._open
        if around == _TURN:
            raise ValueError(f"{what or _TURN} has to wait until the turn that is under way is final")
        self.attach()
        if around is None:
            self.followers.begin() if what is None else self.followers.before(what, by)
        before = Checkpoint(self)
        try:
            self._open = what or _TURN
            with nullcontext() if what is None else self.followers.silenced():
                yield before
        except BaseException:
            if not before.settled:
                self.put_back(before)
            raise
        finally:
            self._open = around
        if around is None and what is not None:
            self.followers.after(what, by)

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Add updates by module name; within ``change``.

        Raises:
            ValueError, LinAlgError: for an update that does not fit or is not finite.
        """
        self._check_open()
        for name, update in updates.items():
            self._held[name].apply(update)
        self._known = self._fingerprints()

    def load(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Take over masters by module name, from any device; within ``change``."""
        self._check_open()
        self._write(masters)

    def add(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Add updates by module name: all of them or none. Errors as ``change`` and ``apply``."""
        with self.change("adding updates"):
            self.apply(updates)

    def shrink(self, share: float) -> None:
        """W <- W0 + share (W - W0). Errors as ``change``."""
        with self.change("shrinking what was added"), torch.no_grad():
            for name, weight in self.items():
                weight.master.sub_(self._difference(name), alpha=1.0 - share)
                weight.live.copy_(weight.master)
            self._known = self._fingerprints()

    def changes(self) -> dict[str, torch.Tensor]:
        """Master less original weight, by module name, in the layout of the module."""
        self.attach()
        return {name: self._difference(name) for name in self}

    def keep_originals(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take the present weights, or those given by module name, as the original ones.

        Raises:
            ValueError: as ``OriginalWeights.keep``; or within ``unedited``.
        """
        self.originals.refuse_if_shown("keep its weights")
        self.originals.keep(weights)

    def put_back(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint without a word to the followers: for what is a part of a change, or its end."""
        with undisturbed():
            for part, before in checkpoint.statistics:
                part.restore(before)
            self._write(checkpoint.masters)

    def _write(self, masters: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, weight in self._held.items():
                weight.master.copy_(masters[name])
                weight.live.copy_(weight.master)
        self._known = self._fingerprints()

    def _difference(self, name: str) -> torch.Tensor:
        master = self._held[name].master
        return master - self.originals[name].to(master)

    def _hold(self, module: EditModule, changed: bool) -> MasterWeight:
        held, live = self._held.get(module.name), module.weight
        if held is not None and not changed and _place(held.live) == _place(live):
            return held
        with torch.inference_mode(False):  # the caller may leave it before the next edit
            fresh = MasterWeight(live, module.layout, exact_revert=False)
            if held is not None and not changed:  # moved: a half-precision weight does not say all of its master
                fresh.master.copy_(held.master)
        return fresh

    def _fingerprints(self) -> dict[str, bytes]:
        return {module.name: fingerprint(module.weight) for module in self.modules}

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("edited weights change only within EditedWeights.change")


class Checkpoint:
    """Weights and statistics at one moment. Statistics cost nothing to keep, weights a copy of their masters.

    Attributes:
        settled: whether the change that began here stands, whatever fails from now on.
    """

    def __init__(self, weights: EditedWeights) -> None:
        weights.attach()
        self._weights = weights
        self.masters = {name: weight.master.clone() for name, weight in weights.items()}
        self.statistics = [(part, part.copy()) for part in weights.statistics.values()]
        self.settled = False

    def settle(self) -> None:
        """Let the change stand that began here."""
        self.settled = True

    def restore(self) -> None:
        """Put weights and statistics back, bit for bit.

        Raises:
            ValueError: if a follower refuses.
        """
        with self._weights.change("going back to a checkpoint"):
            self._weights.put_back(self)


def _place(weight: torch.Tensor) -> tuple[torch.device, int]:
    return weight.device, weight.data_ptr()
