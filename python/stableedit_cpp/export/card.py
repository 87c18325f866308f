"""The model card of an export (README.md), and the same facts for programs (stableedit_export.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from stableedit_cpp.editors import EditorConfig
from stableedit_cpp.export.provenance import EXPORT_FILE, Provenance
from stableedit_cpp.files.atomic import write_json
from stableedit_cpp.files.table import Table, label, number, score
from stableedit_cpp.model.load import SMOLLM2

__all__ = ["Card", "loading_the_base", "write_card"]

_FORMAT_VERSION = 1
_VERSIONS = ("stableedit_cpp", "torch", "transformers", "peft", "python")


@dataclass(frozen=True)
class Card:
    """What a card says besides the provenance.

    Attributes:
        kind: "model", "delta", "patch" or "lora".
        summary: first paragraph: what lies in the directory.
        load: Python code that loads it from the working directory.
        facts: of the export itself, by name, for both files; nested values are left to the JSON.
    """

    kind: str
    summary: str
    load: str
    library: str
    facts: Mapping[str, object] = field(default_factory=dict)


def write_card(directory: Path, card: Card, provenance: Provenance) -> None:
    """Write README.md and stableedit_export.json into an export's directory."""
    origin = provenance.to_dict()
    document = {"format": "stableedit-export", "version": _FORMAT_VERSION, "kind": card.kind, **card.facts}
    write_json(directory / EXPORT_FILE, {**document, "provenance": origin})
    data = ModelCardData(
        base_model=provenance.base_model, library_name=card.library, tags=["model-editing", "stableedit"]
    )
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(card, provenance, origin)}"
    # File names that are not UTF-8 arrive as surrogates.
    (directory / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def loading_the_base(base_model: str | None, dtype: str) -> str:
    """Python code that makes ``model``, the base model in its dtype, e.g. "float32"."""
    if base_model is not None and base_model.lower() == SMOLLM2:
        names, call = "import stableedit_cpp as se", f'model, _ = se.load_model("{SMOLLM2}", dtype=torch.{dtype})'
    elif base_model is not None and base_model.lower().endswith(".gguf"):
        name = json.dumps(base_model, ensure_ascii=False)
        names = "import stableedit_cpp as se"
        call = f"model, _ = se.load_model({name}, dtype=torch.{dtype})  # keep_packed=True if it was edited so"
    else:
        name = json.dumps(base_model or "the base model", ensure_ascii=False)
        names = "from transformers import AutoModelForCausalLM"
        call = f"model = AutoModelForCausalLM.from_pretrained({name}, dtype=torch.{dtype})"
    return f"import torch\n{names}\n\n{call}"


def _body(card: Card, provenance: Provenance, origin: Mapping[str, object]) -> str:
    base = provenance.base_model or "a language model"
    parts = [
        f"# {base}, edited with StableEdit",
        card.summary,
        f"## Load\n\n```python\n{card.load}\n```",
        "## Where it comes from\n\n" + _facts(_origin_rows(provenance, origin)),
    ]
    rows = {name: value for name, value in card.facts.items() if not isinstance(value, Mapping)}
    if rows:
        parts.append("## This export\n\n" + _facts(rows))
    if provenance.scores:
        parts.append("## Scores\n\n" + _scores(provenance.scores))
    if provenance.config is not None:
        parts.append(f"## Config of the editor\n\n```json\n{provenance.config.to_json()}```")
    return "\n\n".join(parts) + "\n"


def _origin_rows(provenance: Provenance, origin: Mapping[str, object]) -> dict[str, object]:
    versions = provenance.environment or origin["export_environment"]
    rows = {
        "base model": provenance.base_model,
        "digest of the base model": provenance.base_digest,
        "editor": provenance.config.editor if provenance.config else None,
        "prompts": _prompts(provenance.config) if provenance.config else None,
        "edited modules": ", ".join(provenance.edit_modules or []) or None,
        "edits": _edits(provenance),
        "requests": _file(provenance.requests, provenance.requests_digest),
        "edited before": "; ".join(map(_earlier, provenance.earlier)) or None,
        "warm-up edits": provenance.warm_up_edits,
        "share of the change that was kept": provenance.share_kept,
        "warm-up requests": _file(provenance.warm_up, provenance.warm_up_digest),
        "edited": provenance.edited,
        "versions": ", ".join(f"{name} {versions[name]}" for name in _VERSIONS if name in versions),
        "exported": origin["exported"],
    }
    return {name: value for name, value in rows.items() if value is not None}


def _edits(provenance: Provenance) -> object:
    """How many there are in all."""
    known = [one.get("edits") for one in provenance.earlier]
    if not known or provenance.edits is None:
        return provenance.edits
    return f"{provenance.edits + sum(edits or 0 for edits in known)}, of which {provenance.edits} were the last"


def _earlier(one: Mapping[str, object]) -> str:
    file = _file(one.get("requests"), one.get("requests_digest")) or "requests that are not known"
    return f"{one.get('edits') or 0} edits of {file}"


def _prompts(config: EditorConfig) -> str:
    forms = {True: "turns of a chat", False: "plain text", None: "turns of a chat where the model has a template"}
    end = ", answers with an end" if config.end_of_answer else ""
    return forms[config.chat_template] + end + ("" if config.split_special_tokens else ", control tokens parsed")


def _file(path: str | None, digest: str | None) -> str | None:
    return f"{path} (BLAKE2b-256 {digest})" if path and digest else path


def _facts(rows: Mapping[str, object]) -> str:
    cells = {name: number(v, "{:.4g}") if isinstance(v, float) else label(v) for name, v in rows.items()}
    return Table(["", ""], [[label(name.replace("_", " ")), cell] for name, cell in cells.items()]).markdown()


def _scores(scores: Mapping[str, Mapping[str, float | None]]) -> str:
    metrics = list(dict.fromkeys(metric for row in scores.values() for metric in row))
    rows = [[label(model), *(score(row.get(metric)) for metric in metrics)] for model, row in scores.items()]
    return Table(["", *metrics], rows).markdown()
