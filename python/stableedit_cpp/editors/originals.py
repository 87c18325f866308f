"""The weights before the first edit, and showing other weights for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from stableedit_cpp.editors.interrupt import undisturbed
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.split import held

__all__ = ["OriginalWeights", "swapped"]

Values = dict[EditModule, torch.Tensor]


class OriginalWeights:
    """Copies of the edited modules' weights, taken before the first edit.

    They are k * v numbers a module in the weight's own dtype (117 MB for a module of an 8B model in bfloat16) and lie
    in host memory, of which there is more than of an accelerator's. Subtracting the updates instead would need all
    updates of the stream, and would give back the original only up to rounding.

    Args:
        modules: the edited modules.
    """

    def __init__(self, modules: Sequence[EditModule]) -> None:
        self._modules = modules
        self._kept: dict[str, torch.Tensor] = {}
        self._shown: dict[EditModule, object] = {}  # what the modules are to hold again

    def __bool__(self) -> bool:
        return bool(self._kept)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._kept[name]

    def keep(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Copy the modules' present weights, or those given by module name, as the original ones.

        Raises:
            ValueError: for a module that is missing or not edited, or a weight of another shape or dtype.
        """
        if weights is None:
            weights = {module.name: module.weight for module in self._modules}
        names = [module.name for module in self._modules]
        if set(weights) != set(names):
            raise ValueError(
                f"weights must hold one tensor for each edited module ({', '.join(names)}), not for "
                f"{', '.join(weights) or 'none'}"
            )
        for module in self._modules:
            given, own = weights[module.name], held(module.module.weight)
            if given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(
                    f"the original weight of {module.name} must be {tuple(own.shape)} {own.dtype} as the module's, "
                    f"not {tuple(given.shape)} {given.dtype}"
                )
        self._kept = {name: weights[name].detach().to("cpu", copy=True) for name in names}

    def refuse_if_shown(self, action: str) -> None:
        """
        Raises:
            ValueError: within ``shown``; ``action`` is what the caller wanted.
        """
        if self._shown:
            raise ValueError(f"the model shows its unedited weights here; leave `with editor.unedited():` to {action}")

    def shown(self) -> AbstractContextManager[None]:
        """Within this context the modules hold their original weights; after it, bit for bit what they held before."""
        if self._shown or not self._kept:  # inside another such block, or nothing was edited yet
            return nullcontext()
        return swapped({module: self._kept[module.name] for module in self._modules}, self._shown)


@contextmanager
def swapped(values: Values, before: dict[EditModule, object] | None = None) -> Iterator[None]:
    """Within this context modules hold other weights; after it, bit for bit what they held before.

    What they held waits in host memory, or in a file where they are offloaded to the disk; parameters in memory stay
    the same tensors at the same addresses.

    Args:
        values: of the weights' shapes; any device and dtype.
        before: gets what is to be put back, and is empty once it was.
    """
    before = {} if before is None else before
    gradients, shown = torch.is_grad_enabled(), False
    try:
        for module, value in values.items():
            before[module] = module.kept()
            module.write(value)
        shown = True
        yield
    finally:
        try:  # from the first: a signal may raise after any call
            gradients = torch.is_grad_enabled() if shown else gradients
            # One that raises just as torch.no_grad() is entered leaves gradients off.
            torch.set_grad_enabled(gradients)
            _put_back(before)
        except BaseException:  # Ctrl-C must not leave half of the values behind
            with undisturbed():
                torch.set_grad_enabled(gradients)
                _put_back(before)
            raise


def _put_back(before: dict[EditModule, object]) -> None:
    for module, kept in before.items():
        module.put_back(kept)
    before.clear()
