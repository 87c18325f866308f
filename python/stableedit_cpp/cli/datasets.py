"""``stableedit datasets``: which formats there are, and what is in a file."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import show
from stableedit_cpp.data import FORMATS, Format, describe, parse_fields
from stableedit_cpp.data.reading import format_of_training

__all__ = ["reading_settings", "run", "variants_of", "warm_up_settings"]


def run(options: argparse.Namespace) -> int:
    if options.action == "show":
        count = True if options.count else None
        found = describe(options.source, first=options.first, count=count, **reading_settings(options))
        show(options, found.to_dict(), found)
    else:
        fields = {format_.name: dict(format_.fields) for format_ in FORMATS}
        show(options, fields, "\n\n".join(map(_text, FORMATS)))
    return 0


def _text(format_: Format) -> str:
    # A subject and an id are taken where there are any; they tell nothing of the format.
    shown = {name: own for name, own in format_.fields.items() if own not in ("subject", "id")}
    lines = [f"  {name:<18}{own}" for name, own in shown.items()]
    if format_.locality_suffix:
        lines.append(f"  {'':<18}({format_.fields['locality_prompt']} gets a {format_.locality_suffix!r} appended)")
    return "\n".join([format_.name, *lines])


def variants_of(options: argparse.Namespace) -> list[str]:
    """What ``add_variants_option`` was given."""
    return [name.strip() for name in options.variants.split(",")] if options.variants else []


def warm_up_settings(options: argparse.Namespace) -> dict[str, object]:
    """What ``add_warm_up_format_options`` was given, or else ``add_format_options``, for the warm-up file."""
    how = reading_settings(options)
    if options.warm_up_fields is not None:
        return {**how, "format": parse_fields(options.warm_up_fields)}
    return {**how, "format": options.warm_up_format or format_of_training(options.warm_up, how["format"])}


def reading_settings(options: argparse.Namespace) -> dict[str, object]:
    """What ``add_format_options`` was given, as ``read_requests`` takes it."""
    format_ = parse_fields(options.fields) if options.fields is not None else options.format
    return {"format": format_, "seed": options.seed, "variants": variants_of(options)}
