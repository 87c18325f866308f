"""Other threads run during a call, and may read what nobody writes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from stableedit_cpp.core import (
    NormalInverseWishart,
    Whitener,
    solve_ridge,
)
from support.core import rows, tracker_of


@pytest.mark.parametrize(
    "call",
    [
        lambda a: solve_ridge(a, a, 1.0, "primal"),
        lambda a: Whitener.full(a @ a.T),
        lambda a: NormalInverseWishart(len(a)).update(a),
    ],
    ids=["solve_ridge", "Whitener.full", "NormalInverseWishart.update"],
)
def test_other_threads_run_during_a_call(call):
    matrix = rows(700, 700)
    stamps: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.0005)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        # With the GIL held, the other thread could run before and after the call, but never in the middle of it.
        for _ in range(50):
            start = time.perf_counter()
            call(matrix)
            quarter = (time.perf_counter() - start) / 4
            if any(start + quarter < stamp < start + 3 * quarter for stamp in list(stamps)):
                return
    finally:
        stop.set()
        thread.join()
    pytest.fail("no other thread ran in the middle of any of 50 calls: the GIL is not released")


def test_threads_share_a_tracker_for_reading():
    tracker = tracker_of([rows(50, 20)], 20)
    expected, found = tracker.covariance(), []
    threads = [threading.Thread(target=lambda: found.append(tracker.covariance())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(covariance, expected) for covariance in found)
