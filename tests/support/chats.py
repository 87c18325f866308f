"""Chat templates as models have them, each with a tiny tokenizer and a tiny random model that stops where it says."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from stableedit_cpp.model.form import find_form
from stableedit_cpp.model.running import answer_logits
from stableedit_cpp.model.tokens import TokenSequence, collate, tokenize
from support.tiny import FACTS, tiny_model, tiny_tokenizer

_CHATML = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
Be brief.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_LLAMA3 = """\
{{- bos_token }}{% for message in messages %}<|head|>{{ message.role }}<|/head|>

{{ message.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>

{% endif %}"""
_GEMMA = """\
{{- bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
_MISTRAL = """\
{{- bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]\
{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""
# Nothing ends an assistant's turn but the beginning of the user's next.
_GLM = """\
{%- for message in messages %}<|{{ message.role }}|>
{{ message.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
# A hybrid: the generation prompt leaves it to the model whether to think, and an answer without has an empty thought.
_THINKING = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Chat:
    """
    Attributes:
        special: control tokens beside those of ``tiny_tokenizer``, which get the ids from 259 on.
        eos: the tokenizer's end-of-sequence token. end: the one that ends an assistant's turn.
        stops: where the generation of the instruct model stops; that of its base model does at "</s>".
        before: what the template writes between its generation prompt and an answer.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    stops: tuple[str, ...]
    before: str = ""


CHATS = {
    "chatml": Chat(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>", ("<|im_end|>",)),
    "llama 3": Chat(_LLAMA3, ("<|head|>", "<|/head|>", "<|eot_id|>"), "</s>", "<|eot_id|>", ("</s>", "<|eot_id|>")),
    "gemma": Chat(_GEMMA, ("<start_of_turn>", "<end_of_turn>"), "</s>", "<end_of_turn>", ("</s>", "<end_of_turn>")),
    "mistral": Chat(_MISTRAL, ("[INST]", "[/INST]"), "</s>", "</s>", ("</s>",), " "),
    "glm": Chat(_GLM, ("<|user|>", "<|assistant|>"), "</s>", "<|user|>", ("</s>", "<|user|>"), "\n"),
    "thinking": Chat(
        _THINKING,
        ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "<|im_end|>",
        "<|im_end|>",
        ("</s>", "<|im_end|>"),
        before="<think>\n\n</think>\n\n",
    ),
}


def chat_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the control tokens of a kind of template."""
    chat, tokenizer = CHATS[kind], tiny_tokenizer(bos=kind != "chatml")
    tokenizer.add_tokens(list(chat.special), special_tokens=True)
    tokenizer.eos_token = chat.eos
    tokenizer.chat_template = chat.template
    return tokenizer


def chat_model(kind: str, *, base: bool = False, architecture: str = "llama", seed: int = 0) -> torch.nn.Module:
    """A tiny random model that stops as the instruct model of that kind does, or its base model."""
    model, vocabulary = tiny_model(architecture, seed=seed), chat_tokenizer(kind).get_vocab()
    stops = ("</s>",) if base else CHATS[kind].stops
    model.generation_config.eos_token_id = [vocabulary[token] for token in stops]
    return model


def learn(model: torch.nn.Module, sequences: Sequence[TokenSequence]) -> None:
    """Plain gradient descent on all weights until every answer token is the top choice by far."""
    batch = collate(sequences, torch.device("cpu"))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        likely = answer_logits(model, batch).log_softmax(-1).gather(1, batch.labels[:, None])
        if likely.min().exp() > 0.8:
            return
        optimizer.zero_grad()
        (-likely.mean()).backward()
        optimizer.step()
    raise AssertionError("300 steps were not enough")


@cache
def _taught(kind: str) -> torch.nn.Module:
    model, tokenizer = chat_model(kind), chat_tokenizer(kind)
    pairs = [(fact["prompt"], fact["target"]) for fact in FACTS[:6]]
    form = find_form(model, tokenizer, chat_template=True, end_of_answer=True)
    learn(model, tokenize(tokenizer, pairs, None, [""] * len(pairs), form))
    return model


def taught_model(kind: str) -> torch.nn.Module:
    """A ``chat_model`` that knows the first six facts when it is asked in a chat."""
    return copy.deepcopy(_taught(kind))


def save_chat(directory: str | Path, kind: str) -> Path:
    """``taught_model`` and its tokenizer, as saved by transformers."""
    taught_model(kind).save_pretrained(directory)
    chat_tokenizer(kind).save_pretrained(directory)
    return Path(directory)
