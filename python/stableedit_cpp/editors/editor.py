"""What all editors share, as their users see it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch

from stableedit_cpp.core import LifelongNormalizer, PastKeys
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.stream import as_stream
from stableedit_cpp.data.superseding import warn_of_contradictions
from stableedit_cpp.editors.anchors import Anchors
from stableedit_cpp.editors.applied import AppliedTurn
from stableedit_cpp.editors.changes import SeenUnedited
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.edit_report import EditReport
from stableedit_cpp.editors.followers import Followers
from stableedit_cpp.editors.guard import LocalityGuard
from stableedit_cpp.editors.replays import Replays
from stableedit_cpp.editors.solver import Solver
from stableedit_cpp.editors.state import SavedState
from stableedit_cpp.editors.statements import Statements
from stableedit_cpp.editors.stream import run_stream
from stableedit_cpp.editors.together import check_together
from stableedit_cpp.editors.turn import Turn, owners_of
from stableedit_cpp.editors.weights import Checkpoint, EditedWeights
from stableedit_cpp.editors.work import Guard, Work
from stableedit_cpp.errors import ModelBroken, RankLost
from stableedit_cpp.model.form import Form, find_form
from stableedit_cpp.model.kind import check_editable, check_tokenizer
from stableedit_cpp.model.modules import EditModule, find_modules
from stableedit_cpp.model.outputs import default_edit_modules
from stableedit_cpp.model.packed import unpack
from stableedit_cpp.model.ranks import Distributed, data_parallel, ranks
from stableedit_cpp.model.split import refuse_split, who_is_lost
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.model.trunk import TrunkCache
from stableedit_cpp.model.untouched import input_device

__all__ = ["Editor"]

# A model need not be able to generate, say, to be edited. Not all exceptions: one may be that of a signal's handler.
_UNGUARDED = (ValueError, TypeError, AttributeError, LookupError, RuntimeError)


class Editor(SeenUnedited, SavedState):
    """Edits a causal language model in place, one turn of requests at a time.

    A turn captures keys and value gradients under the current model, folds them into the running statistics, solves
    for the update of every edited module and applies it. Either all of that happens or nothing.

    Args:
        model: a Hugging Face causal LM; its edited weights change, its mode and ``requires_grad`` flags do not. Of a
            quantised one the modules that are edited are made dense, and stay so.
        tokenizer: its tokenizer.
        config: of the editor's own class; None takes its defaults.
        guard: what watches unrelated prompts after every pass, so that edits stop before they ruin the model: a
            ``LocalityGuard``, None for none, or "default" for one with its defaults, which is made at the first edit
            and runs the unedited model once for it. It is no part of what ``save`` and sessions keep.
        distributed: "auto" edits with all processes of the default group of ``torch.distributed``, where that is up,
            each with the model in its own memory; or a process group. All must make the same calls with the same
            arguments. None edits alone, or within ``data_parallel`` as that says.

    A subclass says what is its own: ``config_class``, ``solver_class``, and with ``owns_rows`` whether each row of an
    update belongs to one request, which can then be taken out alone, and with ``edits_split`` whether it edits weights
    that are split over processes (``model.split``).

    Attributes:
        modules: the modules that are edited.
        form: of prompts and answers, raw or chat, with an end or without.
        weights: their weights, by module name from the first edit on, and the gate through which these change.
        solver: the mathematics, with the running statistics.

    Raises:
        ValueError: for what is no causal language model, or one that is wrapped or carries adapters of peft; another
            editor's config; if a module of ``config.edit_modules`` cannot be found or edited, or a
            chat template or end of answers that is asked for is not there or of no use.
    """

    config_class: ClassVar[type[EditorConfig]]
    solver_class: ClassVar[type[Solver]]
    edits_experts: ClassVar[bool] = False
    owns_rows: ClassVar[bool] = True
    edits_split: ClassVar[bool] = False

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer,
        config: EditorConfig | None = None,
        *,
        guard: Guard | Literal["default"] | None = "default",
        distributed: Distributed = None,
    ) -> None:
        check_editable(model)
        check_tokenizer(tokenizer)
        config = self.config_class() if config is None else config
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"config must be a {self.config_class.__name__} for {type(self).__name__}, not a "
                f"{type(config).__name__}"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.modules = self.modules_of(model, config)
        if unpack(model, {module.name: module.module for module in self.modules}):
            self.modules = self.modules_of(model, config)
        if not self.edits_split:
            refuse_split(self.modules, f"{type(self).__name__}, unlike StableEdit and UltraEdit,")
        experts = [module.name for module in self.modules if module.is_expert]
        if experts and not self.edits_experts:
            raise ValueError(
                f"edit_modules: {experts[0]} is one expert of a mixture, which {type(self).__name__} does not edit; "
                "StableEdit and UltraEdit do, or name other modules"
            )
        self.form: Form = find_form(model, tokenizer, **config.form)
        found = {"edit_modules": [module.name for module in self.modules], "chat_template": self.form.chat}
        self._config = dataclasses.replace(config, **found)
        self.solver = self.solver_class(self.modules, self._config)
        self.weights = EditedWeights(self.modules, self.solver.statistics())
        self.guard = guard
        self.distributed = distributed
        self._compared = False  # whether all weights were, with those of other processes
        self._beside: list[Anchors | Replays] | None = None  # not before they are needed
        self.trunk = self.make_trunk_cache() if config.max_passes > 1 else None

    @staticmethod
    def modules_of(model: torch.nn.Module, config: EditorConfig) -> list[EditModule]:
        """Those that an editor with this config edits; raises as the constructor."""
        automatic = config.step_size == "auto"
        names = config.edit_modules or default_edit_modules(model, automatic=automatic)
        return find_modules(model, names, packed=True)

    @property
    def config(self) -> EditorConfig:
        """The settings, with ``edit_modules`` by their full names and ``chat_template`` decided, so that they mean the
        same where defaults or patterns would choose others. They stay as they are, as does what was set up for them."""
        return self._config

    @property
    def normalizers(self) -> dict[str, LifelongNormalizer]:
        """The running statistics, by group of modules."""
        return self.solver.normalizers

    @property
    def past_keys(self) -> dict[str, PastKeys]:
        """Second moments of the keys of earlier turns, by module name; empty while ``past_key_weight`` is 0."""
        return self.solver.past_keys

    @property
    def followers(self) -> Followers:
        """Who hears of every change of the weights, and may refuse it."""
        return self.weights.followers

    @property
    def guard(self) -> Guard | None:
        """What watches unrelated prompts after every pass, and keeps the model from drifting too far; may be set. The
        default one is made where it is first needed, or asked for; None where the model gives it nothing to watch."""
        if self._guard == "default":
            try:
                self._guard = LocalityGuard(self, progress=False)
            except ModelBroken:  # the first turn says so
                self._guard = None
            except RankLost:
                raise
            except _UNGUARDED as error:
                self._guard = None
                reason = str(error) or type(error).__name__
                warnings.warn(f"edits are not guarded against drift of other answers: {reason}", stacklevel=4)
        return self._guard

    @guard.setter
    def guard(self, guard: Guard | Literal["default"] | None) -> None:
        if guard is not None and guard != "default" and not hasattr(guard, "look"):
            raise ValueError(f"guard must be a LocalityGuard, 'default', or None for none, not {guard!r}")
        self._guard = guard

    @property
    def on_turn(self) -> Callable[[AppliedTurn], object] | None:
        """Called with every turn once it is applied and before the next begins; if it raises, the turn is taken back as
        a whole and the error goes to the caller of ``edit``."""
        return self.followers.on_turn

    @on_turn.setter
    def on_turn(self, listener: Callable[[AppliedTurn], object] | None) -> None:
        self.followers.on_turn = listener

    def edit(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        trunk: TrunkCache | None = None,
        outcomes: bool | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Edit a stream of requests in turns of ``config.turn_size``; a last, incomplete turn is edited like any other.

        A turn of which all has taken already (``take_probability``) is not solved for where ``max_passes`` is more than
        one; of others, what had taken is said in the report.

        A turn ends early before a request whose prompt, or a variant, it has already: of two answers the later is to
        hold, and must see the earlier one done. A warning says once where two requests contradict each other.

        Args:
            requests: EditRequest or dicts with "prompt" and "target" (or the fields of a published data set): a list, a
                table, a ``Path``, or any iterable, which is read to its end before the first turn. Of more than 10,000
                that are no list only the next turns are in memory (``open_requests``).
            trunk: of ``make_trunk_cache()``; keeps the trunk's output of the requests beyond their turn, for audits and
                repairs, and uses what it holds already.
            outcomes: True finds out after each turn which requests took, and what the model answers to the others
                (``report.failed``, ``report.outcomes``). None finds out only which took, and only where ``max_passes``
                is more than one; False nothing. Which took costs a forward pass above the trunk, 7 % of a turn of the
                closed-loop preset (SmolLM2, ZsRE). Answers are generated: where all of a turn fails, half of such a
                turn's time again, and more than twice that of a turn of one pass.
            progress: show a bar with edits/s and efficacy; None shows it on a terminal.

        Returns:
            What each turn did.

        Raises:
            ValueError: for a bad request (all are checked before the first turn), or a loss or gradient that is not
                finite; turns before the failing one stay applied, nothing of the failing one is.
            EditInterrupted: after Ctrl-C, once the turn in flight is finished.
            DriftLimitReached: if a turn would take the model beyond the guard's limit.
            Whatever ends the stream has ``report``: the turns before it, which are applied.
        """
        return self._run(requests, "edit", trunk, outcomes, progress)

    def warm_up(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        trunk: TrunkCache | None = None,
        outcomes: bool | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Edit a training stream first, so that the statistics are settled when the real stream begins.

        The warm-up edits stay in the model; each turn is solved once, whatever ``max_passes`` says. Arguments, result
        and errors as ``edit``.
        """
        return self._run(requests, "warm_up", trunk, outcomes, progress)

    def repair(
        self,
        requests: Iterable[EditRequest | Mapping[str, object]],
        *,
        trunk: TrunkCache | None = None,
        outcomes: bool | None = None,
        progress: bool | None = None,
    ) -> EditReport:
        """Solve again for requests that were edited before and no longer hold (``lifelong.repair`` finds them).

        Like ``edit``, except that a repair follows the rules of a retry: its keys are not added to the past keys a
        second time, and it feeds the statistics only with ``config.retries_feed_statistics``. Arguments, result and
        errors as ``edit``.
        """
        return self._run(requests, "repair", trunk, outcomes, progress)

    def check(self, requests: Iterable[EditRequest | Mapping[str, object]]) -> None:
        """Raise what ``edit`` would raise for bad requests, without editing: before a long warm-up, say."""
        self._statements.check(as_stream(requests))

    def tokenize(self, requests: Sequence[EditRequest], names: Sequence[str] | None = None) -> list[TokenSequence]:
        """The statements of requests as the editor sees them, in its form: of each request prompt and target, then its
        variants.

        Args:
            names: what to call each statement in an error message (``stream.names_of``).

        Raises:
            ValueError: for a prompt or target without tokens, or longer than the model's context, or a prompt that the
                chat template refuses.
        """
        return self._statements.tokens(requests, names)

    @property
    def _statements(self) -> Statements:
        return Statements(self.model, self.tokenizer, self.form)

    def make_trunk_cache(self) -> TrunkCache | None:
        """A trunk cache for this editor's model and modules; None where nothing lies below them that could be kept."""
        return TrunkCache.where_possible(self.model, self.modules)

    def replay(self, turn: AppliedTurn) -> None:
        """Do again what a turn did to weights and statistics, from its record and without running the model.

        The result is the same, bit for bit, on the same machine with the same number of threads.
        """

        def work(_before: Checkpoint) -> None:
            for number, applied in enumerate(turn.passes):
                self.solver.replay(turn.kind, number, applied.captured)
                self.solver.accept(applied.step_size, applied.ridge)
                self.weights.apply(applied.updates)
            sequences = self.tokenize(turn.requests) if self.solver.past_requests is not None else ()
            first = turn.passes[0].captured if turn.passes else None
            self.solver.remember(turn.kind, first, sequences, owners_of(turn.requests) if sequences else ())

        self.weights.change(work, "doing a turn again")

    def forget(self, requests: Sequence[EditRequest], again: Sequence[tuple[EditRequest, str]] = ()) -> None:
        """Replay these requests in no later turn: they were taken out of the model. Within a change of the weights.

        Args:
            again: requests that answer a question again since those are gone, each with that question; replayed from
                now on.
        """
        past = self.solver.past_requests
        if past is None:
            return
        past.forget(self.tokenize(requests))
        back = [self.tokenize([request])[list(request.answers).index(question)] for request, question in again]
        numbers = list(dict.fromkeys(request.id for request, _ in again))
        past.add(back, [numbers.index(request.id) for request, _ in again])

    def edit_again(
        self, requests: Sequence[EditRequest], kind: Literal["edit", "warm_up", "repair"], passes: int
    ) -> None:
        """Edit the requests of a turn again as they were, with as many passes as it had; from a record without factors.

        The result is the same, bit for bit, on the same machine with the same number of threads. Errors as ``edit``.
        """
        self._run(requests, kind, None, False, False, passes)

    def companions(self) -> list[Anchors | Replays]:
        """What adds rows of its own to each pass."""
        if self._beside is None:
            config, beside = self.config, []
            how = {"max_tokens": config.max_tokens_per_forward}
            if config.anchors > 0:
                shown = (self.form, self.unedited)
                anchors = Anchors(self.model, self.tokenizer, self.modules, *shown, count=config.anchors, **how)
                beside.append(anchors)
            if config.replays > 0:
                how |= {"micro_batch": config.micro_batch}
                beside.append(Replays(self.model, self.modules, count=config.replays, **how))
            self._beside = beside  # all of them or none
        return self._beside

    def _run(
        self,
        requests: Iterable,
        kind: Literal["edit", "warm_up", "repair"],
        trunk: TrunkCache | None,
        outcomes: bool | None,
        progress: bool | None,
        passes: int | None = None,
    ) -> EditReport:
        with data_parallel(self.distributed), who_is_lost(self.modules):
            ranks().serve(input_device(self.model))
            progress = progress if ranks().lead else False

            def read() -> tuple[Sequence[EditRequest], Callable]:
                found = as_stream(requests, progress=progress)
                return found, self._statements.of_turns(found, self.config.turn_size, progress, self.tokenize)

            requests, tokens = ranks().everywhere("reading requests", read)
            if ranks().size > 1 and passes is None:  # what is done again was compared then
                check_together(self, kind, requests, outcomes, whole=not self._compared)
                self._compared = True
            warn_of_contradictions(requests)
            lent = trunk is not None
            trunk = trunk if lent else self.trunk
            work = Work(
                self.model,
                self.tokenizer,
                self.config,
                self.form,
                self.weights,
                self.solver,
                self.guard if requests and passes is None else None,  # a turn that is done again was let pass before
                self.companions() if kind != "warm_up" else (),
                trunk,
                lent,
                outcomes=outcomes or (outcomes is None and kind != "warm_up" and self.config.max_passes > 1),
                answers=bool(outcomes),
                passes=passes,
            )
            return run_stream(work, kind, requests, tokens, progress, self._make_turn)

    def _make_turn(self, *arguments: object) -> Turn:
        """A turn of a stream, with the arguments of ``Turn``; what another kind of editor puts its own in place of."""
        return Turn(*arguments)
