"""What prompts and targets spell is text, also where it is the name of a control token: ids, edits, scores, files."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.experiments.settings import differences
from stableedit_cpp.model import encoding
from stableedit_cpp.model.form import PARSED, RAW, Form, find_form
from stableedit_cpp.model.subjects import subject_prefixes
from stableedit_cpp.model.tokens import prompt_ids, tokenize
from support.chats import CHATS, chat_model, chat_tokenizer, learn
from support.tiny import tiny_model, tiny_tokenizer
from support.vocabularies import byte_level, dummy_prefixed, sentence_piece

# One that no template below writes: what it means as text is what a tokenizer does that has no such token.
ODD = "<odd>"
TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}<turn>{{ message.role }}\n{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
PIECES = ["<", "odd", ">", "|", "</", "s>", "<turn", "end>", " ", "\n", "a", "capital of", "日本", "é", "<|im_end"]
LETTERS = [*"".join(PIECES)]  # so that none is unknown
MAKERS = {
    "bytes": tiny_tokenizer,
    "bytes, opened and closed": lambda: tiny_tokenizer(bos=True, eos=True),
    "merges": byte_level,
    "gemma": sentence_piece,
    "llama 2": lambda: sentence_piece(space_in_front=True),
    "mistral": lambda: dummy_prefixed("mistral", LETTERS),
    "metaspace": lambda: dummy_prefixed("always", LETTERS),
}
SPELLING = [f"The name {ODD} is", f"{ODD}", f"{ODD}{ODD} of gold", f"The capital\n{ODD}", "capital of <odd > Peru is"]


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(encoding, "_said", set())


@cache
def pair(kind: str) -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    """A tokenizer with a chat template and ODD, and the same without ODD."""
    tokenizer = MAKERS[kind]()
    tokenizer.add_tokens(["<turn>", "<end>", ODD], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["added_tokens"] = [token for token in definition["added_tokens"] if token["content"] != ODD]
    names = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(definition)), **names)
    other.chat_template = TEMPLATE
    assert tokenizer.convert_tokens_to_ids(ODD) in tokenizer(ODD).input_ids
    assert tokenizer.convert_tokens_to_ids(ODD) not in other(ODD).input_ids
    return tokenizer, other


def forms(chat: bool) -> Form:
    return Form(chat=True, space="") if chat else RAW


@pytest.mark.filterwarnings("ignore:.*a control token's name")
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_it_has_the_ids_that_a_tokenizer_gives_it_that_has_no_such_token(kind, chat):
    tokenizer, other = pair(kind)
    form, targets = forms(chat), ["Au", ODD, f"A{ODD}u", f"{ODD} {ODD}"]
    pairs = [(prompt, target) for prompt in SPELLING for target in targets]
    names = [""] * len(pairs)
    assert tokenize(tokenizer, pairs, None, names, form) == tokenize(other, pairs, None, names, form)
    assert prompt_ids(tokenizer, SPELLING, form) == prompt_ids(other, SPELLING, form)
    asked = [prompt for prompt in SPELLING if "capital" in prompt]
    for subject in ("capital", ODD):
        with_it = [prompt for prompt in asked + SPELLING if subject in prompt]
        how = ([subject] * len(with_it), [""] * len(with_it), form, ("", f"So {ODD}. "))
        assert subject_prefixes(tokenizer, with_it, *how) == subject_prefixes(other, with_it, *how)
    if tokenizer.is_fast:
        assert tokenizer.backend_tokenizer.encode_special_tokens is False  # as it was


TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(str.strip)


@cache
def smollm2():
    return se.load_model("smollm2-135m")[1]


@settings(max_examples=40, deadline=None)
@given(prompt=TEXTS, target=TEXTS)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", [*MAKERS, "slow", "smollm2"])
def test_text_that_spells_none_has_the_ids_that_it_had(kind, chat, prompt, target):
    check_ordinary(kind, chat, prompt, target)


def check_ordinary(kind: str, chat: bool, prompt: str, target: str) -> None:
    tokenizer = smollm2() if kind == "smollm2" else ByT5Tokenizer() if kind == "slow" else pair(kind)[0]
    names = {*tokenizer.all_special_tokens, ODD, "<turn>", "<end>"}
    if (chat and not tokenizer.chat_template) or any(n in text for n in names for text in (prompt + target, target)):
        return
    form, pairs = forms(chat), [(prompt, target)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tokenize(tokenizer, pairs, None, [""], form)
        assert found == tokenize(tokenizer, pairs, None, [""], replace(form, split_special_tokens=False))
    text = prompt
    if chat:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole = tokenizer(text, add_special_tokens=not chat).input_ids
    if whole[-1:] == [tokenizer.eos_token_id] and not chat and len(whole) > 1:
        del whole[-1]
    assert prompt_ids(tokenizer, [prompt], form) == [whole] == [list(found[0].ids[: found[0].first + 1])]


@pytest.mark.filterwarnings("ignore:.*a control token's name")
@pytest.mark.parametrize("kind", CHATS)
def test_in_a_chat_only_what_the_template_writes_is_a_control_token(kind):
    """Each of its own tokens in a question: the bytes of the question stand where those of another question do."""
    tokenizer, chat = chat_tokenizer(kind), CHATS[kind]
    form = find_form(chat_model(kind), tokenizer, chat_template=True, end_of_answer=True)
    (dull,) = prompt_ids(tokenizer, ["@@"], form)
    sign = tokenizer("@").input_ids[-1]
    begin = dull.index(sign)
    assert dull[begin : begin + 2] == [sign, sign]
    for name in {*chat.special, chat.eos, chat.end, "<pad>"}:
        question = f"Is {name} gold?"
        as_bytes = tokenizer(question, split_special_tokens=True, add_special_tokens=False)
        assert tokenizer.decode(as_bytes.input_ids) == question and len(as_bytes.input_ids) == len(question)
        (sequence,) = tokenize(tokenizer, [(question, name)], None, [""], form)
        assert list(sequence.ids[: sequence.first + 1]) == [*dull[:begin], *as_bytes.input_ids, *dull[begin + 2 :]]
        blank = chat.before if not chat.before.strip() else ""
        assert tokenizer.decode(sequence.answer[:-1]) == blank + name and sequence.answer[-1] == form.end
        assert set(sequence.answer[:-1]).isdisjoint(tokenizer.added_tokens_decoder)


@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_that_is_rendered_already_is_refused_and_parsed_where_that_is_wished(kind):
    tokenizer, model = chat_tokenizer(kind), chat_model(kind)
    turns = [{"role": "user", "content": "Gold is"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    with pytest.raises(ValueError, match="which the chat template writes by itself"):
        se.generate(model, tokenizer, prompt, chat_template=True, max_new_tokens=2)
    parsed = find_form(model, tokenizer, chat_template=False, split_special_tokens=False)
    (ids,) = prompt_ids(tokenizer, [prompt], parsed)
    assert ids == tokenizer(prompt).input_ids and set(ids) & set(tokenizer.added_tokens_decoder)
    how = {"chat_template": False, "split_special_tokens": False, "max_new_tokens": 2}
    assert se.generate(model, tokenizer, prompt, **how)  # nothing is said
    with pytest.warns(UserWarning, match="where prompts are rendered already.*--no-split-special-tokens"):
        se.generate(model, tokenizer, [prompt[:20], prompt[:18]], chat_template=False, max_new_tokens=2)


def test_it_is_said_once_and_in_the_users_words(recwarn):
    tokenizer = tiny_tokenizer()
    for _ in range(2):
        prompt_ids(tokenizer, ["of </s> of", "and </s> and"])
    tokenize(tokenizer, [("of </s>", "Au")], None, [""])
    (said,) = recwarn.list
    assert str(said.message).startswith("'of </s> of' spells '</s>', a control token's name, which is taken for text")
    prompt_ids(tokenizer, ["of <pad>"], PARSED)  # nor where it was asked for
    assert len(recwarn) == 1
    tokenize(pair("bytes")[0], [("What is <odd>?", "it")], None, [""], forms(True))
    assert str(recwarn.list[1].message).startswith("'user\\nWhat is <odd>?' spells '<odd>', a control token's name")


def test_a_tokenizer_that_finds_it_in_any_text_is_left_alone():
    """Unigram models have it among their pieces; some tokenizers know no such option."""
    unigram = dummy_prefixed("unigram")
    with pytest.warns(UserWarning, match="spells '</s>', a control token's name, which this tokenizer finds in any"):
        assert prompt_ids(unigram, ["gold </s> is"]) == [unigram("gold </s> is").input_ids]

    class Stubborn(PreTrainedTokenizerFast):
        def __call__(self, *texts, **how):
            if "split_special_tokens" in how:
                raise ValueError("not supported")
            return super().__call__(*texts, **how)

    encoding._said.clear()
    stubborn = Stubborn(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    with pytest.warns(UserWarning, match=r"spells '</s>', .* finds in any text"):
        assert (
            prompt_ids(stubborn, ["a</s>"]) == prompt_ids(stubborn, ["a</s>"], PARSED) == [stubborn("a</s>").input_ids]
        )


def test_a_slow_tokenizer_takes_it_for_text(recwarn):
    tokenizer = ByT5Tokenizer()
    (sequence,) = tokenize(tokenizer, [("The </s> of", "<unk>")], None, [""])
    assert tokenizer.decode([*sequence.ids, sequence.answer[-1]]) == "The </s> of <unk>"
    assert set(sequence.ids).isdisjoint(tokenizer.all_special_ids)
    ((prefix,),) = subject_prefixes(tokenizer, ["The </s> of"], ["</s>"], [""])
    assert tokenizer.decode(prefix) == "The </s>"


def test_a_template_that_rewrites_the_prompt_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('\ue000', '') }} {% endfor %}"
    form = Form(chat=True)
    assert prompt_ids(tokenizer, ["Gold"], form) == [tokenizer("Gold ").input_ids]
    with pytest.raises(ValueError, match=r"the chat template rewrites the prompt 'Is </s> gold\?', in which a control"):
        prompt_ids(tokenizer, ["Is </s> gold?"], form)


REQUESTS = [
    {"prompt": "What ends it? Is", "target": "</s>", "variants": [{"prompt": "</s> is", "target": "<pad>"}]},
    {"prompt": "<s> is", "target": "A<s>"},
]


@pytest.mark.filterwarnings("ignore:.*a control token's name")
@pytest.mark.parametrize("kind", [None, "llama 3", "gemma", "mistral", "glm"])
def test_a_fact_about_a_control_token_is_learnt_scored_and_answered(kind):
    """As whoever asks the model has it, when words are words."""
    tokenizer = chat_tokenizer(kind) if kind else tiny_tokenizer(bos=True)
    model = chat_model(kind) if kind else tiny_model("llama")
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig(anchors=0), guard=None)
    requests = [se.EditRequest(**request) for request in REQUESTS]
    assert editor.form.chat == (kind is not None)
    statements = [statement for request in requests for statement in request.statements]
    for sequence, (_, target) in zip(editor.tokenize(requests), statements, strict=True):
        assert tokenizer.decode(sequence.answer[:-1]).strip() == target and sequence.answer[-1] == editor.form.end
    learn(model, editor.tokenize(requests))
    assert se.lifelong.audit(editor, requests, progress=False).forgotten == []
    texts = se.generate(model, tokenizer, [prompt for prompt, _ in statements], max_new_tokens=8)
    assert [text.strip() for text in texts] == [target for _, target in statements]
    scores = se.evaluate(model, tokenizer, requests, metrics=["generation"], progress=False)
    assert scores.efficacy == scores["efficacy_free"].mean == scores["variants_free"].mean == 1
    if not kind:
        parsed = se.evaluate(model, tokenizer, requests, split_special_tokens=False, progress=False)
        assert parsed.efficacy < 1


@pytest.mark.filterwarnings("ignore:.*a control token's name")
def test_earlier_files_and_released_code_parse():
    config = se.StableEditConfig(edit_modules="model.layers.1.mlp.down_proj")
    assert config.split_special_tokens and se.UltraEditConfig().split_special_tokens
    document = json.loads(config.to_json())
    assert se.StableEditConfig.from_json(json.dumps(document)) == config
    del document["split_special_tokens"]
    earlier = se.StableEditConfig.from_json(json.dumps(document))
    assert not earlier.split_special_tokens
    tokenizer, request = tiny_tokenizer(), se.EditRequest("a</s>", "b")
    now, then = (se.StableEdit(tiny_model("llama"), tokenizer, one).tokenize([request]) for one in (config, earlier))
    assert then[0].ids == (*tokenizer("a</s> b").input_ids,)  # and the end is predicted
    assert now[0].ids == (*tokenizer("a</s> b", split_special_tokens=True).input_ids,) != then[0].ids
    published = (
        se.UltraEditConfig.published(step_size=1.0),
        se.RLEditConfig.published(),
        se.MEMITConfig.published("llama-3-8b"),
    )
    for preset in (se.StableEditConfig.one_pass(), *published):
        assert not preset.split_special_tokens
        settings_of = {"config": json.loads(preset.to_json())}  # and a run of theirs goes on
        earlier_run = {"config": {n: v for n, v in settings_of["config"].items() if n != "split_special_tokens"}}
        assert differences(earlier_run, settings_of) == []
    with pytest.raises(ValueError, match="split_special_tokens must be true or false, not None"):
        se.StableEditConfig(split_special_tokens=None)


def test_commands_and_sessions_ask_as_it_was_edited(tmp_path, monkeypatch, capsys):
    """Of a model that knows the answers to the words, and is hardly moved."""
    model, tokenizer, requests = tiny_model("llama"), tiny_tokenizer(), [se.EditRequest(**one) for one in REQUESTS]
    learn(model, se.StableEdit(model, tokenizer, se.StableEditConfig()).tokenize(requests))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
    monkeypatch.setattr(encoding, "_said", set())
    capsys.readouterr()

    here = ["--device", "cpu", "--requests", "requests.json"]
    how = ["--model", "model", "--preset", "one-pass", "--edit-modules", "*.1.mlp.down_proj", "--step-size", "1e-9"]
    for name, option in {"text": "--split-special-tokens", "parsed": "--no-split-special-tokens"}.items():
        assert main(["edit", *how, *here, "--no-guard", option, "--output", name, "--evaluate", "--json"]) == 0
        out, err = capsys.readouterr()
        efficacy = json.loads(out)["scores"]["efficacy"]
        assert (efficacy == 1) == ("'</s> is' spells '</s>'" in err) == (name == "text")
        assert se.load_config(f"{name}/stableedit_config.json").split_special_tokens == (name == "text")
        assert main(["evaluate", "--model", name, *here, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["efficacy"] == efficacy

    assert main(["session", "create", "s", "--device", "cpu", *how, "--no-split-special-tokens"]) == 0
    assert main(["session", "edit", "s", *here, "--no-guard"]) == 0
    with se.LifelongSession.open("s", *se.load_model("model")) as session:
        assert not session.editor.form.split_special_tokens
        assert session.evaluate(["accuracy"], progress=False).efficacy == efficacy
        assert session.evaluate(["accuracy"], split_special_tokens=True, progress=False).efficacy == 1
