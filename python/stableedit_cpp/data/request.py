"""Edit requests: what is to be changed, and what to look at afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral

from stableedit_cpp.data.formats import Format, detect
from stableedit_cpp.data.frames import rows_of
from stableedit_cpp.data.nested import expand
from stableedit_cpp.data.notes import Notes
from stableedit_cpp.data.variants import as_variants, clean_text

__all__ = ["EditRequest", "as_requests", "checked", "requests_of"]


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into the model.

    Attributes:
        prompt: text that the model continues, e.g. ``"The capital of Australia is"``.
        target: answer it shall give, without the leading space; ``" " + target`` is what the model learns.
        rephrase: the same question in other words (generalization).
        locality_prompt, locality_target: an unrelated prompt and its answer (specificity).
        subject: what the fact is about, as the prompt has it; editors that locate facts (MEMIT, AlphaEdit) need it.
        id: name of the request, unique within a call.
        persona: the question as someone with a manner of speaking would put it; the answer is ``target``.
        multi_hop_prompt, multi_hop_target: a question that follows from the edit in several steps, and its answer.
        variants: further statements of the same fact, ``(prompt, target)`` pairs: paraphrases, the statement reversed,
            what follows from it. They are edited, scored, audited and taken back with the request, as one. A text alone
            is a paraphrase, with the request's own target.
        portability_prompt, portability_target: a question whose answer follows from the edit, in one step or more, or
            that names the subject otherwise (portability); taken before those of ``multi_hop``.
        aliases: other spellings of ``target`` that are right where free answers are scored; they are not edited.

    Blanks and line ends around a text are dropped, with a warning where they are of a prompt or target: one at the end
    of a prompt, or before a target, would make two in what the model learns, and the edit would hold with that slip
    only. After a prompt of several lines, a rendered chat, say, the line end stays.

    Raises:
        ValueError: for an empty prompt or target, a field that is not text, a variant without a target, or two answers
            to one prompt.
    """

    prompt: str
    target: str
    rephrase: str | None = None
    locality_prompt: str | None = None
    locality_target: str | None = None
    subject: str | None = None
    id: str | None = None
    persona: str | None = None
    multi_hop_prompt: str | None = None
    multi_hop_target: str | None = None
    variants: Sequence[str | tuple[str, str] | Mapping[str, str]] | None = None
    portability_prompt: str | None = None
    portability_target: str | None = None
    aliases: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.id, Integral) and not isinstance(self.id, bool):
            object.__setattr__(self, "id", str(int(self.id)))
        for name in _TEXTS:
            required, value = name in ("prompt", "target"), getattr(self, name)
            text = clean_text(name, value, required=required)
            if text != value and name != "id":
                object.__setattr__(self, name, text)
                if required:
                    warnings.warn(f"blanks around the {name} {value!r:.60} are dropped", stacklevel=3)
        object.__setattr__(self, "variants", as_variants(self.variants, self.prompt, self.target))
        object.__setattr__(self, "aliases", self._as_aliases(self.aliases))

    def _as_aliases(self, value: object) -> tuple[str, ...]:
        if value is not None and not isinstance(value, (str, list, tuple)):
            raise ValueError(f"aliases must be a list of texts, not {value!r:.60}")
        items = [value] if isinstance(value, str) else value or ()
        found = [clean_text(f"aliases[{index}]", item, required=True) for index, item in enumerate(items)]
        return tuple(dict.fromkeys(text for text in found if text != self.target))

    @classmethod
    def from_record(
        cls,
        record: Mapping[str, object],
        format: Format | None = None,
        seed: int = 0,
        variants: Sequence[str] = (),
    ) -> EditRequest:
        """Build a request from a record with our own field names or those of a published data set.

        Args:
            format: of the record; None tells it from the record's fields.
            seed, variants: see ``Format.values``.

        Raises:
            ValueError: if the record fits no known format (the message lists its fields and the formats), has a value
                that a request cannot have, or holds several requests (MQuAKE; ``read_requests`` reads these).
        """
        found = requests_of(record, format, seed, variants)
        if len(found) != 1:
            raise ValueError(f"the record holds {len(found)} requests; read_requests reads such a data set")
        return found[0]

    @property
    def question(self) -> str:
        """The prompt without any white space around it: of requests with one question, the last is to hold."""
        return self.prompt.strip()

    @property
    def statements(self) -> tuple[tuple[str, str], ...]:
        """``(prompt, target)`` of all that the model is to say: the request's own, then its variants."""
        return ((self.prompt, self.target), *self.variants)

    @property
    def answers(self) -> dict[str, str]:
        """The target of each statement by its question, both without white space around them."""
        return {prompt.strip(): target.strip() for prompt, target in self.statements}

    def to_dict(self) -> dict[str, object]:
        """The fields that are set, for JSON."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        lists = {"variants": [list(pair) for pair in values.pop("variants")], "aliases": list(values.pop("aliases"))}
        return values | {name: value for name, value in lists.items() if value}


_TEXTS = tuple(field.name for field in fields(EditRequest) if field.name not in ("variants", "aliases"))


def requests_of(
    record: Mapping[str, object],
    format: Format | None = None,
    seed: int = 0,
    variants: Sequence[str] = (),
    notes: Notes | None = None,
) -> list[EditRequest]:
    """All requests of a record: one, or in MQuAKE several. Arguments and errors as ``EditRequest.from_record``; notes
    are told what was changed on the way."""
    own = notes or Notes()
    found = []
    for one in expand(record):
        values = (format or detect(one)).values(one, seed, variants, own)
        missing = next((name for name in ("prompt", "target") if values[name] is None), None)
        if missing is not None:
            raise ValueError(f"{missing} is empty; an edit request needs a prompt and a target answer")
        found.append(EditRequest(**values))
    return found


def as_requests(items: Iterable[EditRequest | Mapping[str, object]]) -> list[EditRequest]:
    """Check a list of requests or records, or the rows of a pandas DataFrame, as a whole.

    Raises:
        ValueError: naming the item that is wrong, or the id that occurs twice.
    """
    if isinstance(items, (str, bytes, Mapping, EditRequest)):
        raise ValueError(f"requests must be a list of EditRequest or dict, not a single {type(items).__name__}")
    return [request for _, request in checked(items, {}, stacklevel=6)]


def checked(
    items: Iterable[EditRequest | Mapping[str, object]], seen: MutableMapping[str, int], stacklevel: int = 2
) -> Iterator[tuple[str, EditRequest]]:
    """``("request 3", request)`` for each request of some items.

    Args:
        seen: takes where each id was first seen.

    Raises: as ``as_requests``.
    """
    notes = Notes()
    for index, item in enumerate(rows_of(items)):
        if isinstance(item, EditRequest):
            found = [item]
        elif isinstance(item, Mapping):
            try:
                found = requests_of(item, notes=notes)
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from None
        else:
            raise ValueError(f"request {index} must be an EditRequest or a dict, not {type(item).__name__}")
        for request in found:
            if request.id is not None:
                earlier = seen.get(request.id)
                if earlier is not None:
                    raise ValueError(f"requests {earlier} and {index} have the same id {request.id!r}")
                seen[request.id] = index
            yield f"request {index}", request
    notes.say(("blanks", "answers", "lists"), stacklevel=stacklevel + 1)
