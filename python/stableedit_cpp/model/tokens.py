"""From (prompt, target) pairs to padded batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from stableedit_cpp.model.encoding import Passage, encode
from stableedit_cpp.model.form import RAW, Form

__all__ = [
    "Batch",
    "TokenSequence",
    "answer_positions",
    "collate",
    "context_length",
    "fixed_cost",
    "longest_first",
    "pack",
    "prompt_ids",
    "tokenize",
]


@dataclass(frozen=True)
class TokenSequence:
    """A prompt followed by all but the last token of its answer.

    The position before each answer token predicts it: ``len(answer)`` positions, starting at ``first``.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def first(self) -> int:
        return len(self.ids) - len(self.answer)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Padded sequences. Under a causal mask, padding on the right is never seen by a real token.

    The first ``skipped`` tokens of each may be left out where the model goes on from their keys and values.
    """

    input_ids: torch.Tensor  # [sequences, longest]
    attention_mask: torch.Tensor  # [sequences, skipped + longest]
    positions: torch.Tensor  # [n], into the flattened input_ids: where answer tokens are predicted
    labels: torch.Tensor  # [n], the answer tokens
    skipped: int = 0


def tokenize(
    tokenizer, pairs: Iterable[tuple[str, str]], limit: int | None, names: Sequence[str], form: Form = RAW
) -> list[TokenSequence]:
    """Token ids of prompts and of the answers that follow them: in the raw form ``" " + target``, without an end; the
    space is left out where the prompt ends in a script that has none between words (``Form.gap``).

    An answer has the tokens that the tokenizer gives it in the text, prompt and answer in one, wherever those begin
    with the tokens of the prompt alone. Tokenizers after SentencePiece (Mistral, Llama 2) give it others when it stands
    alone: they put a space of their own before every text, so that a model would be taught two. Where the border lies
    within a token of the text, prompt and answer are tokenised apart, as published. For tokenizers that cut texts at
    spaces first (GPT-2, SmolLM2, Llama 3, Qwen) all of this is the same.

    What spells a control token of the tokenizer is text, unless the form says otherwise (``model.encoding``).

    Args:
        limit: context length of the model in tokens, if it has one.
        names: what to call each pair in an error message.
        form: of prompts and answers.

    Raises:
        ValueError: for a target without tokens, a prompt without tokens or that the form refuses, or a pair longer than
            the context.
    """
    pairs = list(pairs)
    if not pairs:
        return []
    opened = form.prompts(tokenizer, [prompt for prompt, _ in pairs])
    tails = form.words(tokenizer, [form.gap(p.whole) + t for p, (_, t) in zip(opened, pairs, strict=True)])
    joined = [prompt.then(tail) for prompt, tail in zip(opened, tails, strict=True)]
    if not form.chat:  # a control token may be spelled across the border
        joined = form.words(tokenizer, [text.whole for text in joined])
    prompts, texts = _ids(tokenizer, opened, form), _ids(tokenizer, joined, form)
    answers = [found.ids for found in encode(tokenizer, tails, opened=False)]
    sequences = []
    for index in [index for index, tail in enumerate(tails) if not tail.whole[:1].isspace() and not form.chat]:
        answers[index] = _without_dummy_prefix(tokenizer, tails[index], answers[index])
    for name, (prompt_text, _), prompt, text, alone in zip(names, pairs, prompts, texts, answers, strict=True):
        answer = text[len(prompt) :] if text[: len(prompt)] == prompt else alone
        if not prompt:
            raise ValueError(f"{name}: the prompt {prompt_text!r:.60} has no tokens")
        if not answer:
            raise ValueError(f"{name}: the target has no tokens")
        if tuple(answer[-1:]) != form.closing:  # a target may hold its end already
            answer = (*answer, *form.closing)
        length = len(prompt) + len(answer) - 1
        if limit is not None and length > limit:
            raise ValueError(
                f"{name}: prompt and target have {length} tokens, more than the model's context of {limit}"
            )
        sequences.append(TokenSequence((*prompt, *answer[:-1]), tuple(answer)))
    return sequences


def _without_dummy_prefix(tokenizer, tail: Passage, alone: list[int]) -> list[int]:
    """Tokens of a text that follows another without a space, from behind a mark: where it stands alone, tokenizers
    after SentencePiece put a space of their own before it."""
    for before in ("\n", ".", ":"):
        mark = Passage(before, before)
        end, text = (found.ids for found in encode(tokenizer, [mark, mark.then(tail)], opened=False))
        if text[: len(end)] == end and len(text) > len(end):
            return text[len(end) :]
    return alone


def prompt_ids(tokenizer, prompts: Sequence[str], form: Form = RAW) -> list[list[int]]:
    """Token ids of prompts in a form, with the tokenizer's opening tokens or the chat template's, ready to be
    continued.

    Raises:
        ValueError: for a prompt that the form refuses.
    """
    return _ids(tokenizer, form.prompts(tokenizer, prompts), form)


def _ids(tokenizer, texts: Sequence[Passage], form: Form) -> list[list[int]]:
    return [found.ids for found in encode(tokenizer, texts, opened=not form.chat, templated=form.chat)]


def context_length(model) -> int | None:
    """Number of positions of the model, if its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def longest_first(sequences: Sequence[TokenSequence]) -> list[int]:
    """Indices by length, longest first and otherwise in order, as the published code sorts a turn."""
    return sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))


