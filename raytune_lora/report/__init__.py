"""The report of a sweep or run: one HTML page that needs no network, made from results.json alone."""

from raytune_lora.report.html import render

__all__ = ["render"]
