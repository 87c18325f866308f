"""The downstream tasks through EleutherAI's lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch

from stableedit_cpp.files.hub import offline_where_silent
from stableedit_cpp.model.ranks import ranks
from stableedit_cpp.model.untouched import untouched

__all__ = ["HARNESS_TASKS", "harness_scores"]

# The harness has no task of the name nli; MNLI is its natural language inference beside RTE.
HARNESS_TASKS = {"sst2": "sst2", "mrpc": "mrpc", "cola": "cola", "rte": "rte", "nli": "mnli", "mmlu": "mmlu"}
_SUBJECTS = {"mmlu": 57.0}  # tasks that are many


def harness_scores(
    model: torch.nn.Module,
    tokenizer,
    tasks: Mapping[str, str],
    *,
    few_shots: int,
    limit: int | None,
    include_path: str | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float | int | None]]:
    """Score a model that is in memory on tasks of the harness, which loads their data itself; each task is run apart,
    by one process where several share the work (``data_parallel``).

    Args:
        tasks: our name of a task -> name in the harness.
        include_path: directory with task files of one's own, e.g. over local JSON.

    Returns:
        for each of our names ``accuracy``, its ``standard_error``, ``f1``, ``mcc`` (None where the task does not report
        it), ``records``, and ``broken``, if any: to how many of them the model answers NaN.

    Raises:
        ValueError: if lm-eval is not installed, or it cannot run a task (with its reason).
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ValueError("downstream lm-eval needs it: pip install 'stableedit-cpp[harness]'") from None
    manager = cache(lambda: TaskManager(include_path=include_path))  # which reads the descriptions of all tasks

    def one(task: str) -> dict[str, float | int | None]:
        silent = None
        try:
            with offline_where_silent() as silent, untouched(model):
                report = lm_eval.simple_evaluate(
                    model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                    tasks=[task],
                    num_fewshot=few_shots,
                    limit=limit,
                    log_samples=True,  # they alone say where the model answers NaN
                    task_manager=manager(),
                )
        except Exception as error:  # data sets, hub, network: each has errors of its own
            reason = " ".join(str(error).split())[:300]
            unreachable = f"{silent}, and what it needs is not in the local cache: " if silent else ""
            raise ValueError(f"lm-eval cannot run {task}: {unreachable}{reason}") from None
        return _scores(report, task)

    wanted = list(tasks.values())
    costs = [_SUBJECTS.get(name, 1.0) for name in tasks]
    return dict(zip(tasks, ranks().shared("running lm-eval", costs, lambda number: one(wanted[number])), strict=True))


def _scores(report: dict, task: str) -> dict[str, float | int | None]:
    # A group such as mmlu has its means in the same place as a single task.
    found = {key.split(",")[0]: value for key, value in report["results"][task].items() if "," in key}
    members = report.get("group_subtasks", {}).get(task) or [task]
    samples = [report["n-samples"][name]["effective"] for name in members if name in report["n-samples"]]
    broken = sum(map(_broken, [sample for name in members for sample in report["samples"].get(name, [])]))
    return {
        "accuracy": _number(found.get("acc")),
        "standard_error": _number(found.get("acc_stderr")),
        "f1": _number(found.get("f1")),
        "mcc": _number(found.get("mcc")),
        "records": sum(samples),
        **({"broken": broken} if broken else {}),
    }


def _broken(sample: dict) -> bool:
    """Whether a record has a NaN among its log-likelihoods, which the harness passes over."""
    answers = [answer for answers in sample["resps"] for answer in answers]
    return any(isinstance(answer, tuple) and math.isnan(answer[0]) for answer in answers)


def _number(value: object) -> float | None:
    """The harness writes "N/A" for what it did not estimate."""
    return float(value) if isinstance(value, (int, float)) else None
