"""Field names of the published data sets, mapped to those of EditRequest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["FORMATS", "Format", "request_fields"]


@dataclass(frozen=True)
class Format:
    """Which field of a record is which field of an EditRequest; ``prompt`` and ``target`` identify the format."""

    name: str
    prompt: str
    target: str
    rephrase: str = "rephrase"
    locality_prompt: str = "loc"
    locality_target: str = "loc_ans"
    subject: str = "subject"
    id: str = "id"
    locality_suffix: str = ""

    def fits(self, record: Mapping[str, object]) -> bool:
        return self.prompt in record and self.target in record


# In the order in which they are tried.
FORMATS = (
    Format("stableedit", "prompt", "target", "rephrase", "locality_prompt", "locality_target"),
    # ZsRE's unrelated questions come without a question mark; the published evaluation appends it.
    Format("zsre", "src", "ans", locality_suffix="?"),
    Format("wikifactdiff", "src", "alt"),
    Format(
        "counterfact",
        "prompt",
        "target_new",
        "rephrase_prompt",
        "locality_prompt",
        "locality_ground_truth",
        id="case_id",
    ),
    Format("ultraeditbench", "prompt", "ans", "rephrase_prompt"),
    Format("wikibigedit", "update", "ans"),
)


def request_fields(record: Mapping[str, object]) -> dict[str, object]:
    """Keyword arguments for EditRequest from one record.

    Raises:
        ValueError: if the record has the prompt and target fields of no known format.
    """
    for format_ in FORMATS:
        if format_.fits(record):
            break
    else:
        known = ", ".join(f"{f.prompt} and {f.target} ({f.name})" for f in FORMATS)
        found = ", ".join(map(str, record)) or "none"
        raise ValueError(f"the record lacks a prompt or a target field; its fields are: {found}; expected {known}")
    values = {
        name: record.get(getattr(format_, name))
        for name in ("prompt", "target", "rephrase", "locality_prompt", "locality_target", "subject", "id")
    }
    if format_.locality_suffix and isinstance(values["locality_prompt"], str):
        values["locality_prompt"] += format_.locality_suffix
    return values
