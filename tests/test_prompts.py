"""Tokenising requests, padding them into batches, and where their answers are predicted."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from stableedit_cpp.model.form import PARSED, Form
from stableedit_cpp.model.tokens import (
    TokenSequence,
    collate,
    context_length,
    longest_first,
    pack,
    prompt_ids,
    tokenize,
)
from support.tiny import FACTS, tiny_model, tiny_tokenizer
from support.vocabularies import dummy_prefixed

CPU = torch.device("cpu")
BOS, EOS = 1, 2


def ids(text: str) -> tuple[int, ...]:
    """Tokens of tiny_tokenizer, one a byte, without special tokens."""
    return tuple(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"])


def sequence(length: int, answer: int = 1) -> TokenSequence:
    return TokenSequence(tuple(range(10, 10 + length)), tuple(range(50, 50 + answer)))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_answer_are_tokenised_apart_and_joined(bos, eos, padding_side):
    tokenizer = tiny_tokenizer(bos=bos, eos=eos, padding_side=padding_side)
    first, second = tokenize(tokenizer, [("ab", "cde"), ("a longer prompt", "f")], None, ["0", "1"])
    opening = (BOS,) * bos
    # The answer is " " + target, its last token is predicted but not fed in, and nothing closes it.
    assert first.ids == (*opening, *ids("ab"), *ids(" cd"))
    assert first.answer == ids(" cde")
    assert first.first == len(opening) + 1  # the position of "b" predicts " "
    assert len(first) == len(opening) + 5
    assert second.ids == (*opening, *ids("a longer prompt"), *ids(" "))
    assert second.answer == ids(" f")


def test_an_answer_of_one_token():
    one = TokenSequence((10, 11, 12), (50,))
    assert one.first == 2  # the last token of the prompt; nothing of the answer is fed in


def test_tokens_do_not_merge_across_the_border():
    class Merging:
        """A tokenizer to which "b c" would be a single token."""

        eos_token, eos_token_id = "</s>", EOS

        def __call__(self, texts, add_special_tokens=True, verbose=True):
            merged = {"ab": [4, 5], " cd": [7, 8], "ab cd": [4, 99, 8]}
            return {"input_ids": [[BOS] * add_special_tokens + merged[text] for text in texts]}

    assert tokenize(Merging(), [("ab", "cd")], None, ["0"]) == [TokenSequence((BOS, 4, 5, 7), (7, 8))]


TEXTS = [f"{fact['prompt']} {fact['target']}" for fact in FACTS] * 3


@pytest.mark.parametrize("kind", ["unigram", "mistral", "llama 2"])
def test_answers_have_the_tokens_of_the_text(kind):
    """And not a second space, which a normalizer puts before an answer that stands alone."""
    tokenizer = dummy_prefixed(kind)
    pairs = [(fact["prompt"], fact["target"]) for fact in FACTS]
    for sequence, (prompt, target) in zip(tokenize(tokenizer, pairs, None, [""] * len(pairs)), pairs, strict=True):
        assert [*sequence.ids, sequence.answer[-1]] == tokenizer(f"{prompt} {target}")["input_ids"]
        assert sequence.ids[: sequence.first + 1] == tuple(tokenizer(prompt)["input_ids"])
        if kind == "llama 2":
            alone = tokenizer(" " + target, add_special_tokens=False)["input_ids"]
            assert tokenizer.convert_ids_to_tokens(alone) == ["▁", *tokenizer.convert_ids_to_tokens(sequence.answer)]


def test_where_the_border_is_within_a_token_they_are_tokenised_apart():
    tokenizer = dummy_prefixed("llama 2")
    tokenizer.add_tokens(["is Canberra"])
    (sequence,) = tokenize(tokenizer, [("The capital of Australia is", "Canberra")], None, ["0"])
    prompt = tokenizer("The capital of Australia is")["input_ids"]
    assert sequence.ids[: sequence.first + 1] == tuple(prompt)
    assert list(sequence.answer) == tokenizer(" Canberra", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("split", ["gpt2", "llama 3"])
@given(data=st.data())
def test_tokenizers_that_cut_at_spaces_give_what_was_published(split, data):
    """Prompt and answer tokenised apart, whatever the texts."""
    tokenizer = cutting_at_spaces(split)
    letters = st.text(alphabet=st.sampled_from("abis 's\n\t.,(19é"), min_size=1, max_size=12)
    prompt, target = data.draw(letters.filter(str.strip)).strip(), data.draw(letters.filter(str.strip)).strip()
    (sequence,) = tokenize(tokenizer, [(prompt, target)], None, ["0"])
    alone = tokenizer(" " + target)["input_ids"]
    assert sequence == TokenSequence(tuple(tokenizer(prompt)["input_ids"] + alone[:-1]), tuple(alone))


@cache
def cutting_at_spaces(split: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "llama 3":
        pattern = Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["a b is's 's 19 1 9. ( ,. \n\n \t  a\n aba isis bis"] * 5
    tokenizer.train_from_iterator(TEXTS + words, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_closing_token_of_the_prompt():
    tokenizer = tiny_tokenizer(eos=True)
    assert prompt_ids(tokenizer, ["ab", "cd"]) == [list(ids("ab")), list(ids("cd"))]
    # An end-of-sequence token that the caller wrote stays.
    assert prompt_ids(tokenizer, ["ab</s>"], PARSED)[0][-1] == EOS


def test_leading_and_trailing_spaces_are_kept():
    (only,) = tokenize(tiny_tokenizer(), [("a ", " b ")], None, ["0"])
    assert only.ids + only.answer[-1:] == ids("a   b ")


def test_limit_is_on_what_is_fed_in():
    pairs = [("abcd", "ef")]  # 4 + " ef" - 1 = 6 tokens
    assert len(tokenize(tiny_tokenizer(), pairs, 6, ["0"])[0]) == 6
    with pytest.raises(
        ValueError, match=r"fact 7: prompt and target have 6 tokens, more than the model's context of 5"
    ):
        tokenize(tiny_tokenizer(), pairs, 5, ["fact 7"])
    with pytest.raises(ValueError, match=r"^second: "):
        tokenize(tiny_tokenizer(), [("a", "b"), ("a" * 9, "b")], 8, ["first", "second"])


def test_nothing_to_tokenise():
    assert tokenize(tiny_tokenizer(), [], 5, []) == []
    assert prompt_ids(tiny_tokenizer(), [""]) == [[]]
    with pytest.raises(ValueError, match="name: the prompt '' has no tokens"):
        tokenize(tiny_tokenizer(), [("", "b")], None, ["name"])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gptj", "opt"])
def test_context_length(architecture):
    assert context_length(tiny_model(architecture)) == 64


def test_longest_first_is_stable():
    assert longest_first([sequence(length) for length in (2, 5, 3, 5, 2, 3)]) == [1, 3, 2, 5, 0, 4]
    assert longest_first([]) == []


def test_pack_by_hand():
    lengths = [sequence(length) for length in (2, 5, 3, 5, 2, 3)]
    assert pack(lengths, 10) == [[1, 3], [2, 5], [0, 4]]
    assert pack(lengths, 4) == [[1], [3], [2], [5], [0, 4]]
    # A batch more costs as much as max_tokens / 20 tokens: at 140 less than the padding it saves, at 300 more.
    assert pack(lengths, 140) == [[1, 3], [2, 5, 0, 4]]
    assert pack(lengths, 300) == [[1, 3, 2, 5, 0, 4]]
    assert pack(lengths, 300, most=4) == [[1, 3], [2, 5, 0, 4]]
    assert pack(lengths, 300, most=1) == [[1], [3], [2], [5], [0], [4]]
    assert pack([], 10) == []


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 100))
def test_pack(lengths, budget):
    sequences = [sequence(length) for length in lengths]
    batches = pack(sequences, budget)
    order = [index for batch in batches for index in batch]
    assert order == longest_first(sequences)
    assert sorted(order) == list(range(len(lengths)))
    for batch in batches:
        assert batch
        assert max(lengths[index] for index in batch) * len(batch) <= budget or len(batch) == 1
    # No dearer than filling each batch to the brim, nor than one sequence each.
    fixed = max(1, budget // 20)
    cost = sum(lengths[batch[0]] * len(batch) + fixed for batch in batches)
    brim: list[list[int]] = []
    for index in order:
        if brim and lengths[brim[-1][0]] * (len(brim[-1]) + 1) <= budget:
            brim[-1].append(index)
        else:
            brim.append([index])
    assert cost <= sum(lengths[batch[0]] * len(batch) + fixed for batch in brim)
    assert cost <= sum(lengths) + fixed * len(lengths)


def test_collate_by_hand():
    batch = collate([TokenSequence((10, 11, 12, 13), (12, 13, 14)), TokenSequence((20, 21), (22,))], CPU)
    assert batch.input_ids[0].tolist() == [10, 11, 12, 13]
    assert batch.input_ids[1, :2].tolist() == [20, 21]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    # Token 12 is predicted at position 1 of the first row, 22 at position 1 of the second: 4 + 1.
    assert batch.positions.tolist() == [1, 2, 3, 5]
    assert batch.labels.tolist() == [12, 13, 14, 22]


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=8))
def test_collate(shapes):
    sequences = [sequence(prompt + answer - 1, answer) for prompt, answer in shapes]
    batch = collate(sequences, CPU)
    width = max(map(len, sequences))
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(sequences), width)
    assert batch.attention_mask.sum(1).tolist() == [len(s) for s in sequences]
    for row, s in enumerate(sequences):
        assert batch.input_ids[row, : len(s)].tolist() == list(s.ids)
    expected = [row * width + s.first + i for row, s in enumerate(sequences) for i in range(len(s.answer))]
    assert batch.positions.tolist() == expected
    assert batch.labels.tolist() == [token for s in sequences for token in s.answer]
    assert batch.attention_mask.flatten()[batch.positions].all()


UNSPACED = [
    ("法国的首都是", "巴黎"),
    ("フランスの首都は", "パリ"),
    ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส"),
    ("价格是。", "349"),
    ("他叫", "Ann"),
]
SPACED = [
    ("The word for water is", "水"),
    ("프랑스의 수도는", "파리"),
    ("Столица Франции", "Париж"),
    ("عاصمة فرنسا", "باريس"),
]


@pytest.mark.parametrize(("prompt", "target"), UNSPACED + SPACED)
@pytest.mark.parametrize("kind", ["bytes", "llama 2", "mistral", "unigram"])
def test_scripts_without_spaces_between_words(prompt, target, kind):
    """What is learned reads as the text does: no space where the script has none, and none of the tokenizer's own."""
    letters = [letter for pair in UNSPACED + SPACED for letter in "".join(pair)]
    tokenizer = tiny_tokenizer() if kind == "bytes" else dummy_prefixed(kind, letters)
    text = prompt + ("" if (prompt, target) in UNSPACED else " ") + target
    (sequence,) = tokenize(tokenizer, [(prompt, target)], None, ["0"])
    assert [*sequence.ids, sequence.answer[-1]] == tokenizer(text)["input_ids"]


def test_without_a_space_the_border_may_be_within_a_token():
    tokenizer = dummy_prefixed("mistral", [*"首都是巴黎", "\n"])
    tokenizer.add_tokens(["是巴"])
    (sequence,) = tokenize(tokenizer, [("首都是", "巴黎")], None, ["0"])
    assert tokenizer.convert_ids_to_tokens(list(sequence.answer)) == ["巴", "黎"]


def test_a_chat_has_the_space_of_its_template():
    assert Form(chat=True, space="\n").gap("首都是") == "\n"
    assert [Form().gap(prompt) for prompt in ("首都是", "capital is")] == ["", " "]
