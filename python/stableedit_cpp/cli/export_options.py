"""What all that exports needs to know, and what can be said of it before anything is loaded."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.hub_options import add_hub_options, check_hub_options
from stableedit_cpp.cli.options import DTYPES, OWN_TEMPLATE, add_form_options, positive
from stableedit_cpp.export.lora import SERVED_RANKS
from stableedit_cpp.files.atomic import check_new_directory

__all__ = ["ADAPTERS", "FORMATS", "KEEP", "add_export_options", "check_export_options"]

FORMATS = ("model", "delta", "patch", "lora", "gguf", "gguf-lora")
ADAPTERS = ("lora", "gguf-lora")
KEEP = 0.95  # share of the norm that an adapter keeps, if nothing is said


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """What all that exports needs to know."""
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="whole model; changed tensors, bit for bit; patch for libstableedit; LoRA adapter of PEFT; whole model or "
        "LoRA adapter for llama.cpp",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new directory, with a model card")
    parser.add_argument("--overwrite", action="store_true", help="replace an output directory that has content")
    parser.add_argument("--rank", type=positive, metavar="N", help="of every module of an adapter or patch")
    parser.add_argument(
        "--round-rank",
        action="store_true",
        help=f"round the rank of an adapter up to one for which vLLM reserves memory: {str(SERVED_RANKS)[1:-1]}",
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="X",
        help=f"smallest rank that keeps this share of the changes' norm (adapters: {KEEP})",
    )
    parser.add_argument(
        "--keep-efficacy", type=float, metavar="X", help="smallest rank that keeps this share of the efficacy"
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="auto", help="of an adapter or GGUF file (default: the model's)"
    )
    parser.add_argument("--requests", metavar="FILE", help="score base, edited and exported model on these edits")
    parser.add_argument("--fields", metavar="MAP", help="their fields, e.g. prompt=question,target=answer")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N of them")
    add_form_options(parser, chat=f"as it was edited, where that is known, or else {OWN_TEMPLATE}", end=None)
    add_hub_options(parser)


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
