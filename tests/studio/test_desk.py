"""A session on the page's desk: jobs in order, questions in between, what is known of the edits; no browser."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.editors.followers import Follower
from stableedit_cpp.studio.desk import Desk
from stableedit_cpp.studio.known import Known
from support.sessions import assert_same_bits, create, reopen, state_of, stream
from support.tiny import tiny_model

pytest.importorskip("matplotlib", reason="the studio needs the extra 'studio'")

EDITS = [se.EditRequest(**fact) for fact in stream(9)]


@pytest.fixture
def desk(tmp_path, tokenizer):
    with Desk(create(tmp_path / "edits", tokenizer)) as desk:
        yield desk


def done(job, state: str = "done"):
    assert job.over.wait(60)
    assert job.state == state, job.said
    return job


def states(desk) -> dict[str, str]:
    return {row.id: row.state for row in desk.view.rows}


class AfterTurn(Follower):
    """Calls something after the first turn, in the thread that edits."""

    def __init__(self, call) -> None:
        self.calls = [call]

    def final(self, turn) -> None:
        if self.calls:
            self.calls.pop()()


def test_edits_and_answers_side_by_side(desk, tokenizer):
    done(desk.edit(EDITS, "nine"))
    assert [row.turn for row in desk.view.rows] == [1] * 3 + [2] * 3 + [3] * 3
    assert desk.view.turn == 3
    assert [turn for turn, *_ in desk.view.turns] == [0, 1, 2, 3]
    found = done(desk.ask(EDITS[0].prompt, 8)).result
    assert found.unedited == se.generate(tiny_model("llama"), tokenizer, EDITS[0].prompt, max_new_tokens=8)[0]
    assert found.edited == se.generate(desk.session.model, tokenizer, EDITS[0].prompt, max_new_tokens=8)[0]
    assert found.edited != found.unedited


def test_questions_do_not_wait_for_the_end_and_change_nothing(desk, tokenizer, tmp_path):
    asked = []
    desk.session.editor.followers.add(AfterTurn(lambda: asked.append(desk.ask("Gold is", 4))))
    edit = done(desk.edit(EDITS, "nine"))
    assert asked[0].ended < edit.ended
    assert asked[0].result.unedited == se.generate(tiny_model("llama"), tokenizer, "Gold is", max_new_tokens=4)[0]
    with create(tmp_path / "other", tokenizer) as other:
        other.edit(EDITS)
        assert_same_bits(state_of(desk.session.editor), state_of(other.editor))


def test_stops_between_turns_and_goes_on_with_the_same_file(desk, tmp_path):
    desk.session.editor.followers.add(AfterTurn(lambda: desk.worker.stop(desk.worker.current)))
    stopped = desk.edit(EDITS, "nine")
    never = desk.edit(EDITS[:1], "another")
    desk.worker.stop(never)
    assert done(stopped, "stopped").said == "stopped after turn 1, 3 of 9 edits done"
    assert done(never, "stopped").begun == 0
    assert len(desk.view.rows) == 3
    path = tmp_path / "nine.json"
    path.write_text(json.dumps(stream(9)))
    assert done(desk.edit_file(path)).said == "6 edits to do, 3 done before"
    done(desk.worker.jobs[-1])
    assert len(desk.view.rows) == 9
    done(desk.edit_file(path))
    assert done(desk.worker.jobs[-1]).said == "all of it was edited before; what is forgotten is for a repair"


def test_a_file_with_bad_records_changes_nothing(desk, tmp_path):
    journal = (desk.session.directory / "journal").read_bytes()
    path = tmp_path / "mixed.jsonl"
    lines = [*map(json.dumps, stream(2)), '{"prompt": "A", "target": ""}', json.dumps(stream(3)[2])]
    lines += [json.dumps({"prompt": "x" * 80, "target": "too long"})]
    path.write_text("\n".join(lines))
    said = done(desk.edit_file(path), "failed").said
    assert said.startswith("mixed.jsonl: nothing is edited, because of 2 records: line 3: target is empty")
    assert "; line 5: " in said
    path.write_text('{"prompt": "A", "tar')
    assert "mixed.jsonl, line 1" in done(desk.edit_file(path), "failed").said
    assert (desk.session.directory / "journal").read_bytes() == journal
    assert len(desk.worker.jobs) == 2  # no edit was asked for
    done(desk.edit(EDITS, "the thread goes on"))


def test_many_bad_records_are_all_named(desk, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("prompt,target\nThe sky is,blue\n" + "A,\n" * 7)
    said = done(desk.edit_file(path), "failed").said
    assert "7 records" in said
    assert said.endswith("; also line 8, line 9")


def test_audit_repair_and_states(desk):
    done(desk.edit(EDITS, "nine"))
    assert set(states(desk).values()) == {"not looked at"}
    expected = {entry.id: "holds" if entry.holds else "forgotten" for entry in desk.session.audit().entries}
    assert "forgotten" in expected.values()
    done(desk.audit())
    assert states(desk) == expected
    done(desk.repair())
    expected = {entry.id: "holds" if entry.holds else "forgotten" for entry in desk.session.audit().entries}
    assert states(desk) == expected
    assert len(desk.known.audits) == 2
    newer = se.EditRequest(EDITS[0].prompt, "Sydney", id="newer")
    done(desk.edit([newer], "newer"))
    assert states(desk)["f0"] == "superseded"
    done(desk.revert("f1"))
    assert states(desk)["f1"] == "reverted"
    done(desk.revert("newer"))
    assert states(desk)["f0"] == expected["f0"]
    assert "is reverted in turn" in done(desk.revert("f1"), "failed").said


def test_an_audit_goes_on_in_stretches(desk, monkeypatch):
    monkeypatch.setattr("stableedit_cpp.studio.desk._STRETCH", 4)
    done(desk.edit(EDITS, "nine"))
    expected = [(entry.id, entry.holds) for entry in desk.session.audit().entries]
    held = sum(holds for _, holds in expected)
    assert done(desk.audit()).said == f"{held} of 9 edits hold"
    assert [(id, found.holds) for id, found in desk.known.found.items()] == expected


def test_a_rollback_forgets_what_was_seen_after_it(desk):
    done(desk.edit(EDITS[:3], "three"))
    done(desk.audit())
    done(desk.edit(EDITS[3:], "more"))
    done(desk.audit())
    before = state_of(desk.session.editor)
    assert "there is no turn 17" in done(desk.rollback(17), "failed").said
    assert_same_bits(state_of(desk.session.editor), before)
    done(desk.rollback(1))
    assert list(states(desk)) == ["f0", "f1", "f2"]
    assert set(states(desk).values()) == {"not looked at"}  # they were looked at again after turn 3, which is gone
    assert [looked.turn for looked in desk.known.audits] == [1]


def test_what_is_known_is_there_when_the_studio_is_opened_again(tmp_path, tokenizer):
    with Desk(create(tmp_path / "edits", tokenizer)) as desk:
        done(desk.edit(EDITS, "nine"))
        done(desk.audit())
        seen = desk.view.rows
    with Desk(reopen(tmp_path / "edits", tokenizer)) as desk:
        assert desk.view.rows == seen
        assert desk.view.charts.count("<svg") == 1  # of ages; this editor has no guard, and there is one audit
    (tmp_path / "edits" / "studio.json").write_text("{")
    with pytest.raises(ValueError, match=r"studio\.json is not valid JSON"):
        Known(tmp_path / "edits")


def test_took_is_known_without_an_audit(tmp_path, tokenizer):
    config = se.StableEditConfig(edit_modules=["model.layers.2.mlp.down_proj"], turn_size=3)
    with Desk(create(tmp_path / "edits", tokenizer, config=config)) as desk:
        done(desk.edit(EDITS[:3], "three"))
        holds = {entry.id: entry.holds for entry in desk.session.audit().entries}
        assert states(desk) == {id: "holds" if held else "forgotten" for id, held in holds.items()}


def test_exports_are_what_the_session_is(desk, tokenizer):
    assert "nothing" in done(desk.export("delta"), "failed").said.lower()
    done(desk.edit(EDITS, "nine"))
    for kind in ("model", "delta", "delta"):  # once more replaces
        said = done(desk.export(kind)).said
        directory = desk.session.directory.absolute().with_name("edits-exports") / f"{kind}-turn-3"
        assert str(directory) in said
        assert (directory / "README.md").exists()
    whole, _ = se.load_model(directory.with_name("model-turn-3"))
    changed = tiny_model("llama")
    assert se.export.apply_delta(changed, directory)
    for other in (whole, changed):
        for name, tensor in desk.session.model.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name
    assert "known are: model" in done(desk.export("gguff"), "failed").said


def test_warnings_go_with_their_job(desk, tmp_path):
    path = tmp_path / "blanks.json"
    path.write_text(json.dumps([{"prompt": " Gold is ", "target": "Au"}]))
    for _ in range(2):
        assert "blanks" in done(desk.edit_file(path)).notes[0]
    with pytest.warns(UserWarning, match="of another thread"):
        warnings.warn("of another thread", stacklevel=1)


def test_closing_ends_after_the_turn_and_begins_nothing(tmp_path, tokenizer):
    session = create(tmp_path / "edits", tokenizer)
    with Desk(session) as desk:
        session.editor.followers.add(AfterTurn(lambda: reached.append(desk.worker.stop(desk.worker.current))))
        reached: list[None] = []
        jobs = [desk.edit(EDITS, "nine"), desk.audit()]
    assert [job.state for job in jobs] == ["stopped", "stopped"]
    with pytest.raises(RuntimeError, match="is closing"):
        desk.audit()
    with reopen(tmp_path / "edits", tokenizer) as again:  # the lock is free
        assert again.history.turn == len(reached)
