"""Whether what is given is a causal language model and its tokenizer: said in a sentence, before anything is run."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

__all__ = ["check_editable", "check_tokenizer", "language_model", "writes_alone"]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_CAUSAL = "expected a causal language model, as load_model and AutoModelForCausalLM.from_pretrained give it"


def language_model(model: object) -> nn.Module:
    """A model to be asked, without what torch.compile or DataParallel put around it: its batches differ in shape each
    time, which these are not made for.

    Raises:
        ValueError: for a name, an encoder-decoder, a model without a language-modelling head or that reads in both
            directions, or no model at all.
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
    if getattr(_text_config(model), "use_bidirectional_attention", None) in (True, "all"):  # PaliGemma
        raise ValueError(f"{name} reads a text in both directions, not from the beginning to the end; {_CAUSAL}")
    return model


def writes_alone(model: nn.Module) -> bool:
    """Whether a model can go on from one prompt at a time only: RWKV takes padding for text, whatever the attention
    mask says, and transformers mixes up the states of a batch that is continued token by token."""
    return getattr(getattr(model, "config", None), "model_type", None) == "rwkv"


def check_editable(model: object) -> None:
    """Refuse what edits cannot be written into.

    Raises:
        ValueError: as ``language_model``; for a model that is wrapped in DataParallel or its like, with adapters of
            peft that are not merged, or that rescales its own weights.
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
    config = getattr(model, "config", None)
    every = getattr(config, "rescale_every", 0)  # of RWKV
    if every and config.num_hidden_layers > every:
        raise ValueError(
            f"the {kind} divides weights of its upper layers by powers of two whenever it runs (rescale_every = "
            f"{every}), so that what is edited and saved is not what is loaded; load it with rescale_every=0"
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


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _inside(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, _PARALLEL):
            model = model.module
        else:
            return model
