"""What a stream of edits will need, said before it begins: memory by part, time, and disk."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.stream import as_stream
from stableedit_cpp.editors import Editor
from stableedit_cpp.files.offloaded import Offloaded
from stableedit_cpp.lifelong.trial_turns import Clock, Trial, sizes_of, try_turns
from stableedit_cpp.model.modules import EditModule

__all__ = ["Plan", "gigabytes", "hours", "plan_stream"]

_SNAPSHOTS = 4  # of a session: three, and that of the beginning


@dataclass(frozen=True)
class Plan:
    """``str()`` is for people, ``line`` the same in one line.

    Attributes:
        requests, turns: of the stream.
        seconds: for all of it; ``once`` before the first turn and in it beyond what a turn takes, ``a_turn`` for a
            usual turn, which has ``passes``.
        decompositions, factorisations: of whitening transforms and of past keys, how many and what one takes: their
            seconds are in those of the stream.
        memory: bytes at the end of the stream by part and place: ``{"masters": {"cuda:0": 1000}}``; "cpu" is host
            memory. What else a turn takes while it runs, forward and backward, is ``working``.
        peaks: the most by place. room: what there is, as far as the system says.
        journal: bytes of a session's journal, by its ``detail``. snapshot: of one. disk: free where it would be.
        advice: what to change where it does not fit, the best first; empty where it does.
    """

    requests: int
    turns: int
    seconds: float
    once: float
    a_turn: float
    passes: int
    decompositions: tuple[int, float]
    factorisations: tuple[int, float]
    memory: Mapping[str, Mapping[str, int]]
    peaks: Mapping[str, int]
    room: Mapping[str, int]
    journal: Mapping[str, int]
    snapshot: int
    disk: int
    advice: Sequence[str] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether there is room for the most that it takes, everywhere."""
        return all(peak <= self.room.get(place, peak) for place, peak in self.peaks.items())

    @property
    def line(self) -> str:
        peaks = ", ".join(f"{gigabytes(peak)} {_called(place)}" for place, peak in self.peaks.items())
        return f"{self.turns:,} turns, about {hours(self.seconds)}; at most {peaks}" + (
            "" if self.fits else ": more than there is"
        )

    def to_dict(self) -> dict[str, object]:
        """Ready for JSON."""
        return {**asdict(self), "fits": self.fits}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.requests:,} requests in {self.turns:,} turns: about {hours(self.seconds)}"
        rate = f", {self.requests / self.seconds:.1f} edits/s" if self.seconds > 0 else ""
        yield f"  a turn    {self.a_turn:.2f} s in {self.passes} pass{'es' * (self.passes != 1)}{rate}"
        yield f"  once      {self.once:.2f} s for what the guard and the first turn ask"
        for name, (count, each) in (("decompose", self.decompositions), ("factorise", self.factorisations)):
            if count:
                yield f"  {name} {count:,} times, {each:.3f} s each"
        yield "Memory"
        places = list(self.peaks) + [place for place in self.memory["model"] if place not in self.peaks]
        width = max(map(len, self.memory))
        for part, where in self.memory.items():
            shown = [f"{gigabytes(where[place])} {_called(place)}" for place in places if where.get(place)]
            yield f"  {part:<{width}}  {', '.join(shown) or 'nothing'}"
        for place, peak in self.peaks.items():
            has = f" of {gigabytes(self.room[place])}" if place in self.room else ""
            yield f"  at most {gigabytes(peak)}{has} {_called(place)}"
        factors, requests = (gigabytes(self.journal[detail]) for detail in ("factors", "requests"))
        yield f"Disk, for a session ({gigabytes(self.disk)} free here)"
        yield f"  journal {factors}, or {requests} with --detail requests; {_SNAPSHOTS} snapshots of " + gigabytes(
            self.snapshot
        )
        yield from ["What to change", *(f"  {advice}" for advice in self.advice)] if self.advice else ["It fits."]


