"""Capture of keys and value gradients: ours, as published, and the least work that any way of doing it has."""

from __future__ import annotations

import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

from common import finish, milliseconds, new_parser, peak_memory, start, timed
from published import published_batches, published_capture, require_gradients
from stableedit_cpp.evaluation.answers import answer_scores
from stableedit_cpp.model import capture as capturing
from stableedit_cpp.model import running
from stableedit_cpp.model.capture import capture
from stableedit_cpp.model.form import find_form
from stableedit_cpp.model.modules import EditModule, find_modules
from stableedit_cpp.model.outputs import default_edit_modules
from stableedit_cpp.model.prefix import shared_prefix
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate, pack
from stableedit_cpp.model.trunk import TrunkCache, trusted
from stableedit_cpp.model.untouched import untouched
from workload import (
    CONFIGS,
    add_model_options,
    edited,
    pretrained,
    random_model,
    random_sequences,
    token_sequences,
    zsre,
)


def main() -> None:
    parser = new_parser(
        "Times the capture of a turn: ours, the published loop and the bare limit (the same batches, no keys taken, "
        "gradient of the first edited output alone).\nOn SmolLM2 with ZsRE requests and, with --config, on a model "
        "with random weights. Tokenised before.",
        "capture.py --config tiny --json bench/results/capture.json",
    )
    add_model_options(parser)
    parser.add_argument("--config", metavar="NAME", help=f"also a random model: {', '.join(CONFIGS)} or a JSON file")
    parser.add_argument("--only-config", action="store_true", help="leave out --model")
    parser.add_argument("--chats", action="store_true", help="requests of --model as turns of a chat")
    parser.add_argument("--requests", type=int, default=100, metavar="N", help="requests a turn (default 100)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="alternating runs of each (default 5)")
    parser.add_argument(
        "--published-gradients",
        default="edited",
        choices=["edited", "all"],
        help="weights that accumulate a gradient in the published loop: the edited ones (as released) or all",
    )
    options = parser.parse_args()
    if options.only_config and not options.config:
        parser.error("--only-config needs --config")
    device = start(options)
    results: dict[str, object] = {}
    if not options.only_config:
        model, tokenizer, modules = pretrained(options, device)
        if options.chats:
            form = find_form(model, tokenizer, chat_template=True, end_of_answer=True)
            sequences = token_sequences(model, tokenizer, zsre(options, options.requests), form)
            every = options.edit_modules or default_edit_modules(model, every=True)
            results = {"chats": chats(model, find_modules(model, every), sequences, options)}
        else:
            sequences = token_sequences(model, tokenizer, zsre(options, options.requests))
            results = compare(model, modules, sequences, options, device)
        del model
    if options.config:
        model = random_model(options.config, options, device)
        sequences = random_sequences(options.requests, model.config.vocab_size)
        found = compare(model, edited(model, Namespace(edit_modules=None)), sequences, options, device)
        results = {**results, "random_model": found} if results else found
    finish("capture_chats" if options.chats else "capture", options, device, results)


def compare(
    model: torch.nn.Module,
    modules: list[EditModule],
    sequences: list[TokenSequence],
    options: Namespace,
    device: torch.device,
) -> dict[str, object]:
    """Alternating runs of the three, after one of each that is not counted."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    batches = [collate([sequences[i] for i in indices], device) for indices in pack(sequences, options.max_tokens)]
    micro_batches = published_batches(sequences, device)
    originals = {module.name: module.module for module in modules}

    def ours() -> None:
        capture(model, modules, sequences, micro_batch=10, max_tokens=options.max_tokens)

    def published() -> None:
        with tempfile.TemporaryDirectory() as name:
            published_capture(model, originals, micro_batches, Path(name))

    ways = {"limit": lambda: bare_limit(model, modules[0], batches), "ours": ours, "published": published}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, int] = dict.fromkeys(ways, 0)
    for repeat in range(options.repeats + 1):
        for name, way in ways.items():
            if name == "published":
                require_gradients(model, originals, options.published_gradients)
            with peak_memory(device) as peak:
                taken = timed(device, way)[1]
            model.zero_grad()
            for parameter, flag in zip(model.parameters(), flags, strict=True):
                parameter.requires_grad_(flag)
            if repeat:
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak[0])
    limit, own, theirs = (statistics.median(seconds[name]) for name in ("limit", "ours", "published"))
    answers = sum(len(sequence.answer) for sequence in sequences)
    return {
        "over_limit": own / limit,
        "speedup": theirs / own,
        **{name: {**milliseconds(values), "peak_bytes": peaks[name]} for name, values in seconds.items()},
        "model": getattr(model.config, "model_type", type(model).__name__),
        "edit_modules": list(originals),
        "requests": len(sequences),
        "tokens": sum(map(len, sequences)),
        "tokens_with_padding": {
            "ours": sum(batch.input_ids.numel() for batch in batches),
            "published": sum(batch["input_ids"].numel() for batch in micro_batches),
        },
        "answer_tokens": answers,
    }


def chats(
    model: torch.nn.Module, modules: list[EditModule], sequences: list[TokenSequence], options: Namespace
) -> dict[str, object]:
    """Alternating runs with a filled trunk cache, after one of each that is not counted."""
    ways = {
        "capture": lambda trunk: capture(model, modules, sequences, max_tokens=options.max_tokens, trunk=trunk),
        "scores": lambda trunk: answer_scores(model, sequences, max_tokens=options.max_tokens, trunk=trunk),
    }
    caches = {"": TrunkCache(model, modules), "_in_full": TrunkCache(model, modules)}
    seconds: dict[str, list[float]] = {name + how: [] for name in ways for how in caches}
    with trusted(*caches.values()):
        for repeat in range(options.repeats + 1):
            for name, way in ways.items():
                for how, trunk in caches.items():
                    with in_full() if how else nullcontext():
                        begin = time.process_time()
                        way(trunk)
                    if repeat:
                        seconds[name + how].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "processor_seconds": medians,
        "shares": {name: medians[name] / medians[f"{name}_in_full"] for name in ways},
        "runs": options.repeats,
        "edit_modules": [module.name for module in modules],
        "requests": len(sequences),
        "tokens": sum(map(len, sequences)),
        "head_tokens": len(shared_prefix(model, sequences) or ()),
        "answer_tokens": sum(len(sequence.answer) for sequence in sequences),
    }


@contextmanager
def in_full() -> Iterator[None]:
    """The head with every prompt."""
    with ExitStack() as stack:
        for room in (capturing, running):
            stack.enter_context(mock.patch.object(room, "shared_prefix", return_value=None))
        yield


def bare_limit(model: torch.nn.Module, first: EditModule, batches: Sequence[Batch]) -> None:
    """Forward pass, logits at answer positions, backward pass to the first edited output; nothing is kept."""
    leaf: list[torch.Tensor] = []

    def cut(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        leaf[:] = [output.detach().requires_grad_()]
        return leaf[0]

    head = model.get_output_embeddings()
    with untouched(model):
        handle = first.module.register_forward_hook(cut)
        try:
            for batch in batches:
                hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
                logits = head(hidden.reshape(-1, hidden.shape[-1])[batch.positions])
                torch.autograd.grad(F.cross_entropy(logits.float(), batch.labels, reduction="sum"), leaf)
        finally:
            handle.remove()


if __name__ == "__main__":
    main()
