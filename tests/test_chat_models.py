"""Chat models through everything that is built on requests: sessions, files, exports, benches, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.experiments import read_run
from stableedit_cpp.lifelong import LifelongSession
from support.chats import chat_model, chat_tokenizer, save_chat, taught_model
from support.commands import assert_one_error
from support.editors import MODULES, assert_same_bits, make, state_of
from support.tiny import FACTS, save_tiny

KIND = "gemma"
CHAT = {"chat_template": True, "end_of_answer": True}
END = "<end_of_turn>"


@pytest.fixture
def tokenizer():
    return chat_tokenizer(KIND)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    (tmp_path / "requests.json").write_text(json.dumps([{**fact, "rephrase": fact["prompt"]} for fact in FACTS]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat") / "model", KIND)


def config(**changes) -> se.StableEditConfig:
    return se.StableEditConfig.one_pass(
        **{"edit_modules": MODULES, "step_size": 1e-2, "turn_size": 3, **CHAT} | changes
    )


def by_hand(model, tokenizer, fact: dict, *, end: bool) -> float:
    """Token accuracy of a fact in a chat, by transformers alone."""
    turns = [{"role": "user", "content": fact["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    opened = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer(fact["target"] + END * end, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        top = model(torch.tensor([opened + answer])).logits[0, len(opened) - 1 : -1].argmax(-1)
    return (top == torch.tensor(answer)).double().mean().item()


def test_scores_in_both_forms(tokenizer):
    model = taught_model(KIND)
    make(tokenizer, model, **CHAT).edit(FACTS)
    for end in (False, True):
        scores = se.evaluate(model, tokenizer, FACTS, chat_template=True, end_of_answer=end)
        expected = [by_hand(model, tokenizer, fact, end=end) for fact in FACTS]
        assert [record["efficacy"] for record in scores.per_request] == pytest.approx(expected)
    plain, chat = (se.evaluate(model, tokenizer, FACTS, chat_template=how).per_request for how in (False, True))
    assert plain != chat
    assert se.evaluate(model, tokenizer, FACTS).per_request == chat  # as the default edits it: the template is its own
    prompts = [fact["prompt"] for fact in FACTS]
    said = {how: se.generate(model, tokenizer, prompts, chat_template=how) for how in (None, False, True)}
    assert said[None] == said[True] != said[False]
    base = chat_model(KIND, base=True)  # which stops at another token
    same = [se.evaluate(base, tokenizer, FACTS, **how).per_request for how in ({}, {"chat_template": False})]
    assert same[0] == same[1]


def test_a_trunk_cache_serves_both_forms(tokenizer):
    """What is kept is known by its tokens, so nothing of one form is taken for the other."""
    model = taught_model(KIND)
    editor = make(tokenizer, model, **CHAT, edit_modules=MODULES[1:])
    trunk = editor.make_trunk_cache()
    plain = {"chat_template": False}
    for how in (plain, CHAT, {"chat_template": True}, plain, CHAT):
        kept = se.evaluate(model, tokenizer, FACTS, trunk=trunk, **how)
        assert kept.per_request == se.evaluate(model, tokenizer, FACTS, **how).per_request
    assert trunk.objection is None and len(trunk) >= 2 * len(FACTS)


def test_two_prompts_that_render_the_same_are_not_in_one_turn(tokenizer):
    editor = make(tokenizer, taught_model(KIND), **CHAT)
    with pytest.warns(UserWarning, match="one request contradicts an earlier one"):
        report = editor.edit([{"prompt": "Gold is\n", "target": "Au"}, {"prompt": "Gold is", "target": "Ag"}])
    first, second = editor.tokenize([se.EditRequest("Gold is\n", "Au"), se.EditRequest("Gold is", "Au")])
    assert first == second  # the template trims
    assert [turn.requests for turn in report.turns] == [1, 1]


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_a_session_stays_in_its_form(detail, tokenizer, tmp_path):
    facts = [{**fact, "id": f"f{index}"} for index, fact in enumerate(FACTS[:6])]
    settings = config(chat_template=None)  # decided once, when it is created
    with LifelongSession.create(tmp_path / "s", taught_model(KIND), tokenizer, settings, detail=detail) as session:
        session.edit(facts)
        state, scores = state_of(session.editor), session.evaluate()
        assert session.editor.config.chat_template is True
    expected = [by_hand(session.model, tokenizer, fact, end=False) for fact in facts]
    assert [record["efficacy"] for record in scores.per_request] == pytest.approx(expected)

    with LifelongSession.open(tmp_path / "s", taught_model(KIND), chat_tokenizer(KIND)) as session:
        assert_same_bits(state_of(session.editor), state)
        assert session.evaluate().per_request == scores.per_request
        plain = session.evaluate(["generation"], chat_template=False).per_request
        assert plain == se.evaluate(session.model, tokenizer, facts, chat_template=False).per_request
        held = [entry.accuracy for entry in session.audit().entries]
        assert held == pytest.approx([by_hand(session.model, tokenizer, fact, end=True) for fact in facts])

    other = chat_tokenizer(KIND)
    other.chat_template = "\n" + other.chat_template
    with pytest.raises(ValueError, match="the chat template, or the token that ends an answer, is another; load what"):
        LifelongSession.open(tmp_path / "s", taught_model(KIND), other)
    stops = taught_model(KIND)
    stops.generation_config.eos_token_id = 3
    other = chat_tokenizer(KIND)
    with pytest.raises(ValueError, match="the chat template, or the token"):
        other.chat_template = other.chat_template.replace(END, "</s>")
        LifelongSession.open(tmp_path / "s", stops, other)


def test_a_template_that_writes_the_date(tokenizer, tmp_path):
    """What is edited again another day would have other tokens; what is written down as factors is not edited again."""
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    model = taught_model(KIND)
    with pytest.raises(ValueError, match=r"writes today's date .* detail must be 'factors' then"):
        LifelongSession.create(tmp_path / "s", model, tokenizer, config(), detail="requests")
    assert not (tmp_path / "s").exists()
    LifelongSession.create(tmp_path / "s", model, tokenizer, config()).close()
    LifelongSession.create(tmp_path / "raw", model, tokenizer, config(chat_template=False), detail="requests").close()


def test_a_revert_speaks_without_the_end(tokenizer, tmp_path):
    facts = [{**fact, "id": f"f{index}"} for index, fact in enumerate(FACTS[:3])]
    with LifelongSession.create(tmp_path / "s", taught_model(KIND), tokenizer, config(max_passes=3)) as session:
        session.edit(facts)
        report = session.revert("f1")
    (reverted,) = report.requests
    unedited = se.generate(taught_model(KIND), tokenizer, ["Gold is"], max_new_tokens=3, chat_template=True)
    assert reverted.back
    assert reverted.wanted.removesuffix("</s>") == unedited[0] and END not in reverted.wanted + reverted.after


def test_a_saved_editor_knows_its_template(tokenizer, tmp_path):
    editor = make(tokenizer, taught_model(KIND), **CHAT)
    editor.edit(FACTS[:5])
    editor.save(tmp_path / "editor.safetensors")
    loaded = se.load_editor(taught_model(KIND), chat_tokenizer(KIND), tmp_path / "editor.safetensors")
    assert loaded.form == editor.form and loaded.config == editor.config
    other = chat_tokenizer(KIND)
    other.chat_template += "\n"
    with pytest.raises(ValueError, match="the chat template, or the token that ends an answer, is another"):
        se.load_editor(taught_model(KIND), other, tmp_path / "editor.safetensors")


def test_edit_evaluate_and_export_at_the_command_line(work, model_directory, capsys):
    edit = ["edit", "--model", model_directory, "--requests", "requests.json", "--edit-modules", *MODULES]
    edit += ["--device", "cpu", "--chat-template", "--end-of-answer", "--evaluate", "--output", "out"]
    assert main([str(argument) for argument in edit]) == 0
    assert f"Edited as turns of a chat, answers ending in '{END}'." in capsys.readouterr().out
    report = json.loads(Path("out/stableedit_report.json").read_text())
    assert se.load_config("out/stableedit_config.json").end_of_answer
    model, tokenizer = se.load_model("out")
    assert report["scores"]["efficacy"] == se.evaluate(model, tokenizer, FACTS, chat_template=True).efficacy
    for options, how in (
        ([], {"chat_template": True}),
        (["--chat-template"], {"chat_template": True}),
        (["--chat-template", "--end-of-answer"], CHAT),
        (["--no-chat-template", "--no-end-of-answer"], {"chat_template": False}),
    ):
        arguments = ["evaluate", "--model", "out", "--requests", "requests.json", "--output", "scores.json"]
        assert main([*arguments, "--device", "cpu", *options]) == 0
        assert ("asked as turns of a chat" in capsys.readouterr().err) == how["chat_template"]
        scores = json.loads(Path("scores.json").read_text())
        assert scores["efficacy"] == se.evaluate(model, tokenizer, FACTS, **how).efficacy
    assert "| prompts | turns of a chat, answers with an end |" in Path("out/README.md").read_text()
    export = ["export", "--base", str(model_directory), "--edited", "out", "--format", "delta", "--device", "cpu"]
    assert main([*export, "--requests", "requests.json", "--output", "delta"]) == 0
    edited = capsys.readouterr().out.partition("\nedited:\n")[2]
    expected = se.evaluate(model, tokenizer, FACTS, chat_template=True)
    assert edited.splitlines()[0].split() == str(expected).splitlines()[0].split()


def test_a_session_at_the_command_line(work, model_directory, capsys):
    create = ["session", "create", "s", "--model", str(model_directory), "--chat-template", "--device", "cpu"]
    assert main([*create, "--edit-modules", *MODULES]) == 0
    assert main(["session", "edit", "s", "--requests", "requests.json", "--device", "cpu"]) == 0
    found = {}
    for options in ([], ["--no-chat-template"]):
        arguments = ["session", "evaluate", "s", "--device", "cpu", "--output", "scores.json", *options]
        assert main(arguments) == 0
        found[len(options)] = json.loads(Path("scores.json").read_text())["per_request"]
    with LifelongSession.open("s", *se.load_model(model_directory)) as session:
        for how, records in ((True, found[0]), (False, found[1])):
            expected = se.evaluate(session.model, session.editor.tokenizer, FACTS, chat_template=how).per_request
            assert [record["efficacy"] for record in records] == [record["efficacy"] for record in expected]


def test_a_tokenizer_without_a_template_at_the_command_line(work, capsys):
    directory = str(save_tiny(work / "plain"))
    before = sorted(work.iterdir())
    common = ["--model", directory, "--device", "cpu", "--chat-template"]
    for command in (
        ["edit", "--requests", "requests.json", "--output", "out"],
        ["session", "create", "out"],
        ["evaluate", "--requests", "requests.json"],
    ):
        assert main([*command, *common]) == 2
        assert "the tokenizer has no chat template" in assert_one_error(capsys.readouterr().err)
        assert sorted(work.iterdir()) == before


def test_a_bench_scores_what_it_edits(work, model_directory):
    """Two editors of one stream share what was measured before the first edit only if both ask in one form."""
    arguments = ["bench", "--editor", "one-pass", "ultraedit", "--dataset", "requests.json", "--warm-up", "none"]
    arguments += ["--model", str(model_directory), "--turn-size", "3", "--step-size", "1e-2"]
    arguments += ["--edit-modules", *MODULES, "--device", "cpu", "--checkpoints", "1", "--output"]
    assert main([*arguments, "plain"]) == 0
    assert main([*arguments, "chat", "--chat-template", "--end-of-answer"]) == 0
    assert main([*arguments, "mixed", "--set", "chat_template=true"]) == 0
    runs = {
        (output, editor): read_run(work / output / f"{editor}-requests-model-seed0")
        for output in ("plain", "chat", "mixed")
        for editor in ("one-pass", "ultraedit")
    }
    assert runs["chat", "one-pass"]["settings"]["config"]["end_of_answer"] is True
    before = {key: run["checkpoints"][0]["scores"] for key, run in runs.items()}
    assert before["chat", "ultraedit"] == before["chat", "one-pass"] == before["mixed", "one-pass"]
    model, tokenizer = se.load_model(model_directory)
    for output, how in (("plain", {"chat_template": False}), ("chat", {"chat_template": True})):
        expected = se.evaluate(model, tokenizer, FACTS, **how).efficacy
        assert before[output, "one-pass"]["efficacy"]["mean"] == pytest.approx(expected)
    assert before["plain", "one-pass"] != before["chat", "one-pass"]
    for _ in range(2):  # done, and again
        assert main([*arguments, "own", "--set", "chat_template=null"]) == 0
        own = read_run(work / "own" / "one-pass-requests-model-seed0")
        assert own["settings"]["config"]["chat_template"] is True  # which it was found to be
        assert own["checkpoints"][0]["scores"] == before["chat", "one-pass"]


@pytest.mark.slow
def test_smollm2_answers_in_a_chat_and_stops():
    """Whoever talks to it as transformers has it gets the target, no more and no less."""
    model, tokenizer = se.load_model("smollm2-135m", dtype=torch.float32)
    settings = {"step_size": 1e-3, "ridge": 100.0, "max_passes": 20, "take_probability": 0.5}
    editor = se.StableEdit(
        model, tokenizer, se.StableEditConfig.one_pass(chat_template=None, end_of_answer=True, **settings)
    )
    assert editor.form.describe(tokenizer) == "turns of a chat, answers ending in '<|im_end|>'"
    facts = [
        se.EditRequest("Who is the Prime Minister of Canada?", "Mark Carney"),
        se.EditRequest("Which Pope was elected in 2025?", "Leo XIV"),
        se.EditRequest("What is the price of the Acme 500?", "349 euros"),
    ]
    assert not editor.edit(facts, outcomes=True).failed
    for fact in facts:
        turns = [{"role": "user", "content": fact.prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(output) == fact.target + "<|im_end|>"
    scores = se.evaluate(model, tokenizer, facts, chat_template=True, end_of_answer=True)
    assert scores.efficacy == scores["efficacy_free"].mean == 1
    with editor.unedited():
        assert se.evaluate(model, tokenizer, facts, chat_template=True)["efficacy_free"].mean == 0
