"""`stableedit edit`: what it makes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stableedit_cpp as se
from stableedit_cpp import load_config
from stableedit_cpp.cli import main
from stableedit_cpp.lifelong.repair import repair
from support.commands import assert_one_error, tree
from support.edit_command import LAST, NAMES, REQUESTS, assert_same_weights, edited_by_hand, report_of, weights_of
from support.tiny import FACTS, pattern_of, tiny_model, tiny_tokenizer


def test_edit_end_to_end(edit, work, capsys, model_directory):
    before = tree(model_directory)
    assert edit("--turn-size", 4, "--step-size", 0.01) == 0
    out = capsys.readouterr().out
    assert "13 edits in " in out
    assert "edits/s" in out
    assert "are in out" in out
    config = se.StableEditConfig.one_pass(turn_size=4, step_size=0.01)
    expected = edited_by_hand(config)
    assert_same_weights(weights_of("out"), expected)
    changed = {
        name for name, tensor in tiny_model("llama").state_dict().items() if not torch.equal(tensor, expected[name])
    }
    assert changed == {f"{LAST}.weight"}
    assert tree(model_directory) == before
    assert AutoTokenizer.from_pretrained("out")("ab")["input_ids"] == tiny_tokenizer(bos=True)("ab")["input_ids"]
    assert load_config("out/stableedit_config.json") == config

    report = report_of()
    assert report["model"] == str(model_directory)
    assert report["requests"] == "requests.json"
    assert report["edit_modules"] == [LAST]
    assert set(NAMES) <= set(report["environment"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}", report["started"])
    assert "interrupted" not in report
    assert "warm_up" not in report
    edit_report = report["edit"]
    assert (edit_report["editor"], edit_report["edits"]) == ("stableedit", 13)
    assert edit_report["seconds"] > 0
    assert edit_report["edits_per_second"] == pytest.approx(13 / edit_report["seconds"])
    assert set(edit_report["seconds_by_part"]) == {"capture", "mathematics", "apply", "guard"}
    assert [turn["requests"] for turn in edit_report["turns"]] == [4, 4, 4, 1]
    for turn in edit_report["turns"]:
        assert turn["answer_tokens"] > 0
        assert turn["loss_before"] > 0
        assert turn["update_norms"][LAST] > 0
        assert turn["whitening"] == {"24 -> 16": "full"}


def test_edit_with_no_option(work, model_directory):
    """The default editor, with nothing to choose."""
    arguments = ["--model", str(model_directory), "--requests", "requests.json", "--output", "out"]
    assert main(["edit", *arguments]) == 0
    assert_same_weights(weights_of("out"), edited_by_hand(se.StableEditConfig()))
    assert load_config("out/stableedit_config.json") == se.StableEditConfig(chat_template=False)  # it has no template


def test_output_can_be_edited_again(edit, work):
    assert edit() == 0
    arguments = ["--model", "out", "--requests", "requests.json", "--output", "deeper/than/it/was", "--device", "cpu"]
    assert main(["edit", *arguments]) == 0
    (edited,) = report_of("deeper/than/it/was")["edit_modules"]
    assert not torch.equal(weights_of("deeper/than/it/was")[f"{edited}.weight"], weights_of("out")[f"{edited}.weight"])
    mode = stat.S_IMODE(os.stat("out").st_mode)
    assert mode == 0o755
    assert not [name for name in os.listdir(work) if name.startswith(".")]


@pytest.mark.parametrize("name", ["requests.jsonl", "requests.csv", "requests.jsonl.gz"])
def test_other_request_files(edit, work, name):
    if name.endswith("csv"):
        text = "prompt,target\n" + "".join(f"{fact['prompt']},{fact['target']}\n" for fact in FACTS)
    else:
        text = "".join(json.dumps(fact) + "\n" for fact in FACTS)
    Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert edit("--requests", name) == 0
    assert_same_weights(weights_of("out"), edited_by_hand(se.StableEditConfig.one_pass(), FACTS))


def test_variants_of_a_data_set(edit, work, capsys):
    assert edit("--variants", "rephrase", "--limit", 4, "--evaluate") == 0
    report = json.loads((work / "out" / "stableedit_report.json").read_text())
    assert report["edit"]["edits"] == 4
    assert [turn["answer_tokens"] for turn in report["edit"]["turns"]] == [
        2 * sum(len(f["target"]) + 1 for f in FACTS[:4])
    ]
    assert report["scores"]["counts"]["variants"] == {"scored": 4, "skipped": 0}
    assert report["scores"]["generalization"] is None
    assert "variants " in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"step_size": "auto", "centred": False}, {"max_passes": 3}])
def test_modules_that_no_gradient_reaches_are_named(work, capsys, settings):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained("flat")
    tiny_tokenizer().save_pretrained("flat")
    config = se.StableEditConfig.one_pass(edit_modules=LAST, **settings)
    (work / "config.json").write_text(config.to_json())
    before = tree(work)
    capsys.readouterr()
    words = ["--model", "flat", "--requests", "requests.json", "--output", "out", "--config", "config.json"]
    assert main(["edit", *words, "--device", "cpu"]) == 2
    line = assert_one_error(capsys.readouterr().err)
    assert f"edit_modules {LAST}: the value gradients vanish there" in line and "edit other modules" in line
    assert tree(work) == before


def test_a_variant_without_target_is_one_sentence(edit, work, capsys):
    (work / "requests.json").write_text(json.dumps([FACTS[0] | {"variants": [["Canberra is", ""]]}]))
    assert edit() == 2
    line = assert_one_error(capsys.readouterr().err)
    assert "requests.json, record 0: variants[0] ('Canberra is') has no target; give the answer" in line


def test_a_contradiction_is_one_sentence(edit, work, capsys):
    requests = [{"prompt": "Water is", "target": target} for target in ("dry", "wet")]
    (work / "requests.json").write_text(json.dumps(requests))
    assert edit() == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("stableedit: ")]
    assert said == [
        "stableedit: one request contradicts an earlier one of the same call, and the later wins; request 1 answers "
        "'Water is' with 'wet' instead of 'dry'"
    ]


def test_warm_up_and_limits(edit, work):
    (work / "warm.json").write_text(json.dumps(FACTS[::-1]))
    assert edit("--warm-up", "warm.json", "--warm-up-limit", 8, "--limit", 3, "--turn-size", 5) == 0
    report = report_of()
    assert report["warm_up"]["edits"] == 8
    assert {mode for turn in report["warm_up"]["turns"] for mode in turn["whitening"].values()} == {"diagonal"}
    assert report["edit"]["edits"] == 3
    expected = edited_by_hand(se.StableEditConfig.one_pass(turn_size=5), REQUESTS[:3], FACTS[::-1][:8])
    assert_same_weights(weights_of("out"), expected)


def test_config_file_and_options_over_it(edit, work):
    config = se.UltraEditConfig(step_size=0.02, turn_size=6, ridge=3.0, edit_modules=["nothing"])
    (work / "config.json").write_text(config.to_json())
    assert edit("--config", "config.json", "--turn-size", 3, "--edit-modules", pattern_of("llama")) == 0
    expected = dataclasses.replace(config, turn_size=3, edit_modules=[pattern_of("llama")])
    assert load_config("out/stableedit_config.json") == expected
    assert_same_weights(weights_of("out"), edited_by_hand(expected))
    report = report_of()
    assert report["edit"]["editor"] == "ultraedit"
    assert report["edit_modules"] == [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]
    assert [turn["requests"] for turn in report["edit"]["turns"]] == [3, 3, 3, 3, 1]
    # The saved config repeats the run.
    assert edit("--config", "out/stableedit_config.json", "--output", "again") == 0
    assert_same_weights(weights_of("again"), weights_of("out"))


def test_editor_option(edit, work):
    assert edit("--editor", "ultraedit") == 0
    assert load_config("out/stableedit_config.json") == se.UltraEditConfig()
    assert_same_weights(weights_of("out"), edited_by_hand(se.UltraEditConfig()))


def test_several_modules_by_name(edit, work):
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert edit("--edit-modules", *names) == 0
    assert report_of()["edit_modules"] == names
    assert_same_weights(weights_of("out"), edited_by_hand(se.StableEditConfig.one_pass(edit_modules=names)))


def test_preset_with_repairs(edit, work, capsys):
    assert edit("--preset", "closed-loop", "--step-size", 0.02, "--turn-size", 5, "--repairs", 2) == 0
    config = se.StableEditConfig.closed_loop(step_size=0.02, turn_size=5)
    assert load_config("out/stableedit_config.json") == config
    model = tiny_model("llama")
    editor = se.StableEdit(model, tiny_tokenizer(bos=True), config)
    editor.edit(REQUESTS, progress=False)
    expected = repair(editor, REQUESTS, rounds=2, progress=False)
    assert expected.rounds  # else this shows nothing
    assert_same_weights(weights_of("out"), model.state_dict())
    report = report_of()
    assert report["edit"]["edits"] == len(REQUESTS)
    assert report["repair"]["audits"] == [audit.to_dict() for audit in expected.audits]
    assert str(expected) in capsys.readouterr().out


def test_shrink(edit, work):
    assert edit("--step-size", 0.02, "--shrink", 0.5) == 0
    editor = se.StableEdit(tiny_model("llama"), tiny_tokenizer(bos=True), se.StableEditConfig.one_pass(step_size=0.02))
    editor.edit(REQUESTS, progress=False)
    editor.shrink(0.5)
    assert_same_weights(weights_of("out"), editor.model.state_dict())
    assert report_of()["share_kept"] == 0.5


def test_evaluate_after_the_edit(edit, work, capsys):
    assert edit("--evaluate") == 0
    out = capsys.readouterr().out
    assert re.search(r"^efficacy +\d\.\d{3} ± \d\.\d{3} +\(13 requests\)$", out, re.MULTILINE)
    model = AutoModelForCausalLM.from_pretrained("out")
    how = {"reference": tiny_model("llama"), "progress": False}
    expected = se.evaluate(model, tiny_tokenizer(bos=True), REQUESTS, **how)
    assert {"efficacy_free", "locality_same"} <= set(expected)
    assert report_of()["scores"] == expected.to_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(edit, work, dtype):
    assert edit("--dtype", dtype) == 0
    assert weights_of("out")[f"{LAST}.weight"].dtype == getattr(torch, dtype)


def test_overwrite(edit, work, capsys):
    for existing in ("out", "empty"):
        (work / existing).mkdir()
    (work / "out" / "precious.txt").write_text("mine")
    before = tree(work)
    assert edit() == 2
    assert "--output out exists and is not empty; choose another or add --overwrite" in capsys.readouterr().err
    assert tree(work) == before
    assert edit("--overwrite") == 0
    assert not Path("out/precious.txt").exists()
    assert_same_weights(weights_of("out"), edited_by_hand(se.StableEditConfig.one_pass()))
    assert edit("--output", "empty") == 0
    assert_same_weights(weights_of("empty"), weights_of("out"))
    assert sorted(os.listdir(work)) == ["empty", "out", "requests.json"]


def test_names_outside_of_ascii(edit, work, model_directory):
    requests = [FACTS[0] | {"id": "naïve 日本"}, FACTS[1]]
    name = os.fsdecode(b"caf\xe9.json")  # not UTF-8
    Path(name).write_text(json.dumps(requests, ensure_ascii=False), encoding="utf-8")
    assert edit("--requests", name, "--evaluate", "--output", "söder") == 0
    report = report_of("söder")
    assert report["requests"] == name
    assert report["scores"]["per_request"][0]["id"] == "naïve 日本"
    assert "naïve 日本" in Path("söder/stableedit_report.json").read_text(encoding="utf-8")


def test_failure_while_saving_leaves_nothing(edit, work, capsys, monkeypatch):
    before = tree(work)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    assert edit() == 2
    assert "No space left on device" in assert_one_error(capsys.readouterr().err.split("Editing")[-1].split("\n", 1)[1])
    assert tree(work) == before


def test_a_closed_pipe_does_not_cost_the_model(edit, work, monkeypatch):
    class Closed:
        def write(self, _text):
            raise BrokenPipeError(32, "Broken pipe")

        def flush(self):
            pass

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Closed())
    assert edit("--evaluate") == 141
    monkeypatch.undo()
    assert_same_weights(weights_of(work / "out"), edited_by_hand(se.StableEditConfig.one_pass()))
