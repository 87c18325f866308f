"""How a model and its tokenizer are known again, by who kept something that belongs to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from stableedit_cpp.files.digest import joint_digest, model_digest, tensor_digests, tokenizer_digest
from stableedit_cpp.model.form import Form
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.split import refuse_split

__all__ = ["check_identity", "edited_weights", "identity"]


def identity(
    model: torch.nn.Module,
    tokenizer,
    modules: Sequence[EditModule],
    form: Form,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, object]:
    """What tells a model and a tokenizer from others, ready for JSON. Reads every weight once.

    Args:
        modules: that are edited.
        form: of prompts and answers.
        weights: theirs, by module name, if not the present ones.

    Raises:
        ValueError: for weights that are split over processes.
    """
    refuse_split(modules, "what tells a model from others")
    return {
        "class": type(model).__name__,
        "dtype": str(modules[0].dtype).removeprefix("torch."),
        "outside": _outside(model, modules),
        "edited": edited_weights(modules) if weights is None else tensor_digests(weights),
        "tokenizer": tokenizer_digest(tokenizer),
        "form": form.identity(tokenizer),
    }


def _outside(model: torch.nn.Module, modules: Sequence[EditModule]) -> str:
    """Digest of all that is not edited; of experts that share a tensor with edited ones, too."""
    digest = model_digest(model, exclude=dict.fromkeys(module.tensor_name for module in modules))
    edited, layers = {module.name for module in modules}, {m.tensor_name: m for m in modules if m.is_expert}
    others = {
        f"{name}.{index}": weight
        for name, module in layers.items()
        for index, weight in enumerate(model.get_parameter(name))
        if f"{name}.{index}" not in edited
    }
    return f"{digest} {joint_digest(others)}" if others else digest


def edited_weights(modules: Sequence[EditModule]) -> dict[str, str]:
    """Digests of the weights of the edited modules, as they are now, by module name."""
    return tensor_digests({module.name: module.weight for module in modules})


def check_identity(found: Mapping[str, object], expected: Mapping[str, object], remedy: str) -> None:
    """Refuse another model or tokenizer; the edited weights are left to the caller.

    Args:
        remedy: the end of the message, e.g. "load what the session s/ was created with".

    Raises:
        ValueError: with what differs.
    """
    for name, what in (
        ("class", "the model is a {found}, not a {expected}"),
        ("dtype", "the model is in {found}, not in {expected}"),
        ("outside", "weights of the model outside the edited modules are others"),
        ("tokenizer", "the tokenizer is another"),
        ("form", "the chat template, or the token that ends an answer, is another"),
    ):
        # Earlier versions did not write the form: there was one.
        if name in expected and found[name] != expected[name]:
            raise ValueError(f"{what.format(found=found[name], expected=expected[name])}; {remedy}")
