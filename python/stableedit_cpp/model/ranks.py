"""The processes that edit one model together: each holds all of it, runs a share of the forward passes, and is handed
what the others found.

Every process runs the same program on the same requests. What one of them would compute batch by batch is shared out
whole batches at a time and gathered in its own order, so that several processes come to the bits of a single one, and
all take the same decisions. Where nobody shares (``data_parallel``), there is one process, which does all.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, TypeVar

import torch
import torch.distributed as dist

from stableedit_cpp.errors import RankLost, RanksDiffer, StableEditError
from stableedit_cpp.model.exchange import all_gather, broadcast, carrier, first_carrier

__all__ = ["Distributed", "Ranks", "data_parallel", "deal", "ranks"]

Distributed = Literal["auto"] | dist.ProcessGroup | None

_T = TypeVar("_T")


class Ranks:
    """A process among those that work together, or alone.

    Attributes:
        rank: its number, from 0, the lead, which alone writes files and shows progress. size: how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group, self._count = group, 0
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._device = self._home = torch.device("cpu") if group is None else first_carrier(group)

    @property
    def lead(self) -> bool:
        return self.rank == 0

    def serve(self, device: torch.device) -> None:
        """Be about to hand on tensors of a model on this device.

        Raises:
            ValueError: where the group's backend cannot move them.
        """
        if self._group is not None:
            self._device, self._home = carrier(device, self._group), device

    def gathered(self, label: str, work: Callable[[], _T]) -> list[_T]:
        """What ``work`` gives in every process, in order. An error in one of them is an error in all.

        Args:
            label: what is exchanged; the same everywhere.

        Raises:
            StableEditError, ValueError, LinAlgError: what ``work`` raised in the first process in which it did.
            RankLost: for what else it raised in another; where a process has gone, or came to another place.
        """
        if self._group is None:
            return [work()]
        mine, error = None, None
        try:
            with _alone():
                mine = work()
        except BaseException as raised:
            error = raised
        found = self._exchange(label, all_gather, (mine, _told(error)))
        if error is not None:
            raise error
        for rank, (_, told) in enumerate(found):
            if told is not None:
                raise _raised(told, rank)
        return [content for content, _ in found]

    def shared(self, label: str, costs: Sequence[float], work: Callable[[int], _T]) -> list[_T]:
        """What ``work`` gives for each of some pieces by number, each done by one process; in order.

        Args:
            costs: of each piece; they are dealt out so that all have about as much to do.
        """
        if self.size == 1:
            return [work(piece) for piece in range(len(costs))]
        owners = deal(costs, self.size)
        mine = [piece for piece, owner in enumerate(owners) if owner == self.rank]
        found = self.gathered(label, lambda: [work(piece) for piece in mine])
        if [len(part) for part in found] != [owners.count(rank) for rank in range(self.size)]:
            raise RankLost(f"the processes have come apart: while {label}, they had not the same to do")
        parts = [iter(part) for part in found]
        return [next(parts[owner]) for owner in owners]

    def everywhere(self, label: str, work: Callable[[], _T]) -> _T:
        """Do this in every process, and go on only if all of them have; returns what it gave in this one."""
        if self._group is None:
            return work()
        kept: list[_T] = []
        self.gathered(label, lambda: kept.append(work()))
        return kept[0]

    def by_lead(self, label: str, work: Callable[[], _T]) -> _T:
        """What ``work`` gives in the lead, which alone does it."""
        if self._group is None:
            return work()
        mine, error = None, None
        if self.lead:
            try:
                with _alone():
                    mine = work()
            except BaseException as raised:
                error = raised
        content, told = self._exchange(label, broadcast, (mine, _told(error)))
        if error is not None:
            raise error
        if told is not None:
            raise _raised(told, 0)
        return content

    def lead_first(self, label: str, work: Callable[[], _T]) -> _T:
        """Do this in the lead and, once it has succeeded there, in all others; returns what it gave in this one."""
        kept: list[_T] = []
        self.by_lead(label, lambda: kept.append(work()))
        return kept[0] if kept else work()

    def any(self, label: str, flag: bool) -> bool:
        """Whether the flag is set in one of them."""
        return flag if self._group is None else any(self.gathered(label, lambda: flag))

    def check_same(self, parts: Mapping[str, object], remedy: str) -> None:
        """Make sure that all processes have the same.

        Args:
            parts: digests, by what they are of. remedy: what would be right.

        Raises:
            RanksDiffer: naming the first part in which a process differs from the lead.
        """
        found = self.gathered("comparing", lambda: dict(parts))
        for rank, theirs in enumerate(found):
            other = [name for name, value in found[0].items() if theirs.get(name) != value]
            if other:
                raise RanksDiffer(f"the {other[0]} of process {rank} differ from those of process 0; {remedy}")

    def _exchange(self, label: str, way: Callable, content: object):
        self._count += 1
        head = [self._count, zlib.crc32(label.encode())]
        try:
            found = way(content, head, self._group, self._device, self._home)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise RankLost(
                f"while {label}, process {self.rank} of {self.size} waited for another that has gone or did not answer "
                f"in time; the turn in flight was dropped, the turns before it stand ({reason:.200})"
            ) from None
        several = found if isinstance(found, list) else [found]
        if any(list(other) != head for other, _ in several):
            raise RankLost(
                f"the processes have come apart: while {label}, another was somewhere else; all must make the same "
                "calls with the same arguments"
            )
        return [one for _, one in found] if isinstance(found, list) else found[1]


