"""The form of prompts and answers: raw or chat, with an end or without, against what transformers renders."""

from __future__ import annotations

import json

import pytest
import torch

from stableedit_cpp import EditRequest, StableEdit, StableEditConfig, UltraEditConfig, evaluate, generate
from stableedit_cpp.experiments.settings import differences
from stableedit_cpp.lifelong import audit
from stableedit_cpp.model.form import RAW, Form, find_form, stop_tokens
from stableedit_cpp.model.tokens import prompt_ids, tokenize
from support.chats import CHATS, chat_model, chat_tokenizer, learn
from support.tiny import FACTS, tiny_model, tiny_tokenizer

KINDS = list(CHATS)
PAIRS = [(fact["prompt"], fact["target"]) for fact in FACTS]


def rendered(tokenizer, prompt: str, answer: str | None = None) -> list[int]:
    """Token ids of a conversation, as transformers has them."""
    turns = [{"role": "user", "content": prompt}]
    turns += [] if answer is None else [{"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None)["input_ids"]


def stated(kind: str) -> int:
    return chat_tokenizer(kind).convert_tokens_to_ids(CHATS[kind].end)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_is_what_the_template_renders(kind):
    tokenizer, model = chat_tokenizer(kind), chat_model(kind)
    form = find_form(model, tokenizer, chat_template=True, end_of_answer=True)
    assert form.end == stated(kind)
    sequences = tokenize(tokenizer, PAIRS, None, [""] * len(PAIRS), form)
    plain = tokenize(tokenizer, PAIRS, None, [""] * len(PAIRS), find_form(model, tokenizer, chat_template=True))
    for sequence, open_end, (prompt, target) in zip(sequences, plain, PAIRS, strict=True):
        whole = rendered(tokenizer, prompt, target)
        assert list(sequence.ids) == whole[: len(sequence)]
        assert whole[len(sequence)] == form.end if kind != "glm" else len(whole) == len(sequence)
        blank = CHATS[kind].before if not CHATS[kind].before.strip() else ""
        assert tokenizer.decode(sequence.answer) == blank + target + CHATS[kind].end
        assert open_end.answer == sequence.answer[:-1] and open_end.ids == sequence.ids[:-1]
        opened = sequence.ids[: sequence.first + 1]
        assert list(opened) == prompt_ids(tokenizer, [prompt], form)[0]
        if not CHATS[kind].before.strip():
            assert list(opened) == rendered(tokenizer, prompt)


def test_an_empty_thought_belongs_to_the_prompt():
    tokenizer = chat_tokenizer("thinking")
    form = find_form(chat_model("thinking"), tokenizer, chat_template=True)
    assert form == Form(True, "<think>\n\n</think>\n\n", "", stated("thinking"))
    assert prompt_ids(tokenizer, ["Gold is"], form)[0] == [
        *rendered(tokenizer, "Gold is"),
        *tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"],
    ]


@pytest.mark.parametrize("end_of_answer", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_takes_the_template_of_an_instruct_model_only(kind, end_of_answer):
    tokenizer = chat_tokenizer(kind)
    how = {"chat_template": None, "end_of_answer": end_of_answer}
    assert find_form(chat_model(kind), tokenizer, **how).chat
    base = chat_tokenizer(kind)
    base.eos_token = "</s>"
    form = find_form(chat_model(kind, base=True), base, **how)
    if kind == "mistral":  # its template writes whatever ends a text, so it fits any model
        assert form.chat
    else:
        assert form == (Form(end=2, ended=True) if end_of_answer else RAW)
    tokenizer.chat_template = None
    assert not find_form(chat_model(kind), tokenizer, **how).chat


def test_the_end_of_a_raw_answer_is_where_generation_stops():
    tokenizer, model = chat_tokenizer("llama 3"), chat_model("llama 3")
    assert find_form(model, tokenizer, end_of_answer=True) == Form(end=2, ended=True)  # the tokenizer's own, one of two
    model.generation_config.eos_token_id = [261, 5]
    assert find_form(model, tokenizer, end_of_answer=True).end == 261  # the tokenizer's is none of them
    model.generation_config.eos_token_id = 7
    assert stop_tokens(model, tokenizer) == (7, 2)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = 5
    assert stop_tokens(model, tokenizer) == (5, 2)
    model.config.eos_token_id = None
    assert stop_tokens(model, tokenizer) == (2,)
    assert find_form(model, tokenizer, end_of_answer=True).end == 2
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end_of_answer needs an end-of-sequence token, and neither"):
        find_form(model, tokenizer, end_of_answer=True)
    assert find_form(model, tokenizer) == RAW


def test_a_generation_config_that_does_not_know_the_end_of_a_turn():
    """Many fine-tuned models keep that of their base model; the tokenizer knows better."""
    tokenizer, model = chat_tokenizer("chatml"), chat_model("chatml", base=True)
    with pytest.warns(
        UserWarning, match=r"ends an answer with '<\|im_end\|>', .* add its id to model.generation_config"
    ):
        form = find_form(model, tokenizer, chat_template=None, end_of_answer=True)
    assert form == Form(True, "", "", stated("chatml"), ended=True)


def test_a_template_forced_on_a_model_that_stops_elsewhere():
    """The end of the turn is then the control token that the template writes; without one, the model's own end."""
    tokenizer, model = chat_tokenizer("gemma"), chat_model("gemma", base=True)
    with pytest.warns(UserWarning, match="ends an answer with '<end_of_turn>', at which the generation of this model"):
        assert find_form(model, tokenizer, chat_template=True, end_of_answer=True).end == stated("gemma")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant:{% endif %}"
    form = find_form(model, tokenizer, chat_template=True, end_of_answer=True)
    assert form == Form(True, "", " ", 2, ended=True)
    assert not find_form(model, tokenizer, chat_template=None).chat
    (sequence,) = tokenize(tokenizer, [("Gold is", "Au")], None, [""], form)
    assert tokenizer.decode([*sequence.ids, 2]) == "user: Gold is\nassistant: Au</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"the tokenizer has no chat template; edit plain prompts \(chat_template=False\), or set tokenizer"),
        ("{{ raise_exception('tools are needed') }}", "the chat template refuses the prompt .*: tools are needed"),
        ("{{ messages[0].parts[0].text }}", "the chat template refuses the prompt"),
        ("{% for m in messages %}", "the chat template refuses the prompt"),
        ("Hello{% if add_generation_prompt %} you{% endif %}", "leaves out what the user says"),
        (
            "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}",
            "generation prompt, which ends in '.*<think>', is not how it begins an answer",
        ),
        (
            "{% for m in messages if m.role == 'user' %}<{{ m.content }}>{% endfor %}",
            "no answer can follow it. Edit plain prompts",
        ),
        ({"tool_use": "{{ messages[0].content }}"}, "multiple chat templates with no default"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        find_form(model, tokenizer, chat_template=True)
    with pytest.raises(ValueError, match=message):
        StableEdit(model, tokenizer, StableEditConfig(chat_template=True))
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, FACTS, chat_template=True)
    assert find_form(model, tokenizer, chat_template=None) == RAW


def test_a_target_that_holds_its_end_gets_no_second():
    tokenizer, model = chat_tokenizer("llama 3"), chat_model("llama 3")
    for chat_template, end in ((True, "<|eot_id|>"), (False, "</s>")):
        how = {"end_of_answer": True, "split_special_tokens": False}
        form = find_form(model, tokenizer, chat_template=chat_template, **how)
        pairs = [("Gold is", "Au"), ("Gold is", "Au" + end)]
        assert len(set(tokenize(tokenizer, pairs, None, ["", ""], form))) == 1


def test_a_prompt_that_is_rendered_already_is_refused():
    tokenizer, model = chat_tokenizer("llama 3"), chat_model("llama 3")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Gold is"}], tokenize=False, add_generation_prompt=True
    )
    with pytest.raises(ValueError, match=r"holds .*, which the chat template writes by itself; give the bare question"):
        evaluate(model, tokenizer, [{"prompt": prompt, "target": "Au"}], chat_template=True)
    as_it_stands = {"chat_template": False, "split_special_tokens": False}
    evaluate(model, tokenizer, [{"prompt": prompt, "target": "Au"}], **as_it_stands)


def test_a_prompt_that_the_template_refuses_names_it():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% if 'Peru' in messages[0].content %}{{ raise_exception('not that') }}{% endif %}" + CHATS["chatml"].template
    )
    editor = StableEdit(chat_model("chatml"), tokenizer, StableEditConfig(chat_template=True))
    with pytest.raises(ValueError, match="the chat template refuses the prompt 'Capital of Peru:': not that"):
        editor.check([EditRequest(**fact) for fact in FACTS])


