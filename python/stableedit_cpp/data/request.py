"""Edit requests: what is to be changed, and what to look at afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from stableedit_cpp.data.formats import Format, detect

__all__ = ["EditRequest", "as_requests"]


_BLANKS = " \t\u00a0"


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into the model.

    Attributes:
        prompt: text that the model continues, e.g. ``"The capital of Australia is"``.
        target: answer it shall give, without the leading space; ``" " + target`` is what the model learns.
        rephrase: the same question in other words (generalization).
        locality_prompt, locality_target: an unrelated prompt and its answer (specificity).
        subject: what the fact is about; kept for reports.
        id: name of the request, unique within a call.
        persona: the question as someone with a manner of speaking would put it; the answer is ``target``.
        multi_hop_prompt, multi_hop_target: a question that follows from the edit in several steps, and its answer.

    Blanks around a text are dropped: one at the end of a prompt, or before a target, would make two in what the model
    learns, and the edit would hold with that slip only. Line ends of a prompt stay, which a chat template needs.

    Raises:
        ValueError: for an empty prompt or target, or a field that is not text.
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

    def __post_init__(self) -> None:
        if isinstance(self.id, int) and not isinstance(self.id, bool):
            object.__setattr__(self, "id", str(self.id))
        for field in fields(self):
            value = getattr(self, field.name)
            required = field.name in ("prompt", "target")
            if not (isinstance(value, str) or (value is None and not required)):
                raise ValueError(f"{field.name} must be text, not {type(value).__name__} ({value!r:.60})")
            try:
                (value or "").encode()
            except UnicodeEncodeError:  # JSON can smuggle in half of a surrogate pair, which no tokenizer takes
                raise ValueError(f"{field.name} is not valid Unicode text ({value!r:.60})") from None
            if required and not value.strip():
                raise ValueError(f"{field.name} is empty; an edit request needs a prompt and a target answer")
            if value and field.name != "id":
                object.__setattr__(self, field.name, value.strip(_BLANKS))

    @classmethod
    def from_record(cls, record: Mapping[str, object], format: Format | None = None, seed: int = 0) -> EditRequest:
        """Build a request from a record with our own field names or those of a published data set.

        Args:
            format: of the record; None tells it from the record's fields.
            seed: see ``Format.values``.

        Raises:
            ValueError: if the record fits no known format (the message lists its fields and the formats), or has a
                value that a request cannot have.
        """
        return cls(**(format or detect(record)).values(record, seed))

    @property
    def question(self) -> str:
        """The prompt without any white space around it: of requests with one question, the last is to hold."""
        return self.prompt.strip()

    def to_dict(self) -> dict[str, str]:
        """The fields that are set, for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def as_requests(items: Iterable[EditRequest | Mapping[str, object]]) -> list[EditRequest]:
    """Check a list of requests or records as a whole.

    Raises:
        ValueError: naming the item that is wrong, or the id that occurs twice.
    """
    if isinstance(items, (str, bytes, Mapping, EditRequest)):
        raise ValueError(f"requests must be a list of EditRequest or dict, not a single {type(items).__name__}")
    requests: list[EditRequest] = []
    seen: dict[str, int] = {}
    for index, item in enumerate(items):
        if isinstance(item, EditRequest):
            request = item
        elif isinstance(item, Mapping):
            try:
                request = EditRequest.from_record(item)
            except ValueError as error:
                raise ValueError(f"request {index}: {error}") from None
        else:
            raise ValueError(f"request {index} must be an EditRequest or a dict, not {type(item).__name__}")
        if request.id is not None:
            if request.id in seen:
                raise ValueError(f"requests {seen[request.id]} and {index} have the same id {request.id!r}")
            seen[request.id] = index
        requests.append(request)
    return requests
