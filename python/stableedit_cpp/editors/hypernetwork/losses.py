"""What a training loss leaves at the edited modules: the keys and output gradients of all its positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.nn import functional as F

from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.model.attached import forward_hook
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.running import batches
from stableedit_cpp.model.tokens import TokenSequence, collate, longest_first
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["answer_distributions", "micro_batch_weights", "visit_loss"]


def micro_batch_weights(sequences: Sequence[TokenSequence], size: int) -> list[float]:
    """What one answer token of each sequence weighs, where the loss is the mean over the answer tokens of each
    micro-batch, longest sequences first, summed over micro-batches: as in ``capture``."""
    order, weights = longest_first(sequences), [0.0] * len(sequences)
    for start in range(0, len(order), size):
        members = order[start : start + size]
        for index in members:
            weights[index] = 1.0 / sum(len(sequences[member].answer) for member in members)
    return weights


def answer_distributions(
    model: nn.Module, sequences: Sequence[TokenSequence], *, max_tokens: int, trunk: TrunkCache | None = None
) -> list[torch.Tensor]:
    """The model's logits along each answer, ``[answer tokens, vocabulary]``, in its dtype and in host memory."""
    found: dict[int, torch.Tensor] = {}
    for batch in batches(model, sequences, max_tokens=max_tokens, trunk=trunk):
        for index, logits in zip(batch.indices, batch.logits.cpu().split(batch.sizes), strict=True):
            found[index] = logits.clone()
    return [found[index] for index in range(len(sequences))]


def visit_loss(
    model: nn.Module,
    modules: Sequence[EditModule],
    sequences: Sequence[TokenSequence],
    weights: Sequence[float],
    references: Sequence[torch.Tensor | None],
    visit: Callable[[str, torch.Tensor, torch.Tensor], None],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
) -> list[float]:
    """Differentiate a loss with respect to the outputs of modules at all positions, those of prompts included.

    The loss is the sum over answer tokens of ``weights`` of their sequence times their cross-entropy or, where a
    sequence has reference logits, their KL(reference || model). With the keys Hl and the output gradients Gl of all
    positions, the gradient with respect to a module's weight is Gl^T Hl, which is formed nowhere.

    Args:
        references: of each sequence, ``answer_distributions`` of another state of the model, or None.
        visit: called for each forward pass with the name of each module, Hl ``[m, k]`` and Gl ``[m, v]``, float32
            (float64 for a float64 model).

    Returns:
        The loss of each sequence, unweighted: a sum over its answer tokens, in nats.

    Raises:
        ModelBroken: where a loss is not finite.
    """
    if trunk is not None:
        trunk.check(sequences)
    losses = [0.0] * len(sequences)
    taps = {module.name: _Tap() for module in modules}
    device = input_device(model)
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for module in modules:
            stack.enter_context(forward_hook(module.module, taps[module.name]))
        for indices in pack_apart(sequences, max_tokens, trunk, device=device):
            chosen = [sequences[index] for index in indices]
            batch = collate(chosen, device)
            logits = answer_logits(model, batch, trunk, chosen)
            sizes = [len(sequence.answer) for sequence in chosen]
            parts = [
                _loss(part if part.dtype == torch.float64 else part.float(), labels, references[index])
                for index, part, labels in zip(
                    indices, logits.split(sizes), batch.labels.to(logits.device).split(sizes), strict=True
                )
            ]
            found = torch.stack(parts)
            # All answer tokens of a sequence weigh the same, so the weight can be applied to the finished gradient;
            # that keeps small numbers out of a half-precision backward pass.
            gradients = torch.autograd.grad(found.sum(), [tap.output for tap in taps.values()])
            for index, loss in zip(indices, found.tolist(), strict=True):
                if not abs(loss) < float("inf"):
                    raise ModelBroken(
                        "a training loss is NaN or infinite: the edits of the stream have broken the model"
                    )
                losses[index] = loss
            weight = torch.tensor([weights[index] for index in indices], dtype=torch.float64, device="cpu")
            with torch.no_grad():
                for (name, tap), gradient in zip(taps.items(), gradients, strict=True):
                    rows, owners = _places(tap.keys, batch, sizes)
                    scaled = _rows(gradient)[rows] * weight[owners].to(_rows(gradient)).unsqueeze(1)
                    visit(name, _rows(tap.keys)[rows], scaled)
                    tap.keys = tap.output = None
    return losses


class _Tap:
    """Reads one module's keys, and makes its output a place where the backward pass can stop; as that of capture."""

    keys: torch.Tensor | None = None
    output: torch.Tensor | None = None

    def __call__(self, _module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        self.keys = inputs[0].detach()
        self.output = output if output.requires_grad else output.detach().requires_grad_()
        return self.output.clone()  # for models that add to it in place (Falcon)


def _loss(logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor | None) -> torch.Tensor:
    if reference is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    expected, found = reference.to(logits).log_softmax(-1), logits.log_softmax(-1)
    # What the reference rules out counts nothing; zero times infinity would be NaN, in the gradient, too.
    possible = expected > -torch.inf
    difference = torch.where(possible, expected, 0.0) - torch.where(possible, found, 0.0)
    return (expected.exp() * difference).sum()


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.dtype == torch.float64 else rows.float()


def _places(keys: torch.Tensor, batch, sizes: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of a module's input are no padding, and the sequence that each belongs to, on the CPU."""
    if keys.numel() // keys.shape[-1] == batch.input_ids.numel():
        rows = batch.attention_mask.flatten().nonzero().flatten().cpu()
        return rows, rows // batch.input_ids.shape[1]
    # The output embedding sees nothing but answer positions (see answer_logits).
    owners = [owner for owner, size in enumerate(sizes) for _ in range(size)]
    return torch.arange(len(owners), device="cpu"), torch.tensor(owners, device="cpu")
