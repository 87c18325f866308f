"""Begins a session, and opens one again: its model known again, what a crash left cut off, the state restored."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

from stableedit_cpp.editors import Editor, make_editor, parse_config
from stableedit_cpp.editors.identity import check_identity, edited_weights, identity
from stableedit_cpp.editors.weights import Checkpoint
from stableedit_cpp.errors import DamagedJournal, SessionWriteError
from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.environment import environment
from stableedit_cpp.files.lock import HeldElsewhere, WriterLock
from stableedit_cpp.files.words import now
from stableedit_cpp.lifelong.journal.journal import Journal
from stableedit_cpp.lifelong.journal.restore import restore
from stableedit_cpp.lifelong.journal.snapshots import Snapshots, state_fingerprints
from stableedit_cpp.lifelong.journal.writer import append, append_moved
from stableedit_cpp.lifelong.view import FORMAT, SessionView
from stableedit_cpp.model.packed import packed_again
from stableedit_cpp.model.packed_gguf import as_packed, gguf_maps
from stableedit_cpp.model.ranks import ranks

__all__ = ["begin", "editor_on", "held", "recover"]


def begin(directory: Path, editor: Editor, settings: dict[str, object], source: str | None) -> None:
    """Make the directory of a session: its first record, which says all about it, and its first snapshot.

    Args:
        settings: "detail", "snapshot_every" and "keep_snapshots".

    Raises:
        SessionWriteError: if it cannot be written; nothing is left of it then.
    """
    state = editor.state_dict()
    source = source or getattr(editor.model.config, "_name_or_path", "") or None
    if source is not None and Path(source).exists():
        source = str(Path(source).absolute())  # the session is opened from other directories, too
    manifest = {
        "kind": "created",
        **FORMAT,
        "time": now(),
        "turn": 0,
        **settings,
        "config": json.loads(editor.config.to_json()),
        "model": {
            "source": source,
            **({"keep_packed": True} if gguf_maps(editor.model) else {}),
            **identity(editor.model, editor.tokenizer, editor.modules, editor.form),
        },
        "state": state_fingerprints(state),
        "environment": environment(),
    }
    try:
        with new_directory(directory) as scratch:
            Journal.create(scratch, manifest)
            Snapshots(scratch / "snapshots", settings["keep_snapshots"]).save(0, state)
    except OSError as error:
        raise SessionWriteError(f"the session {directory} cannot be made ({error.strerror or error})") from None


def held(directory: Path) -> WriterLock | HeldElsewhere:
    """The lock of the directory; where processes edit together, the first holds it for all.

    Raises:
        SessionBusy: if another has it.
    """
    taken: list[WriterLock] = []
    ranks().by_lead("taking the session", lambda: taken.append(WriterLock(directory)))
    return taken[0] if taken else HeldElsewhere()


def recover(view: SessionView) -> None:
    """Cut off what a crash left half-written.

    Raises:
        DamagedJournal: if it is more than that. SessionWriteError: if the disk has no room for the bytes to be kept.
    """
    view.snapshots.remove_unfinished()
    damage = view.journal.damage
    if damage is None:
        view.journal.acknowledge()
        return
    if not damage.in_flight:
        raise DamagedJournal(
            f"{view.journal.path}: {damage}; turns that were done are lost from there on, so the session stays closed "
            f"until someone consents to going on without them: see `stableedit session verify {view.directory}`"
        )
    aside = view.directory / "removed" / f"record-{damage.record}-at-{damage.offset}-{time.time_ns()}"
    try:
        view.journal.cut(aside)
    except OSError as error:
        raise SessionWriteError(
            f"{view.journal.path}: {damage}; it was in flight, but its {damage.size} bytes cannot be kept in "
            f"{aside.parent} ({error.strerror}); open the session again once the disk takes them"
        ) from None
    reason = f"cut off a turn that was in flight: {damage}"
    append(view, {"kind": "recovered", "reason": reason, "bytes": damage.size, "aside": aside.name})
    warnings.warn(f"{view.directory}: {reason}; its {damage.size} bytes are kept in {aside}", stacklevel=4)


def editor_on(model, tokenizer, view: SessionView, *, exact: bool, progress: bool | None) -> Editor:
    """An editor on the model of a session, where the session stands.

    Raises:
        ValueError: for another model or tokenizer. OtherBits: see ``restore``. In both cases the model is as it was.
    """
    with packed_again(model):
        return _editor_on(model, tokenizer, view, exact=exact, progress=progress)


def _editor_on(model, tokenizer, view: SessionView, *, exact: bool, progress: bool | None) -> Editor:
    editor = make_editor(model, tokenizer, parse_config(json.dumps(view.manifest["config"])))
    remedy, created = f"load what the session {view.directory} was created with", view.manifest["model"]
    remedy += as_packed(created["source"])
    given = identity(model, tokenizer, editor.modules, editor.form)
    check_identity(given, created, remedy)
    found, unedited = given["edited"], created["edited"]

    def work(_before: Checkpoint) -> None:
        restore(view, editor, view.history.line, exact=exact, progress=progress)
        # A model that this session itself left behind may be handed back.
        if found not in (unedited, edited_weights(editor.modules)):
            raise ValueError(
                "the edited modules of the model hold neither the unedited weights nor those that the session left; "
                + remedy
            )
        if found != unedited:  # the editor takes what it is given for the original, unless told better
            originals = view.snapshots.load(0, view.history.states[0])["weights"]
            dtypes = {module.name: module.dtype for module in editor.modules}
            editor.keep_original_weights({name: weight.to(dtypes[name]) for name, weight in originals.items()})

    editor.weights.change(work, "opening a session")
    append_moved(view, editor)
    return editor
