"""``stableedit session``: what a person sees and types."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from stableedit_cpp import load_model
from stableedit_cpp.cli import main
from stableedit_cpp.files.words import now
from stableedit_cpp.lifelong import LifelongSession, SessionView
from support.commands import assert_one_error
from support.sessions import MODULES, assert_same_bits, stream
from support.tiny import save_tiny

ACTIONS = ["create", "edit", "status", "log", "verify", "audit", "evaluate", "repair", "rollback", "revert", "export"]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("session-cli") / "model")


@pytest.fixture
def session(model_directory, tmp_path, monkeypatch, capsys):
    """Runs `stableedit session` in a directory with files of requests and a session ``s`` of two turns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    Path("requests.json").write_text(json.dumps(stream(8)))
    Path("warm_up.json").write_text(json.dumps(stream(4, 100)))
    Path("unnamed.json").write_text(json.dumps([{"prompt": "A is", "target": "B"}] * 2))

    def run(*options: object) -> int:
        return main(["session", *map(str, options)])

    create = [
        "create",
        "s",
        "--model",
        model_directory,
        "--device",
        "cpu",
        "--preset",
        "one-pass",
        "--edit-modules",
        *MODULES,
    ]
    assert run(*create, "--step-size", 1e-2, "--turn-size", 3, "--warm-up", "warm_up.json") == 0
    capsys.readouterr()
    return run


