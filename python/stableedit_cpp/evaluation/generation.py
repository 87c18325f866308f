"""Free generation: what a user of the model would see."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stableedit_cpp.forward import input_device, untouched

__all__ = ["generate"]


def generate(model: torch.nn.Module, tokenizer, prompts: Sequence[str], *, max_new_tokens: int = 12) -> list[str]:
    """Greedy continuations of prompts, without the prompts themselves."""
    device = input_device(model)
    answers = []
    with untouched(model):
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(device)
            output = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
            answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers
