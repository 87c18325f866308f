"""Positions that are scored, free answers, locality, and equality with a plain loop over single prompts."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.cli import main
from stableedit_cpp.data import iter_requests, read_requests
from stableedit_cpp.evaluation.free_answers import is_answer, judge
from stableedit_cpp.evaluation.generation import Continuation, generate_continuations
from stableedit_cpp.evaluation.scores import PROBES
from stableedit_cpp.model.tokens import TokenSequence, answer_positions, collate, tokenize
from support.answers import Successor, follower, readable
from support.tiny import ARCHITECTURES, save_tiny, tiny_model, tiny_tokenizer

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")

# --- which positions are scored ---

# prompt 5 6 7, answer 8 9: 7 predicts 8, 8 predicts 9. Prompt 5, answer 6. Prompt 5 6, answer 7 8 9.
SEQUENCES = [TokenSequence((5, 6, 7, 8), (8, 9)), TokenSequence((5,), (6,)), TokenSequence((5, 6, 7, 8), (7, 8, 9))]


@pytest.mark.parametrize(
    ("side", "width", "positions", "ids"),
    [
        ("right", 4, [2, 3, 4, 9, 10, 11], [[5, 6, 7, 8], [5, 0, 0, 0], [5, 6, 7, 8]]),
        ("left", 4, [2, 3, 7, 9, 10, 11], [[5, 6, 7, 8], [0, 0, 0, 5], [5, 6, 7, 8]]),
        ("right", 6, [2, 3, 6, 13, 14, 15], None),
        ("left", 6, [4, 5, 11, 15, 16, 17], None),
    ],
)
def test_positions_by_hand(side, width, positions, ids):
    assert answer_positions(SEQUENCES, width, side) == positions
    if ids is not None:
        batch = collate(SEQUENCES, CPU, side)
        assert batch.input_ids.tolist() == ids
        assert batch.attention_mask.tolist() == [[1 if token else 0 for token in row] for row in ids]
        assert batch.positions.tolist() == positions
        assert batch.labels.tolist() == [8, 9, 6, 7, 8, 9]


@pytest.mark.parametrize("side", ["right", "left"])
def test_positions_predict_the_answer_whatever_the_padding(side, tokenizer):
    """The logits at the positions are those of each sequence alone."""
    model = tiny_model("llama", torch.float64)
    pairs = [("The capital of Peru is", "Lima"), ("2 + 2 =", "4"), ("x", "a long answer")]
    sequences = tokenize(tokenizer, pairs, None, [prompt for prompt, _ in pairs])
    batch = collate(sequences, CPU, side)
    places = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=places).logits
        alone = [model(torch.tensor([s.ids])).logits[0, s.first :] for s in sequences]
    torch.testing.assert_close(logits.flatten(0, 1)[batch.positions], torch.cat(alone))


# --- equality with a loop that takes one prompt at a time and pads nothing ---


def score_alone(model, tokenizer, prompt: str, answer: str) -> float:
    prompt_ids = tokenizer(prompt)["input_ids"]
    answer_ids = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(torch.tensor([prompt_ids + answer_ids])).logits[0]
    chosen = logits[len(prompt_ids) - 1 : -1].argmax(-1).tolist()
    return sum(a == b for a, b in zip(chosen, answer_ids, strict=True)) / len(answer_ids)


def assert_equals_loop(model, tokenizer, requests: list[se.EditRequest], probes: set[str]) -> None:
    scores = se.evaluate(model, tokenizer, requests, metrics=["accuracy"], progress=False)
    assert {name for name, count in scores.counts().items() if count["scored"]} == probes
    for request, record in zip(requests, scores.per_request, strict=True):
        hop = "portability" if request.portability_prompt else "multi_hop"
        names = PROBES | {"portability": (f"{hop}_prompt", f"{hop}_target")}
        for probe, (prompt, answer) in names.items():
            if record.get(probe) is not None:
                expected = score_alone(model, tokenizer, getattr(request, prompt), getattr(request, answer))
                assert record[probe] == pytest.approx(expected, abs=1e-12), (record["id"], probe)


def synthetic(name: str, count: int) -> list[dict[str, object]]:
    """Records of a format whose prompts and answers have many lengths; answers that a random model gives at times."""
    records = []
    for index in range(count):
        prompt, answer = f"{'so ' * (index % 4)}q{index}", "qz!"[: 1 + index % 3]
        probe = {"locality": (f"l{index}" * (1 + index % 2), "la"), "rephrase": f"again {index}"}
        record: dict[str, object]
        loc = {"loc": probe["locality"][0], "loc_ans": probe["locality"][1]}
        match name:
            case "stableedit":
                record = {"prompt": prompt, "target": answer, "rephrase": probe["rephrase"]}
                record |= {"locality_prompt": loc["loc"], "locality_target": loc["loc_ans"]}
            case "zsre":
                record = {"src": prompt, "ans": answer, "alt": "no", "rephrase": probe["rephrase"], **loc}
            case "wikifactdiff":
                record = {"src": prompt, "alt": answer, "old": "no", "rephrase": probe["rephrase"], **loc}
            case "counterfact":
                record = {"prompt": prompt, "target_new": answer, "rephrase_prompt": probe["rephrase"]}
                record |= {"locality_prompt": loc["loc"], "locality_ground_truth": loc["loc_ans"], "case_id": index}
            case "ultraeditbench":
                record = {"prompt": prompt, "ans": answer, "rephrase_prompt": probe["rephrase"], **loc}
            case "wikibigedit":
                record = {"update": prompt, "ans": answer, "rephrase": probe["rephrase"], **loc}
                hop = (f"hop {index}", "h") if index % 3 else (None, None)
                record |= {"personas": f"arr, {index}", "mhop": hop[0], "mhop_ans": hop[1]}
            case "fever":
                record = {"prompt": prompt, "alt": answer, "equiv_prompt": [f"{index} {n}" for n in range(3)]}
                record |= {"unrel_prompt": loc["loc"], "unrel_ans": loc["loc_ans"]}
            case "counterfact-rome":
                rewrite = {"prompt": prompt, "target_new": {"str": answer}, "target_true": {"str": loc["loc_ans"]}}
                record = {"requested_rewrite": rewrite, "paraphrase_prompts": [probe["rephrase"], "other words"]}
                record |= {"neighborhood_prompts": [loc["loc"], "another"]}
            case "mquake":
                rewrite = {"prompt": prompt, "target_new": {"str": answer}, "question": probe["rephrase"]}
                record = {"requested_rewrite": [rewrite], "questions": [f"hop {index}"], "new_answer": "h"}
            case "rippleedits":
                record = {"edit": {"prompt": f"{prompt} is {answer}."}}
                kinds = {"Compositionality_I": (f"hop {index}", "h"), "Relation_Specificity": tuple(loc.values())}
                for kind, (asked, told) in kinds.items():
                    query = {"prompt": asked, "answers": [{"value": told, "aliases": []}]}
                    record[kind] = [{"test_queries": [query]}]
            case "hallueditbench":
                record = {"question": prompt, "object": answer, "paraphrased_question": probe["rephrase"]}
                record |= {"question_2hop": f"hop {index}", "answer_2hop": "h"}
        records.append(record)
    return records


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [format_.name for format_ in se.data.FORMATS])
def test_requests_of_each_format_equal_a_plain_loop(name, count, tmp_path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(synthetic(name, count)))
    requests = list(iter_requests(path))
    assert len(requests) == count
    probes = {"efficacy", "generalization", "specificity"}
    probes |= {"portability", "persona"} if name == "wikibigedit" else set()
    if name in ("mquake", "hallueditbench", "rippleedits"):
        probes = {"efficacy", "portability", "specificity" if name == "rippleedits" else "generalization"}
    assert_equals_loop(tiny_model("llama", torch.float64), tiny_tokenizer(bos=True), requests, probes)


REAL = ["zsre/zsre_edit_5k.json", "counterfact/counterfact_edit_10k.json", "wikifactdiff/wikifactdiff_en_4k.json"]
REAL += ["entityquestions/stream_edit_100k.jsonl.gz"]


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize("name", REAL)
def test_200_real_requests_equal_a_plain_loop(name):
    model, tokenizer = se.load_model("smollm2-135m", dtype=torch.float32)
    requests = list(islice(iter_requests(DATA / name), 200))
    assert_equals_loop(model, tokenizer, requests, {"efficacy", "generalization", "specificity"})


# --- portability, persona, exact match ---


def test_null_multi_hop_questions_are_skipped_and_counted(tmp_path, tokenizer):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(synthetic("wikibigedit", 9)))
    scores = se.evaluate(tiny_model("gpt2"), tokenizer, read_requests(path), progress=False)
    assert scores.counts()["portability"] == {"scored": 6, "skipped": 3}
    assert scores.counts()["persona"] == {"scored": 9, "skipped": 0}
    assert [record["portability"] is None for record in scores.per_request] == [True, False, False] * 3
    assert scores.portability == scores.means()["portability"] is not None
    assert scores.multi_hop == scores["multi_hop"].mean == scores.portability  # its earlier name
    assert scores["multi_hop_contains"] == scores["portability_contains"]
    assert scores.to_dict()["persona"] == scores.persona
    assert "(6 requests, 3 without the prompt)" in str(scores)


def test_scores_without_such_questions_do_not_mention_them(tokenizer):
    requests = [{"prompt": "p", "target": "t"}]
    scores = se.evaluate(tiny_model("gpt2"), tokenizer, requests, metrics=["accuracy"], progress=False)
    assert set(scores.standard_errors) == {"efficacy", "generalization", "specificity"}
    assert (scores.portability, scores.persona) == (None, None)


def test_a_portability_question_comes_before_a_multi_hop_one(tokenizer):
    model = tiny_model("gpt2", torch.float64)
    multi_hop = {"multi_hop_prompt": "far away", "multi_hop_target": "yes"}
    portability = {"portability_prompt": "near by", "portability_target": "no"}
    fields = [multi_hop, portability, multi_hop | portability, multi_hop | {"portability_prompt": "near by"}]
    requests = [{"prompt": "p", "target": "t", **more} for more in fields]
    found = se.evaluate(model, tokenizer, requests, metrics=["accuracy"], progress=False).per_request
    far, near = (score_alone(model, tokenizer, *pair.values()) for pair in (multi_hop, portability))
    assert [record["portability"] for record in found] == [far, near, near, far]


def test_exact_match(tokenizer):
    model = Successor(300)  # "q ab" is all that it knows
    model.head.weight.data.zero_()
    ids = tokenizer("q ab")["input_ids"]
    model.head.weight.data[ids[1:], ids[:-1]] = 1.0
    requests = [
        {"prompt": "q", "target": "ab", "locality_prompt": "q", "locality_target": "a"},
        {"prompt": "q", "target": "ax", "id": "wrong"},
    ]
    scores = se.evaluate(model, tokenizer, requests, metrics=["exact_match"], progress=False)
    none = {"generalization": None, "generalization_exact_match": None}
    assert scores.per_request == [
        {"id": "0", "efficacy": 1.0, "efficacy_exact_match": 1.0, **none}
        | {"specificity": 1.0, "specificity_exact_match": 1.0},
        {"id": "wrong", "efficacy": pytest.approx(2 / 3), "efficacy_exact_match": 0.0, **none}
        | {"specificity": None, "specificity_exact_match": None},
    ]
    assert scores["efficacy_exact_match"].mean == scores.means()["efficacy_exact_match"] == 0.5
    assert scores.standard_errors["efficacy_exact_match"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["exactmatch"], "unknown metric 'exactmatch', did you mean 'exact_match'? known are: accuracy, exact_match"),
        (["bleu"], "unknown metric 'bleu'; known are"),
        ("accuracy", "metrics must be a list of names, not the text 'accuracy'"),
        (["locality"], "locality compares with the unedited model: give reference=editor.unedited"),
    ],
)
def test_bad_metrics(tokenizer, metrics, words):
    with pytest.raises(ValueError) as error:
        se.evaluate(tiny_model("gpt2"), tokenizer, [{"prompt": "p", "target": "t"}], metrics=metrics, progress=False)
    assert words in str(error.value)


# --- free answers ---


@pytest.mark.parametrize(
    ("text", "ended", "contains", "stops"),
    [
        (" New York", True, True, True),
        (" New York", False, True, False),  # cut off, it may go on
        (" New York.", False, True, True),
        (" new  york\n and more", False, True, True),
        (" the city of New York. It", False, True, True),
        (" New York, which", False, True, False),
        (" New York City", True, True, False),
        (" New Yorkers", True, False, False),
        (" NewYork", True, False, False),
        (" Old York", True, False, False),
        (" New York City or New York!", False, True, True),
        (" New York.com", True, True, False),
        ("", True, False, False),
    ],
)
def test_judge(text, ended, contains, stops):
    assert judge(Continuation(text, ended), "New York") == (contains, stops)


def test_judge_takes_the_answer_literally():
    assert judge(Continuation(" 15 (or so).", False), "15 (or so)") == (True, True)
    assert judge(Continuation(" aab.", False), "a+b") == (False, False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_many_prompts_at_a_time_give_what_each_gives_alone(architecture):
    tokenizer = tiny_tokenizer(bos=True)
    model = tiny_model(architecture, torch.float64)
    prompts = ["The capital of Peru is", "a", "2 + 2 =", "x" * 30]
    rooms = [3, 9, 1, 5]
    together = generate_continuations(model, tokenizer, prompts, rooms)
    alone = [generate_continuations(model, tokenizer, [p], [n])[0] for p, n in zip(prompts, rooms, strict=True)]
    assert together == alone
    assert generate_continuations(model, tokenizer, prompts, rooms, max_tokens=1) == alone


@pytest.mark.parametrize(
    ("text", "ended", "exact"),
    [
        (" New York", True, True),
        (" new  york.", True, True),
        ("New York\n\n \n", False, True),  # nothing else, as far as it was let
        (" New York", False, False),  # cut off, it may go on
        (" New York\nQuestion: and", False, False),
        (" New York City", True, False),
        (" New York!", True, False),
        (" the New York", True, False),
        (" NewYork", True, False),
        (" York", True, False),
        ("", True, False),
    ],
)
def test_is_answer(text, ended, exact):
    assert is_answer(Continuation(text, ended), "New York") == exact


def test_is_answer_whatever_the_form_of_its_letters():
    assert is_answer(Continuation(" Zu\u0308rich", True), "Z\u00fcrich")
    assert is_answer(Continuation(" STRASSE", True), "Stra\u00dfe")
    assert is_answer(Continuation(" Washington, D.C.", True), "Washington, D.C.")
    assert not is_answer(Continuation(" Zurich", True), "Z\u00fcrich")


@pytest.mark.parametrize(
    ("chain", "free", "contains", "stops"),
    [
        ("q ab", 1, 1, 1),  # the answer, and the end
        ("q ab.", 1, 1, 1),
        ("q ab,xyzuvwrstklmno", 0, 1, 0),  # runs on: teacher forcing does not see it
        ("q ab\nxyz", 0, 1, 1),
        ("q xab", 0, 0, 0),
    ],
)
def test_a_model_that_runs_on_after_the_answer(tokenizer, chain, free, contains, stops):
    model = follower(tokenizer, chain)
    request = {"prompt": "q", "target": "ab", "rephrase": "xq", "portability_prompt": "yq", "portability_target": "ab"}
    scores = se.evaluate(model, tokenizer, [request], progress=False)
    assert scores.efficacy == (1 if contains else pytest.approx(2 / 3))
    for probe in ("efficacy", "generalization", "portability"):
        found = [scores[f"{probe}_{name}"].mean for name in ("free", "contains", "contains_and_stops")]
        assert found == [free, contains, stops], probe
        assert scores.per_request[0][f"{probe}_text"] == chain[1:12]


def test_an_answer_that_is_known_to_end_is_not_written_again(tokenizer, monkeypatch):
    """What a model says and where it stops is known from its top choices along the answer."""
    model = follower(tokenizer, "q ab")
    known = [{"prompt": "q", "target": "ab", "rephrase": "xq"}, {"prompt": "q", "target": "abc"}]
    how = {"metrics": ["generation"], "progress": False}
    generate, asked = model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **inputs: asked.append(len(inputs["input_ids"])) or generate(**inputs)
    )
    other = {"prompt": "q", "target": "a"}  # it goes on after that, nobody has looked where to
    records = se.evaluate(model, tokenizer, [*known, other], **how).per_request
    assert asked == [1]
    assert [record["efficacy_text"] for record in records] == [" ab"] * 3
    assert [record["efficacy_free"] for record in records] == [1, 0, 0]
    assert [text for text, *_ in generate_continuations(model, tokenizer, ["q"], [9])] == [" ab"]
    asked.clear()
    with_end = se.evaluate(model, tokenizer, [*known, other], end_of_answer=True, **how).per_request
    assert asked == [1]
    assert [record["efficacy_free"] for record in with_end] == [1, 0, 0]
    assert [record["efficacy_text"] for record in with_end] == [" ab"] * 3


def test_free_answers_are_those_of_transformers(tokenizer):
    """Whatever is asked together, as transformers' own generation gives them one prompt at a time."""
    model = readable(tiny_model("qwen2", torch.float64), tokenizer)
    requests = [
        {"prompt": "so " * (n % 4) + f"{n}", "target": "ab"[: 1 + n % 2], "rephrase": f"r{n}"} for n in range(9)
    ]
    letter = se.generate(model, tokenizer, "0", max_new_tokens=4)[0][-1]
    model.generation_config.eos_token_id = [2, tokenizer.get_vocab()[letter]]
    for request in requests[:4]:  # some that it knows, and some of these end
        request["target"] = se.generate(model, tokenizer, request["prompt"], max_new_tokens=4)[0]
    scores = se.evaluate(model, tokenizer, requests, progress=False)
    for request, record in zip(requests, scores.per_request, strict=True):
        room = len(" " + request["target"]) + 8  # a token a letter
        for probe, prompt in (("efficacy", request["prompt"]), ("generalization", request["rephrase"])):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            (row,) = model.generate(ids, max_new_tokens=room, do_sample=False, pad_token_id=0)[
                :, ids.shape[1] :
            ].tolist()
            text = tokenizer.decode(row)
            assert record[f"{probe}_text"] == text
            assert record[f"{probe}_free"] == (text.lower() == request["target"].lower() and len(row) < room)
    assert 0 < scores["efficacy_free"].mean < 1


