"""Captures keys and value gradients of a turn: the input of the editing mathematics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.model.attached import forward_hook
from stableedit_cpp.model.experts import expert_by_expert
from stableedit_cpp.model.logits import answer_logits
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.prefix import shared_prefix
from stableedit_cpp.model.shares import shared_passes
from stableedit_cpp.model.split import join_keys
from stableedit_cpp.model.tokens import Batch, TokenSequence, collate, longest_first
from stableedit_cpp.model.top_tokens import TopTokens, divergence, joined
from stableedit_cpp.model.trunk import TrunkCache, pack_apart
from stableedit_cpp.model.untouched import input_device, untouched

__all__ = ["CapturedTurn", "NotFiniteError", "capture", "join"]


NotFiniteError = ModelBroken  # its earlier name


@dataclass(frozen=True)
class CapturedTurn:
    """Rows are answer tokens of a turn, n in all, the longest request first; with ``prompt_rows`` also the tokens of
    the prompts before them, but the first of each, whose value gradients are what flows back through attention.

    Attributes:
        keys: by module name, input of the module, ``[n, k]``, float32 (float64 for a float64 model). Of one expert of a
            mixture, rows of tokens that were not routed to it are zero, there and among the value gradients; see
            ``rows_of``.
        value_gradients: by module name, gradient of the loss with respect to the module's output, ``[n, v]``. The loss
            is the mean cross-entropy over the answer tokens of each micro-batch, summed over micro-batches.
        request: index into the captured requests, ``[n]`` int64; -1 for rows that belong to none (``join``).
        micro_batch: number of the micro-batch, ``[n]`` int64; -1 as above.
        losses: mean cross-entropy of each request's answer, in nats, ``[requests]``.
        correct: share of each request's answer tokens that the model already predicts, ``[requests]``.
        loss: the loss whose gradients these are, in nats; NaN where nobody kept it.
        probability: that of the least likely token of each request's answer, ``[requests]``; empty likewise.
    """

    keys: dict[str, torch.Tensor]
    value_gradients: dict[str, torch.Tensor]
    request: torch.Tensor
    micro_batch: torch.Tensor
    losses: torch.Tensor
    correct: torch.Tensor
    loss: float = math.nan
    probability: torch.Tensor = field(default_factory=partial(torch.empty, 0))

    def rows_of(self, module: EditModule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and value gradients of the rows that a module has seen, and which these are, ``[n]`` bool; None where
        it has seen all."""
        keys, gradients = self.keys[module.name], self.value_gradients[module.name]
        if not module.is_expert:
            return keys, gradients, None
        seen = keys.any(1)
        return keys[seen], gradients[seen], seen

    @property
    def owned(self) -> CapturedTurn:
        """The rows that belong to requests alone: what statistics and past keys are made of."""
        rows = self.request >= 0
        if rows.all():
            return self
        count = int(rows.sum())  # they come first
        return replace(
            self,
            keys={name: key[:count] for name, key in self.keys.items()},
            value_gradients={name: gradient[:count] for name, gradient in self.value_gradients.items()},
            request=self.request[:count],
            micro_batch=self.micro_batch[:count],
        )


def join(captured: CapturedTurn, others: CapturedTurn) -> CapturedTurn:
    """The rows of a turn, and behind them others that belong to none of its requests; the losses add up."""
    nobody = torch.full_like(others.request, -1)
    return replace(
        captured,
        keys={name: torch.cat([key, others.keys[name]]) for name, key in captured.keys.items()},
        value_gradients={
            name: torch.cat([gradient, others.value_gradients[name]])
            for name, gradient in captured.value_gradients.items()
        },
        request=torch.cat([captured.request, nobody]),
        micro_batch=torch.cat([captured.micro_batch, nobody]),
        loss=captured.loss + others.loss,
    )


