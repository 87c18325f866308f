"""Who hears of everything that happens to an editor's weights, and may refuse it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from stableedit_cpp.editors.applied import AppliedTurn

__all__ = ["Follower", "Followers"]


class Follower:
    """What one who follows an editor may do; a subclass has the methods that it needs (``editor.followers.add``).

    Of a turn it hears ``begin``, ``applied``, ``record`` and ``final``, in this order; of any other change, such as
    loading a state or adding updates, ``before`` and ``after``. What raises in ``final`` or ``after`` undoes nothing:
    all others are told, and the error goes to the caller.
    """

    def begin(self) -> None:
        """A turn begins. Raise to refuse it."""

    def applied(self, turn: AppliedTurn) -> None:
        """A turn was applied. If this raises, it is taken back as a whole, for everybody; so keep nothing of it yet."""

    def record(self, turn: AppliedTurn) -> None:
        """Everybody has accepted the turn: write it down. When this returns, the turn is final; if it raises, it is
        taken back. For one follower, since no second could take back what the first has written."""

    def final(self, turn: AppliedTurn) -> None:
        """The turn stays in the model."""

    def before(self, change: str) -> None:
        """Another change is about to be made; raise ValueError to refuse it.

        Args:
            change: what it is, to be named in a sentence: "loading a state".
        """

    def after(self, change: str) -> None:
        """Another change was made."""


class Followers:
    """Those who follow one editor.

    Attributes:
        on_turn: called with every turn that was applied, before all followers; if it raises, the turn is taken back.
        muted: whether none of them is asked or told anything at the moment: it is part of a change that is under way.
        within: called instead of ``on_turn`` with the turns of such a change.
    """

    def __init__(self) -> None:
        self.on_turn: Callable[[AppliedTurn], object] | None = None
        self.muted = False
        self.within: Callable[[AppliedTurn], object] | None = None
        self._members: list[Follower] = []

    def __len__(self) -> int:
        return len(self._members)

    @property
    def hear_turns(self) -> bool:
        """Whether anybody listens to turns."""
        return self._hook is not None or bool(self._told)

    def add(self, follower: Follower) -> None:
        """From now on it hears of everything."""
        self._members.append(follower)

    def remove(self, follower: Follower) -> None:
        """It hears of nothing any more."""
        self._members.remove(follower)

    def begin(self) -> None:
        for follower in self._told:
            follower.begin()

    def applied(self, turn: AppliedTurn) -> None:
        if self._hook is not None:
            self._hook(turn)
        for follower in self._told:
            follower.applied(turn)

    def record(self, turn: AppliedTurn) -> None:
        for follower in self._told:
            follower.record(turn)

    def final(self, turn: AppliedTurn) -> None:
        self._tell(lambda follower: follower.final(turn), self._told)

    def before(self, change: str, by: Follower | None = None) -> None:
        """
        Args:
            by: who makes the change, and is not asked.
        """
        for follower in self._told:
            if follower is not by:
                follower.before(change)

    def after(self, change: str, by: Follower | None = None) -> None:
        self._tell(lambda follower: follower.after(change), [member for member in self._told if member is not by])

    @property
    def _hook(self) -> Callable[[AppliedTurn], object] | None:
        return self.within if self.muted else self.on_turn

    @property
    def _told(self) -> list[Follower]:
        return [] if self.muted else self._members

    @staticmethod
    def _tell(call: Callable[[Follower], object], members: list[Follower]) -> None:
        with ExitStack() as stack:  # all of them, also after one that raises
            for follower in reversed(members):
                stack.callback(call, follower)
