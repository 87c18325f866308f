"""``stableedit export``: an edited model in the form in which it is shipped."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import (
    DTYPES,
    OWN_TEMPLATE,
    add_form_options,
    add_json_option,
    add_trust_option,
    new_parser,
    positive,
)
from stableedit_cpp.cli.arguments.placement import add_placement_options

FORMATS = ("model", "delta", "patch", "lora", "gguf", "gguf-lora")
ADAPTERS = ("lora", "gguf-lora")
KEEP = 0.95  # share of the norm that an adapter keeps, if nothing is said

_EXAMPLE = """\
  stableedit export --base smollm2-135m --edited edited/ --format lora --keep 0.95 --output adapter/
  stableedit export --base smollm2-135m --edited edited/ --format lora --keep-efficacy 0.95 --requests edits.jsonl \\
      --output adapter/
  stableedit export --base smollm2-135m --edited edited/ --format gguf --dtype float16 --output gguf/
  stableedit export --base smollm2-135m --edited edited/ --format lora --output adapter/ --push-to-hub OWNER/NAME

  The adapter loads with peft.PeftModel.from_pretrained(base_model, "adapter/"); README.md in it says so."""


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "ship an edited model: whole, its changed tensors, a patch for libstableedit, a LoRA adapter or GGUF"
    parser = new_parser(commands, "export", summary, _EXAMPLE)
    parser.add_argument(
        "--edited",
        required=True,
        metavar="PATH",
        help="what stableedit edit wrote; or a delta or patch exported before",
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model that was edited, as for edit --model")
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="export the difference to --base also where that is not known to be the model that was edited",
    )
    add_placement_options(parser)
    add_trust_option(parser)
    add_export_options(parser)
    return parser


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
        help="round the rank of an adapter up to one for which vLLM reserves memory",
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
        "--dtype", choices=DTYPES, default="auto", help="of an adapter or GGUF file (default: the model's)"
    )
    parser.add_argument("--requests", metavar="FILE", help="score base, edited and exported model on these edits")
    parser.add_argument("--fields", metavar="MAP", help="their fields, e.g. prompt=question,target=answer")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N of them")
    known = "as it was edited, where that is known, or else"
    add_form_options(parser, chat=f"{known} {OWN_TEMPLATE}", end=None, split=f"{known} text")
    add_json_option(parser)
    _add_hub(parser)


def _add_hub(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("the Hugging Face hub")
    hub.add_argument("--push-to-hub", metavar="REPO", help="upload the output directory, e.g. to OWNER/NAME")
    hub.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    hub.add_argument("--token", metavar="TOKEN", help="default: that of hf auth login, or HF_TOKEN")
    hub.add_argument("--revision", metavar="BRANCH", help="branch to upload to, made if it is not there")
    hub.add_argument("--create-pr", action="store_true", default=None, help="propose the upload as a pull request")
    hub.add_argument("--commit-message", metavar="TEXT", help="default: what is uploaded")
