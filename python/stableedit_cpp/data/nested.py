"""Records of published data sets that hold more than one request, or a request deeper than a row can say.

MQuAKE has one to four facts a record (``requested_rewrite`` is a list), and questions that follow from all of them;
RippleEdits writes a fact as a whole sentence and its consequences as test cases. What is read of CounterFact as ROME
and MEMIT use it (``requested_rewrite`` is an object) needs no change: its fields are named by paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["expand", "look_up"]

# Of RippleEdits: kinds of consequences, those that show whether the fact is used before those that restate it.
_CONSEQUENCES = ("Compositionality_I", "Compositionality_II", "Logical_Generalization", "Subject_Aliasing")
_UNRELATED = ("Relation_Specificity", "Forgetfulness")
# Where the templates of its relations end, and the answer begins.
_VERBS = re.compile(r".*(?: is followed by| follows| is| are)(?= )")


def look_up(record: Mapping[str, object], path: str) -> object:
    """A field by its name, or by a path such as ``requested_rewrite.target_new.str``; None where it is not there.

    Where the path ends in ``.str`` a plain text in place of the object around it will do as well.
    """
    if path in record or "." not in path:
        return record.get(path)
    value: object = record
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif part != "str":
            return None
    return value


def expand(record: Mapping[str, object]) -> list[Mapping[str, object]]:
    """One record for each request in it; a record of any other data set is what it was."""
    rewrites = record.get("requested_rewrite")
    if isinstance(rewrites, list) and all(isinstance(one, Mapping) for one in rewrites):
        return _expand_mquake(record, rewrites)
    edit = record.get("edit")
    if isinstance(edit, Mapping) and isinstance(edit.get("prompt"), str) and "target" not in edit:
        return [_expand_ripple(record, edit)]
    return [record]


def _expand_mquake(record: Mapping[str, object], rewrites: list[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """The questions over several hops follow from all facts of a record, so they go with the last."""
    rest = {name: value for name, value in record.items() if name not in ("requested_rewrite", "questions")}
    found = [{**rest, "requested_rewrite": one} for one in rewrites]
    if len(found) > 1 and "case_id" in record:
        found = [{**one, "case_id": f"{record['case_id']}-{number}"} for number, one in enumerate(found, start=1)]
    for one in found[:-1]:
        one["new_answer"] = None
    if found and "questions" in record:
        found[-1]["questions"] = record["questions"]
    return found


def _expand_ripple(record: Mapping[str, object], edit: Mapping[str, object]) -> Mapping[str, object]:
    """With the sentence of the fact cut into prompt and target, and the first test case of each kind."""
    sentence = edit["prompt"].strip().removesuffix(".")
    aliases = [answer for query in _queries(record, ("Subject_Aliasing",)) for answer in _answers(query)]
    prompt = next((sentence.removesuffix(answer) for answer in aliases if sentence.endswith(f" {answer}")), None)
    if prompt is None:
        verb = _VERBS.match(sentence)
        prompt = verb[0] if verb else sentence
    target = sentence[len(prompt) :]
    found = {**record, "edit": {**edit, "prompt": prompt.rstrip(), "target": target.strip()}}
    for name, kinds in (("portability", _CONSEQUENCES), ("locality", _UNRELATED)):
        query = next((query for query in _queries(record, kinds) if _answers(query)), None)
        if query is not None:
            found |= {f"{name}_prompt": query.get("prompt"), f"{name}_target": _answers(query)[0]}
    return found


def _queries(record: Mapping[str, object], kinds: tuple[str, ...]) -> list[Mapping[str, object]]:
    cases = [case for kind in kinds for case in _listed(record.get(kind)) if isinstance(case, Mapping)]
    queries = [query for case in cases for query in _listed(case.get("test_queries"))]
    return [query for query in queries if isinstance(query, Mapping)]


def _answers(query: Mapping[str, object]) -> list[str]:
    answers = [one for one in _listed(query.get("answers")) if isinstance(one, Mapping)]
    spellings = [text for one in answers for text in (one.get("value"), *_listed(one.get("aliases")))]
    return [text for text in spellings if isinstance(text, str) and text.strip()]


def _listed(value: object) -> list:
    return value if isinstance(value, list) else []
