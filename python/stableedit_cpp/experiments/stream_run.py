"""Runs one stream of edits with checkpoints, and goes on where it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import torch
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import EditInterrupted, TurnReport, make_editor
from stableedit_cpp.evaluation.answers import token_accuracy
from stableedit_cpp.experiments.checkpoints import Checkpoints
from stableedit_cpp.experiments.convergence import Convergence
from stableedit_cpp.experiments.cost import Cost
from stableedit_cpp.experiments.geometry import Geometry
from stableedit_cpp.experiments.run_directory import RunDirectory
from stableedit_cpp.experiments.settings import RunSettings
from stableedit_cpp.files.digest import model_digest
from stableedit_cpp.files.environment import PeakMemory, resident_bytes
from stableedit_cpp.model.capture import NotFiniteError
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["StreamRun"]

_PROBE = 8  # requests of each turn that are checked right after it


class StreamRun:
    """One run: editor, model, stream and results directory.

    Args:
        model: unedited; it is unedited again after ``run``, also after an error.
        trunk: of the model and the editor's modules; speeds up scoring and side effects.
        editing_trunk: another one, for editors that edit the same turns one after the other. One of its own: what it
            keeps was computed in the batches of these turns, so a run gives the bits that it gives alone.
        answers: what the unedited model answers to unrelated prompts, by their token ids; kept for other runs on it.
        siblings: directories of other runs of the same stream; what one of them has measured of the unedited model is
            taken over.
        snapshot_seconds: a kill costs at most so much work, and one turn.
        keep_state: leave the state in a directory that is done.
        progress: show bars; None shows them on a terminal.
    """

    def __init__(
        self,
        settings: RunSettings,
        directory: RunDirectory,
        model: torch.nn.Module,
        tokenizer,
        *,
        trunk: TrunkCache | None = None,
        editing_trunk: TrunkCache | None = None,
        answers: dict | None = None,
        siblings: Sequence[Path] = (),
        snapshot_seconds: float = 60.0,
        keep_state: bool = False,
        progress: bool | None = None,
    ) -> None:
        self.settings, self.directory = settings, directory
        self.editor = make_editor(model, tokenizer, settings.editor.config)
        self.editor.guard = None  # what an editor does to a model is measured, also where that ruins it
        self.trunk, self._editing_trunk, self._siblings = trunk, editing_trunk, siblings
        self._snapshot_seconds, self._keep_state, self._progress = snapshot_seconds, keep_state, progress
        self._turn_size = settings.editor.config.turn_size
        self._cost = Cost(self.editor.modules[0].device)
        self._geometry = Geometry(self.editor, settings.geometry, settings.source.seed) if settings.geometry else None
        how = {"trunk": trunk, "answers": answers, "progress": progress}
        self._checkpoints = Checkpoints(settings, directory, self.editor, self._cost, **how)
        self._convergence = Convergence(directory.path / "covariance") if settings.convergence else None

    def run(self) -> None:
        """Do all that is left to do.

        Raises:
            KeyboardInterrupt: after Ctrl-C; what was done is kept, the same call goes on.
        """
        complete = self.settings.to_dict(model_digest(self.editor.model), self.editor.config)
        self.directory.check(complete)
        if self.directory.done:
            return
        originals = self.editor.original_weights()
        try:
            self._resume()
            self.directory.begin(complete, self._cost.edits)
            self._do()
            if self._convergence:
                self.directory.document["convergence"] = self._convergence.fit(self.editor)
            self.directory.finish(self._cost.to_dict(), keep_state=self._keep_state)
        finally:
            for module in self.editor.modules:
                module.write(originals[module.name])

    def _do(self) -> None:
        checkpoints = self._checkpoints
        if self.directory.checkpoint(0) is None and not checkpoints.take_over(self._siblings):
            checkpoints.take()
        if self._due():  # an earlier process was stopped while it took this checkpoint
            checkpoints.take()
        try:
            self._stream()
            self._after_stream()
        except (NotFiniteError, torch.linalg.LinAlgError) as error:
            # The model takes no more edits: score what is left of it, and let that be the end of the stream.
            cost = self._cost
            self.directory.document["collapsed"] = {"edits": cost.edits, "turn": cost.turns, "reason": str(error)}
            if not checkpoints.taken():
                checkpoints.take()

    def _stream(self) -> None:
        settings, cost = self.settings, self._cost
        total = settings.edits + settings.warm_up.size * bool(settings.warm_up)
        bar = tqdm(
            total=total,
            initial=cost.edits + cost.warm_up,
            desc=settings.name,
            unit="edit",
            disable=None if self._progress is None else not self._progress,
        )
        self._saved_at, correct, looked_at = time.monotonic(), 0.0, 0
        with bar:
            for kind, requests in self._turns():
                line, interrupted = self._turn(kind, requests)
                bar.update(len(requests))
                correct, looked_at = correct + line["efficacy_after"], looked_at + 1
                bar.set_postfix(efficacy=f"{correct / looked_at:.3f}", now=f"{line['efficacy_after']:.2f}")
                due = self._due()
                if due or interrupted or time.monotonic() - self._saved_at >= self._snapshot_seconds:
                    self._save_state()
                if interrupted:
                    raise KeyboardInterrupt(
                        f"{settings.name} stopped after {cost.edits} of {settings.edits} edits; the same command goes "
                        "on from there"
                    )
                if due:
                    self._checkpoints.take()

    def _after_stream(self) -> None:
        steps, cost = self.settings.after, self._cost
        if cost.steps == len(steps):
            return
        self.editor.on_turn = None  # geometry is that of the stream
        requests = list(self.settings.source.requests(0, self.settings.edits))
        how = {"trunk": self.trunk, "progress": self._progress}
        for number in range(cost.steps, len(steps)):
            try:
                done = steps[number].run(self.editor, requests, steps[number - 1] if number else None, **how)
            except EditInterrupted:
                raise KeyboardInterrupt(
                    f"{self.settings.name} stopped in the step {steps[number]} after its stream; the same command does "
                    "that step anew"
                ) from None
            line = {"turn": cost.turns + 1, "edits": cost.edits, "warm_up": cost.warm_up, **done}
            self._add_turn({**line, "resident_bytes": resident_bytes(), "geometry": None})
            self._save_state()
            self._checkpoints.take()

    def _turns(self) -> Iterator[tuple[str, list[EditRequest]]]:
        """What is left of the stream, turn by turn; the source is read as the stream goes on."""
        settings, cost = self.settings, self._cost
        streams = {"edit": settings.source.requests(cost.edits, settings.edits)}
        if settings.warm_up:
            streams["warm_up"] = settings.source.warm_up_requests(cost.warm_up, settings.warm_up.size)
        while cost.edits < settings.edits or self._warm_up_is_next():
            kind = "warm_up" if self._warm_up_is_next() else "edit"
            done = self._cost.warm_up if kind == "warm_up" else self._cost.edits
            requests = list(islice(streams[kind], self._turn_size - done % self._turn_size))
            if not requests:
                raise ValueError(f"the stream of {settings.source.name} ended early: its files changed during the run")
            yield kind, requests

    def _warm_up_is_next(self) -> bool:
        settings, cost = self.settings, self._cost
        return bool(settings.warm_up) and cost.warm_up < settings.warm_up.size and cost.edits >= settings.warm_up_place

    def _turn(self, kind: str, requests: list[EditRequest]) -> tuple[dict, bool]:
        """Edit one turn and write its line, or several where the editor cuts at a prompt that comes twice; the last
        line, and whether Ctrl-C was pressed meanwhile."""
        call = self.editor.warm_up if kind == "warm_up" else self.editor.edit
        interrupted, cost, memory = False, self._cost, PeakMemory()
        try:
            with memory:
                report = call(requests, trunk=self._editing_trunk, outcomes=False, progress=False)
        except EditInterrupted as interrupt:
            report, interrupted = interrupt.report, True
        begin = 0
        for turn in report.turns:
            line = self._line(kind, requests[begin : begin + turn.requests], turn, report.seconds / len(report.turns))
            line["extra_bytes"] = memory.extra_bytes
            if turn is not report.turns[-1]:
                line["geometry"] = None  # only the last is known
            begin += turn.requests
            self._add_turn(line)
        if self._convergence:
            self._convergence.look(self.editor, cost.turns, cost.edits + cost.warm_up)
        return line, interrupted

    def _line(self, kind: str, requests: list[EditRequest], report: TurnReport, whole: float) -> dict:
        """What is written down of a turn that took ``whole`` seconds."""
        cost, turn, begin = self._cost, asdict(report), time.perf_counter()
        del turn["failed"]  # nobody looked
        limit = self.settings.editor.config.max_tokens_per_forward
        probe = self.editor.tokenize(requests[:_PROBE])
        right = token_accuracy(self.editor.model, probe, max_tokens=limit, trunk=self.editor.trunk)
        turn["efficacy_after"] = float(right.nan_to_num(0.0).mean())  # the next turn says that a model is broken
        seconds = turn.pop("seconds")
        if self._geometry:
            seconds["geometry"] = self._geometry.seconds
        seconds |= {"other": whole - sum(seconds.values()), "probe": time.perf_counter() - begin}
        return {
            "turn": cost.turns + 1,
            "kind": kind,
            "edits": cost.edits + len(requests) * (kind == "edit"),
            "warm_up": cost.warm_up + len(requests) * (kind == "warm_up"),
            **turn,
            "seconds": seconds,
            "resident_bytes": resident_bytes(),
            "geometry": self._geometry.latest if self._geometry else None,
        }

    def _add_turn(self, line: dict) -> None:
        self.directory.add_turn(line)
        self._cost.add_turn(line)

    def _due(self) -> bool:
        return self._checkpoints.due() and not self._warm_up_is_next()

    def _save_state(self) -> None:
        """What a later process goes on from."""
        geometry = self._geometry.state_dict() if self._geometry else {}
        self.directory.save_state(self._cost.turns, {**self.editor.state_dict(), **geometry})
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        """Go to where an earlier process was when it last saved its state; to the beginning if it never did."""
        state = self.directory.load_state()
        if state is None:
            return
        geometry = {part: fields for part, fields in state.items() if part.partition("/")[0] == "geometry"}
        self.editor.load_state_dict({part: fields for part, fields in state.items() if part not in geometry})
        if self._geometry:
            self._geometry.load_state_dict(geometry)
        for line in self.directory.turns_so_far():
            self._cost.add_turn(line)
        for entry in self.directory.document["checkpoints"]:
            self._cost.add_checkpoint(entry)
