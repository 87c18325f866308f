"""Trains the hypernetwork of an editor on a stream of requests, turn by turn."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import LowRankUpdate, ridge_update
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.editors.hypernetwork.implicit import PassedThrough
from stableedit_cpp.editors.hypernetwork.losses import answer_distributions, visit_loss
from stableedit_cpp.editors.hypernetwork.solver import HyperSolver
from stableedit_cpp.editors.hypernetwork.training_data import (
    LossPrompts,
    TrainingTurn,
    loss_prompts,
    training_turns,
)
from stableedit_cpp.editors.hypernetwork.training_file import TrainingFile
from stableedit_cpp.editors.saved import SavedEditor
from stableedit_cpp.editors.weights import Checkpoint
from stableedit_cpp.model.capture import CapturedTurn, capture
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import trusted

__all__ = ["Training", "TrainingReport"]


@dataclass
class TrainingReport:
    """What training did; ``to_dict`` is ready for JSON, ``str`` for people.

    Attributes:
        requests: of an epoch. steps: of the optimiser.
        losses: of each turn: mean cross-entropy of its rephrases with its update in the model, in nats an answer token.
        divergences: of each turn: KL from the model without the update at its unrelated prompts, likewise; 0 for none.
        update_norms: of each turn: root of the sum of squares over the modules.
        seconds: wall time.
    """

    editor: str
    requests: int = 0
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    update_norms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        turns, few = len(self.losses), max(1, min(10, len(self.losses) // 2))
        said = f"trained on {self.requests} requests in {turns} turns and {self.steps} steps ({self.seconds:.1f} s)"
        if not turns:
            return said
        first, last = sum(self.losses[:few]) / few, sum(self.losses[-few:]) / few
        return f"{said}; loss of rephrases {first:.2f} nats in the first turns, {last:.2f} in the last"


class Training:
    """Turn by turn: the editor's update D of the requests, then the gradient of

        sum over the last ``horizon`` turns i of discount^i (CE(rephrases) + locality_weight KL(without D || with D at
        unrelated prompts)) + update_penalty sum ||D||^2

    through D alone: the statistics and earlier updates are constants. ``keeps_edits`` leaves D in the model for the
    turns to come. After ``turns_per_step`` turns, or with None after the stream, Adam makes a step.

    Args:
        editor: whose networks, statistics and modules these are.

    Raises:
        ValueError: for a request without what training needs, naming it.
    """

    def __init__(self, editor: Editor, requests: Sequence[EditRequest]) -> None:
        self.editor = editor
        self.config: HypernetworkConfig = editor.config
        self.solver: HyperSolver = editor.solver
        self.turns = training_turns(editor, requests, self.config.locality_weight > 0)
        self.report = TrainingReport(self.config.editor, len(requests))
        self.trunk = editor.make_trunk_cache()

    def run(self, progress: bool | None, file: TrainingFile | None = None) -> None:
        """Train; within a change of the weights. The weights are then as they were, statistics and networks trained.

        Args:
            file: to go on from, where it holds anything, and to keep the training in.
        """
        config, start = self.config, time.perf_counter()
        before = Checkpoint(self.editor.weights)
        done = self._resume(file.found) if file is not None and file.found is not None else 0
        for network in self.solver.networks.values():
            network.restore(network.trainable())
        self.optimizer = torch.optim.Adam(self._parameters().values(), lr=config.learning_rate)
        if done:
            self._resume_optimizer(file.found.state)
        spent = self.report.seconds
        bar = tqdm(
            total=config.epochs * self.report.requests,
            initial=sum(len(self.turns[number % len(self.turns)].rephrases) for number in range(done)),
            desc="Training",
            unit="edit",
            disable=None if progress is None else not progress,
        )
        with bar, trusted(self.trunk):
            for number in range(done, config.epochs * len(self.turns)):
                self._numbered(number % len(self.turns), bar)
                if (number + 1) % len(self.turns) == 0:
                    self._reset(before)
                self.report.seconds = spent + time.perf_counter() - start
                if file is not None and file.due():
                    file.write(self._state(), number + 1, self.report)
        for network in self.solver.networks.values():
            network.restore(network.detached())

    def _numbered(self, number: int, bar: tqdm) -> None:
        """Turn ``number`` of an epoch, and the step of the optimiser where it is due."""
        config, report = self.config, self.report
        turn = self.turns[number]
        self._turn(self.turns[max(0, number + 1 - config.horizon) : number + 1][::-1])
        if config.clip_each_turn:
            self._clip()
        last = number + 1 == len(self.turns)
        if last or (config.turns_per_step and (number + 1) % config.turns_per_step == 0):
            self._step()
        bar.set_postfix({"loss": f"{report.losses[-1]:.3f}", "KL": f"{report.divergences[-1]:.3g}"})
        bar.update(len(turn.rephrases))

    def _turn(self, past: Sequence[TrainingTurn]) -> None:
        """Update, apply, and add the gradient of the loss to what the parameters have."""
        editor, turn = self.editor, past[0]
        config, solver, weights = self.config, self.solver, editor.weights
        captured = capture(
            editor.model,
            editor.modules,
            turn.edits,
            micro_batch=config.micro_batch,
            max_tokens=config.max_tokens_per_forward,
            prompt_rows=config.prompt_rows,
            names=turn.names,
            trunk=self.trunk,
        )
        solver.observe("warm_up", 0, captured)
        targets, updates, through = self._solve(captured)
        prompts = loss_prompts(past, config, config.seed + len(self.report.losses))
        how = {"max_tokens": config.max_tokens_per_forward, "trunk": self.trunk}
        references = answer_distributions(editor.model, prompts.unrelated, **how)
        before = None if config.keeps_edits else Checkpoint(weights)
        weights.apply({module.name: module.at_home(updates[module.name]) for module in editor.modules})
        self._loss(prompts, references, through, turn)
        if before is not None:
            weights.put_back(before)
        tensors, gradients = [], []
        for name, one in through.items():
            one.add_penalty(config.update_penalty)
            target, log_ridge = one.gradients()
            tensors += [targets[name], solver.module_editors[name].log_ridge]
            gradients += [target, tensors[-1].new_tensor(log_ridge)]
        torch.autograd.backward(tensors, gradients)
        self.report.update_norms.append(sum(update.norm() ** 2 for update in updates.values()) ** 0.5)

    def _solve(
        self, captured: CapturedTurn
    ) -> tuple[dict[str, torch.Tensor], dict[str, LowRankUpdate], dict[str, PassedThrough]]:
        """Of each module the targets, with the graph of the network behind them, and the update. No past keys."""
        solver, targets, updates, through = self.solver, {}, {}, {}
        for modules in solver.groups.values():
            device = captured.keys[modules[0].name].device  # that of the group's statistics
            for module in modules:
                name, one = module.name, solver.module_editors[module.name]
                keys = captured.keys[name].to(device)
                with torch.enable_grad():
                    targets[name] = one.targets(keys, captured.value_gradients[name].to(device))
                updates[name] = ridge_update(keys, targets[name].detach(), one.ridge)
                through[name] = PassedThrough(keys, updates[name], one.ridge)
        return targets, updates, through

    def _loss(
        self, prompts: LossPrompts, references: list[torch.Tensor], through: dict[str, PassedThrough], own: TrainingTurn
    ) -> None:
        """Run the prompts of the loss with the update in the model."""
        losses = visit_loss(
            self.editor.model,
            self.editor.modules,
            prompts.rephrases + prompts.unrelated,
            prompts.of_rephrases + prompts.of_unrelated,
            [None] * len(prompts.rephrases) + references,
            lambda name, keys, gradients: through[name].add(keys, gradients),
            max_tokens=self.config.max_tokens_per_forward,
            trunk=self.trunk,
        )
        self.report.losses.append(_mean(losses, own.rephrases))
        self.report.divergences.append(_mean(losses[len(prompts.rephrases) :], own.unrelated))

    def _parameters(self) -> dict[tuple[str, str], torch.Tensor]:
        """What is trained, by group and field."""
        networks = self.solver.networks.items()
        return {(group, name): field for group, network in networks for name, field in network.fields.items()}

    def _clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters().values(), self.config.clip)

    def _step(self) -> None:
        if not self.config.clip_each_turn:
            self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.report.steps += 1

    def _reset(self, before: Checkpoint) -> None:
        """Only the weights."""
        weights = self.editor.weights
        statistics = [(part, part.copy()) for part in weights.statistics.values()]
        weights.put_back(before)
        for part, now in statistics:
            part.restore(now)

    def _state(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that the rest of the training depends on: the state of the editor, that of Adam, and the gradients that
        wait for the next step."""
        state = {**self.editor.state_dict()}
        for (group, name), parameter in self._parameters().items():
            kept = state.setdefault(f"optimizer/{group}", {})
            kept |= {f"{name}.{what}": tensor for what, tensor in self.optimizer.state.get(parameter, {}).items()}
            if parameter.grad is not None:
                kept[f"{name}.gradient"] = parameter.grad
        return {part: fields for part, fields in state.items() if fields}

    def _resume(self, found: SavedEditor) -> int:
        """Become what the editor was; returns how many turns are done."""
        state = {part: fields for part, fields in found.state.items() if not part.startswith("optimizer/")}
        self.editor.load_state_dict(state)
        self.report = TrainingReport(**found.model["report"])
        return found.model["turns"]

    def _resume_optimizer(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for (group, name), parameter in self._parameters().items():
            fields = state.get(f"optimizer/{group}", {})
            own = {what.rpartition(".")[2]: field for what, field in fields.items() if what.startswith(f"{name}.")}
            own = {what: field.to(parameter.device) if field.ndim else field for what, field in own.items()}
            parameter.grad = own.pop("gradient", None)
            if own:
                self.optimizer.state[parameter] = own


def _mean(losses: Sequence[float], sequences: Sequence[TokenSequence]) -> float:
    """Over the answer tokens of the first of these; 0 where there are none."""
    tokens = sum(len(sequence.answer) for sequence in sequences)
    return sum(losses[: len(sequences)]) / tokens if tokens else 0.0
