"""Whether an edited model answers the same from its GGUF files: read back by transformers, and run by llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_cpp
from common import finish, new_parser, start
from stableedit_cpp import StableEdit, StableEditConfig
from stableedit_cpp.export import change_of, export_gguf, export_gguf_lora
from stableedit_cpp.model.logits import past_keyword
from workload import add_model_options, pretrained, zsre


def main() -> None:
    parser = new_parser(
        "Edits a model, writes it to GGUF files (the whole model, the base model, and an adapter of full rank), and "
        "compares greedy answers to the edited prompts and to as many others: of the model in memory, of the file read "
        "back by transformers, and, where llama-cpp-cffi is installed, of llama.cpp with the whole model and with base "
        "and adapter.",
        "gguf_answers.py --json bench/results/gguf_answers.json",
    )
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=20, metavar="N", help="ZsRE edits (default 20)")
    parser.add_argument("--length", type=int, default=12, metavar="N", help="tokens of an answer (default 12)")
    options = parser.parse_args()
    device = start(options)
    model, tokenizer, modules = pretrained(options, device)
    requests = zsre(options, options.requests)
    names = [module.name for module in modules]
    config = StableEditConfig(edit_modules=names, turn_size=options.requests, chat_template=False)
    editor = StableEdit(model, tokenizer, config, guard=None)
    report = editor.edit(requests, progress=True)
    prompts = [request.prompt for request in requests] + [request.locality_prompt for request in requests]
    with editor.unedited():
        before = [_answer(model, tokenizer, prompt, options.length) for prompt in prompts]
    expected = [_answer(model, tokenizer, prompt, options.length) for prompt in prompts]
    answers, sizes = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        export_gguf(model, tokenizer, place / "edited")
        export_gguf(model, tokenizer, place / "half", dtype=torch.float16)
        adapter = export_gguf_lora(change_of(editor), place / "adapter", keep=1.0)
        with editor.unedited():
            export_gguf(model, tokenizer, place / "base")
        for name, file in (("float32", "edited/model"), ("float16", "half/model"), ("adapter", "adapter/adapter")):
            sizes[name] = (place / f"{file}.gguf").stat().st_size
        del editor, model
        how = {"gguf_file": "model.gguf"}
        back = AutoModelForCausalLM.from_pretrained(place / "edited", dtype=torch.float32, **how).to(device).eval()
        again = AutoTokenizer.from_pretrained(place / "edited", **how)
        answers["transformers"] = [_answer(back, again, prompt, options.length) for prompt in prompts]
        del back
        if llama_cpp.available():
            whole, base = place / "edited/model.gguf", place / "base/model.gguf"
            answers["llama.cpp"] = llama_cpp.answers(whole, prompts, options.length)
            added = place / "adapter/adapter.gguf"
            answers["llama.cpp, base and adapter"] = llama_cpp.answers(base, prompts, options.length, added)
    results = {
        "prompts": len(prompts),
        "changed_by_editing": sum(old[1] != new[1] for old, new in zip(before, expected, strict=True)),
        "took": report.edits - len(report.failed),
        "adapter_rank": adapter.rank,
        "bytes": sizes,
        "same_prompt_ids": {name: _same(found, expected, 0) for name, found in answers.items()},
        "same_answers": {name: _same(found, expected, 1) for name, found in answers.items()},
    }
    finish("gguf_answers", options, device, results)


def _same(found: list, expected: list, part: int) -> int:
    return sum(one[part] == other[part] for one, other in zip(found, expected, strict=True))


def _answer(model: torch.nn.Module, tokenizer, prompt: str, length: int) -> tuple[list[int], list[int]]:
    """(ids of the prompt, ids of the answer), without a stop."""
    ids = tokenizer(prompt).input_ids
    step, past, answer = torch.tensor([ids], device=next(model.parameters()).device), past_keyword(model), []
    cache = None
    with torch.no_grad():
        for _ in range(length):
            out = model(step, use_cache=True, **{past: cache})
            step, cache = out.logits[:, -1:].argmax(-1), out[past]
            answer.append(int(step))
    return ids, answer


if __name__ == "__main__":
    main()