@pytest.mark.parametrize("action", ACTIONS)
def test_help_has_an_example(action, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["session", action, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"stableedit session {action} " in text.split("example:")[1]


def test_create_edit_and_the_rest(session, capsys):
    status = SessionView("s").status()
    assert (status.turn, status.warm_up, status.current) == (2, 4, 0)
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json") == 0
    out = capsys.readouterr().out
    assert "8 edits in" in out
    assert "8 current" in out
    assert session("log", "s") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines[1:]] == ["1", "2", "3", "4", "5"]
    assert "warm_up" in lines[1]
    assert "3 requests, 1 pass, efficacy before" in lines[3]
    assert session("log", "s", "--requests", "--last", 1) == 0
    assert capsys.readouterr().out.split()[:4] == ["f7", "turn", "5", "current"]
    assert session("rollback", "s", "--device", "cpu", "--to-turn", 3) == 0
    assert "3 current" in capsys.readouterr().out
    assert session("verify", "s") == 0
    assert "all sound" in capsys.readouterr().out
    assert session("status", "s", "--json") == 0
    assert json.loads(capsys.readouterr().out)["turn"] == 3
    assert session("log", "s", "--json") == 0
    assert json.loads(capsys.readouterr().out)[-1]["kind"] == "rollback"


def test_audit_evaluate_repair_revert(session, capsys):
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json") == 0
    capsys.readouterr()
    assert session("audit", "s", "--device", "cpu", "--sample", 5, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 5
    assert session("evaluate", "s", "--device", "cpu", "--metrics", "locality", "--output", "scores.json") == 0
    assert "efficacy" in capsys.readouterr().out
    scores = json.loads(Path("scores.json").read_text())
    assert scores["counts"]["efficacy"]["scored"] == 8
    assert session("audit", "s", "--device", "cpu", "--min-probability", 0.999) == 0
    assert "0 of 8 edits hold with probability 0.999 or more" in capsys.readouterr().out
    assert session("repair", "s", "--device", "cpu", "--budget", 2) == 0
    assert "2 solved again in 1 rounds" in capsys.readouterr().out
    assert SessionView("s").log()[-1].kind == "repair"
    assert session("revert", "s", "f2", "f5", "--device", "cpu", "--others", "all") == 0
    assert "efficacy of 6 other requests" in capsys.readouterr().out
    assert session("revert", "s", "f2", "--device", "cpu") == 2
    assert "request 'f2' is reverted in turn 7" in assert_one_error(capsys.readouterr().err)


def test_export(session, model_directory, capsys):
    from transformers import AutoModelForCausalLM

    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json") == 0
    assert session("export", "s", "--device", "cpu", "--format", "model", "--output", "edited") == 0
    assert "The whole model with 3 changed tensors is in edited" in capsys.readouterr().out
    exported = AutoModelForCausalLM.from_pretrained("edited").state_dict()
    with LifelongSession.open("s", *load_model(model_directory)) as opened:
        assert_same_bits(dict(opened.model.state_dict()), exported)
    assert session("export", "s", "--device", "cpu", "--format", "lora", "--rank", 2, "--output", "adapter") == 0
    assert "| edits | 8 |" in Path("adapter/README.md").read_text()

    before = SessionView("s").status()
    shrunk = ["export", "s", "--device", "cpu", "--format", "model", "--shrink", 0.5, "--output", "half"]
    assert session(*shrunk) == 0
    assert "0.5" in Path("half/README.md").read_text()
    assert SessionView("s").status() == before
    half, base = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("half", model_directory))
    for name, weight in half.items():
        torch.testing.assert_close(weight, (exported[name] + base[name]) / 2)


def test_results_as_json_alone_on_stdout(session, capsys):
    """Notes, bars and warnings go elsewhere, so that the output of each can be read by a program."""
    capsys.readouterr()
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json", "--limit", 3, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["edit"]["edits"] == 3 and document["status"]["edits"] == 3 and document["status"]["writer"] is None
    assert session("rollback", "s", "--device", "cpu", "--to-turn", 0, "--json") == 0
    assert json.loads(capsys.readouterr().out)["turn"] == 0
    assert session("verify", "s", "--json") == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_the_same_file_again(session, capsys):
    """What was done is skipped and counted; what is left is edited in the turns it would have been in."""
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json", "--limit", 3) == 0
    capsys.readouterr()
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json", "--warm-up", "warm_up.json") == 0
    out, err = capsys.readouterr()
    assert "3 requests of requests.json are done and skipped" in err
    assert "4 requests of the warm-up file are done and skipped" in err
    assert "5 edits in" in out
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json") == 0
    assert "0 edits in" in capsys.readouterr().out
    for _ in range(2):
        assert session("edit", "s", "--device", "cpu", "--requests", "unnamed.json") == 0
    assert len(SessionView("s").current_requests()) == 9  # the two of one prompt are one current request


def test_a_file_again_after_a_revert(session, capsys):
    """What was taken out is wanted again, and is told apart from what is done."""
    edit = ["edit", "s", "--device", "cpu", "--requests", "requests.json", "--limit", 3]
    assert session(*edit) == 0
    assert session("revert", "s", "--device", "cpu", "f1", "--only-take-out") == 0
    capsys.readouterr()
    assert session(*edit) == 0
    out, err = capsys.readouterr()
    assert "2 requests of requests.json are done and skipped" in err
    assert "1 of requests.json: the id was used before, so the request is edited under a new one: f1-2" in err
    assert "1 edits in" in out
    assert [request.id for request in SessionView("s").current_requests()] == ["f0", "f2", "f1-2"]


@pytest.mark.usefixtures("default_sigint")
def test_ctrl_c_keeps_what_is_done(session, monkeypatch, capsys):
    """It comes while the second turn is written down; the same file again does the rest."""
    instants = iter(range(100))

    def interrupted() -> str:
        if next(instants) == 1:
            signal.raise_signal(signal.SIGINT)
        return now()

    edit = ["edit", "s", "--device", "cpu", "--requests", "requests.json"]
    with monkeypatch.context() as patched:
        patched.setattr("stableedit_cpp.lifelong.journal.writer.now", interrupted)
        assert session(*edit) == 130
    error = capsys.readouterr().err
    assert "stableedit: interrupted: stopped after turn 4, which is done: 6 of 8 requests are edited" in error
    assert "Traceback" not in error
    assert session(*edit) == 0
    assert "6 requests of requests.json are done and skipped" in capsys.readouterr().err
    assert len(SessionView("s").current_requests()) == 8


def test_what_python_did_the_command_line_goes_on_with(session, model_directory):
    """Both see the same model: tokenizer and weights from the directory."""
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json") == 0
    with LifelongSession.open("s", *load_model(model_directory)) as opened:
        before = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    with LifelongSession.open("s", *load_model(model_directory)) as opened:
        assert_same_bits(dict(opened.model.state_dict()), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "s", "--format", "model", "--output", "o", "--shrink", "2"], "--shrink must be greater than 0 and"),
        (["audit", "s", "--min-probability", "1"], "min_probability must be at least 0 and less than 1, not 1.0"),
        (["evaluate", "s"], "the session s has no current edits to score"),
        (["status", "nowhere"], "nowhere is no session directory: it has no file 'journal'"),
        (["edit", "s", "--requests", "missing.json"], "there is no file missing.json"),
        (["rollback", "s", "--to-turn", "7"], "there is no turn 7; the turns are 0 (before the first) to 2"),
        (["create", "s", "--model", "x"], "s exists and is not an empty directory"),
        (["create", "/proc/s", "--model", "x"], "the journal /proc/s/journal cannot be made in /proc"),
        (["edit", "s", "--requests", "requests.json", "--model", "nowhere"], "cannot load the model 'nowhere'"),
    ],
)
def test_bad_input(arguments, message, session, capsys):
    extra = ["--device", "cpu"] if arguments[0] not in ("status", "log", "verify") else []
    assert session(*arguments, *extra) == 2
    assert message in assert_one_error(capsys.readouterr().err)


def test_damage(session, capsys):
    journal = Path("s/journal")
    record = SessionView("s").journal.records[1]
    data = bytearray(journal.read_bytes())
    data[record.offset + 300] ^= 1
    journal.write_bytes(data)
    assert session("edit", "s", "--device", "cpu", "--requests", "requests.json") == 2
    error = assert_one_error(capsys.readouterr().err)
    assert f"record 1 at byte {record.offset} cannot be used" in error
    assert "stableedit session verify s" in error
    assert session("verify", "s") == 1
    assert "problem: s/journal: record 1" in capsys.readouterr().out
    assert session("status", "s") == 0
    assert "DAMAGED" in capsys.readouterr().out
    assert session("verify", "s", "--repair") == 0
    assert "done: cut the journal off" in capsys.readouterr().out
    assert session("verify", "s") == 0


def test_a_turn_in_flight_is_named(session, capsys):
    journal = Path("s/journal")
    journal.write_bytes(journal.read_bytes() + b"SEjr torn")
    assert session("rollback", "s", "--device", "cpu", "--to-turn", 1) == 0
    err = capsys.readouterr().err
    assert "stableedit: s: cut off a turn that was in flight: record 3 at byte" in err
    assert "Traceback" not in err
