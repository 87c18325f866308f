"""Side effects: perplexity and tasks against plain loops, and all of it together."""

from __future__ import annotations

import importlib.util
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaModel

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.evaluation.answers import read_answers
from stableedit_cpp.model.tokens import TokenSequence
from stableedit_cpp.sideeffects import SideEffectOptions, check, measure, measurement
from stableedit_cpp.sideeffects.downstream import RESERVED, TASKS, choose, downstream_scores, read_task
from stableedit_cpp.sideeffects.perplexity import perplexity, read_texts
from stableedit_cpp.sideeffects.similarity import mmd
from support.ranks import together
from support.tiny import tiny_model, tiny_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = ["The quick brown fox jumps over the lazy dog.", "x", "Pack my box", "ab " * 60]

pytest.importorskip("sklearn", reason="side effects need the extra 'sideeffects'")


# --- perplexity ---


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_equals_a_plain_loop(bos):
    model, tokenizer = tiny_model("llama", torch.float64), tiny_tokenizer(bos=bos)
    window, means, losses = 40, [], []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        for begin in range(0, len(ids), window):
            piece = torch.tensor(ids[begin : begin + window])
            if len(piece) > 1:
                with torch.no_grad():
                    loss = torch.nn.functional.cross_entropy(model(piece[None]).logits[0, :-1], piece[1:])
                means.append(math.exp(loss))
                losses += [float(loss)] * (len(piece) - 1)
    found = perplexity(model, tokenizer, TEXTS, window=window, max_tokens=100)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-9)
    assert found["mean_perplexity"] == pytest.approx(np.mean(means), rel=1e-9)
    assert (found["tokens"], found["windows"]) == (len(losses), len(means))


def test_standard_error_of_perplexity_is_that_of_the_jackknife(tokenizer):
    model = tiny_model("gpt2")
    texts = [f"{word} and {word[::-1]} {index}" for index, word in enumerate(["one", "seven", "twelve", "six"] * 20)]
    found = perplexity(model, tokenizer, texts, window=64, max_tokens=500)
    sequences = [TokenSequence(tuple(ids[:-1]), tuple(ids[1:])) for ids in tokenizer(texts)["input_ids"]]
    values = [-answer.log_probability.numpy() for answer in read_answers(model, sequences, max_tokens=500)]
    total, count = sum(v.sum() for v in values), sum(map(len, values))
    left_out = np.array([math.exp((total - v.sum()) / (count - len(v))) for v in values])
    jackknife = math.sqrt((len(values) - 1) * np.mean((left_out - left_out.mean()) ** 2))
    assert found["standard_error"] == pytest.approx(jackknife, rel=0.05)


