"""Measuring models. This file stays light: reports name the file of answers without loading torch."""

ANSWERS = "answers.jsonl"  # in the folder of a measurement: prompt, expected and given answer, a line each
