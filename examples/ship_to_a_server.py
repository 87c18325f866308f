"""Edit a model and write what servers load: an adapter for vLLM and SGLang, a file for llama.cpp, a delta for the rest.

python examples/ship_to_a_server.py facts.jsonl shipped/
"""

import argparse
from pathlib import Path

import stableedit_cpp as se
from stableedit_cpp.export import Provenance


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("requests", help="facts with prompt and target: .jsonl, .json, .csv ...")
    parser.add_argument("output", help="directory for the exports")
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model")
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the adapter")
    options = parser.parse_args(arguments)

    model, tokenizer = se.load_model(options.model)
    requests = se.read_requests(options.requests)
    editor = se.StableEdit(model, tokenizer)
    print(editor.edit(requests))

    output = Path(options.output)
    about = Provenance(base_model=options.model, config=editor.config, edits=len(requests), requests=options.requests)
    change = se.export.change_of(editor)
    report = se.export.export_lora(change, output / "adapter", keep=0.99, provenance=about)
    print(f"adapter: rank {report.rank}, {report.bytes:,} bytes, keeps {report.kept_norm:.3f} of the change")
    se.export.export_delta(change, output / "delta", provenance=about)
    se.export.export_gguf(model, tokenizer, output / "gguf", provenance=about)
    for export in sorted(output.iterdir()):
        print(f"{export}: {export / 'README.md'} says how to load it")
    if options.push_to_hub:
        print(se.export.push_to_hub(output / "adapter", options.push_to_hub, private=True))


if __name__ == "__main__":
    main()
