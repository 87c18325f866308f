"""Who hears of everything that happens to an editor's weights, and may refuse it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

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
    """

    def __init__(self) -> None:
        self.on_turn: Callable[[AppliedTurn], object] | None = None
        self._members: list[Follower] = []

    def __bool__(self) -> bool:
        """Whether anybody listens to turns."""
        return bool(self._members) or self.on_turn is not None

    def add(self, follower: Follower) -> None:
        """From now on it hears of everything."""
        self._members.append(follower)

    def remove(self, follower: Follower) -> None:
        """It hears of nothing any more."""
        self._members.remove(follower)

    def begin(self) -> None:
        for follower in self._members:
            follower.begin()

    def applied(self, turn: AppliedTurn) -> None:
        if self.on_turn is not None:
            self.on_turn(turn)
        for follower in self._members:
            follower.applied(turn)

    def record(self, turn: AppliedTurn) -> None:
        for follower in self._members:
            follower.record(turn)

    def final(self, turn: AppliedTurn) -> None:
        self._tell(lambda follower: follower.final(turn), self._members)

    def before(self, change: str, by: Follower | None = None) -> None:
        """
        Args:
            by: who makes the change, and is not asked.
        """
        for follower in self._members:
            if follower is not by:
                follower.before(change)

    def after(self, change: str, by: Follower | None = None) -> None:
        self._tell(lambda follower: follower.after(change), [member for member in self._members if member is not by])

    @contextmanager
    def silenced(self, on_turn: Callable[[AppliedTurn], object] | None = None) -> Iterator[None]:
        """Within this context nobody is asked or told anything; only ``on_turn`` is called, with the turns."""
        before = self.on_turn, self._members
        try:
            self.on_turn, self._members = on_turn, []
            yield
        finally:
            self.on_turn, self._members = before

    @staticmethod
    def _tell(call: Callable[[Follower], object], members: list[Follower]) -> None:
        with ExitStack() as stack:  # which makes all calls, also after one that raises
            for follower in reversed(members):
                stack.callback(call, follower)
