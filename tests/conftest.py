"""The surroundings of every test, and fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
import signal

# Before torch is loaded. On tiny models a second OpenMP thread only waits, and where the cores have other work
# (the other workers of pytest-xdist, for a start) it waits at each barrier for a core: fifteen times as long in all.
# Tests about threads set their own count. Commands that tests start inherit both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is not on this machine is missing; without this, each attempt to fetch it is retried for most of a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.register_assert_rewrite("support")

from support.tiny import tiny_tokenizer  # noqa: E402  loads torch


def pytest_addoption(parser):
    parser.addoption(
        "--write-model-table", action="store_true", help="write docs/models.md from what test_model_table.py finds"
    )


@pytest.fixture(scope="session")
def tokenizer():
    """One token a byte, no special tokens added."""
    return tiny_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def no_choices_of_the_user(tmp_path_factory):
    """Which modules were measured to be the best of a model on this machine is nothing to a test."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("choices")
        patch.setattr("stableedit_cpp.editors.choice_cache.cache_directory", lambda: directory)
        yield


@pytest.fixture(autouse=True)
def gradients_stay_on():
    """A test that leaves them off, by a signal at a bad moment, say, would fail others and not itself."""
    yield
    on = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    assert on, "gradients were left switched off"


@pytest.fixture
def default_sigint():
    """Python's own handler, also where the test run was started with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    handler = signal.signal(signal.SIGINT, before)
    assert handler is signal.default_int_handler  # put back by the editor


def chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'test')")
    if chromium() is None:
        pytest.skip("there is no Chromium; .ci/system-packages chromium installs it")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()