def plan_stream(
    editor: Editor, requests: Sequence[EditRequest | Mapping[str, object]], *, clock: Clock = time.perf_counter
) -> Plan:
    """Plan a stream: two of its turns, that with the most to do and a usual one, are edited and taken back.

    A turn is reckoned to take as long as the usual one, by the characters of its requests; decompositions are counted
    as the statistics will ask for them (``refresh``), and past keys as they will have grown.

    Args:
        editor: of the model, not followed by anybody; it is afterwards what it was, bit for bit.
        clock: seconds from some moment on; ``time.process_time`` where other work is in the way.

    Raises: as ``editor.edit``.
    """
    requests = as_stream(requests)
    if not len(requests):
        raise ValueError("requests is empty: there is nothing to plan")
    turns = sizes_of(requests, editor.config.turn_size)
    trial = try_turns(editor, requests, turns, clock)
    sizes = [size for _, size in turns]
    usual, rows = trial.turns[-1], _rows(trial, sizes)
    memory = _memory(editor, trial, sum(rows), max(rows))
    grown = dict(memory["past keys"])
    for module in editor.modules:
        if module.name in editor.past_keys:
            grown[str(_home(editor, module))] -= trial.state[f"past_keys/{module.name}"]
    peaks = {place: peak + max(0, grown.get(place, 0)) for place, peak in trial.peaks.items()}
    memory["working"] = {
        place: max(0, peak - sum(part.get(place, 0) for part in memory.values())) for place, peak in peaks.items()
    }
    by_group = {group: _decompositions(editor, group, rows) for group in trial.decomposition}
    decompositions = sum(by_group.values())
    each = sum(trial.decomposition[group] * count for group, count in by_group.items()) / max(1, decompositions)
    factorisations, factorisation = _factorisations(editor, trial, sum(rows))
    once = trial.once
    if len(trial.turns) > 1:
        first = trial.turns[0]
        once += max(0.0, first.seconds - usual.seconds * first.characters / usual.characters)
    seconds = once + usual.seconds * sum(sizes) / usual.characters
    seconds += each * (decompositions - usual.decompositions * len(turns)) + factorisations * factorisation
    state = _masters(editor) + sum(size for name, size in trial.state.items() if not name.startswith("past_keys/"))
    state += sum(_moment(module.shape[0], sum(rows)) for module in editor.modules if module.name in editor.past_keys)
    record = {detail: round(size * sum(sizes) / usual.characters) for detail, size in usual.record.items()}
    plan = Plan(
        len(requests),
        len(turns),
        max(seconds, 0.0),
        once,
        usual.seconds,
        usual.passes,
        (decompositions, each),
        (factorisations, factorisation),
        memory,
        peaks,
        _room(trial, peaks),
        record,
        state,
        shutil.disk_usage(os.getcwd()).free,
    )
    return replace(plan, advice=_advice(editor, plan))


def _rows(trial: Trial, sizes: Sequence[int]) -> list[int]:
    """Answer tokens of each turn, by the characters of its requests."""
    rows, characters = (sum(getattr(turn, name) for turn in trial.turns) for name in ("rows", "characters"))
    return [max(1, round(size * rows / max(1, characters))) for size in sizes]


def _decompositions(editor: Editor, group: str, rows: Sequence[int]) -> int:
    """How often a group's covariance is decomposed: first when there are more samples than dimensions, and anew once
    they have grown by ``refresh``; and now and then for a turn that is unlike those before, which is not foreseen."""
    refresh, dims = getattr(editor.config, "refresh", 0.0), editor.normalizers[group].value_dim
    seen, last, count = editor.normalizers[group].count, 0.0, 0
    for more in rows:
        seen += more * len(editor.solver.groups[group])
        if seen > dims + 1 and seen >= last * (1 + refresh):
            count, last = count + 1, seen
    return count


