"""Free generation: what a user of the model would see."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stableedit_cpp.forward import input_device, untouched
from stableedit_cpp.prompts import prompt_ids

__all__ = ["generate"]


def generate(model: torch.nn.Module, tokenizer, prompts: Sequence[str], *, max_new_tokens: int = 12) -> list[str]:
    """Greedy continuations of prompts, without the prompts themselves."""
    device = input_device(model)
    answers = []
    with untouched(model):
        for prompt in prompts:
            ids = torch.tensor(prompt_ids(tokenizer, [prompt]), device=device)
            if ids.numel() == 0:
                raise ValueError(f"the prompt {prompt!r} has no tokens")
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
            answers.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return answers
