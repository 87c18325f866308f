"""A mixture of experts, trained on the spot on real text, that takes edits: in attention, and in single experts."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from common import data_file, finish, new_parser, start
from stableedit_cpp import EditRequest, StableEdit, StableEditConfig, choose_modules, evaluate, read_requests
from stableedit_cpp.data.texts import iter_texts
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.model.outputs import as_patterns, default_edit_modules

TEXT, QUESTIONS, EDITS = "downstream/wikitext2_test_raw.txt", "zsre/zsre_train_5k.json", "zsre/zsre_edit_5k.json"
_END = "</s>"
_WINDOW = 64  # tokens


def main() -> None:
    parser = new_parser(
        "Trains a small Qwen3-MoE on WikiText-2 and questions of ZsRE, then edits other questions of ZsRE with\n"
        "StableEditConfig(): in the default modules, in all experts of some layers, and in what choose_modules takes.",
        "mixture.py --edits 100 --json bench/results/mixture.json",
    )
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="of training (default 400)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="windows of 64 tokens a step (default 16)")
    parser.add_argument("--vocabulary", type=int, default=2048, metavar="N", help="tokens (default 2048)")
    parser.add_argument("--width", type=int, default=128, metavar="D", help="of the model (default 128)")
    parser.add_argument("--edits", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument("--choose", action="store_true", help="also measure which modules are best, and edit these")
    options = parser.parse_args()
    device = start(options)
    tokenizer = train_tokenizer(options)
    model, trained = train(tokenizer, options, device)
    requests = read_requests(data_file(options.data, EDITS), options.edits)
    rows = {"attention": None, "experts": default_edit_modules(model)}
    measured: dict[str, object] = {}
    if options.choose:
        choice = choose_modules(model, tokenizer, requests, cached=False)
        rows["chosen"], measured = choice.modules, choice.to_dict()
    found = {name: edit(model, tokenizer, requests, modules) for name, modules in rows.items()}
    finish("mixture", options, device, {"model": trained, "edited": found, "choice": measured})


def texts(options: Namespace) -> Iterator[str]:
    """Paragraphs, and questions with their answers."""
    for _, text in iter_texts(data_file(options.data, TEXT)):
        yield text
    for request in read_requests(data_file(options.data, QUESTIONS)):
        yield f"{request.prompt} {request.target}"


def train_tokenizer(options: Namespace) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(options), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def train(
    tokenizer, options: Namespace, device: torch.device
) -> tuple[transformers.Qwen3MoeForCausalLM, dict[str, object]]:
    config = transformers.Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.width,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=options.width // 4,
        intermediate_size=2 * options.width,
        moe_intermediate_size=options.width,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        output_router_logits=True,  # training keeps the experts' shares alike
        router_aux_loss_coef=0.01,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(device)
    ids = torch.tensor(
        [*chain.from_iterable((*tokenizer(text).input_ids, tokenizer.eos_token_id) for text in texts(options))]
    )
    windows = ids[: len(ids) // _WINDOW * _WINDOW].view(-1, _WINDOW)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    losses, begin = [], time.perf_counter()
    for _ in tqdm(range(options.steps), desc="Training", unit="step", disable=None):
        batch = windows[torch.randint(len(windows), (options.batch,))].to(device)
        output = model(input_ids=batch, labels=batch)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(output.loss.detach()))
    model.config.output_router_logits = False
    tail = losses[-max(1, options.steps // 20) :]
    return model.eval(), {
        "parameters": sum(part.numel() for part in model.parameters()),
        "tokens": options.steps * options.batch * _WINDOW,
        "seconds": time.perf_counter() - begin,
        "first_loss": losses[0],
        "last_loss": sum(tail) / len(tail),
    }


def edit(model, tokenizer, requests: list[EditRequest], modules: list[str] | None) -> dict[str, object]:
    """Edit, score, and take everything back."""
    editor = StableEdit(model, tokenizer, StableEditConfig(edit_modules=modules))
    unedited = UneditedAnswers(editor.unedited)
    how = {"reference": unedited, "progress": False}
    before = evaluate(model, tokenizer, requests, **how).means()
    report = editor.edit(requests, progress=True)
    after = evaluate(model, tokenizer, requests, **how).means()
    changed = sum(bool(change.any()) for change in editor.weight_changes().values())
    taken = sum(turn.requests - len(turn.failed) for turn in report.turns)
    editor.weights.shrink(0.0)
    return {
        "modules": as_patterns([module.name for module in editor.modules]),
        "changed_modules": changed,
        "edits": len(requests),
        "taken_when_edited": taken / len(requests),
        "seconds": report.seconds,
        "passes": [turn.passes for turn in report.turns],
        "unedited": before,
        "scores": after,
    }


if __name__ == "__main__":
    main()
