"""Several processes edit one model together: to the bits of one process, or not at all."""

from __future__ import annotations

import dataclasses
import os
import signal
from datetime import timedelta
from functools import cache

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.model import running
from stableedit_cpp.model.exchange import all_gather
from stableedit_cpp.model.ranks import deal, ranks
from support.ranks import together
from support.tiny import FACTS, roomy_model, tiny_tokenizer

REQUESTS = [
    fact | {"rephrase": f"Say: {fact['prompt']}", "locality_prompt": "One, two,", "locality_target": "three"}
    for fact in FACTS[:6]
]
MODULES = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.2.self_attn.o_proj"]
CONFIGS = {
    "default": se.StableEditConfig(turn_size=4, edit_modules=MODULES, max_passes=2),
    "past keys": se.StableEditConfig(
        turn_size=4, edit_modules=MODULES, max_passes=2, past_key_weight=1.0, statistics="per_module"
    ),
    "ultraedit": se.UltraEditConfig(turn_size=4, edit_modules=MODULES, step_size=1e-2),
}
EDITORS = {"ultraedit": se.UltraEdit}


def editor_of(name: str, **how) -> se.Editor:
    return EDITORS.get(name, se.StableEdit)(roomy_model("llama"), tiny_tokenizer(), CONFIGS[name], **how)


def edited(name: str, **how) -> dict[str, object]:
    """Everything that edits and evaluations come to, but how long they took."""
    editor = editor_of(name, **how)
    editor.warm_up(REQUESTS[:4], progress=False)
    report = editor.edit(REQUESTS, outcomes=True, progress=False)
    scores = se.evaluate(editor.model, editor.tokenizer, REQUESTS, reference=editor.unedited, progress=False, **how)
    turns = [{key: value for key, value in turn.items() if "seconds" not in key} for turn in report.to_dict()["turns"]]
    state = {f"{part}/{key}": t for part, fields in editor.state_dict().items() for key, t in fields.items()}
    return {"state": state, "turns": turns, "scores": scores.per_request}


@cache
def alone(name: str) -> dict[str, object]:
    return edited(name)


def assert_same(first: dict[str, object], second: dict[str, object]) -> None:
    assert not isinstance(second, BaseException), second
    assert first["state"].keys() == second["state"].keys()
    for name, tensor in first["state"].items():
        assert torch.equal(tensor, second["state"][name]), name
    assert first["turns"] == second["turns"]
    assert first["scores"] == second["scores"]


def names(results: list[object]) -> list[str]:
    return [type(result).__name__ for result in results]


@pytest.mark.parametrize(
    ("name", "size"), [("default", 2), pytest.param("past keys", 3, marks=pytest.mark.slow), ("ultraedit", 2)]
)
def test_processes_come_to_the_bits_of_one(name, size, tmp_path):
    for result in together(size, lambda rank: edited(name, distributed="auto"), tmp_path):
        assert_same(alone(name), result)


def test_looks_of_a_large_turn_are_shared_to_the_same_bits(tmp_path):
    many = [{"prompt": f"Number {number} is", "target": str(number * 7)} for number in range(16)]

    def drifts(_rank: int = 0, **how) -> tuple[list[float], int]:
        config = dataclasses.replace(CONFIGS["ultraedit"], turn_size=16)
        editor = se.UltraEdit(roomy_model("llama"), tiny_tokenizer(), config, **how)
        guard, run = editor.guard, []
        measure = running.answer_logits
        running.answer_logits = lambda *passed: run.append(len(passed[3])) or measure(*passed)
        try:
            editor.edit(many, progress=False)
        finally:
            running.answer_logits = measure
        assert guard.drift().mean > 0
        return [turn.drift for turn in editor.edit(many, progress=False).turns], sum(run)

    expected, prompts = drifts()
    results = together(2, lambda rank: drifts(rank, distributed="auto"), tmp_path)
    assert [found for found, _ in results] == [expected] * 2
    assert sorted(run for _, run in results) == [prompts // 2] * 2


def test_without_a_process_group_auto_is_one_process():
    assert_same(alone("ultraedit"), edited("ultraedit", distributed="auto"))


def test_shares_are_nobodys_twice_and_balanced():
    costs = [7.0, 1.0, 5.0, 3.0, 2.0, 2.0, 4.0]
    owners = deal(costs, 3)
    load = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == one) for one in range(3)]
    assert sum(load) == sum(costs)
    assert max(load) <= sum(costs) / 3 * 4 / 3  # Graham 1969, for the dearest first
    assert deal([], 3) == []


