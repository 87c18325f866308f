"""One writer; whoever only asks who that is never stands in the way."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stableedit_cpp.errors import SessionBusy
from stableedit_cpp.files.lock import WriterLock, writer


def poll(directory: Path) -> None:
    """As a monitor would, only without a pause."""
    while True:
        writer(directory)


@contextlib.contextmanager
def polled(directory: Path, processes: int = 2) -> Iterator[None]:
    forking = multiprocessing.get_context("fork")  # nothing but file locks is used in the children
    pollers = [forking.Process(target=poll, args=[directory], daemon=True) for _ in range(processes)]
    for poller in pollers:
        poller.start()
    try:
        yield
        assert all(poller.is_alive() for poller in pollers)
    finally:
        for poller in pollers:
            poller.kill()
            poller.join()


def test_asking_never_refuses_an_open(tmp_path):
    with polled(tmp_path):
        for _ in range(300):
            lock = WriterLock(tmp_path)
            assert writer(tmp_path).startswith(f"by process {os.getpid()} on ")
            lock.release()


def test_one_writer_for_all_that_ask(tmp_path):
    """Threads that open and close at will never hold it together."""
    holders, most = 0, 0
    refused: list[str] = []
    counting = threading.Lock()

    def open_and_close() -> None:
        nonlocal holders, most
        for _ in range(100):
            try:
                lock = WriterLock(tmp_path)
            except SessionBusy as error:
                refused.append(str(error))
                continue
            with counting:
                holders += 1
                most = max(most, holders)
            time.sleep(0.001)  # long enough for others to ask meanwhile, however busy the machine is
            with counting:
                holders -= 1
            lock.release()

    threads = [threading.Thread(target=open_and_close) for _ in range(4)]
    with polled(tmp_path, 1):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1
    assert refused
    assert all("is open for writing by" in message for message in refused)
    assert writer(tmp_path) is None


def test_a_reader_that_was_stopped_in_the_moment_of_asking(tmp_path):
    """The writer goes on; only those who ask do not see it."""
    WriterLock(tmp_path).release()
    with (tmp_path / ".writing").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        lock = WriterLock(tmp_path)
        with pytest.raises(SessionBusy, match=f"by process {os.getpid()}"):
            WriterLock(tmp_path)
        lock.release()


def test_a_process_that_was_started_meanwhile_does_not_keep_it(tmp_path):
    """A forked worker, of a data loader say, has the descriptors of its parent."""
    lock = WriterLock(tmp_path)
    forking = multiprocessing.get_context("fork")
    child = forking.Process(target=threading.Event().wait, daemon=True)
    child.start()
    try:
        lock.release()
        assert writer(tmp_path) is None
        WriterLock(tmp_path).release()
    finally:
        child.kill()
        child.join()


def test_nobody_ever_wrote(tmp_path):
    assert writer(tmp_path) is None
    assert not list(tmp_path.iterdir())
