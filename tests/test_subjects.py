"""Where the subject of a request is found: in its text, and among its tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stableedit_cpp.model.form import Form
from stableedit_cpp.model.subjects import find_subject, subject_prefixes
from stableedit_cpp.model.tokens import prompt_ids, tokenize
from support.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", "Danielle Darrieux"),
        ("Who wrote THE TEMPEST?", "The Tempest", "THE TEMPEST"),
        ("Is Paris in Texas, or is Paris in France?", "Paris", "Paris"),
        ("An Annual report on Ann", "Ann", "Ann"),
        ("A pineapple is no Apple", "apple", "Apple"),  # a word in another case, rather than a part of one
        ("Der Ball der Berliner", "ball", "Ball"),
        ("the C++ (2020) standard of C++ (2020)?", "C++ (2020)", "C++ (2020)"),
        ("東京都の首都は", "東京", "東京"),  # no words apart
        ("İstanbul lies in", "İSTANBUL", "İstanbul"),
        ("New\n York is", "New York", "New\n York"),
    ],
)
def test_it_is_found_in_the_text(prompt, subject, found):
    begin, end = find_subject(prompt, subject)
    assert prompt[begin:end] == found
    assert found not in prompt[begin + 1 :]  # of several places the last


def test_the_place_is_one_of_its_own():
    assert find_subject("An Annual report on Ann, annually", "Ann") == (20, 23)
    assert find_subject("A pineapple", "apple") == (6, 11)  # within a word where there is nothing else
    assert find_subject("The capital of Peru", "Chile") is None


def _words() -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, with a space at the head of words, learnt from two sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["The capital of Australia is Canberra, Zoë said. Who of and the."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def _pieces() -> PreTrainedTokenizerFast:
    """Like SentencePiece: a mark for a space, one more of them before every text, and opening tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(["The capital of Australia is Canberra, Zoë said. Who of and the."] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "opened and closed": lambda: tiny_tokenizer(bos=True, eos=True),
    "words": _words,
    "pieces": _pieces,
    "slow": ByT5Tokenizer,
}


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("which", TOKENIZERS)
def test_the_tokens_up_to_the_subject_are_the_first_of_the_prompt_and_end_with_it(which, padding_side):
    tokenizer = TOKENIZERS[which]()
    tokenizer.padding_side = padding_side
    prompts = ["The capital of Australia is", "Who said Zoë said. and the capital of australia", "of Zoë"]
    subjects = ["Australia", "Zoë said.", "Zoë"]
    names = [""] * len(prompts)
    contexts = ("", "The is. ", "Canberra said Australia. ")
    prefixes = subject_prefixes(tokenizer, prompts, subjects, names, contexts=contexts)
    for prompt, subject, found in zip(prompts, subjects, prefixes, strict=True):
        for context, prefix in zip(contexts, found, strict=True):
            whole = prompt_ids(tokenizer, [context + prompt])[0]
            assert prefix == tuple(whole[: len(prefix)])
            text = tokenizer.decode(prefix, skip_special_tokens=True)
            end = find_subject(prompt, subject)[1]
            assert text.strip() == (context + prompt[:end]).strip()
            assert tokenizer.decode(prefix[:-1], skip_special_tokens=True) != text
        (sequence,) = tokenize(tokenizer, [(prompt, "Canberra")], None, [""])
        assert sequence.ids[: len(found[0])] == found[0]


def test_a_token_that_goes_beyond_the_subject_belongs_to_it():
    tokenizer = _words()
    ((prefix,),) = subject_prefixes(tokenizer, ["The capital of Australia is"], ["Austral"], [""])
    assert tokenizer.decode(prefix) == "The capital of Australia"


def test_in_a_chat_it_is_that_of_the_question(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "You speak of Peru.{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ((prefix,),) = subject_prefixes(tokenizer, ["What of Peru?"], ["peru"], [""], Form(chat=True))
    assert tokenizer.decode(prefix) == "You speak of Peru.<user>What of Peru"


def test_what_is_missing_is_said_with_the_record_and_what_to_add(tokenizer):
    def found(subject):
        subject_prefixes(
            tokenizer, ["Gold is", "The capital of Peru is"], ["Gold", subject], ["request 0", "request 1 (a)"]
        )

    with pytest.raises(ValueError, match=r"request 1 \(a\): it has no subject.* add the field 'subject'.*'The capital"):
        found(None)
    with pytest.raises(ValueError, match=r"request 1 \(a\): the subject 'Chile' does not occur in the prompt 'The cap"):
        found("Chile")
