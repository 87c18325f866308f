"""``stableedit studio`` before its page is there: what it refuses, and that it is ended by signals."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from stableedit_cpp.cli import main
from support.commands import assert_one_error, started, tree
from support.sessions import create
from support.tiny import save_tiny

COMMAND = [sys.executable, "-m", "stableedit_cpp", "studio"]


def refused(capsys, *arguments: object) -> str:
    assert main(["studio", *map(str, arguments)]) == 2
    return assert_one_error(capsys.readouterr().err)


def test_without_gradio_one_sentence_says_what_to_install(capsys, tmp_path, monkeypatch):
    find = "importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    assert "the studio needs gradio and matplotlib: pip install 'stableedit-cpp[studio]'" in refused(capsys, tmp_path)


class TestRefused:
    @pytest.fixture(autouse=True)
    def gradio(self):
        pytest.importorskip("uvicorn", reason="the studio needs the extra 'studio'")

    def test_a_directory_without_a_session(self, capsys, tmp_path):
        assert "--model NAME begins a session there" in refused(capsys, tmp_path / "edits")
        assert tree(tmp_path) == {}

    def test_a_session_that_somebody_has_open(self, capsys, tmp_path, tokenizer):
        model = save_tiny(tmp_path / "model")
        with create(tmp_path / "edits", tokenizer, source=str(model)) as session:
            session.edit([{"prompt": "Gold is", "target": "Au"}])
            before = tree(tmp_path / "edits")
            said = refused(capsys, tmp_path / "edits")
            assert f"is open for writing by process {os.getpid()}" in said
            assert tree(tmp_path / "edits") == before

    def test_a_port_that_is_taken_and_a_short_token(self, capsys, tmp_path):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            said = refused(capsys, tmp_path / "edits", "--port", port)
            assert f"cannot listen on 127.0.0.1, port {port}" in said
        assert "at least 8 characters" in refused(capsys, tmp_path / "edits", "--token", "short")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_politely(tmp_path, number):
    pytest.importorskip("gradio", reason="the studio needs the extra 'studio'")
    model = save_tiny(tmp_path / "model")
    command = [*COMMAND, str(tmp_path / "edits"), "--model", str(model), "--no-browser", "--host", "0.0.0.0"]
    with started(command, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        assert re.search(rf"http://{re.escape(socket.gethostname())}:\d+/\?token=[\w-]{{32}} ", said)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in error
    assert main(["session", "status", str(tmp_path / "edits")]) == 0
