"""Tables in Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from moe_kernels.programs.shared.cli import console


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def print_rows(rows: Mapping[str, str], title: str | None = None) -> None:
    """Print a table of figures by name."""
    table = Table(title=title, show_header=False, show_lines=True)
    for row in rows.items():
        table.add_row(*row)
    console.print(table)


def text_rows(text: Mapping[str, Any]) -> dict[str, str]:
    """Return the rows about held-out text; text: what ``compare_text`` returns."""
    before, after = text["nll_before_training"], text["nll_after_training"]
    return {
        "text, held out: nats a token": f"{before:.6f} before, {after:.6f} after",
        "text logits changed by training": f"{text['logits_changed_by_training']:,}",
    }
