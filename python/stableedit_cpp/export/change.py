"""What editing changed in a model: the input of every export but that of the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from stableedit_cpp.core import Patch, WeightChange
from stableedit_cpp.editors import Editor
from stableedit_cpp.export.truncation import Spectrum, decompose
from stableedit_cpp.files.digest import joint_digest, model_digest
from stableedit_cpp.files.offloaded import Offloaded, present_state
from stableedit_cpp.model.experts import expert_slices
from stableedit_cpp.model.modules import EditModule, edit_module, is_linear
from stableedit_cpp.model.packed import is_packed, packed_maps, unpacked
from stableedit_cpp.model.packed_gguf import as_packed

__all__ = [
    "ModelChange",
    "change_between",
    "change_from_patch",
    "change_of",
    "change_to",
    "digests_by_dtype",
    "weight_change",
]

_NOTHING = "the edited model is the base model, bit for bit: there is nothing to export"


@dataclass(frozen=True)
class ModelChange:
    """The difference between an edited model and its base.

    Attributes:
        base_digest: ``model_digest`` of the base model.
        tensors: new values of the parameters and buffers that changed, by their name in the state dict; in host memory.
        modules: what was added to the weight of each linear map that changed, by module name: float32 (float64 for a
            float64 model), before any rounding to half precision where that is known. Experts, which share a tensor,
            are maps of their own.
        others: names of changed tensors that are not the weight of a linear map.
        skeleton: makes the model without its weights, on the meta device; None where it is not known.
        replaced: ``digests_by_dtype`` of what the base model has in the place of ``tensors``: by them it is known in
            another dtype, and in files.
    """

    base_digest: str
    tensors: dict[str, torch.Tensor]
    modules: dict[str, WeightChange]
    others: list[str]
    skeleton: Callable[[], nn.Module] | None = field(default=None, compare=False, repr=False)
    replaced: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> str:
        """Of the weights that changed, e.g. "float32"."""
        return str(next(iter(self.tensors.values())).dtype).removeprefix("torch.")

    @cached_property
    def spectra(self) -> dict[str, Spectrum]:
        """Singular values and vectors of each module's change; computed once."""
        return {name: decompose(part) for name, part in self.modules.items()}

    def check_linear(self, what: str) -> None:
        """For formats that hold changes of linear maps only; ``what`` names the format.

        Raises:
            ValueError: if another tensor changed as well.
        """
        if self.others:
            names = ", ".join(self.others[:3]) + (f" and {len(self.others) - 3} more" if len(self.others) > 3 else "")
            raise ValueError(
                f"{what} holds changes of linear maps' weights only, but {names} changed as well; export a delta or "
                "the whole model, or check that the base model is the one that was edited"
            )

    @property
    def experts(self) -> list[str]:
        """Those of the modules that are experts of a mixture, slices of one tensor."""
        return [name for name in self.modules if f"{name}.weight" not in self.tensors]

    def check_no_experts(self, what: str) -> None:
        """For formats that know modules and no slices of a tensor; ``what`` names the format.

        Raises:
            ValueError: if an expert changed.
        """
        if self.experts:
            raise ValueError(
                f"{what} holds changes of modules, but {self.experts[0]} is one of several experts in a tensor; export "
                "a delta, a patch or the whole model"
            )

    def apply_to(self, base: nn.Module) -> None:
        """Turn the base model into the edited one, in place and bit for bit."""
        state = base.state_dict()
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                offloaded = Offloaded.find(base, name)
                state[name].copy_(tensor) if offloaded is None else offloaded.write(tensor.to(state[name].dtype))


def change_of(editor: Editor) -> ModelChange:
    """What an editor's edits changed in its model.

    Raises:
        ValueError: if nothing changed, or within ``editor.unedited()``.
    """
    originals = editor.original_weights()
    differences = editor.weight_changes()
    changed = [module for module in editor.modules if not _same_bits(module.weight, originals[module.name])]
    if not changed:
        raise ValueError(_NOTHING)
    names = list(dict.fromkeys(module.tensor_name for module in changed))
    state = present_state(editor.model)
    tensors = {name: state[name].detach().to("cpu", copy=True) for name in names}
    with editor.unedited() as base:
        digest = model_digest(base)
        state = present_state(base)
        before = digests_by_dtype({name: state[name].detach() for name in names})
    modules = {module.name: weight_change(module, differences[module.name]) for module in changed}
    return ModelChange(digest, tensors, modules, [], skeleton_of(editor.model), before)


def change_between(base: nn.Module, edited: nn.Module) -> ModelChange:
    """The difference between two models in memory. Quantised maps of the base model that are dense in the edited one
    are made dense.

    Raises:
        ValueError: if they are no versions of one model (a tensor's name, shape or dtype differs), or equal.
    """
    packed = {name for name, module in edited.named_modules() if is_packed(module)}
    edited_maps = (name for name, _ in edited.named_modules() if name not in packed)
    with unpacked(base, packed_maps(base, edited_maps)):
        return _between(base, edited)