def test_generation_scores(tokenizer):
    """A model that is asked for what it says of its own accord, and for something else."""
    model = readable(tiny_model("llama", torch.float64), tokenizer)
    said = se.generate(model, tokenizer, ["abc"], max_new_tokens=5)[0]
    model.generation_config.eos_token_id = tokenizer.get_vocab()[said[-1]]
    said = said[: said.index(said[-1]) + 1]
    requests = [
        {"prompt": "abc", "target": said, "rephrase": "abc"},
        {"prompt": "abc", "target": "zz", "locality_prompt": "l", "locality_target": "x"},
    ]
    scores = se.evaluate(model, tokenizer, requests, metrics=["generation"], progress=False)
    right, wrong = scores.per_request
    for probe in ("efficacy", "generalization"):
        assert (right[f"{probe}_free"], wrong[f"{probe}_free"]) == (1, 0 if probe == "efficacy" else None)
        assert (right[f"{probe}_contains"], right[f"{probe}_contains_and_stops"], right[f"{probe}_text"]) == (
            1,
            1,
            said,
        )
    assert (wrong["efficacy_contains"], wrong["efficacy_contains_and_stops"], wrong["efficacy_text"]) == (0, 0, said)
    assert wrong["generalization_contains"] is None
    assert not any(name.startswith("specificity_") for name in wrong)
    assert scores["efficacy_contains"].mean == 0.5
    assert scores.counts()["generalization_contains"] == {"scored": 1, "skipped": 1}


