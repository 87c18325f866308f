"""A model, a working directory, and `stableedit edit` in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stableedit_cpp.cli import main
from support.edit_command import REQUESTS
from support.tiny import save_tiny


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
