"""What llama.cpp calls the models that it knows, their sizes and their tensors, and where its weights differ from those
of transformers. The names of tensors are gguf's own; what is not known here is refused, not guessed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["Architecture", "architecture_of", "hyperparameters", "rope_factors"]

_CONVERTER = (
    "llama.cpp's own converter may know it: write the whole model (--format model) and run convert_hf_to_gguf.py on "
    "that directory"
)


@dataclass(frozen=True)
class Architecture:
    """A family of models in llama.cpp.

    Attributes:
        name: there, e.g. "llama".
        activation: of the MLP, which a file cannot say.
        interleaved: rotary positions turn neighbouring rows of queries and keys, where transformers turns the halves
            of a head.
        norm_offset: what the scales of its norms have more than those of transformers.
    """

    name: str
    activation: str
    interleaved: bool = False
    norm_offset: float = 0.0

    def rows(self, weight: torch.Tensor, name: str, config) -> torch.Tensor:
        """A tensor of transformers, or the left factor of a change of one, with its rows in llama.cpp's order.

        Args:
            weight: ``[v, ...]``. name: of the tensor in the state dict.
        """
        part = name.split(".")[-2]
        if not self.interleaved or part not in ("q_proj", "k_proj"):
            return weight
        heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return halves.transpose(1, 2).reshape(weight.shape).contiguous()

    def converted(self, weight: torch.Tensor, name: str, config) -> torch.Tensor:
        """A tensor of transformers as llama.cpp wants it, in its dtype; scales of norms in float32."""
        if name.endswith("norm.weight"):
            return weight.float() + self.norm_offset
        return self.rows(weight, name, config)


# By the model_type of the config.
_KNOWN = {
    "llama": Architecture("llama", "silu", interleaved=True),
    "mistral": Architecture("llama", "silu", interleaved=True),
    "qwen2": Architecture("qwen2", "silu"),
    "qwen3": Architecture("qwen3", "silu"),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", norm_offset=1.0),
}


def architecture_of(config) -> Architecture:
    """How llama.cpp knows a model of transformers.

    Raises:
        ValueError: for an architecture, or a variant of one, that is not known here.
    """
    kind = getattr(config, "model_type", None)
    if kind not in _KNOWN:
        known = ", ".join(sorted(_KNOWN))
        raise ValueError(f"GGUF files are written of {known}, and this model is a {kind}; {_CONVERTER}")
    found = _KNOWN[kind]
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    unusual = {
        f"an activation {activation!r}": activation != found.activation,
        "a sliding window": kind != "gemma3_text" and _slides(config),
        "rotary positions on a part of each head": any(
            rope.get("partial_rotary_factor", 1.0) != 1.0 for rope in _ropes(config)
        ),
        "layers with a window in an order of its own": kind == "gemma3_text" and not _every_sixth_is_full(config),
        "attention scores on a scale of its own": kind == "gemma3_text" and not _usual_scale(config),
    }
    for what, is_so in unusual.items():
        if is_so:
            raise ValueError(f"this {kind} has {what}, which is not known here; {_CONVERTER}")
    return found


def hyperparameters(config) -> dict[str, object]:
    """What a file says of a model, by the names of gguf's writer (``add_...``).

    Raises:
        ValueError: for a scaling of rotary positions that is not known here.
    """
    head = _head_dim(config)
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "key_length": head,
        "value_length": head,
        "vocab_size": config.vocab_size,
        "rope_dimension_count": head,
    }
    ropes = _ropes(config)
    values["rope_freq_base"] = ropes[0].get("rope_theta", 10000.0)
    if config.model_type == "gemma3_text":
        values["sliding_window"] = config.sliding_window
        values["rope_freq_base_swa"] = ropes[-1].get("rope_theta", 10000.0)
        if getattr(config, "final_logit_softcapping", None):
            values["final_logit_softcapping"] = config.final_logit_softcapping
    return values | _scaling(ropes[0], config.model_type)


def rope_factors(config) -> torch.Tensor | None:
    """By how much Llama 3 slows each of its rotary frequencies down, ``[d / 2]`` float32 for heads of size d; None for
    other models. The factors are those of ``transformers.modeling_rope_utils``, of which a file holds the quotient."""
    if _ropes(config)[0].get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    slowed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = _head_dim(config)
    steps = torch.arange(0, head, 2, dtype=torch.float32, device="cpu") / head
    return 1.0 / (_ropes(config)[0]["rope_theta"] ** steps) / slowed


def _scaling(rope: Mapping[str, object], kind: str) -> dict[str, object]:
    from gguf import RopeScalingType

    how = rope.get("rope_type", "default")
    if how in ("default", "llama3"):
        return {}
    if how == "linear":
        return {"rope_scaling_type": RopeScalingType.LINEAR, "rope_scaling_factor": rope["factor"]}
    if how == "yarn":
        given = {
            "rope_scaling_type": RopeScalingType.YARN,
            "rope_scaling_factor": rope["factor"],
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
            "rope_scaling_yarn_attn_factor": rope.get("attention_factor"),
            "rope_scaling_yarn_beta_fast": rope.get("beta_fast"),
            "rope_scaling_yarn_beta_slow": rope.get("beta_slow"),
        }
        return {name: value for name, value in given.items() if value is not None}
    raise ValueError(f"this {kind} scales its rotary positions by {how!r}, which is not known here; {_CONVERTER}")


def _ropes(config) -> list[Mapping[str, object]]:
    """Parameters of the rotary positions: of layers that see everything first, then of those with a window."""
    rope = config.rope_parameters or {}
    if "full_attention" in rope:
        return [rope["full_attention"], rope["sliding_attention"]]
    return [rope]


def _head_dim(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _slides(config) -> bool:
    window = getattr(config, "sliding_window", None)
    return getattr(config, "use_sliding_window", True) and bool(window) and window < config.max_position_embeddings


def _every_sixth_is_full(config) -> bool:
    kinds = [kind == "full_attention" for kind in config.layer_types]
    return kinds == [layer % 6 == 5 for layer in range(config.num_hidden_layers)]


def _usual_scale(config) -> bool:
    """llama.cpp divides by the root of the size of a head; with 62 layers by that of a head's share of the width."""
    whole = config.num_hidden_layers == 62
    return config.query_pre_attn_scalar == (
        config.hidden_size // config.num_attention_heads if whole else _head_dim(config)
    )
