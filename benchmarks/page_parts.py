"""What every table of the pages is put together from."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def load(name: str) -> dict[str, Any]:
    """A record, by the name of its file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def rounded_up(log10_p: float) -> str:
    """One decimal, never flattering."""
    return f"{math.ceil(10 * log10_p) / 10 + 0:.1f}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """In Markdown."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def paragraph(*parts: str) -> str:
    """A paragraph."""
    return textwrap.fill(" ".join(parts), 98, break_long_words=False, break_on_hyphens=False)
