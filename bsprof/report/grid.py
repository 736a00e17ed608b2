"""A grid of text that fits a terminal: columns under headers, names shortened where there is no room."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from bsprof.report import figures
from bsprof.report.figures import MISSING


class Column(NamedTuple):
    """A header and one cell a row, flush right as numbers are, or left."""

    header: str
    cells: list[Text]
    right: bool = True


def column(header: str, cells: Iterable[str | Text], *, right: bool = True) -> Column:
    """Return a column of plain or styled texts."""
    return Column(header, [Text(cell) if isinstance(cell, str) else cell for cell in cells], right)


def is_captured(column: Column) -> bool:
    """Whether any cell says more than a dash."""
    return any(cell.plain not in ("", MISSING) for cell in column.cells)


def width_of(columns: Sequence[Column]) -> int:
    """Return how wide a grid of these columns is, in cells of the terminal."""
    return 2 + sum(_cells_width(column) for column in columns) + 2 * (len(columns) - 1)


def _cells_width(column: Column) -> int:
    return max([len(column.header), *(cell.cell_len for cell in column.cells)])


def parts(axes: list[Column], columns: Sequence[Column], width: int) -> Iterator[list[Column]]:
    """Split columns into as many grids as the width asks for, so that none is lost; each has the axes."""
    part: list[Column] = []
    for one in columns:
        if part and width_of([*axes, *part, one]) > width:
            yield [*axes, *part]
            part = []
        part.append(one)
    yield [*axes, *part]


def print_grid(console: Console, columns: Sequence[Column], after: dict[int, list[Text]], lead: int) -> None:
    """Print columns under their headers; rows in `after` follow row i and span all columns but the first `lead`."""
    columns = _squeezed(columns, console.width)
    widths = [_cells_width(column) for column in columns]

    def line(cells: Iterable[Text]) -> Text:
        row = Text("  ")
        for column, width, cell in zip(columns, widths, cells, strict=False):
            pad = " " * (width - cell.cell_len)
            row.append_text(Text.assemble(pad, cell, "  ") if column.right else Text.assemble(cell, pad, "  "))
        row.rstrip()
        return row

    print_line(console, line(Text(column.header, "bold") for column in columns))
    print_line(console, Text("  " + "─" * (width_of(columns) - 2), "dim"))
    for index in range(len(columns[0].cells) if columns else 0):
        cells = [column.cells[index] for column in columns]
        if any(cell.plain not in ("", MISSING) for cell in cells[lead:]) or index not in after:
            print_line(console, line(cells))
        start = line(cells[:lead])
        start.pad_right(2 + sum(widths[:lead]) + 2 * lead - start.cell_len)
        for span in after.get(index, ()):
            for part in span.wrap(console, max(console.width - start.cell_len, 20)):
                part.rstrip()
                print_line(console, Text.assemble(start, part))
                start = Text(" " * start.cell_len)


_SHORTEST_NAME = 8


def _squeezed(columns: Sequence[Column], width: int) -> list[Column]:
    """Shorten names, the longest column first and from their front, as far as it takes to fit into `width`."""
    squeezed = list(columns)
    for index in sorted(range(len(columns)), key=lambda index: -_cells_width(columns[index])):
        excess = width_of(squeezed) - width
        if excess <= 0:
            break
        if not columns[index].right:
            room = max(_SHORTEST_NAME, _cells_width(columns[index]) - excess)
            cells = [cell if cell.cell_len <= room else Text("…") + cell[1 - room :] for cell in columns[index].cells]
            squeezed[index] = column(columns[index].header, cells, right=False)
    return squeezed


def print_line(console: Console, text: Text) -> None:
    """Print one line, cut where it does not fit, with nothing in it that steers a terminal."""
    if not text.plain.isprintable():
        # A message may hold anything: what moves the cursor or paints the screen must not reach the terminal.
        text.plain = figures.printable(text.plain)
    console.print(text, no_wrap=True, overflow="ellipsis", highlight=False)


def heading(console: Console, text: str, explained: str = "") -> None:
    """Print the heading of a table, and what it needs said in a word behind it."""
    title = Text(text, "bold")
    if explained:
        title.append(f" · {explained}", "not bold dim")
    print_words(console, title, indent=0)


def print_words(console: Console, text: Text | str, indent: int = 2) -> None:
    """Print a paragraph, wrapped to the width of the console."""
    text = Text(text) if isinstance(text, str) else text
    for part in text.wrap(console, max(console.width - indent, 20)):
        part.rstrip()
        print_line(console, Text(" " * indent).append_text(part))
