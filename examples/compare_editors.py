"""Three editors on the same facts: do they take, and what becomes of other answers?

python examples/compare_editors.py facts.jsonl
"""

import argparse

import stableedit_cpp as se

# Every editor has the same calls: warm_up, edit, unedited, weight_changes, save. Here each with its defaults.
EDITORS = {
    "stableedit": (se.StableEdit, se.StableEditConfig(chat_template=False)),
    "ultraedit": (se.UltraEdit, se.UltraEditConfig()),
    "fine-tuning": (se.FineTune, se.FineTuneConfig()),
}
UNRELATED = ["The capital of France is", "Water boils at", "The largest planet is", "Shakespeare wrote"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", help="facts with prompt and target: .jsonl, .json, .csv ...")
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="first N facts (default 20)")
    options = parser.parse_args(arguments)

    requests = se.read_requests(options.requests, options.limit)
    print(f"{'':<12} {'efficacy':>8} {'other answers kept':>19}")
    for name, (kind, config) in EDITORS.items():
        model, tokenizer = se.load_model(options.model)
        before = se.generate(model, tokenizer, UNRELATED, chat_template=False)
        kind(model, tokenizer, config).edit(requests, progress=False)
        scores = se.evaluate(model, tokenizer, requests, chat_template=False, progress=False)
        after = se.generate(model, tokenizer, UNRELATED, chat_template=False)
        kept = sum(old == new for old, new in zip(before, after, strict=True))
        print(f"{name:<12} {scores.efficacy:>8.3f} {kept:>11} of {len(UNRELATED)}")


if __name__ == "__main__":
    main()
