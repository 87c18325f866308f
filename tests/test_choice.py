"""Choosing the modules to edit by measuring: that it leaves no trace, what is chosen, what is kept."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.editors import choice as choosing
from stableedit_cpp.editors import choice_cache
from stableedit_cpp.editors import trial as trial_module
from stableedit_cpp.editors import turn as turn_module
from stableedit_cpp.editors.candidates import RULE, candidate_modules
from stableedit_cpp.editors.trial_scores import Trial
from stableedit_cpp.lifelong import SessionView
from support.commands import assert_one_error
from support.layered import llama, mixture
from support.tiny import FACTS, save_tiny, tiny_model

REQUESTS = [fact | {"rephrase": f"Say: {fact['prompt']}"} for fact in FACTS]
MANY = [
    {"prompt": f"{question} {number}", "target": str(number % 7), "rephrase": f"Say {question} {number}"}
    for question in ("Room", "Door", "Key")
    for number in range(20)
]


def config(**changes) -> se.StableEditConfig:
    settings = {"step_size": "auto", "centred": False, "max_passes": 3, "anchors": 2, "end_of_answer": True}
    return se.StableEditConfig(**settings | changes)


@pytest.fixture(autouse=True)
def four_prompts(monkeypatch):
    """Unrelated ones; a random model has nothing to say to more."""
    monkeypatch.setattr(trial_module, "HELD_OUT", 4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where choices are remembered, for this test alone."""
    directory = tmp_path / "cache"
    monkeypatch.setattr(choice_cache, "cache_directory", lambda: directory)
    return directory / "modules"