def _between(base: nn.Module, edited: nn.Module) -> ModelChange:
    before, after = (present_state(model) for model in (base, edited))
    unmatched = before.keys() ^ after.keys()
    if unmatched:
        raise ValueError(f"the edited model is no edit of the base model: only one of them has {min(unmatched)}")
    for name, old in before.items():
        new = after[name]
        if old.shape != new.shape or old.dtype != new.dtype:
            raise ValueError(
                f"the edited model is no edit of the base model: {name} is {tuple(new.shape)} {new.dtype} in the "
                f"edited model and {tuple(old.shape)} {old.dtype} in the base model"
            )
    return change_to(base, {name: after[name] for name in before if not _same_bits(before[name], after[name])})


def change_to(base: nn.Module, tensors: Mapping[str, torch.Tensor]) -> ModelChange:
    """What replacing some tensors of a model changes in it.

    Args:
        tensors: new values by their name in the state dict, of the shapes and dtypes there.

    Raises:
        ValueError: if there are none.
    """
    if not tensors:
        raise ValueError(_NOTHING)
    state = present_state(base)
    modules: dict[str, WeightChange] = {}
    others: list[str] = []
    for name, new in tensors.items():
        maps = _maps_of(base, name)
        for module in maps:
            old = module.weight.detach()
            fresh = new[module.module.index] if module.is_expert else new
            if len(maps) == 1 or not _same_bits(old, fresh):
                dtype = torch.promote_types(new.dtype, torch.float32)
                modules[module.name] = weight_change(module, fresh.to(old.device, dtype) - old.to(dtype))
        if not maps:
            others.append(name)
    kept = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    before = digests_by_dtype({name: state[name] for name in tensors})
    return ModelChange(model_digest(base), kept, modules, others, skeleton_of(base), before)


def change_from_patch(base: nn.Module, patch: Patch) -> ModelChange:
    """What a low-rank patch of libstableedit changes in its base model; the changes stay in factored form.
    Modules with quantised weights that were edited are made dense.

    Raises:
        ValueError: if the patch was made for another model, or does not fit this one.
    """
    with unpacked(base, packed_maps(base, patch.modules)):
        return _of_patch(base, patch)


def _of_patch(base: nn.Module, patch: Patch) -> ModelChange:
    digest = model_digest(base)
    if patch.base_digest and patch.base_digest != digest:
        raise ValueError(
            f"the patch was made for another base model: that of {patch.base_model or 'unknown name'} has digest "
            f"{patch.base_digest[:16]}..., this one has {digest[:16]}...{as_packed(patch.base_model)}"
        )
    state = present_state(base)
    try:
        modules = {name: edit_module(base, name) for name in patch.modules}
    except KeyError as missing:
        raise ValueError(f"the patch changes {missing.args[0]}, which the base model does not have") from None
    names = dict.fromkeys(module.tensor_name for module in modules.values())
    before = digests_by_dtype({name: state[name].detach() for name in names})
    tensors = {name: state[name].detach().to("cpu", copy=True) for name in names}
    for name, change in patch.modules.items():
        module, whole = modules[name], tensors[modules[name].tensor_name]
        change.to(torch.device("cpu")).add_to(whole[module.module.index] if module.is_expert else whole)
    return ModelChange(digest, tensors, dict(patch.modules), [], skeleton_of(base), before)


def _maps_of(model: nn.Module, tensor: str) -> list[EditModule]:
    """The linear maps whose weights a tensor of the state dict holds: one, the experts of a layer, or none."""
    owner, _, field = tensor.rpartition(".")
    module = model.get_submodule(owner)
    if field == "weight" and is_linear(module):
        return [EditModule(owner, module)]
    slices = expert_slices(owner, module).items()
    return [EditModule(name, part) for name, part in slices if part.experts.tensor_name == tensor]


def digests_by_dtype(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """BLAKE2b over the ``tensor_digests`` of some named tensors, rounded to each dtype that models are run in."""
    return {
        str(dtype).removeprefix("torch."): joint_digest({name: tensor.to(dtype) for name, tensor in tensors.items()})
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


def skeleton_of(model: nn.Module) -> Callable[[], nn.Module] | None:
    """What makes a model of this class and config again, without weights."""
    kind, config = type(model), copy.deepcopy(getattr(model, "config", None))
    if config is None:
        return None

    def make() -> nn.Module:
        with torch.device("meta"):
            return kind(config)

    return make


def weight_change(module: EditModule, difference: torch.Tensor) -> WeightChange:
    difference = difference.detach()
    conv1d = module.layout == "conv1d"
    return WeightChange(difference.t().contiguous() if conv1d else difference, module.layout)


def _same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Also tells 0 from -0, and takes one NaN for another only if their bits agree."""
    first, second = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(first.to(second.device), second)
