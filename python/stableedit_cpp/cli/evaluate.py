"""``stableedit evaluate``: score a model, edited or not."""

from __future__ import annotations

import argparse

from stableedit_cpp.cli.datasets import reading_settings
from stableedit_cpp.cli.loading import config_of
from stableedit_cpp.cli.options import DTYPES, form_settings, load, load_any, metrics_of, note, show
from stableedit_cpp.cli.together import writes
from stableedit_cpp.data import open_requests
from stableedit_cpp.evaluation import evaluate
from stableedit_cpp.files.atomic import check_writable_file, write_json
from stableedit_cpp.files.environment import environment
from stableedit_cpp.model.form import PARSED, RAW, find_form


def run(options: argparse.Namespace) -> int:
    if options.output:
        check_writable_file(options.output)
    if "locality" in options.metrics and not options.reference:
        raise ValueError("--metrics locality compares with the unedited model; say with --reference which that is")
    metrics = metrics_of(options)
    requests = open_requests(options.requests, options.limit, **reading_settings(options), progress=True)
    model, tokenizer = load(options)
    reference = None
    if options.reference:
        reference, _ = load_any(options.reference, options, dtype=DTYPES[options.dtype])
    edited = config_of(options.model)
    how = ({} if edited is None else edited.asked) | form_settings(options)
    details = bool(options.per_request and (options.output or options.json))
    scores = evaluate(
        model, tokenizer, requests, metrics=metrics, reference=reference, **how, details=details, progress=True
    )
    form = find_form(model, tokenizer, **{"chat_template": None, **how})
    if form not in (RAW, PARSED):
        note(f"asked as {form.describe(tokenizer)}")
    document = {"model": options.model, "reference": options.reference, "requests": options.requests}
    document = {**document, "form": form.describe(tokenizer), **scores.to_dict(), "environment": environment()}
    show(options, document, scores)
    if reference is None and any(request.locality_prompt for request in requests):
        note(
            "locality: not scored; say with --reference which the unedited model is, to see whether its own answers to "
            "the unrelated prompts stay",
        )
    if options.output and writes():
        write_json(options.output, document)
        what = "scores and per-request values" if details else "scores"
        note(f"{what} are in {options.output}")
    return 0
