"""Where an export comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stableedit_cpp.editors import EditorConfig, load_config
from stableedit_cpp.editors.registry import parse_config
from stableedit_cpp.files.environment import provenance

__all__ = ["CONFIG_FILE", "EXPORT_FILE", "REPORT_FILE", "Provenance", "read_provenance"]

CONFIG_FILE = "stableedit_config.json"
REPORT_FILE = "stableedit_report.json"
EXPORT_FILE = "stableedit_export.json"


@dataclass(frozen=True)
class Provenance:
    """What a model card says; None for what is not known.

    Attributes:
        base_model: name or directory of the model that was edited.
        base_digest: its ``model_digest``; exports fill it in themselves.
        config: of the editor.
        edit_modules: names of the modules that were edited.
        edits, warm_up_edits: how many requests were applied.
        share_kept: of the whole change, if it was shrunk (``Editor.shrink``).
        requests, warm_up: files of requests, and ``file_digest`` of each.
        scores: by model ("unedited", "edited", "exported"), then by metric.
        earlier: what was edited into the model before, the first edits first: for each ``model``, ``base_digest``,
            ``edits``, ``warm_up_edits``, ``requests`` and ``requests_digest``.
        edited: when, ISO 8601.
        environment: versions and hardware of the machine that edited.
    """

    base_model: str | None = None
    base_digest: str | None = None
    config: EditorConfig | None = None
    edit_modules: list[str] | None = None
    edits: int | None = None
    warm_up_edits: int | None = None
    share_kept: float | None = None
    requests: str | None = None
    requests_digest: str | None = None
    warm_up: str | None = None
    warm_up_digest: str | None = None
    scores: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    earlier: Sequence[Mapping[str, object]] = ()
    edited: str | None = None
    environment: Mapping[str, object] | None = None

    @classmethod
    def of_session(cls, session, base_model: str | None, *, share_kept: float | None = None) -> Provenance:
        """Of a ``LifelongSession`` where it stands; ``base_model`` is where its model came from."""
        turn, counts = session.history.turn, session.history.counts()
        return cls(
            base_model=base_model,
            config=session.editor.config,
            edit_modules=[module.name for module in session.editor.modules],
            edits=counts["current"],
            warm_up_edits=counts["warm_up"],
            share_kept=share_kept,
            edited=session.history.steps[turn].record.content["time"] if turn else None,
            environment=session.manifest["environment"],
        )

    def since(self, base_digest: str) -> Provenance | None:
        """What was edited since the model was this one; None where it never was, as far as it is known."""
        digests = [*(one.get("base_digest") for one in self.earlier), self.base_digest]
        if base_digest in digests:
            return replace(self, earlier=list(self.earlier)[digests.index(base_digest) :])
        return self if digests[-1] is None else None

    def as_earlier(self) -> list[dict[str, object]]:
        """The ``earlier`` of what is edited next."""
        names = ("base_digest", "edits", "warm_up_edits", "requests", "requests_digest")
        own = {"model": self.base_model, **{name: getattr(self, name) for name in names}}
        return [*map(dict, self.earlier), own]

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON, with the time and the environment of this moment as those of the export."""
        fields = {**vars(self), "config": json.loads(self.config.to_json()) if self.config else None}
        here = provenance()
        return {**fields, "exported": here["started"], "export_environment": here["environment"]}


def read_provenance(directory: str | Path) -> Provenance:
    """What ``stableedit edit`` left beside a model; empty where it left nothing.

    Raises:
        ValueError: for a report or config that cannot be read.
    """
    directory = Path(directory)
    config = load_config(directory / CONFIG_FILE) if (directory / CONFIG_FILE).exists() else None
    path = directory / REPORT_FILE
    if not path.exists():
        return Provenance(config=config or _config_of_export(directory))
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        scores = {"edited": _means(report["scores"])} if "scores" in report else {}
        return Provenance(
            base_model=report["model"],
            base_digest=report.get("base_digest"),
            config=config,
            edit_modules=report["edit_modules"],
            edits=report["edit"]["edits"] if "edit" in report else None,
            warm_up_edits=report["warm_up"]["edits"] if "warm_up" in report else None,
            share_kept=report.get("share_kept"),
            requests=report["requests"],
            requests_digest=report.get("requests_digest"),
            warm_up=report.get("warm_up_requests"),
            warm_up_digest=report.get("warm_up_digest"),
            scores=scores,
            earlier=report.get("edited_before", ()),
            edited=report["started"],
            environment=report["environment"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no report of `stableedit edit`: {error!r}") from None


def _config_of_export(directory: Path) -> EditorConfig | None:
    """The config in the facts that every export has for programs."""
    path = directory / EXPORT_FILE
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["provenance"]["config"]
        return None if config is None else parse_config(json.dumps(config))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say how the model was edited: {error!r}") from None


def _means(scores: Mapping[str, object]) -> dict[str, float | None]:
    return {metric: scores[metric] for metric in ("efficacy", "generalization", "specificity")}
