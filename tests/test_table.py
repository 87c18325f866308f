"""One table, for Markdown and for terminals."""

from __future__ import annotations

from stableedit_cpp.files.table import Cell, Table, label, number, score

TABLE = Table(
    ["editor", "edits", "efficacy"],
    [
        [label("ours"), number(5000), score(0.75, 0.0125)._replace(best=True)],
        [label("a|b\nc"), number(None), score(None)],
        [label("théirs"), number(7), score(0.5)],
    ],
    caption="What it says.",
)


def test_markdown():
    assert TABLE.markdown() == (
        "What it says.\n\n"
        "| editor | edits | efficacy |\n"
        "| --- | --- | --- |\n"
        "| ours | 5,000 | ★ 0.750 ± 0.013 |\n"
        "| a\\|b c | - | - |\n"
        "| théirs | 7 | 0.500 |"
    )


def test_a_terminal_gets_text_to_the_left_and_numbers_to_the_right():
    assert Table(TABLE.columns, [TABLE.rows[0], TABLE.rows[2]]).plain() == (
        "editor  edits         efficacy\nours    5,000  ★ 0.750 ± 0.013\nthéirs      7            0.500"
    )
    assert Table(["", ""], [[label("a"), number(1)], [label("bc"), number(22)]]).plain() == "a    1\nbc  22"
    assert Table(["a", "b"], []).plain() == "a  b"


def test_columns_sort_by_what_is_in_them():
    assert [TABLE.is_text(column) for column in range(3)] == [True, False, False]
    assert Table(["a", "b"], [[label("x"), Cell("-")], [label("y"), label("z")]]).is_text(1)
    assert score(0.75, 0.0125).value == 0.75 and number(None).value is None
