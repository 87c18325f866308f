"""Evaluation with and without the frozen-trunk cache, before and after edits; what free answers and locality add."""

from __future__ import annotations

import statistics
import time

from common import finish, new_parser, start, timed
from stableedit_cpp import StableEdit, StableEditConfig, TrunkCache, evaluate
from stableedit_cpp.evaluation import DEFAULT_METRICS, UneditedAnswers
from workload import add_model_options, pretrained, zsre


def main() -> None:
    parser = new_parser(
        "Scores ZsRE requests repeatedly, a turn of edits between two evaluations, with and without a TrunkCache.\n"
        "The scores of the two must be identical each time. That is token accuracy alone; beside it, in processor\n"
        "seconds, all default scores (free answers, locality), with the cache.",
        "evaluation.py --requests 200 --json bench/results/evaluation.json",
    )
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="requests that are scored (default 200)")
    parser.add_argument("--edits", type=int, default=50, metavar="N", help="edits between evaluations (default 50)")
    parser.add_argument("--evaluations", type=int, default=3, metavar="N", help="of each, at least 2 (default 3)")
    options = parser.parse_args()
    if options.evaluations < 2:
        parser.error("--evaluations must be at least 2: the first one fills the cache")
    device = start(options)

    model, tokenizer, modules = pretrained(options, device)
    requests = zsre(options, options.requests)
    editor = StableEdit(
        model,
        tokenizer,
        StableEditConfig.one_pass(edit_modules=[m.name for m in modules], max_tokens_per_forward=options.max_tokens),
    )
    trunk = TrunkCache(model, editor.modules)
    unedited = UneditedAnswers(editor.unedited)
    without, cached, identical = [], [], []
    processor: dict[str, list[float]] = {name: [] for name in ("without", "accuracy", "free_answers", "locality")}

    def score(count: int | None = None, trunk: TrunkCache | None = None, metrics=("accuracy",), reference=None):
        how = {"max_tokens_per_forward": options.max_tokens, "trunk": trunk, "progress": False, "chat_template": False}
        return evaluate(model, tokenizer, requests[:count], metrics=metrics, reference=reference, **how)

    def processor_seconds(trunk: TrunkCache | None = trunk, **how) -> float:
        begin = time.process_time()
        score(None, trunk, **how)
        return time.process_time() - begin

    timed(device, score, 20)  # not counted
    for number in range(options.evaluations):
        plain, seconds = timed(device, score)
        without.append(seconds)
        scores, seconds = timed(device, score, None, trunk)
        cached.append(seconds)
        identical.append(scores.per_request == plain.per_request)
        alone = processor_seconds()
        processor["without"].append(processor_seconds(None))
        processor["accuracy"].append(alone)
        processor["free_answers"].append(processor_seconds(metrics=DEFAULT_METRICS) - alone)
        processor["locality"].append(processor_seconds(reference=unedited) - alone)
        if number + 1 < options.evaluations and options.edits:
            begin = number * options.edits % len(requests)
            editor.edit(requests[begin : begin + options.edits], progress=False)
    later = statistics.median(cached[1:])
    results = {
        "speedup": statistics.median(without) / later,
        "identical_scores": all(identical),
        "first_over_without": cached[0] / statistics.median(without),
        "seconds": {"without": without, "with_first": cached[0], "with_later": cached[1:]},
        "processor_seconds": processor,
        "requests": len(requests),
        "prompts": sum(plain[name].scored for name in plain),
        "cache_bytes": trunk.bytes,
        "edit_modules": [module.name for module in modules],
        "last_scores": {
            "efficacy": plain.efficacy,
            "generalization": plain.generalization,
            "specificity": plain.specificity,
        },
    }
    finish("evaluation", options, device, results)


if __name__ == "__main__":
    main()