def test_tensors_arrive_with_their_bits_and_layout(tmp_path):
    def sent(rank: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(rank)
        matrix = torch.randn(3 + rank, 5, generator=generator)
        return {
            "turned": matrix.t(),
            "half": matrix.bfloat16(),
            "double": [matrix.double()[0], torch.tensor(rank)],
            "flags": (matrix > 0, torch.empty(0, 4)),
            "words": f"process {rank}",
        }

    def work(rank: int) -> list:
        with se.data_parallel() as group:
            return group.gathered("testing", lambda: sent(rank))

    def flat(one: dict) -> list:
        return [one["turned"], one["half"], *one["double"], *one["flags"]]

    for result in together(3, work, tmp_path):
        for rank, found in enumerate(result):
            assert found["words"] == f"process {rank}"
            for mine, theirs in zip(flat(sent(rank)), flat(found), strict=True):
                assert mine.dtype == theirs.dtype and torch.equal(mine, theirs) and mine.stride() == theirs.stride()


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("requests", lambda editor, requests: (editor, [*requests[:-1], requests[-1] | {"target": "other"}])),
        ("settings", lambda editor, requests: (editor_of("past keys", distributed="auto"), requests)),
        ("weights", lambda editor, requests: (editor.model.lm_head.weight.data[3, 4].add_(1.0), (editor, requests))[1]),
    ],
)
def test_a_process_with_something_else_is_found_before_the_first_turn(part, change, tmp_path):
    def work(rank: int) -> str:
        editor, requests = editor_of("default", distributed="auto"), REQUESTS
        if rank == 1:
            editor, requests = change(editor, requests)
        before = editor.model.model.layers[2].mlp.down_proj.weight.clone()
        with pytest.raises(se.RanksDiffer) as caught:
            editor.edit(requests, progress=False)
        assert torch.equal(before, editor.model.model.layers[2].mlp.down_proj.weight)
        return str(caught.value)

    for message in together(2, work, tmp_path):
        assert f"the {part} of process 1 differ from those of process 0" in str(message)


def test_weights_that_part_are_found_after_the_turn(tmp_path):
    """As a processor of another kind may, process 1 comes to other last digits."""

    def work(rank: int) -> tuple[str, int]:
        editor = editor_of("ultraedit", distributed="auto")
        solve = editor.solver.solve

        def other(*arguments, **how):
            found = solve(*arguments, **how)
            return found._replace(updates={name: update.scaled(1 + 1e-6) for name, update in found.updates.items()})

        editor.solver.solve = other if rank == 1 else solve
        with pytest.raises(se.RanksDiffer) as caught:
            editor.edit(REQUESTS, progress=False)
        return str(caught.value), caught.value.report.edits

    for message, edits in together(2, work, tmp_path):
        assert f"the weights of {MODULES[0]} of process 1 differ from those of process 0; after turn 1" in message
        assert edits == 4


def test_more_processes_than_a_turn_has_requests(tmp_path):
    def work(rank: int) -> None:
        config = se.StableEditConfig(turn_size=1, edit_modules=MODULES)
        se.StableEdit(roomy_model("llama"), tiny_tokenizer(), config, distributed="auto").edit(REQUESTS)

    for error in together(2, work, tmp_path):
        assert isinstance(error, ValueError)
        assert "2 processes for turns of 1 requests" in str(error)


def test_a_group_that_cannot_move_the_models_tensors(tmp_path):
    def work(rank: int) -> None:
        editor_of("ultraedit", distributed="auto").edit(REQUESTS, progress=False)

    (error,) = together(1, work, tmp_path, backend="cuda:gloo")
    assert isinstance(error, ValueError)
    assert "moves tensors of cuda alone, but the model is on cpu" in str(error)


def test_processes_that_have_not_the_same_to_do(tmp_path):
    def work(rank: int) -> None:
        with se.data_parallel() as group:
            group.shared("testing", [1.0] * (4 + 2 * rank), lambda piece: piece)

    results = together(2, work, tmp_path)
    assert names(results) == ["RankLost"] * 2
    assert "while testing, they had not the same to do" in str(results[0])


