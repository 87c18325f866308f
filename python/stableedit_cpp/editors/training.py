"""Gradient descent on the losses of answers: the loop of the editors that train instead of solving."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from random import Random

import torch
from torch import nn
from torch.nn import functional as F

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.trained_config import TrainedConfig
from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.model.attached import replaced_forward
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.tokens import TokenSequence, collate
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["Forward", "Trainable", "train"]

Forward = Callable[[torch.Tensor], torch.Tensor]


class Trainable(ABC):
    """What stands in the place of the edited modules while it is trained: no weight of the model changes meanwhile.

    Args:
        modules: the edited modules, within ``untouched``.
        weights: that training begins with, by module name, in the layout of the module and the dtype in which it is
            trained (float32, or float64 for a float64 model); they stay as they are.
    """

    def __init__(self, modules: Sequence[EditModule], weights: Mapping[str, torch.Tensor]) -> None:
        self.modules, self.weights = modules, weights

    @property
    @abstractmethod
    def parameters(self) -> list[torch.Tensor]:
        """What Adam changes."""

    @abstractmethod
    def forward(self, module: EditModule) -> Forward:
        """In the place of the module's own."""

    def after_step(self) -> None:  # noqa: B027  most have nothing to do
        """Called after each step of Adam."""

    @abstractmethod
    def updates(self) -> dict[str, LowRankUpdate]:
        """What was learnt, by module name, to be added to ``weights``."""


def train(
    model: nn.Module,
    make: Callable[[], Trainable],
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    config: TrainedConfig,
    random: Random,
    *,
    trunk: TrunkCache | None = None,
    on_epoch: Callable[[int, float], object] = lambda epoch, loss: None,
) -> tuple[dict[str, LowRankUpdate], list[float]]:
    """Train on statements, epoch by epoch, until their losses are small, they have taken, or the epochs are used up.

    A batch of ``config.micro_batch`` statements is one step of Adam (torch's defaults, no weight decay), in however
    many forward passes ``config.max_tokens_per_forward`` allows.

    Args:
        make: the trainable, made within ``untouched``.
        names: what to call each sequence in an error message.
        random: order of the epochs, and seed of what is drawn meanwhile.
        trunk: keeps the output of the layers below the edited modules, which is the same in every epoch.
        on_epoch: called with the number of epochs that are done and the mean loss of the last.

    Returns:
        The updates, and of each epoch the mean loss over the sequences, in nats, seen before the step of each batch.

    Raises:
        ModelBroken: for a loss that is NaN or infinite, naming the request.
    """
    order, losses = list(range(len(sequences))), []
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_seeded(random.getrandbits(63)))
        trainable = make()
        for module in trainable.modules:
            stack.enter_context(replaced_forward(module.module, trainable.forward(module)))
        if trunk is not None:
            trunk.check(sequences)
        adam = torch.optim.Adam(trainable.parameters, lr=config.step_size)
        for epoch in range(1, config.epochs + 1):
            if config.shuffle:
                random.shuffle(order)
            total, taken = 0.0, True
            for begin in range(0, len(order), config.micro_batch):
                members = order[begin : begin + config.micro_batch]
                adam.zero_grad()
                loss, all_taken = _backward(
                    model, [sequences[i] for i in members], [names[i] for i in members], config, trunk
                )
                total, taken = total + loss * len(members), taken and all_taken
                if loss >= config.stop_loss and not (config.stop_when_taken and all_taken):
                    adam.step()
                    trainable.after_step()
            losses.append(total / len(order))
            on_epoch(epoch, losses[-1])
            if losses[-1] < config.stop_loss or (config.stop_when_taken and taken):
                break
        with torch.no_grad():
            return trainable.updates(), losses


def _backward(
    model: nn.Module,
    sequences: Sequence[TokenSequence],
    names: Sequence[str],
    config: TrainedConfig,
    trunk: TrunkCache | None,
) -> tuple[float, bool]:
    """Add the gradient of the loss of one batch; returns the loss, and whether all of the batch had taken before.

    The loss is the mean over sequences of the mean cross-entropy of their answer tokens, or the mean over all of these
    tokens.
    """
    tokens = sum(len(sequence.answer) for sequence in sequences)
    run = sequences
    if config.objective == "prompt_last":  # one position of each: that after the prompt
        run = [TokenSequence(one.ids[: one.first + 1], one.answer[:1]) for one in sequences]
    whole, taken, device = 0.0, True, input_device(model)
    for indices in pack_apart(run, config.max_tokens_per_forward, trunk, device=device):
        chosen = [run[index] for index in indices]
        batch = collate(chosen, device)
        logits = answer_logits(model, batch, trunk, chosen)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        answers = [sequences[index].answer for index in indices]
        sizes = torch.tensor([len(answer) for answer in answers], device=logits.device)
        if config.objective == "prompt_last":
            logits = logits.repeat_interleave(sizes, 0)
        labels = torch.tensor([token for answer in answers for token in answer], device=logits.device)
        each = F.cross_entropy(logits, labels, reduction="none")
        if not each.isfinite().all():
            owner = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)[~each.isfinite()][0]
            raise ModelBroken(f"{names[indices[int(owner)]]}: the loss is NaN or infinite; the turn was not applied")
        share = (
            1.0 / (sizes.to(each.dtype).repeat_interleave(sizes) * len(sequences))
            if config.average == "sample"
            else 1.0 / tokens
        )
        loss = (each * share).sum()
        loss.backward()
        whole += float(loss.detach())
        likely = (-each.detach()).exp() >= config.take_probability
        taken = taken and bool((likely & (logits.argmax(-1) == labels)).all())
    return whole, taken


@contextmanager
def _seeded(seed: int):
    """With torch's generators at a seed, and afterwards where they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
