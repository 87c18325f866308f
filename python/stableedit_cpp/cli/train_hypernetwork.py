"""``stableedit train-hypernetwork``: train the hypernetwork of RLEdit or MALMEN, into a file to begin with."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stableedit_cpp.cli.datasets import reading_settings
from stableedit_cpp.cli.options import editor_config, load, note, show
from stableedit_cpp.cli.sentence import plain_warnings
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import Editor, make_editor
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.files.atomic import check_writable_file
from stableedit_cpp.model.outputs import as_patterns


def run(options: argparse.Namespace) -> int:
    config = editor_config(options)
    if not isinstance(config, HypernetworkConfig):
        raise ValueError(f"{config.editor} has no hypernetwork to train; --editor takes rledit or malmen here")
    check_writable_file(options.output)
    kept = Path(options.output).absolute().with_name(f"{Path(options.output).name}.unfinished")
    requests = read_requests(options.requests, options.limit, **reading_settings(options))
    model, tokenizer = load(options)
    with plain_warnings():
        editor = make_editor(model, tokenizer, config)
        kept.parent.mkdir(parents=True, exist_ok=True)
        report = _train(editor, requests, kept)
    editor.save_hypernetwork(options.output)
    kept.unlink(missing_ok=True)
    names = [module.name for module in editor.modules]
    document = {"model": options.model, "requests_file": options.requests, "output": options.output}
    document |= {"edit_modules": names, **report.to_dict()}
    show(options, document, f"{config.editor} for {as_patterns(names)}: {report}.")
    note(f"the hypernetwork is in {options.output}")
    return 0


def _train(editor: Editor, requests: Sequence[EditRequest], kept: Path) -> object:
    try:
        return editor.train(requests, checkpoint=kept, progress=True)
    except KeyboardInterrupt:
        if not kept.exists():
            raise
        raise KeyboardInterrupt(f"the same command goes on from what {kept} has of the training") from None
