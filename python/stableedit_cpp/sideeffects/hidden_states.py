"""Hidden states of prompts at their last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from stableedit_cpp.data.file_types import read_records
from stableedit_cpp.model.form import PARSED
from stableedit_cpp.model.shares import shared_passes
from stableedit_cpp.model.tokens import TokenSequence, collate, context_length, pack, prompt_ids
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["hidden_states", "read_prompts"]


def read_prompts(path: str | Path, count: int | None = None) -> list[str]:
    """The prompts of a file: one a line of ``.txt``, else the field ``prompt`` of its records.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for a record without a prompt, or fewer than two prompts.
    """
    path = Path(path)
    prompts: list[str] = []
    if path.suffix.lower() == ".txt":
        try:
            prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:count]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    else:
        for place, record in read_records(path):
            if len(prompts) == count:
                break
            if not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
                raise ValueError(f"{path}, {place}: there is no prompt in it; its fields are {', '.join(record)}")
            prompts.append(record["prompt"])
    if len(prompts) < 2:
        raise ValueError(f"{path} has {len(prompts)} prompts; hidden states are compared over at least 2")
    return prompts


def _layer_indices(model: torch.nn.Module, layers: Sequence[int]) -> list[int]:
    """Layers counted from the input: 0 is the embedding, the last one what the output embedding sees.

    Args:
        layers: also negative, from the end.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    count = model.config.get_text_config().num_hidden_layers + 1
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layers has {layer}; this model has the layers 0 to {count - 1} (or -{count} to -1)")
    return [layer % count for layer in layers]


def hidden_states(
    model: torch.nn.Module,
    tokenizer,
    prompts: Sequence[str],
    layers: Sequence[int] = (-1,),
    *,
    max_tokens: int = 2048,
    on_done: Callable[[int], object] | None = None,
) -> dict[int, np.ndarray]:
    """Hidden states after the last token of each prompt.

    Args:
        layers: counted from the input (0 is the embedding) or, negative, from the end.
        max_tokens: tokens, padding included, in one forward pass.
        on_done: called with the number of prompts after each forward pass.

    Returns:
        for each layer, counted from the input, ``[prompts, hidden size]`` float32.

    Raises:
        ValueError: for a layer that the model does not have, or a prompt without tokens or longer than its context.
    """
    wanted = _layer_indices(model, layers)
    limit = context_length(model)
    sequences = [TokenSequence(tuple(ids), ()) for ids in prompt_ids(tokenizer, prompts, PARSED)]
    for prompt, sequence in zip(prompts, sequences, strict=True):
        if not sequence.ids or (limit is not None and len(sequence) > limit):
            raise ValueError(f"the prompt {prompt!r:.60} has {len(sequence)} tokens; expected 1 to {limit}")
    run, device = pack(sequences, max_tokens), input_device(model)

    def read(indices: Sequence[int]) -> list[torch.Tensor]:
        batch = collate([sequences[index] for index in indices], device)
        # The model without its output embedding: nobody looks at the logits.
        output = model.base_model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
            output_hidden_states=True,
        )
        last = [len(sequences[index]) - 1 for index in indices]
        return [output.hidden_states[layer][range(len(indices)), last].float().cpu() for layer in wanted]

    done = None if on_done is None else lambda indices: on_done(len(indices))
    with untouched(model), torch.no_grad():
        how = {"max_tokens": max_tokens, "device": device, "on_done": done}
        parts = shared_passes("reading hidden states", run, sequences, read, **how)
    order = torch.tensor([index for indices in run for index in indices], dtype=torch.long, device="cpu").argsort()
    states = [torch.cat(layer)[order].numpy() for layer in zip(*parts, strict=True)]
    return dict(zip(wanted, states, strict=True))
