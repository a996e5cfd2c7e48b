"""Answers of a model, and how many of them are exactly right. B: batch, T: time (tokens), V: vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, groupby
from typing import Any

import torch

from raytune_lora.data.encode import spell

_PROBED = 4  # tokens written to see whether padding changes them
# One token after the other, whatever a model's own settings want of chance, length and search.
_PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}
_ROUNDING = {True: 0.1, False: 1e-3}  # what it may change of the logits, in standard deviations: in 16 or 8 bits, or 32


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    batch: int,
    max_new_tokens: int,
    within: Sequence[int] | None = None,
) -> list[str]:
    """Greedy answers, the same for every ``batch``: prompts are padded only where that changes nothing.

    Args:
        model: a causal language model; its ``generation_config`` applies but for chance, length and ends.
        tokenizer: of the model.
        prompts: token ids of each prompt, at least one each.
        stop_ids: tokens that end an answer.
        batch: prompts answered at once, at most.
        max_new_tokens: tokens after which an answer is cut off.
        within: how many tokens of ``stop_ids`` stand in each answer before the one that ends it; None: none in any.

    Returns:
        The text of each answer up to the token that ends it, in the order of the prompts.
    """
    within = within or [0] * len(prompts)
    greedy = _PLAIN | {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer": tokenizer,  # for stop_strings, where the model's own settings have some
    }
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    ends = (prompts[by_length[0]], prompts[by_length[-1]]) if prompts else ([], [])
    padded = batch > 1 and len(ends[0]) < len(ends[1]) and _may_pad(model, ends, greedy)
    alike = [by_length] if padded else [list(g) for _, g in groupby(by_length, key=lambda i: len(prompts[i]))]
    # What ends one answer may stand within another, as between its thought and its text: that one is cut afterwards.
    alike = [[i for i in group if bool(within[i]) is several] for group in alike for several in (False, True)]
    given: dict[int, list[int]] = {}
    for chosen in chain.from_iterable(_batches(group, batch) for group in alike):
        settings = greedy | ({"eos_token_id": None} if within[chosen[0]] else {})
        output_BT = _generate(model, [prompts[i] for i in chosen], settings).tolist()
        for i, ids in zip(chosen, output_BT, strict=True):
            found = [at for at, token in enumerate(ids) if token in stop_ids]
            given[i] = ids[: found[within[i]]] if len(found) > within[i] else ids
    return spell([given[i] for i in range(len(prompts))], tokenizer)


def stops(model: Any, tokenizer: Any, trained: Sequence[int], expected: Sequence[Sequence[int]]) -> list[int]:
    """Tokens that end an answer: those that the rows train as its end, and the model's own.

    A model's own end, as ``generation_config`` and the tokenizer name it, is none where an expected answer holds it.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        trained: ``TokenStore.stop_ids``.
        expected: token ids of the answers, without their ends.
    """
    own = model.generation_config.eos_token_id
    named = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted({*trained, *(named - set(chain.from_iterable(expected)))})


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """Share of answers equal to what was expected, white space at the ends aside.

    Raises:
        ValueError: there is nothing to compare.
    """
    if not expected:
        raise ValueError("no answers to compare")
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / len(expected)


def _batches(group: list[int], batch: int) -> Iterator[list[int]]:
    yield from (group[start : start + batch] for start in range(0, len(group), batch))


def _may_pad(model: Any, prompts: Sequence[Sequence[int]], greedy: dict[str, Any]) -> bool:
    """Whether the shortest and the longest prompt are answered the same side by side as each alone.

    Padding stands between learned vectors and the prompt that they belong before, and some architectures see it. What
    it changes may be no more than what rounding does.
    """
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        return False
    together_BTV = _first_logits(model, prompts, greedy)
    alone_BTV = torch.cat([_first_logits(model, [prompt], greedy) for prompt in prompts])
    coarse = model.dtype not in (torch.float32, torch.float64) or getattr(model, "is_quantized", False)
    change = (together_BTV - alone_BTV).abs().amax() / alone_BTV.std()
    return bool(change < _ROUNDING[coarse])


def _first_logits(model: Any, prompts: Sequence[Sequence[int]], greedy: dict[str, Any]) -> torch.Tensor:
    """Logits of the first tokens of each answer, (B, T, V) in fp32 or fp64."""
    count = min(_PROBED, greedy["max_new_tokens"])
    few = {"max_new_tokens": count, "min_new_tokens": count, "output_logits": True, "return_dict_in_generate": True}
    logits_BTV = torch.stack(_generate(model, prompts, greedy | few).logits, 1)
    return logits_BTV if logits_BTV.dtype is torch.float64 else logits_BTV.float()


def _generate(model: Any, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> Any:
    """What ``generate`` gives, of sequences only what is new; padded on the left, so that prompts end together."""
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), settings["pad_token_id"])
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    output = model.generate(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), **settings)
    return output if settings["return_dict_in_generate"] else output[:, width:]
