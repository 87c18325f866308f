"""Chooses the modules to edit by measuring: the best fixed rule of one model need not be that of another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from tqdm.auto import tqdm

from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.data.spool import Spool
from stableedit_cpp.data.stream import as_stream, parts_of
from stableedit_cpp.editors.candidates import RULE, candidate_modules
from stableedit_cpp.editors.choice_cache import read_choice, write_choice
from stableedit_cpp.editors.config import EditorConfig
from stableedit_cpp.editors.interrupt import EditInterrupted
from stableedit_cpp.editors.stableedit import StableEditConfig
from stableedit_cpp.editors.trial import Trials
from stableedit_cpp.editors.trial_scores import Trial
from stableedit_cpp.files.table import Cell, Table, label, number
from stableedit_cpp.model.modules import find_modules
from stableedit_cpp.model.outputs import as_patterns

__all__ = ["ENOUGH", "ModuleChoice", "choose_modules", "remembered_choice"]

_Item = TypeVar("_Item")
ENOUGH = 50  # requests, for measuring to be worth its time without being asked for
_FEWEST = 8
_HEATS = ((16, 3), (64, 4))  # requests and passes: all candidates, then those that are still in the running


@dataclass(frozen=True)
class ModuleChoice:
    """Which modules to edit, and what that rests on.

    Attributes:
        config: with ``edit_modules`` chosen, by full names; for the editor.
        trials: one a candidate; the last one of each.
        chosen: the one of these.
    """

    config: EditorConfig
    trials: Sequence[Trial]
    chosen: Trial

    @property
    def modules(self) -> list[str]:
        """Full names of what to edit."""
        return list(self.chosen.modules)

    @property
    def why(self) -> str:
        """For people, without an end."""
        others = [one for one in self.trials if one is not self.chosen and one.reason is None]
        rule = next((one for one in self.trials if one.name == RULE), None)
        on = f"on {self.chosen.requests} requests"
        if not others:
            return f"{self.chosen.name}: nothing else can be edited"
        if self.chosen is rule:
            return f"{RULE}, the rule: none of {len(others)} others is better by more than noise {on}"
        if rule is None or rule.score is None:
            return f"{self.chosen.name}: as good as the best of {len(others) + 1}, and the cheapest of these, {on}"
        return (
            f"{self.chosen.name}: score {self.chosen.score:.2f} instead of {rule.score:.2f} of the rule ({RULE}) {on}"
        )

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"chosen": self.chosen.name, "modules": self.modules, "trials": [one.to_dict() for one in self.trials]}

    def table(self) -> Table:
        """One row a candidate; a star marks the chosen one."""
        columns = ["candidate", "requests", "taken", "paraphrases", "kept", "drift", "seconds", "score", "behind"]
        rows = []
        for one in self.trials:
            shares = [number(value, "{:.2f}") for value in (one.taken, one.paraphrases, one.kept)]
            behind = number(one.behind, "{:.2f}")
            if one.behind:
                behind = Cell(f"{one.behind:.2f} ± {one.noise:.2f}", one.behind)
            cost = [number(one.drift, "{:.3f}"), number(one.seconds, "{:.0f}"), number(one.score, "{:.2f}"), behind]
            name = Cell(one.name, one.name, best=one is self.chosen)
            rows.append([name, number(one.requests), *shares, *cost, label(one.reason or as_patterns(one.modules))])
        return Table([*columns, "modules"], rows)

    def __str__(self) -> str:
        return f"{self.table().plain()}\n\nEdits {as_patterns(self.modules)} ({self.why})."


def choose_modules(
    model: nn.Module,
    tokenizer,
    requests: Iterable[EditRequest | Mapping[str, object]],
    config: EditorConfig | None = None,
    *,
    cached: bool = True,
    progress: bool | None = None,
) -> ModuleChoice:
    """Measure which modules of a model take edits best; then ``StableEdit(model, tokenizer, choice.config)``.

    A few sets are tried, depth by depth: outputs of MLPs and of attention (``candidate_modules``). Each trial edits a
    sample of the requests with the given config, in a few passes, and is taken back, bit for bit: first 16 requests in
    three passes, then 64 in four for the rule and for what is not clearly worse. It costs about what editing 300
    requests does.

    The score of a set is the harmonic mean of the shares of requests that took (the greedy answer is the target, and
    stops), of their paraphrases that did (``rephrase``, where the requests have one) and of tokens of the unedited
    model's own answers to unrelated prompts that stay. Chosen is the first set that is not behind the best one by more
    than two standard errors; the fixed rule comes first, the others from the cheapest to the dearest. So the rule stays
    unless another set is better by more than noise, and among equals the cheapest wins.

    The choice is remembered in ``cache_directory()/modules``, under digests of model, tokenizer and config, if it rests
    on 50 requests or more.

    Args:
        requests: at least 8 with different prompts, such as are to be edited; up to 64, evenly spread, are used. With
            fewer than 50 the noise is such that only a gross fault of the rule shows.
        config: of any editor, with an automatic step (another fits one set only); None takes that of StableEdit. What
            its ``edit_modules`` name is tried as well, last.
        cached: take what was measured before for this model and config, whatever the requests were; False measures.
        progress: show a bar; None shows it on a terminal.

    Raises:
        ValueError: for a bad request, too few of them, another config, or a model of which no set can be edited, with
            the reasons.
        KeyboardInterrupt: after Ctrl-C, as for any error: with the model as it was.
    """
    requests = as_stream(requests)
    config = _checked(config)
    if cached and (found := remembered_choice(model, tokenizer, config)) is not None:
        return found
    sample = _sample(requests, _HEATS[-1][0])
    if len(sample) < _FEWEST:
        raise ValueError(
            f"requests: {len(sample)} with different prompts are too few to choose modules with; give at least "
            f"{_FEWEST}, or name edit_modules"
        )
    candidates = candidate_modules(model)
    if config.edit_modules is not None:
        named = [module.name for module in find_modules(model, config.edit_modules)]
        candidates |= {} if named in candidates.values() else {"as named": named}
    trials = Trials(model, tokenizer, config)
    for _, part in parts_of(requests):
        trials.check(part)
    try:
        done = _race(trials, candidates, sample, progress)
    except EditInterrupted:  # of a trial, which has been taken back
        raise KeyboardInterrupt("choosing modules was stopped; the model is as it was") from None
    first = next((one for one in done.values() if one.in_the_running and one.requests == len(sample)), None)
    if first is None:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in done.values())
        raise ValueError(f"no set of modules of {type(model).__name__} could be edited: {reasons}")
    choice = _choice(config, list(done.values()), first)
    if len(sample) >= ENOUGH:
        write_choice(model, tokenizer, config, choice.to_dict())
    return choice


def remembered_choice(model: nn.Module, tokenizer, config: EditorConfig | None = None) -> ModuleChoice | None:
    """What ``choose_modules`` measured before for this model, tokenizer and config; None if it did not, or what it
    wrote is damaged. Reads every weight once, where there is any choice to read."""
    config = _checked(config)
    found = read_choice(model, tokenizer, config)
    if found is None:
        return None
    trials, chosen = found
    return _choice(config, trials, chosen)


def _race(
    trials: Trials, candidates: Mapping[str, list[str]], sample: Sequence[EditRequest], progress: bool | None
) -> dict[str, Trial]:
    """The last trial of each candidate, by name."""
    done: dict[str, Trial] = {}
    running = list(candidates)
    bar = tqdm(desc="Choosing modules", unit="trial", disable=None if progress is None else not progress)
    with bar:
        for size, passes in _HEATS:
            part = _spread(sample, size)
            bar.total = bar.n + len(running)
            heat = []
            for name in running:
                bar.set_postfix_str(name)
                heat.append(trials.run(name, candidates[name], part, passes))
                bar.update()
            best = max(heat, key=lambda one: -1.0 if one.score is None else one.score)
            done |= {one.name: one.against(best) for one in heat}
            running = [name for name in running if name == RULE or done[name].in_the_running]
    return done


def _sample(requests: Sequence[EditRequest], count: int) -> list[EditRequest]:
    """So many with different questions."""
    if isinstance(requests, Spool):
        return [requests[number] for number in _spread(requests.different(), count)]
    return _spread(list({request.question: request for request in requests}.values()), count)


def _spread(requests: Sequence[_Item], count: int) -> list[_Item]:
    """So many of them, evenly spread; a file is often sorted by something."""
    if len(requests) <= count:
        return list(requests)
    return [requests[index * len(requests) // count] for index in range(count)]


def _choice(config: EditorConfig, trials: Sequence[Trial], chosen: Trial) -> ModuleChoice:
    return ModuleChoice(dataclasses.replace(config, edit_modules=list(chosen.modules)), trials, chosen)


def _checked(config: EditorConfig | None) -> EditorConfig:
    config = StableEditConfig() if config is None else config
    if config.step_size != "auto":
        raise ValueError(
            f"choosing modules needs step_size='auto': the step size {config.step_size!r} fits one set of modules only"
        )
    return config
