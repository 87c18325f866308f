"""Whether what is given is a causal language model and its tokenizer: said in a sentence, before anything is run."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

__all__ = ["check_editable", "check_tokenizer", "language_model"]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_CAUSAL = "expected a causal language model, as load_model and AutoModelForCausalLM.from_pretrained give it"


def language_model(model: object) -> nn.Module:
    """A model to be asked, without what torch.compile or DataParallel put around it: its batches differ in shape each
    time, which these are not made for.

    Raises:
        ValueError: for a name, an encoder-decoder, a model without a language-modelling head, or no model at all.
    """
    if isinstance(model, str):
        raise ValueError(f"model is a name, {model!r:.80}; load it first: model, tokenizer = load_model({model!r:.80})")
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is of the type {type(model).__name__}; {_CAUSAL}")
    model = _inside(model)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder, whose prompt is no part of the text that goes on; {_CAUSAL}")
    if isinstance(model, PreTrainedModel) and (
        "ForMaskedLM" in name or (not model.can_generate() and model.get_output_embeddings() is None)
    ):
        raise ValueError(f"{name} does not predict the next token: it has no causal language-modelling head; {_CAUSAL}")
    return model


def check_editable(model: object) -> None:
    """Refuse what edits cannot be written into.

    Raises:
        ValueError: as ``language_model``; for a model that is wrapped in DataParallel or its like, or with adapters of
            peft that are not merged.
    """
    language_model(model)
    kind = type(model).__name__
    if isinstance(model, _PARALLEL):
        raise ValueError(
            f"the model is wrapped in {kind}; edit the one inside, model.module: its weights are the same, so the "
            "wrapped one answers as edited"
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        merge = "model = model.merge_and_unload()" if hasattr(model, "merge_and_unload") else "load it without them"
        raise ValueError(
            f"the {kind} carries adapters of peft, and edits would be left out when either of the two is saved; merge "
            f"them into the weights first: {merge}"
        )


def check_tokenizer(tokenizer: object) -> None:
    """
    Raises:
        ValueError: for a name, or anything else that is no tokenizer.
    """
    if isinstance(tokenizer, str):
        raise ValueError(f"tokenizer is a name, {tokenizer!r:.80}; load it first: AutoTokenizer.from_pretrained(...)")
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise ValueError(f"tokenizer is of the type {type(tokenizer).__name__}; expected the model's tokenizer")


def _inside(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, _PARALLEL):
            model = model.module
        else:
            return model
