"""What a record holds in place of a text: numbers, dates, lists, missing values of pandas, objects around a text."""

from __future__ import annotations

import datetime
import math
import numbers
from collections.abc import Mapping

__all__ = ["absent", "as_text", "texts_in"]

# Of objects around a text: those of CounterFact and MQuAKE ("str"), RippleEdits ("value"), and others.
_TEXT_KEYS = ("str", "value", "text", "label", "name")


def absent(value: object) -> bool:
    """Whether a value stands for none: None, NaN, pandas' NA and NaT, and an empty text, list or object."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Integral):
        return math.isnan(value)
    return isinstance(value, (str, list, tuple, Mapping)) and not value


def as_text(value: object) -> object:
    """A number, a date or an object around a text as text; what is none of these as it is, to be refused by name.

    A whole number is written without a point where it came as a whole number: 1889, but 2.0. A date without a time of
    day is written as 2025-05-08.
    """
    if isinstance(value, Mapping):
        found = next((value[key] for key in _TEXT_KEYS if isinstance(value.get(key), (str, numbers.Real))), None)
        return value if found is None else as_text(found)
    if isinstance(value, str):
        return str(value)  # numpy has a class of its own for texts
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return value
    if isinstance(value, numbers.Integral):
        return str(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value)) if isinstance(value, float) or hasattr(value, "dtype") else str(value)
    if isinstance(value, datetime.datetime):
        return value.date().isoformat() if value.time() == datetime.time() else value.isoformat(sep=" ")
    if isinstance(value, datetime.date):
        return value.isoformat()
    return value


def texts_in(value: object) -> list[object]:
    """The texts of a list, or of lists in it, in order and without those that are absent; of one value a list of it.

    An empty text alone is one: it is refused where it is needed.
    """
    if type(value) is str:
        return [value]
    if hasattr(value, "tolist") and not isinstance(value, str):  # numpy's arrays, as pandas reads lists of Parquet
        value = value.tolist()
    if isinstance(value, Mapping) and isinstance(value.get("aliases"), list):
        value = [as_text(value), *value["aliases"]]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts_in(item) if text != ""]
    return [] if absent(value) and value != "" else [as_text(value)]
