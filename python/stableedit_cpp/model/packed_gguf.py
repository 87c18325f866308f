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

__all__ = ["GGUFLinear", "gguf_maps", "pack_as_in_gguf"]


class GGUFLinear(nn.Module):
    """y = W x + b with W in blocks of a GGUF file, which is made dense in every pass, and again in the backward pass.

    Attributes:
        packed: rows of W in blocks, ``[v, bytes of a row]`` uint8.
        kind: of the blocks, a ``gguf.GGMLQuantizationType``.
    """

    def __init__(self, packed: torch.Tensor, kind, k: int, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kind = k, len(packed), kind
        self.register_buffer("packed", packed)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W, ``[v, k]``; its numbers are those that ``gguf.dequantize`` gives, rounded to the dtype."""
        from transformers.integrations.gguf.dequant import dequantize

        return dequantize(self.packed, int(self.kind), torch.float32).view(self.out_features, -1).to(dtype)

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


@torch.no_grad()
def pack_as_in_gguf(model: nn.Module, path: Path) -> None:
    """Put a ``GGUFLinear`` in place of each linear map whose weight a GGUF file has in blocks.

    A map proves itself: its dense weight, as transformers has read it, must be what the blocks give to the last bit;
    else it stays dense, and a warning counts these. Embedding and output layer are dense, as in other quantised models.

    Args:
        model: loaded from that file, on the CPU.

    Raises:
        ValueError: for a transformers that cannot make blocks dense on any device.
    """
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    try:
        from transformers.integrations.gguf.dequant import GGML_BLOCK
    except ImportError:
        raise ValueError(
            f"the maps of {path.name} stay packed by functions that this transformers does not have; install 5.23 or "
            "later"
        ) from None
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    head, left = model.get_output_embeddings(), []
    for tensor in reader.tensors:
        if tensor.data.dtype != np.uint8 or tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            continue  # it is dense in the file
        name, _, field = names.get(tensor.name, "").rpartition(".")
        module = model.get_submodule(name) if field == "weight" else None
        if type(module) is not nn.Linear or module is head:
            continue
        if tensor.tensor_type in GGML_BLOCK:
            packed = torch.from_numpy(tensor.data[_rows(processor, tensor.name, len(tensor.data))])
            linear = GGUFLinear(packed, tensor.tensor_type, module.in_features, module.bias).train(module.training)
            if torch.equal(linear.dense(module.weight.dtype), module.weight):
                model.set_submodule(name, linear)
                continue
        left.append(f"{name} ({tensor.tensor_type.name})")
    if left:
        warnings.warn(
            f"{len(left)} of the packed maps of {path.name} are made dense, since their blocks are not known here: "
            f"{left[0]}{', ...' if len(left) > 1 else ''}",
            stacklevel=2,
        )


def _rows(processor, name: str, count: int) -> np.ndarray:
    """Which row of a file's tensor transformers has at each place: it is given their numbers in place of weights."""
    numbers = np.arange(count, dtype=np.float32)[:, None]
    return processor.process(numbers, name, tensor_key_mapping={}, parsed_parameters={}).weights[:, 0].astype(int)
