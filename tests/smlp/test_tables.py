"""Tables in Markdown, by hand."""

from smlp.tables import markdown_table


def test_columns_line_up() -> None:
    lines = [("one", "1,000", ""), ("eleven", "7", "x")]
    assert markdown_table(("name", "count", "n"), lines, right=("count",)) == [
        "| name   | count | n   |",
        "|--------|------:|-----|",
        "| one    | 1,000 |     |",
        "| eleven |     7 | x   |",
    ]


def test_without_lines_the_head_remains() -> None:
    assert markdown_table(("a",), []) == ["| a   |", "|-----|"]
