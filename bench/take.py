"""Do edits take, as a person sees them, and does everything else stay? One config for all rows."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import torch

from common import data_file, finish, new_parser, start
from stableedit_cpp import EditRequest, StableEdit, StableEditConfig, TrunkCache, evaluate, load_model, read_requests
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.sideeffects.perplexity import perplexity, read_texts

# Name of a row: data set, and what it changes of the config: in which form the model is edited and asked.
ROWS = {
    f"{name}-{form}": (data, {"chat_template": form == "chat"})
    for name, data in (
        ("zsre", "zsre/zsre_edit_5k.json"),
        ("zsre-train", "zsre/zsre_train_5k.json"),
        ("counterfact", "counterfact/counterfact_edit_10k.json"),
        ("entityquestions", "entityquestions/stream_edit_100k.jsonl.gz"),
    )
    for form in ("chat", "raw")
}


def main() -> None:
    parser = new_parser(
        "Edits with StableEditConfig() and scores, teacher-forced and by free generation: the edited prompts, their\n"
        "paraphrases, and unrelated prompts beside the unedited model's own answers. Settings were searched on the\n"
        "first 1,000 records of ZsRE's and CounterFact's edit files, which are left out.",
        "take.py --rows zsre-chat zsre-raw --edits 1000 --json bench/results/take.json",
    )
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model (default smollm2-135m)")
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument(
        "--rows", nargs="+", default=["zsre-chat", "zsre-raw"], choices=list(ROWS), metavar="ROW", help=" ".join(ROWS)
    )
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--skip", type=int, default=2000, metavar="N", help="records before the first (default 2000)")
    parser.add_argument(
        "--sample", type=int, default=300, metavar="N", help="edits to score, evenly spread (default 300)"
    )
    parser.add_argument(
        "--checkpoints", type=int, nargs="+", default=[], metavar="N", help="score after so many edits, too"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=JSON",
        help="of the config, e.g. anchors=48 'edit_modules=\"*.o_proj\"'",
    )
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="in one forward pass (default 2048)")
    parser.add_argument(
        "--perplexity", metavar="FILE", help="texts, relative to --data, e.g. downstream/me_ppl_1k.json"
    )
    options = parser.parse_args()
    device = start(options)
    rows = {
        f"{name}, {options.edits} edits, {Path(options.model).name}": run(name, options, device)
        for name in options.rows
    }
    finish("take", options, device, {"rows": rows})


def run(name: str, options: Namespace, device: torch.device) -> dict[str, object]:
    """Edit a fresh model, and score it before, at the checkpoints and after."""
    data, changes = ROWS[name]
    requests = read_requests(data_file(options.data, data), options.skip + options.edits)[options.skip :]
    model, tokenizer = load_model(options.model, device=device)
    settings = changes | {"max_tokens_per_forward": options.tokens}
    settings |= {field: json.loads(value) for field, value in (given.split("=", 1) for given in options.set)}
    editor = StableEdit(model, tokenizer, StableEditConfig(**settings))
    sample = range(0, len(requests), max(1, len(requests) // options.sample))[: options.sample]
    scored = [requests[index] for index in sample]
    trunk, unedited = TrunkCache.where_possible(model, editor.modules), UneditedAnswers(editor.unedited)
    result: dict[str, object] = {"unedited": scores(editor, scored, options, trunk, unedited), "checkpoints": {}}
    turns, seconds = [], 0.0
    ends = sorted({end for end in options.checkpoints if 0 < end < len(requests)} | {len(requests)})
    for begin, end in zip([0, *ends], ends, strict=False):
        report = editor.edit(requests[begin:end], progress=True)
        turns, seconds = turns + report.turns, seconds + report.seconds
        done = [requests[index] for index in sample if index < end]
        result["checkpoints"][end] = scores(editor, done, options, trunk, unedited) | {
            "change": {name: float(change.norm()) for name, change in editor.weight_changes().items()}
        }
    held = sum(turn.requests - len(turn.failed) for turn in turns)
    parts = sorted({part for turn in turns for part in turn.seconds})
    return result | {
        "edits": len(requests),
        "edits_per_second": len(requests) / seconds,
        "seconds_by_part": {part: sum(turn.seconds.get(part, 0.0) for turn in turns) for part in parts},
        "taken_when_edited": held / len(requests),
        "passes": [turn.passes for turn in turns],
        "update_norms": [sum(norm**2 for norm in turn.update_norms.values()) ** 0.5 for turn in turns],
        "steps": [] if editor.solver.step is None else editor.solver.step.recent,
        "edited": result["checkpoints"][len(requests)],
        "config": editor.config.to_json(),
    }


def scores(
    editor: StableEdit,
    requests: list[EditRequest],
    options: Namespace,
    trunk: TrunkCache | None,
    unedited: UneditedAnswers,
) -> dict[str, object]:
    how = {"chat_template": editor.form.chat, "reference": unedited, "trunk": trunk}
    how["max_tokens_per_forward"] = options.tokens
    found = evaluate(editor.model, editor.tokenizer, requests, progress=True, **how)
    result: dict[str, object] = {"means": found.means(), "standard_errors": found.standard_errors}
    oldest = requests[: max(1, len(requests) // 10)]
    how["metrics"] = ["generation"]
    result["oldest_tenth"] = evaluate(editor.model, editor.tokenizer, oldest, progress=False, **how).means()
    if options.perplexity:
        texts = read_texts(Path(options.data) / options.perplexity)
        result["perplexity"] = perplexity(
            editor.model, editor.tokenizer, texts, window=1024, tokens=20_000, max_tokens=2048, trunk=None
        )
    return result


if __name__ == "__main__":
    main()