# --- on the command line ---


@pytest.fixture
def saved(tmp_path, monkeypatch, capsys) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("edited", 0), ("original", 1)):
        save_tiny(name, seed=seed, bos=True)
    unrelated = [{"locality_prompt": f"unrelated {n}", "locality_target": "xyz"} for n in range(6)] + [{}]
    records = [{"q": "p", "a": "t", "prompt": "p", "target": "t", **more} for more in unrelated]
    Path("facts.json").write_text(json.dumps(records))
    capsys.readouterr()
    return tmp_path


def test_evaluate_with_all_metrics(saved, capsys):
    options = ["--model", "edited", "--requests", "facts.json", "--device", "cpu", "--fields", "prompt=q,target=a"]
    assert main(["evaluate", *options]) == 0
    missing = r"^specificity +not scored"  # --fields says nothing of unrelated prompts
    assert re.search(missing, capsys.readouterr().out, re.MULTILINE)
    options = [*options[:-2], "--metrics", "exact-match", "generation", "--reference", "original", "--output", "s.json"]
    assert main(["evaluate", *options]) == 0
    out = capsys.readouterr().out
    scores = json.loads(Path("s.json").read_text())
    for name in (
        "efficacy",
        "efficacy_exact_match",
        "efficacy_contains_and_stops",
        "locality_agreement",
        "locality_kl",
    ):
        assert f"{name} " in out
        assert scores[name] is not None
        assert scores["standard_errors"][name] is not None
    assert scores["counts"]["locality_kl"] == {"scored": 6, "skipped": 1}
    assert scores["reference"] == "original"
    assert "efficacy_text" in scores["per_request"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "locality"], "--metrics locality compares with the unedited model; say with --reference"),
        (["--reference", "/no/such/model"], "cannot load the model '/no/such/model'"),
        (["--format", "zrse"], "unknown data set format 'zrse', did you mean 'zsre'?"),
        (["--format", "zsre"], "facts.json, record 0: the record lacks the field 'src' (prompt) and 'ans' (target) of"),
    ],
)
def test_bad_options_of_evaluate(saved, capsys, options, words):
    assert main(["evaluate", "--model", "edited", "--requests", "facts.json", "--device", "cpu", *options]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
