"""Edit requests: what is to be changed, and what to look at afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

from stableedit_cpp.data.formats import Format, detect
from stableedit_cpp.data.variants import as_variants, clean_text

__all__ = ["EditRequest", "as_requests"]


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

    Blanks around a text are dropped: one at the end of a prompt, or before a target, would make two in what the model
    learns, and the edit would hold with that slip only. Line ends of a prompt stay, which a chat template needs.

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

    def __post_init__(self) -> None:
        if isinstance(self.id, int) and not isinstance(self.id, bool):
            object.__setattr__(self, "id", str(self.id))
        for field in fields(self):
            if field.name != "variants":
                required, value = field.name in ("prompt", "target"), getattr(self, field.name)
                text = clean_text(field.name, value, required=required)
                object.__setattr__(self, field.name, value if field.name == "id" else text)
        object.__setattr__(self, "variants", as_variants(self.variants, self.prompt, self.target))

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
            ValueError: if the record fits no known format (the message lists its fields and the formats), or has a
                value that a request cannot have.
        """
        return cls(**(format or detect(record)).values(record, seed, variants))

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
        variants = [list(pair) for pair in values.pop("variants")]
        return values | ({"variants": variants} if variants else {})


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
