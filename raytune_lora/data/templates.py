"""How a row of instruction data becomes the prompt that the model reads and the answer that it learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One example in Alpaca form."""

    instruction: str
    input: str
    output: str


def alpaca(row: Row) -> str:
    """The Alpaca prompt (Taori et al. 2023) in its short form, without the sentence before it."""
    if row.input:
        return f"### Instruction:\n{row.instruction}\n\n### Input:\n{row.input}\n\n### Response:\n"
    return f"### Instruction:\n{row.instruction}\n\n### Response:\n"


TEMPLATES: dict[str, Callable[[Row], str]] = {"alpaca": alpaca}
