"""``stableedit export``, from what ``stableedit edit`` wrote to each format and on."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import stableedit_cpp as se
from stableedit_cpp import core
from stableedit_cpp.cli import main
from stableedit_cpp.export import apply_delta
from stableedit_cpp.files.digest import file_digest, model_digest
from support.commands import assert_one_error, tree
from support.exports import TAKES, card_of, facts_of, logits
from support.tiny import FACTS, pattern_of, save_tiny, tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """base/ (llama), edited/ (all facts, with report), facts.json; nothing in it is changed by a test."""
    place = tmp_path_factory.mktemp("export")
    save_tiny(place / "base")
    (place / "facts.json").write_text(json.dumps(FACTS))
    (place / "warm.json").write_text(json.dumps(FACTS[:4]))
    (place / "config.json").write_text(se.StableEditConfig.one_pass(**TAKES).to_json())
    options = ["--model", place / "base", "--requests", place / "facts.json", "--output", place / "edited"]
    options += [
        "--warm-up",
        place / "warm.json",
        "--edit-modules",
        pattern_of("llama"),
        "--config",
        place / "config.json",
    ]
    assert main(["edit", "--device", "cpu", "--evaluate", *map(str, options)]) == 0
    return place


@pytest.fixture
def export(place, tmp_path, monkeypatch):
    """Runs `stableedit export` in an empty directory; later options override the usual ones."""
    monkeypatch.chdir(tmp_path)

    def run(*options: object) -> int:
        arguments = ["--base", place / "base", "--edited", place / "edited", "--output", "out", *options]
        return main(["export", "--device", "cpu", *map(str, arguments)])

    return run


def model_of(directory) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def test_edit_writes_a_card(place):
    text = card_of(place / "edited")
    assert f"| digest of the base model | {model_digest(tiny_model('llama'))} |" in text
    assert f"facts.json (BLAKE2b-256 {file_digest(place / 'facts.json')}) |" in text
    assert f"warm.json (BLAKE2b-256 {file_digest(place / 'warm.json')}) |" in text
    assert "| edits | 13 |" in text
    assert "| warm-up edits | 4 |" in text
    assert re.search(r"\| edited \| \d\.\d{3} \|", text)
    assert '"step_size": 0.02' in text
    assert facts_of(place / "edited")["edited_digest"] == model_digest(model_of(place / "edited"))


def test_lora(export, place, capsys):
    assert export("--format", "lora", "--rank", 5, "--requests", place / "facts.json") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"LoRA adapter of rank 5 for 3 modules keeps \d+\.\d % of the changes' norm; it \(0\.0 MB\) is in out", out
    )
    provenance = facts_of(Path("out"))["provenance"]
    assert provenance["base_model"] == str(place / "base")
    assert (provenance["edits"], provenance["warm_up_edits"]) == (13, 4)
    requests = se.read_requests(place / "facts.json")
    base, tokenizer = se.load_model(place / "base")
    models = {"unedited": base, "edited": model_of(place / "edited")}
    models["exported"] = peft.PeftModel.from_pretrained(model_of(place / "base"), "out")
    for name, model in models.items():
        expected = se.evaluate(model, tokenizer, requests, progress=False).means()
        assert provenance["scores"][name] == pytest.approx(expected), name
        assert f"{name}:\nefficacy" in out


def test_lora_keeps_95_percent_by_default(export):
    assert export("--format", "lora") == 0
    facts = facts_of(Path("out"))
    assert facts["kept_norm"] >= 0.95
    assert export("--format", "lora", "--output", "less", "--rank", facts["rank"] - 1) == 0
    assert facts_of(Path("less"))["kept_norm"] < 0.95


def test_lora_by_efficacy(export, place):
    options = ["--format", "lora", "--requests", place / "facts.json", "--limit", 8]
    assert export(*options, "--keep-efficacy", 0.5) == 0
    facts = facts_of(Path("out"))
    scores = facts["provenance"]["scores"]
    assert scores["exported"]["efficacy"] >= 0.5 * scores["edited"]["efficacy"]
    assert facts["rank"] < 16


def test_lora_in_half_precision(export):
    assert export("--format", "lora", "--dtype", "bfloat16") == 0
    tensors, _ = core.load_safetensors("out/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_delta_and_back(export, place):
    assert export("--format", "delta") == 0
    model = model_of(place / "base")
    apply_delta(model, "out")
    digest = model_digest(model)
    assert digest == model_digest(model_of(place / "edited"))
    for source in ("out", "out/delta.safetensors"):
        assert export("--format", "model", "--edited", source, "--output", "whole", "--overwrite") == 0
        assert model_digest(model_of("whole")) == digest == facts_of(Path("whole"))["edited_digest"]
    assert export("--format", "lora", "--edited", "out", "--output", "adapter", "--rank", 16) == 0
    adapted = peft.PeftModel.from_pretrained(model_of(place / "base"), "adapter")
    torch.testing.assert_close(logits(adapted), logits(model), rtol=1e-4, atol=2e-4)


def test_patch_and_back(export, place):
    assert export("--format", "patch", "--rank", 16) == 0
    edited = model_of(place / "edited")
    for source in ("out", "out/patch.safetensors"):
        assert export("--format", "model", "--edited", source, "--output", "whole", "--overwrite") == 0
        torch.testing.assert_close(model_of("whole").state_dict(), edited.state_dict(), rtol=1e-5, atol=1e-5)
    assert export("--format", "patch", "--output", "whole", "--overwrite") == 0
    assert not core.load_patch("whole/patch.safetensors").modules["model.layers.0.mlp.down_proj"].is_low_rank


def test_whole_model(export, place):
    assert export("--format", "model", "--requests", place / "facts.json") == 0
    assert model_digest(model_of("out")) == model_digest(model_of(place / "edited"))
    assert set(facts_of(Path("out"))["provenance"]["scores"]) == {"unedited", "edited"}


@pytest.mark.parametrize("form", ["model", "delta", "patch", "lora"])
def test_names_outside_of_ascii(export, place, tmp_path, form):
    base = tmp_path / "naïve 日本"
    shutil.copytree(place / "base", base)
    assert export("--format", form, "--base", base, "--output", "söder") == 0
    assert "naïve 日本" in card_of(Path("söder"))


def test_model_edited_elsewhere(export, tmp_path):
    """A directory without our report is compared with the base model all the same."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    model.save_pretrained("other")
    tiny_tokenizer().save_pretrained("other")
    assert export("--format", "lora", "--edited", "other", "--rank", 1) == 0
    assert facts_of(Path("out"))["modules"].keys() == {"model.layers.1.self_attn.q_proj"}


