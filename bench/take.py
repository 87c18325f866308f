"""Do edits take, as a person sees them, and does everything else stay? One config for all rows."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from common import data_file, finish, new_parser, start
from stableedit_cpp import EditRequest, StableEdit, StableEditConfig, TrunkCache, evaluate, load_model, read_requests
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.sideeffects.perplexity import perplexity, read_texts

# Name of a row: data set, and what it changes of the config: in which form the model is edited and asked.
ROWS = {
    "zsre-chat": ("zsre/zsre_edit_5k.json", {"chat_template": True}),
    "zsre-raw": ("zsre/zsre_edit_5k.json", {"chat_template": False}),
    "counterfact-chat": ("counterfact/counterfact_edit_10k.json", {"chat_template": True}),
    "counterfact-raw": ("counterfact/counterfact_edit_10k.json", {"chat_template": False}),
}


def main() -> None:
    parser = new_parser(
        "Edits with StableEditConfig() and scores, teacher-forced and by free generation: the edited prompts,\n"
        "their paraphrases, and unrelated prompts beside the unedited model's own answers. Settings were searched on\n"
        "the first 100 records of ZsRE, which are left out.",
        "take.py --rows zsre-chat zsre-raw --edits 1000 --sample 300 --json bench/results/take.json",
    )
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model (default smollm2-135m)")
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=" ".join(ROWS))
    parser.add_argument("--edits", type=int, default=1000, metavar="N", help="default 1000")
    parser.add_argument("--skip", type=int, default=2000, metavar="N", help="records before the first (default 2000)")
    parser.add_argument(
        "--sample", type=int, default=300, metavar="N", help="edits to score, evenly spread (default 300)"
    )
    parser.add_argument("--edit-modules", nargs="+", metavar="NAME", help="default: the editor's own")
    parser.add_argument(
        "--perplexity", metavar="FILE", help="texts, relative to --data, e.g. downstream/me_ppl_1k.json"
    )
    options = parser.parse_args()
    device = start(options)
    rows = {name: run(name, options, device) for name in options.rows}
    finish("take", options, device, {"rows": rows})


def run(name: str, options: Namespace, device: torch.device) -> dict[str, object]:
    """Edit a fresh model, and score it before and after."""
    data, changes = ROWS[name]
    requests = read_requests(data_file(options.data, data), options.skip + options.edits)[options.skip :]
    model, tokenizer = load_model(options.model, device=device)
    editor = StableEdit(model, tokenizer, StableEditConfig(edit_modules=options.edit_modules, **changes))
    scored = requests[:: max(1, len(requests) // options.sample)][: options.sample]
    trunk, unedited = TrunkCache.where_possible(model, editor.modules), UneditedAnswers(editor.unedited)
    before = scores(editor, scored, options, trunk, unedited)
    report = editor.edit(requests, progress=True)
    return {
        "edits": report.edits,
        "edits_per_second": report.edits_per_second,
        "seconds_by_part": report.seconds_by_part(),
        "taken_when_edited": 1.0 - len(report.failed) / report.edits,
        "passes": [turn.passes for turn in report.turns],
        "steps": [] if editor.solver.step is None else editor.solver.step.recent,
        "unedited": before,
        "edited": scores(editor, scored, options, trunk, unedited),
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
    found = evaluate(editor.model, editor.tokenizer, requests, progress=True, **how)
    result: dict[str, object] = {"means": found.means(), "standard_errors": found.standard_errors}
    if options.perplexity:
        texts = read_texts(Path(options.data) / options.perplexity)
        result["perplexity"] = perplexity(
            editor.model, editor.tokenizer, texts, window=1024, tokens=20_000, max_tokens=2048, trunk=None
        )
    return result


if __name__ == "__main__":
    main()
