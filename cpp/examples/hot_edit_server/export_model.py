"""Export a causal LM of transformers for hot_edit_server: an AOTInductor package whose editable weights are inputs.

The directory holds
    model.pt2            compiled code without weights: (input_ids [1, n], editable weights) -> logits [vocabulary]
    weights.safetensors  the constants by the names that model.pt2 knows, and "<module>.weight" of the editable modules
    tokenizer.json       as the model's tokenizer wrote it
    manifest.json        names, shapes and limits that the server needs, and where all this comes from
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from stableedit_cpp import load_model
from stableedit_cpp.files.atomic import new_directory, write_json
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.model.linears import Linears
from stableedit_cpp.model.modules import EditModule, find_modules
from stableedit_cpp.model.outputs import default_edit_modules
from stableedit_cpp.model.tokens import context_length

FORMAT_VERSION = 1

# The weights stay outside the compiled code and as they are, neither folded nor packed into another layout; the number
# of threads is the server's choice.
_INDUCTOR = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.use_runtime_constant_folding": False,
    "freezing": False,
    "cpp.dynamic_threads": True,
    # torch.export wants lengths from 2; the code is right for 1 as well, which _check makes sure of.
    "aot_inductor.check_lowerbound": False,
}


class NextTokenLogits(nn.Module):
    """Logits of the token that follows, with the weights of some modules taken from the arguments."""

    def __init__(self, model: nn.Module, modules: Sequence[EditModule]) -> None:
        super().__init__()
        self.model = model
        self.names = [f"{module.name}.weight" for module in modules]

    def forward(self, input_ids: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """input_ids ``[1, n]``, weights as in the model; returns float32 ``[vocabulary]``."""
        arguments = {"input_ids": input_ids, "use_cache": False, "logits_to_keep": 1}
        replaced = dict(zip(self.names, weights, strict=True))
        return torch.func.functional_call(self.model, replaced, (), arguments).logits[0, -1].float()


def export(model: nn.Module, tokenizer, directory: Path, modules: Sequence[EditModule], max_length: int) -> None:
    """Compile ``model`` and write everything that the server needs into ``directory``.

    Raises:
        ValueError: if the compiled model does not compute what the model does.
    """
    wrapper = NextTokenLogits(model, modules).eval()
    weights = [module.weight.detach() for module in modules]
    length = torch.export.Dim("length", min=2, max=max_length)
    example = (torch.ones(1, 7, dtype=torch.long), weights)
    with torch.no_grad(), Linears().replaced(model):
        program = torch.export.export(
            wrapper, example, dynamic_shapes=({1: length}, [None] * len(weights)), strict=False
        )
    package = directory / "model.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=_INDUCTOR)

    compiled = torch._inductor.aoti_load_package(str(package))
    available = {**program.state_dict, **program.constants}
    constants = {name: available[name].detach().contiguous() for name in compiled.get_constant_fqns()}
    _check(wrapper, compiled, constants, weights, max_length)
    editable = {f"{module.name}.weight": module.weight.detach().contiguous() for module in modules}
    save_file(constants | editable, directory / "weights.safetensors")
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))


def _check(wrapper: nn.Module, compiled, constants, weights, max_length: int) -> None:
    """The compiled model against the original, also with other weights than it was compiled with."""
    compiled.load_constants(constants, check_full_update=True)
    vocabulary = wrapper.model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    for count, scale in ((1, 1.0), (2, 1.0), (max_length, 1.0), (9, 1.5)):
        ids = torch.randint(vocabulary, (1, count), generator=generator)
        scaled = [weight * scale for weight in weights]
        with torch.no_grad():
            expected, actual = wrapper(ids, scaled), compiled(ids, scaled)
        difference = ((actual - expected).abs().max() / expected.abs().max()).item()
        limit = 1e-4 if weights[0].dtype == torch.float32 else 0.05
        if not difference <= limit:
            raise ValueError(
                f"the compiled model differs from the model by {difference:.1e} of the largest logit on {count} tokens "
                f"(at most {limit:.0e} is rounding); this torch cannot compile it correctly"
            )


def describe(name: str, model: nn.Module, tokenizer, modules: Sequence[EditModule], max_length: int) -> dict:
    """What manifest.json says."""
    stop = model.generation_config.eos_token_id
    stop = stop if isinstance(stop, list) else [] if stop is None else [stop]
    return {
        "format_version": FORMAT_VERSION,
        "model": name,
        "model_digest": model_digest(model),
        "dtype": str(modules[0].weight.dtype).removeprefix("torch."),
        "max_length": max_length,
        "stop_tokens": stop,
        "edit_modules": [{"name": module.name, "layout": module.layout} for module in modules],
        "torch": torch.__version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def every_layer(model: nn.Module) -> list[str]:
    """Patterns of the output projections of all layers: of attention, which is edited by default, and of MLPs."""
    names = default_edit_modules(model) + default_edit_modules(model, automatic=True)
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile a causal LM for hot_edit_server (minutes, and a C++ compiler).",
        epilog="example:\n  python export_model.py --model smollm2-135m --output exported/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="directory of a saved model, hub name, or smollm2-135m")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="new directory")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument(
        "--edit-modules",
        nargs="+",
        metavar="NAME",
        help="linear maps that patches may change: names or patterns (default: outputs of all MLPs and attention)",
    )
    parser.add_argument("--max-length", type=int, default=512, metavar="N", help="prompt and answer (default 512)")
    options = parser.parse_args(argv)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"export_model.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> None:
    if options.output.exists():
        raise ValueError(f"--output {options.output} exists; name a new directory")
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model, tokenizer = load_model(options.model, dtype=dtype)
    modules = find_modules(model, options.edit_modules or every_layer(model))
    limit = context_length(model)
    if options.max_length < 2 or (limit and options.max_length > limit):
        raise ValueError(f"--max-length {options.max_length} must be 2 to {limit}, the model's context")
    manifest = describe(options.model, model, tokenizer, modules, options.max_length)
    with new_directory(options.output) as directory:
        started = time.perf_counter()
        export(model, tokenizer, directory, modules, options.max_length)
        write_json(directory / "manifest.json", manifest)
    seconds = time.perf_counter() - started
    names = [module.name for module in modules]
    print(f"{options.output}: {options.model} for patches of {names[0]} to {names[-1]}, compiled in {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
