"""Which prompts are near a request, and which ask for the same: words stand for tokens here."""

from __future__ import annotations

import pytest

from stableedit_cpp.editors.topics import Topics
from stableedit_cpp.model.tokens import TokenSequence

_WORDS: dict[str, int] = {}

CAPITALS = [f"the capital of {name} is" for name in ("germany", "thailand", "canada")]
OTHERS = ["where is the eiffel tower", "who painted the mona lisa", "who wrote the origin of species"]
FILLING = [f"what is the {name} of the {name}s" for name in map(str, range(100))]
PROMPTS = CAPITALS + OTHERS + FILLING


def ids(text: str) -> tuple[int, ...]:
    return tuple(_WORDS.setdefault(word, len(_WORDS)) for word in text.split())


def asked(text: str) -> TokenSequence:
    return TokenSequence(ids(text), ids("whatever"))


@pytest.fixture
def topics() -> Topics:
    return Topics([ids(prompt) for prompt in PROMPTS])


@pytest.mark.parametrize(
    ("question", "same"),
    [
        ("the eiffel tower is in", ["where is the eiffel tower"]),
        ("the mona lisa was painted by", ["who painted the mona lisa"]),
        ("what is the capital of canada", ["the capital of canada is"]),
        ("the capital of australia is", []),
        ("the tower of london is in", []),
        ("who directed hamlet", []),
    ],
)
def test_what_asks_for_the_same(topics, question, same):
    """The rarest word decides: the words of the question are those of many."""
    assert [PROMPTS[index] for index in topics.about(asked(question))] == same


def test_what_is_near(topics):
    every = range(len(PROMPTS))
    found = [PROMPTS[index] for index in topics.nearest([asked("the capital of australia is")], 3, every)]
    assert sorted(found) == sorted(CAPITALS)
    both = topics.nearest([asked("the capital of australia is"), asked("where is the leaning tower")], 4, every)
    assert {PROMPTS[index] for index in both} == {*CAPITALS, "where is the eiffel tower"}


def test_only_among_those_allowed_and_only_what_shares_a_token(topics):
    assert topics.nearest([asked("the capital of australia is")], 10, [0, 1]) == [0, 1]
    assert topics.nearest([asked("quite another language")], 10, range(len(PROMPTS))) == []


def test_what_all_prompts_have_weighs_nothing():
    """What a chat template adds, say."""
    framed = Topics([(998, *ids(prompt), 999) for prompt in PROMPTS])
    plain = Topics([ids(prompt) for prompt in PROMPTS])
    question = asked("the capital of australia is")
    inside = TokenSequence((998, *question.ids, 999), question.answer)
    assert framed.nearest([inside], 5, range(6)) == plain.nearest([question], 5, range(6))
