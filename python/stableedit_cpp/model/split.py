"""Weights that are split over processes by their columns: row-parallel maps of transformers' tensor parallelism.

A map y = W h with W ``[v, k]`` that is row-parallel adds up what every process makes of its own columns of W and its
own part of h. So each holds a part of every key h and the whole value gradient. The parts of the keys, n x k numbers a
turn, are handed around, beside which a weight, v x k, is large; every process then solves for the same update L R, with
L ``[v, n]`` and R ``[n, k]``, and adds L times its own columns of R to what it holds. No process ever holds a whole
weight, and past keys, statistics and the step are those of one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.errors import RankLost
from stableedit_cpp.files.digest import checksum
from stableedit_cpp.model.ranks import Ranks

__all__ = [
    "Columns",
    "columns_of",
    "held",
    "is_split",
    "join_keys",
    "put",
    "refuse_split",
    "who_is_lost",
    "whole",
    "why_not_split",
]


@dataclass(frozen=True)
class Columns:
    """The columns ``begin`` to ``end`` of a weight ``[v, k]``, which this process holds; the others of ``group`` hold
    the rest, in the order of their ranks."""

    begin: int
    end: int
    group: dist.ProcessGroup

    def of(self, update: LowRankUpdate) -> LowRankUpdate:
        """An update of the whole weight, of these columns."""
        return LowRankUpdate(update.left, update.right[:, self.begin : self.end].contiguous())


class Map(Protocol):
    """What of an ``EditModule`` matters here."""

    name: str

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def columns(self) -> Columns | None: ...


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor that may be split, sharing its memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def is_split(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be split, joined: all processes have to ask."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Write a whole value into a tensor that may be split; each process writes what it holds."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device_mesh.device_type)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    held(tensor).copy_(value)


def columns_of(weight: torch.Tensor) -> Columns | None:
    """The columns of a row-parallel weight that this process holds; None for a weight that is whole."""
    if not isinstance(weight, DTensor):
        return None
    mesh, size = weight.device_mesh, _most(weight)
    begin, end = (min((mesh.get_local_rank() + one) * size, weight.shape[1]) for one in (0, 1))
    return Columns(begin, end, mesh.get_group())


def _most(weight: DTensor) -> int:
    """Columns of each process, as torch.chunk cuts: the last processes may have fewer, or none."""
    return -(-weight.shape[1] // weight.device_mesh.size())


def why_not_split(module: nn.Module) -> str | None:
    """What keeps a map whose weight is split from being edited; None where nothing does."""
    weight = module.weight
    if not isinstance(weight, DTensor):
        return None
    placements = ", ".join(map(repr, weight.placements))
    if weight.device_mesh.ndim > 1:
        return (
            f"has a weight that is split over {weight.device_mesh.ndim} dimensions of processes ({placements}); load "
            'the model with tp_plan="auto" alone, over one'
        )
    if type(module) is nn.Linear and type(weight.placements[0]) is Shard and weight.placements[0].dim == 1:
        k, count = weight.shape[1], weight.device_mesh.size()
        if _most(weight) * (count - 1) < k:
            return None
        return f"has {k} columns, of which some of {count} processes have none; split the model over fewer"
    rows = isinstance(weight.placements[0], Shard) and weight.placements[0].dim == 0
    how = "is split by rows, as FSDP and column-parallel maps are," if rows else f"has the layout {placements}"
    return (
        f"has a weight that {how} over {weight.device_mesh.size()} processes; only row-parallel nn.Linear maps of "
        'tp_plan="auto" (Shard(dim=1)) can be edited where they lie, such as down_proj and o_proj'
    )


def refuse_split(modules: Sequence[Map], what: str) -> None:
    """
    Raises:
        ValueError: if a weight is split over processes; ``what`` is what needs it whole.
    """
    for module in modules:
        if module.columns is not None:
            raise ValueError(
                f"{what} needs whole weights, but that of {module.name} is split over "
                f"{dist.get_world_size(module.columns.group)} processes; save the model with model.save_pretrained, "
                "which joins one weight after the other, and load it in one process"
            )


def join_keys(
    modules: Sequence[Map], keys: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The whole keys ``[n, k]`` by module name, of each process's parts of them; others are handed through.

    Raises:
        RanksDiffer: where the value gradients of the processes, which all of them solve with, are not the same bits.
        RankLost: where a process has gone.
    """
    whole = dict(keys)
    parts: dict[dist.ProcessGroup, list[str]] = {}
    for module in modules:
        # A map that splits its input itself (rowwise_split_input) is handed whole keys.
        if module.columns is not None and keys[module.name].shape[1] < module.shape[0]:
            parts.setdefault(module.columns.group, []).append(module.name)
    for group, names in parts.items():
        together = Ranks(group)
        together.serve(keys[names[0]].device)
        seen = {f"value gradients at {name}": checksum(gradients[name]) for name in names}
        together.check_same(seen, "tensor parallelism takes processes on one kind of machine")
        found = together.gathered("joining keys", lambda names=names: [keys[name] for name in names])
        whole |= {name: torch.cat(pieces, 1) for name, pieces in zip(names, zip(*found, strict=True), strict=True)}
    return whole


@contextmanager
def who_is_lost(modules: Sequence[Map]) -> Iterator[None]:
    """What torch.distributed raises within this context, where the model itself exchanges tensors that are split, is
    said as RankLost; with the ``report`` of what was raised, if it has one."""
    try:
        yield
    except RuntimeError as error:
        split = any(module.columns is not None for module in modules)
        words = str(error).lower()
        if not split or isinstance(error, RankLost) or not any(word in words for word in ("gloo", "nccl", "timed out")):
            raise
        lost = RankLost(
            "a process that holds a part of the model has gone or did not answer in time; the turn in flight was "
            f"dropped, the turns before it stand in the memory of the others ({str(error).splitlines()[0]:.200})"
        )
        if hasattr(error, "report"):
            lost.report = error.report
        raise lost from error
