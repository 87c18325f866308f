"""Digests that say whether two models, or two files, are the same.

Fingerprints and checksums are for what is compared often: they only sum words, at the speed of the memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from stableedit_cpp.files.offloaded import present

__all__ = [
    "checksum",
    "file_digest",
    "fingerprint",
    "joint_digest",
    "model_digest",
    "tensor_digest",
    "tensor_digests",
    "tokenizer_digest",
]

_SIZE = 32  # bytes
_CHUNK = 1 << 20
_ROWS, _COLUMNS = 64, 509  # of words; a prime, so that equal rows of a matrix do not lie one below the other
_THREADS = 4  # on an accelerator, so many tensors are copied to the host at once


def model_digest(model: torch.nn.Module, exclude: Iterable[str] = ()) -> str:
    """BLAKE2b over the name, dtype, shape and bytes of every parameter and persistent buffer.

    The same for a model saved and loaded again in its dtype, on any device, offloaded by accelerate or not, and whether
    weights are tied or only equal.

    Args:
        exclude: names in the state dict to leave out, e.g. those of edited weights:
            ``[f"{module.name}.weight" for module in editor.modules]``.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: for an excluded name that the model does not have, or weights that are not in memory.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for name in exclude:
        if tensors.pop(name, None) is None:
            raise ValueError(f"exclude: the model has no parameter or buffer {name!r}")
    return joint_digest(tensors, lambda name: present(model, name, tensors[name]))


def tensor_digests(
    tensors: Mapping[str, torch.Tensor], fetch: Callable[[str], torch.Tensor] | None = None
) -> dict[str, str]:
    """``tensor_digest`` of each of some named tensors, in the order of the names; ``fetch`` gives one when it is its
    turn."""
    names, fetch = sorted(tensors), fetch or tensors.__getitem__
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib and copies to the host release the GIL
        return dict(zip(names, pool.map(lambda name: tensor_digest(fetch(name), name), names), strict=True))


def joint_digest(tensors: Mapping[str, torch.Tensor], fetch: Callable[[str], torch.Tensor] | None = None) -> str:
    """BLAKE2b over the names and ``tensor_digests`` of some tensors; 64 hexadecimal digits."""
    lines = "".join(f"{name} {digest}\n" for name, digest in tensor_digests(tensors, fetch).items())
    return hashlib.blake2b(lines.encode(), digest_size=_SIZE).hexdigest()


def tensor_digest(tensor: torch.Tensor, name: str = "the tensor") -> str:
    """BLAKE2b over dtype, shape and bytes of one tensor, wherever it is; 64 hexadecimal digits.

    Raises:
        ValueError: for a tensor without data (meta device); ``name`` is what to call it then.
    """
    if tensor.is_meta:
        raise ValueError(f"{name} is not in memory (meta device), so it has no digest; load it without offloading")
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=_SIZE)
    for part in _parts(tensor.detach()):
        digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors in one that only stands for them, as quantised weights of torchao do (PyTorch's protocol for
    wrapper subclasses)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


def fingerprint(tensor: torch.Tensor) -> bytes:
    """Depends on dtype, shape and every bit of a tensor, wherever it is, at a tenth of the cost of ``tensor_digest``.

    BLAKE2b with 16 bytes over dtype and shape, as there, and over sums of 64-bit words: in blocks of 64 rows of 509
    words, the sum of each column; then the rest of the bytes, each as a word. What differs shows unless it cancels in
    all of these sums; it is no protection against somebody who means to deceive.
    """
    bits = _bits(tensor)
    block = 8 * _ROWS * _COLUMNS
    whole = bits.numel() // block * block
    sums = bits[:whole].view(torch.int64).view(-1, _ROWS, _COLUMNS).sum(1).flatten()
    return _hashed(tensor, [sums, bits[whole:].long()])


def checksum(tensor: torch.Tensor) -> bytes:
    """``fingerprint``, but that one more block has the rows that are left, if any, and only what is no row is hashed as
    it is: a quarter of the cost for the weights of a small model. For what is compared while it is in memory; files
    have fingerprints.
    """
    bits = _bits(tensor)
    words = bits[: bits.numel() // 8 * 8].view(torch.int64)
    whole = words.numel() // (_ROWS * _COLUMNS) * _ROWS * _COLUMNS
    rows = words.numel() // _COLUMNS * _COLUMNS
    sums = words[:whole].view(-1, _ROWS, _COLUMNS).sum(1).flatten()
    last = words[whole:rows].view(-1, _COLUMNS).sum(0)
    return _hashed(tensor, [sums, last, words[rows:], bits[8 * words.numel() :].long()])


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes, ``[n]`` uint8, where they can be read in words."""
    bits = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return bits.clone() if bits.storage_offset() % 8 else bits  # a view into a larger tensor


def _hashed(tensor: torch.Tensor, words: Sequence[torch.Tensor]) -> bytes:
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode(), digest_size=16)
    digest.update(torch.cat(words).cpu().numpy())
    return digest.digest()


def tokenizer_digest(tokenizer) -> str:
    """BLAKE2b over everything that decides which ids a text gets; 64 hexadecimal digits.

    The same for a tokenizer saved and loaded again, whatever it padded or truncated meanwhile.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        definition = json.loads(backend.to_str())
        definition.pop("truncation", None)  # left behind by the last call that asked for it
        definition.pop("padding", None)
    else:
        definition = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    text = json.dumps([definition, special], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).hexdigest()


def file_digest(path: str | Path) -> str:
    """BLAKE2b over the bytes of a file; 64 hexadecimal digits (``b2sum -l 256`` prints the same).

    Raises:
        OSError: if the file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=_SIZE)
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
