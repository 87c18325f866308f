"""``stableedit session export``: the model where the session stands, in the form in which it is shipped."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.export import check_export_options, export
from stableedit_cpp.cli.session.common import opened
from stableedit_cpp.export import Provenance, change_of


def export_session(options: argparse.Namespace) -> int:
    check_export_options(options)
    if options.shrink is not None and not 0 < options.shrink <= 1:
        raise ValueError(f"--shrink must be greater than 0 and at most 1, not {options.shrink}")
    with opened(options) as session:
        provenance = Provenance.of_session(session, options.model, share_kept=options.shrink)
        if options.shrink is not None:
            session.close()  # what is shrunk is this process's model; the session stands where it stood
            session.editor.shrink(options.shrink)
        change = change_of(session.editor)
        with session.editor.unedited() as base:  # an export may leave it edited; here it is what it was, afterwards
            export(base, session.editor.tokenizer, change, provenance, options)
    return 0
