"""``stableedit session create`` and ``edit``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stableedit_cpp.cli.choose_modules import add_choice_option, choose_for
from stableedit_cpp.cli.datasets import (
    add_format_options,
    add_warm_up_format_options,
    reading_settings,
    warm_up_settings,
)
from stableedit_cpp.cli.options import (
    FILES,
    add_editor_options,
    add_guard_options,
    add_model_options,
    editor_config,
    load,
    positive,
    set_guard,
)
from stableedit_cpp.cli.session.common import add_opening_options, new_action, opened
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.files.atomic import check_writable_file
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.view import check_new_directory
from stableedit_cpp.model.outputs import as_patterns

_CREATE = """\
  stableedit session create edits/ --model smollm2-135m
  stableedit session create fast/ --model smollm2-135m --preset one-pass --warm-up training.json --warm-up-limit 500"""
_EDIT = """\
  stableedit session edit edits/ --requests monday.jsonl

  What is done is skipped, so the same file can be given again after a crash; what was reverted or superseded since is
  edited again. A request is known again by its prompt, its target, its variants and, if it has one, its "id"."""


def add_parsers(actions) -> None:
    parser = new_action(actions, "create", "begin a session with an unedited model", _CREATE, create)
    add_model_options(parser)
    add_editor_options(parser)
    add_choice_option(parser)
    parser.add_argument(
        "--detail",
        choices=["factors", "requests"],
        default="factors",
        help="what the journal holds: factors (turns are done again without running the model; default) or only "
        "requests (compact; turns are edited again)",
    )
    parser.add_argument("--snapshot-every", type=positive, default=10, metavar="N", help="turns (default 10)")
    parser.add_argument(
        "--keep-snapshots", type=positive, default=3, metavar="N", help="of the newest, besides the first (default 3)"
    )
    _add_warm_up(parser)
    add_guard_options(parser)

    parser = new_action(actions, "edit", "edit a file of requests, or what is left of it", _EDIT, edit)
    parser.add_argument("--requests", required=True, metavar="FILE", help=FILES)
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N requests of the file")
    _add_warm_up(parser)
    add_guard_options(parser)
    add_opening_options(parser)


def _add_warm_up(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--warm-up", metavar="FILE", help="training stream that is edited first and stays in the model")
    parser.add_argument("--warm-up-limit", type=positive, metavar="N", help="only its first N requests")
    add_format_options(parser)
    add_warm_up_format_options(parser)


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
        print(f"The session edits {as_patterns(session.editor.config.edit_modules)} ({why})")
        if warm_up:
            set_guard(session.editor, options)
        _warm_up(session, warm_up)
    print(session.status())
    return 0


def edit(options: argparse.Namespace) -> int:
    requests = read_requests(options.requests, options.limit, **reading_settings(options))
    warm_up = _read_warm_up(options)
    with opened(options) as session:
        pending = session.pending(requests)
        session.editor.check(pending)
        set_guard(session.editor, options)
        _warm_up(session, warm_up)
        _say_what_is_left(requests, pending, options.requests)
        report = session.edit(pending, progress=True)
        print(report)
    print(session.status())
    return 0


def _read_warm_up(options: argparse.Namespace) -> list[EditRequest]:
    if not options.warm_up:
        return []
    return read_requests(options.warm_up, options.warm_up_limit, **warm_up_settings(options))


def _warm_up(session: LifelongSession, requests: list[EditRequest]) -> None:
    pending = session.pending(requests, warm_up=True)
    _say_what_is_left(requests, pending, "the warm-up file")
    if pending:
        print(session.warm_up(pending, progress=True))


def _say_what_is_left(requests: Sequence[EditRequest], pending: Sequence[EditRequest], source: str) -> None:
    skipped = len(requests) - len(pending)
    if skipped:
        print(f"{skipped} request{'s' * (skipped != 1)} of {source} {'is' if skipped == 1 else 'are'} done and skipped")
    ids = {request.id for request in requests}
    again = [request.id for request in pending if request.id not in ids and request.id.rpartition("-")[0] in ids]
    if again:
        names = ", ".join(again[:3]) + ", ..." * (len(again) > 3)
        print(f"{len(again)} of {source}: the id was used before, so the request is edited under a new one: {names}")