def test_the_context_has_room_for_prompt_answer_and_end():
    tokenizer, model = chat_tokenizer("gemma"), chat_model("gemma")
    form = find_form(model, tokenizer, chat_template=True, end_of_answer=True)
    length = len(tokenize(tokenizer, [("Gold is", "Au")], None, [""], form)[0])
    assert length == len(rendered(tokenizer, "Gold is")) + 2  # the end is predicted, not fed in
    assert len(tokenize(tokenizer, [("Gold is", "Au")], length, [""], form)) == 1
    with pytest.raises(ValueError, match=f"Au: prompt and target have {length} tokens, more than .* {length - 1}"):
        tokenize(tokenizer, [("Gold is", "Au")], length - 1, ["Au"], form)


@pytest.mark.parametrize("kind", ["chatml", "llama 3", "gemma", "mistral", "glm"])
def test_what_has_taken_is_what_the_model_says_freely(kind):
    """Whoever talks to the model as transformers has it gets exactly the target, and then it stops."""
    tokenizer, model = chat_tokenizer(kind), chat_model(kind)
    requests = [EditRequest(**FACTS[index]) for index in (1, 5, 6)]  # short: the context has 64 tokens
    editor = StableEdit(model, tokenizer, StableEditConfig(chat_template=None, end_of_answer=True))
    learn(model, editor.tokenize(requests))
    for request in requests:
        ids = torch.tensor([rendered(tokenizer, request.prompt)])
        output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(output) == CHATS[kind].before + request.target + CHATS[kind].end
    texts = generate(model, tokenizer, [request.prompt for request in requests], max_new_tokens=8, chat_template=True)
    assert [text.strip() for text in texts] == [request.target for request in requests]
    scores = evaluate(model, tokenizer, requests, metrics=["exact_match", "generation"], chat_template=True)
    assert scores.efficacy == scores["efficacy_contains_and_stops"].mean == 1
    assert evaluate(model, tokenizer, requests, chat_template=True, end_of_answer=True).efficacy == 1


