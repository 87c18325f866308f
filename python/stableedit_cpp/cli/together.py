"""A command under torchrun: several processes edit and evaluate together, the first of them speaks and writes."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["joined", "own_copy", "speaker", "writes"]

_COMMANDS = ("edit", "evaluate", "session", "bench", "side-effects")
_FILES = ("begin", "hold", "undo")  # of cli/session/
_TOLD = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by torchrun
_PATIENCE = "STABLEEDIT_RANK_TIMEOUT"  # seconds


def _size() -> int:
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TOLD) else 1


def _rank() -> int:
    return int(os.environ["RANK"]) if _size() > 1 else 0


def writes() -> bool:
    """Whether this process writes files: the only one, or the first."""
    return _rank() == 0


def speaker() -> str:
    """Who says so, at the beginning of a message."""
    return "stableedit" if _size() == 1 else f"stableedit: process {_rank()}"


@contextmanager
def joined(options: argparse.Namespace) -> Iterator[None]:
    """Within this context the processes that torchrun has started work together; all but the first are silent. Does
    nothing where there is one.

    Raises:
        ValueError: for a command of one process, or fewer GPUs than processes.
        RankLost: if a process does not come.
    """
    if _size() == 1:
        yield
        return
    if options.command not in _COMMANDS:
        *most, last = _COMMANDS
        raise ValueError(
            f"stableedit {options.command} runs in one process; torchrun is for {', '.join(most)} and {last}"
        )
    if options.command == "session" and options.action.partition(".")[0] not in _FILES:
        raise ValueError(
            "this command of stableedit session runs in one process; torchrun is for create, edit, audit, evaluate, "
            "repair, rollback and revert"
        )
    with ExitStack() as stack:
        if not writes():
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        _join(getattr(options, "device", None))
        from stableedit_cpp.model.ranks import data_parallel

        stack.enter_context(data_parallel("auto"))
        stack.enter_context(_until_ended())
        yield
    import torch.distributed as dist

    dist.destroy_process_group()  # not after an error: others may wait in vain for it, and the process ends anyway


@contextmanager
def own_copy(directory: str) -> Iterator[str]:
    """A directory of results that a command reads and writes as it goes: the first process has it, the others a copy
    that is gone with them, so that all find the same in it."""
    if _size() == 1:
        yield directory
        return
    from stableedit_cpp.model.ranks import ranks

    with TemporaryDirectory(prefix="stableedit-") as scratch:
        own = directory if writes() else str(Path(scratch, "copy"))
        copy = not writes() and Path(directory).is_dir()
        # Nobody goes on, and writes, before all have copied.
        ranks().everywhere("copying results", lambda: shutil.copytree(directory, own) if copy else None)
        yield own


def _join(device: str | None) -> None:
    """Meet the other processes, each with a GPU of its own where the model goes on one."""
    import torch
    import torch.distributed as dist

    from stableedit_cpp.errors import RankLost

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    backend = "gloo"
    if torch.device(device).type == "cuda":
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise ValueError(f"{count} GPUs for more processes on this machine; start at most {count}, or --device cpu")
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    patience = float(os.environ.get(_PATIENCE, 1800))
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    except (RuntimeError, ValueError) as error:
        raise RankLost(
            f"the {_size()} processes have not met within {patience:g} seconds ({_PATIENCE}): one of them is missing, "
            f"or cannot reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({str(error).splitlines()[0]:.200})"
        ) from None


@contextmanager
def _until_ended() -> Iterator[None]:
    """torchrun ends all processes where one has gone: the turn in flight is dropped then, with a word."""

    def end(_number: int, _frame: object) -> None:
        raise SystemExit(
            f"{speaker()}: ended by a signal, as torchrun does where a process has gone; the turn in flight was "
            "dropped, the turns before it stand where a session has them"
        )

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
