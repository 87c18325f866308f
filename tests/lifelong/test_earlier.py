"""Sessions that version 0.1 wrote are read, done again and gone on with.

``earlier.tar.gz`` holds a tiny model and a session of each journal detail: a warm-up, edits (one with blanks around
prompt and target, one that supersedes another), a repair, a revert, and a turn that was rolled back.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

import stableedit_cpp as se
from stableedit_cpp.data.request import EditRequest
from stableedit_cpp.lifelong import LifelongSession, OtherBits, SessionView, verify

ARCHIVE = Path(__file__).with_name("earlier.tar.gz")


@pytest.fixture(params=["factors", "requests"])
def earlier(request, tmp_path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param


def opened(directory: Path) -> LifelongSession:
    model, tokenizer = se.load_model(directory.parent / "model")
    return LifelongSession.open(directory, model, tokenizer, exact=False)  # other machines have other last digits


def test_it_is_read(earlier):
    assert verify(earlier).sound
    view = SessionView(earlier)
    kinds = ["created", "warm_up", "edit", "edit", "repair", "repair", "revert", "edit", "rollback", "edit"]
    assert [entry.kind for entry in view.log()] == kinds
    states = {id: entry.state for id, entry in view.history.entries.items()}
    assert states["capital"] == "superseded by capital-new"
    assert states["sky"] == "reverted in turn 6"
    assert [request.id for request in view.current_requests()] == ["blanks", "capital-new", "r-bfba8ce342c0"]
    assert (view.history.entries["blanks"].request.prompt, view.manifest["detail"]) == ("Gold is ", earlier.name)
    file = [EditRequest("Gold is", "Au"), EditRequest("Opposite of up:", "down"), EditRequest("2 + 2 =", "4")]
    assert [request.prompt for request in view.pending(file)] == ["Opposite of up:"]  # it was rolled back


def test_its_turns_are_done_again(earlier):
    with opened(earlier) as session:
        written = {module.name: module.weight.detach().clone() for module in session.editor.modules}
    newest = session.snapshots.numbers()[-1]
    session.snapshots.path(newest).unlink()
    with opened(earlier) as session:
        for module in session.editor.modules:
            if earlier.name == "factors":
                torch.testing.assert_close(module.weight, written[module.name])
            else:  # solved again, by a default that no longer whitens an outlier turn with what does not know it
                assert torch.isfinite(module.weight).all()
                assert (module.weight - written[module.name]).norm() < 0.05 * written[module.name].norm()


@pytest.mark.parametrize("earlier", ["requests"], indirect=True)
def test_turns_that_are_solved_again_are_not_taken_for_the_same(earlier):
    model, tokenizer = se.load_model(earlier.parent / "model")
    with opened(earlier) as session:
        newest = session.snapshots.numbers()[-1]
    session.snapshots.path(newest).unlink()
    with pytest.raises(OtherBits, match="version"):
        LifelongSession.open(earlier, model, tokenizer)


def test_it_is_gone_on_with(earlier):
    with opened(earlier) as session:
        session.edit(session.pending([{"prompt": "Opposite of up:", "target": "down"}]))
        report = session.revert("blanks")
        assert report.requests[0].prompt == "Gold is "
        session.rollback(3)
    with opened(earlier) as session:
        assert session.status().turn == 3
        assert [request.id for request in session.current_requests()] == ["blanks", "capital-new", "sky"]
