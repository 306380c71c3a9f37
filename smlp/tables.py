"""Tables in Markdown."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    head: Sequence[str], lines: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> list[str]:
    """Return the lines of a Markdown table, padded so that its columns line up.

    Args:
        head: the columns' titles.
        lines: a cell for each column.
        right: titles of the columns that are aligned to the right.
    """
    cells = [head, *lines]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    columns = list(zip(widths, [title in right for title in head], strict=True))
    first, *rest = (
        "| "
        + " | ".join(
            text.rjust(width) if numbers else text.ljust(width)
            for text, (width, numbers) in zip(line, columns, strict=True)
        )
        + " |"
        for line in cells
    )
    rule = "|".join(f"{'-' * (width + 1)}{':' if numbers else '-'}" for width, numbers in columns)
    return [first, f"|{rule}|", *rest]