@pytest.mark.parametrize("end_of_answer", [False, True])
def test_without_an_end_a_right_answer_may_run_on(end_of_answer):
    """With an end, "taken" is what free generation gives: the target, and then a stop."""
    tokenizer, model = tiny_tokenizer(), tiny_model("llama")
    requests = [EditRequest(**FACTS[index]) for index in (1, 5, 6)]  # short: the context has 64 tokens
    learn(model, StableEdit(model, tokenizer, StableEditConfig(end_of_answer=end_of_answer)).tokenize(requests))
    ended = StableEdit(model, tokenizer, StableEditConfig(end_of_answer=True))
    report = audit(ended, requests, progress=False)
    for request, entry in zip(requests, report.entries, strict=True):
        ids = torch.tensor([tokenizer(request.prompt)["input_ids"]])
        output = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert (tokenizer.decode(output) == f" {request.target}</s>") == entry.holds
    assert len(report.forgotten) == (0 if end_of_answer else len(requests))


def test_config_decides_once_and_reads_earlier_files():
    tokenizer, model = chat_tokenizer("gemma"), chat_model("gemma")
    config = StableEditConfig(chat_template=None, end_of_answer=True)
    editor = StableEdit(model, tokenizer, config)
    assert editor.config.chat_template is True and editor.form.end == stated("gemma")
    assert StableEditConfig.from_json(editor.config.to_json()) == editor.config
    assert StableEditConfig.from_json(config.to_json()) == config
    earlier = json.loads(config.to_json())
    del earlier["chat_template"], earlier["end_of_answer"]
    read = StableEditConfig.from_json(json.dumps(earlier))
    assert read.chat_template is False and read.end_of_answer is False
    for document in ({}, {"chat_template": False, "end_of_answer": False}):
        differing = differences({"config": document}, {"config": json.loads(read.to_json())})
        assert not [name for name in differing if name.startswith(("config.chat", "config.end"))]  # a run goes on
    decided = json.loads(config.to_json()) | {"chat_template": True}  # what was left to the model never differs
    assert differences({"config": earlier}, {"config": decided}) == [
        "config.chat_template (false there, true here)",
        "config.end_of_answer (false there, true here)",
    ]
    for published in (StableEditConfig.published(step_size=1.0), UltraEditConfig.published(step_size=1.0)):
        assert published.chat_template is False and published.end_of_answer is False
    with pytest.raises(ValueError, match="chat_template must be true or false, not 'yes'"):
        StableEditConfig(chat_template="yes")
    with pytest.raises(ValueError, match="end_of_answer must be true or false, not None"):
        StableEditConfig(end_of_answer=None)
