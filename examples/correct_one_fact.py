"""Correct one fact of a model, look at the answers before and after, and save the result.

python examples/correct_one_fact.py --output corrected/
"""

import argparse

import stableedit_cpp as se


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model")
    parser.add_argument("--prompt", default="The Prime Minister of Canada who took office in March 2025 is")
    parser.add_argument("--target", default="Mark Carney")
    parser.add_argument("--output", default="corrected/", help="new directory for the edited model")
    options = parser.parse_args(arguments)

    model, tokenizer = se.load_model(options.model)
    editor = se.StableEdit(model, tokenizer)
    report = editor.edit([{"prompt": options.prompt, "target": options.target}])
    print(report)  # says whether it took, and what the model answers if not

    prompts = [options.prompt, "The capital of France is"]
    after = se.generate(model, tokenizer, prompts)
    with editor.unedited() as base:  # the same model as it was, for as long as this takes
        before = se.generate(base, tokenizer, prompts)
    for prompt, old, new in zip(prompts, before, after, strict=True):
        print(f"{prompt}\n  before: {old!r}\n  after:  {new!r}")

    se.export.export_model(model, tokenizer, options.output, overwrite=True)
    print(f"The edited model is in {options.output}")


if __name__ == "__main__":
    main()
