"""GGUF files for llama.cpp: the whole edited model, or what editing added to it as a LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from stableedit_cpp.core import WeightChange
from stableedit_cpp.export.card import Card, write_card
from stableedit_cpp.export.change import ModelChange
from stableedit_cpp.export.llama_cpp.architectures import Architecture, architecture_of, hyperparameters, rope_factors
from stableedit_cpp.export.llama_cpp.vocabulary import write_vocabulary
from stableedit_cpp.export.provenance import Provenance
from stableedit_cpp.export.truncation import LowRankReport, truncate
from stableedit_cpp.files.atomic import new_directory
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.files.offloaded import present_state
from stableedit_cpp.model.packed import is_packed
from stableedit_cpp.model.packed_gguf import ends_as_in_gguf, gguf_maps

__all__ = ["ADAPTER_GGUF", "MODEL_GGUF", "check_exportable", "export_gguf", "export_gguf_lora", "write_gguf"]

MODEL_GGUF, ADAPTER_GGUF = "model.gguf", "adapter.gguf"
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_LOAD_MODEL = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{MODEL_GGUF}")
tokenizer = AutoTokenizer.from_pretrained(".", gguf_file="{MODEL_GGUF}")"""

_LOAD_PACKED = f"""\
from stableedit_cpp import load_model

model, tokenizer = load_model("{MODEL_GGUF}", keep_packed=True)  # transformers makes it dense"""


def export_gguf(
    model: torch.nn.Module,
    tokenizer,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> None:
    """Write model.gguf, with the tokenizer in it, and a model card: ``llama-server -m model.gguf``.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3 or Gemma 3 (text) of transformers. Maps that stayed in the blocks of a
            GGUF file (``load_model(..., keep_packed=True)``) are written in these, bit for bit; so are embedding and
            output layer, as long as that file is there.
        dtype: of the other matrices, float32, float16 or bfloat16; None takes that of the model. Vectors are float32.

    Raises:
        ValueError: for an architecture or tokenizer that is not known here; for weights that float16 cannot hold; if
            gguf is not installed, or the directory has content and ``overwrite`` is off.
        OSError: if it cannot be written; nothing is left behind then.
    """
    check_exportable(model.config)
    with new_directory(directory, overwrite=overwrite) as scratch:
        write_gguf(model, tokenizer, scratch, dtype, provenance or Provenance())


def write_gguf(
    model: torch.nn.Module, tokenizer, directory: Path, dtype: torch.dtype | None, provenance: Provenance
) -> None:
    """The same into a directory that is there."""
    architecture = check_exportable(model.config)
    blocks = {f"{name}.packed": module for name, module in gguf_maps(model).items()}
    others = (n for n, module in model.named_modules() if is_packed(module) and f"{n}.packed" not in blocks)
    if (other := next(others, None)) is not None:
        raise ValueError(
            f"{other} has quantised weights of another format, which is not written to GGUF; export an adapter "
            "(--format gguf-lora) for the model that was quantised, or edit that"
        )
    dtype = dtype or next(model.parameters()).dtype
    name = provenance.base_model or model.config.model_type
    writer = _Writer(architecture, name, provenance, dtype, packed=bool(blocks))
    for field, value in hyperparameters(model.config).items():
        getattr(writer.file, f"add_{field}")(value)
    write_vocabulary(writer.file, tokenizer, model.get_input_embeddings().weight.shape[0])
    factors = rope_factors(model.config)
    if factors is not None:
        writer.add("rope_freqs.weight", factors)
    names, ends = _Names(architecture, model.config), ends_as_in_gguf(model)
    for tensor_name, tensor in _own_tensors(model).items():
        if tensor_name in blocks:
            weight = f"{tensor_name.removesuffix('packed')}weight"
            rows = architecture.rows(tensor, weight, model.config)
            writer.add_blocks(names[weight], rows, blocks[tensor_name].kind)
        elif (end := ends.get(names[tensor_name])) is not None:
            writer.add_blocks(names[tensor_name], end.packed, end.kind)
        else:
            writer.add(names[tensor_name], architecture.converted(tensor, tensor_name, model.config))
    writer.write(directory / MODEL_GGUF)
    facts = {"edited_digest": model_digest(model), "dtype": _TYPES[dtype]}
    facts |= {"packed_maps": len(blocks)} if blocks else {}
    facts["bytes"] = (directory / MODEL_GGUF).stat().st_size
    smaller = (
        f"{len(blocks) + len(ends)} of its matrices are packed as they were in the file that was edited, all others "
        f"{_TYPES[dtype]}."
        if blocks
        else "`llama-quantize` makes it smaller."
    )
    summary = (
        f"The whole edited model with its tokenizer for llama.cpp, in `{MODEL_GGUF}`: `llama-server -m {MODEL_GGUF}`; "
        f"{smaller}"
    )
    write_card(directory, Card("gguf", summary, _LOAD_PACKED if blocks else _LOAD_MODEL, "gguf", facts), provenance)


def export_gguf_lora(
    change: ModelChange,
    directory: str | Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
    dtype: torch.dtype | None = None,
    provenance: Provenance | None = None,
    overwrite: bool = False,
) -> LowRankReport:
    """Write adapter.gguf, the nearest adapter of a rank, for ``llama-server -m base.gguf --lora adapter.gguf``.

    Args:
        rank, keep, dtype: as for ``export_lora``.

    Returns:
        What the adapter keeps of the changes.

    Raises:
        ValueError: as ``export_gguf`` and ``export_lora``; for the output layer of a model that has none of its own.
        OSError: if it cannot be written; nothing is left behind then.
    """
    change.check_linear("a LoRA adapter")
    change.check_no_experts("a LoRA adapter")
    if change.skeleton is None:
        raise ValueError("the model has no config, by which llama.cpp's names of its modules are found")
    config = change.skeleton().config
    architecture = check_exportable(config)
    dtype = dtype or getattr(torch, change.dtype)
    provenance = replace(provenance or Provenance(), base_digest=change.base_digest)
    modules, report = truncate(change.spectra, rank, keep, dtype)
    writer = _Writer(architecture, provenance.base_model or config.model_type, provenance, dtype, adapter=report.rank)
    for tensor_name, (left, right) in _factors(modules, architecture, config).items():
        writer.add(f"{tensor_name}.lora_a", right)
        writer.add(f"{tensor_name}.lora_b", left)
    with new_directory(directory, overwrite=overwrite) as scratch:
        writer.write(scratch / ADAPTER_GGUF)
        report = replace(report, bytes=(scratch / ADAPTER_GGUF).stat().st_size)
        summary = (
            f"A LoRA adapter of rank {report.rank} for llama.cpp, in `{ADAPTER_GGUF}`, the nearest to the edits: it "
            f"keeps {100 * report.kept_norm:.1f} % of the norm of what they added to the weights. `llama-server -m "
            f"base.gguf --lora {ADAPTER_GGUF}`, with the unedited model in base.gguf."
        )
        load = f'import gguf\n\nadapter = gguf.GGUFReader("{ADAPTER_GGUF}")  # llama.cpp applies it'
        write_card(scratch, Card("gguf-lora", summary, load, "gguf", report.to_dict()), provenance)
    return report


def check_exportable(config) -> Architecture:
    """Find out before hours of work what cannot be written.

    Raises:
        ValueError: for an architecture that is not known here, or if gguf is not installed.
    """
    if find_spec("gguf") is None:
        raise ValueError("a GGUF file is written with gguf; install it with: pip install gguf")
    return architecture_of(config)


class _Writer:
    """A GGUF file whose tensors are added one by one, and written at the end."""

    def __init__(
        self,
        architecture: Architecture,
        name: str,
        provenance: Provenance,
        dtype: torch.dtype,
        adapter: int | None = None,
        packed: bool = False,
    ) -> None:
        """
        Args:
            adapter: the rank of an adapter, which is its alpha as well; None for a whole model.
            packed: some tensors are in blocks of whatever kinds.
        """
        import gguf

        if dtype not in _TYPES:
            raise ValueError(f"a GGUF file holds float32, float16 or bfloat16 matrices, not {dtype}")
        self._kinds, self._dtype = gguf.GGMLQuantizationType, dtype
        self.file = gguf.GGUFWriter(path=None, arch=architecture.name)
        self.file.add_type(gguf.GGUFType.MODEL if adapter is None else gguf.GGUFType.ADAPTER)
        self.file.add_name(f"{Path(name).name}, edited with StableEdit")
        if adapter is not None:
            self.file.add_string(gguf.Keys.Adapter.TYPE, "lora")
            self.file.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter))
        mostly = "GUESSED" if packed else "ALL_F32" if dtype == torch.float32 else f"MOSTLY_{_TYPES[dtype]}"
        self.file.add_file_type(gguf.LlamaFileType[mostly])
        self.file.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if provenance.base_digest:
            self.file.add_string("stableedit.base_digest", provenance.base_digest)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """A matrix in the dtype of the file, a vector in float32."""
        dtype = self._dtype if tensor.ndim > 1 else torch.float32
        tensor = tensor.detach().cpu()
        rounded = tensor.to(dtype).contiguous()
        if dtype == torch.float16 and bool((rounded.isinf() & ~tensor.isinf()).any()):
            raise ValueError(f"{name} has values that float16 cannot hold; write bfloat16 or float32")
        if dtype == torch.bfloat16:  # numpy has none; the bytes are what is written
            self.file.add_tensor(name, rounded.view(torch.uint8).numpy(), raw_dtype=self._kinds.BF16)
        else:
            self.file.add_tensor(name, rounded.numpy())

    def add_blocks(self, name: str, packed: torch.Tensor, kind) -> None:
        """A matrix that is packed already, ``[v, bytes of a row]``."""
        self.file.add_tensor(name, packed.cpu().numpy(), raw_dtype=kind)

    def write(self, path: Path) -> None:
        self.file.write_header_to_file(path=path)
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()


