"""Tables on the terminal: rich where it is installed and somebody looks, aligned text anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Table:
    """A title, columns and rows of text; `styles` colours whole rows ("green", "red", "dim"), None for none."""

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    styles: list[str | None] = field(default_factory=list)
    right: frozenset[str] = frozenset()

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
        widths = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        lines = [self.title] if self.title else []
        for row in table:
            cells = [
                cell.rjust(width) if name in self.right else cell.ljust(width)
                for cell, width, name in zip(row, widths, self.columns, strict=True)
            ]
            lines.append(("  " + "  ".join(cells)).rstrip())
        return lines

    def _rich(self) -> None:
        from rich.console import Console
        from rich.table import Table as RichTable

        table = RichTable(
            title=self.title or None, title_justify="left", title_style="bold", show_header=any(self.columns)
        )
        for name in self.columns:
            table.add_column(name, justify="right" if name in self.right else "left", overflow="fold")
        for row, style in zip(self.rows, self.styles, strict=True):
            table.add_row(*row, style=style)
        Console().print(table)
