"""The ``stableedit`` command: one file a subcommand, each with ``add_parser`` and ``run``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 2 bad input, 130 interrupted, 141 output not read)."""
    # oneDNN keeps a compiled kernel for every shape of a batch, a thousand of them in two caches: 300 MiB along a
    # stream whose batches hardly ever have the same shape twice. It reads this when it compiles the first.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    # Imported late, so that `stableedit --help` and a wrong torch version answer before torch is loaded.
    try:
        from stableedit_cpp.cli import (
            bench,
            datasets,
            demo,
            edit,
            env,
            evaluate,
            export,
            report,
            session,
            side_effects,
        )
        from stableedit_cpp.files.environment import cmake_prefix
    except ImportError as error:
        print(f"stableedit: error: {error}", file=sys.stderr)
        return 2
    import torch

    parser = argparse.ArgumentParser(
        prog="stableedit",
        description="Lifelong editing of facts in language models.",
        epilog="Start with: stableedit demo. Each command has --help with an example.",
    )
    parser.add_argument(
        "--cmake-prefix",
        action=_Print,
        const=cmake_prefix(),
        help="print the CMAKE_PREFIX_PATH with which C++ projects find stableedit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (demo, edit, session, evaluate, export, datasets, bench, side_effects, report, env):
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(argv)
    try:
        status = options.run(options)
        sys.stdout.flush()  # here, where a closed pipe is caught
        return status
    except KeyboardInterrupt as error:
        print(f"stableedit: interrupted: {error}" if str(error) else "stableedit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, e.g. `stableedit session log DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except torch.OutOfMemoryError as error:
        message = f"{str(error).splitlines()[0]} Use a smaller max_tokens_per_forward, or a smaller dtype."
    except (ValueError, OSError, torch.linalg.LinAlgError) as error:
        message = _sentence(error)
    print(f"stableedit: error: {message}", file=sys.stderr)
    return 2


class _Print(argparse.Action):
    """Prints its ``const`` as one line and ends; argparse's own "version" action wraps it."""

    def __init__(self, option_strings, dest, const, **settings) -> None:
        super().__init__(option_strings, dest, nargs=0, const=const, **settings)

    def __call__(self, parser, *_) -> None:
        print(self.const)
        parser.exit()


def _sentence(error: BaseException) -> str:
    """One line for a person: the operating system's errors carry a number and a name of their own."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    # C++ errors carry a stack trace after the first paragraph when that is switched on.
    lines = [line.strip() for line in str(error).split("\nException raised from")[0].strip().splitlines()]
    return " ".join([*lines[:1], "; ".join(lines[1:])]).strip()
