"""``stableedit editors``: what ``--editor``, ``--preset`` and ``stableedit bench --editor`` may name."""

from __future__ import annotations

import argparse
import json

from stableedit_cpp.cli.options import show
from stableedit_cpp.editors import EDITORS
from stableedit_cpp.editors.registry import load_plugins
from stableedit_cpp.files.table import Table, label

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    load_plugins()
    document = [
        {
            "name": editor.name,
            "editor": editor.config.editor,
            "summary": editor.summary,
            "ablation": editor.ablation,
            "config": json.loads(editor.config.to_json()),
        }
        for editor in EDITORS.values()
    ]
    rows = [[label(editor.name), label(editor.config.editor), label(editor.summary)] for editor in EDITORS.values()]
    show(options, document, Table(["settings", "editor", "what it is"], rows).plain())
    return 0
