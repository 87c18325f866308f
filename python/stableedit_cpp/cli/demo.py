"""``stableedit demo``: a small real model learns what happened after its training, before your eyes."""

from __future__ import annotations

import argparse
import json
import time
from importlib import resources

from stableedit_cpp.cli.options import load
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import StableEdit
from stableedit_cpp.evaluation import Scores, evaluate, generate
from stableedit_cpp.files.table import Table, label, score


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    stream = read_requests(options.stream, options.limit) if options.stream else []
    warm_up = read_requests(options.warm_up, options.limit) if options.warm_up else []

    print(f"Loading {options.model} ...", flush=True)
    model, tokenizer = load(options)
    _facts(model, tokenizer)
    if stream:
        model, tokenizer = load(options)  # the facts are not to be in it
        _stream(model, tokenizer, warm_up, stream)
    print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    return 0


def _facts(model, tokenizer) -> None:
    data = json.loads(resources.files("stableedit_cpp.data").joinpath("world_2025.json").read_text(encoding="utf-8"))
    facts = [EditRequest(**fact) for fact in data["facts"]]
    unrelated = data["unrelated"]

    _heading(f"1. {len(facts)} facts from after the model's training")
    prompts = [fact.prompt for fact in facts]
    before = generate(model, tokenizer, prompts)
    unrelated_before = generate(model, tokenizer, unrelated)
    scores_before = evaluate(model, tokenizer, facts, progress=False)
    for fact, answer in zip(facts, before, strict=True):
        print(f"  {fact.prompt} ...{_first_line(answer)}")

    _heading("2. Editing")
    editor = StableEdit(model, tokenizer)
    report = editor.edit(facts, progress=True)
    print(f"{report.edits} edits in {report.seconds:.1f} s, in {', '.join(m.name for m in editor.modules)}")

    _heading("3. The same questions, answered freely by the edited model")
    after = generate(model, tokenizer, prompts)
    right = 0
    for fact, answer in zip(facts, after, strict=True):
        good = answer.strip().startswith(fact.target)
        right += good
        print(f"  {'+' if good else '-'} {fact.prompt} ...{_first_line(answer)}")
    print(f"\n  {right} of {len(facts)} answers begin with the new fact.")
    _table(scores_before, evaluate(model, tokenizer, facts, progress=False))

    _heading("4. Unrelated questions, before and after")
    same = 0
    for prompt, old, new in zip(unrelated, unrelated_before, generate(model, tokenizer, unrelated), strict=True):
        old, new = _first_line(old), _first_line(new)
        same += old == new
        print(f"  {'=' if old == new else '!'} {prompt} ...{new}" + (f"  (before: ...{old})" if old != new else ""))
    print(f"\n  {same} of {len(unrelated)} answers are unchanged, word for word.")


def _stream(model, tokenizer, warm_up: list[EditRequest], stream: list[EditRequest]) -> None:
    _heading(f"5. A stream of {len(stream)} edits, on the original model" + (", after a warm-up" if warm_up else ""))
    before = evaluate(model, tokenizer, stream, progress=True)
    editor = StableEdit(model, tokenizer)
    if warm_up:
        editor.warm_up(warm_up, progress=True)
    report = editor.edit(stream, progress=True)
    print(f"{report.edits} edits in {report.seconds:.1f} s ({report.edits_per_second:.1f} edits/s)")
    _table(before, evaluate(model, tokenizer, stream, progress=True))


def _table(before: Scores, after: Scores) -> None:
    errors = before.standard_errors, after.standard_errors
    rows = [
        [label(f"  {metric}"), score(old, errors[0][metric]), score(after.means()[metric], errors[1][metric])]
        for metric, old in before.means().items()
        if old is not None
    ]
    print(f"\n{Table(['', 'before', 'after'], rows).plain()}")


def _heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _first_line(text: str) -> str:
    return " " + (text.strip().splitlines() or [""])[0]
