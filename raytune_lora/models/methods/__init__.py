"""Fine-tuning methods: one class each, found by the kind of its config."""

from raytune_lora.models.methods import (  # noqa: F401  # each registers its methods by being imported
    adalora,
    adapter,
    diff_pruning,
    eva,
    fixed,
    lora,
    principal,
    prompts,
    quantized,
    selective,
)
from raytune_lora.models.methods.base import Method, Start, method_for, registered

__all__ = ["Method", "Start", "method_for", "registered"]
