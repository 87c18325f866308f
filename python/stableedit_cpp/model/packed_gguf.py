"""Linear maps of a GGUF file whose weights stay in the file's own blocks of 2 to 8 bits.

transformers makes every tensor of such a file dense when it loads it. Here the bytes take the place of the dense matrix
again, map by map, once they are seen to be the same numbers.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

__all__ = ["GGUFLinear", "as_packed", "ends_as_in_gguf", "gguf_maps", "pack_as_in_gguf"]

_ENDS = ("token_embd.weight", "output.weight")  # llama.cpp's names of the embedding and the output layer


class GGUFLinear(nn.Module):
    """y = W x + b with W in blocks of a GGUF file, which is made dense in every pass, and again in the backward pass.

    Attributes:
        packed: rows of W in blocks, ``[v, bytes of a row]`` uint8.
        kind: of the blocks, a ``gguf.GGMLQuantizationType``.
        through: the dtype in which blocks become numbers: float32, or what transformers took.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        kind,
        k: int,
        bias: torch.Tensor | None,
        through: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind, self.through = k, len(packed), kind, through
        self.register_buffer("packed", packed)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W, ``[v, k]``. Through float32 its numbers are those of ``gguf.dequantize``, rounded to the dtype."""
        from transformers.integrations.gguf.dequant import dequantize

        return dequantize(self.packed, int(self.kind), self.through).view(self.out_features, -1).to(dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind.name}"


class _Product(torch.autograd.Function):
    """x W^T + b, differentiated by x. Autograd by itself would keep the dense W of each map until the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, module: GGUFLinear) -> torch.Tensor:
        ctx.module = module
        return functional.linear(x, module.dense(x.dtype), module.bias)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return gradient @ ctx.module.dense(gradient.dtype), None


def gguf_maps(model: nn.Module) -> dict[str, GGUFLinear]:
    """Those of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, GGUFLinear)}


def as_packed(name: str | None) -> str:
    """What a message that a model is another one adds, if that may be for this: nothing for other files."""
    if not str(name).lower().endswith(".gguf"):
        return ""
    return " (with keep_packed, --keep-packed, the model in a .gguf file is another one than without)"


@torch.no_grad()
def pack_as_in_gguf(model: nn.Module, path: Path) -> None:
    """Put a ``GGUFLinear`` in place of each linear map whose weight a GGUF file has in blocks.

    A map proves itself: its dense weight, as transformers has read it, must be what the blocks give to the last bit;
    else it stays dense, and a warning counts these, with all that is packed in the file and no linear map here, such as
    experts. Embedding and output layer are dense, as in other quantised models.

    Args:
        model: loaded from that file, on the CPU.

    Raises:
        ValueError: for a transformers that cannot make blocks dense on any device.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    try:
        from transformers import GgufConfig
        from transformers.integrations.gguf.dequant import GGML_BLOCK
        from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
    except ImportError:
        raise ValueError(
            f"the maps of {path.name} stay packed by functions that this transformers does not have; install 5.23 or "
            "later"
        ) from None
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError:  # an architecture whose names transformers has elsewhere: its maps are left dense
        names = {}
    left = []
    for tensor in reader.tensors:
        if tensor.data.dtype != np.uint8 or tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            continue  # it is dense in the file
        if tensor.name in _ENDS:
            continue
        name, _, field = names.get(tensor.name, "").rpartition(".")
        module = model.get_submodule(name) if field == "weight" else None
        linear = None
        if type(module) is nn.Linear and tensor.tensor_type in GGML_BLOCK:
            rows = _rows(processor, tensor.name, *module.weight.shape)
            linear = _same(module, tensor.data[rows], tensor.tensor_type)
        if linear is None:
            left.append(f"{name or tensor.name} ({tensor.tensor_type.name})")
        else:
            model.set_submodule(name, linear)
    if gguf_maps(model):
        model.hf_quantizer = GgufHfQuantizer(GgufConfig())  # by which save_pretrained refuses what nothing could load
    if left:
        warnings.warn(
            f"{len(left)} of the packed maps of {path.name} are made dense, since their blocks or layers are not known "
            f"here: {left[0]}{', ...' if len(left) > 1 else ''}",
            stacklevel=2,
        )


@torch.no_grad()
def ends_as_in_gguf(model: nn.Module) -> dict[str, GGUFLinear]:
    """Embedding and output layer of a packed model in the blocks of the file that it was loaded from, by llama.cpp's
    names: where that file is still there, and they are what it says."""
    path = Path(str(model.config._name_or_path))
    if not gguf_maps(model) or path.suffix.lower() != ".gguf" or not path.is_file():
        return {}
    import gguf
    from transformers.integrations.gguf.dequant import GGML_BLOCK

    modules = dict(zip(_ENDS, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True))
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        module = modules.get(tensor.name)
        if module is not None and tensor.tensor_type in GGML_BLOCK:
            found[tensor.name] = _same(module, np.array(tensor.data), tensor.tensor_type)
    return {name: linear for name, linear in found.items() if linear is not None}


def _same(module: nn.Linear | nn.Embedding, packed: np.ndarray, kind) -> GGUFLinear | None:
    """A linear map in blocks that has the numbers of a dense one; None where the blocks give others."""
    weight, bias = module.weight, getattr(module, "bias", None)
    for through in dict.fromkeys((torch.float32, weight.dtype)):
        linear = GGUFLinear(torch.from_numpy(packed), kind, weight.shape[1], bias, through).train(module.training)
        if linear.out_features == len(weight) and torch.equal(linear.dense(weight.dtype), weight.cpu()):
            return linear
    return None


def _rows(processor, name: str, v: int, k: int) -> np.ndarray:
    """Which row of a file's tensor transformers has at each place: it is given their numbers in place of weights."""
    numbers = np.broadcast_to(np.arange(v, dtype=np.float32)[:, None], (v, k))
    return processor.process(numbers, name, tensor_key_mapping={}, parsed_parameters={}).weights[:, 0].astype(int)
