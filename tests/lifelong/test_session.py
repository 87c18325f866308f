"""A session and an uninterrupted editor are one and the same, bit for bit, however often it is closed."""

from __future__ import annotations

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.core import LowRankUpdate
from stableedit_cpp.errors import SessionBusy, SessionClosed
from stableedit_cpp.lifelong import LifelongSession, SessionView
from support.sessions import FACTS, assert_same_bits, config_of, create, reopen, state_of, stream, without_closing
from support.tiny import tiny_model, tiny_tokenizer

# What "requests" does again is what earlier versions wrote, too: test_earlier.py has it in the first layer.
DETAILS = ["factors", pytest.param("requests", marks=pytest.mark.slow)]


def uninterrupted(tokenizer, warm_up, edits, dtype=torch.float32, config=None):
    editor = se.editors.make_editor(tiny_model("llama", dtype), tokenizer, config or config_of())
    editor.warm_up(warm_up)
    editor.edit(edits)
    return editor


@pytest.mark.parametrize("detail", DETAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(max_passes=3, refresh=0.0),
        config_of(statistics="per_module", whitening="diagonal"),
        config_of("ultraedit", unbiased_batches=True),
        config_of(max_passes=2, past_key_weight=0.02, retries_feed_statistics=False),
    ],
    ids=["default", "passes", "per_module", "ultraedit", "past_keys"],
)
def test_reopening_gives_the_same_bits(config, dtype, detail, tokenizer, tmp_path):
    """After every turn, with and without a snapshot at hand."""
    warm_up, edits = stream(7), stream(15, 100)
    session = create(tmp_path / "s", tokenizer, dtype=dtype, config=config, detail=detail, snapshot_every=4)
    session.warm_up(warm_up[:6])
    without_closing(session)
    session = reopen(tmp_path / "s", tokenizer, dtype=dtype)
    session.warm_up(warm_up[6:])
    for begin in range(0, len(edits), 3):
        session.edit(edits[begin : begin + 3])
        without_closing(session)
        before = state_of(session.editor)
        session = reopen(tmp_path / "s", tokenizer, dtype=dtype)
        assert_same_bits(state_of(session.editor), before)
    whole = uninterrupted(tokenizer, warm_up, edits, dtype, config)
    assert_same_bits(state_of(session.editor), state_of(whole))
    ours = session.editor.state_dict()
    for part, state in whole.state_dict().items():
        assert_same_bits(ours[part], state)


def test_closing_writes_a_snapshot(tokenizer, tmp_path):
    with create(tmp_path / "s", tokenizer) as session:
        session.edit(stream(8))
        assert session.status().turns_since_snapshot == 3
    status = SessionView(tmp_path / "s").status()
    assert status.turns_since_snapshot == 0
    assert status.snapshots == 2
    with pytest.raises(SessionClosed, match="is closed"):
        session.edit(stream(1, 50))
    session.editor.edit(stream(1, 60))  # the editor lives on, unrecorded
    assert len(SessionView(tmp_path / "s").journal.records) == 4


def test_snapshots_are_written_and_pruned(tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, snapshot_every=2, keep_snapshots=2)
    session.edit(stream(3 * 9))
    assert session.snapshots.numbers() == [0, 6, 8]


@pytest.mark.parametrize("detail", ["factors", "requests"])
def test_journal_detail(detail, tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, detail=detail)
    session.edit(stream(3))
    tensors = session.journal.tensors(session.journal.records[-1])
    assert bool(tensors) == (detail == "factors")
    # The right factors are the keys the statistics saw; they are not written twice.
    assert not any(name.endswith("/keys") for name in tensors)


def test_thread_count_of_the_turn_is_used_again(tokenizer, tmp_path):
    threads = torch.get_num_threads()
    session = create(tmp_path / "s", tokenizer)
    session.edit(stream(3))
    assert session.journal.records[-1].content["threads"] == threads
    without_closing(session)
    torch.set_num_threads(threads + 1)
    try:
        reopen(tmp_path / "s", tokenizer).close()
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


