"""``stableedit demo``: a small real model learns what happened after its training, before your eyes."""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import redirect_stdout
from importlib import resources

from stableedit_cpp.cli.options import load, show
from stableedit_cpp.data import read_requests
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.editors import EditReport, StableEdit
from stableedit_cpp.evaluation import Scores, evaluate, generate
from stableedit_cpp.files.table import Table, label, score


def run(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    stream = read_requests(options.stream, options.limit) if options.stream else []
    warm_up = read_requests(options.warm_up, options.limit) if options.warm_up else []

    with redirect_stdout(sys.stderr if options.json else sys.stdout):  # the tale is no result then
        print(f"Loading {options.model} ...", flush=True)
        model, tokenizer = load(options)
        document = {"model": options.model, "facts": _facts(model, tokenizer)}
        if stream:
            model, tokenizer = load(options)  # the facts are not to be in it
            document["stream"] = _stream(model, tokenizer, warm_up, stream)
    document["seconds"] = time.perf_counter() - start
    show(options, document, f"\nDone in {document['seconds']:.0f} s.")
    return 0


def _facts(model, tokenizer) -> dict[str, object]:
    """Tells the tale, and returns its figures."""
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
    scores_after = evaluate(model, tokenizer, facts, progress=False)
    _table(scores_before, scores_after)

    _heading("4. Unrelated questions, before and after")
    same = 0
    unrelated_after = generate(model, tokenizer, unrelated)
    for prompt, old, new in zip(unrelated, unrelated_before, unrelated_after, strict=True):
        old, new = _first_line(old), _first_line(new)
        same += old == new
        print(f"  {'=' if old == new else '!'} {prompt} ...{new}" + (f"  (before: ...{old})" if old != new else ""))
    print(f"\n  {same} of {len(unrelated)} answers are unchanged, word for word.")
    return {
        "answers": _answers(prompts, before, after),
        "unrelated": _answers(unrelated, unrelated_before, unrelated_after),
        "right": right,
        "unchanged": same,
        **_figures(report, scores_before, scores_after),
    }


def _stream(model, tokenizer, warm_up: list[EditRequest], stream: list[EditRequest]) -> dict[str, object]:
    _heading(f"5. A stream of {len(stream)} edits, on the original model" + (", after a warm-up" if warm_up else ""))
    before = evaluate(model, tokenizer, stream, progress=True)
    editor = StableEdit(model, tokenizer)
    if warm_up:
        editor.warm_up(warm_up, progress=True)
    report = editor.edit(stream, progress=True)
    print(f"{report.edits} edits in {report.seconds:.1f} s ({report.edits_per_second:.1f} edits/s)")
    after = evaluate(model, tokenizer, stream, progress=True)
    _table(before, after)
    return _figures(report, before, after)


def _answers(prompts: list[str], before: list[str], after: list[str]) -> list[dict[str, str]]:
    rows = zip(prompts, before, after, strict=True)
    return [{"prompt": prompt, "before": old, "after": new} for prompt, old, new in rows]


def _figures(report: EditReport, before: Scores, after: Scores) -> dict[str, object]:
    scores = {"before": before.means(), "after": after.means()}
    return {"edits": report.edits, "edits_per_second": report.edits_per_second, "scores": scores}


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
