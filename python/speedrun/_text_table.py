"""Tables of plain text, for the screen."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """One line a row, columns in line: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join(line).rstrip())
    return "\n".join(lines)