class TestOpen:
    @pytest.fixture
    def directory(self, tokenizer, tmp_path):
        with create(tmp_path / "s", tokenizer) as session:
            session.edit(stream(6))
        return tmp_path / "s"

    def test_no_session(self, tokenizer, tmp_path):
        with pytest.raises(FileNotFoundError, match="is no session directory"):
            reopen(tmp_path, tokenizer)
        assert not list(tmp_path.iterdir())

    def test_the_model_it_left(self, tokenizer, directory):
        session = reopen(directory, tokenizer)
        model = session.model
        session.close()
        before = model.model.layers[0].mlp.down_proj.weight.clone()
        LifelongSession.open(directory, model, tokenizer).close()
        assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (lambda: tiny_model("mistral"), "the model is a MistralForCausalLM, not a LlamaForCausalLM"),
            (lambda: tiny_model("llama", torch.bfloat16), "the model is in bfloat16, not in float32"),
            (lambda: tiny_model("llama", seed=1), "weights of the model outside the edited modules are others"),
        ],
    )
    def test_another_model(self, model, message, tokenizer, directory):
        model = model()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            LifelongSession.open(directory, model, tokenizer)
        assert_same_bits(dict(model.state_dict()), before)
        reopen(directory, tokenizer).close()  # the lock was given back

    def test_a_model_that_was_edited_elsewhere(self, tokenizer, directory):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="neither the unedited weights nor those"):
            LifelongSession.open(directory, model, tokenizer)
        assert_same_bits(dict(model.state_dict()), before)

    def test_another_tokenizer(self, directory):
        with pytest.raises(ValueError, match="the tokenizer is another"):
            reopen(directory, tiny_tokenizer(bos=True))

    def test_a_tokenizer_that_was_used(self, directory):
        used = tiny_tokenizer()
        used(["a", "bcd"], padding=True, truncation=True, max_length=2)
        reopen(directory, used).close()

    def test_one_writer(self, tokenizer, directory):
        with reopen(directory, tokenizer), pytest.raises(SessionBusy, match=r"by process \d+ on .+, since 20"):
            reopen(directory, tokenizer)
        reopen(directory, tokenizer).close()

    def test_readers_are_welcome(self, tokenizer, directory):
        with reopen(directory, tokenizer):
            assert "by process" in SessionView(directory).status().writer
        assert SessionView(directory).status().writer is None

    def test_bits_that_cannot_be_reproduced(self, tokenizer, tmp_path, monkeypatch):
        """As on another machine: a product rounds differently."""
        session = create(tmp_path / "s", tokenizer)
        session.edit(stream(6))
        without_closing(session)
        real = se.Editor.replay

        def differently(editor, turn):
            real(editor, turn)
            for name, update in turn.passes[0].updates.items():
                editor.weights.add({name: LowRankUpdate(update.left * 1e-6, update.right)})

        monkeypatch.setattr(se.Editor, "replay", differently)
        with pytest.raises(se.lifelong.OtherBits, match="doing turn 1 again gives other bits"):
            reopen(tmp_path / "s", tokenizer)
        session = reopen(tmp_path / "s", tokenizer, exact=False)
        assert [entry.kind for entry in session.log()][-1] == "moved"
        session.edit(stream(3, 50))
        session.rollback(1)  # other bits there, too
        assert [entry.kind for entry in session.log()][-2:] == ["rollback", "moved"]
        session.edit(stream(3, 60))
        session.close()
        monkeypatch.undo()
        reopen(tmp_path / "s", tokenizer).close()


class TestCreate:
    def test_a_directory_with_content(self, tokenizer, tmp_path):
        (tmp_path / "file").touch()
        for place in (tmp_path, tmp_path / "file"):
            with pytest.raises(ValueError, match="not an empty directory"):
                create(place, tokenizer)

    @pytest.mark.parametrize(
        "options", [{"detail": "all"}, {"snapshot_every": 0}, {"keep_snapshots": 0}, {"snapshot_every": True}]
    )
    def test_bad_arguments(self, options, tokenizer, tmp_path):
        with pytest.raises(ValueError, match=next(iter(options))):
            create(tmp_path / "s", tokenizer, **options)
        assert not list(tmp_path.iterdir())

    def test_modules_are_written_down(self, tokenizer, tmp_path):
        config = se.StableEditConfig.one_pass(edit_modules=["model.layers.*.mlp.down_proj"], step_size=1e-2)
        with create(tmp_path / "s", tokenizer, config=config) as session:
            assert len(session.manifest["config"]["edit_modules"]) == 3


