"""``stableedit session rollback`` and ``revert``."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import show
from stableedit_cpp.cli.session.common import opened
from stableedit_cpp.cli.together import writes


def rollback(options: argparse.Namespace) -> int:
    with opened(options) as session:
        session.rollback(options.to_turn, progress=True)
    if not writes():  # the one that does may be about to
        return 0
    status = session.status()
    show(options, status, status)
    return 0


def revert(options: argparse.Namespace) -> int:
    with opened(options) as session:
        report = session.revert(options.ids, others=options.others, bring_back=not options.only_take_out, progress=True)
    show(options, report, report)
    return 0
