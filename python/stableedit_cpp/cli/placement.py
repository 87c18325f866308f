"""Where a model is to lie: on one device, or spread by accelerate over several, host memory and disk."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from stableedit_cpp.cli.arguments.placement import AUTOMATIC

__all__ = ["default_device", "placement"]


def default_device(options: argparse.Namespace) -> str:
    """``--device``, or what it says without one."""
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def placement(options: argparse.Namespace) -> dict[str, object]:
    """What ``add_placement_options`` was given, as ``load_model`` has it.

    Raises:
        ValueError: for a map that is no file of that kind, a limit without a size, or one without a map; for a map
            where several processes share the work.
    """
    device_map = getattr(options, "device_map", None)
    packed = {"keep_packed": True} if getattr(options, "keep_packed", False) else {}
    if device_map is None:
        for name in ("max_memory", "offload_folder"):
            if getattr(options, name, None):
                raise ValueError(f"--{name.replace('_', '-')} says how --device-map spreads a model; give that as well")
        return {"device": default_device(options), **packed}
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "under torchrun each process has the whole model on a device of its own, and --device-map spreads one over "
            "all devices; leave one of the two out"
        )
    found: dict[str, object] = {
        "device_map": device_map if device_map in AUTOMATIC else _read_map(device_map),
        **packed,
    }
    if options.max_memory:
        found["max_memory"] = dict(_limit(text) for text in options.max_memory)
    if options.offload_folder:
        found["offload_folder"] = options.offload_folder
    return found


def _read_map(path: str) -> dict[str, str | int]:
    expected = f'expected {", ".join(AUTOMATIC)}, or a JSON file like {{"model.layers.0": 0, "lm_head": "cpu"}}'
    if not Path(path).is_file():
        raise ValueError(f"--device-map {path}: there is no such file; {expected}")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--device-map {path} is no JSON ({error}); {expected}") from None
    if not isinstance(found, dict) or not all(isinstance(device, (str, int)) for device in found.values()):
        raise ValueError(f"--device-map {path} does not give each module a device; {expected}")
    return found


def _limit(text: str) -> tuple[str | int, str]:
    device, equals, size = text.partition("=")
    if not (device and equals and size):
        raise ValueError(f"--max-memory {text}: expected DEVICE=SIZE, e.g. 0=20GiB or cpu=60GiB")
    return (int(device) if device.isdigit() else device), size