def test_other_arguments_than_a_group_are_refused():
    with pytest.raises(ValueError, match="distributed must be 'auto', a process group, or None, not 'gloo'"):
        editor_of("ultraedit", distributed="gloo").edit(REQUESTS)


def test_what_fails_in_one_process_fails_in_all_and_the_turn_is_dropped(tmp_path):
    """In its second turn process 1 fails as a process does that runs out of memory."""

    def work(rank: int) -> tuple[str, int, bool]:
        editor = editor_of("ultraedit", distributed="auto")
        states = []

        def listen(_turn) -> None:
            states.append(editor.checkpoint().masters)
            if rank == 1:
                editor.model.model.layers[0].register_forward_hook(fail)

        def fail(*_) -> None:
            raise MemoryError("no room")

        editor.on_turn = listen
        try:
            editor.edit(REQUESTS, progress=False)
        except (se.RankLost, MemoryError) as error:
            same = all(torch.equal(states[-1][name], now) for name, now in editor.checkpoint().masters.items())
            return f"{type(error).__name__}: {error}", error.report.edits, same
        raise AssertionError("nothing failed")

    first, second = together(2, work, tmp_path)
    assert first == ("RankLost: process 1 failed: MemoryError: no room", 4, True)
    assert second == ("MemoryError: no room", 4, True)


def test_an_error_for_the_user_is_the_same_everywhere(tmp_path):
    def work(rank: int) -> None:
        def fail() -> None:
            if rank == 2:
                raise se.DamagedJournal("it is damaged")

        with se.data_parallel() as group:
            group.everywhere("testing", fail)

    results = together(3, work, tmp_path)
    assert names(results) == ["DamagedJournal"] * 3
    assert all(str(result) == "it is damaged" for result in results)


def test_a_process_that_is_gone_is_an_error_in_the_others(tmp_path):
    def work(rank: int) -> None:
        editor = editor_of("ultraedit", distributed="auto")
        editor.on_turn = lambda _turn: rank == 1 and os.kill(os.getpid(), signal.SIGKILL)
        editor.edit(REQUESTS, progress=False)

    first, second = together(2, work, tmp_path)
    assert second is None
    assert isinstance(first, se.RankLost) and first.report.edits == 0
    assert "process 0 of 2 waited for another that has gone or did not answer in time" in str(first)


def test_a_process_that_does_not_answer_is_given_up(tmp_path):
    def work(rank: int) -> None:
        with se.data_parallel() as group:
            group.any("meeting", False)
            if rank == 1:
                signal.sigtimedwait([signal.SIGUSR1], 3)
                return
            group.any("testing", False)

    first, _ = together(2, work, tmp_path, patience=timedelta(seconds=1))
    assert isinstance(first, se.RankLost)
    assert "while testing, process 0 of 2 waited" in str(first)


def test_ctrl_c_in_one_process_ends_all_after_the_same_turn(tmp_path, default_sigint):
    def work(rank: int) -> tuple[int, dict]:
        editor = editor_of("ultraedit", distributed="auto")
        editor.on_turn = lambda _turn: rank == 1 and os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(se.EditInterrupted) as caught:
            editor.edit(REQUESTS, progress=False)
        return caught.value.report.edits, editor.checkpoint().masters

    first, second = together(2, work, tmp_path)
    assert first[0] == second[0] == 4
    for name, weight in first[1].items():
        assert torch.equal(weight, second[1][name])


def test_processes_that_come_apart_are_noticed(tmp_path):
    def work(rank: int) -> None:
        with se.data_parallel() as group:
            group.any("one thing" if rank == 0 else "another", False)

    results = together(2, work, tmp_path)
    assert names(results) == ["RankLost"] * 2
    assert "the processes have come apart: while one thing" in str(results[0])


def test_within_a_share_nothing_is_shared_further(tmp_path):
    def work(rank: int) -> list:
        with se.data_parallel() as group:
            return [ranks().size, *group.gathered("testing", lambda: ranks().size), ranks().size]

    assert together(2, work, tmp_path) == [[2, 1, 1, 2]] * 2


def test_all_gather_of_nothing(tmp_path):
    def work(rank: int) -> list:
        cpu = torch.device("cpu")
        return all_gather(None, [rank, 7], torch.distributed.group.WORLD, cpu, cpu)

    assert together(2, work, tmp_path) == [[([0, 7], None), ([1, 7], None)]] * 2
