"""Where accelerate keeps the weights that it has offloaded, and how they are read and changed there.

Between two calls of an offloaded module its parameters are on the meta device. What they hold rests in host memory or
in a file, and accelerate fetches it to where the module runs, call by call.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

__all__ = ["Offloaded", "execution_device", "present", "present_state"]


class _File(dict):
    """An entry of accelerate's index: a file of ours, which goes when nobody knows of it any more."""

    def __init__(self, path: str, name: str, dtype: torch.dtype) -> None:
        super().__init__(safetensors_file=path, weight_name=name, dtype=str(dtype).removeprefix("torch."))
        weakref.finalize(self, Path(path).unlink, missing_ok=True)


class Offloaded:
    """One offloaded parameter or buffer, at rest.

    On the disk it is never written over: a change goes into a new file, whole or not at all, and accelerate's index in
    memory names that one from then on. The checkpoint, and a folder that a model was offloaded into, stay those of the
    unedited model. The file lies in that folder, else among the temporary ones, until nobody may go back to it.

    Attributes:
        device: where its module runs.
    """

    def __init__(self, device: torch.device, shelf: Mapping, key: str) -> None:
        """
        Args:
            shelf, key: accelerate's mapping of tensors, or of files that it reads, and the name in it.
        """
        self.device, self._shelf, self._key = device, shelf, key

    @classmethod
    def of(cls, module: nn.Module, name: str = "weight") -> Offloaded | None:
        """A parameter or buffer of a module that accelerate has put a hook on; None where it is in memory."""
        return cls._behind(module, name)

    @classmethod
    def find(cls, model: nn.Module, name: str) -> Offloaded | None:
        """The same by the name in the state dict, also where a block fetches the weights of all that is in it."""
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            found = cls._behind(model.get_submodule(".".join(parts[:end])), ".".join(parts[end:]))
            if found is not None:
                return found
        return None

    @classmethod
    def _behind(cls, module: nn.Module, key: str) -> Offloaded | None:
        for hook in _hooks(module):
            # Not whether the parameter is on the meta device: an interrupted call may have left it where it ran, and
            # the next one fetches it again.
            if not getattr(hook, "offload", False):
                continue
            shelf, name = getattr(hook, "weights_map", None), key
            while hasattr(shelf, "prefix"):  # a view of a larger one, by names that begin alike
                shelf, name = shelf.dataset, shelf.prefix + name
            if name in getattr(shelf, "state_dict", ()):  # in memory, which has precedence over files
                shelf = shelf.state_dict
            if name in getattr(shelf, "index", shelf or ()):
                return cls(_device(hook), shelf, name)
        return None

    @property
    def on_disk(self) -> bool:
        return hasattr(self._shelf, "index")

    @property
    def writable(self) -> bool:
        """Whether it rests where ``write`` can change it: accelerate takes any mapping."""
        return self.on_disk or isinstance(self._shelf, dict)

    @property
    def place(self) -> tuple:
        """What tells where it rests from other places."""
        if self.on_disk:
            return id(self._shelf), self._key
        tensor = self.read()
        return tensor.device, tensor.data_ptr()

    def shares_with(self, other: Offloaded) -> bool:
        """Whether both are one tensor in host memory; what was tied is written to the disk once for each name."""
        return not self.on_disk and not other.on_disk and self.place == other.place

    def read(self) -> torch.Tensor:
        """In host memory the tensor itself; from the disk a copy, where accelerate reads it to."""
        return self._shelf[self._key]

    def write(self, values: torch.Tensor) -> None:
        """Change it, to values of its dtype. On the disk the new file is whole before it counts.

        Raises:
            OSError: if it cannot be written; it is as it was then.
        """
        if not self.on_disk:
            there = self.read()
            if there.data_ptr() != values.data_ptr():
                there.detach().copy_(values)
            return
        number, path = tempfile.mkstemp(".safetensors", f"{self._key}-", self._shelf.save_folder)
        os.close(number)
        file = _File(path, self._key, values.dtype)  # from now on it goes by itself if something fails
        save_file({self._key: values.detach().to("cpu").contiguous()}, path)
        self._shelf.index[self._key] = file

    def kept(self) -> object:
        """What ``put_back`` goes back to: of a file the file, else a copy."""
        return self._shelf.index[self._key] if self.on_disk else self.read().detach().clone()

    def put_back(self, kept: object) -> None:
        """Go back, bit for bit; on the disk no room is needed for it."""
        if self.on_disk:
            self._shelf.index[self._key] = kept
        else:
            self.read().detach().copy_(kept)

    def stamp(self) -> bytes:
        """Of a file what tells its content from another without reading it: place, size and time."""
        entry = self._shelf.index[self._key]
        path = entry.get("safetensors_file") or os.path.join(self._shelf.save_folder, f"{self._key}.dat")
        found = os.stat(path)
        return repr((path, self._key, found.st_size, found.st_mtime_ns)).encode()


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate runs a module; None where it has no say in that."""
    found = [hook for hook in _hooks(module) if getattr(hook, "execution_device", None) is not None]
    return _device(found[-1]) if found else None


def present(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the state dict; one that is offloaded from where it rests."""
    if not tensor.is_meta:  # nor are all names in a state dict those of a module's tensors: libraries add some
        return tensor
    found = Offloaded.find(model, name)
    return tensor if found is None else found.read()


class _State(Mapping):
    """The state dict, each tensor of which is read when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._tensors = model, model.state_dict()

    def __getitem__(self, name: str) -> torch.Tensor:
        return present(self._model, name, self._tensors[name])

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def present_state(model: nn.Module) -> Mapping[str, torch.Tensor]:
    """The state dict, with what is offloaded read from where it rests when it is asked for."""
    return _State(model)


def _hooks(module: nn.Module) -> list:
    """Accelerate's, one or several in a row."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _device(hook) -> torch.device:
    device = getattr(hook, "execution_device", None)
    return torch.device("cpu" if device is None else device)
