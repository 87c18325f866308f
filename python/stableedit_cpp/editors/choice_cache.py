"""Remembers which modules of a model take edits best, so that it is measured once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import nn

from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.trial_scores import Trial
from stableedit_cpp.files.atomic import write_json
from stableedit_cpp.files.digest import model_digest, tokenizer_digest
from stableedit_cpp.files.words import check_format
from stableedit_cpp.model.form import find_form
from stableedit_cpp.model.load import cache_directory
from stableedit_cpp.model.modules import find_modules

__all__ = ["read_choice", "write_choice"]

_FORMAT, _VERSION = "stableedit-modules", 1
_RULE = 2  # of candidates and score; another one measures anew
# Of the model's config, what says nothing about the model.
_NAMES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


def read_choice(model: nn.Module, tokenizer, config: EditorConfig) -> tuple[Sequence[Trial], Trial] | None:
    """The trials that were written for this model, tokenizer and config, and the chosen one; None if there are none, or
    they are damaged."""
    if not _directory().is_dir():  # spares the digest of the weights
        return None
    path = _path(model, tokenizer, config)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        check_format(document, _FORMAT, _VERSION, str(path), "choose_modules")
        trials = [Trial(**trial) for trial in document["trials"]]
        chosen = next(trial for trial in trials if trial.name == document["chosen"])
        find_modules(model, chosen.modules)
        return trials, chosen
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def write_choice(model: nn.Module, tokenizer, config: EditorConfig, choice: Mapping[str, object]) -> None:
    """Write what ``read_choice`` reads, whole or not at all; where the disk does not take it, it is measured again."""
    with suppress(OSError):
        write_json(_path(model, tokenizer, config), {"format": _FORMAT, "version": _VERSION, **choice})


def _directory() -> Path:
    return cache_directory() / "modules"


def _path(model: nn.Module, tokenizer, config: EditorConfig) -> Path:
    """Named by all that the measuring depends on but the requests."""
    own = json.loads(model.config.to_json_string())
    form = find_form(model, tokenizer, **config.form)
    parts = [
        _RULE,
        type(model).__name__,
        {name: value for name, value in own.items() if name not in _NAMES},
        model_digest(model),
        tokenizer_digest(tokenizer),
        form.identity(tokenizer),
        config.to_json(),
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return _directory() / f"{hashlib.blake2b(text.encode(), digest_size=32).hexdigest()}.json"
