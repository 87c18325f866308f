"""What the page shows: rows, filter, words and charts, without a page."""

from __future__ import annotations

import pytest
from tqdm.auto import tqdm

from stableedit_cpp.studio.bars import Bar, shown_bar
from stableedit_cpp.studio.charts import DriftPoint, charts_of, drift_points
from stableedit_cpp.studio.jobs import Worker
from stableedit_cpp.studio.known import Looked
from stableedit_cpp.studio.rows import Row, counts, filtered
from stableedit_cpp.studio.view import View
from stableedit_cpp.studio.words import heading, work
from support.sessions import create, stream

ROWS = [
    Row("r-1", "The capital of Peru is", "Lima", "holds", "after turn 1", 1),
    Row("r-2", "Der Fluß durch Bonn", "Rhein", "forgotten", "after turn 1", 1),
    Row("r-3", "The sky is", "<b>blue</b>", "superseded", "by r-4", 2),
    Row("r-4", "The sky is", "red", "holds", "after turn 3", 3),
]


def test_filter_and_counts():
    assert [row.id for row in filtered(ROWS)] == ["r-4", "r-3", "r-2", "r-1"]
    assert [row.id for row in filtered(ROWS, "SKY is")] == ["r-4", "r-3"]
    assert [row.id for row in filtered(ROWS, "fluss rhein")] == ["r-2"]
    assert [row.id for row in filtered(ROWS, "is lima r-1")] == ["r-1"]
    assert [row.id for row in filtered(ROWS, "is", "holds")] == ["r-4", "r-1"]
    assert counts(ROWS) == {"holds": 2, "forgotten": 1, "superseded": 1}


def test_the_bar_is_the_innermost_of_the_terminal():
    assert shown_bar() is None
    with tqdm(total=10, desc="Editing", unit="edit", disable=False) as outer:
        outer.update(3)
        outer.set_postfix({"taken": "1/3"}, refresh=False)
        assert shown_bar() == Bar("Editing", 3, 10, "edit", "taken=1/3")
        with tqdm(total=4, desc="Auditing", disable=True):
            assert shown_bar().title == "Editing"
        with tqdm(desc="Reading", unit="line", disable=False):
            assert shown_bar() == Bar("Reading", 0, 0, "line", "")
        assert shown_bar().title == "Editing"
    assert shown_bar() is None


def test_words_are_text_not_html():
    assert "&lt;i&gt;" in heading(View(directory="<i>", rows=ROWS))
    assert "2 holds, 1 forgotten, 1 superseded" in heading(View(rows=ROWS))
    worker = Worker()

    def fail() -> None:
        worker.note("<u>note</u>")
        raise ValueError("<b>no</b>")

    jobs = [worker.submit("<a>", fail), worker.submit("<later>", lambda: None)]
    assert "&lt;a&gt;, waits" in work(worker)
    worker.start()
    assert all(job.over.wait(10) for job in jobs)
    text = work(worker)
    assert "✗ &lt;a&gt;: &lt;b&gt;no&lt;/b&gt;" in text
    assert "&lt;u&gt;note" in text
    assert "✓ &lt;later&gt;" in text
    worker.close()


def test_charts_say_what_they_show():
    pytest.importorskip("matplotlib", reason="the studio needs the extra 'studio'")
    drift = [DriftPoint(edits, edits / 100, 2.5) for edits in (1, 2, 40)]
    audits = [Looked(1, 1, 2, ""), Looked(3, 2, 3, "")]
    html = charts_of(drift, ROWS, audits)
    assert html.count("<svg") == 3
    assert "0.4 of at most 2.5 nats after 40 edits" in html
    assert "Edits that hold by age: 2 of 3; from the youngest to the oldest 1.00, 0.00, 1.00." in html
    assert "at each of 2 audits, the last 0.67" in html
    assert charts_of([], [], []) == ""
    many = [ROWS[0]._replace(state="holds" if number >= 50 else "forgotten") for number in range(100)]
    assert "50 of 100; from the youngest to the oldest 1.00, 1.00, 1.00, " in charts_of([], many, [])


def test_drift_is_what_the_guard_has_measured(tmp_path, tokenizer):
    with create(tmp_path / "edits", tokenizer) as session:
        session.edit(stream(3))
        assert drift_points(session) == []
        session.editor.guard = "default"
        report = session.edit(stream(6, 3))
        session.revert("f0")
        points = drift_points(session)
    assert [point.edits for point in points] == [6, 9]
    assert [point.drift for point in points] == [turn.drift for turn in report.turns]
