"""The weights of the edited modules: one owner, through which every change goes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import torch

from stableedit_cpp.core import LowRankUpdate, MasterWeight
from stableedit_cpp.editors.followers import Follower, Followers
from stableedit_cpp.editors.interrupt import undisturbed
from stableedit_cpp.editors.originals import OriginalWeights
from stableedit_cpp.editors.solver import Statistic
from stableedit_cpp.files.digest import checksum
from stableedit_cpp.model.modules import EditModule

__all__ = ["Checkpoint", "EditedWeights"]

Statistics = Mapping[str, Statistic]
_Result = TypeVar("_Result")
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
        revision: how many changes there were; who remembers it sees whether there was another.
        known: checksums of the weights as the last change left them.
    """

    def __init__(self, modules: Sequence[EditModule], statistics: Statistics) -> None:
        self.modules = modules
        self.statistics = statistics
        self.originals = OriginalWeights(modules)
        self.followers = Followers()
        self._held: dict[str, MasterWeight] = {}
        self._columns = {module.name: module.columns for module in modules if module.columns is not None}
        self._places: dict[str, tuple] = {}  # of the weights that are held
        self.revision = 0
        self.known: Mapping[str, bytes] = {}
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
        found = self._checksums()
        changed = [name for name, known in self.known.items() if found[name] != known]
        what = f"a change of {', '.join(changed)} that went past the editor"
        if changed:
            self.followers.before(what)
        self._held = {module.name: self._hold(module, module.name in changed) for module in self.modules}
        self.known = found
        if changed:
            self.revision += 1
            self.followers.after(what)

    def change(
        self, work: Callable[[Checkpoint], _Result], what: str | None = None, by: Follower | None = None
    ) -> _Result:
        """Make one change: if ``work`` raises, weights and statistics are what they were, bit for bit, unless it has
        told the checkpoint that it is given to ``settle``. Within another change the followers are not asked or told.

        A function and no context manager, because Python may let a signal in between that and its block.

        Args:
            work: does it, and gives the result.
            what: it is, for the followers; None for a turn, which tells them itself.
            by: the follower that makes the change.

        Raises:
            ValueError: see ``attach``; if a follower refuses; or within a turn.
        """
        around, muted = self._open, self.followers.muted
        if around == _TURN:
            raise ValueError(f"{what or _TURN} has to wait until the turn that is under way is final")
        self.attach()
        if around is None:
            self.followers.begin() if what is None else self.followers.before(what, by)
        before = Checkpoint(self)
        try:
            self._open = what or _TURN
            self.followers.muted = muted or what is not None
            result = work(before)
            before.settle()
        finally:
            if not before.settled:
                self.put_back(before)
            self._open, self.followers.muted = around, muted
            if around is None and before.settled:
                self.revision += 1
        if around is None and what is not None:
            self.followers.after(what, by)
        return result

    def check(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Raise what ``apply`` would raise for these updates."""
        for name, update in updates.items():
            self._held[name].check(self._own(name, update))

    def apply(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Add updates by module name; within ``change``.

        Raises:
            ValueError, LinAlgError: for an update that does not fit or is not finite.
        """
        self._check_open()
        for name, update in updates.items():
            self._held[name].apply(self._own(name, update))
        self._settle(updates)
        self.known = self._checksums()

    def load(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Take over masters by module name, from any device; within ``change``."""
        self._check_open()
        self._write(masters)
        self._settle()
        self.known = self._checksums()

    def add(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Add updates by module name: all of them or none. Errors as ``change`` and ``apply``."""
        self.change(lambda _: self.apply(updates), "adding updates")

    def shrink(self, share: float) -> None:
        """W <- W0 + share (W - W0). Errors as ``change``."""

        def work(_before: Checkpoint) -> None:
            with torch.no_grad():
                for name, weight in self.items():
                    weight.master.sub_(self._difference(name), alpha=1.0 - share)
                    weight.live.copy_(weight.master)
            self._settle()
            self.known = self._checksums()

        self.change(work, "shrinking what was added")

    def changes(self) -> dict[str, torch.Tensor]:
        """Master less original weight, by module name, in the layout of the module."""
        self.attach()
        return {name: self._difference(name) for name in self}

    def keep_originals(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take the present weights, or those given by module name, as the original ones.

        Raises:
            ValueError: as ``OriginalWeights.keep``; within ``unedited``; or if somebody follows, who would go on to
                reckon from the other ones.
        """
        self.originals.refuse_if_shown("keep its weights")
        if self.originals and len(self.followers):
            raise ValueError("the editor is followed, by a session or a patch recorder; keep its weights before that")
        self.originals.keep(weights)

    def put_back(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint without a word to the followers: for what is a part of a change, or its end."""
        with undisturbed():
            for part, before in checkpoint.statistics:
                part.restore(before)
            self._write(checkpoint.masters)
            for module in self.modules:
                if module.name in checkpoint.files:
                    module.put_back(checkpoint.files[module.name])
            self.known = checkpoint.known

    def _write(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Into memory; ``_settle`` what rests elsewhere."""
        with torch.no_grad():
            for name, weight in self._held.items():
                weight.master.copy_(masters[name])
                weight.live.copy_(weight.master)

    def _own(self, name: str, update: LowRankUpdate) -> LowRankUpdate:
        """What this process adds of an update to what it holds of a weight."""
        columns = self._columns.get(name)
        return update if columns is None else columns.of(update)

    def _settle(self, names: Collection[str] | None = None) -> None:
        """Write what is held here of weights on the disk to where they rest."""
        for module in self.modules:
            if module.on_disk and (names is None or module.name in names):
                module.write(self._held[module.name].live)

    def _difference(self, name: str) -> torch.Tensor:
        master = self._held[name].master
        return master - self.originals[name].to(master)

    def _hold(self, module: EditModule, changed: bool) -> MasterWeight:
        held, place = self._held.get(module.name), module.place
        if held is not None and not changed and self._places[module.name] == place:
            return held
        with torch.inference_mode(False):  # the caller may leave it before the next edit
            live = module.weight.to(module.home, copy=module.on_disk)
            fresh = MasterWeight(live, module.layout, exact_revert=False)
            if held is not None and not changed:  # moved: a half-precision weight does not say all of its master
                fresh.master.copy_(held.master)
        self._places[module.name] = place
        return fresh

    def _checksums(self) -> dict[str, bytes]:
        return {module.name: checksum(module.weight) for module in self.modules}

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("edited weights change only within EditedWeights.change")


class Checkpoint:
    """Weights and statistics at one moment. Statistics cost nothing to keep, weights a copy of their masters; of those
    on the disk also the files, so that going back needs no room there.

    Attributes:
        settled: whether the change that began here stands, whatever fails from now on.
    """

    def __init__(self, weights: EditedWeights) -> None:
        self._weights = weights
        self.masters = {name: weight.master.clone() for name, weight in weights.items()}
        self.files = {module.name: module.kept() for module in weights.modules if module.on_disk}
        self.known = weights.known
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
        self._weights.change(lambda _: self._weights.put_back(self), "going back to a checkpoint")
