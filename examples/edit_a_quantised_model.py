"""Edit a model that is packed in 8 or 4 bits; only the modules that are edited are unpacked.

python examples/edit_a_quantised_model.py --model DIR --bits 4 --output edited/
"""

import argparse
import tempfile

from transformers import BitsAndBytesConfig

import stableedit_cpp as se
from stableedit_cpp.model.packed import is_packed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="directory or name of a model")
    parser.add_argument("--bits", type=int, choices=[4, 8], default=8)
    parser.add_argument("--prompt", default="The Prime Minister of Canada who took office in March 2025 is")
    parser.add_argument("--target", default="Mark Carney")
    parser.add_argument("--output", default="edited/", help="new directory for the edited model")
    options = parser.parse_args(arguments)

    source = options.model
    if source == "smollm2-135m":  # comes as a GGUF file, which transformers does not pack in another way
        source = tempfile.mkdtemp()
        model, tokenizer = se.load_model(options.model)
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)

    packing = BitsAndBytesConfig(load_in_8bit=options.bits == 8, load_in_4bit=options.bits == 4)
    model, tokenizer = se.load_model(source, quantization_config=packing)
    packed = sum(map(is_packed, model.modules()))
    editor = se.StableEdit(model, tokenizer)
    print(f"{packed} packed maps, of which {packed - sum(map(is_packed, model.modules()))} are dense from here on")

    print(editor.edit([{"prompt": options.prompt, "target": options.target}]))
    print(options.prompt, *se.generate(model, tokenizer, [options.prompt]), sep=" ")
    se.export.export_model(model, tokenizer, options.output, overwrite=True)
    again, _ = se.load_model(options.output)  # packed and dense as it was saved
    print(f"{options.output} has {sum(map(is_packed, again.modules()))} packed maps")


if __name__ == "__main__":
    main()
