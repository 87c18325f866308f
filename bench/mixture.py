"""A mixture of experts, trained by us on real text, that takes edits: in attention, and in single experts."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm.auto import tqdm

from common import data_file, finish, new_parser, start
from stableedit_cpp import (
    EditRequest,
    StableEdit,
    StableEditConfig,
    choose_modules,
    evaluate,
    load_model,
    read_requests,
)
from stableedit_cpp.data.texts import iter_texts
from stableedit_cpp.evaluation import UneditedAnswers
from stableedit_cpp.files.atomic import write_json
from stableedit_cpp.model.outputs import as_patterns, default_edit_modules

TEXT, EDITS = "downstream/wikitext2_test_raw.txt", "zsre/zsre_edit_5k.json"
QUESTIONS = ("zsre/zsre_train_5k.json", "entityquestions/stream_train_20k.jsonl.gz")
_END = "</s>"
_WINDOW = 64  # tokens
_TRAINING = ("steps", "batch", "vocabulary", "width")  # what makes another model


def main() -> None:
    parser = new_parser(
        "Trains a small Qwen3-MoE on WikiText-2 and the questions of ZsRE and EntityQuestions, then edits other\n"
        "questions of ZsRE with StableEditConfig(): in the default modules (attention), in all experts of two layers,\n"
        "in both, and in what choose_modules takes. Says first how many of the answers the model can give at all.",
        "mixture.py --threads 1 --save mixture --json bench/results/mixture.json",
    )
    parser.add_argument("--data", default="../shared/data", metavar="DIR", help="data sets (default ../shared/data)")
    parser.add_argument("--save", metavar="DIR", help="keep the trained model there, and edit the one that is there")
    parser.add_argument("--steps", type=int, default=2500, metavar="N", help="of training (default 2500)")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="windows of 64 tokens a step (default 16)")
    parser.add_argument("--vocabulary", type=int, default=4096, metavar="N", help="tokens (default 4096)")
    parser.add_argument("--width", type=int, default=192, metavar="D", help="of the model (default 192)")
    parser.add_argument("--edits", type=int, default=100, metavar="N", help="default 100")
    parser.add_argument(
        "--turn-size", type=int, nargs="+", default=[100, 20], metavar="N", help="edits a turn (default 100, and 20)"
    )
    parser.add_argument("--choose", action="store_true", help="also measure which modules are best, and edit these")
    options = parser.parse_args()
    device = start(options)
    model, tokenizer, trained = trained_model(options, device)
    requests = read_requests(data_file(options.data, EDITS), options.edits)
    trained["expressible"] = expressible(model, tokenizer, requests)
    attention, experts = default_edit_modules(model, automatic=True), default_edit_modules(model)
    rows = {"attention": attention, "experts": experts, "attention and experts": [*attention, *experts]}
    measured: dict[str, object] = {}
    if options.choose:
        choice = choose_modules(model, tokenizer, requests, cached=False)
        rows["chosen"], measured = choice.modules, choice.to_dict()
    found = {
        f"{name}, turns of {size}": edit(model, tokenizer, requests, modules, size)
        for name, modules in rows.items()
        for size in options.turn_size
    }
    finish("mixture", options, device, {"model": trained, "edited": found, "choice": measured})


def trained_model(options: Namespace, device: torch.device) -> tuple[torch.nn.Module, object, dict[str, object]]:
    """The model, its tokenizer and how it was trained; from ``--save`` where it has been trained before."""
    asked = {name: getattr(options, name) for name in _TRAINING}
    kept = Path(options.save) / "training.json" if options.save else None
    if kept is not None and kept.exists():
        trained = json.loads(kept.read_text(encoding="utf-8"))
        differs = [name for name in _TRAINING if trained[name] != asked[name]]
        if differs:
            name, value = differs[0], trained[differs[0]]
            raise SystemExit(f"{options.save} has a model with --{name} {value}; say that, or name another directory")
        model, tokenizer = load_model(options.save, dtype="float32")
        return model.to(device), tokenizer, trained
    tokenizer = train_tokenizer(options)
    model, trained = train(tokenizer, options, device)
    if kept is not None:
        model.save_pretrained(options.save)
        tokenizer.save_pretrained(options.save)
        write_json(kept, asked | trained)  # last: a directory without it is trained anew
    return model, tokenizer, asked | trained


def questions(options: Namespace) -> Iterator[str]:
    """With their answers: of each request its prompt, its paraphrase and its unrelated question."""
    for name in QUESTIONS:
        for request in read_requests(data_file(options.data, name)):
            yield f"{request.prompt} {request.target}"
            if request.rephrase:
                yield f"{request.rephrase} {request.target}"
            if request.locality_prompt and request.locality_target:
                yield f"{request.locality_prompt} {request.locality_target}"


def paragraphs(options: Namespace) -> Iterator[str]:
    for _, text in iter_texts(data_file(options.data, TEXT)):
        yield text


def train_tokenizer(options: Namespace) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(chain(paragraphs(options), questions(options)), trainer)
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
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        output_router_logits=True,  # training keeps the experts' shares alike
        router_aux_loss_coef=0.01,
    )
    model = transformers.Qwen3MoeForCausalLM(config).to(device)
    windows = training_windows(tokenizer, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=options.steps)
    losses, begin = [], time.perf_counter()
    for _ in tqdm(range(options.steps), desc="Training", unit="step", disable=None):
        batch = windows[torch.randint(len(windows), (options.batch,))].to(device)
        output = model(input_ids=batch, labels=batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
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


def training_windows(tokenizer, options: Namespace) -> torch.Tensor:
    """``[windows, 64]`` token ids. Questions are packed whole, in a random order, so that the first of a window stands
    where that of an edit does; what is left of a window is filled with the token that ends a text."""
    end, found = tokenizer.eos_token_id, []
    for text in paragraphs(options):
        ids = tokenizer(text).input_ids
        found += [ids[start : start + _WINDOW] for start in range(0, len(ids), _WINDOW)]
    short = [[*ids, end][:_WINDOW] for ids in tokenizer(list(questions(options))).input_ids]
    window: list[int] = []
    for index in torch.randperm(len(short)).tolist():
        if len(window) + len(short[index]) > _WINDOW:
            found.append(window)
            window = []
        window = window + short[index]
    found.append(window)
    return torch.tensor([ids + [end] * (_WINDOW - len(ids)) for ids in found])


def expressible(model, tokenizer, requests: list[EditRequest], steps: int = 200) -> float:
    """Share of the requests that an edit could make hold whatever it does below the last norm: for each token of the
    answer, and the one that ends it, there is a state with which the model gives it the probability that
    ``StableEditConfig`` asks for. A head that was trained too little gives no token much, wherever the state is."""
    answers = [[*tokenizer(f" {request.target}").input_ids, tokenizer.eos_token_id] for request in requests]
    tokens = torch.tensor(sorted({token for answer in answers for token in answer}), device=model.device)
    head, norm = model.lm_head.weight.detach(), model.model.norm
    state = head[tokens].clone().requires_grad_()  # a good place to begin
    optimizer = torch.optim.Adam([state], lr=0.05)
    for _ in range(steps):
        loss = F.cross_entropy(norm(state) @ head.t(), tokens, reduction="none")
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    enough = (-loss.detach()).exp() >= StableEditConfig().take_probability
    can = dict(zip(tokens.tolist(), enough.tolist(), strict=True))
    return sum(all(can[token] for token in answer) for answer in answers) / len(answers)


def edit(model, tokenizer, requests: list[EditRequest], modules: list[str] | None, turn_size: int) -> dict[str, object]:
    """Edit, score, and take everything back."""
    editor = StableEdit(model, tokenizer, StableEditConfig(edit_modules=modules, turn_size=turn_size))
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
        "drift": report.drift,
        "passes": [turn.passes for turn in report.turns],
        "unedited": before,
        "scores": after,
    }


if __name__ == "__main__":
    main()