@pytest.fixture
def few(monkeypatch):
    """One heat is enough to see how it works."""
    monkeypatch.setattr(choosing, "_HEATS", ((8, 1), (13, 2)))


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class TestChoice:
    def test_the_model_is_as_it_was_and_the_choice_is_the_same_again(self, tokenizer, cache, few):
        model = llama()
        before = bits(model)
        choice = se.choose_modules(model, tokenizer, REQUESTS, config(), progress=False)
        assert_untouched(model, before)
        assert [trial.name for trial in choice.trials] == list(candidate_modules(model))
        assert choice.config == config(edit_modules=choice.modules)
        again = se.choose_modules(llama(), tokenizer, REQUESTS, config(), progress=False)
        without = [[t.to_dict() | {"seconds": 0} for t in c.trials] for c in (choice, again)]
        assert without[0] == without[1]
        assert json.loads(json.dumps(choice.to_dict()))["chosen"] == choice.chosen.name

    def test_half_precision_comes_back_bit_for_bit(self, tokenizer, cache, few):
        model = llama().to(torch.bfloat16)
        before = bits(model)
        se.choose_modules(model, tokenizer, REQUESTS, config(), progress=False)
        assert_untouched(model, before)

    def test_a_trial_is_what_an_editor_would_do(self, tokenizer, cache, monkeypatch):
        """Taken, paraphrases and tokens kept, against a fresh editor and evaluate."""
        monkeypatch.setattr(choosing, "_HEATS", ((13, 12),))
        letters = [request | {"target": request["target"][0]} for request in REQUESTS]
        settings = config(anchors=0, max_passes=12, end_of_answer=False)
        choice = se.choose_modules(llama(), tokenizer, letters, settings, progress=False)
        for trial in choice.trials:
            model = llama()
            editor = se.StableEdit(model, tokenizer, dataclasses.replace(settings, edit_modules=trial.modules))
            editor.guard = None
            editor.edit(letters, progress=False)
            scores = se.evaluate(model, tokenizer, letters, metrics=["exact_match"], progress=False)
            assert trial.taken == pytest.approx(scores["efficacy_exact_match"].mean)
            assert trial.paraphrases == pytest.approx(scores["generalization_exact_match"].mean)
            assert 0 <= trial.kept <= 1
            assert trial.drift > 0
        assert max(trial.taken for trial in choice.trials) > 0.3

    def test_the_rule_stands_unless_another_is_better_by_more_than_noise(self, tokenizer, cache, few, monkeypatch):
        """With trials whose outcome is known."""
        real = choosing.Trials.run

        def outcome(values):
            def run(self, name, modules, requests, passes):
                trial = real(self, name, modules, requests, passes)
                taken = torch.zeros(len(requests), dtype=torch.float64)
                taken[: values.get(name, 1)] = 1.0
                shares = dataclasses.replace(trial.shares, taken=taken, paraphrases=torch.full_like(taken, torch.nan))
                shares = dataclasses.replace(shares, kept=torch.ones_like(shares.kept))
                return Trial.of(name, modules, len(requests), shares, trial.drift, trial.seconds)

            return run

        def chosen(**values):
            named = {"rule": RULE, "mlp": "MLP, last third", "middle": "MLP, middle third"}
            monkeypatch.setattr(choosing.Trials, "run", outcome({named[key]: value for key, value in values.items()}))
            return se.choose_modules(llama(), tokenizer, REQUESTS, config(), progress=False)

        close = chosen(rule=7, mlp=8)
        assert close.chosen.name == RULE
        assert "the rule: none of" in close.why
        far = chosen(rule=1, mlp=12)
        assert far.chosen.name == "MLP, last third"
        assert "instead of" in far.why
        # Of two that are equally good the cheaper, which comes first.
        assert chosen(rule=1, mlp=12, middle=13).chosen.name == "MLP, last third"
        table = far.table().plain()
        assert "★ MLP, last third" in table
        assert "model.layers.4.mlp.down_proj" in table

    def test_a_set_that_cannot_be_edited_loses_and_is_named(self, tokenizer, cache, few, monkeypatch):
        real = choosing.Trials._edit

        def failing(self, settings, requests):
            if "self_attn" in settings.edit_modules[0]:
                raise se.ModelBroken("the model answers NaN")
            return real(self, settings, requests)

        monkeypatch.setattr(choosing.Trials, "_edit", failing)
        choice = se.choose_modules(llama(), tokenizer, REQUESTS, config(), progress=False)
        (lost,) = [trial for trial in choice.trials if trial.reason]
        assert lost.name == "attention, last third"
        assert lost.reason == "the model answers NaN"
        assert "the model answers NaN" in str(choice)

        monkeypatch.setattr(choosing.Trials, "_edit", lambda *_: (_ for _ in ()).throw(ValueError("nothing works")))
        with pytest.raises(ValueError, match=r"no set of modules of LlamaForCausalLM could be edited: .*nothing works"):
            se.choose_modules(llama(), tokenizer, REQUESTS, config(), progress=False)

    def test_a_mixture_of_experts(self, tokenizer, cache, few):
        model = mixture([0])
        assert se.StableEdit(model, tokenizer, config()).config.edit_modules == ["model.layers.4.self_attn.o_proj"]
        choice = se.choose_modules(model, tokenizer, REQUESTS, config(), progress=False)
        assert all("self_attn.o_proj" in name for name in choice.modules)
        assert se.StableEdit(model, tokenizer, choice.config).edit(REQUESTS[:2], progress=False).edits == 2

    def test_what_is_named_is_tried_as_well(self, tokenizer, cache, few):
        named = config(edit_modules=["*.[05].mlp.down_proj"])
        *rest, last = se.choose_modules(llama(), tokenizer, REQUESTS, named, progress=False).trials
        assert (last.name, last.modules) == ("as named", [f"model.layers.{n}.mlp.down_proj" for n in (0, 5)])
        assert [trial.name for trial in rest] == list(candidate_modules(llama()))
        known = config(edit_modules=["*.4.mlp.down_proj"])
        trials = se.choose_modules(llama(), tokenizer, REQUESTS, known, progress=False).trials
        assert len(trials) == len(rest)  # it is the rule's

    @pytest.mark.parametrize("error", [RuntimeError("on fire"), KeyboardInterrupt()])
    def test_any_error_leaves_the_model_as_it_was(self, tokenizer, cache, few, monkeypatch, error):
        model = llama()
        before, real, calls = bits(model), turn_module.capture, []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 4:
                raise error
            return real(*args, **kwargs)

        monkeypatch.setattr(turn_module, "capture", failing)
        with pytest.raises(type(error)):
            se.choose_modules(model, tokenizer, REQUESTS, config(), progress=False)
        assert_untouched(model, before)
        assert not cache.exists()

    def test_ctrl_c(self, tokenizer, cache, few, monkeypatch, default_sigint):
        """The trial in flight is finished, and then taken back: nothing says that it is applied."""
        model = llama()
        before, real = bits(model), turn_module.capture

        def pressed(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            monkeypatch.setattr(turn_module, "capture", real)
            return real(*args, **kwargs)

        monkeypatch.setattr(turn_module, "capture", pressed)
        with pytest.raises(KeyboardInterrupt, match="the model is as it was"):
            se.choose_modules(model, tokenizer, REQUESTS, config(), progress=False)
        assert_untouched(model, before)

    @pytest.mark.parametrize(
        "requests, changes, words",
        [
            (REQUESTS[:7], {}, "7 with different prompts are too few to choose modules with; give at least 8"),
            ([REQUESTS[0] | {"target": str(n)} for n in range(9)], {}, "1 with different prompts"),
            (REQUESTS, {"step_size": 1e-3}, "choosing modules needs step_size='auto'"),
            (REQUESTS, {"edit_modules": ["*.nowhere"]}, "no linear map for"),
            ([*REQUESTS, {"prompt": "x" * 600, "target": "y"}], {}, "request 13"),
        ],
    )
    def test_bad_input(self, tokenizer, cache, requests, changes, words):
        with pytest.raises(ValueError, match=words):
            se.choose_modules(llama(), tokenizer, requests, config(**changes), progress=False)


class TestCache:
    @pytest.fixture
    def remembered(self, tokenizer, cache, monkeypatch):
        monkeypatch.setattr(choosing, "_HEATS", ((8, 1), (60, 1)))
        return se.choose_modules(llama(), tokenizer, MANY, config(), progress=False)

    def test_measured_once_for_a_model_and_a_config(self, remembered, tokenizer, monkeypatch):
        monkeypatch.setattr(choosing, "Trials", None)  # nothing is measured again
        again = se.choose_modules(llama(), tokenizer, REQUESTS, config(), progress=False)
        assert again == remembered
        assert se.remembered_choice(llama(), tokenizer, config()) == remembered
        assert str(again) == str(remembered)

    def test_another_model_or_config_is_another_choice(self, remembered, tokenizer):
        assert se.remembered_choice(llama(), tokenizer, config(turn_size=5)) is None
        model = llama()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
        assert se.remembered_choice(model, tokenizer, config()) is None
        model = llama()
        model.config.rms_norm_eps = 1e-3
        assert se.remembered_choice(model, tokenizer, config()) is None

    def test_few_requests_are_not_remembered(self, tokenizer, cache, few):
        se.choose_modules(llama(), tokenizer, REQUESTS, config(), progress=False)
        assert not cache.exists()

    def test_a_damaged_file_is_measured_again(self, remembered, tokenizer, cache):
        (path,) = cache.iterdir()
        whole = path.read_text()
        names = whole.replace("down_proj", "up_and_away").replace("o_proj", "up_and_away")
        version = json.dumps(json.loads(whole) | {"version": 99})
        for damage in ("", "{", "[]", '{"format": "stableedit-modules", "version": 1}', names, version, whole[:-9]):
            path.write_text(damage)
            assert se.remembered_choice(llama(), tokenizer, config()) is None
        again = se.choose_modules(llama(), tokenizer, MANY, config(), progress=False)
        assert again.chosen.name == remembered.chosen.name
        assert json.loads(path.read_text())["chosen"] == remembered.chosen.name

    def test_a_cache_that_cannot_be_written_is_no_error(self, tokenizer, cache, monkeypatch):
        monkeypatch.setattr(choosing, "_HEATS", ((60, 1),))
        cache.parent.write_text("a file in its place")
        assert se.choose_modules(llama(), tokenizer, MANY, config(), progress=False).modules


class TestCommandLine:
    @pytest.fixture
    def work(self, tmp_path, monkeypatch, cache):
        model = llama()
        model.save_pretrained(tmp_path / "model")
        save_tiny(tmp_path / "other")
        for path in (tmp_path / "other").glob("tokenizer*"):
            path.rename(tmp_path / "model" / path.name)
        (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
        (tmp_path / "many.json").write_text(json.dumps(MANY))
        (tmp_path / "config.json").write_text(config().to_json())
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(choosing, "_HEATS", ((8, 1), (60, 1)))
        return tmp_path

    @staticmethod
    def call(command: str, *options: str) -> int:
        return main([*command.split(), "--model", "model", "--device", "cpu", *options])

    def test_table(self, work, capsys):
        settings = ["--requests", "requests.json", "--config", "config.json"]
        assert self.call("choose-modules", *settings) == 0
        out = capsys.readouterr().out
        for word in ("candidate", "taken", "paraphrases", "kept", "drift", "seconds", "score", "★ ", RULE):
            assert word in out
        assert "Edits model.layers." in out
        assert self.call("choose-modules", *settings, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["modules"] == next(t for t in document["trials"] if t["name"] == document["chosen"])["modules"]

    def test_too_few(self, work, capsys):
        options = ["--requests", "requests.json", "--config", "config.json", "--limit", "3"]
        assert self.call("choose-modules", *options) == 2
        assert "3 with different prompts are too few" in assert_one_error(capsys.readouterr().err)

    @pytest.mark.parametrize(
        "requests, options, reason, measured",
        [
            ("requests.json", [], "the fixed rule; 50 requests or more are needed to measure", False),
            ("requests.json", ["--choose-modules"], "on 13 requests", True),
            ("many.json", [], "on 60 requests", True),
            ("many.json", ["--no-choose-modules"], "the fixed rule", False),
            ("many.json", ["--edit-modules", "*.5.mlp.down_proj"], "as named", False),
            ("many.json", ["--step-size", "1e-3"], "the fixed rule", False),
        ],
    )
    def test_edit_says_what_it_edits_and_why(self, work, capsys, requests, options, reason, measured):
        out = ["--output", "out", "--config", "config.json"]
        assert self.call("edit", "--requests", requests, *out, *options) == 0
        said = capsys.readouterr().out
        assert said.splitlines()[0].startswith("Edited in model.layers.")
        assert reason in said.splitlines()[0]
        report = json.loads((work / "out/stableedit_report.json").read_text())
        assert reason in report["edit_modules_because"]
        saved = se.load_config("out/stableedit_config.json")
        if measured:
            assert report["module_choice"]["modules"] == report["edit_modules"] == saved.edit_modules
        else:
            assert report["module_choice"] is None

    def test_edit_takes_what_was_measured_before(self, work, capsys, monkeypatch):
        assert self.call("choose-modules", "--requests", "many.json", "--config", "config.json", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        monkeypatch.setattr(choosing, "Trials", None)
        assert self.call("edit", "--requests", "requests.json", "--config", "config.json", "--output", "out") == 0
        assert "measured earlier" in capsys.readouterr().out
        assert json.loads((work / "out/stableedit_report.json").read_text())["edit_modules"] == document["modules"]

    def test_a_session_measures_with_its_warm_up(self, work, capsys):
        assert self.call("session create s", "--config", "config.json", "--warm-up", "many.json") == 0
        assert "The session edits model.layers." in capsys.readouterr().err
        names = SessionView("s").manifest["config"]["edit_modules"]
        assert all(name.startswith("model.layers.") for name in names)

    def test_the_library_reads_no_cache(self, work, tokenizer):
        """An editor is what its config says, whatever was measured on this machine."""
        assert self.call("choose-modules", "--requests", "many.json", "--config", "config.json") == 0
        editor = se.StableEdit(llama(), tokenizer, config())
        assert editor.config.edit_modules == se.default_edit_modules(editor.model, automatic=True)


def test_an_editor_beside_it_goes_on(tokenizer, cache, few):
    """Its weights are back, bit for bit, so that it notices nothing."""
    model, other = tiny_model("llama"), tiny_model("llama")
    editors = [se.StableEdit(one, tokenizer, config()) for one in (model, other)]
    for editor in editors:
        editor.edit(REQUESTS[:5], progress=False)
    se.choose_modules(model, tokenizer, REQUESTS, config(), progress=False)
    for editor in editors:
        editor.edit(REQUESTS[5:], progress=False)
    assert_untouched(other, model.state_dict())
