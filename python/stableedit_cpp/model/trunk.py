"""Keeps the output of the frozen trunk: the layers below the first edited module, which no edit changes.

Evaluation, retries and audits run the same prompts again and again; with the trunk's output at hand only the layers
above it are computed.
"""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from stableedit_cpp.files.digest import checksum
from stableedit_cpp.files.offloaded import Offloaded
from stableedit_cpp.model.attached import forward_hook, forward_pre_hook, replaced_forward
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.split import held
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate, pack
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["TrunkCache", "layers_of", "pack_apart", "trusted"]

_PROOF_TOKENS = 8


class TrunkCache:
    """Trunk output of prompts, by their token ids.

    The skipped layers hand their input through and the first layer above the trunk receives the kept states. That is
    right for a model whose edited modules sit in one ``nn.ModuleList`` of layers that hand on ``[batch, length, d]`` as
    their first argument and nothing else, as nearly all decoder-only models do. No model is taken at its word: before
    the first use a small batch runs with and without the cache, and if the logits are not equal, bit for bit, the cache
    stands aside: it keeps nothing, and everything is computed in full.

    Args:
        model: the model that is edited; the cache is good for this model only.
        modules: its edited modules (``editor.modules``).
        max_bytes: limit of the kept states; once it is reached, further prompts are computed in full.

    Attributes:
        objection: why the cache stands aside; None while it does not.
        bytes: of the kept states, in host memory.
        vouched: inside ``trusted``, whether the weights were read since it began; None outside.
        read: inside ``trusted``, what was read there of the weights outside the layers from each depth on, also for
            other caches of the same model; None outside.

    Raises:
        ValueError: if the modules lie in no list of layers, or below nothing that could be kept.
    """

    def __init__(self, model: nn.Module, modules: Sequence[EditModule], *, max_bytes: int = 4 * 2**30) -> None:
        self._model = model
        self._layers, self._depth = _trunk(model, modules)
        self._states: dict[tuple[int, ...], torch.Tensor] = {}
        self._as_tuple: int | None = None  # length of the tuple that a layer returns; None for a plain tensor
        self._checksum: bytes | None = None
        self._proven = False
        self.vouched: bool | None = None
        self.read: dict[int, bytes] | None = None
        self.objection: str | None = None
        self.max_bytes = max_bytes
        self.bytes = 0

    @classmethod
    def where_possible(cls, model: nn.Module, modules: Sequence[EditModule], **options: object) -> TrunkCache | None:
        """A cache, or None where nothing lies below the edited modules that could be kept."""
        try:
            return cls(model, modules, **options)
        except ValueError:
            return None

    @property
    def depth(self) -> int:
        """How many layers lie below the first edited module."""
        return self._depth

    @property
    def in_use(self) -> bool:
        """Whether it keeps and reuses anything: it has been checked, and does not stand aside."""
        return self._proven

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, sequence: TokenSequence) -> bool:
        return sequence.ids in self._states

    def emptied(self) -> TrunkCache:
        """One like it that holds nothing, as much as it likes."""
        empty = copy.copy(self)
        empty._states, empty.bytes, empty.max_bytes = {}, 0, sys.maxsize
        return empty

    def states(self, sequences: Sequence[TokenSequence]) -> dict[tuple[int, ...], torch.Tensor]:
        """What is kept of these, by token ids: for the caches of other processes."""
        return {one.ids: self._states[one.ids] for one in sequences if one in self}

    def take(self, parts: Sequence[dict[tuple[int, ...], torch.Tensor]]) -> None:
        """Hold these ``states``, batch by batch in this order, as if every batch had run here; those of batches that
        did are among them."""
        for ids in {ids for part in parts for ids in part} & self._states.keys():
            state = self._states.pop(ids)
            self.bytes -= state.numel() * state.element_size()
        for part in parts:
            for ids, state in part.items():
                size = state.numel() * state.element_size()
                if ids not in self._states and self.bytes + size <= self.max_bytes:
                    self._states[ids] = state
                    self.bytes += size

    def clear(self) -> None:
        """Forget everything, e.g. after the trunk was changed on purpose."""
        self._states.clear()
        self.bytes = 0
        self._checksum = None
        self.vouched = None if self.vouched is None else False

    def renew(self) -> bool:
        """Forget everything if the weights that it was computed with have changed; returns whether they have."""
        changed = self.in_use and len(self) > 0 and self._weights_checksum() != self._checksum
        if changed:
            self.clear()
        return changed

    def check(self, sequences: Sequence[TokenSequence]) -> None:
        """Make sure that the cache may be used for these sequences; call before a series of uses.

        The first time the model is put to the proof. Every time the weights outside the layers that edits may change
        are read, to see that they are those the states were computed with.

        Raises:
            ValueError: if these weights have changed.
        """
        if self.objection is not None or self.vouched or not sequences:
            return
        try:
            present = self._weights_checksum()
            if not self._proven:
                self._prove(sequences[0])
                self._proven = True
        except Exception as error:  # whatever stands in the way, everything works in full
            self.objection = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._proven = False
            self.clear()
            return
        if self._states and present != self._checksum:
            raise ValueError(
                f"weights outside the layers from {self._depth} on have changed since the trunk cache was filled; "
                "clear() it first"
            )
        self._checksum = present
        self.vouched = None if self.vouched is None else True

    @contextmanager
    def attached(self, sequences: Sequence[TokenSequence], batch: Batch) -> Iterator[None]:
        """Within this context a forward pass of ``batch`` skips the trunk if all of its sequences are kept, and keeps
        them otherwise; before the first ``check``, or where the cache stands aside, it does neither."""
        with ExitStack() as stack:
            if self._proven:
                self._attach(stack, sequences, batch)
            yield

    def _attach(self, stack: ExitStack, sequences: Sequence[TokenSequence], batch: Batch) -> None:
        if all(sequence in self for sequence in sequences):
            for layer in self._layers[: self._depth]:
                stack.enter_context(replaced_forward(layer, self._pass_through))
            states = self._assemble(sequences, batch)
            stack.enter_context(forward_pre_hook(self._layers[self._depth], _handing_over(states)))
        else:
            keep = partial(self._keep, sequences=sequences, batch=batch)
            stack.enter_context(forward_hook(self._layers[self._depth - 1], keep))

    def _pass_through(self, hidden_states: torch.Tensor, *_args: object, **_kwargs: object):
        return hidden_states if self._as_tuple is None else (hidden_states, *[None] * (self._as_tuple - 1))

    def _keep(
        self,
        _layer: nn.Module,
        _args: tuple,
        output: torch.Tensor | tuple,
        *,
        sequences: Sequence[TokenSequence],
        batch: Batch,
    ) -> None:
        self._as_tuple = len(output) if isinstance(output, tuple) else None
        states = output[0] if isinstance(output, tuple) else output
        if states.ndim != 3 or states.shape[:2] != batch.input_ids.shape:
            raise ValueError(f"layers hand on {list(states.shape)} for tokens {list(batch.input_ids.shape)}")
        skipped = self._states.get(sequences[0].ids[: batch.skipped])
        if batch.skipped and skipped is None:  # for want of room
            return
        for row, sequence in enumerate(sequences):
            if sequence in self:
                continue
            state = states[row, : len(sequence) - batch.skipped]
            if batch.skipped:
                state = torch.cat([skipped.to(state.device), state])
            size = state.numel() * state.element_size()
            if size > self.max_bytes:
                raise ValueError(
                    f"a trunk cache of {self.max_bytes} bytes cannot hold one prompt of {len(sequence)} tokens "
                    f"({size} bytes); raise max_bytes"
                )
            if self.bytes + size > self.max_bytes:
                return
            with torch.inference_mode(False):  # what an evaluation keeps also serves a capture, which differentiates
                kept = torch.empty(state.shape, dtype=state.dtype, device="cpu")
                self._states[sequence.ids] = kept.copy_(state.detach())
            self.bytes += size

    def _assemble(self, sequences: Sequence[TokenSequence], batch: Batch) -> torch.Tensor:
        """``[batch, length, d]`` in host memory, in the dtype in which they were kept; zero where there is padding."""
        kept = [self._states[sequence.ids][batch.skipped :] for sequence in sequences]
        width = batch.input_ids.shape[1]
        states = torch.zeros(len(kept), width, kept[0].shape[1], dtype=kept[0].dtype, device="cpu")
        for row, state in enumerate(kept):
            states[row, : len(state)] = state
        return states

    def _prove(self, sequence: TokenSequence) -> None:
        """Run a small batch, made of tokens of the sequence, in full, while its states are kept, and from the kept
        states alone.

        Raises:
            ValueError: if the logits are not the same, or need not be in other batches; and whatever the model raises.
        """
        above = [name for layer in self._layers[self._depth :] for name, _ in layer.named_modules()]
        if any(name.rpartition(".")[2] == "experts" for name in above):
            raise ValueError(
                "a mixture of experts multiplies the tokens of an expert together, padding among them, so that the "
                "last bits depend on the padding's states, which are not kept"
            )
        ids = sequence.ids[:_PROOF_TOKENS]
        pair = [TokenSequence(part, part) for part in (ids, ids[: len(ids) // 2 + 1])]
        other = [TokenSequence(ids[::-1], ids[::-1])]
        limit, self.max_bytes = self.max_bytes, sys.maxsize
        try:
            with untouched(self._model), torch.no_grad():
                plain = self._logits(pair, cached=False)
                kept = self._logits(pair, cached=True)
                # What a layer may have left behind for those above it must not be that of the pair.
                self._logits(other, cached=False)
                reused = self._logits(pair, cached=True)
        finally:
            self.max_bytes = limit
            self.clear()
        if not plain.isfinite().all():
            raise ValueError("the model's logits are NaN or infinite")
        if not torch.equal(plain, kept) or not torch.equal(plain, reused):
            raise ValueError(f"from the states before layer {self._depth} alone the model computes other logits")

    def _logits(self, sequences: Sequence[TokenSequence], cached: bool) -> torch.Tensor:
        """At all tokens, ``[n, vocabulary]``."""
        batch = collate(sequences, input_device(self._model))
        with ExitStack() as stack:
            if cached:
                self._attach(stack, sequences, batch)
            logits = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        return logits.reshape(-1, logits.shape[-1])[batch.positions.to(logits.device)]

    def _weights_checksum(self) -> bytes:
        """Depends on every weight outside the layers that edits may change, embeddings of positions included, at the
        cost of reading them once; those that accelerate keeps on the disk are not read, their files are looked at.

        Raises:
            ValueError: for weights that are not in memory.
        """
        above = {id(p) for layer in self._layers[self._depth :] for p in layer.parameters()}
        if self.read is not None and self._depth in self.read:
            return self.read[self._depth]
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in self._model.named_parameters():
            if id(parameter) in above:
                continue
            offloaded = Offloaded.find(self._model, name)
            if parameter.is_meta and offloaded is None:
                raise ValueError(f"{name} is not in memory, so changes of it would go unseen")
            if offloaded is not None and offloaded.on_disk:
                digest.update(offloaded.stamp())
            else:
                digest.update(checksum(held(parameter) if offloaded is None else offloaded.read()))
        if self.read is not None:
            self.read[self._depth] = digest.digest()
        return digest.digest()


@contextmanager
def trusted(*caches: TrunkCache | None) -> Iterator[None]:
    """Within this context the caller vouches that no weights change but those that are edited: the others are read
    once, at the first ``check`` of a cache, and not before every use.

    Args:
        caches: of one model.
    """
    entered = [cache for cache in caches if cache is not None and cache.vouched is None]
    read: dict[int, bytes] = {}
    for cache in entered:
        cache.vouched, cache.read = False, read
    try:
        yield
    finally:
        for cache in entered:
            cache.vouched = cache.read = None


def pack_apart(
    sequences: Sequence[TokenSequence], max_tokens: int, trunk: TrunkCache | None, **how: object
) -> list[list[int]]:
    """Batches of indices as ``pack`` makes them, with ``how``; what the trunk cache holds and what it does not are not
    mixed."""
    if trunk is None:
        return pack(sequences, max_tokens, **how)
    kept = [index for index, sequence in enumerate(sequences) if sequence in trunk]
    rest = [index for index, sequence in enumerate(sequences) if sequence not in trunk]
    return [
        [group[i] for i in batch]
        for group in (kept, rest)
        for batch in pack([sequences[index] for index in group], max_tokens, **how)
    ]


def layers_of(model: nn.Module, modules: Sequence[EditModule]) -> tuple[str, list[int]]:
    """Name of the list of layers that modules lie in, and the number of each one's layer.

    Raises:
        ValueError: if they lie in no such list, or in several.
    """
    found: list[tuple[str, int]] = []
    for module in modules:
        parts = module.name.split(".")
        for end, part in enumerate(parts):
            parent = ".".join(parts[:end])
            if part.isdigit() and isinstance(model.get_submodule(parent), nn.ModuleList):
                found.append((parent, int(part)))
                break
        else:
            raise ValueError(f"{module.name} lies in no list of layers, so there is no frozen trunk to keep")
    if len({parent for parent, _ in found}) != 1:
        raise ValueError("the edited modules lie in several lists of layers, so there is no one frozen trunk to keep")
    return found[0][0], [index for _, index in found]


def _trunk(model: nn.Module, modules: Sequence[EditModule]) -> tuple[nn.ModuleList, int]:
    """The list of layers and how many of them lie below the first edited module."""
    parent, indices = layers_of(model, modules)
    depth = min(indices)
    if depth == 0:
        raise ValueError("the first layer is edited, so there is no frozen trunk to keep")
    return model.get_submodule(parent), depth


def _handing_over(states: torch.Tensor) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]:
    """A hook that puts the states in the place of the hidden states that a layer is called with, where those are."""

    def hook(_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (states.to(args[0].device), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": states.to(kwargs["hidden_states"].device)}

    return hook
