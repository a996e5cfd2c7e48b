"""Fine-tuning methods: one class each, found by the kind of its config."""

from raytune_lora.models.methods.base import Method, method_for
from raytune_lora.models.methods.lora import Lora

__all__ = ["Lora", "Method", "method_for"]
