"""What processes hand each other: objects with tensors in them, of any size, by collectives of torch.distributed."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["all_gather", "broadcast", "carrier", "first_carrier"]

_PLACE = 64  # bytes; each tensor begins at a multiple of them, whatever its dtype


def carrier(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """Where tensors wait to be sent: on the device of the model, or in host memory where the group's backend is gloo.

    Raises:
        ValueError: where the group has no backend for that device.
    """
    backends = _backends(group)
    if device.type not in backends:
        raise ValueError(
            f"the process group ({dist.get_backend(group)}) moves tensors of {', '.join(backends)} alone, but the "
            f"model is on {device}; init_process_group with 'gloo', or with 'cpu:gloo,cuda:nccl' for GPUs"
        )
    return torch.device("cpu") if backends[device.type] == "gloo" else device


def first_carrier(group: dist.ProcessGroup) -> torch.device:
    """Where they wait before any model is known: in host memory, where the group can."""
    backends = _backends(group)
    return torch.device("cpu" if "cpu" in backends else next(iter(backends)))


def _backends(group: dist.ProcessGroup) -> dict[str, str]:
    """By type of device."""
    return dict(part.split(":") for part in dist.get_backend_config(group).split(","))


def all_gather(
    content: object, header: list[int], group: dist.ProcessGroup, device: torch.device, home: torch.device
) -> list[Any]:
    """What every process hands in, in the order of their ranks: pairs of its header and its content.

    The tensors in a content arrive with their bits: on ``home`` where the owner's were on an accelerator, else in host
    memory.

    Args:
        header: whole numbers, as many of them in every process.
        device: of ``carrier``. home: the device of this process's model.
    """
    with torch.inference_mode(False), torch.no_grad():
        payload = _pack(content, device)
        mine = torch.tensor([len(payload), *header], dtype=torch.int64, device=device)
        headers = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(headers, mine, group=group)
        headers = [one.tolist() for one in headers]
        most = max(size for size, *_ in headers)
        padded = torch.zeros(most, dtype=torch.uint8, device=device)
        padded[: len(payload)] = payload
        payloads = [torch.empty_like(padded) for _ in headers]
        dist.all_gather(payloads, padded, group=group)
        return [(rest, _unpack(part[:size], home)) for (size, *rest), part in zip(headers, payloads, strict=True)]


def broadcast(
    content: object, header: list[int], group: dist.ProcessGroup, device: torch.device, home: torch.device
) -> tuple[list[int], Any]:
    """(header, content) of rank 0, as ``all_gather`` hands them over; what others give is not looked at."""
    with torch.inference_mode(False), torch.no_grad():
        lead = group.rank() == 0
        payload = _pack(content, device) if lead else None
        numbers = torch.tensor([len(payload) if lead else 0, *header], dtype=torch.int64, device=device)
        dist.broadcast(numbers, group=group, group_src=0)
        size, *header = numbers.tolist()
        payload = payload if lead else torch.empty(size, dtype=torch.uint8, device=device)
        dist.broadcast(payload, group=group, group_src=0)
        return header, content if lead else _unpack(payload, home)


def _pack(content: object, device: torch.device) -> torch.Tensor:
    """As bytes, ``[size]`` uint8: the length of the pickle, the pickle without its tensors, and these."""
    tensors: list[torch.Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if not isinstance(obj, torch.Tensor):
                return None
            turned = obj.ndim == 2 and not obj.is_contiguous() and obj.t().is_contiguous()
            tensors.append(obj.detach().t() if turned else obj.detach())
            return obj.dtype, tuple(tensors[-1].shape), turned, obj.device.type != "cpu"

    stream = io.BytesIO()
    stream.write(bytes(8))
    Pickler(stream).dump(content)
    whole = bytearray(stream.getbuffer())
    whole[:8] = len(whole).to_bytes(8, "little")
    parts = [torch.frombuffer(whole, dtype=torch.uint8).to(device)]
    parts += [tensor.to(device).contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat([piece for part in parts for piece in (part, part.new_zeros(-len(part) % _PLACE))])


def _unpack(payload: torch.Tensor, home: torch.device) -> Any:
    size = int.from_bytes(bytes(payload[:8].tolist()), "little")
    place = size + -size % _PLACE

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, found: tuple) -> torch.Tensor:
            nonlocal place
            dtype, shape, turned, accelerated = found
            count = torch.Size(shape).numel() * dtype.itemsize
            part, place = payload[place : place + count], place + count + -count % _PLACE
            # Memory of its own, laid out as it was: what is computed with it may depend on that in the last digit.
            tensor = part.clone().view(dtype).reshape(shape)
            tensor = tensor.t() if turned else tensor
            return tensor.to(home if accelerated else "cpu")

    stream = io.BytesIO(payload[8:size].cpu().numpy().tobytes())
    return Unpickler(stream).load()