BAD = {
    "no such edited": (["--edited", "nowhere"], "--edited nowhere: there is no such directory or file"),
    "no model at all": (["--edited", "."], r"--edited \. is neither a saved model.* nor an exported delta"),
    "no such base": (["--base", "nowhere"], "cannot load the model 'nowhere'"),
    "other base": (
        ["--base", "seed1"],
        r"--base seed1 is not the model that .*edited was made from: its digest is \w{16}",
    ),
    "other architecture": (["--base", "gpt2"], "the edited model is no edit of the base model: only one of them has"),
    "edited as base": (["--base", "EDITED"], "there is nothing to export"),
    "two ranks": (["--rank", "2", "--keep", "0.5"], "--rank and --keep each decide the rank; give one of them"),
    "rank too high": (["--rank", "17"], "rank must be a whole number from 1 to 16, the full rank here, not 17"),
    "keep too high": (["--keep", "1.5"], r"keep must be a share .* not 1\.5"),
    "efficacy without requests": (
        ["--keep-efficacy", "0.9"],
        "--keep-efficacy needs the edits .*: add --requests FILE",
    ),
    "rank of a delta": (["--format", "delta", "--rank", "2"], "--rank is for --format patch and lora; a delta keeps"),
    "dtype of a patch": (["--format", "patch", "--dtype", "float16"], "--dtype is for --format lora"),
    "no requests": (["--requests", "none.json"], "there is no file none.json"),
    "output exists": (
        ["--output", "seed1"],
        "--output seed1 exists and is not empty; choose another or add --overwrite",
    ),
    "foreign safetensors": (["--edited", "seed1/model.safetensors"], "is neither a saved model"),
    "damaged delta": (["--edited", "damaged.safetensors"], r"damaged\.safetensors"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(export, place, tmp_path, capsys, case):
    options, message = BAD[case]
    tiny_model("llama", seed=1).save_pretrained("seed1")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "seed1" / name).write_bytes((place / "base" / name).read_bytes())
    save_tiny(tmp_path / "gpt2", "gpt2")
    Path("damaged.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    before = tree(tmp_path)
    options = [str(place / "edited") if option == "EDITED" else option for option in options]
    assert export("--format", "lora", *options) == 2
    assert re.search(message, assert_one_error(capsys.readouterr().err))
    assert tree(tmp_path) == before


def test_delta_of_another_base(export, place, capsys):
    assert export("--format", "delta") == 0
    assert export("--format", "model", "--edited", "out", "--base", place / "edited", "--output", "whole") == 2
    assert "out/delta.safetensors belongs to another base model" in capsys.readouterr().err
    assert not Path("whole").exists()
