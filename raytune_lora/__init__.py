"""Find and train the best LoRA fine-tune of a language model within a budget, on Ray."""

__version__ = "0.1.0"
