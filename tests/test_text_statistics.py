"""Statistics over text: against autograd in float64, stopped and gone on with, and refused for another model."""

from __future__ import annotations

import gzip
import json

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp import cli, core
from stableedit_cpp.data.texts import iter_texts
from stableedit_cpp.model.gather import gather_statistics
from stableedit_cpp.model.text_statistics import TextStatistics, load_statistics
from support.tiny import FACTS, pattern_of, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens are few for keys")

LINES = [f"Line {number} says that {number} times {number} is {number * number}.\n" for number in range(40)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(LINES))
    return path


def reference(model: torch.nn.Module, windows: list[list[int]], names: list[str]):
    """Mean of h h^T and of g g^T by module, one window after the other, by plain autograd."""
    keys, gradients, inputs = {}, {}, {}
    for ids in windows:
        outputs, hooks = {}, []
        for name in names:

            def hook(_module, args, output, name=name, outputs=outputs):
                output.retain_grad()
                inputs[name], outputs[name] = args[0].detach(), output

            hooks.append(model.get_submodule(name).register_forward_hook(hook))
        logits = model(torch.tensor([ids[:-1]])).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), torch.tensor(ids[1:]), reduction="sum")
        loss.backward()
        for name in names:
            rows, grads = inputs[name].flatten(0, -2), outputs[name].grad.flatten(0, -2)
            keys[name] = keys.get(name, 0) + rows.T @ rows
            gradients[name] = gradients.get(name, 0) + grads.T @ grads
        for one in hooks:
            one.remove()
    count = sum(len(ids) - 1 for ids in windows)
    return [{name: total / count for name, total in found.items()} for found in (keys, gradients)], count


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma"])
@pytest.mark.parametrize("keys_only", [False, True], ids=["both", "keys only"])
def test_they_are_those_of_autograd(architecture, keys_only, text, tmp_path):
    model, tokenizer = tiny_model(architecture, torch.float64), tiny_tokenizer(bos=True)
    found = gather_statistics(
        model,
        tokenizer,
        text,
        tmp_path / "s.safetensors",
        edit_modules=pattern_of(architecture),
        tokens=10_000,
        window=24,
        max_tokens=100,
        value_gradients=not keys_only,
        progress=False,
    )
    ids = tokenizer("".join(LINES))["input_ids"]
    windows = [part for part in (ids[begin : begin + 24] for begin in range(0, len(ids), 24)) if len(part) > 1]
    (keys, gradients), count = reference(model, windows, list(found.keys))
    assert found.tokens == count
    for name, expected in keys.items():
        torch.testing.assert_close(found.second_moment(name), expected, rtol=1e-9, atol=1e-12)
        if keys_only:
            with pytest.raises(ValueError, match="they are of keys alone"):
                found.gradient_moment(name)
        else:
            torch.testing.assert_close(found.gradient_moment(name), gradients[name], rtol=1e-8, atol=1e-12)
    assert model.training is False and all(parameter.requires_grad for parameter in model.parameters())


def same(a: TextStatistics, b: TextStatistics) -> bool:
    parts = [
        (getattr(a, field)[name].state_dict(), getattr(b, field)[name].state_dict())
        for field in ("keys", "value_gradients")
        for name in getattr(a, field)
    ]
    equal = all(torch.equal(one[field], two[field]) for one, two in parts for field in one)
    return equal and a.place == b.place and a.tokens == b.tokens


