"""``stableedit studio``: a page on this machine over a session."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stableedit_cpp.cli.options import load, set_guard
from stableedit_cpp.cli.sentence import sentence
from stableedit_cpp.cli.session.common import opened
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.view import check_directory
from stableedit_cpp.studio.addresses import is_loopback, listening
from stableedit_cpp.studio.desk import Desk
from stableedit_cpp.studio.serving import check_packages, serving


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
            print("Ending after the turn in flight; Ctrl-C again drops it", flush=True)
            try:
                desk.worker.close()
            except KeyboardInterrupt:
                os._exit(130)  # as a crash would; a session that is closed amid a turn could be none
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
