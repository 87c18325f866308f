"""Several processes that work together, forked from the one that tests: they need not load torch again."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from stableedit_cpp.cli import main

_PATIENCE = timedelta(seconds=60)


def together(
    size: int,
    work: Callable[[int], object],
    directory: Path,
    *,
    backend: str = "gloo",
    patience: timedelta = _PATIENCE,
) -> list[object]:
    """What ``work``, called with its rank, gives in each of ``size`` processes of a group: its result, or the error
    that it raised; None where the process ended without a word.

    Args:
        directory: an empty one, for what they say to each other.
    """
    fork = multiprocessing.get_context("fork")

    def run(rank: int) -> None:
        tqdm.set_lock(threading.RLock())  # its own: who is killed while it draws a bar would hold that of all for ever
        meet = f"file://{directory}/meet"
        dist.init_process_group(backend, init_method=meet, rank=rank, world_size=size, timeout=patience)
        try:
            found = work(rank)
        except BaseException as error:
            traceback.print_exc()
            found = error
        torch.save(found, directory / f"{rank}.part")
        os.replace(directory / f"{rank}.part", directory / f"{rank}.pt")
        os._exit(0)

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    paths = [directory / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def commands(
    argvs: Sequence[Sequence[str]], directory: Path, *, started: int | None = None
) -> list[tuple[int, str, str]]:
    """What as many processes do with these arguments of ``stableedit`` as torchrun would have started: exit status,
    standard output and standard error of each.

    Args:
        directory: an empty one. started: so many of them come; None for all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    count = len(argvs)

    def run(rank: int) -> None:
        tqdm.set_lock(threading.RLock())
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = 1
        with (directory / f"{rank}.out").open("w") as out, (directory / f"{rank}.err").open("w") as err:
            sys.stdout, sys.stderr = out, err
            try:
                status = main([str(word) for word in argvs[rank]])
            except SystemExit as end:
                print(end.code, file=err)
        os._exit(status)

    processes = [fork.Process(target=run, args=(rank,)) for rank in range(count if started is None else started)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [
        (process.exitcode, (directory / f"{rank}.out").read_text(), (directory / f"{rank}.err").read_text())
        for rank, process in enumerate(processes)
    ]
