"""Answers of a model, and how many of them are exactly right. B: batch, T: time (tokens)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, batch: int, max_new_tokens: int
) -> list[str]:
    """Greedy answers.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        prompts: token ids of each prompt.
        batch: prompts answered at once.
        max_new_tokens: tokens after which an answer is cut off.

    Returns:
        The text of each answer up to its end-of-sequence token, in the order of the prompts.
    """
    device = next(model.parameters()).device
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in range(0, len(by_length), batch):
        chosen = by_length[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids_BT = torch.full((len(chosen), width), tokenizer.pad_token_id)
        mask_BT = torch.zeros_like(ids_BT)
        for row, i in enumerate(chosen):  # padded on the left, so that every prompt ends where its answer begins
            ids_BT[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask_BT[row, width - len(prompts[i]) :] = 1
        output_BT = model.generate(
            input_ids=ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(output_BT[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to what was expected, white space at the ends aside.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not expected:
        raise ValueError("no answers to compare")
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / len(expected)