@pytest.mark.parametrize("value_gradients", [True, False])
def test_stopped_and_called_again_is_the_same_bits(text, tmp_path, monkeypatch, value_gradients):
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    how = {"window": 16, "max_tokens": 64, "value_gradients": value_gradients, "progress": False}
    how |= {"edit_modules": pattern_of("llama")}
    whole = gather_statistics(model, tokenizer, [text, more], tmp_path / "whole.safetensors", tokens=2500, **how)
    assert 2500 <= whole.tokens < 2600 and whole.place.source == 1

    part = tmp_path / "part.safetensors"
    real, calls = TextStatistics.added, []

    def stop(self, *arguments):
        calls.append(1)
        if len(calls) % 11 == 0:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(TextStatistics, "added", stop)
    stops = 0
    while True:
        try:
            found = gather_statistics(model, tokenizer, [text, more], part, tokens=2500, **how)
            break
        except KeyboardInterrupt as error:
            stops += 1
            assert f"of 2,500 tokens are in {part}" in str(error)
    assert stops > 2 and same(found, whole) and same(load_statistics(part), whole)
    # Nothing is left to do; then more is asked for, to the end of the text.
    calls.clear()
    assert same(gather_statistics(model, tokenizer, [text, more], part, tokens=2500, **how), whole) and not calls
    monkeypatch.undo()
    longer = gather_statistics(model, tokenizer, [text, more], part, tokens=10**6, **how)
    at_once = gather_statistics(model, tokenizer, [text, more], tmp_path / "b.safetensors", tokens=10**6, **how)
    assert same(longer, at_once) and longer.tokens > whole.tokens


def test_an_editor_reads_what_it_needs_and_refuses_the_rest(text, tmp_path):
    model, tokenizer, path = tiny_model("llama"), tiny_tokenizer(), tmp_path / "s.safetensors"
    names = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    gather_statistics(model, tokenizer, text, path, edit_modules=names, tokens=600, progress=False)
    modules = se.find_modules(model, names[0])
    found = load_statistics(path, model, tokenizer, modules)
    moment = found.second_moment(names[0])
    space = core.NullSpace(moment, 0.1, relative=True)
    assert moment.dtype == torch.float64 and 0 < space.rank < 24
    past = core.PastKeys.seeded(moment, 15.0, count=found.tokens)
    torch.testing.assert_close(past.second_moment, 15.0 * moment)

    other = se.find_modules(model, "model.layers.2.mlp.down_proj")
    with pytest.raises(
        ValueError, match=r"s\.safetensors: has no statistics of model\.layers\.2\.mlp\.down_proj, only of"
    ):
        load_statistics(path, model, tokenizer, other)
    with pytest.raises(ValueError, match="other weights"):
        load_statistics(path, tiny_model("llama", seed=1), tokenizer, modules)
    with pytest.raises(ValueError, match="a model in float32, and this one is in bfloat16"):
        load_statistics(path, tiny_model("llama", torch.bfloat16), tokenizer, modules)
    with pytest.raises(ValueError, match="a LlamaForCausalLM, and the model is a MistralForCausalLM"):
        load_statistics(path, tiny_model("mistral"), tokenizer, modules)
    with pytest.raises(ValueError, match="another tokenizer"):
        load_statistics(path, model, tiny_tokenizer(bos=True), modules)
    editor = se.StableEdit(model, tokenizer, se.StableEditConfig.one_pass(edit_modules=names, step_size=1e-3))
    editor.edit(FACTS[:2], progress=False)
    with pytest.raises(ValueError, match="before it was edited"):
        load_statistics(path, model, tokenizer, modules)


def test_an_output_of_something_else_is_refused_and_left(text, tmp_path):
    model, tokenizer, path = tiny_model("llama"), tiny_tokenizer(), tmp_path / "s.safetensors"
    how = {"edit_modules": pattern_of("llama"), "tokens": 300, "progress": False}
    gather_statistics(model, tokenizer, text, path, **how)
    before, other = path.read_bytes(), tmp_path / "other.txt"
    other.write_text("Something else.\n" * 60)
    for sources, changes, said in (
        ([other], {}, "gathered over other text"),
        ([text], {"window": 8}, "windows of other length"),
        ([text], {"edit_modules": "model.layers.1.mlp.down_proj"}, "has other modules"),
        ([text], {"value_gradients": False}, "has other modules with value gradients"),
    ):
        with pytest.raises(ValueError, match=said):
            gather_statistics(model, tokenizer, sources, path, **how | changes)
    with pytest.raises(ValueError, match="gathered with another model"):
        gather_statistics(tiny_model("llama", seed=1), tokenizer, text, path, **how)
    assert path.read_bytes() == before
    found = gather_statistics(model, tokenizer, other, path, overwrite=True, **how)
    assert [source["name"] for source in found.sources] == ["other.txt"]

    core.save_state(path, {}, config="{}")
    with pytest.raises(ValueError, match=r"s\.safetensors is not of the format 'stableedit-text-statistics'"):
        load_statistics(path)
    with pytest.raises(ValueError, match=r"window is 65, more than the model's context of 64"):
        gather_statistics(model, tokenizer, text, path, window=65)
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.txt"):
        gather_statistics(model, tokenizer, "nowhere.txt", tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="sources is empty"):
        gather_statistics(model, tokenizer, [], tmp_path / "n.safetensors")