class TestRequests:
    def test_ids_are_given(self, tokenizer, tmp_path):
        session = create(tmp_path / "s", tokenizer)
        session.edit([*FACTS[:4], FACTS[0]])
        ids = list(session.history.entries)
        assert len(set(ids)) == 5
        assert ids[4] == ids[0] + "-2"

    def test_an_id_is_used_once(self, tokenizer, tmp_path):
        session = create(tmp_path / "s", tokenizer)
        session.edit(stream(4))
        before = state_of(session.editor)
        with pytest.raises(ValueError, match="request 1 has the id 'f3', which was edited before"):
            session.edit([stream(1, 9)[0], stream(4)[3]])
        with pytest.raises(ValueError, match="requests 0 and 1 have the same id 'f9'"):
            session.edit([stream(1, 9)[0], stream(4)[3] | {"id": "f9"}])
        with pytest.raises(ValueError, match="call the session's edit, not that of its editor"):
            session.editor.edit([{"prompt": "A is", "target": "B"}])
        assert_same_bits(state_of(session.editor), before)

    def test_pending(self, tokenizer, tmp_path):
        session = create(tmp_path / "s", tokenizer)
        unnamed = [se.EditRequest(fact["prompt"], fact["target"]) for fact in [*FACTS[:4], FACTS[0], *FACTS[:2]]]
        session.edit(session.pending(unnamed)[:5])
        rest = session.pending(unnamed)
        assert [request.prompt for request in rest] == [FACTS[0]["prompt"], FACTS[1]["prompt"]]
        session.edit(rest)
        assert not session.pending(unnamed)
        named = [se.EditRequest(**fields) for fields in stream(5)]
        session.edit(named[:2])
        assert session.pending(named) == named[2:]

    def test_warm_up_is_apart(self, tokenizer, tmp_path):
        session = create(tmp_path / "s", tokenizer)
        session.warm_up(stream(4))
        session.edit(stream(4))
        requests = [se.EditRequest(**fields) for fields in stream(6)]
        assert session.pending(requests, warm_up=True) == requests[4:]
        assert session.current_requests() == requests[:4]
        assert session.status().warm_up == 4

    def test_superseding(self, tokenizer, tmp_path):
        """Same prompt, new target: the new one is current, and log, status and later sessions know."""
        session = create(tmp_path / "s", tokenizer)
        old = {"id": "old", "prompt": "The capital is", "target": "Bonn"}
        new = {"id": "new", "prompt": " The capital is ", "target": "Berlin"}
        session.edit([old, *stream(3)])
        session.edit([new])
        assert session.history.entries["old"].state == "superseded by new"
        assert "new supersedes old" in session.log()[-1].text
        session.close()
        session = reopen(tmp_path / "s", tokenizer)
        trunk = session.editor.make_trunk_cache()
        assert session.audit(trunk=trunk).requests == len(session.evaluate(trunk=trunk).per_request) == 4
        assert session.evaluate().efficacy == se.evaluate(session.model, tokenizer, [*stream(3), new]).efficacy
        session.close()
        view = SessionView(tmp_path / "s")
        assert [request.id for request in view.current_requests()] == ["f0", "f1", "f2", "new"]
        assert view.status().superseded == 1

    def test_contradiction_within_a_call(self, tokenizer, tmp_path):
        """They never share a turn: the later one has to see that the earlier one is in the model."""
        session = create(tmp_path / "s", tokenizer)
        facts = stream(5)
        facts.insert(2, facts[1] | {"id": "again", "target": "other"})
        report = session.edit(facts)
        assert [turn.requests for turn in report.turns] == [2, 3, 1]
        assert report.edits == 6
        assert not session.history.entries["f1"].current


@pytest.mark.parametrize("least", [None, 0.0, 0.9])
def test_audit_and_repair_ask_for_the_same(least, tokenizer, tmp_path):
    """What an audit says holds, a repair does not solve again: both ask for the config's margin, or for one given."""
    session = create(tmp_path / "s", tokenizer, config=config_of(max_passes=12, take_probability=0.3))
    session.edit(stream(3))
    found = session.audit(min_probability=least)
    report = session.repair(min_probability=least)
    assert found.min_probability == (0.3 if least is None else least)
    assert found == report.before
    assert sum(done.edits for done in report.rounds) == len(found.forgotten)


@pytest.mark.parametrize("detail", DETAILS)
def test_repairs_and_guarded_turns(detail, tokenizer, tmp_path):
    """What cannot be done again from the requests alone is written down in full."""
    session = create(tmp_path / "s", tokenizer, detail=detail, config=config_of(max_passes=2))
    session.edit(stream(6))
    session.repair(rounds=2)
    assert session.history.steps[session.history.turn].kind == "repair"
    session.editor.guard = guard = se.lifelong.LocalityGuard(session.editor, ["Say", "Once"], limit=1.0, back_offs=20)
    guard.limit = 1.02 * guard.drift().mean
    report = session.edit(stream(3, 10))
    assert report.turns[0].back_offs > 0
    before = state_of(session.editor)
    without_closing(session)
    session = reopen(tmp_path / "s", tokenizer)
    assert_same_bits(state_of(session.editor), before)
    assert {request.id for request in session.current_requests()} == {f"f{n}" for n in [*range(6), 10, 11, 12]}


def test_rollback_and_log(tokenizer, tmp_path):
    session = create(tmp_path / "s", tokenizer, snapshot_every=2)
    states = [state_of(session.editor)]
    for begin in range(0, 15, 3):
        session.edit(stream(3, begin))
        states.append(state_of(session.editor))
    for turn in (4, 1):
        session.rollback(turn)
        assert_same_bits(state_of(session.editor), states[turn])
        assert session.status().turn == turn
    assert [entry.in_model for entry in session.log()] == [True, True, False, False, False, False, True, True]
    with pytest.raises(ValueError, match=r"turn 3 was itself rolled back \(record 7\)"):
        session.rollback(3)
    with pytest.raises(ValueError, match="there is no turn 9"):
        session.rollback(9)
    with pytest.raises(ValueError, match="stands at turn 1 already"):
        session.rollback(1)
    assert [request.id for request in session.current_requests()] == ["f0", "f1", "f2"]
    session.edit(stream(3, 3))  # their ids are free again
    assert_same_bits(state_of(session.editor), states[2])
    assert session.history.line == [1, 6]
    without_closing(session)
    session = reopen(tmp_path / "s", tokenizer)
    assert_same_bits(state_of(session.editor), states[2])
    session.rollback(0)
    assert_same_bits(state_of(session.editor), states[0])