class _Tap:
    """Reads one module's keys, and makes its output a place where the backward pass can stop."""

    def __init__(self, module: EditModule) -> None:
        self.name = module.name
        self.module = module.module
        self.edited, self.expert = module, module.is_expert
        self.keys: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self.batch: Batch | None = None
        self.positions: torch.Tensor | None = None  # into the flattened batch: where rows are read

    def __call__(self, _module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # Accelerate moves an input to its module's device only after this hook has seen it.
        self.keys = self.select(inputs[0].detach().to(output.device))
        # Nothing below the first edited module needs a gradient: its output becomes the leaf of the graph.
        self.output = output if output.requires_grad else output.detach().requires_grad_()
        # A copy, for models that add to it in place (Falcon).
        return self.output.clone()

    def select(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows at the positions, float32 at least; some models (OPT) hand over ``[batch * length, d]``."""
        rows = tensor.reshape(-1, tensor.shape[-1])
        if self.expert:
            return self._routed(rows)
        # The output embedding sees nothing but answer positions (see answer_logits).
        if len(rows) != len(self.batch.positions) or self.positions is not self.batch.positions:
            if len(rows) != self.batch.input_ids.numel():
                raise ValueError(f"edit_modules: {self.name} does not see every token once, so it cannot be edited")
            rows = rows[self.positions.to(rows.device)]
        elif rows.data_ptr() == tensor.data_ptr():
            rows = rows.clone()
        return rows if rows.dtype == torch.float64 else rows.float()

    def _routed(self, rows: torch.Tensor) -> torch.Tensor:
        """Those at the positions of an expert's rows, zero at the positions of tokens that it has not seen."""
        places = torch.full((self.batch.input_ids.numel(),), -1, device=rows.device)
        places[self.module.tokens] = torch.arange(len(rows), device=rows.device)
        places = places[self.positions.to(rows.device)]
        found = rows.new_zeros(len(places), rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
        found[places >= 0] = rows[places[places >= 0]].to(found.dtype)
        return found

    def unseen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and value gradients of an expert that no token of a forward pass was routed to."""
        weight = self.edited.weight
        zeros = partial(torch.zeros, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        return tuple(zeros(len(self.positions), size) for size in self.edited.shape)


class _Rows(NamedTuple):
    """Of one forward pass: the loss of each answer token and whether the model was right, and of each module its rows,
    by name."""

    losses: torch.Tensor
    hits: torch.Tensor
    keys: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]


def capture(
    model: nn.Module,
    modules: Sequence[EditModule],
    sequences: Sequence[TokenSequence],
    *,
    max_tokens: int,
    micro_batch: int = 10,
    prompt_rows: bool = False,
    reference: Sequence[TopTokens] | None = None,
    weight: float = 1.0,
    names: Sequence[str] | None = None,
    trunk: TrunkCache | None = None,
) -> CapturedTurn:
    """Run the requests of a turn once and collect what the edit needs (method: keys h and value gradients g).

    Requests are sorted by length, longest first and stable, and cut into micro-batches of ``micro_batch``, which fixes
    the scale of the gradients; how many run together in one forward pass (``max_tokens``) does not matter to them.
    No weight gradient is computed, nothing is propagated below the first edited module, nor (without ``prompt_rows``)
    through linear maps at prompt positions; the model's training mode and ``requires_grad`` flags are left as found.

    Args:
        prompt_rows: capture rows at prompt positions, too.
        reference: of each sequence the distributions along its answer: the loss is then not that of the answers, but
            ``weight`` times the sum over answer tokens of the divergence of these distributions to the model's
            (``top_tokens.divergence``); ``micro_batch`` plays no part.
        names: what to call each sequence in an error message.
        trunk: keeps the output of the layers below the first edited module for a retry, or reuses what it kept.

    Raises:
        NotFiniteError: if a loss or gradient is not finite, naming the request.
        ValueError: if a module takes no part in the forward.
    """
    if trunk is not None:
        trunk.check(sequences)
    order = longest_first(sequences)
    if reference is None:
        weights, group = _micro_batches(sequences, order, micro_batch)
    else:
        weights = torch.full((len(sequences),), weight, dtype=torch.float64, device="cpu")
        group = torch.zeros(len(sequences), dtype=torch.long, device="cpu")
    taps = [_Tap(module) for module in modules]
    device = input_device(model)
    with ExitStack() as stack:
        linears = stack.enter_context(untouched(model))
        stack.enter_context(torch.inference_mode(False))
        # Value gradients of the prefix are what prompt_rows asks for, and nobody else.
        prefix = None if prompt_rows else shared_prefix(model, sequences, trunk)
        skip = len(prefix or ())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(expert_by_expert([tap.module for tap in taps]))
        for tap in taps:
            stack.enter_context(forward_hook(tap.module, tap))
        run = pack_apart(sequences, max_tokens, trunk, skip=skip, device=device)

        def one(indices: Sequence[int]) -> _Rows:
            chosen = [sequences[index] for index in indices]
            batch = collate(chosen, device, skip=skip)
            positions = batch.positions
            if prompt_rows:
                positions = torch.tensor(_all_positions(chosen, batch.input_ids.shape[1]), device="cpu")
            else:
                linears.gradients_for(batch)
            for tap in taps:
                tap.batch, tap.positions, tap.output = batch, positions, None
            wanted = None if reference is None else joined(reference[index] for index in indices)
            logits = answer_logits(model, batch, trunk, chosen, prefix and prefix.past(batch))
            return _backward(logits, taps, batch, wanted)

        how = {"max_tokens": max_tokens, "device": device, "trunk": trunk, "skip": skip}
        parts = shared_passes("capturing", run, sequences, one, **how)

    answer = torch.tensor([index for index in order for _ in sequences[index].answer], dtype=torch.long, device="cpu")
    request = answer
    if prompt_rows:
        rows = [index for index in order for _ in _all_rows(sequences[index])]
        request = torch.tensor(rows, dtype=torch.long, device="cpu")
    ran = [index for indices in run for index in indices]
    by_answer = _in_order(order, ran, [len(sequence.answer) for sequence in sequences])
    by_row = _in_order(order, ran, [len(_all_rows(s)) for s in sequences]) if prompt_rows else by_answer
    loss = torch.cat([part.losses for part in parts]).cpu()[by_answer]
    hit = torch.cat([part.hits for part in parts]).cpu()[by_answer]
    keys = {tap.name: torch.cat([part.keys[tap.name] for part in parts])[by_row] for tap in taps}
    # All answer tokens of a request have one loss weight, so the weight can be applied to the finished gradient; that
    # keeps small numbers out of a half-precision backward pass.
    gradients = {tap.name: torch.cat([part.gradients[tap.name] for part in parts])[by_row] for tap in taps}
    gradients = {name: g * weights[request].to(g).unsqueeze(1) for name, g in gradients.items()}
    keys = join_keys(modules, keys, gradients)
    _check_finite(loss, answer, names, "loss")
    for what, tensors in (("key", keys), ("value gradient", gradients)):
        for name, tensor in tensors.items():
            _check_finite(tensor, request, names, f"{what} at {name}")
    answers = torch.bincount(answer, minlength=len(sequences))
    hardest = torch.zeros(len(sequences), dtype=loss.dtype, device="cpu").scatter_reduce_(0, answer, loss, "amax")
    return CapturedTurn(
        keys,
        gradients,
        request,
        group[request],
        torch.zeros(len(sequences), dtype=loss.dtype, device="cpu").index_add_(0, answer, loss) / answers,
        torch.zeros(len(sequences), dtype=torch.float32, device="cpu").index_add_(0, answer, hit.float()) / answers,
        float((loss.double() * weights[answer]).sum()),
        (-hardest).exp(),
    )


def _micro_batches(
    sequences: Sequence[TokenSequence], order: Sequence[int], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss weight and micro-batch number of each request: 1 / (answer tokens in its micro-batch)."""
    weight = torch.zeros(len(sequences), dtype=torch.float64, device="cpu")
    group = torch.zeros(len(sequences), dtype=torch.long, device="cpu")
    for number, start in enumerate(range(0, len(order), size)):
        members = torch.tensor(order[start : start + size], device="cpu")
        weight[members] = 1.0 / sum(len(sequences[index].answer) for index in members.tolist())
        group[members] = number
    return weight, group


def _backward(
    logits: torch.Tensor,
    taps: Sequence[_Tap],
    batch: Batch,
    reference: TopTokens | None,
) -> _Rows:
    logits = logits if logits.dtype == torch.float64 else logits.float()
    labels = batch.labels.to(logits.device)
    loss = F.cross_entropy(logits, labels, reduction="none") if reference is None else divergence(reference, logits)
    used = [tap for tap in taps if tap.output is not None]
    unused = [tap.name for tap in taps if tap.output is None and not tap.expert]
    if unused:
        raise ValueError(f"edit_modules: {', '.join(unused)} took no part in the forward pass")
    gradients = torch.autograd.grad(loss.sum(), [tap.output for tap in used]) if used else ()
    rows = _Rows(loss.detach(), logits.argmax(-1) == labels, {}, {})
    for tap in taps:
        if tap.output is None:
            rows.keys[tap.name], rows.gradients[tap.name] = tap.unseen()
    for tap, gradient in zip(used, gradients, strict=True):
        rows.keys[tap.name] = tap.keys
        rows.gradients[tap.name] = tap.select(gradient)
        tap.keys = tap.output = tap.batch = None
    return rows


def _all_rows(sequence: TokenSequence) -> range:
    """Positions of all tokens but the first; of that one, too, where it is the whole prompt."""
    return range(min(1, sequence.first), len(sequence))


def _all_positions(sequences: Sequence[TokenSequence], width: int) -> list[int]:
    """The same as indices into the flattened ``[sequences, width]``, padded on the right."""
    return [row * width + place for row, sequence in enumerate(sequences) for place in _all_rows(sequence)]


def _in_order(order: Sequence[int], ran: Sequence[int], rows: Sequence[int]) -> slice | torch.Tensor:
    """What puts the rows of sequences that were run in one order, so many of each, into another."""
    if list(order) == list(ran):
        return slice(None)
    rank = torch.empty(len(order), dtype=torch.long, device="cpu")
    rank[torch.tensor(order, device="cpu")] = torch.arange(len(order), device="cpu")
    which = torch.tensor([index for index in ran for _ in range(rows[index])], dtype=torch.long, device="cpu")
    return rank[which].argsort(stable=True)


def _check_finite(tensor: torch.Tensor, request: torch.Tensor, names: Sequence[str] | None, what: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        rows = finite if finite.ndim == 1 else finite.all(1)
        index = int(request[(~rows).cpu()][0])
        name = names[index] if names is not None else f"request {index}"
        raise NotFiniteError(f"{name}: the {what} is NaN or infinite; the turn was not applied")
