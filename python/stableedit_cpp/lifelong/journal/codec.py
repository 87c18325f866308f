"""A turn as a record of the journal, and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict

import torch

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import AppliedPass, AppliedTurn, TurnReport
from stableedit_cpp.model.capture import CapturedTurn

__all__ = ["decode_requests", "decode_turn", "decode_updates", "encode_turn", "encode_updates"]


def encode_turn(turn: AppliedTurn, *, factors: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """(content, tensors) of a record.

    Args:
        factors: write down what the turn can be done again from without the model: per pass and module "left" and
            "right" of the update, and the "keys" (unless "right" holds them) and "gradients" that the statistics saw.
    """
    content = {
        "kind": turn.kind,
        "requests": [request.to_dict() for request in turn.requests],
        "report": asdict(turn.report),
        "passes": len(turn.passes),
        "factors": factors,
        "ridge": [applied.ridge for applied in turn.passes],
        "step_size": [applied.step_size for applied in turn.passes],
    }
    tensors: dict[str, torch.Tensor] = {}
    for number, applied in enumerate(turn.passes if factors else ()):
        captured = applied.captured
        tensors[f"{number}/request"] = applied.request
        tensors[f"{number}/captured/request"] = captured.request
        tensors[f"{number}/captured/micro_batch"] = captured.micro_batch
        for name, update in applied.updates.items():
            tensors |= encode_updates({name: update}, f"{number}/")
            tensors[f"{number}/{name}/gradients"] = _kept(captured.value_gradients[name])
            if applied.past_keys:
                tensors[f"{number}/{name}/keys"] = _kept(captured.keys[name])
    return content, tensors


def decode_requests(content: dict) -> list[EditRequest]:
    """The requests of a turn's record, as they were written.

    A request drops blanks around its texts today; with those that an earlier version kept, other tokens were learned.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of blanks, which are put back
        requests = [EditRequest(**fields) for fields in content["requests"]]
    for request, fields in zip(requests, content["requests"], strict=True):
        vars(request).update({name: text for name, text in fields.items() if name not in ("variants", "aliases")})
    return requests


def encode_updates(updates: Mapping[str, LowRankUpdate], prefix: str = "") -> dict[str, torch.Tensor]:
    """The factors of updates by module name."""
    tensors = {f"{prefix}{name}/left": _kept(update.left) for name, update in updates.items()}
    return tensors | {f"{prefix}{name}/right": _kept(update.right) for name, update in updates.items()}


def decode_updates(
    tensors: Mapping[str, torch.Tensor], homes: Mapping[str, torch.device], prefix: str = ""
) -> dict[str, LowRankUpdate]:
    """What ``encode_updates`` wrote, each on the device of its module's weight (``homes``, by module name)."""
    return {
        name: LowRankUpdate(tensors[f"{prefix}{name}/left"].to(home), tensors[f"{prefix}{name}/right"].to(home))
        for name, home in homes.items()
    }


def decode_turn(
    content: dict,
    tensors: Mapping[str, torch.Tensor],
    homes: Mapping[str, torch.device],
    devices: Mapping[str, torch.device],
) -> AppliedTurn:
    """What ``encode_turn`` wrote with factors: updates where the weights are, by module name, and what was captured on
    the ``devices`` that the modules run on."""
    passes = []
    for number in range(content["passes"]):
        updates = decode_updates(tensors, homes, f"{number}/")
        captured = CapturedTurn(
            keys={
                name: tensors.get(f"{number}/{name}/keys", tensors[f"{number}/{name}/right"]).to(device)
                for name, device in devices.items()
            },
            value_gradients={
                name: tensors[f"{number}/{name}/gradients"].to(device) for name, device in devices.items()
            },
            request=tensors[f"{number}/captured/request"],
            micro_batch=tensors[f"{number}/captured/micro_batch"],
            losses=torch.empty(0, device="cpu"),
            correct=torch.empty(0, device="cpu"),
        )
        past_keys = any(f"{number}/{name}/keys" in tensors for name in homes)
        request, ridge = tensors[f"{number}/request"], content["ridge"][number]
        step_size = content["step_size"][number] if "step_size" in content else math.nan  # before 0.3.0: as configured
        passes.append(AppliedPass(captured, updates, request, ridge, past_keys, step_size))
    return AppliedTurn(content["kind"], decode_requests(content), passes, TurnReport(**content["report"]))


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous()
