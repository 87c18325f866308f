"""What all commands of ``stableedit`` share: quick help, and one sentence for whatever goes wrong."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
import torch

from stableedit_cpp import cli
from stableedit_cpp.errors import SessionBusy


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_answers_before_torch_is_loaded(arguments):
    script = (
        "import sys\nfrom stableedit_cpp import cli\n"
        f"try:\n    cli.main({arguments})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_the_list_of_commands_says_what_their_own_help_says(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    summary = cli._COMMANDS[command]
    assert summary[0].upper() + summary[1:] + "." in text
    assert "example:" in text


def failing(error: Exception):
    def run(_options: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("no such thing"), 2, "stableedit: error: no such thing\n"),
        (SessionBusy("s is open elsewhere"), 2, "stableedit: error: s is open elsewhere\n"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), 2, "x.json: No such file or directory"),
        (torch.linalg.LinAlgError("not positive definite"), 2, "stableedit: error: not positive definite\n"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB.\nmore"), 2, "2 GiB. Use a smaller max_tokens_per_forward"),
        (IndexError("list index out of range"), 1, "IndexError: list index out of range; this is a defect of"),
        (NotImplementedError(), 1, "NotImplementedError; this is a defect"),
        (RuntimeError("shapes\nException raised from x\n#1 frame"), 1, "RuntimeError: shapes; this is a defect"),
    ],
)
def test_whatever_goes_wrong_is_one_sentence(monkeypatch, capsys, error, status, said):
    monkeypatch.setattr("stableedit_cpp.cli.env.run", failing(error))
    assert cli.main(["env"]) == status
    text = capsys.readouterr().err
    assert said in text
    assert text.count("\n") == 1
    assert "Traceback" not in text


def test_the_traceback_of_a_defect_is_there_for_who_asks(monkeypatch, capsys):
    monkeypatch.setenv("STABLEEDIT_TRACEBACK", "1")
    monkeypatch.setattr("stableedit_cpp.cli.env.run", failing(IndexError("x")))
    assert cli.main(["env"]) == 1
    assert "Traceback" in capsys.readouterr().err
