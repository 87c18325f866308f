"""Editors that find the change of a turn by gradient descent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from tqdm.auto import tqdm

from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.dense import dense_update
from stableedit_cpp.editors.drawing import drawn_by, share_of
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.interrupt import InterruptGuard
from stableedit_cpp.editors.rect import rect
from stableedit_cpp.editors.replays import PastRequests
from stableedit_cpp.editors.solver import Solution, Solver
from stableedit_cpp.editors.trained_config import TrainedConfig
from stableedit_cpp.editors.training import Trainable, train
from stableedit_cpp.editors.turn import Turn
from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.evaluation.answers import read_answers
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.modules import EditModule
from stableedit_cpp.model.tokens import TokenSequence

__all__ = ["TrainedEditor", "TrainedSolver"]


class TrainedSolver(Solver, ABC):
    """Has no statistics: at most the statements of earlier turns, where they are trained on again."""

    config: TrainedConfig

    def __init__(self, modules: Sequence[EditModule], config: TrainedConfig) -> None:
        self.config, self.modules = config, modules
        self.normalizers, self.past_keys, self.module_editors = {}, {}, {}
        self.groups = {module.name: [module] for module in modules}
        self.past_requests = PastRequests() if config.cumulative or config.replays > 0 else None
        self.step = None

    @abstractmethod
    def make_trainable(self, weights: Mapping[str, torch.Tensor]) -> Trainable:
        """What is trained, from these weights by module name on; within ``untouched``."""

    def observe(self, kind: str, number: int, captured: CapturedTurn) -> dict[str, str]:
        return {}

    def replay(self, kind: str, number: int, captured: CapturedTurn) -> None:
        pass

    def earlier(self, kind: str, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Statements of earlier turns that are trained on beside those of a turn."""
        if self.past_requests is None:
            return []
        past = self.past_requests.beside(sequences)
        if self.config.cumulative:
            return past
        return drawn_by(sequences).sample(past, min(len(past), share_of(len(sequences), self.config.replays, 2)))


class _TrainedTurn(Turn):
    """A turn of one pass that is trained, not solved; a guard that wants a smaller step gets a share of the change."""

    _trained: dict[str, LowRankUpdate]
    _bar: tqdm

    def run(self, interrupts: InterruptGuard, bar: tqdm) -> None:
        self._bar = bar
        super().run(interrupts, bar)

    def _capture(self, pending: Sequence[int]) -> CapturedTurn:
        """What the model makes of the statements now; no row of the update belongs to one of them."""
        with self.report.timed("capture"):
            sequences = [self.sequences[index] for index in pending]
            how = {"max_tokens": self.work.config.max_tokens_per_forward, "trunk": self.work.trunk}
            read = read_answers(self.work.model, sequences, **how)
        for index, answer in zip(pending, read, strict=True):
            if answer.broken:
                raise ModelBroken(f"{self.names[index]}: the loss is NaN or infinite; the turn was not applied")
        right = [
            (one.top == torch.tensor(s.answer, device=one.top.device)).double().mean()
            for one, s in zip(read, sequences, strict=True)
        ]
        losses = torch.stack([-one.log_probability.mean() for one in read])
        nobody = torch.empty(0, dtype=torch.long, device="cpu")
        shapes = {module.name: module.shape for module in self.work.weights.modules}
        return CapturedTurn(
            keys={name: torch.empty(0, k, device="cpu") for name, (k, _) in shapes.items()},
            value_gradients={name: torch.empty(0, v, device="cpu") for name, (_, v) in shapes.items()},
            request=nobody,
            micro_batch=nobody,
            losses=losses,
            correct=torch.stack(right),
            loss=float(losses.mean()),
            probability=torch.stack([one.log_probability.min().exp() for one in read]),
        )

    def _solve(self, captured: CapturedTurn, number: int) -> Solution:
        work, report, config = self.work, self.report, self.work.config
        solver: TrainedSolver = work.solver
        # Where the modules run, which is elsewhere for weights that are offloaded.
        masters = {module.name: work.weights[module.name].master.to(module.device) for module in work.weights.modules}
        begin = masters
        if config.cumulative and self.kind != "repair":
            begin = {name: work.weights.originals[name].to(master) for name, master in masters.items()}
        earlier = solver.earlier(self.kind, self.sequences)
        names = [*self.names, *(f"an earlier statement ({number})" for number in range(1, len(earlier) + 1))]
        sequences = [*self.sequences, *earlier]
        how = {"trunk": work.trunk, "on_epoch": self._show_epoch}
        with report.timed("training"):
            make = partial(solver.make_trainable, begin)
            updates, report.losses = train(work.model, make, sequences, names, config, drawn_by(self.sequences), **how)
            updates = updates if begin is masters else self._from_present(updates, begin)
            self._trained = {
                module.name: module.at_home(
                    rect(updates[module.name], masters[module.name], config.keep_share, module.layout)
                )
                for module in work.weights.modules
            }
        with report.timed("apply"):
            for name, update in self._trained.items():
                work.weights[name].check(update)
        return self._solution(captured)

    def _from_present(
        self, updates: Mapping[str, LowRankUpdate], begin: Mapping[str, torch.Tensor]
    ) -> dict[str, LowRankUpdate]:
        """What takes the present weights to where updates of those that training began with lead."""
        found = dict(updates)
        for module in self.work.weights.modules:
            present = self.work.weights[module.name].master.to(begin[module.name].device)
            if not torch.equal(begin[module.name], present):
                learnt = updates[module.name].dense()
                learnt = learnt.t() if module.layout == "conv1d" else learnt
                found[module.name] = dense_update(begin[module.name] - present + learnt, module.layout)
        return found

    def _show_epoch(self, epoch: int, loss: float) -> None:
        self._bar.set_postfix({"epoch": f"{epoch}/{self.work.config.epochs}", "loss": f"{loss:.3f}"})

    def _solution(self, captured: CapturedTurn, step: float = 1.0, ridge: float = 1.0) -> Solution:
        updates = self._trained
        if step != 1.0:
            updates = {name: update.scaled(step) for name, update in updates.items()}
        self.report.update_norms |= {name: update.norm() for name, update in updates.items()}
        config = self.work.config
        return Solution(updates, step * config.step_size, config.ridge * ridge)


class TrainedEditor(Editor):
    """An editor that trains. Its updates have no rows that belong to one request: a rollback takes turns back, and no
    request can be reverted alone."""

    owns_rows = False
    solver_class: ClassVar[type[TrainedSolver]]

    def __init__(self, model: torch.nn.Module, tokenizer, config: EditorConfig | None = None, **how) -> None:
        super().__init__(model, tokenizer, config, **how)
        self.trunk = self.make_trunk_cache()  # each epoch runs the same statements again

    def _make_turn(self, *arguments: object) -> Turn:
        return _TrainedTurn(*arguments)

    def companions(self) -> list:
        """None: earlier statements are trained on like those of a turn."""
        return []