def deal(costs: Sequence[float], hands: int) -> list[int]:
    """Who gets each piece: the dearest first, each to who has least so far."""
    owners, load = [0] * len(costs), [0.0] * hands
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += costs[piece]
    return owners


_ALONE = Ranks()
_current: ContextVar[Ranks] = ContextVar("ranks", default=_ALONE)


def ranks() -> Ranks:
    """Those that share the work here."""
    return _current.get()


@contextmanager
def data_parallel(distributed: Distributed = "auto") -> Iterator[Ranks]:
    """Within this context the processes of a group edit and evaluate one model together, each with a copy of it.

    All of them must make the same calls with the same arguments. The forward passes of captures, guards, evaluations
    and audits are shared out, and so are the modules that a turn solves for; weights and statistics are the same
    everywhere after every turn, bit for bit, which is checked, and the same as one process with as many threads would
    have. Sessions and results are written by process 0.

    Args:
        distributed: a process group; "auto" is the default group of ``torch.distributed`` where that is up, and one
            process alone where it is not. None changes nothing.
    """
    if distributed is not None and distributed != "auto" and not isinstance(distributed, dist.ProcessGroup):
        raise ValueError(f"distributed must be 'auto', a process group, or None, not {distributed!r}")
    group = distributed
    if distributed == "auto":
        group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    around = _current.get()
    if group is None or around._group is group:
        yield around
        return
    token = _current.set(Ranks(group))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


@contextmanager
def _alone() -> Iterator[None]:
    """Within a share nothing is shared further."""
    token = _current.set(_ALONE)
    try:
        yield
    finally:
        _current.reset(token)


def _told(error: BaseException | None) -> tuple[bytes | None, str] | None:
    """An error on its way to other processes: itself, if it is for the user and can be sent, and what to call it."""
    if error is None:
        return None
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    if isinstance(error, KeyboardInterrupt):
        error = KeyboardInterrupt(*error.args)
    if not isinstance(error, (ValueError, StableEditError, KeyboardInterrupt, torch.linalg.LinAlgError)):
        return None, text
    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
        return sent, text
    except Exception:
        return None, text


def _raised(told: tuple[bytes | None, str], rank: int) -> BaseException:
    sent, text = told
    return RankLost(f"process {rank} failed: {text}") if sent is None else pickle.loads(sent)
