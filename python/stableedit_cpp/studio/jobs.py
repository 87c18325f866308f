"""One thread that does all work on a model, in the order in which it was asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from stableedit_cpp.studio.bars import Bar, shown_bar

__all__ = ["Job", "Stopped", "Worker"]

_KEPT = 50  # finished jobs that are remembered


class Stopped(Exception):
    """Somebody asked a job to stop, and it did, between two turns."""


@dataclass(eq=False)
class Job:
    """A piece of work.

    Attributes:
        title: what it is, for people. number: of its worker's jobs, from 1 on.
        quick: whether it need not wait for the end of a long job, but only for that of its turn.
        state: "waiting", "running", and in the end "done", "stopped" or "failed".
        said: what came of it, for people; the error's sentence where it failed.
        notes: warnings on the way. result: what its work returned.
        begun, ended: seconds of ``time.monotonic``, 0 before.
    """

    title: str
    work: Callable[[], object]
    quick: bool = False
    number: int = 0
    state: str = "waiting"
    said: str = ""
    notes: list[str] = field(default_factory=list)
    result: object = None
    begun: float = 0.0
    ended: float = 0.0
    stopping: bool = False
    over: threading.Event = field(default_factory=threading.Event)


class Worker:
    """Does jobs one after the other in a thread of its own.

    Args:
        explain: the sentence for people that an error is.

    Attributes:
        jobs: those that wait or run, and the last of those that are over, in the order in which they were asked for.
        current: the one that runs; while a quick one runs within a long one, the long one.
    """

    def __init__(self, explain: Callable[[Exception], str] = str) -> None:
        self.jobs: list[Job] = []
        self.current: Job | None = None
        self._explain = explain
        self._change = threading.Condition(threading.RLock())
        self._closing = False
        self._numbers = count(1)
        self._innermost: Job | None = None
        self._thread = threading.Thread(target=self._run, name="stableedit-studio", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, title: str, work: Callable[[], object], *, quick: bool = False) -> Job:
        """Ask for work; its result is for people where it is a text.

        Raises:
            RuntimeError: once ``close`` was called.
        """
        with self._change:
            if self._closing:
                raise RuntimeError("the studio is closing; nothing new is begun")
            job = Job(title, work, quick, next(self._numbers))
            over = [one for one in self.jobs if one.over.is_set()]
            for old in over[: max(0, len(over) - _KEPT)]:
                self.jobs.remove(old)
            self.jobs.append(job)
            self._change.notify()
        return job

    def stop(self, job: Job) -> None:
        """Let a job end after the turn in flight; one that waits never begins."""
        with self._change:
            job.stopping = True
            if job.state == "waiting":
                self._end(job, "stopped", "it had not begun")

    def close(self) -> None:
        """Begin nothing more, stop what runs after its turn, and wait for that."""
        with self._change:
            self._closing = True
            for job in self.jobs:
                if not job.over.is_set():
                    self.stop(job)
            self._change.notify()
        self._thread.join()

    def breathe(self) -> None:
        """Called by a long job between two turns: does the quick jobs that wait.

        Raises:
            Stopped: if the job is to end.
        """
        while (job := self._next(quick=True)) is not None:
            self._do(job)
        if self.current is not None and self.current.stopping:
            raise Stopped

    def note(self, message: str) -> bool:
        """Take a warning for the job that is under way; False where it came from another thread."""
        if threading.current_thread() is not self._thread or self._innermost is None:
            return False
        self._innermost.notes.append(message)
        return True

    @property
    def bar(self) -> Bar | None:
        """How far the present job is."""
        return shown_bar() if self.current is not None else None

    def _run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._closing or self._next() is not None)
                job = self._next()
                if job is None:
                    return
                self.current = job
            try:
                self._do(job)
            finally:
                self.current = None

    def _next(self, *, quick: bool = False) -> Job | None:
        with self._change:
            return next((job for job in self.jobs if job.state == "waiting" and (job.quick or not quick)), None)

    def _do(self, job: Job) -> None:
        around, self._innermost = self._innermost, job
        job.begun, job.state = time.monotonic(), "running"
        try:
            job.result = job.work()
            state, said = "done", job.result if isinstance(job.result, str) else ""
        except Stopped as stop:
            state, said = "stopped", str(stop)
        except Exception as error:
            state, said = "failed", self._explain(error)
        finally:
            self._innermost = around
        with self._change:
            self._end(job, state, said)

    @staticmethod
    def _end(job: Job, state: str, said: str) -> None:
        job.said, job.ended, job.state = said, time.monotonic(), state
        job.work = _nothing  # what it held on to, a file's requests say
        job.over.set()


def _nothing() -> None:
    """The work of a job that is over."""
