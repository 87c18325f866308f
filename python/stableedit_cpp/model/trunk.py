"""Keeps the output of the frozen trunk: the layers below the first edited module, which no edit changes.

Evaluation, retries and audits run the same prompts again and again; with the trunk's output at hand only the layers
above it are computed.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from stableedit_cpp.model.linears import replaced_forward
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.tokens import Batch, TokenSequence, pack

__all__ = ["TrunkCache", "pack_apart"]


class TrunkCache:
    """Trunk output of prompts, by their token ids.

    Works for any model whose edited modules sit in one ``nn.ModuleList`` of layers that pass hidden states on as their
    first argument, which all decoder-only architectures of transformers do: the skipped layers hand their input
    through and the first layer above the trunk receives the kept states.

    Args:
        model: the model that is edited; the cache is good for this model only.
        modules: its edited modules (``editor.modules``).
        dtype: of the kept states; None keeps the model's own, with which scores are exactly those without a cache.
        directory: keep the states in a memory-mapped file there, instead of in memory; the file is removed with the
            cache.
        max_bytes: limit of the kept states; once it is reached, further prompts are computed in full.

    Raises:
        ValueError: if the modules lie in no list of layers, or below nothing that could be kept.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[EditModule],
        *,
        dtype: torch.dtype | None = None,
        directory: str | Path | None = None,
        max_bytes: int = 4 * 2**30,
    ) -> None:
        self._model = model
        self._layers, self._depth = _trunk(model, modules)
        self._dtype = dtype
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._as_tuple: int | None = None  # length of the tuple that a layer returns; None for a plain tensor
        self._fingerprint: bytes | None = None
        self.max_bytes = max_bytes
        self.bytes = 0
        self._file = None
        if directory is not None:
            try:
                self._file = tempfile.TemporaryFile(dir=directory, prefix="trunk-cache-")  # noqa: SIM115 lives with us
                self._file.truncate(max_bytes)
                self._buffer = mmap.mmap(self._file.fileno(), max_bytes)
            except (OSError, ValueError) as error:
                raise ValueError(f"cannot keep a trunk cache of {max_bytes} bytes in {directory}: {error}") from None

    @classmethod
    def where_possible(cls, model: nn.Module, modules: Sequence[EditModule], **options: object) -> TrunkCache | None:
        """A cache in memory, or None where nothing lies below the edited modules that could be kept."""
        try:
            return cls(model, modules, **options)
        except ValueError:
            return None

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, sequence: TokenSequence) -> bool:
        return sequence.ids in self._states

    def clear(self) -> None:
        """Forget everything, e.g. after the trunk was changed on purpose."""
        self._states.clear()
        self.bytes = 0
        self._fingerprint = None

    def check(self) -> None:
        """Make sure that the trunk is the one the states were computed with; call before a series of uses.

        Raises:
            ValueError: if its weights have changed.
        """
        fingerprint = self._weights_fingerprint()
        if self._fingerprint is None or not self._states:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            raise ValueError(
                f"weights outside the layers from {self._depth} on have changed since the trunk cache was filled; "
                "clear() it first"
            )

    def split(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        """Indices of the sequences that are kept and of those that are not, without empty groups."""
        kept = [index for index, sequence in enumerate(sequences) if sequence in self]
        rest = [index for index, sequence in enumerate(sequences) if sequence not in self]
        return [group for group in (kept, rest) if group]

    @contextmanager
    def attached(self, sequences: Sequence[TokenSequence], batch: Batch) -> Iterator[None]:
        """Within this context a forward pass of ``batch`` skips the trunk if all of its sequences are kept, and keeps
        them otherwise."""
        with ExitStack() as stack:
            if all(sequence in self for sequence in sequences):
                for layer in self._layers[: self._depth]:
                    stack.enter_context(replaced_forward(layer, self._pass_through))
                states = self._assemble(sequences, batch)
                hook = self._layers[self._depth].register_forward_pre_hook(
                    lambda _module, args, kwargs: _with_states(args, kwargs, states), with_kwargs=True
                )
            else:
                hook = self._layers[self._depth - 1].register_forward_hook(
                    lambda _module, _args, output: self._keep(output, sequences)
                )
            stack.callback(hook.remove)
            yield

    def _pass_through(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object):
        return hidden_states if self._as_tuple is None else (hidden_states, *[None] * (self._as_tuple - 1))

    def _keep(self, output: torch.Tensor | tuple, sequences: Sequence[TokenSequence]) -> None:
        self._as_tuple = len(output) if isinstance(output, tuple) else None
        states = output[0] if isinstance(output, tuple) else output
        for row, sequence in enumerate(sequences):
            if sequence in self:
                continue
            state = states[row, : len(sequence)].detach().to("cpu", self._dtype or states.dtype)
            size = state.numel() * state.element_size()
            if size > self.max_bytes:
                raise ValueError(
                    f"a trunk cache of {self.max_bytes} bytes cannot hold one prompt of {len(sequence)} tokens "
                    f"({size} bytes); raise max_bytes"
                )
            if self.bytes + size > self.max_bytes:
                return
            self._states[sequence.ids] = self._store(state)
            self.bytes += size

    def _store(self, state: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(False):  # what an evaluation keeps shall also serve a capture, which differentiates
            if self._file is None:
                kept = torch.empty_like(state)
            else:
                kept = torch.frombuffer(self._buffer, dtype=state.dtype, count=state.numel(), offset=self.bytes)
            return kept.view(state.shape).copy_(state)

    def _assemble(self, sequences: Sequence[TokenSequence], batch: Batch) -> torch.Tensor:
        first = self._states[sequences[0].ids]
        width = batch.input_ids.shape[1]
        weight = next(self._layers[self._depth].parameters())
        states = torch.zeros(len(sequences), width, first.shape[1], dtype=first.dtype)
        for row, sequence in enumerate(sequences):
            states[row, : len(sequence)] = self._states[sequence.ids]
        return states.to(weight.device, weight.dtype)

    def _weights_fingerprint(self) -> bytes:
        """Depends on every weight outside the layers that edits may change, embeddings of positions included, at the
        cost of reading them once."""
        above = {id(p) for layer in self._layers[self._depth :] for p in layer.parameters()}
        digest = hashlib.blake2b(digest_size=16)
        for parameter in self._model.parameters():
            if id(parameter) not in above:
                bits = parameter.detach().contiguous().view(torch.uint8).view(-1)
                digest.update(_sums(bits).cpu().numpy().tobytes())
        return digest.digest()


def pack_apart(sequences: Sequence[TokenSequence], max_tokens: int, trunk: TrunkCache | None) -> list[list[int]]:
    """Batches of indices as ``pack`` makes them; what the trunk cache holds and what it does not are not mixed.

    Raises:
        ValueError: if the trunk's weights have changed.
    """
    if trunk is None:
        return pack(sequences, max_tokens)
    trunk.check()
    batches = []
    for group in trunk.split(sequences):
        batches += [[group[i] for i in batch] for batch in pack([sequences[i] for i in group], max_tokens)]
    return batches


def _sums(bits: torch.Tensor) -> torch.Tensor:
    """Column sums of the bytes laid out in rows of words: any changed weight, and nearly any exchange of two, changes
    one. 64-bit words, because their sum runs at the speed of the memory."""
    width = 4093 * 8
    whole = bits.numel() // width * width
    rows = bits[:whole].view(torch.int64).view(-1, width // 8).sum(0)
    return torch.cat([rows, bits[whole:].long()])


def _trunk(model: nn.Module, modules: Sequence[EditModule]) -> tuple[nn.ModuleList, int]:
    """The list of layers and how many of them lie below the first edited module."""
    found: set[tuple[str, int]] = set()
    for module in modules:
        parts = module.name.split(".")
        for end, part in enumerate(parts):
            parent = ".".join(parts[:end])
            if part.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList):
                found.add((parent, int(part)))
                break
        else:
            raise ValueError(f"{module.name} lies in no list of layers, so there is no frozen trunk to keep")
    if len({parent for parent, _ in found}) != 1:
        raise ValueError("the edited modules lie in several lists of layers, so there is no one frozen trunk to keep")
    parent = next(iter(found))[0]
    depth = min(index for _, index in found)
    if depth == 0:
        raise ValueError("the first layer is edited, so there is no frozen trunk to keep")
    return model.get_submodule(parent), depth


def _with_states(args: tuple, kwargs: dict, states: torch.Tensor) -> tuple[tuple, dict]:
    if args:
        return (states, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": states}
