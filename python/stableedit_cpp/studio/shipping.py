"""Exports of the model where a session stands, into directories beside that of the session."""

from __future__ import annotations

from pathlib import Path

from stableedit_cpp.export import (
    Provenance,
    change_of,
    export_delta,
    export_gguf,
    export_lora,
    export_model,
    export_patch,
)
from stableedit_cpp.lifelong import LifelongSession

__all__ = ["KINDS", "exports_of", "ship"]

KINDS = {
    "model": "the whole model",
    "delta": "the changed tensors, bit for bit",
    "lora": "a LoRA adapter that keeps 95 % of the change",
    "patch": "a patch for libstableedit",
    "gguf": "a GGUF file of the whole model for llama.cpp",
}
_KEEP = 0.95  # of the norm of the change, as `stableedit session export` has it


def exports_of(directory: Path) -> Path:
    """Where the exports of a session lie."""
    directory = directory.absolute()
    return directory.with_name(f"{directory.name}-exports")


def ship(session: LifelongSession, kind: str) -> str:
    """Export, and say where it is; another export of the same turn and kind is replaced.

    Args:
        kind: of ``KINDS``.

    Raises:
        ValueError: for another kind, or as the exports. OSError: if it cannot be written; nothing is left behind then.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no export {kind!r}; known are: {', '.join(KINDS)}")
    editor = session.editor
    provenance = Provenance.of_session(session, session.manifest["model"]["source"])
    change = change_of(editor)
    directory = exports_of(session.directory) / f"{kind}-turn-{session.history.turn}"
    how = {"provenance": provenance, "overwrite": True}
    if kind == "model":
        export_model(session.model, editor.tokenizer, directory, **how)
    elif kind == "gguf":
        export_gguf(session.model, editor.tokenizer, directory, **how)
    elif kind == "delta":
        export_delta(change, directory, **how)
    elif kind == "lora":
        export_lora(change, directory, keep=_KEEP, **how)
    else:
        export_patch(change, directory, **how)
    return f"{KINDS[kind]} is in {directory}, with a model card that says how to load it"
