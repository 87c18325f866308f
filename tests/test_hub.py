"""Exports on the hub: the real client speaks to a stand-in of the hub on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import huggingface_hub
import pytest

from stableedit_cpp.cli import main
from stableedit_cpp.export import Provenance, change_of, export_delta, export_lora, export_model, push_to_hub
from support.commands import assert_one_error, tree
from support.exports import edited
from support.hub_server import TOKEN, hub_server
from support.sessions import create, stream
from support.tiny import save_tiny, tiny_tokenizer


@pytest.fixture
def hub(monkeypatch):
    with hub_server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)  # what HF_ENDPOINT sets
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has LFS only
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """delta/, adapter/ and model/ of one editor, whose base model is a directory."""
    place = tmp_path_factory.mktemp("made")
    base = save_tiny(place / "base")
    editor = edited()
    change, provenance = change_of(editor), Provenance(base_model=str(base), config=editor.config, edits=13)
    export_delta(change, place / "delta", provenance=provenance)
    pytest.importorskip("peft")
    export_lora(change, place / "adapter", rank=2, provenance=provenance)
    export_model(editor.model, editor.tokenizer, place / "model", provenance=provenance)
    return place


@pytest.mark.parametrize("kind", ["delta", "adapter", "model"])
def test_every_file_arrives_in_one_commit(hub, made, kind):
    before = tree(made / kind)
    address = push_to_hub(made / kind, f"lab/{kind}", token=TOKEN, private=True, commit_message="Facts of May")
    arrived = hub.files(f"lab/{kind}")
    assert arrived.keys() == before.keys()
    assert all(arrived[path] == content for path, content in before.items() if path != "README.md")
    # The hub refuses a card that says a directory is the base model; the rest of the card is as it was.
    card, own = arrived["README.md"].decode(), before["README.md"].decode()
    assert "base_model:" not in card.split("---")[1] and "base_model:" in own.split("---")[1]
    assert card.split("---", 2)[2] == own.split("---", 2)[2]
    repository = hub.repositories[f"lab/{kind}"]
    assert repository["private"] == "private"
    assert [commit["summary"] for commit in repository["commits"]] == ["Facts of May"]
    assert address == f"{hub.endpoint}/lab/{kind}/commit/1"
    assert tree(made / kind) == before


def test_branch_pull_request_and_name_of_the_user(hub, made):
    push_to_hub(made / "delta", "facts", token=TOKEN, revision="may")
    assert set(hub.files("somebody/facts", "may")) == set(tree(made / "delta"))
    assert hub.files("somebody/facts") == {}
    push_to_hub(made / "delta", "facts", token=TOKEN, revision="may")  # once more: it is there already
    address = push_to_hub(made / "delta", "facts", token=TOKEN, create_pr=True)
    assert address.endswith("/discussions/1")
    assert hub.files("somebody/facts") == {}
    assert hub.repositories["somebody/facts"]["private"] is None


@pytest.mark.parametrize("base", ["owner/name", "smollm2-135m"])
def test_names_of_the_hub_are_kept(hub, tmp_path, base):
    export_delta(change_of(edited()), tmp_path / "delta", provenance=Provenance(base_model=base))
    push_to_hub(tmp_path / "delta", "lab/facts", token=TOKEN)
    named = "HuggingFaceTB/SmolLM2-135M-Instruct" if base == "smollm2-135m" else base
    assert f"base_model: {named}\n" in hub.files("lab/facts")["README.md"].decode()


def test_what_goes_wrong_is_said(hub, made, tmp_path):
    before = tree(made / "delta")
    with pytest.raises(ValueError, match=r"is no export: it has no stableedit_export\.json"):
        push_to_hub(tmp_path, "lab/facts", token=TOKEN)
    with pytest.raises(ValueError, match=r"is whole, and could not be uploaded to lab/facts: .*hf upload lab/facts "):
        push_to_hub(made / "delta", "lab/facts", token="hf_wrong")
    with pytest.raises(ValueError, match="could not be uploaded to a/b/c"):
        push_to_hub(made / "delta", "a/b/c", token=TOKEN)
    hub.refuse = {"/lfs/": 403}
    with pytest.raises(ValueError, match="could not be uploaded to lab/facts"):
        push_to_hub(made / "delta", "lab/facts", token=TOKEN)
    assert hub.files("lab/facts") == {}
    assert tree(made / "delta") == before


def test_command(hub, made, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["export", "--device", "cpu", "--base", str(made / "base"), "--edited", str(made / "delta")]
    arguments += ["--format", "delta", "--output", "out"]
    assert main([*arguments, "--push-to-hub", "lab/facts", "--private", "--token", TOKEN]) == 0
    assert f"It is on the hub: {hub.endpoint}/lab/facts/commit/1" in capsys.readouterr().out
    assert set(hub.files("lab/facts")) == set(tree(tmp_path / "out"))
    # What cannot succeed is found out before anything is loaded.
    hub.repositories.clear()
    monkeypatch.setattr("stableedit_cpp.cli.export.load_any", lambda *_: pytest.fail("a model was loaded"))
    bad = {
        ("--push-to-hub", "lab/facts", "--token", "hf_wrong"): "the hub does not take the token that was given",
        ("--push-to-hub", "lab/facts"): "the hub does not take the token of this machine",
        ("--private",): "--private is for an upload; add --push-to-hub REPO",
        ("--create-pr",): "--create-pr is for an upload",
    }
    for options, message in bad.items():
        assert main([*arguments, "--overwrite", *options]) == 2
        assert message in assert_one_error(capsys.readouterr().err)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main([*arguments, "--overwrite", "--push-to-hub", "lab/facts", "--token", TOKEN]) == 2
    assert "nothing can be pushed to the hub: the hub cannot be reached" in assert_one_error(capsys.readouterr().err)
    assert hub.repositories == {}


def test_command_of_a_session(hub, tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    with create(tmp_path / "session", tiny_tokenizer(), source=str(base)) as session:
        session.edit(stream(2), progress=False)
    arguments = ["session", "export", str(tmp_path / "session"), "--format", "delta", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--push-to-hub", "lab/session", "--token", TOKEN]) == 0
    assert f"It is on the hub: {hub.endpoint}/lab/session/commit/1" in capsys.readouterr().out
    assert set(hub.files("lab/session")) == {"README.md", "delta.safetensors", "stableedit_export.json"}


@pytest.mark.slow
def test_command_in_a_process_of_its_own(made, tmp_path):
    """HF_ENDPOINT and HF_TOKEN, as a user sets them."""
    with hub_server() as hub:
        surroundings = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        surroundings |= {"HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-m", "stableedit_cpp", "export", "--device", "cpu", "--base", made / "base"]
        command += ["--edited", made / "model", "--format", "lora", "--rank", "1", "--output", "out"]
        command += ["--push-to-hub", "lab/facts"]
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=surroundings, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"It is on the hub: http://127.0.0.1:\d+/lab/facts/commit/1", done.stdout)
        assert "adapter_model.safetensors" in hub.files("lab/facts")
