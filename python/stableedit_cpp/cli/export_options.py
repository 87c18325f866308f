"""What can be said of an export before anything is loaded."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.export import ADAPTERS
from stableedit_cpp.cli.hub_options import check_hub_options
from stableedit_cpp.files.atomic import check_new_directory

__all__ = ["check_export_options"]


def check_export_options(options: argparse.Namespace) -> None:
    """Find out before anything is loaded what cannot work."""
    given = [name for name in ("rank", "keep", "keep_efficacy") if getattr(options, name) is not None]
    flags = [f"--{name.replace('_', '-')}" for name in given]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(flags)} each decide the rank; give one of them")
    if given and options.format not in ("patch", *ADAPTERS):
        raise ValueError(f"{flags[0]} is for --format patch and lora; a {options.format} keeps everything")
    if options.keep_efficacy is not None and not options.requests:
        raise ValueError("--keep-efficacy needs the edits to measure it on: add --requests FILE")
    if options.round_rank and options.format != "lora":
        raise ValueError(f"--round-rank is for --format lora; servers load no {options.format} beside a model")
    if options.dtype != "auto" and options.format not in ("gguf", *ADAPTERS):
        raise ValueError(
            f"--dtype is for --format lora, gguf and gguf-lora; a {options.format} has the dtype of the edited model"
        )
    check_new_directory(options.output, overwrite=options.overwrite)
    check_hub_options(options)