def test_perplexity_of_a_model_that_knows_nothing_is_its_vocabulary(tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    found = perplexity(model, tokenizer, TEXTS, window=64, tokens=30, max_tokens=100)
    assert found["perplexity"] == pytest.approx(model.config.vocab_size, rel=1e-5)
    assert found["tokens"] == 30


def test_texts_of_files(tmp_path):
    (tmp_path / "a.txt").write_text("one running\ntext")
    (tmp_path / "b.json").write_text('[{"Text": "one"}, {"text": "two"}]')
    assert read_texts(tmp_path / "a.txt") == ["one running\ntext"]
    assert read_texts(tmp_path / "b.json") == ["one", "two"]
    (tmp_path / "c.json").write_text('[{"Text": "one"}, {"body": "two"}]')
    with pytest.raises(ValueError, match=r"c\.json, record 1: there is no field Text or text; its fields are body"):
        read_texts(tmp_path / "c.json")
    (tmp_path / "d.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"d\.txt has no text"):
        read_texts(tmp_path / "d.txt")


# --- downstream tasks ---


def test_shared_forward_passes_give_what_single_ones_give():
    model, tokenizer = tiny_model("mistral", torch.float64), tiny_tokenizer()
    prompts, choices = ["a long question:", "q:", "a long question:"], ["No", "Yes", "Y"]
    best = []
    for prompt in prompts:
        means = []
        for choice in choices:
            ids, answer = tokenizer(prompt)["input_ids"], tokenizer(" " + choice)["input_ids"]
            with torch.no_grad():
                table = model(torch.tensor([ids + answer])).logits[0].log_softmax(-1)
            means.append(np.mean([float(table[len(ids) - 1 + i, token]) for i, token in enumerate(answer)]))
        best.append(int(np.argmax(means)))
    assert choose(model, tokenizer, prompts, choices, max_tokens=64) == best


def test_choices_of_one_token_share_the_forward_pass(tokenizer):
    model, runs = tiny_model("llama"), []
    model.register_forward_pre_hook(lambda *_, **__: runs.append(1))
    ids = tuple(tokenizer("question")["input_ids"])
    sequences = [TokenSequence(ids, (token,)) for token in range(5, 9)]
    found = read_answers(model, sequences, max_tokens=64)
    assert len(runs) == 1
    assert len({float(answer.log_probability) for answer in found}) == 4


def test_a_long_question_loses_its_beginning(tokenizer):
    model = tiny_model("llama")
    tail = "z" * 60 + ":"
    assert choose(model, tokenizer, ["begin " * 50 + tail], ["A", "B"], max_tokens=64) == choose(
        model, tokenizer, ["other " * 40 + tail], ["A", "B"], max_tokens=64
    )


def record_of(name: str, answer: int, text: str) -> dict[str, object]:
    task = TASKS[name]
    fields = {"sentence": text, "sentence1": text, "sentence2": text, "question": text, "choices": list("wxyz")}
    return fields | {task.label: task.labels[answer]}


def write_tasks(directory: Path, count: int = 6) -> Path:
    directory.mkdir()
    for name, task in TASKS.items():
        records = [record_of(name, index % len(task.choices), f"t{index}") for index in range(RESERVED + count)]
        (directory / f"{name}.json").write_text(json.dumps(records))
    return directory


def test_few_shots_come_from_reserved_records(tmp_path):
    examples, questions, answers = read_task(write_tasks(tmp_path / "d"), "rte", few_shots=2, limit=3)
    assert examples == "t0\nquestion: t0 True or False?\nanswer: True\nt1\nquestion: t1 True or False?\nanswer: False\n"
    assert questions[0] == "t10\nquestion: t10 True or False?\nanswer:"
    assert (len(questions), answers) == (3, [0, 1, 0])


def test_rte_is_labelled_as_in_glue():
    """Label 0 is entailment; the published evaluation has it the other way round."""
    assert TASKS["rte"].choices[TASKS["rte"].answer({"label": 0})] == "True"
    assert TASKS["nli"].choices[TASKS["nli"].answer({"label": "not_entailment"})] == "False"


def test_downstream_scores_by_hand():
    found = downstream_scores([0, 0, 1, 1], [0, 1, 1, 1])
    assert found["accuracy"] == 0.75
    assert found["standard_error"] == pytest.approx(0.25)
    assert found["f1"] == pytest.approx(0.25 * 2 / 3 + 0.75 * 0.8)
    assert found["mcc"] == pytest.approx(2 / math.sqrt(12))
    assert found["majority"] == 0.75


def test_bad_tasks_are_named(tmp_path):
    directory = write_tasks(tmp_path / "d")
    (directory / "cola.json").write_text('[{"sentence": "x", "label": 7}]')
    with pytest.raises(ValueError, match=r"cola\.json, record 0: label is 7; expected 0, 1"):
        read_task(directory, "cola", 0, None)
    (directory / "cola.json").write_text('[{"text": "x", "label": 0}]')
    with pytest.raises(ValueError, match=r"cola\.json, record 0: its fields are text, label; expected those of cola"):
        read_task(directory, "cola", 0, None)
    (directory / "cola.json").unlink()
    with pytest.raises(ValueError, match=r"has no cola\.json"):
        read_task(directory, "cola", 0, None)


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
def test_the_published_subsets_are_read_whole():
    sizes = {name: len(read_task(DATA / "downstream", name, 0, None)[1]) for name in TASKS}
    assert sizes == {"sst2": 846, "mrpc": 248, "cola": 634, "rte": 252, "nli": 2479, "mmlu": 1506}


# --- lm-eval ---


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (extra 'harness')")
def test_the_harness_scores_a_task_over_local_json_as_we_do(tmp_path, tokenizer):
    records = [record_of("sst2", index % 2, f"review {index}") for index in range(RESERVED + 12)]
    local = tmp_path / "local"
    local.mkdir()
    (local / "sst2.json").write_text(json.dumps(records))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "scored.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[RESERVED:]))
    for name, choices in (("sst2", "negative, positive"), ("rte", "positive, negative")):
        (tasks / f"{name}.yaml").write_text(
            f"task: own_{name}\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
            f"dataset_kwargs: {{data_files: {tasks / 'scored.jsonl'}}}\n"
            'doc_to_text: "Review : {{sentence}}\\nSentiment :"\ndoc_to_target: label\n'
            f"doc_to_choice: [{choices}]\nmetric_list: [{{metric: acc}}]\n"
        )
    model = tiny_model("llama").train()
    model.model.layers[1].eval()  # a layer that its owner has frozen
    flags = [module.training for module in model.modules()]
    # Answers of one length, so that our mean and the harness's sum over tokens choose alike.
    common = {"tasks": ["sst2"], "limit": 12}
    ours = measure(model, tokenizer, {"downstream": str(local), **common})["downstream"]["sst2"]
    own = {"harness_tasks": {"sst2": "own_sst2"}, "harness_path": str(tasks)}
    theirs = measure(model, tokenizer, {"downstream": "lm-eval", **common, **own})["downstream"]["sst2"]
    assert theirs["records"] == ours["records"] == 12
    assert theirs["accuracy"] == ours["accuracy"]
    assert theirs["standard_error"] == pytest.approx(ours["standard_error"])
    assert [module.training for module in model.modules()] == flags
    both = {"downstream": "lm-eval", "tasks": ["sst2", "rte"], "limit": 12, "harness_path": str(tasks)}
    both["harness_tasks"] = {"sst2": "own_sst2", "rte": "own_rte"}
    (tmp_path / "meet").mkdir()
    one = measure(model, tokenizer, both)["downstream"]
    assert one["sst2"] == theirs and one["rte"]["accuracy"] == pytest.approx(1 - theirs["accuracy"])
    for found in together(2, lambda _: measure(model, tokenizer, both, distributed="auto"), tmp_path / "meet"):
        assert found["downstream"] == one
    with pytest.raises(ValueError, match="lm-eval cannot run no_such_task"):
        measure(model, tokenizer, {"downstream": "lm-eval", **common, **own, "harness_tasks": {"sst2": "no_such_task"}})
    assert [module.training for module in model.modules()] == flags
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(se.ModelBroken, match=r"the model is broken: .* for 12 of 12 prompts, first for one of sst2"):
        measure(model, tokenizer, {"downstream": "lm-eval", **common, **own})


# --- all of it ---


@pytest.fixture
def options(tmp_path) -> dict[str, object]:
    (tmp_path / "wiki.txt").write_text("Some text that a model may read. " * 20)
    (tmp_path / "prompts.txt").write_text("".join(f"prompt number {index}\n" for index in range(20)))
    return {
        "perplexity": {"wiki": str(tmp_path / "wiki.txt")},
        "downstream": str(write_tasks(tmp_path / "tasks")),
        "prompts": str(tmp_path / "prompts.txt"),
        "maps": ["pca"],
        "permutations": 50,
    }


def test_measure_before_and_after(tmp_path, options, tokenizer):
    check(options)
    model = tiny_model("llama")
    before = measure(model, tokenizer, options, directory=tmp_path, edits=0)
    assert before["hidden_states"] == {"prompts": 20, "layers": {}}
    same = measure(model, tokenizer, options, directory=tmp_path, edits=1)
    layer = same["hidden_states"]["layers"]["3"]
    assert (layer["relative_shift"], layer["p_value"], layer["p_value_paired"]) == (0, 1, 1)
    assert layer["cka"] == pytest.approx(1)
    assert layer["maps"]["pca"]["before"] == layer["maps"]["pca"]["after"]
    assert (same["perplexity"], same["downstream"]) == (before["perplexity"], before["downstream"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    changed = measure(model, tokenizer, options, directory=tmp_path, edits=2)
    assert changed["hidden_states"]["layers"]["3"]["cka"] < 0.95
    assert changed["hidden_states"]["layers"]["3"]["p_value_paired"] < 0.05
    assert changed["perplexity"] != before["perplexity"]
    assert set(changed["downstream"]) == set(TASKS)
    json.dumps(changed, allow_nan=False)


def test_two_processes_measure_what_one_does(tmp_path, options, tokenizer):
    """Each a share of it: forward passes, tests by permutation and maps."""
    options |= {"layers": [1, -1], "limit": 6, "max_tokens_per_forward": 200}
    edited = tiny_model("llama")
    edited.model.layers[1].mlp.down_proj.weight.data.mul_(3)

    def both(directory: Path, **how: object) -> list[dict[str, object]]:
        how |= {"directory": directory}
        found = [
            measure(model, tokenizer, options, edits=edits, **how)
            for edits, model in ((0, tiny_model("llama")), (1, edited))
        ]
        return [{name: value for name, value in one.items() if name != "seconds"} for one in found]

    def work(rank: int) -> tuple[list, dict[str, int]]:
        done = Counter()
        forward = LlamaModel.forward
        LlamaModel.forward = lambda *args, **how: done.update(["passes"]) or forward(*args, **how)
        measurement.mmd = lambda *args, **how: done.update(["tests"]) or mmd(*args, **how)
        return both(tmp_path / "several", distributed="auto"), done

    (tmp_path / "meet").mkdir()
    one = both(tmp_path / "one")
    assert one[1]["hidden_states"]["layers"].keys() == {"1", "3"}
    results = together(2, work, tmp_path / "meet")
    assert [found for found, _ in results] == [one, one]
    assert [done["tests"] for _, done in results] == [2, 2]
    first, second = (done["passes"] for _, done in results)
    assert 0.5 < first / second < 2


def test_processes_with_other_options_are_told(tmp_path, options, tokenizer):
    def work(rank: int) -> None:
        measure(tiny_model("llama"), tokenizer, options | {"seed": rank}, directory=tmp_path, distributed="auto")

    (tmp_path / "meet").mkdir()
    for error in together(2, work, tmp_path / "meet"):
        assert isinstance(error, se.RanksDiffer)
        assert "the options of side effects of process 1 differ from those of process 0; give all of them" in str(error)


def test_a_model_that_has_collapsed_is_measured(tmp_path, options, tokenizer):
    model = tiny_model("llama")
    measure(model, tokenizer, options, directory=tmp_path, edits=0)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    found = measure(model, tokenizer, options, directory=tmp_path, edits=1, allow_broken=True)
    json.dumps(found, allow_nan=False)
    wiki = found["perplexity"]["wiki"]
    assert wiki["perplexity"] is None and wiki["broken"] == wiki["windows"]
    for task in found["downstream"].values():
        assert (task["accuracy"], task["broken"]) == (0.0, task["records"])
    assert found["hidden_states"]["layers"]["3"]["cka"] is None
    assert found["hidden_states"]["broken"] == 20
    for part in ("perplexity", "downstream", "prompts"):
        only = {part: options[part], "maps": []}
        with pytest.raises(se.ModelBroken, match=r"the model is broken: .*layers\.0\.mlp\.down_proj\.weight"):
            measure(model, tokenizer, only, directory=tmp_path, edits=1)
    with pytest.raises(se.ModelBroken, match="for 20 of 20 prompts"):  # nothing can be compared with it
        measure(model, tokenizer, {"prompts": options["prompts"]}, directory=tmp_path, allow_broken=True)


def test_states_to_compare_with_have_to_be_there_and_the_same(tmp_path, options, tokenizer):
    model = tiny_model("llama")
    options = {"prompts": options["prompts"], "maps": []}
    with pytest.raises(ValueError, match="give their directory"):
        measure(model, tokenizer, options, edits=5)
    with pytest.raises(ValueError, match=r"hidden-00000000\.npz; measure the unedited model first"):
        measure(model, tokenizer, options, directory=tmp_path, edits=5)
    measure(model, tokenizer, options, directory=tmp_path)
    with pytest.raises(ValueError, match="of other prompts or layers"):
        measure(model, tokenizer, {**options, "layers": [1]}, directory=tmp_path, edits=5)
    path = tmp_path / "hidden-00000000.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read"):
        measure(model, tokenizer, options, directory=tmp_path, edits=5)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"perplexty": {}}, "the options has 'perplexty', did you mean 'perplexity'"),
        ({"perplexity": ["x.txt"]}, "perplexity must map names to texts"),
        ({"downstream": "d", "tasks": ["sst"]}, "tasks has 'sst', did you mean 'sst2'"),
        ({"downstream": "d", "tasks": "sst2"}, "tasks must be a list"),
        ({"prompts": "p", "permutations": 0}, "permutations must be a whole number, at least 1, not 0"),
        ({"prompts": "p", "layers": ["last"]}, "layers must be whole numbers"),
        ({"prompts": "p", "at": "start"}, "at has 'start'"),
        ({"downstream": "d", "few_shots": 11}, "a task keeps 10 records for examples"),
        ({}, "nothing to measure"),
    ],
)
def test_bad_options_get_a_sentence(bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        SideEffectOptions.from_dict(bad)


def test_missing_packages_are_named(monkeypatch, options):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("umap", "lm_eval") else find(name))
    check(options)
    with pytest.raises(ValueError, match=r"hidden states need umap: pip install 'stableedit-cpp\[sideeffects\]'"):
        check({**options, "maps": ["umap"]})
    with pytest.raises(ValueError, match=r"lm-eval needs lm_eval: pip install 'stableedit-cpp\[harness\]'"):
        check({"downstream": "lm-eval"})


def test_command(tmp_path, options, tokenizer, capsys):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "before")
    tokenizer.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3)
    model.save_pretrained(tmp_path / "after")
    tokenizer.save_pretrained(tmp_path / "after")
    (tmp_path / "options.json").write_text(json.dumps(options))
    arguments = ["side-effects", "--model", str(tmp_path / "after"), "--options", str(tmp_path / "options.json")]
    arguments += ["--tasks", "cola", "mmlu", "--limit", "4"]
    assert main(arguments) == 2
    assert "say with --reference which that is" in capsys.readouterr().err
    output = tmp_path / "out.json"
    assert main([*arguments, "--reference", str(tmp_path / "before"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    document = json.loads(output.read_text())
    assert set(document["after"]["downstream"]) == {"cola", "mmlu"}
    assert document["after"]["perplexity"] != document["before"]["perplexity"]
    assert f"{document['after']['perplexity']['wiki']['perplexity']:.4g}" in printed
    assert main([*arguments, "--perplexity", "wiki"]) == 2
    assert "--perplexity wiki: expected NAME=FILE" in capsys.readouterr().err
