"""What all editors share: streams of turns, and the state that they leave behind."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch

from stableedit_cpp.core import LifelongNormalizer, LowRankUpdate, MasterWeight, ModuleEditor, PastKeys
from stableedit_cpp.data.request import EditRequest, as_requests
from stableedit_cpp.editors.applied import AppliedTurn
from stableedit_cpp.editors.checkpoint import Checkpoint
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.edit_report import EditReport, TurnReport
from stableedit_cpp.editors.originals import OriginalWeights
from stableedit_cpp.editors.stream import names_of, run_stream
from stableedit_cpp.evaluation.teacher_forcing import token_accuracy
from stableedit_cpp.model.capture import CapturedTurn
from stableedit_cpp.model.modules import EditModule, default_edit_modules, find_modules
from stableedit_cpp.model.tokens import TokenSequence, context_length, tokenize
from stableedit_cpp.model.trunk import TrunkCache

if TYPE_CHECKING:
    from stableedit_cpp.editors.guard import LocalityGuard

__all__ = ["Editor"]


class Editor(ABC):
    """Edits a causal language model in place, one turn of requests at a time.

    A turn captures keys and value gradients under the current model, folds them into the running statistics, solves
    for the update of every edited module and applies it. Either all of that happens or nothing.

    Args:
        model: a Hugging Face causal LM; its edited weights change, its mode and ``requires_grad`` flags do not.
        tokenizer: its tokenizer.
        config: of the editor's own class; None takes its defaults.

    Attributes:
        on_turn: called with every turn once it is applied and before the next begins; if it raises, the turn is taken
            back as a whole and the error goes to the caller of ``edit``.
        guard: watches unrelated prompts after every pass; None (the default) watches none.
        weights: by module name, from the first edit on.
        normalizers: the running statistics, by group of modules.
        past_keys: second moments of the keys of earlier turns, by module name; empty while ``past_key_weight`` is 0.

    Raises:
        ValueError: for another editor's config, or if a module of ``config.edit_modules`` cannot be found or edited.
    """

    config_class: ClassVar[type[EditorConfig]]

    def __init__(self, model: torch.nn.Module, tokenizer, config: EditorConfig | None = None) -> None:
        config = self.config_class() if config is None else config
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"config must be a {self.config_class.__name__} for {type(self).__name__}, not a "
                f"{type(config).__name__}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.modules = find_modules(model, config.edit_modules or default_edit_modules(model))
        self._config = dataclasses.replace(config, edit_modules=[module.name for module in self.modules])
        self.normalizers: dict[str, LifelongNormalizer] = {}
        self.module_editors: dict[str, ModuleEditor] = {}
        self.past_keys: dict[str, PastKeys] = {}
        self._groups: dict[str, list[EditModule]] = {}
        for module in self.modules:
            group = self._group(module)
            self._groups.setdefault(group, []).append(module)
            if group not in self.normalizers:
                self.normalizers[group] = self._make_normalizer(*module.shape)
            if config.past_key_weight > 0:
                self.past_keys[module.name] = PastKeys(module.shape[0], config.past_key_rank)
            self.module_editors[module.name] = self._module_editor(module.name, group, back_offs=0)
        self.guard: LocalityGuard | None = None
        self.on_turn: Callable[[AppliedTurn], object] | None = None
        self.weights: dict[str, MasterWeight] = {}
        self._originals = OriginalWeights(self.modules)
        self.trunk = self.make_trunk_cache() if config.max_passes > 1 else None
        self.trunk_is_lent = False

    @property
    def config(self) -> EditorConfig:
        """The settings, with ``edit_modules`` by their full names, so that they mean the same where defaults or
        patterns would choose others. They stay as they are, as does what was set up for them."""
        return self._config

    @abstractmethod
    def _make_normalizer(self, key_dim: int, value_dim: int) -> LifelongNormalizer:
        """Fresh running statistics for modules of one shape."""

    def _observe(self, group: str, modules: Sequence[EditModule], captured: CapturedTurn) -> None:
        """Fold a turn into the statistics of a group, before the turn is normalised."""
        keys = [captured.keys[module.name] for module in modules]
        gradients = [captured.value_gradients[module.name] for module in modules]
        device = keys[0].device
        self.normalizers[group].observe([key.to(device) for key in keys], [g.to(device) for g in gradients])

    def edit(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Edit a stream of requests in turns of ``config.turn_size``; a last, incomplete turn is edited like any other.

        Args:
            requests: EditRequest or dicts with "prompt" and "target" (or the fields of a published data set).
            trunk: of ``make_trunk_cache()``; keeps the trunk's output of the requests beyond their turn, for audits and
                repairs, and uses what it holds already.
            progress: show a bar with edits/s and efficacy; None shows it on a terminal.

        Returns:
            What each turn did.

        Raises:
            ValueError: for a bad request (all are checked before the first turn), or a loss or gradient that is not
                finite; turns before the failing one stay applied, nothing of the failing one is.
            EditInterrupted: after Ctrl-C, once the turn in flight is finished.
            DriftLimitReached: if a turn would take the model beyond the guard's limit.
        """
        return self._run(requests, "edit", progress, trunk)

    def warm_up(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Edit a training stream first, so that the statistics are settled when the real stream begins.

        The warm-up edits stay in the model; each turn is solved once, whatever ``max_passes`` says. Arguments, result
        and errors as ``edit``.
        """
        return self._run(requests, "warm_up", progress, trunk)

    def repair(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        trunk: TrunkCache | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Solve again for requests that were edited before and no longer hold (``lifelong.repair`` finds them).

        Like ``edit``, except that a repair follows the rules of a retry: its keys are not added to the past keys a
        second time, and it feeds the statistics only with ``config.retries_feed_statistics``. Arguments, result and
        errors as ``edit``.
        """
        return self._run(requests, "repair", progress, trunk)

    def check(self, requests: Iterable[EditRequest | Mapping[str, object]]) -> None:
        """Raise what ``edit`` would raise for bad requests, without editing: before a long warm-up, say."""
        self.tokenize(as_requests(requests))

    @contextmanager
    def unedited(self) -> Iterator[torch.nn.Module]:
        """The model as it was before this editor's first edit, without a second copy of it; yields ``self.model``.

        Within the block the edited modules hold their original weights; afterwards, also after an exception, they hold
        the edited ones again, bit for bit. Blocks may be nested; editing inside one raises ValueError. What is kept for
        it, see ``OriginalWeights``.
        """
        with self._originals.shown():
            yield self.model

    def keep_original_weights(self, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take the modules' present weights, or those given by module name, as the unedited ones.

        The first ``edit`` or ``warm_up`` does this by itself; call it where the model was edited before, by what a
        session replays, say.

        Raises:
            ValueError: for weights that are not those of the edited modules; or within ``unedited()``.
        """
        self._originals.refuse_if_shown("keep its weights")
        self._originals.keep(weights)

    def original_weights(self) -> dict[str, torch.Tensor]:
        """Unedited weights by module name, in host memory and the layout and dtype of the module; not to be changed."""
        self.attach_weights()
        return {module.name: self._originals[module.name] for module in self.modules}

    def weight_changes(self) -> dict[str, torch.Tensor]:
        """What all edits together have added to the weights, by module name, in the layout of the module.

        In float32 (float64 for a float64 model), from the float32 master of a half-precision weight.

        Raises:
            ValueError: within ``unedited()``.
        """
        self.attach_weights()
        masters = {name: weight.master for name, weight in self.weights.items()}
        return {name: master - self._originals[name].to(master) for name, master in masters.items()}

    def shrink(self, share: float) -> None:
        """Keep only this share of what all edits together have added: W <- W0 + share (W - W0).

        After a stream it gives back much of what the edits cost other answers, for few of the edits, and for more of
        their generalization (docs/closed-loop.md). The statistics stay as they are.

        Raises:
            ValueError: for a share that is not in (0, 1]; while a session or a patch recorder follows the editor, which
                would not see it; or within ``unedited()``.
        """
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share must be greater than 0 and at most 1, not {share!r}")
        if self.on_turn is not None:
            raise ValueError("the editor is followed turn by turn (on_turn); what shrinks would be missing there")
        with torch.no_grad():
            for name, change in self.weight_changes().items():
                weight = self.weights[name]
                weight.master.sub_(change, alpha=1.0 - share)
                weight.live.copy_(weight.master)

    def tokenize(self, requests: Sequence[EditRequest]) -> list[TokenSequence]:
        """Prompts and targets as the editor sees them.

        Raises:
            ValueError: for a prompt or target without tokens, or longer than the model's context.
        """
        pairs = [(request.prompt, request.target) for request in requests]
        return tokenize(self.tokenizer, pairs, context_length(self.model), names_of(requests))

    def make_trunk_cache(self) -> TrunkCache | None:
        """A trunk cache for this editor's model and modules; None where nothing lies below them that could be kept."""
        return TrunkCache.where_possible(self.model, self.modules)

    def _warm_up_mode(self) -> str | None:
        return None

    def checkpoint(self) -> Checkpoint:
        """Weights and statistics as they are now, to go back to."""
        self.attach_weights()
        return Checkpoint(self.weights, self.statistics())

    def statistics(self) -> dict[str, LifelongNormalizer | PastKeys]:
        """What a stream accumulates besides the weights, by the names of ``state_dict``."""
        normalizers = {f"normalizer/{group}": normalizer for group, normalizer in self.normalizers.items()}
        return normalizers | {f"past_keys/{name}": past for name, past in self.past_keys.items()}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that edits change and later edits depend on, as ``core.save_state`` takes it.

        "weights" holds the edited weights by module name (float32 for half-precision ones, from which those are
        rounded), in the layout of the module; "normalizer/<group>" the running statistics and "past_keys/<module>" the
        past keys. They share memory with the editor: look, do not write.
        """
        self.attach_weights()
        statistics = {name: part.state_dict() for name, part in self.statistics().items()}
        return {"weights": {name: weight.master for name, weight in self.weights.items()}, **statistics}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Become what the editor that gave ``state_dict()`` was, bit for bit; the tensors may be on any device.

        Raises:
            ValueError: if it belongs to other modules or another config; nothing is changed then.
        """
        own = self.state_dict()
        shapes = {name: weight.shape for name, weight in own["weights"].items()}
        if state.keys() != own.keys() or {name: weight.shape for name, weight in state["weights"].items()} != shapes:
            raise ValueError(f"the state is not one of an editor of {', '.join(shapes)}")
        devices = {}
        for group, modules in self._groups.items():
            names = [f"normalizer/{group}", *(f"past_keys/{module.name}" for module in modules)]
            devices |= dict.fromkeys(names, modules[0].weight.device)
        parts, fresh = self.statistics(), {}
        for part, held in parts.items():
            # Counts and options are tensors without a dimension, read on the host.
            placed = {name: field.to(devices[part]) if field.ndim else field for name, field in state[part].items()}
            fresh[part] = type(held).from_state_dict(placed)
        for part, held in parts.items():
            held.restore(fresh[part])
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.master.copy_(state["weights"][name])
                weight.live.copy_(weight.master)

    def replay(self, turn: AppliedTurn) -> None:
        """Do again what a turn did to weights and statistics, from its record and without running the model.

        The result is the same, bit for bit, on the same machine with the same number of threads.
        """
        self.attach_weights()
        for number, applied in enumerate(turn.passes):
            self.compute_updates(turn.kind, number, applied.captured, TurnReport())
            for name, update in applied.updates.items():
                self.weights[name].apply(update)
        self.remember(turn.kind, turn.passes[0].captured)

    def add(self, updates: Mapping[str, LowRankUpdate]) -> None:
        """Add to the weights, by module name; the statistics stay as they are.

        Raises:
            ValueError, LinAlgError: for an update that does not fit or is not finite; nothing is added then.
        """
        self.attach_weights()
        for name, update in updates.items():
            self.weights[name].check(update)
        for name, update in updates.items():
            self.weights[name].apply(update)

    def _run(self, requests: Iterable, kind: str, progress: bool | None, trunk: TrunkCache | None = None) -> EditReport:
        own = self.trunk
        if trunk is not None:
            self.trunk, self.trunk_is_lent = trunk, True
        try:
            return run_stream(self, as_requests(requests), kind, progress)
        finally:
            self.trunk, self.trunk_is_lent = own, False

    def compute_updates(
        self, kind: str, number: int, captured: CapturedTurn, report: TurnReport, back_offs: int = 0
    ) -> dict[str, LowRankUpdate]:
        """Fold pass ``number`` of a turn into the statistics and solve it; by module name, on the module's device.

        Args:
            kind: of the turn.
            report: gets the whitening that was used and the updates' norms.
            back_offs: how often the guard has refused this pass; it was folded in the first time.
        """
        mode = self._warm_up_mode() if kind == "warm_up" else None
        feed = back_offs == 0 and ((number == 0 and kind != "repair") or self.config.retries_feed_statistics)
        feed = feed and (kind == "warm_up" or not self.config.frozen_statistics)
        editors = dict(self.module_editors)
        for group, modules in self._groups.items():
            if feed or self.normalizers[group].count == 0:
                self._observe(group, modules, captured)
            report.whitening[group] = self.normalizers[group].effective_mode(mode)
            if back_offs > 0:
                editors |= {module.name: self._module_editor(module.name, group, back_offs) for module in modules}
        updates = self.solve(captured, editors, mode)
        report.update_norms |= {name: update.norm() for name, update in updates.items()}
        return updates

    def solve(
        self, captured: CapturedTurn, editors: Mapping[str, ModuleEditor], mode: str | None = None
    ) -> dict[str, LowRankUpdate]:
        """Updates for what was captured, under the statistics as they are; nothing is observed or added.

        Args:
            editors: by module name, on this editor's statistics.
            mode: whitening that overrides the configured one.
        """
        updates: dict[str, LowRankUpdate] = {}
        for modules in self._groups.values():
            device = captured.keys[modules[0].name].device  # that of the group's statistics
            for module in modules:
                keys, gradients = captured.keys[module.name], captured.value_gradients[module.name]
                update = editors[module.name].compute_update(keys.to(device), gradients.to(device), mode)
                home = module.weight.device
                if home != device:
                    update = LowRankUpdate(update.left.to(home), update.right.to(home))
                updates[module.name] = update
        return updates

    def _module_editor(self, name: str, group: str, back_offs: int) -> ModuleEditor:
        """The editor of a module on its statistics; back-offs make its step smaller and its ridge stronger."""
        return ModuleEditor(
            self.normalizers[group],
            step_size=self.config.step_size * (self.guard.step_factor**back_offs if back_offs else 1.0),
            ridge=self.config.ridge * (self.guard.ridge_factor**back_offs if back_offs else 1.0),
            past_key_weight=self.config.past_key_weight,
            past_keys=self.past_keys.get(name),
        )

    def remember(self, kind: str, captured: CapturedTurn) -> None:
        """Add the keys of a turn's first pass to the past keys."""
        if kind != "repair" and self.past_keys:
            self.fold_keys(captured, self.past_keys)

    def fold_keys(self, captured: CapturedTurn, into: Mapping[str, PastKeys]) -> None:
        """Add captured keys to second moments, by module name."""
        for modules in self._groups.values():
            device = captured.keys[modules[0].name].device  # that of the group's statistics
            for module in modules:
                into[module.name].update(captured.keys[module.name].to(device))

    def accuracy(self, sequences: Sequence[TokenSequence]) -> torch.Tensor:
        return token_accuracy(self.model, sequences, max_tokens=self.config.max_tokens_per_forward, trunk=self.trunk)

    def _group(self, module: EditModule) -> str:
        if self.config.statistics == "per_module":
            return module.name
        key_dim, value_dim = module.shape
        return f"{key_dim} -> {value_dim}"

    def attach_weights(self) -> None:
        """Take hold of the weights; again where the caller has moved or changed them since the last call."""
        self._originals.refuse_if_shown("edit or export it")
        if not self._originals:
            self._originals.keep()
        for module in self.modules:
            held, live = self.weights.get(module.name), module.weight
            same = held is not None and held.live.data_ptr() == live.data_ptr() and held.live.dtype == live.dtype
            if not (same and torch.equal(held.master.to(live.dtype), live)):
                self.weights[module.name] = MasterWeight(live, module.layout, exact_revert=False)
