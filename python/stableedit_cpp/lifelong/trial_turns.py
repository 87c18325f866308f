"""Two turns of a stream, edited in earnest, measured and taken back: what a plan is made of."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from stableedit_cpp.core import Whitener
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import AppliedTurn, Editor
from stableedit_cpp.editors.stream import turns_of
from stableedit_cpp.files.environment import PeakMemory, resident_bytes
from stableedit_cpp.lifelong.journal.codec import encode_turn
from stableedit_cpp.lifelong.journal.snapshots import state_fingerprints

__all__ = ["Clock", "Trial", "TrialTurn", "sizes_of", "try_turns"]

Clock = Callable[[], float]
_FRAME = 400  # bytes of a record for its header, time, number, digests and the names of its tensors
_PRODUCT = 1024  # of square matrices, whose speed stands for that of a factorisation


@dataclass(frozen=True)
class TrialTurn:
    """One turn that was tried.

    Attributes:
        characters: of its statements, which stand for the work that it is. rows: answer tokens of its first pass.
        decompositions: that it had. record: bytes of its record in a journal, by detail.
    """

    requests: int
    characters: int
    rows: int
    passes: int
    seconds: float
    decompositions: int
    record: Mapping[str, int]


@dataclass(frozen=True)
class Trial:
    """What was measured, bytes and seconds.

    Attributes:
        turns: one or two; the last is a usual one, the first of two that with the most to do, and the first of all.
        once: seconds before the first turn: what a guard asks the unedited model.
        resident: host memory before. peaks: most memory by place, "cpu" among them, without the copy that the trial
            itself kept to go back to.
        trunk: host memory of its trunk cache. state: of the statistics, by name.
        decomposition: seconds of one of each group of statistics that has any. product: floating-point operations a
            second of matrix products.
    """

    turns: Sequence[TrialTurn]
    once: float
    resident: int
    peaks: Mapping[str, int]
    trunk: int
    state: Mapping[str, int]
    decomposition: Mapping[str, float]
    product: float


def sizes_of(requests: Sequence[EditRequest], turn_size: int) -> list[tuple[slice, int]]:
    """The turns of a stream, and the characters of each one's statements."""
    sizes = [sum(len(p) + len(t) for p, t in request.statements) for request in requests]
    return [(turn, sum(sizes[turn])) for turn in turns_of(requests, turn_size)]


def try_turns(
    editor: Editor,
    requests: Sequence[EditRequest],
    turns: Sequence[tuple[slice, int]],
    clock: Clock = time.perf_counter,
) -> Trial:
    """Edit the turn with the most to do and a usual one, and take them back: weights and statistics are, bit for bit,
    what they were, whatever happens.

    Args:
        editor: not followed by anybody, fresh or on its way.
        turns: of ``sizes_of``.

    Raises: as ``editor.edit``; ValueError where somebody follows the editor.
    """
    if editor.on_turn is not None or len(editor.followers):
        raise ValueError("the editor is followed, by a session or a patch recorder; plan with one that is not")
    ranked = sorted(turns, key=lambda turn: turn[1])
    chosen = [ranked[-1], ranked[(len(ranked) - 1) // 2]][: len(ranked)]
    resident = resident_bytes()
    cards = _cards(editor)
    for card in cards:
        torch.cuda.reset_peak_memory_stats(card)
    done: list[TrialTurn] = []
    with PeakMemory() as host:
        before = editor.checkpoint()
        try:
            begin = clock()
            _ = editor.guard
            once = clock() - begin
            for turn, size in chosen:
                done.append(_try(editor, requests[turn], size, clock))
            state = {name: _bytes(part.state_dict()) for name, part in editor.solver.statistics().items()}
            trunk = editor.trunk.bytes if editor.trunk is not None else 0
            decomposition = _decomposition(editor, clock)
        finally:
            editor.on_turn = None
            before.restore()
    own = {str(weight.device): 0 for weight in before.masters.values()} | {"cpu": 0}
    for weight in before.masters.values():
        own[str(weight.device)] += weight.nbytes
    peaks = {"cpu": resident + (host.extra_bytes or 0)}
    peaks |= {str(card): torch.cuda.max_memory_allocated(card) for card in cards}
    peaks = {place: peak - own.get(place, 0) for place, peak in peaks.items()}
    product = _product(editor.modules[0].device, clock)
    return Trial(done, once, resident, peaks, trunk, state, decomposition, product)


def _try(editor: Editor, requests: Sequence[EditRequest], size: int, clock: Clock) -> TrialTurn:
    seen: list[AppliedTurn] = []
    editor.on_turn = seen.append
    count = _decompositions(editor)
    begin = clock()
    report = editor.edit(list(requests), progress=False)
    seconds = clock() - begin
    editor.on_turn = None
    (turn,) = report.turns
    rows = len(seen[0].passes[0].captured.owned.request) if seen[0].passes else turn.answer_tokens
    unsteady = editor.config.anchors > 0  # such turns are written down in factors whatever the detail
    record = {detail: _record(editor, seen[0], unsteady or detail == "factors") for detail in ("factors", "requests")}
    decompositions = _decompositions(editor) - count
    return TrialTurn(turn.requests, size, rows, turn.passes, seconds, decompositions, record)


def _record(editor: Editor, turn: AppliedTurn, factors: bool) -> int:
    content, tensors = encode_turn(turn, factors=factors)
    content["state"] = state_fingerprints(editor.state_dict())
    return _FRAME + len(json.dumps(content)) + sum(tensor.nbytes for tensor in tensors.values())


def _decompositions(editor: Editor) -> int:
    return sum(normalizer.decompositions for normalizer in editor.normalizers.values())


def _decomposition(editor: Editor, clock: Clock) -> dict[str, float]:
    """Seconds of one whitening transform, by group of statistics that are whitened in full."""
    found = {}
    for group, normalizer in editor.normalizers.items():
        if normalizer.value_tracker is not None:
            covariance = torch.eye(normalizer.value_dim, device=editor.solver.groups[group][0].device)
            covariance += torch.rand_like(covariance) / normalizer.value_dim
            begin = clock()
            Whitener.full(covariance + covariance.t(), floor=0.0)
            found[group] = clock() - begin
    return found


def _product(device: torch.device, clock: Clock) -> float:
    matrix = torch.rand(_PRODUCT, _PRODUCT, dtype=torch.float32, device=device)
    for _ in range(2):  # the first prepares
        begin = clock()
        (matrix @ matrix)[0, 0].item()
        seconds = clock() - begin
    return 2 * _PRODUCT**3 / max(seconds, 1e-9)


def _cards(editor: Editor) -> list[torch.device]:
    found = {parameter.device for parameter in editor.model.parameters()} | {module.device for module in editor.modules}
    return sorted((device for device in found if device.type == "cuda"), key=str)


def _bytes(state: Mapping[str, object]) -> int:
    return sum(field.nbytes for field in state.values() if isinstance(field, torch.Tensor))
