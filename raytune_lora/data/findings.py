"""What checks find: how often, with the first few examples of each kind."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

SHOWN = 5  # examples kept of each kind
MOST_REASONS = 20  # of one kind that are counted apart; each has an example
OTHER = "other reasons"
EXCERPT = 240  # characters of a text that an example shows
_NUMBER = re.compile(r"\d+")


@dataclass
class Findings:
    """Counts of rows by the finding's name, with examples; picklable, so that parts made by processes can be added."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, name: str, where: str, text: str, detail: str = "", reasons: Iterable[str] = ()) -> None:
        """Count a row once under a name.

        Args:
            name: of the finding, such as ``empty_fields`` or ``pii.email``.
            where: the row, as ``Record.where``.
            text: of the row, or the part of it that matters; shortened here.
            detail: what exactly is wrong.
            reasons: what the rows of a finding are told apart by; numbers in them do not matter. Each has an example.
        """
        self.counts[name] += 1
        shown = self.examples.setdefault(name, [])
        new = False
        for reason in dict.fromkeys(_NUMBER.sub("#", reason) for reason in reasons):
            new |= self._count(name, reason, 1)
        if new or len(shown) < SHOWN:
            shown.append({"where": where, "text": excerpt(text), "detail": detail})

    def _count(self, name: str, reason: str, rows: int) -> bool:
        """Count a reason; whether it is a new one that is counted apart."""
        known = self.reasons.setdefault(name, Counter())
        new = reason not in known and reason != OTHER and len(known) < MOST_REASONS
        known[reason if new or reason in known else OTHER] += rows
        return new

    def merge(self, other: Findings) -> None:
        """Add what another part of the same data found; parts come in the data's order."""
        self.counts.update(other.counts)
        new = {
            name: [reason for reason, rows in reasons.items() if self._count(name, reason, rows)]
            for name, reasons in other.reasons.items()
        }
        for name, examples in other.examples.items():
            shown = self.examples.setdefault(name, [])
            for example in examples:
                fresh = [reason for reason in new.get(name, ()) if reason in _NUMBER.sub("#", example["detail"])]
                if fresh or len(shown) < SHOWN:
                    shown.append(example)
                    new[name] = [reason for reason in new.get(name, ()) if reason not in fresh]

    def report(self, name: str) -> dict[str, Any]:
        """``count``, ``examples`` and ``reasons`` of a finding, as ``data_report.json`` has them."""
        reasons = dict(self.reasons.get(name, Counter()).most_common())
        return {"count": self.counts[name], "examples": self.examples.get(name, []), "reasons": reasons}


def excerpt(text: str, length: int = EXCERPT) -> str:
    """The text's start, without characters that a terminal or a page cannot show."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text[: length + 1])
    return shown if len(shown) <= length else shown[:length] + "…"
