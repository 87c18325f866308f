"""``stableedit edit``: edit a model and save it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from stableedit_cpp.cli.choose_modules import choose_for
from stableedit_cpp.cli.datasets import reading_settings, warm_up_settings
from stableedit_cpp.cli.options import editor_config, load, set_guard, show
from stableedit_cpp.cli.plan import say_what_it_takes
from stableedit_cpp.cli.sentence import sentence
from stableedit_cpp.cli.together import writes
from stableedit_cpp.core import save_patch
from stableedit_cpp.data import open_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import DriftLimitReached, Editor, make_editor
from stableedit_cpp.editors.choice import ENOUGH
from stableedit_cpp.errors import RankLost, RanksDiffer
from stableedit_cpp.evaluation import evaluate
from stableedit_cpp.export.model import check_writable_model, write_model
from stableedit_cpp.export.patch_recorder import PatchRecorder
from stableedit_cpp.export.provenance import CONFIG_FILE, REPORT_FILE, read_provenance
from stableedit_cpp.files.atomic import check_new_directory, check_writable_file, new_directory, write_json
from stableedit_cpp.files.digest import file_digest, model_digest
from stableedit_cpp.files.environment import provenance
from stableedit_cpp.lifelong.repair import repair
from stableedit_cpp.model.form import PARSED, RAW
from stableedit_cpp.model.outputs import as_patterns

_WHERE = {
    "warm_up": "in the warm-up: ",
    "edit": "",
    "repair": "in a repair: ",
    "share_kept": "while shrinking: ",
    "scores": "while scoring: ",
}


def run(options: argparse.Namespace) -> int:
    # Everything that can be wrong is looked at before the model is loaded.
    config = editor_config(options)
    _check(options)
    requests = open_requests(options.requests, options.limit, **reading_settings(options), progress=True)
    warm_up = []
    if options.warm_up:
        warm_up = open_requests(options.warm_up, options.warm_up_limit, **warm_up_settings(options), progress=True)

    model, tokenizer = load(options)
    if options.output:
        check_writable_model(model)
    sample = warm_up if len(requests) < ENOUGH <= len(warm_up) else requests
    choice, why = choose_for(options, model, tokenizer, sample, config)
    config = choice.config if choice else config
    editor = make_editor(model, tokenizer, config)
    config = dataclasses.replace(config, chat_template=editor.form.chat)  # it was decided
    editor.check(requests)
    set_guard(editor, options)
    base_digest = model_digest(model)
    recorder = PatchRecorder(editor, options.model, base_digest) if options.patch else None
    before = read_provenance(options.model)
    report: dict[str, object] = {
        "model": options.model,
        "base_digest": base_digest,
        "edited_before": before.as_earlier() if before.edits is not None else [],
        "requests": options.requests,
        "requests_digest": _digest(options.requests),
        "edit_modules": [module.name for module in editor.modules],
        "edit_modules_because": why,
        "module_choice": choice.to_dict() if choice else None,
        "form": editor.form.describe(tokenizer),
        **provenance(),
    }
    if options.warm_up:
        report |= {"warm_up_requests": options.warm_up, "warm_up_digest": _digest(options.warm_up)}

    say_what_it_takes(editor, requests)
    stop, said = _work(editor, requests, warm_up, options, report)
    said.insert(0, f"Edited in {as_patterns(report['edit_modules'])} ({why}).")
    if not writes():
        return _status(stop)
    if recorder is not None:
        Path(options.patch).absolute().parent.mkdir(parents=True, exist_ok=True)
        save_patch(options.patch, recorder.patch(Path(options.patch).stem))
        said.append(f"The patch is in {options.patch}")
    if options.output:
        with new_directory(options.output, overwrite=options.overwrite) as directory:
            (directory / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
            write_json(directory / REPORT_FILE, report)
            write_model(model, tokenizer, directory, read_provenance(directory))
        said.append(f"Model, {CONFIG_FILE} and {REPORT_FILE} are in {options.output}")
    # Printed last: a closed pipe must not cost the model.
    show(options, report, "\n".join(said))
    return _status(stop)


def _status(stop: BaseException | None) -> int:
    return 0 if stop is None else 130 if isinstance(stop, KeyboardInterrupt) else 1


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be done or saved."""
    if not options.output and not options.patch:
        raise ValueError("nothing would be saved; give --output DIR, --patch FILE or both")
    if options.shrink is not None and not 0 < options.shrink <= 1:
        raise ValueError(f"--shrink must be greater than 0 and at most 1, not {options.shrink}")
    if options.output:
        check_new_directory(options.output, overwrite=options.overwrite)
    if options.patch:
        check_writable_file(options.patch, "--patch")


def _work(
    editor: Editor,
    requests: Sequence[EditRequest],
    warm_up: Sequence[EditRequest],
    options: argparse.Namespace,
    report: dict[str, object],
) -> tuple[BaseException | None, list[str]]:
    """Do all that was asked for, and report it.

    A turn is in the model as a whole or not at all, so whatever ends the work, the turns before it are worth saving.

    Returns:
        What ended it early, Ctrl-C or an error, and the report for people. What ends it before the first turn is
        raised: there is nothing to save.
    """
    steps: dict[str, Callable[[], object]] = {"edit": lambda: editor.edit(requests, progress=True)}
    if warm_up:
        steps = {"warm_up": lambda: editor.warm_up(warm_up, progress=True), **steps}
    if options.repairs:
        steps["repair"] = lambda: repair(editor, requests, rounds=options.repairs, progress=True)
    if options.shrink is not None:
        steps["share_kept"] = lambda: editor.shrink(options.shrink) or options.shrink
    if options.evaluate:
        how = {"reference": editor.unedited, **editor.form.asked, "progress": True}
        steps["scores"] = lambda: evaluate(editor.model, editor.tokenizer, requests, **how)
    said = [] if editor.form in (RAW, PARSED) else [f"Edited as {editor.form.describe(editor.tokenizer)}."]
    stop = None
    for part, step in steps.items():
        try:
            done = step()
        except (RankLost, RanksDiffer):  # what is in memory need not be what others have
            raise
        except (KeyboardInterrupt, Exception) as error:
            done, stop = getattr(error, "report", None), error
            if part in ("warm_up", "edit") and not (done and done.edits) and "warm_up" not in report:
                raise
        if part == "share_kept":
            report[part] = done
        elif done is not None:
            report[part] = done.to_dict()
            said.append({"warm_up": f"warm-up: {done}.", "edit": f"{done}."}.get(part, str(done)))
        if stop is not None:
            how = "interrupted" if isinstance(stop, KeyboardInterrupt) else "error"
            what = sentence(stop)[0] if isinstance(stop, DriftLimitReached) else str(stop)
            report[how] = _WHERE[part] + (what or type(stop).__name__)
            print(f"stableedit: {how}: {report[how]}; saving the model as it is", file=sys.stderr)
            break
    return stop, said


def _digest(source: str) -> str | None:
    """Of a file; what a hub name stands for has none."""
    return file_digest(source) if Path(source).is_file() else None
