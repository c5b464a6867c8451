"""Tables on the terminal: rich where it is installed and somebody looks, aligned text anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

_SPARE_WIDTH = 30


@dataclass
class Table:
    """A title, columns and rows of text; `styles` colours whole rows ("green", "red", "dim"), None for none.

    The column `spare` gets the room that the others leave, and is left out where that is little.
    """

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    styles: list[str | None] = field(default_factory=list)
    right: frozenset[str] = frozenset()
    spare: str = ""

    def add(self, *cells: str, style: str | None = None) -> None:
        self.rows.append(cells)
        self.styles.append(style)

    def show(self) -> None:
        """Prints the table."""
        if sys.stdout.isatty():
            try:
                self._rich()
                return
            except ImportError:
                pass
        print("\n".join(self.text()))

    def text(self) -> list[str]:
        """The table in plain lines."""
        table = [tuple(self.columns), *self.rows] if any(self.columns) else self.rows
        widths = self._widths()
        lines = [self.title] if self.title else []
        for row in table:
            cells = [
                cell.rjust(width) if name in self.right else cell.ljust(width)
                for cell, width, name in zip(row, widths, self.columns, strict=True)
            ]
            lines.append(("  " + "  ".join(cells)).rstrip())
        return lines

    def _widths(self) -> list[int]:
        return [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]

    def _without(self, name: str) -> Table:
        place = list(self.columns).index(name)
        columns = [*self.columns[:place], *self.columns[place + 1 :]]
        rows = [(*row[:place], *row[place + 1 :]) for row in self.rows]
        return Table(self.title, columns, rows, self.styles, self.right)

    def _rich(self) -> None:
        from rich.box import HEAVY_HEAD
        from rich.console import Console
        from rich.table import Table as RichTable

        console, widths = Console(), self._widths()
        needed = sum(widths) + 3 * len(widths) + 1
        if self.spare:
            needed -= max(0, widths[list(self.columns).index(self.spare)] - _SPARE_WIDTH)
        framed = needed <= console.width
        if self.spare and not framed:
            self._without(self.spare)._rich()
            return
        table = RichTable(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            show_header=any(self.columns),
            box=HEAVY_HEAD if framed else None,
            padding=(0, 1) if framed else (0, 1, 0, 0),
        )
        for name in self.columns:
            table.add_column(name, justify="right" if name in self.right else "left", overflow="fold")
        for row, style in zip(self.rows, self.styles, strict=True):
            table.add_row(*row, style=style)
        console.print(table)