def _own_tensors(model: torch.nn.Module) -> Mapping[str, torch.Tensor]:
    """The state dict, without an output layer that is the embedding."""
    tensors = present_state(model)
    inside, outside = model.get_input_embeddings(), model.get_output_embeddings()
    if outside is not None and outside.weight is inside.weight:
        return {name: tensors[name] for name in tensors if name != "lm_head.weight"}
    return tensors


class _Names:
    """llama.cpp's name of a tensor, by that in the state dict."""

    def __init__(self, architecture: Architecture, config) -> None:
        import gguf

        kind = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture.name)
        self._architecture = architecture
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def __getitem__(self, name: str) -> str:
        found = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(
                f"llama.cpp has no tensor for {name} in its architecture {self._architecture.name}; export a delta or "
                "the whole model (--format model)"
            )
        return found


def _factors(
    modules: Mapping[str, WeightChange], architecture: Architecture, config
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(left ``[v, r]``, right ``[r, k]``) by the name of the tensor in llama.cpp."""
    names, factors = _Names(architecture, config), {}
    for name, part in modules.items():
        if name == "lm_head" and config.tie_word_embeddings:
            raise ValueError("lm_head is the embedding of this model, which has no output layer of its own to adapt")
        found = names[f"{name}.weight"]
        left = architecture.rows(part.change.left, f"{name}.weight", config)
        factors[found] = (left, part.change.right)
    return factors
