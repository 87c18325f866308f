"""The published formulation of StableEdit in plain PyTorch: what the benchmarks compare with.

As the released code of the UltraEdit family does it: micro-batches of 10 with full logits, a backward pass that
accumulates the weight gradients of the edited modules, statistics folded in for each micro-batch and module, keys and
gradients written to disk and read back, an eigendecomposition for each module and chunk of rows, a dense k x k solve.
Where several readings are possible the cheaper one was taken (the root is applied as two products with the
eigenvectors, never formed; weights, statistics and solve are float32). Nothing here comes from the package.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

Modules = dict[str, nn.Module]
Run = Callable[..., object]  # how a part of a turn is run: common.Parts.run, or plainly


def run_plainly(_part: str, function: Callable[..., object], *arguments: object) -> object:
    return function(*arguments)


@dataclass(frozen=True)
class PublishedOptions:
    step_size: float = 3e-4
    ridge: float = 10.0
    floor: float = 0.1
    relative_floor: bool = True  # to the mean eigenvalue; the released code has 1e-6 absolute (same cost)
    chunk: int = 512  # rows for which targets are computed together: config.editor.batch_size


class RunningStatistics:
    """Mean, variance and scatter of the modules of one shape, float32."""

    def __init__(self, key_dim: int, value_dim: int, device: torch.device) -> None:
        self.count = 0
        self.key_mean, self.key_m2 = torch.zeros(2, key_dim, device=device)
        self.mean, self.m2 = torch.zeros(2, value_dim, device=device)
        self.psi = torch.zeros(value_dim, value_dim, device=device)

    def update(self, keys: torch.Tensor, gradients: torch.Tensor) -> None:
        total = self.count + len(keys)
        share, between = len(keys) / total, self.count * len(keys) / total
        delta = keys.mean(0) - self.key_mean
        self.key_m2 += (keys - keys.mean(0)).square().sum(0) + between * delta**2
        self.key_mean += share * delta
        delta = gradients.mean(0) - self.mean
        centred = gradients - gradients.mean(0)
        self.m2 += centred.square().sum(0) + between * delta**2
        self.psi += centred.T @ centred + between * torch.outer(delta, delta)
        self.mean += share * delta
        self.count = total


def published_batches(sequences: Sequence, device: torch.device, size: int = 10) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of a turn, sorted by length: input_ids, attention_mask and labels with -100 beside the answer.

    Sequences are the package's TokenSequence: ``ids`` and ``answer``."""
    sequences = sorted(sequences, key=lambda sequence: -len(sequence.ids))
    batches = []
    for begin in range(0, len(sequences), size):
        chosen = sequences[begin : begin + size]
        width = len(chosen[0].ids)
        batch = {name: torch.zeros(len(chosen), width, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        batch["labels"] = torch.full((len(chosen), width), -100)
        for row, sequence in enumerate(chosen):
            length = len(sequence.ids)
            batch["input_ids"][row, :length] = torch.tensor(sequence.ids)
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, length - len(sequence.answer) : length] = torch.tensor(sequence.answer)
        batches.append({name: tensor.to(device) for name, tensor in batch.items()})
    return batches


def require_gradients(model: nn.Module, modules: Modules, trainable: str = "edited") -> None:
    """Which weights accumulate a gradient: those of the edited modules, as released, or "all" of the model's."""
    model.requires_grad_(trainable == "all")
    for module in modules.values():
        module.weight.requires_grad_(True)


def published_capture(
    model: nn.Module,
    modules: Modules,
    batches: Sequence[dict[str, torch.Tensor]],
    directory: Path,
    observe: Callable[[str, torch.Tensor, torch.Tensor], None] = lambda name, keys, gradients: None,
) -> None:
    """Run a turn; ``{module}_{batch}_keys.pth`` and ``_values_grad.pth`` are left in the directory."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(name: str):
        def hook(_module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            output.retain_grad()
            seen[name] = (inputs[0].detach(), output)

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in modules.items()]
    try:
        for number, batch in enumerate(batches):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"]
            nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()).backward()
            answers = labels != -100
            for index, name in enumerate(modules):
                keys, output = seen[name]
                keys, gradients = keys[answers].float(), output.grad[answers].float()
                observe(name, keys, gradients)
                save(directory, index, number, keys, gradients)
    finally:
        for handle in handles:
            handle.remove()


def save(directory: Path, module: int, batch: int, keys: torch.Tensor, gradients: torch.Tensor) -> None:
    torch.save(keys, directory / f"{module}_{batch}_keys.pth")
    torch.save(gradients, directory / f"{module}_{batch}_values_grad.pth")


def load(directory: Path, module: int, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        return torch.cat([torch.load(directory / f"{module}_{batch}_{name}.pth") for batch in range(batches)])

    return read("keys"), read("values_grad")


def published_targets(
    keys: torch.Tensor,
    gradients: torch.Tensor,
    statistics: RunningStatistics,
    options: PublishedOptions,
    diagonal: bool = False,
    run: Run = run_plainly,
) -> torch.Tensor:
    """Ridge targets, chunk by chunk; the covariance is decomposed anew for each."""
    width = gradients.shape[1]
    eps = torch.finfo(torch.float32).eps
    pieces = []
    for begin in range(0, len(keys), options.chunk):
        h, g = keys[begin : begin + options.chunk], gradients[begin : begin + options.chunk]
        h_hat = (h - statistics.key_mean) / ((statistics.key_m2 / (statistics.count - 1)).sqrt() + eps)
        if diagonal or statistics.count <= width + 1:
            g_hat = (g - statistics.mean) / ((statistics.m2 / (statistics.count - 1)).sqrt() + eps)
        else:
            sigma = statistics.psi / (statistics.count - width - 1)
            values, vectors = run("decomposition", torch.linalg.eigh, sigma)
            floor = options.floor * values.mean() if options.relative_floor else options.floor
            scales = values.clamp(min=floor).rsqrt()
            g_hat = ((g - statistics.mean) @ vectors * scales) @ vectors.T
        pieces.append(-options.step_size * h_hat.square().sum(1, keepdim=True) * g_hat)
    return torch.cat(pieces)


def published_update(keys: torch.Tensor, targets: torch.Tensor, ridge: float) -> torch.Tensor:
    """D = (H^T H + ridge I)^(-1) H^T V, dense, [k, v]."""
    gram = keys.T @ keys + ridge * torch.eye(keys.shape[1], device=keys.device)
    return torch.linalg.solve(gram, keys.T @ targets)


class PublishedEditor:
    """Turns of requests, one after another, on one model."""

    def __init__(
        self, model: nn.Module, modules: Modules, options: PublishedOptions, trainable: str = "edited"
    ) -> None:
        self.model, self.modules, self.options = model, modules, options
        self.statistics: dict[torch.Size, RunningStatistics] = {}
        for module in modules.values():
            value_dim, key_dim = module.weight.shape
            fresh = RunningStatistics(key_dim, value_dim, module.weight.device)
            self.statistics.setdefault(module.weight.shape, fresh)
        require_gradients(model, modules, trainable)

    def turn(self, sequences: Sequence, *, diagonal: bool = False, run: Run = run_plainly) -> None:
        """Edit a turn; ``diagonal`` for the warm-up. Parts: capture (with statistics and disk) and mathematics."""
        device = next(self.model.parameters()).device
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            batches = published_batches(sequences, device)
            run("capture", published_capture, self.model, self.modules, batches, directory, self._observe)
            run("mathematics", self._edit, directory, len(batches), diagonal)

    def _observe(self, name: str, keys: torch.Tensor, gradients: torch.Tensor) -> None:
        self.statistics[self.modules[name].weight.shape].update(keys, gradients)

    @torch.no_grad()
    def _edit(self, directory: Path, batches: int, diagonal: bool) -> None:
        for index, module in enumerate(self.modules.values()):
            keys, gradients = load(directory, index, batches)
            targets = published_targets(keys, gradients, self.statistics[module.weight.shape], self.options, diagonal)
            module.weight += published_update(keys, targets, self.options.ridge).T.to(module.weight.dtype)
