"""``stableedit demo``: a small real model learns what happened after its training, before your eyes."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.arguments.options import add_json_option, add_model_options, new_parser, positive

_EXAMPLE = "  stableedit demo\n  stableedit demo --stream zsre_edit.json"


def add_parser(commands) -> argparse.ArgumentParser:
    summary = "teach a small language model what happened after its training, then a stream of facts"
    parser = new_parser(commands, "demo", summary, _EXAMPLE)
    add_model_options(parser, default="smollm2-135m")
    parser.add_argument("--stream", metavar="FILE", help="also edit a stream of requests (e.g. ZsRE) and score it")
    parser.add_argument("--warm-up", metavar="FILE", help="training stream for the warm-up before it")
    parser.add_argument("--limit", type=positive, default=100, metavar="N", help="requests of each (default 100)")
    add_json_option(parser)
    return parser
