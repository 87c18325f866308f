"""The whole edited model, for anything that loads models of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from stableedit_cpp.export.beside import copy_what_lies_beside
from stableedit_cpp.export.card import Card, write_card
from stableedit_cpp.export.llama_cpp.files import check_exportable, write_gguf
from stableedit_cpp.export.provenance import Provenance
from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.files.offloaded import present_state
from stableedit_cpp.model.load import drop_gguf_marks
from stableedit_cpp.model.packed import is_packed, packed_kind
from stableedit_cpp.model.packed_gguf import gguf_maps

__all__ = ["LOAD_MODEL", "check_writable_model", "export_model", "write_model"]

LOAD_MODEL = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".")
tokenizer = AutoTokenizer.from_pretrained(".")"""


def export_model(
    model: torch.nn.Module,
    tokenizer,
    directory: str | Path,
    *,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> None:
    """Save model and tokenizer with a model card, and what lay beside the model's weights where it was loaded
    (licence, SentencePiece model, processor, code); also a model that was read from a GGUF file. One whose maps
    stayed in the blocks of that (``load_model(..., keep_packed=True)``) is written as ``export_gguf`` does.

    Raises:
        ValueError: if the directory has content and ``overwrite`` is off, or quantised weights have a form that their
            library cannot save.
        OSError: if it cannot be written; nothing is left behind then.
    """
    with new_directory(directory, overwrite=overwrite) as scratch:
        write_model(model, tokenizer, scratch, provenance or Provenance())


def check_writable_model(model: torch.nn.Module) -> None:
    """Find out before hours of work what cannot be written.

    Raises:
        ValueError: for a model in the blocks of a GGUF file of which none is written here.
    """
    if gguf_maps(model):
        try:
            check_exportable(model.config)
        except ValueError as error:
            raise ValueError(
                f"a model that stayed in the blocks of a GGUF file is written as one, which this cannot be ({error}); "
                "load it without keep_packed, or export a delta, a patch or an adapter"
            ) from None


def write_model(model: torch.nn.Module, tokenizer, directory: Path, provenance: Provenance) -> None:
    """The same into a directory that is there."""
    check_writable_model(model)
    if gguf_maps(model):
        write_gguf(model, tokenizer, directory, None, provenance)
        copy_what_lies_beside(model, directory)
        return
    drop_gguf_marks(model)
    # transformers knows of what its own device_map has offloaded, and of nothing else.
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    state = dict(present_state(model)) if offloaded and not hasattr(model, "hf_device_map") else None
    try:
        model.save_pretrained(directory, state_dict=state)
    except ValueError as error:
        kinds = sorted({packed_kind(module) for module in model.modules() if is_packed(module)})
        if not kinds:
            raise
        raise ValueError(
            f"the quantised weights ({', '.join(kinds)}) cannot be saved by their library ({error}); export a delta, a "
            "patch or an adapter, which hold what was edited, or load the model in another form"
        ) from error
    tokenizer.save_pretrained(directory)
    copy_what_lies_beside(model, directory)
    facts = {"edited_digest": model_digest(model)}
    write_card(directory, Card("model", "The whole edited model.", LOAD_MODEL, "transformers", facts), provenance)
