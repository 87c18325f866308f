"""``stableedit studio``: a page on this machine over a session."""

from __future__ import annotations

import argparse
import secrets
import signal
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stableedit_cpp.cli.options import add_guard_options, load, new_parser, positive, set_guard
from stableedit_cpp.cli.sentence import sentence
from stableedit_cpp.cli.session.common import add_opening_options, opened
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.view import check_directory
from stableedit_cpp.studio.addresses import is_loopback, listening
from stableedit_cpp.studio.desk import Desk
from stableedit_cpp.studio.serving import check_packages, serving

_EXAMPLE = """\
  stableedit studio edits/                          # a session that is there
  stableedit studio edits/ --model smollm2-135m     # or a new one, with the default editor
  ssh -L 7860:localhost:7860 HOST                   # the page of another machine, at home

  Ctrl-C ends it after the turn in flight. A crash loses at most that turn; give a file again to go on with it."""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "edit on a page in the browser: ask, edit, audit, repair, revert, roll back, export"
    parser = new_parser(commands, "studio", summary, _EXAMPLE)
    parser.add_argument("directory", metavar="DIR", help="directory of the session; with --model, also a new one")
    parser.add_argument("--port", type=positive, metavar="N", help="default: the first free one from 7860 on")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)"
    )
    parser.add_argument("--token", help="that visitors need with another --host (default: one is made and printed)")
    parser.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")
    add_guard_options(parser)
    add_opening_options(parser)
    return parser


def run(options: argparse.Namespace) -> int:
    check_packages()
    token = _token(options)
    with listening(options.host, options.port) as at, _session(options) as session:
        set_guard(session.editor, options)
        with Desk(session, lambda error: sentence(error)[0]) as desk, serving(desk, at, token) as address:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it politely is waited for, too
            with suppress(KeyboardInterrupt):
                print(f"The studio of {options.directory} is at {address} (Ctrl-C ends it)", flush=True)
                if not options.no_browser and is_loopback(options.host):
                    webbrowser.open(address)
                threading.Event().wait()
            print("Ending after the turn in flight ...", flush=True)
    return 0


def _token(options: argparse.Namespace) -> str | None:
    if options.token is not None and len(options.token) < 8:
        raise ValueError("--token must have at least 8 characters")
    return options.token or (None if is_loopback(options.host) else secrets.token_urlsafe(24))


@contextmanager
def _session(options: argparse.Namespace) -> Iterator[LifelongSession]:
    """The one that is there, or with ``--model`` a new one."""
    try:
        check_directory(Path(options.directory))
    except FileNotFoundError as error:
        if options.model is None:
            raise ValueError(f"{error}; --model NAME begins a session there") from None
        options.dtype, options.base = "auto", None
        model, tokenizer = load(options)
        with LifelongSession.create(options.directory, model, tokenizer, source=options.model) as session:
            yield session
    else:
        with opened(options) as session:
            yield session
