"""What a fine-tuning method adds to the memory of a frozen base model."""

from __future__ import annotations

from dataclasses import dataclass

from raytune_lora.planning.shape import Linear


@dataclass(frozen=True)
class Added:
    """Counted in elements, over all layers together."""

    trained: int  # parameters that train
    own: bool = False  # whether these are the base model's own
    fixed: int = 0  # further parameters and buffers
    inputs: tuple[Linear, ...] = ()  # layers whose inputs are kept, as a weight that meets them trains
    dropout: bool = False  # on those inputs: each layer then keeps one of its own, and the mask
    per_token: int = 0  # further elements kept a token
    weights: int = 0  # elements kept whatever the tokens, such as weights computed from others
    prefix: int = 0  # tokens that the method puts before each row
    keys: int = 0  # tokens that it puts before the keys and values alone
    untouched: int = 0  # layers that come before all that trains: none of them keeps anything
    from_start: bool = False  # whether the first layer's input trains

    @classmethod
    def low_rank(
        cls, targets: tuple[Linear, ...], ranks: int, dropout: float, *, trained: int, weights: int = 0
    ) -> Added:
        """Of products of two matrices beside some layers, between which each token has ``ranks`` elements in all."""
        return cls(trained, inputs=targets, dropout=dropout > 0, per_token=ranks, weights=weights)
