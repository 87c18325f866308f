"""A model whose logits are NaN is said to be broken wherever it is scored, never scored 0 in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.evaluation.answers import answer_scores, greedy_answers, read_answers
from stableedit_cpp.experiments import run_matrix
from stableedit_cpp.lifelong.audit import audit
from stableedit_cpp.model.tokens import TokenSequence
from support.editors import make
from support.streams import lines, matrix, write_data
from support.tiny import FACTS, tiny_model

REQUESTS = [
    {"prompt": "The sky", "target": "is", "locality_prompt": "unrelated", "locality_target": "ab"},
    {"prompt": "A zebra", "target": "runs", "rephrase": "The zebra", "id": "zebra"},
    {"prompt": "Water", "target": "wet"},
]
WEIGHT = "model.layers.1.mlp.down_proj.weight"


def broken_model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    model = tiny_model("llama", dtype)
    model.get_parameter(WEIGHT).data[0, 0] = float("nan")
    return model


def without_z(tokenizer) -> torch.nn.Module:
    """Broken for prompts with the letter z alone."""
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[tokenizer.get_vocab()["z"]] = float("nan")
    return model


EVERYTHING = {"metrics": ["accuracy", "exact_match", "generation", "locality"], "progress": False}


class TestSaid:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_by_evaluate(self, tokenizer, dtype):
        with pytest.raises(se.ModelBroken) as error:
            se.evaluate(broken_model(dtype), tokenizer, REQUESTS, progress=False)
        assert str(error.value) == (
            "the model is broken: its logits are NaN or infinite for 5 of 5 prompts, first for request 0, efficacy; "
            f"NaN or infinity is in {WEIGHT}; load the model anew"
        )

    def test_of_single_requests(self, tokenizer):
        with pytest.raises(se.ModelBroken) as error:
            se.evaluate(without_z(tokenizer), tokenizer, REQUESTS, progress=False)
        assert "for 2 of 5 prompts, first for request 1 (zebra), efficacy; NaN or infinity" in str(error.value)
        rest = [REQUESTS[0], REQUESTS[2]]
        expected = se.evaluate(tiny_model("llama"), tokenizer, rest, progress=False)
        assert se.evaluate(without_z(tokenizer), tokenizer, rest, progress=False) == expected

    def test_of_activations_that_overflow(self, tokenizer):
        model = tiny_model("llama", torch.float16)
        model.lm_head.weight.data.fill_(6e4)
        with pytest.raises(se.ModelBroken, match="its weights are finite, so its activations overflow"):
            se.evaluate(model, tokenizer, REQUESTS, progress=False)

    def test_of_the_reference(self, tokenizer):
        with pytest.raises(se.ModelBroken, match=r"the unedited model is broken: .* for 1 of 1 prompts"):
            se.evaluate(tiny_model("llama"), tokenizer, REQUESTS, reference=broken_model(), progress=False)

    def test_by_generate(self, tokenizer):
        with pytest.raises(se.ModelBroken, match="for 2 of 2 prompts, first for 'Water'"):
            se.generate(broken_model(), tokenizer, ["Water", "Gold"])
        with pytest.raises(se.ModelBroken, match="for 1 of 3 prompts, first for 'A zebra'"):
            se.generate(without_z(tokenizer), tokenizer, ["Water", "A zebra", "Gold"])

    def test_by_audit_and_greedy_answers(self, tokenizer):
        editor = make(tokenizer)
        editor.edit(FACTS)
        assert audit(editor, FACTS).entries
        editor.model.get_parameter(WEIGHT).data[0, 0] = float("nan")
        with pytest.raises(se.ModelBroken, match="for 13 of 13 prompts, first for request 0"):
            audit(editor, FACTS)
        with pytest.raises(se.ModelBroken, match="for 2 of 2 prompts, first for prompt 0"):
            greedy_answers(editor.model, [TokenSequence((5, 6), (7,)), TokenSequence((5,), (7,))], max_tokens=9)

    @pytest.mark.parametrize("command", ["evaluate", "demo", "side-effects"])
    def test_on_the_command_line(self, tokenizer, tmp_path, monkeypatch, capsys, command):
        monkeypatch.chdir(tmp_path)
        model = broken_model()
        model.config.max_position_embeddings = 512
        model.save_pretrained("broken")
        tokenizer.save_pretrained("broken")
        Path("requests.json").write_text(json.dumps(REQUESTS))
        Path("text.txt").write_text("some text " * 20)
        more = {"evaluate": ["--requests", "requests.json"], "side-effects": ["--perplexity", "text=text.txt"]}
        capsys.readouterr()
        assert main([command, "--model", "broken", "--device", "cpu", *more.get(command, [])]) == 2
        error = capsys.readouterr().err
        line = error.splitlines()[-1]
        assert line.startswith("stableedit: error: the model is broken: its logits are NaN or infinite for ")
        assert line.endswith(f"NaN or infinity is in {WEIGHT}; load the model anew")
        assert "Traceback" not in error

    def test_nan_stays_nan_below(self):
        sequences = [TokenSequence((5, 6), (6, 7)), TokenSequence((5,), (7,))]
        scores = answer_scores(broken_model(), sequences, max_tokens=99)
        assert scores.accuracy.isnan().all() and scores.probability.isnan().all()
        assert all(answer.broken for answer in read_answers(broken_model(), sequences, max_tokens=99))

    def test_an_answer_that_is_ruled_out_is_not_broken(self):
        class Never(torch.nn.Module):
            """Rules token 7 out, as a model with a masked vocabulary does."""

            def forward(self, logits):
                return logits.index_fill(-1, torch.tensor([7]), -torch.inf)

        model = tiny_model("llama")
        model.lm_head = torch.nn.Sequential(model.lm_head, Never())
        (answer,) = read_answers(model, [TokenSequence((5,), (7,))], max_tokens=9)
        assert answer.log_probability.tolist() == [-torch.inf]
        assert not answer.broken


class TestAllowed:
    """What the benchmark asks for, which records a model that has collapsed and goes on."""

    def test_answers_that_are_not_there_are_wrong(self, tokenizer):
        reference = tiny_model("llama")
        options = {**EVERYTHING, "reference": reference, "allow_broken": True}
        scores = se.evaluate(broken_model(), tokenizer, REQUESTS, **options)
        assert scores.broken == 3
        assert (scores.efficacy, scores["efficacy_exact_match"].mean, scores["efficacy_contains"].mean) == (0, 0, 0)
        assert (scores["locality_agreement"].mean, scores["locality_kl"].mean) == (0, None)
        assert str(scores).endswith("the model is broken: it answers NaN to 3 of 3 requests")
        json.dumps(scores.to_dict(), allow_nan=False)

    def test_the_others_are_scored_as_ever(self, tokenizer):
        options = {**EVERYTHING, "reference": tiny_model("llama"), "allow_broken": True}
        expected = se.evaluate(tiny_model("llama"), tokenizer, REQUESTS, **options)
        scores = se.evaluate(without_z(tokenizer), tokenizer, REQUESTS, **options)
        assert (expected.broken, scores.broken) == (0, 1)
        assert [scores.per_request[0], scores.per_request[2]] == [expected.per_request[0], expected.per_request[2]]
        zebra = scores.per_request[1]
        assert (zebra["broken"], zebra["generalization"], zebra["efficacy_text"]) == (True, 0.0, "")

    def test_a_stream_whose_model_breaks_is_recorded(self, tokenizer, tmp_path):
        """The first answer that is missing is that to a rephrased prompt, which an edit does not look at."""
        data = write_data(tmp_path / "data")
        records = json.loads((data / "zsre" / "zsre_edit.json").read_text())
        records[12]["rephrase"] += " z"
        records[25]["src"] += " z"
        (data / "zsre" / "zsre_edit.json").write_text(json.dumps(records))
        runs = matrix(data, warm_up_size=0).runs()
        (document,) = run_matrix(runs, tmp_path / "out", lambda _: (without_z(tokenizer), tokenizer), progress=False)
        assert (document["status"], document["collapsed"]["edits"]) == ("done", 20)
        assert "NaN or infinite" in document["collapsed"]["reason"]
        assert [(entry["edits"], entry["broken"]) for entry in document["checkpoints"]] == [(0, 2), (20, 1)]
        run = tmp_path / "out" / document["name"]
        records = lines(run / "requests" / "00000020.jsonl")
        assert [record["index"] for record in records if "broken" in record] == [12]
        assert records[12]["generalization"] == 0.0
        assert document["checkpoints"][-1]["scores"]["generalization"]["count"] == 20
        assert "broken" not in document["checkpoints"][-1]["scores"]
        json.dumps([document, records], allow_nan=False)
