"""What lies beside the weights of a model and ``save_pretrained`` does not write: licence, code, other tokenizers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

__all__ = ["copy_what_lies_beside"]

# Other programs need these: llama.cpp the SentencePiece model, remote code its own files, an image its processor.
_NEEDED = re.compile(
    r".*\.(model|tiktoken|py|jinja)|merges\.txt|vocab\.(json|txt|bpe)|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY).*|"
    r".*(processor|tokenizer|tokens_map|added_tokens|chat_template).*\.json",
    re.IGNORECASE,
)
_LARGEST = 100 * 2**20  # bytes; what is larger is no file of these kinds


def copy_what_lies_beside(model, directory: Path) -> list[str]:
    """Copy these files from where the model was loaded, where they are not there already; their names."""
    source = _source(getattr(getattr(model, "config", None), "_name_or_path", None))
    if source is None or source.resolve() == directory.resolve():
        return []
    copied = []
    for path in sorted(source.iterdir()):
        if not (path.is_file() and _NEEDED.fullmatch(path.name)) or path.stat().st_size > _LARGEST:
            continue
        if not (directory / path.name).exists():
            shutil.copyfile(path, directory / path.name)
            copied.append(path.name)
    return copied


def _source(name: str | None) -> Path | None:
    """The directory of a model by its path or that of its file, or by its name on the hub, in the local cache."""
    if not name:
        return None
    if Path(name).exists():
        return Path(name) if Path(name).is_dir() else Path(name).parent
    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
