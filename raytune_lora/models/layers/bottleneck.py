"""The bottleneck adapter, hung behind a sublayer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Bottleneck(nn.Module):
    """x + U gelu(D x); U starts at zero, so that it starts as x."""

    def __init__(self, hidden: int, width: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width)
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = nn.functional.gelu(self.down(self.dropout(x.to(self.down.weight.dtype))))
        return x + self.up(inner).to(x.dtype)


def insert(sublayer: Any, hidden: int, width: int, dropout: float) -> None:
    """Hang an adapter behind a sublayer, on the first of its outputs where it gives several."""
    reference = next(sublayer.parameters())
    sublayer.adapter = Bottleneck(hidden, width, dropout).to(reference.device)
    sublayer.register_forward_hook(_through_adapter)


def _through_adapter(sublayer: Any, inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (sublayer.adapter(output[0]), *output[1:])
    return sublayer.adapter(output)
