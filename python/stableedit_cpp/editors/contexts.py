"""Texts before a prompt, in which what is located in it is looked at as well: of the model's own making."""

from __future__ import annotations

import torch

from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.tokens import TokenSequence, collate, prompt_ids
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["BEGINNINGS", "sample_contexts"]

BEGINNINGS = ("The", "Therefore", "Because", "I", "You")  # of the published contexts
_TOKENS = 10  # that each has in all
_TOP = 5  # of the likeliest tokens the next one is drawn from


def sample_contexts(model: torch.nn.Module, tokenizer, seed: int = 0) -> list[str]:
    """One context for each of five beginnings, ``"<ten tokens>. "``, drawn from the five likeliest tokens at each place
    (MEMIT, Meng et al. 2023; released code, ``get_context_templates``). Special tokens are never drawn.

    The same model and seed give the same contexts; nothing else draws from this seed.

    Raises:
        ValueError: if the model answers NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    device, special = input_device(model), tokenizer.all_special_ids
    texts = [tuple(ids) for ids in prompt_ids(tokenizer, BEGINNINGS)]
    opening = [sum(token in special for token in ids) for ids in texts]
    for _ in range(_TOKENS):
        open_ = [index for index, ids in enumerate(texts) if len(ids) - opening[index] < _TOKENS]
        if not open_:
            break
        batch = collate([TokenSequence(texts[index], (0,)) for index in open_], device)
        with untouched(model), torch.no_grad():
            logits = answer_logits(model, batch).float().cpu()
        if logits.isnan().any():
            raise ValueError("the model answers NaN to the beginnings of contexts; it is broken")
        logits[:, special] = -torch.inf
        likeliest = logits.topk(min(_TOP, logits.shape[1]))
        drawn = torch.multinomial(likeliest.values.softmax(-1), 1, generator=generator)
        for index, token in zip(open_, likeliest.indices.gather(1, drawn).flatten().tolist(), strict=True):
            texts[index] = (*texts[index], token)
    return [" ".join(tokenizer.decode(ids, skip_special_tokens=True).split()) + ". " for ids in texts]
