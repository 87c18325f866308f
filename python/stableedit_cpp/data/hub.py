"""Records of data sets of the Hugging Face hub, streamed by its ``datasets`` package."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from stableedit_cpp.files.hub import why_hub_is_silent

__all__ = ["HUB_PREFIX", "read_hub_records"]

HUB_PREFIX = "hub:"
_NAME = re.compile(r"hub:(?P<name>[^@:]+)(@(?P<config>[^:]+))?(:(?P<split>.+))?")


def read_hub_records(source: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield ``("record 3", record)`` for each record.

    Args:
        source: ``hub:NAME``, ``hub:NAME:SPLIT`` or ``hub:NAME@CONFIG:SPLIT``; NAME is ``owner/name`` or a directory of
            data files, the split is ``train`` unless given.

    Raises:
        ValueError: if the ``datasets`` package is not installed, or for a name, config or split that it cannot load.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise ValueError(f"{source} is no hub name; expected hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or ...@CONFIG:SPLIT")
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{source} needs the datasets package: pip install 'stableedit-cpp[hub]'") from None
    if not Path(match["name"]).exists() and (silent := why_hub_is_silent()):
        raise ValueError(f"cannot load {source}: {silent}")
    try:
        records = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", streaming=True)
        for index, record in enumerate(records):
            yield f"record {index}", record
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot load {source}: {reason}") from None
