"""``stableedit statistics``: second moments of keys and value gradients over plain text."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.options import load, show
from stableedit_cpp.model.gather import gather_statistics

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    model, tokenizer = load(options)
    found = gather_statistics(
        model,
        tokenizer,
        options.text,
        options.output,
        edit_modules=options.edit_modules,
        tokens=options.tokens,
        window=options.window,
        value_gradients=not options.keys_only,
        field=options.field,
        overwrite=options.overwrite,
    )
    dimensions = {name: past.dim for name, past in found.keys.items()}
    document = {
        "model": options.model,
        "sources": found.sources,
        "output": options.output,
        "tokens": found.tokens,
        "window": found.window,
        "key_dimensions": dimensions,
        "value_gradient_dimensions": {name: tracker.dim for name, tracker in found.value_gradients.items()},
    }
    names = ", ".join(f"{name} ({dimension})" for name, dimension in dimensions.items())
    show(options, document, f"{options.output}: {found.tokens:,} tokens at {names}")
    return 0
