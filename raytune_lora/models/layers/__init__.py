"""Layers of the methods that PEFT does not have."""

BLOCK = 64  # weights that share a scale in bitsandbytes' 4-bit formats
