"""``stableedit session create`` and ``edit``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from stableedit_cpp.cli.choose_modules import choose_for
from stableedit_cpp.cli.datasets import reading_settings, warm_up_settings
from stableedit_cpp.cli.options import editor_config, load, note, set_guard, show
from stableedit_cpp.cli.session.common import opened
from stableedit_cpp.cli.together import writes
from stableedit_cpp.data import open_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import EditReport
from stableedit_cpp.files.atomic import check_writable_file
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.pending import renamed
from stableedit_cpp.lifelong.view import check_new_directory
from stableedit_cpp.model.outputs import as_patterns


def create(options: argparse.Namespace) -> int:
    config = editor_config(options)
    check_new_directory(Path(options.directory))
    check_writable_file(Path(options.directory) / "journal", "the journal")
    warm_up = _read_warm_up(options)
    model, tokenizer = load(options)
    choice, why = choose_for(options, model, tokenizer, warm_up, config)
    config = choice.config if choice else config
    settings = {name: getattr(options, name) for name in ("detail", "snapshot_every", "keep_snapshots")}
    with LifelongSession.create(
        options.directory, model, tokenizer, config, source=options.model, **settings
    ) as session:
        note(f"The session edits {as_patterns(session.editor.config.edit_modules)} ({why})")
        if warm_up:
            set_guard(session.editor, options)
        reports = _warm_up(session, warm_up)
    _show(options, session, reports)
    return 0


def edit(options: argparse.Namespace) -> int:
    requests = open_requests(options.requests, options.limit, **reading_settings(options), progress=True)
    warm_up = _read_warm_up(options)
    with opened(options) as session:
        pending = session.pending(requests)
        if warm_up:  # what is wrong with the requests is said before
            session.editor.check(pending)
        set_guard(session.editor, options)
        reports = _warm_up(session, warm_up)
        _say_what_is_left(requests, pending, options.requests)
        reports["edit"] = session.edit(pending, progress=True)
    _show(options, session, reports)
    return 0


def _read_warm_up(options: argparse.Namespace) -> Sequence[EditRequest]:
    if not options.warm_up:
        return []
    return open_requests(options.warm_up, options.warm_up_limit, **warm_up_settings(options), progress=True)


def _warm_up(session: LifelongSession, requests: Sequence[EditRequest]) -> dict[str, EditReport]:
    pending = session.pending(requests, warm_up=True)
    _say_what_is_left(requests, pending, "the warm-up file")
    return {"warm_up": session.warm_up(pending, progress=True)} if pending else {}


def _show(options: argparse.Namespace, session: LifelongSession, reports: dict[str, EditReport]) -> None:
    """What was edited, and where the session stands now."""
    if not writes():  # the one that does may be about to
        return
    status = session.status()
    document = {name: report.to_dict() for name, report in reports.items()} | {"status": asdict(status)}
    show(options, document, "\n".join(map(str, [*reports.values(), status])))


def _say_what_is_left(requests: Sequence[EditRequest], pending: Sequence[EditRequest], source: str) -> None:
    skipped = len(requests) - len(pending)
    if skipped:
        note(f"{skipped} request{'s' * (skipped != 1)} of {source} {'is' if skipped == 1 else 'are'} done and skipped")
    again = renamed(requests, pending)
    if again:
        names = ", ".join(again[:3]) + ", ..." * (len(again) > 3)
        note(f"{len(again)} of {source}: the id was used before, so the request is edited under a new one: {names}")
