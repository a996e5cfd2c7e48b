"""What checks find: how often, with the first few examples of each kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5  # examples kept of each kind
EXCERPT = 240  # characters of a text that an example shows


@dataclass
class Findings:
    """Counts of rows by the finding's name, with examples; picklable, so that parts made by processes can be added."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def add(self, name: str, where: str, text: str, detail: str = "") -> None:
        """Count a row once under a name.

        Args:
            name: of the finding, such as ``empty_fields`` or ``pii.email``.
            where: the row, as ``Record.where``.
            text: of the row, or the part of it that matters; shortened here.
            detail: what exactly is wrong.
        """
        self.counts[name] += 1
        shown = self.examples.setdefault(name, [])
        if len(shown) < SHOWN:
            shown.append({"where": where, "text": excerpt(text), "detail": detail})

    def merge(self, other: Findings) -> None:
        """Add what another part of the same data found; parts come in the data's order."""
        self.counts.update(other.counts)
        for name, examples in other.examples.items():
            shown = self.examples.setdefault(name, [])
            shown += examples[: SHOWN - len(shown)]

    def report(self, name: str) -> dict[str, Any]:
        """``count`` and ``examples`` of a finding, as ``data_report.json`` has them."""
        return {"count": self.counts[name], "examples": self.examples.get(name, [])}


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The text's start, without characters that a terminal or a page cannot show."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[: length + 1])
    return shown if len(shown) <= length else shown[:length] + "…"
