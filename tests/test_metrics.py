"""Positions that are scored, free answers, locality, and equality with a plain loop over single prompts."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.data import iter_requests, read_requests
from stableedit_cpp.evaluation.scores import PROBES
from stableedit_cpp.model.tokens import TokenSequence, answer_positions, collate, tokenize
from support.answers import Successor
from support.tiny import tiny_model, tiny_tokenizer

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
    # Plain text, as the loop does: SmolLM2 would be asked in chats.
    scores = se.evaluate(model, tokenizer, requests, metrics=["accuracy"], chat_template=False, progress=False)
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