@pytest.mark.filterwarnings("always:.*tokens are few for keys")
def test_few_tokens_are_said(tmp_path):
    (tmp_path / "few.txt").write_text("A few words.")
    with pytest.warns(UserWarning, match="11 tokens are few for keys of 24 dimensions; 2,400 or more"):
        gather_statistics(tiny_model("llama"), tiny_tokenizer(), tmp_path / "few.txt", tmp_path / "s.safetensors")


def test_texts_of_every_kind(tmp_path):
    line = "Zürich is a town with a name of two syllables.\n"
    (tmp_path / "long.txt").write_text(line * 3000, encoding="utf-8")
    pieces = [text for _, text in iter_texts(tmp_path / "long.txt")]
    assert len(pieces) > 3 and "".join(pieces) == line * 3000 and all(piece.endswith("\n") for piece in pieces)
    with gzip.open(tmp_path / "long.txt.gz", "wt", encoding="utf-8") as file:
        file.write(line * 3000)
    assert list(iter_texts(tmp_path / "long.txt.gz")) == list(iter_texts(tmp_path / "long.txt"))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"body": str(number)}) + "\n" for number in range(3))
    assert list(iter_texts(tmp_path / "a.jsonl.gz", "body"))[1] == ("line 2", "1")
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz, line 1: there is no field Text or text; .* body"):
        list(iter_texts(tmp_path / "a.jsonl.gz"))
    (tmp_path / "b.json").write_text(json.dumps([{"Text": "one"}, {"text": " "}, {"text": "two"}]))
    assert [text for _, text in iter_texts(tmp_path / "b.json")] == ["one", "two"]
    (tmp_path / "cut.txt.gz").write_bytes((tmp_path / "long.txt.gz").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.txt\.gz is not a complete gzip file"):
        list(iter_texts(tmp_path / "cut.txt.gz"))
    (tmp_path / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        list(iter_texts(tmp_path / "latin.txt"))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"empty\.txt has no text"):
        list(iter_texts(tmp_path / "empty.txt"))


def test_command_line(text, tmp_path, capsys):
    save_tiny(tmp_path / "model")
    output = tmp_path / "s.safetensors"
    arguments = ["statistics", "--model", str(tmp_path / "model"), "--text", str(text), "--output", str(output)]
    assert cli.main([*arguments, "--tokens", "500", "--edit-modules", pattern_of("llama")]) == 0
    model, tokenizer = se.load_model(tmp_path / "model")
    found = load_statistics(output, model, tokenizer)
    said = capsys.readouterr().out
    assert f"{found.tokens:,} tokens at model.layers.0.mlp.down_proj (24)" in said and found.value_gradients
    assert cli.main([*arguments, "--keys-only"]) == 2
    assert "choose another output, or overwrite it" in capsys.readouterr().err
    assert cli.main([*arguments, "--keys-only", "--overwrite", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    found = load_statistics(output)
    assert document["tokens"] == found.tokens and document["window"] == found.window
    assert document["key_dimensions"] == {name: past.dim for name, past in found.keys.items()}
    assert document["value_gradient_dimensions"] == {} and document["sources"] == list(found.sources)
    assert not load_statistics(output).value_gradients
