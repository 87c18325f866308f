"""What ``--model`` may name: a saved model, and all that this program makes of one: exports and sessions."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from stableedit_cpp.cli.placement import default_device, placement
from stableedit_cpp.editors import EditorConfig
from stableedit_cpp.editors.registry import parse_config
from stableedit_cpp.export.loading import export_kind, load_export
from stableedit_cpp.export.provenance import read_provenance
from stableedit_cpp.lifelong import LifelongSession
from stableedit_cpp.lifelong.view import manifest_of
from stableedit_cpp.model.load import load_model

__all__ = ["DTYPES", "config_of", "default_device", "load", "load_any"]

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, object]:
    """(model, tokenizer) as the options of ``add_model_options`` say."""
    return load_any(options.model, options, dtype=DTYPES[options.dtype], base=options.base)


def load_any(
    name: str, options: argparse.Namespace, *, dtype: torch.dtype | str = "auto", base: str | None = None
) -> tuple[torch.nn.Module, object]:
    """(model, tokenizer) of what a name stands for.

    Args:
        options: of ``add_placement_options`` and ``add_trust_option``.
        base: of an export or a session, where it is not where that says.

    Raises:
        ValueError: as ``load_model`` and ``load_export``; for a session as ``LifelongSession.open``.
    """
    how = {**placement(options), "trust_remote_code": options.trust_remote_code}
    if _is_session(name):
        found = manifest_of(name)["model"]
        if not (base or found["source"]):
            raise ValueError(f"the session {name} does not say where its model is; name it with --base")
        if found.get("keep_packed"):
            how["keep_packed"] = True
        model, tokenizer = load_model(base or found["source"], dtype=getattr(torch, found["dtype"]), **how)
        LifelongSession.open(name, model, tokenizer).close()  # the model stays as the session left it
        return model, tokenizer
    if export_kind(name) is not None:
        return load_export(name, lambda base, dtype: load_model(base, dtype=dtype, **how), base=base, dtype=dtype)
    return load_model(name, dtype=dtype, **how)


def config_of(name: str) -> EditorConfig | None:
    """How a model, an export or a session was edited, where it says so."""
    if _is_session(name):
        return parse_config(json.dumps(manifest_of(name)["config"]))
    return read_provenance(name).config


def _is_session(name: str) -> bool:
    return (Path(name) / "journal").is_file()