def fixed_cost(max_tokens: int, device: torch.device | None = None) -> int:
    """What a forward pass costs whatever its size, chiefly reading the weights, in tokens: a share of those that are
    allowed in one, and a smaller one where multiplying with a weight takes long beside reading it."""
    return max(1, max_tokens // (80 if device is not None and device.type == "cpu" else 20))


def pack(
    sequences: Sequence[TokenSequence],
    max_tokens: int,
    skip: int = 0,
    device: torch.device | None = None,
    most: int | None = None,
) -> list[list[int]]:
    """Cut ``longest_first`` into batches of at most ``max_tokens`` tokens with padding (a single longer sequence is a
    batch of its own), so that padding and the fixed cost of a forward pass are smallest together.

    Args:
        skip: tokens at the head of each sequence that are left out.
        device: where they will run.
        most: sequences in a batch, at least 1; None takes as many as there is room for.
    """
    order = longest_first(sequences)
    lengths = [len(sequences[index]) - skip for index in order]
    fixed = fixed_cost(max_tokens, device)
    cost, start = [0] + [0] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        cost[end], start[end] = cost[end - 1] + lengths[end - 1] + fixed, end - 1
        for begin in range(end - 2, -1, -1):
            size = lengths[begin] * (end - begin)
            if size > max_tokens or (most is not None and end - begin > most):
                break
            if cost[begin] + size + fixed < cost[end]:
                cost[end], start[end] = cost[begin] + size + fixed, begin
    batches: list[list[int]] = []
    end = len(order)
    while end > 0:
        batches.append(order[start[end] : end])
        end = start[end]
    return batches[::-1]


def answer_positions(
    sequences: Sequence[TokenSequence], width: int, padding_side: str = "right", skip: int = 0
) -> list[int]:
    """Where the answer tokens of padded sequences are predicted, as indices into the flattened ``[sequences, width]``.

    All that is captured and scored is so at these positions: the last token of the prompt, which predicts the first
    token of the answer, and each token of the answer but the last. Never padding, and no other token of the prompt.
    """
    positions: list[int] = []
    for row, sequence in enumerate(sequences):
        begin = row * width + (width - len(sequence) if padding_side == "left" else -skip)
        positions.extend(range(begin + sequence.first, begin + len(sequence)))
    return positions


def collate(
    sequences: Sequence[TokenSequence], device: torch.device, padding_side: str = "right", skip: int = 0
) -> Batch:
    """Pad sequences and say where their answer tokens are predicted.

    Args:
        padding_side: ``"right"``, or ``"left"`` for prompts that the model goes on from.
        skip: leave out so many tokens at the head of each, none of which predicts an answer token.
    """
    width = max(map(len, sequences)) - skip
    host = {"dtype": torch.long, "device": "cpu"}  # whatever the default device is
    ids = torch.zeros(len(sequences), width, **host)
    mask = torch.zeros(len(sequences), skip + width, **host)
    mask[:, :skip] = 1
    for row, sequence in enumerate(sequences):
        size = len(sequence) - skip
        begin = width - size if padding_side == "left" else 0
        ids[row, begin : begin + size] = torch.tensor(sequence.ids[skip:], **host)
        mask[row, skip + begin : skip + begin + size] = 1
    positions = torch.tensor(answer_positions(sequences, width, padding_side, skip), **host)
    labels = torch.tensor([token for sequence in sequences for token in sequence.answer], **host)
    return Batch(*(_place(tensor, device) for tensor in (ids, mask, positions, labels)), skip)


def _place(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without making the host wait for the device: from pinned memory, behind what is queued there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
