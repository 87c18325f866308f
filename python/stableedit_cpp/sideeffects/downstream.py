"""Six downstream tasks from local files: the choice that a model finds likeliest.

Prompts are those of the published evaluation (AlphaEdit's glue_eval), with three faults left out: it scores RTE
against swapped labels (in GLUE, 0 is entailment), ends CoLA's prompt in a space, which tokenizers continue badly, and
writes SST2's examples with a space that its questions lack.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from stableedit_cpp.data.file_types import read_records
from stableedit_cpp.evaluation.answers import read_answers
from stableedit_cpp.model.form import PARSED
from stableedit_cpp.model.tokens import TokenSequence, context_length, tokenize
from stableedit_cpp.model.trunk import TrunkCache

__all__ = ["RESERVED", "TASKS", "choose", "downstream_scores", "read_task"]

RESERVED = 10  # the first records of a file are kept for few-shot examples, as published


@dataclass(frozen=True)
class _Task:
    """How a record becomes a prompt.

    Attributes:
        prompt: template over the fields of a record. choices: the possible answers.
        labels: what the label field holds for each of them. label: name of that field.
    """

    prompt: str
    choices: tuple[str, ...]
    labels: tuple[object, ...]
    label: str = "label"

    def question(self, record: dict[str, object]) -> str:
        return self.prompt.format_map(record)

    def answer(self, record: dict[str, object]) -> int:
        """Index of the right choice."""
        return self.labels.index(record[self.label])


_PAIR = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
TASKS = {
    "sst2": _Task("Review : {sentence}\nSentiment :", ("negative", "positive"), (0, 1)),
    "mrpc": _Task("Are the sentences paraphrases of each other.\n" + _PAIR + "Answer:", ("No", "Yes"), (0, 1)),
    "cola": _Task("Is this sentence linguistically acceptable?\nSentence: {sentence}\nAnswer:", ("No", "Yes"), (0, 1)),
    "rte": _Task("{sentence1}\nquestion: {sentence2} True or False?\nanswer:", ("True", "False"), (0, 1)),
    "nli": _Task(
        "{sentence1} entails the {sentence2} True or False? Answer:",
        ("True", "False"),
        ("entailment", "not_entailment"),
    ),
    "mmlu": _Task(
        "Question: {question}\n(A) {choices[0]}\n(B) {choices[1]}\n(C) {choices[2]}\n(D) {choices[3]}\nAnswer:",
        ("A", "B", "C", "D"),
        (0, 1, 2, 3),
        label="answer",
    ),
}


def read_task(directory: str | Path, name: str, few_shots: int, limit: int | None) -> tuple[str, list[str], list[int]]:
    """Few-shot examples as one text, questions, and the index of the right choice of each.

    Args:
        directory: holds ``NAME.json`` or ``NAME.jsonl``, also with ``.gz``.
        few_shots: examples, at most ``RESERVED``. limit: questions; None takes all after the reserved records.

    Raises:
        ValueError: for a missing file, a record without a field of the task or with an unknown label.
    """
    task = TASKS[name]
    paths = [Path(directory) / f"{name}{suffix}" for suffix in (".json", ".jsonl", ".json.gz", ".jsonl.gz")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        raise ValueError(f"{directory} has no {name}.json (or .jsonl, also with .gz) for the downstream task {name}")
    examples, questions, answers = "", [], []
    for index, (place, record) in enumerate(islice(read_records(path), None if limit is None else RESERVED + limit)):
        try:
            question, answer = task.question(record), task.answer(record)
        except (KeyError, IndexError):
            wanted = f"expected those of {name}: {task.prompt!r}"
            raise ValueError(f"{path}, {place}: its fields are {', '.join(record)}; {wanted}, {task.label}") from None
        except ValueError:
            known = ", ".join(map(repr, task.labels))
            raise ValueError(f"{path}, {place}: {task.label} is {record[task.label]!r}; expected {known}") from None
        if index >= RESERVED:
            questions.append(question)
            answers.append(answer)
        elif index < few_shots:
            examples += f"{question} {task.choices[answer]}\n"
    if not questions:
        raise ValueError(f"{path} has no records after the first {RESERVED}, which are kept for few-shot examples")
    return examples, questions, answers


def choose(
    model: torch.nn.Module,
    tokenizer,
    questions: Sequence[str],
    choices: Sequence[str],
    *,
    max_tokens: int,
    trunk: TrunkCache | None = None,
    on_done: Callable[[int], object] | None = None,
) -> list[int]:
    """Index of the choice whose tokens are likeliest on (geometric) average, for each question; -1 where the model
    answers NaN.

    A question that is longer than the model's context loses its beginning.

    Args:
        max_tokens: tokens, padding included, in one forward pass.
        trunk: keeps and reuses the output of the layers that no edit changes.
        on_done: called with the number of choices that were scored, after each forward pass.
    """
    limit = context_length(model)
    pairs = [(question, choice) for question in questions for choice in choices]
    names = [f"question {index // len(choices)}" for index in range(len(pairs))]
    sequences = tokenize(tokenizer, pairs, None, names, PARSED)
    if limit is not None:
        sequences = [TokenSequence(sequence.ids[-limit:], sequence.answer) for sequence in sequences]
    read = read_answers(model, sequences, max_tokens=max_tokens, trunk=trunk, on_done=on_done)
    means = torch.stack([answer.log_probability.mean() for answer in read]).reshape(len(questions), len(choices))
    return means.argmax(-1).where(~means.isnan().any(-1), -1).tolist()


def downstream_scores(predictions: Sequence[int], answers: Sequence[int]) -> dict[str, float | int]:
    """``accuracy`` with its ``standard_error``, ``f1`` (weighted over classes, as published), ``mcc``, and the accuracy
    of always giving the most frequent answer (``majority``). A prediction of -1 is wrong; ``broken``, if there is one,
    says how many."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    count = len(answers)
    accuracy = sum(map(int.__eq__, predictions, answers)) / count
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / max(count - 1, 1)),
        "f1": float(f1_score(answers, predictions, average="weighted", zero_division=0)),
        "mcc": float(matthews_corrcoef(answers, predictions)),
        "majority": max(Counter(answers).values()) / count,
        "records": count,
        **({"broken": predictions.count(-1)} if -1 in predictions else {}),
    }
