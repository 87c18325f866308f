"""The nested questions of KnowEdit's records, which are otherwise those of flat CounterFact."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NESTED", "nested_questions"]

# Field of a record -> names of a prompt and its answer in EditRequest, and the kinds of question in it, the first that
# is there being taken: what follows from the fact comes before another name of its subject.
_KINDS = {
    "portability": ("portability", ("Reasoning", "Logical_Generalization", "Subject_Aliasing")),
    "locality": ("locality", ("Relation_Specificity", "Forgetfulness")),
}
NESTED = tuple(_KINDS)


def nested_questions(record: Mapping[str, object]) -> dict[str, str]:
    """Prompt and answer of portability and locality, by their names in EditRequest, where the record has them.

    ``{"portability": {"Reasoning": [{"prompt": ..., "ground_truth": [[...]]}]}}``: of several questions the first, and
    of several spellings of its answer the first.
    """
    found: dict[str, str] = {}
    for field, (name, kinds) in _KINDS.items():
        questions = record.get(field)
        if not isinstance(questions, Mapping):
            continue
        for kind in (*kinds, *questions):
            question = questions.get(kind)
            question = question[0] if isinstance(question, list) and question else question
            if not isinstance(question, Mapping):
                continue
            prompt, answer = _first(question.get("prompt")), _first(question.get("ground_truth"))
            if prompt and answer:
                found |= {f"{name}_prompt": prompt, f"{name}_target": answer}
                break
    return found


def _first(value: object) -> str | None:
    """A text, or the first one in a list, or in a list of lists."""
    while isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, str) else None
