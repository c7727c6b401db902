"""Pieces of HTML that the parts of the report are made of; what is given as text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence


def section(title: str, body: str) -> str:
    """A part of the page under its heading; empty without a body."""
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>" if body else ""


def folded(summary: str, body: str) -> str:
    """What is seen on demand."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def table(name: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table that scrolls sideways by itself where it is wider than the page; the first column names the rows."""
    titles = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head) if any(head) else ""
    lines = "".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>{"".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    above = f"<thead><tr>{titles}</tr></thead>" if titles else ""
    kind = ' class="numbers"' if numbers else ""
    label = html.escape(name)
    body = f"<table{kind}>{above}<tbody>{lines}</tbody></table>"
    return f'<div class="table" role="region" aria-label="{label}" tabindex="0">{body}</div>'
