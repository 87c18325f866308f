"""Chat templates as models have them, each with a tiny tokenizer and a tiny random model that stops where it says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from support.tiny import tiny_model, tiny_tokenizer

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
        stops: where the generation of the instruct model stops, and that of its base model.
        before: what the template writes between its generation prompt and an answer.
    """

    template: str
    special: tuple[str, ...]
    eos: str
    end: str
    stops: tuple[str, ...]
    base_stops: tuple[str, ...] = ("</s>",)
    before: str = ""


CHATS = {
    "chatml": Chat(_CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>", ("<|im_end|>",)),
    "llama 3": Chat(_LLAMA3, ("<|head|>", "<|/head|>", "<|eot_id|>"), "</s>", "<|eot_id|>", ("</s>", "<|eot_id|>")),
    "gemma": Chat(
        _GEMMA, ("<start_of_turn>", "<end_of_turn>"), "</s>", "<end_of_turn>", ("</s>", "<end_of_turn>"), ("</s>",)
    ),
    "mistral": Chat(_MISTRAL, ("[INST]", "[/INST]"), "</s>", "</s>", ("</s>",), ("<pad>",), " "),
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
    stops = CHATS[kind].base_stops if base else CHATS[kind].stops
    model.generation_config.eos_token_id = [vocabulary[token] for token in stops]
    return model
