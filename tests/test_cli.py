"""The command line: what it makes, what it says about bad input, and what Ctrl-C does."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import stableedit_cpp as se
from stableedit_cpp import load_config
from stableedit_cpp.cli import main
from stableedit_cpp.editors import turn as turn_module
from stableedit_cpp.errors import ModelBroken
from stableedit_cpp.lifelong.repair import repair
from support.commands import assert_one_error, tree
from support.tiny import FACTS, pattern_of, save_tiny, tiny_model, tiny_tokenizer

COMMANDS = [
    "demo",
    "edit",
    "choose-modules",
    "train-hypernetwork",
    "evaluate",
    "export",
    "datasets",
    "bench",
    "side-effects",
    "report",
    "env",
]
LAST = "model.layers.2.mlp.down_proj"
REQUESTS = [
    fact
    | {"id": f"f{i}", "rephrase": f"Say: {fact['prompt']}", "locality_prompt": "One, two,", "locality_target": "three"}
    for i, fact in enumerate(FACTS)
]


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "model"
    return save_tiny(directory, bos=True)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a file of requests."""
    (tmp_path / "requests.json").write_text(json.dumps(REQUESTS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def edit(model_directory, work):
    """Runs `stableedit edit` with the usual options and those of the test; with one pass, unless they name it."""

    def run(*options: object) -> int:
        arguments = ["--model", model_directory, "--requests", "requests.json", "--output", "out", *options]
        if not {"--preset", "--config", "--editor"}.intersection(options):
            arguments += ["--preset", "one-pass"]
        return main(["edit", "--device", "cpu", *map(str, arguments)])

    return run


def report_of(directory: str = "out") -> dict:
    return json.loads(Path(directory, "stableedit_report.json").read_text(encoding="utf-8"))


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(directory).state_dict()


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def edited_by_hand(config: se.EditorConfig, requests=REQUESTS, warm_up=()) -> dict[str, torch.Tensor]:
    """The same edits through the Python interface."""
    model = tiny_model("llama")
    cls = se.StableEdit if isinstance(config, se.StableEditConfig) else se.UltraEdit
    editor = cls(model, tiny_tokenizer(bos=True), config)
    if warm_up:
        editor.warm_up(warm_up, progress=False)
    editor.edit(requests, progress=False)
    return model.state_dict()


# --- help, env, python -m ---


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    example = text[text.index("example:") :]
    assert f"  stableedit {command}" in example


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "stableedit demo" in text
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s+\w", text, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["edit"],
        ["evaluate", "--model", "m", "--requests", "r.json", "--limit", "0"],
        ["evaluate", "--model", "m", "--requests", "r.json", "--limit", "many"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--step-size", "small"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--editor", "no-such-editor"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--turn-size", "-1"],
        ["edit", "--model", "m", "--requests", "r", "--output", "o", "--edit-modules"],
        ["evaluate", "--model", "m", "--requests", "r.json", "--dtype", "int8"],
    ],
)
def test_wrong_options(work, capsys, arguments):
    before = tree(work)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert "error: " in err.splitlines()[-1]
    assert "Traceback" not in err
    assert tree(work) == before


NAMES = ["stableedit_cpp", "built against torch", "compiler", "torch", "cuda", "python", "system", "processor"]
NAMES += ["memory (GiB)", "transformers", "tokenizers", "safetensors", "numpy"]


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for name in NAMES:
        assert re.search(rf"^{re.escape(name)}: +\S", text, re.MULTILINE), name
    assert torch.__version__ in text
    assert se.__version__ in text


def test_env_as_json(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(NAMES) <= set(found)
    assert found["torch"] == torch.__version__
    assert found["stableedit_cpp"] == se.__version__
    assert found["memory (GiB)"] > 0


def test_command_is_installed(work):
    command = Path(sys.executable).with_name("stableedit")
    if not command.exists():
        pytest.skip("the package is not installed into this environment")
    arguments = ["evaluate", "--model", "m", "--requests", "missing.json"]
    # With what OpenMP says when it is loaded: what the command sets comes in time.
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["OMP_DISPLAY_ENV"] = "true"
    result = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.search(r"OMP_WAIT_POLICY ?= ?'PASSIVE'", result.stderr)
    assert result.stderr.splitlines()[-1] == "stableedit: error: there is no file missing.json"


def test_nobody_reads_the_output_of_python_dash_m(work):
    command = f"{sys.executable} -m stableedit_cpp env | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=work)
    assert (result.stdout, result.stderr) == ("141\n", "")


# --- edit ---


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


# --- bad input: one line, exit 2, nothing written ---


def write(name: str, content: str | bytes):
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def nothing() -> None:
    pass


GOOD = json.dumps(FACTS[0])
LONG = json.dumps([FACTS[0], {"prompt": "x" * 80, "target": "y", "id": "long"}])
BAD = {
    "unknown module": (nothing, ["--edit-modules", "model.layers.9.mlp"], ["'model.layers.9.mlp'", "mlp.down_proj"]),
    "one unknown module": (nothing, ["--edit-modules", LAST, "nope"], ["no linear map for 'nope'"]),
    "pattern without match": (nothing, ["--edit-modules", "*.nope"], ["'*.nope'", "(24 -> 16)"]),
    "module not linear": (
        nothing,
        ["--edit-modules", "model.norm"],
        ["model.norm is a LlamaRMSNorm, not a linear map"],
    ),
    "block": (nothing, ["--edit-modules", "model.layers.1"], ["model.layers.1 is a LlamaDecoderLayer"]),
    "missing requests": (nothing, ["--requests", "missing.json"], ["there is no file missing.json"]),
    "directory of requests": (nothing, ["--requests", "."], [". is a directory"]),
    "empty requests": (write("bad.json", ""), ["--requests", "bad.json"], ["bad.json is empty"]),
    "no requests": (write("bad.json", "[]"), ["--requests", "bad.json"], ["bad.json holds no edit requests"]),
    "blank requests": (write("bad.jsonl", "\n\n"), ["--requests", "bad.jsonl"], ["holds no edit requests"]),
    "latin-1 requests": (write("bad.csv", b"prompt,target\n\xe9,t\n"), ["--requests", "bad.csv"], ["not UTF-8 text"]),
    "malformed requests": (
        write("bad.jsonl", f"{GOOD}\n{GOOD}\n{{]\n"),
        ["--requests", "bad.jsonl"],
        ["bad.jsonl, line 3, column 2: not valid JSON"],
    ),
    "malformed json": (
        write("bad.json", f"[{GOOD},\n{GOOD}\n{GOOD}]"),
        ["--requests", "bad.json"],
        ["line 3, column 1"],
    ),
    "lacks a field": (
        write("bad.jsonl", '{"prompt": "p", "answer": "a"}'),
        ["--requests", "bad.jsonl"],
        ["line 1: the record lacks", "its fields are: prompt, answer"],
    ),
    "empty target": (
        write("bad.jsonl", f'{GOOD}\n{{"prompt": "p", "target": " "}}'),
        ["--requests", "bad.jsonl"],
        ["line 2: target is empty"],
    ),
    "not text": (
        write("bad.jsonl", '{"prompt": "p", "target": true}'),
        ["--requests", "bad.jsonl"],
        ["must be text, not bool"],
    ),
    "half a character": (
        write("bad.jsonl", '{"prompt": "p", "target": "\\ud800"}'),
        ["--requests", "bad.jsonl"],
        ["target is not valid Unicode"],
    ),
    "duplicate ids": (
        write("bad.json", json.dumps([REQUESTS[0], REQUESTS[1], REQUESTS[0]])),
        ["--requests", "bad.json"],
        ["record 2: the id 'f0' was used before, in record 0"],
    ),
    "no gzip": (write("bad.json.gz", "[]"), ["--requests", "bad.json.gz"], ["not a complete gzip file"]),
    "unknown suffix": (write("bad.txt", GOOD), ["--requests", "bad.txt"], ["cannot tell the format"]),
    "bad warm-up": (write("bad.jsonl", "{"), ["--warm-up", "bad.jsonl"], ["bad.jsonl, line 1"]),
    "prompt too long": (
        write("bad.json", LONG),
        ["--requests", "bad.json"],
        ["request 1 (long)", "tokens", "context of 64"],
    ),
    "step size zero": (nothing, ["--step-size", "0"], ["step_size must be greater than 0, not 0.0"]),
    "step size negative": (nothing, ["--step-size=-1e-4"], ["step_size must be greater than 0, not -0.0001"]),
    "step size nan": (nothing, ["--step-size", "nan"], ["step_size must be a finite number, not nan"]),
    "step size inf": (nothing, ["--step-size", "inf"], ["step_size must be a finite number, not inf"]),
    "output a file": (write("taken", "mine"), ["--output", "taken"], ["--output taken is a file"]),
    "output with content": (nothing, ["--output", "."], ["--output . exists and is not empty"]),
    "output below a file": (write("taken", "mine"), ["--output", "taken/out"], ["--output taken/out", "taken"]),
    "output deep below a file": (
        write("taken", ""),
        ["--output", "taken/a/b"],
        ["--output taken/a/b", "taken: Not a dir"],
    ),
    "output not writable": (nothing, ["--output", "/proc/out"], ["--output /proc/out"]),
    "output deep not writable": (nothing, ["--output", "/proc/a/b/out"], ["--output /proc/a/b/out"]),
    "missing model": (nothing, ["--model", "/no/such/model"], ["cannot load the model '/no/such/model'"]),
    "model a file": (nothing, ["--model", "requests.json"], ["cannot load the model 'requests.json'"]),
    "unknown device": (nothing, ["--device", "abacus"], ["cannot use device 'abacus'"]),
    "missing device": (nothing, ["--device", "cuda:99"], ["cannot use device 'cuda:99'"]),
    "missing config": (nothing, ["--config", "missing.json"], ["missing.json: No such file or directory"]),
    "config a directory": (nothing, ["--config", "."], [".: Is a directory"]),
    "malformed config": (
        write("bad.json", '{"ridge": 1,\n}'),
        ["--config", "bad.json"],
        ["bad.json: line 2", "not valid JSON"],
    ),
    "config not UTF-8": (write("bad.json", b'"\xe9"'), ["--config", "bad.json"], ["bad.json is not UTF-8 text"]),
    "config a list": (write("bad.json", "[]"), ["--config", "bad.json"], ["bad.json", "expected a JSON object"]),
    "config field": (
        write("bad.json", '{"stepsize": 1}'),
        ["--config", "bad.json"],
        ["bad.json", "did you mean 'step_size'?"],
    ),
    "config value": (
        write("bad.json", '{"ridge": 0}'),
        ["--config", "bad.json"],
        ["bad.json: ridge must be greater than 0"],
    ),
    "config type": (
        write("bad.json", '{"edit_modules": 5}'),
        ["--config", "bad.json"],
        ["bad.json: edit_modules must be"],
    ),
    "config editor": (write("bad.json", '{"editor": "rome"}'), ["--config", "bad.json"], ["unknown editor 'rome'"]),
    "shrink": (nothing, ["--shrink", "1.5"], ["--shrink must be greater than 0 and at most 1, not 1.5"]),
    "preset and editor": (
        nothing,
        ["--preset", "closed-loop", "--editor", "ultraedit"],
        ["--editor ultraedit, but --preset closed-loop is one of stableedit"],
    ),
    "config version": (write("bad.json", '{"version": 9}'), ["--config", "bad.json"], ["of version 9"]),
    "config and editor": (
        write("good.json", se.UltraEditConfig().to_json()),
        ["--config", "good.json", "--editor", "stableedit"],
        ["--editor stableedit, but good.json is a config of ultraedit"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_to_edit(edit, work, capsys, case):
    prepare, options, words = BAD[case]
    prepare()
    before = tree(work)
    output = [] if "--output" in options else ["--output", "new/deep/out"]
    capsys.readouterr()
    assert edit(*output, *options) == 2
    captured = capsys.readouterr()
    line = assert_one_error(captured.err)
    for word in words:
        assert word in line
    assert captured.out == ""
    assert tree(work) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("output", ["frozen", "frozen/out"])
def test_read_only_output(edit, work, capsys, output):
    (work / "frozen").mkdir(mode=0o555)
    assert edit("--output", output) == 2
    assert f"--output {output}" in assert_one_error(capsys.readouterr().err)
    assert tree(work / "frozen") == {}


@pytest.mark.parametrize("preset", ["stableedit", "one-pass"])
def test_not_finite_model(work, capsys, preset):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained("broken")
    tiny_tokenizer().save_pretrained("broken")
    before = tree(work)
    capsys.readouterr()
    arguments = ["--model", "broken", "--requests", "requests.json", "--output", "out", "--device", "cpu"]
    assert main(["edit", *arguments, "--preset", preset]) == 2
    line = assert_one_error(capsys.readouterr().err)
    if preset == "one-pass":
        assert re.search(r"request \d+ \(f\d+\): .* NaN or infinite", line)
    assert "NaN or infinit" in line  # an editor with anchors, or a guard, finds out before it looks at the requests
    assert tree(work) == before


# --- evaluate ---


def test_evaluate(model_directory, work, capsys):
    arguments = ["evaluate", "--model", str(model_directory), "--requests", "requests.json", "--device", "cpu"]
    assert main([*arguments, "--output", "new/scores.json"]) == 0
    out = capsys.readouterr().out
    expected = se.evaluate(tiny_model("llama"), tiny_tokenizer(bos=True), REQUESTS, progress=False)
    assert str(expected) in out
    assert "locality: not scored; say with --reference which the unedited model is" in out
    assert "scores and per-request values are in new/scores.json" in out
    document = json.loads(Path("new/scores.json").read_text(encoding="utf-8"))
    assert {name: document[name] for name in expected.to_dict()} == expected.to_dict()
    assert [record["id"] for record in document["per_request"]] == [request["id"] for request in REQUESTS]
    assert document["model"] == str(model_directory)
    assert document["requests"] == "requests.json"
    assert set(NAMES) <= set(document["environment"])
    assert os.listdir("new") == ["scores.json"]
    # An existing file is replaced; without --output nothing is written.
    assert main([*arguments, "--output", "new/scores.json", "--limit", "2"]) == 0
    assert len(json.loads(Path("new/scores.json").read_text(encoding="utf-8"))["per_request"]) == 2
    before = tree(work)
    assert main(arguments) == 0
    assert tree(work) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--requests", "missing.json"], "there is no file missing.json"),
        (["--output", "."], "--output . is a directory"),
        (["--output", "requests.json/scores.json"], "--output requests.json/scores.json"),
        (["--output", "/proc/scores.json"], "--output /proc/scores.json"),
        (["--model", "/no/such/model"], "cannot load the model"),
        (["--device", "abacus"], "cannot use device 'abacus'"),
        (["--requests", "long.json"], "request 1 (long), efficacy: prompt and target have"),
    ],
)
def test_bad_input_to_evaluate(model_directory, work, capsys, options, words):
    (work / "long.json").write_text(LONG)
    before = tree(work)
    arguments = [
        "--model",
        str(model_directory),
        "--requests",
        "requests.json",
        "--device",
        "cpu",
        "--output",
        "new/a.json",
    ]
    assert main(["evaluate", *arguments, *options]) == 2
    assert words in assert_one_error(capsys.readouterr().err)
    assert tree(work) == before


# --- demo ---


def test_demo_runs_on_any_model(work, capsys):
    model = tiny_model("llama")
    model.config.max_position_embeddings = 512
    model.save_pretrained("model")
    tiny_tokenizer(bos=True).save_pretrained("model")
    capsys.readouterr()
    arguments = ["--model", "model", "--device", "cpu", "--stream", "requests.json", "--warm-up", "requests.json"]
    assert main(["demo", *arguments, "--limit", "5"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\d+ of \d+ answers begin with the new fact", out)
    assert re.search(r"\d+ of \d+ answers are unchanged, word for word", out)
    assert "A stream of 5 edits" in out
    assert re.search(r"efficacy +\d\.\d{3} ± \d\.\d{3} +\d\.\d{3} ± \d\.\d{3}", out)


@pytest.mark.parametrize("options", [["--stream", "missing.json"], ["--warm-up", "missing.json"]])
def test_bad_input_to_demo(work, capsys, options):
    assert main(["demo", "--model", "/no/such/model", *options]) == 2
    assert "there is no file missing.json" in assert_one_error(capsys.readouterr().err)


# --- Ctrl-C ---


def interrupt_in_turn(monkeypatch, number: int) -> None:
    """Press Ctrl-C while the given turn is captured, counted from 1 over warm-up and stream."""
    turns = []
    capture = turn_module.capture

    def pressed(*args, **kwargs):
        turns.append(1)
        if len(turns) == number:
            signal.raise_signal(signal.SIGINT)
        return capture(*args, **kwargs)

    monkeypatch.setattr(turn_module, "capture", pressed)


def test_interrupted_stream_is_saved(edit, work, capsys, monkeypatch, default_sigint):
    interrupt_in_turn(monkeypatch, 2)
    assert edit("--turn-size", 5, "--evaluate") == 130
    words = "stopped after turn 2 of 3, which was finished and applied: 10 of 13 requests are edited"
    assert f"stableedit: interrupted: {words}" in capsys.readouterr().err
    report = report_of()
    assert report["interrupted"] == words
    assert report["edit"]["edits"] == 10
    assert [turn["requests"] for turn in report["edit"]["turns"]] == [5, 5]
    assert "scores" not in report
    monkeypatch.undo()
    expected = edited_by_hand(se.StableEditConfig.one_pass(turn_size=5), REQUESTS[:10])
    assert_same_weights(weights_of(work / "out"), expected)


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_interrupted_warm_up_does_not_go_on_to_the_stream(edit, work, capsys, monkeypatch, default_sigint, turn):
    (work / "warm.json").write_text(json.dumps(FACTS))
    interrupt_in_turn(monkeypatch, turn)
    assert edit("--turn-size", 5, "--warm-up", "warm.json") == 130
    assert f"stableedit: interrupted: in the warm-up: stopped after turn {turn} of 3" in capsys.readouterr().err
    report = report_of()
    assert report["interrupted"].startswith(f"in the warm-up: stopped after turn {turn} of 3")
    assert report["warm_up"]["edits"] == min(5 * turn, 13)
    assert "edit" not in report


def test_interrupt_in_the_last_turn_is_not_forgotten(edit, work, capsys, monkeypatch, default_sigint):
    interrupt_in_turn(monkeypatch, 3)
    assert edit("--turn-size", 5, "--evaluate") == 130
    report = report_of()
    assert "13 of 13 requests are edited" in report["interrupted"]
    assert "scores" not in report


def fail_in_turn(monkeypatch, number: int, error: Exception) -> None:
    """Raise while the given turn is captured, counted from 1 over warm-up and stream."""
    turns = []
    capture = turn_module.capture

    def failing(*args, **kwargs):
        turns.append(1)
        if len(turns) == number:
            raise error
        return capture(*args, **kwargs)

    monkeypatch.setattr(turn_module, "capture", failing)


@pytest.mark.parametrize(
    "error",
    [torch.linalg.LinAlgError("not positive definite"), MemoryError("no room"), ModelBroken("NaN"), KeyError(1)],
)
def test_an_error_in_a_late_turn_loses_none_before_it(edit, work, capsys, monkeypatch, error):
    fail_in_turn(monkeypatch, 3, error)
    assert edit("--turn-size", 5, "--evaluate") == 1
    assert f"stableedit: error: {error}; saving the model as it is" in capsys.readouterr().err
    report = report_of()
    assert report["error"] == str(error)
    assert report["edit"]["edits"] == 10
    assert "scores" not in report
    monkeypatch.undo()
    expected = edited_by_hand(se.StableEditConfig.one_pass(turn_size=5), REQUESTS[:10])
    assert_same_weights(weights_of(work / "out"), expected)


def test_an_error_in_the_first_turn_saves_nothing(edit, work, capsys, monkeypatch):
    before = tree(work)
    fail_in_turn(monkeypatch, 1, torch.linalg.LinAlgError("not positive definite"))
    assert edit("--turn-size", 5) == 2
    assert "not positive definite" in assert_one_error(capsys.readouterr().err)
    assert tree(work) == before


@pytest.mark.parametrize(("error", "status"), [(MemoryError("no room"), 1), (KeyboardInterrupt(), 130)])
def test_an_edited_model_is_saved_whatever_happens_while_it_is_scored(edit, work, capsys, monkeypatch, error, status):
    def failing(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("stableedit_cpp.cli.edit.evaluate", failing)
    assert edit("--evaluate") == status
    assert "while scoring: " in capsys.readouterr().err
    assert report_of()["edit"]["edits"] == 13
    assert_same_weights(weights_of(work / "out"), edited_by_hand(se.StableEditConfig.one_pass(), REQUESTS))


def test_interrupt_before_the_stream(edit, work, capsys, monkeypatch, default_sigint):
    def press(*_args, **_kwargs):
        signal.raise_signal(signal.SIGINT)

    before = tree(work)
    monkeypatch.setattr("stableedit_cpp.cli.edit.load", press)
    assert edit() == 130
    assert capsys.readouterr().err == "stableedit: interrupted\n"
    assert tree(work) == before


@pytest.mark.slow
def test_sigint_to_a_running_command(model_directory, work):
    (work / "many.json").write_text(json.dumps(FACTS * 400))
    command = [sys.executable, "-m", "stableedit_cpp", "edit", "--model", model_directory, "--requests", "many.json"]
    command += ["--output", "out", "--turn-size", "1", "--device", "cpu"]
    with subprocess.Popen(
        command,
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the runner itself ignores SIGINT, its children would as well.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            seen, deadline = b"", time.monotonic() + 120
            while not re.search(rb"Editing: +\d+%\|[^|]*\| [1-9]\d*/5200", seen):
                assert time.monotonic() < deadline, seen
                piece = os.read(process.stderr.fileno(), 4096)
                assert piece, f"ended before the first turn: {seen!r}"
                seen += piece
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    err = (seen + err).decode()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    report = report_of()
    done = report["edit"]["edits"]
    words = f"stopped after turn {done} of 5200, which was finished and applied: {done} of 5200 requests are edited"
    assert 0 < done < 5200
    assert report["interrupted"] == words
    assert f"stableedit: interrupted: {words}; saving the model as it is" in err
    assert f"{done} edits in" in out.decode()
    (edited,) = report_of()["edit_modules"]
    changed = weights_of("out")[f"{edited}.weight"]
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, tiny_model("llama").state_dict()[f"{edited}.weight"])
