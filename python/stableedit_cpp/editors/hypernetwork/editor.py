"""Editors with a hypernetwork: trained first, kept in a file, and then editors like any other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.editors.editor import Editor
from stableedit_cpp.editors.hypernetwork.config import HypernetworkConfig
from stableedit_cpp.editors.hypernetwork.solver import HyperSolver
from stableedit_cpp.editors.hypernetwork.training import Training, TrainingReport
from stableedit_cpp.editors.hypernetwork.training_file import TrainingFile
from stableedit_cpp.editors.identity import identity
from stableedit_cpp.editors.saved import SavedEditor
from stableedit_cpp.model.modules import EditModule, find_modules

__all__ = ["HypernetworkEditor"]


class HypernetworkEditor(Editor):
    """An editor whose ridge targets a hypernetwork makes of keys and value gradients (``HyperNetwork``).

    Untrained the network is the identity: the editor is then ULTRAEDIT with ``<h, h_hat>`` in the place of
    ``||h_hat||^2``. ``train`` it on requests with rephrases and unrelated prompts, or begin with a network that was
    (``config.hypernetwork``). Network and running statistics belong to the editor's state, in ``save`` and in sessions.
    """

    config: HypernetworkConfig
    solver: HyperSolver
    solver_class = HyperSolver

    def __init__(self, model: torch.nn.Module, tokenizer, config: HypernetworkConfig | None = None, **how) -> None:
        trained = None
        if isinstance(config, self.config_class) and config.hypernetwork is not None:
            trained = SavedEditor.read(config.hypernetwork)
            config = self._as_trained(config, trained, model)
        super().__init__(model, tokenizer, config, **how)
        if trained is not None:
            trained.check(model, tokenizer, self.modules, self.form)
            parts = self.solver.statistics()
            devices = self.solver.devices()
            for name, state in trained.state.items():
                placed = {key: field.to(devices[name]) if field.ndim else field for key, field in state.items()}
                parts[name].restore(type(parts[name]).from_state_dict(placed))
            self._config = dataclasses.replace(self.config, hypernetwork=None)

    def train(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        checkpoint: str | Path | None = None,
        progress: bool | None = None,
    ) -> TrainingReport:
        """Train the hypernetwork on a stream of requests, in turns of ``config.turn_size`` (``Training``). Their edits
        do not stay in the model: its weights are then what they were. The running statistics go on with the network.

        Anchors, replays, past keys and the guard take no part; each turn is solved once.

        Args:
            requests: each with ``rephrase`` and, unless ``locality_weight`` is 0, ``locality_prompt`` and
                ``locality_target``.
            checkpoint: file that keeps the training, every five minutes. Where there is one the training goes on from
                it as if it had not been stopped; it is yours to remove when what was trained is saved.
            progress: show a bar; None shows it on a terminal.

        Raises:
            ValueError: for a bad request, or one without what training needs; a checkpoint of another training; or if a
                follower refuses, a session say. OSError: if the checkpoint cannot be written.
            ModelBroken: where the stream's edits have broken the model.
            Whatever is raised, Ctrl-C included: weights, network and statistics are as they were.
        """
        requests = as_requests(requests)
        training = Training(self, requests)
        file = None if checkpoint is None else TrainingFile(checkpoint, self, requests)
        self.weights.change(lambda _: training.run(progress, file), "training its hypernetwork")
        return training.report

    def save_hypernetwork(self, path: str | Path) -> None:
        """Write network, running statistics and config to a file that ``config.hypernetwork`` may name, with what tells
        the model, its edited modules and the tokenizer from others. Whole or not at all.

        Raises:
            OSError: if it cannot be written. ValueError: within ``unedited()``.
        """
        model = identity(self.model, self.tokenizer, self.modules, self.form, self.original_weights())
        state = self.state_dict()
        kept = {name: part for name, part in state.items() if name.startswith(("hypernetwork/", "normalizer/"))}
        SavedEditor(self.config.to_json(), kept, model).write(path)

    @classmethod
    def modules_of(cls, model: torch.nn.Module, config: HypernetworkConfig) -> list[EditModule]:
        if config.hypernetwork is not None and config.edit_modules is None:
            trained = cls.config_class.from_json(SavedEditor.read(config.hypernetwork).config)
            return find_modules(model, trained.edit_modules, packed=True)
        return super().modules_of(model, config)

    def _as_trained(
        self, config: HypernetworkConfig, trained: SavedEditor, model: torch.nn.Module
    ) -> HypernetworkConfig:
        """The config, with what belongs to the network in the file as it was trained.

        Raises:
            ValueError: if that was for another editor, or other modules.
        """
        path = config.hypernetwork
        if {name.partition("/")[0] for name in trained.state} != {"hypernetwork", "normalizer"}:
            raise ValueError(f"{path} was not written by save_hypernetwork()")
        theirs = type(config).from_json(trained.config)
        if config.edit_modules is not None:
            own = [module.name for module in find_modules(model, config.edit_modules, packed=True)]
            if own != theirs.edit_modules:
                raise ValueError(
                    f"the hypernetwork {path} was trained for {', '.join(theirs.edit_modules)}, not for edit_modules "
                    f"{', '.join(own)}; leave edit_modules to it, or train another"
                )
        same = ("edit_modules", "step_size", "ridge", "rank", "blocks")
        same += ("statistics", "unbiased_batches", "micro_batch", "prompt_rows")  # what was normalised
        return dataclasses.replace(config, **{name: getattr(theirs, name) for name in same})
