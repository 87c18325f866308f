"""Writes cpp/fuzz/corpus, the files that the fuzzer and the mutations start from. For when the format changes.

Seeds without a checksum matter most: a mutation of one is not simply refused as damaged. The ``*_v1`` files are of
version 1 of the state format and stay as they are.
"""

from pathlib import Path

import safetensors.torch
import torch

from stableedit_cpp import core

CORPUS = Path(__file__).parent / "corpus"
WHOLE = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"]
REAL = ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"]


def unsigned(name: str, tensors: dict, metadata: dict | None = None) -> None:
    """As another implementation of the format writes it: no checksum."""
    safetensors.torch.save_file(tensors, CORPUS / f"{name}.safetensors", metadata)


def patch_of(change: object, layout: str) -> core.Patch:
    return core.Patch({"layer.1.down": core.WeightChange(change, layout)}, id="seed", created="2026-01-01T00:00:00Z")


def save_patch(name: str, patch: core.Patch) -> None:
    """The patch as it is, and without its checksum."""
    path = CORPUS / f"{name}.safetensors"
    core.save_patch(path, patch)
    unsigned(f"{name}_unsigned", *core.load_safetensors(path))


def normalizer(mode: str) -> core.LifelongNormalizer:
    tracker = core.LifelongNormalizer(2, 3, whitening=core.WhiteningOptions(mode=mode, refresh=0.5))
    gradients = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    tracker.observe(gradients[:, :2], gradients)
    tracker.normalize_value_gradients(gradients)
    return tracker


def past_keys(rank: int | None) -> core.PastKeys:
    """With something of every kind: a moment or a sketch from the first two turns, and a turn since."""
    past = core.PastKeys(8, rank)
    keys = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    for turn in keys.split([2, 3, 1]):
        past.update(turn)
    return past


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    unsigned("empty", {})
    unsigned("dtypes", {name: torch.ones(1).to(getattr(torch, name)) for name in WHOLE + REAL})
    unsigned("shapes", {"scalar": torch.tensor(1.0), "none": torch.zeros(0, 3), "cube": torch.ones(2, 1, 2)})
    unsigned("named", {"weight": torch.ones(2, 2)}, {"format": "pt", "note": "größer"})
    update = core.LowRankUpdate(torch.ones(3, 2), torch.ones(2, 4))
    save_patch("patch_low_rank", patch_of(update, "linear"))
    save_patch("patch_dense", patch_of(torch.ones(3, 4, dtype=torch.bfloat16), "conv1d"))
    for mode in ("full", "diagonal"):
        unsigned(f"state_{mode}", normalizer(mode).state_dict())
    for name, rank in {"exact": None, "sketched": 2}.items():
        unsigned(f"past_keys_{name}", past_keys(rank).state_dict())
    moment = torch.diag(torch.tensor([4.0, 1.0, 1e-3, 1e-4, 1e-5]))
    unsigned("past_keys_seeded", core.PastKeys.seeded(moment, 2.0).state_dict())
    unsigned("null_space", core.NullSpace(moment, 1e-2).state_dict())
    core.save_state(CORPUS / "state.safetensors", {"normalizer/2 -> 3": normalizer("full").state_dict()}, config="{}")


if __name__ == "__main__":
    main()