def _factorisations(editor: Editor, trial: Trial, rows: int) -> tuple[int, float]:
    """Of past keys, one for every k / 4 of them: k^3 / 3 multiplications and additions each."""
    dims = [module.shape[0] for module in editor.modules if module.name in editor.past_keys]
    count = sum(rows // max(1, k // 4) for k in dims)
    work = sum((rows // max(1, k // 4)) * 2 * k**3 / 3 for k in dims)
    return count, work / trial.product / max(1, count)


def _moment(k: int, rows: int) -> int:
    """Bytes of a state of past keys: the rows, or a moment and half of the most rows that may come since."""
    return 4 * k * min(rows, k + k // 8)


def _home(editor: Editor, module: EditModule) -> torch.device:
    """Where its past keys are."""
    return editor.solver.devices()[f"past_keys/{module.name}"]


def _masters(editor: Editor) -> int:
    return sum(weight.master.nbytes for weight in editor.weights.values())


def _memory(editor: Editor, trial: Trial, rows: int, most: int) -> dict[str, dict[str, int]]:
    """By part and place, at the end of a stream of so many rows, of which a turn has at most so many."""
    parts: dict[str, dict[str, int]] = {}

    def add(part: str, place: object, size: int) -> None:
        where = parts.setdefault(part, {})
        where[str(place)] = where.get(str(place), 0) + size

    names = dict(editor.model.named_parameters()) | dict(editor.model.named_buffers())
    for name, tensor in names.items():
        rest = Offloaded.find(editor.model, name)
        add("model", tensor.device if rest is None else "disk" if rest.on_disk else "cpu", tensor.nbytes)
    # Of each turn one, of a guarded pass another, and two of the best pass so far.
    copies = 1 + (editor.guard is not None) + 2 * (editor.config.max_passes > 1)
    for module in editor.modules:
        master, size = editor.weights[module.name].master, editor.original_weights()[module.name].nbytes
        if master.dtype != module.dtype or module.on_disk:
            add("masters", master.device, master.nbytes)
        add("copies to go back to", master.device, copies * master.nbytes)
        add("unedited weights", "cpu", size)
        add("captures", module.device, 2 * most * sum(module.shape) * max(4, min(8, master.element_size())))
        if module.name in editor.past_keys:
            k, home = module.shape[0], _home(editor, module)
            many = rows >= k // 4  # a moment and its factor, and the rows since; or the rows alone
            add("past keys", home, 4 * k * (2 * k + k // 4) if many else 4 * k * rows)
    for name, size in trial.state.items():
        if not name.startswith("past_keys/"):
            add("statistics", editor.solver.devices().get(name, "cpu"), size)
    add("trunk cache", "cpu", trial.trunk)
    for part in ("masters", "past keys", "statistics"):
        parts.setdefault(part, {})
    return parts


def _room(trial: Trial, peaks: Mapping[str, int]) -> dict[str, int]:
    """What there is in all for this process, as far as the system says."""
    room = {}
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
        room["cpu"] = trial.resident + free
    except (OSError, StopIteration):
        pass
    for place in peaks:
        if place.startswith("cuda"):
            room[place] = torch.cuda.get_device_properties(place).total_memory
    return room


def _advice(editor: Editor, plan: Plan) -> list[str]:
    """What to change, that which gives back most first."""
    found: list[tuple[int, str]] = []
    for place, peak in plan.peaks.items():
        if peak <= plan.room.get(place, peak):
            continue
        size = {part: where.get(place, 0) for part, where in plan.memory.items()}
        lack = f"{gigabytes(peak - plan.room[place])} are missing {_called(place)}: "
        rest = "cpu" if place != "cpu" else "disk"
        offers = {
            "model": f"--device-map auto, which leaves layers in {'host memory' if rest == 'cpu' else 'files'}"
            + (", or --dtype bfloat16" if editor.modules[0].dtype == torch.float32 else ""),
            "working": f"max_tokens_per_forward smaller than {editor.config.max_tokens_per_forward}",
            "copies to go back to": "fewer modules (--edit-modules), or one pass (--preset one-pass)",
            "captures": f"--turn-size smaller than {editor.config.turn_size}",
            "past keys": "past_key_weight=0 in the config, which no longer holds earlier edits in place",
        }
        found += [(size[part], lack + offer) for part, offer in offers.items() if size.get(part)]
    advice = [text for _, text in sorted(found, key=lambda one: -one[0])]
    if plan.journal["factors"] + _SNAPSHOTS * plan.snapshot > plan.disk:
        advice.append("a session's journal has no room here: --detail requests, or another disk")
    return advice


def gigabytes(size: float) -> str:
    """1.23 GB, or in MB or kB where it is less."""
    for unit, bytes in (("GB", 1e9), ("MB", 1e6)):
        if size >= bytes / 10:
            return f"{size / bytes:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"


def hours(seconds: float) -> str:
    """3.2 hours, or minutes, or seconds."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def _called(place: str) -> str:
    return {"cpu": "in host memory", "disk": "on the disk"}.get(place, f"on {place}")
