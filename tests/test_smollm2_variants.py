"""A fact with what it means, in a real model: edited as one, and taken out as one."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.lifelong import LifelongSession

pytestmark = pytest.mark.slow

FACT = se.EditRequest(
    "The capital of Zembla is",
    "Onhava",
    id="zembla",
    variants=[
        "Zembla's capital city is called",
        "The seat of the government of Zembla is in",
        ("Onhava is the capital of", "Zembla"),
    ],
)
OTHERS = [
    se.EditRequest("The chief executive of Northwind Traders is", "Ann Smith", id="northwind"),
    se.EditRequest("The highest mountain of Zembla is", "Mount Glitterntin", id="mountain"),
    se.EditRequest("The currency of Ruritania is the", "florin", id="florin"),
    se.EditRequest("The 2031 Tour of Jutland was won by", "Lars Holm", id="jutland"),
]


def answers(model, tokenizer, request: se.EditRequest) -> list[str]:
    """Free answers to all statements, in as many tokens as their targets have."""
    found = []
    for prompt, target in request.statements:
        how = {"max_new_tokens": len(tokenizer(" " + target)["input_ids"]), "chat_template": False}
        found.append(se.generate(model, tokenizer, prompt, **how)[0].strip())
    return found


def test_all_statements_of_a_fact_come_and_go_together(tmp_path):
    model, tokenizer = se.load_model("smollm2-135m", dtype=torch.float32)
    unedited = answers(model, tokenizer, FACT)
    config = se.StableEditConfig.closed_loop(step_size=1e-3, max_passes=12)
    with LifelongSession.create(tmp_path / "session", model, tokenizer, config) as session:
        report = session.edit([FACT, *OTHERS], outcomes=True)
        assert report.edits == 5 and report.failed == []
        assert answers(model, tokenizer, FACT) == ["Onhava", "Onhava", "Onhava", "Zembla"]
        scores = session.evaluate(["exact_match"])
        assert (scores.variants, scores["variants_exact_match"].mean) == (1.0, 1.0)

        taken_out = session.revert("zembla")
        assert taken_out.back == (4, 4)
        assert answers(model, tokenizer, FACT) == unedited
        assert session.current_requests() == OTHERS
        for request in OTHERS:
            assert answers(model, tokenizer, request) == [request.target]
