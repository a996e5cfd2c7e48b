"""Answers of a model, and how many of them are exactly right. B: batch, T: time (tokens), V: vocabulary."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import torch

from raytune_lora.data.encode import spell
from raytune_lora.errors import UserError
from raytune_lora.training.failures import OOM, classify

_PROBED = 4  # tokens written to see whether a way to answer changes them
_logger = logging.getLogger(__name__)
# One token after the other, whatever a model's own settings want of chance, length and search.
_PLAIN: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
    "min_length": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_new_tokens": None,
    "max_time": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
}
# What a way to answer may change of the logits, in standard deviations: in 16 or 8 bits, or in 32. Rounding does less
# than the first; between the two, as in deep networks and where it sends tokens to other experts, the least is taken.
_ROUNDING = {True: 0.1, False: 1e-3}
_WRONG = {True: 1.0, False: 1e-2}


@dataclass(frozen=True)
class Group:
    """The workers that share the prompts.

    Of a model that is divided among them all make each forward pass, also those that have no prompt left.
    """

    rank: int = 0
    workers: int = 1
    start_afresh: Callable[[], None] | None = None  # after a failed forward pass of a divided model; None: it is whole

    @property
    def divided(self) -> bool:
        return self.start_afresh is not None and self.workers > 1

    def gather(self, own: Any) -> list[Any]:
        """What each worker has, on all of them."""
        if self.workers == 1:
            return [own]
        found: list[Any] = [None] * self.workers
        torch.distributed.all_gather_object(found, own)
        return found


_ALONE = Group()


class NoRoom(UserError):
    """There is not enough memory to answer prompts with."""


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
    group: Group = _ALONE,
) -> list[str]:
    """Greedy answers, each as plain forward passes over its whole text give it, whatever ``batch`` is.

    A cache, and other prompts beside it, are used only where they change nothing.

    Args:
        model: a causal language model; its ``generation_config`` applies but for chance, length and ends.
        tokenizer: of the model.
        prompts: token ids of each prompt, at least one each.
        stop_ids: tokens that end an answer.
        batch: prompts answered at once, at most.
        max_new_tokens: tokens after which an answer is cut off.
        within: how many tokens of ``stop_ids`` stand in each answer before the one that ends it; None: none in any.
        group: the workers that call this with the same arguments, each of which answers a part.

    Returns:
        The text of each answer up to the token that ends it, in the order of the prompts.

    Raises:
        UserError: ``generate`` gives no answers of this model; on all workers.
        NoRoom: answers need more memory than a worker has; likewise, unless the model is divided.
    """
    within = within or [0] * len(prompts)
    greedy = _PLAIN | {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(stop_ids),
        "pad_token_id": tokenizer.pad_token_id,
        "tokenizer": tokenizer,  # for stop_strings, where the model's own settings have some
    }
    if group.divided:
        greedy["synced_gpus"] = True  # who is done goes on with forward passes until all are
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    way = _way(model, [prompts[i] for i in by_length], greedy, batch, group)
    greedy["use_cache"], batch = way.cached, way.batch
    alike = [by_length] if way.padded else [list(g) for _, g in groupby(by_length, key=lambda i: len(prompts[i]))]
    # What ends one answer may stand within another, as between its thought and its text: that one is cut afterwards.
    alike = [[i for i in members if bool(within[i]) is several] for members in alike for several in (False, True)]
    batches = list(chain.from_iterable(_batches(members, batch) for members in alike))
    given: dict[int, list[int]] | None = None
    try:
        given = _own_part(model, prompts, batches, greedy, within, group)
    except Exception as error:
        if group.divided or classify(error).status != OOM:
            raise  # of a divided model the others wait in the middle of it
    parts = group.gather(given)
    if None in parts:
        raise NoRoom(f"evaluation.generate_batch={batch}: there is no memory for the answers; set a smaller one")
    together = {i: ids for part in parts for i, ids in part.items()}
    return spell([together[i] for i in range(len(prompts))], tokenizer)


def _own_part(
    model: Any,
    prompts: Sequence[Sequence[int]],
    batches: Sequence[list[int]],
    greedy: dict[str, Any],
    within: Sequence[int],
    group: Group,
) -> dict[int, list[int]]:
    """Token ids of the answers that this worker gives, by the number of the prompt."""
    stop_ids = set(greedy["eos_token_id"])
    given: dict[int, list[int]] = {}
    for turn in range(math.ceil(len(batches) / group.workers)):
        number = turn * group.workers + group.rank
        if number >= len(batches):
            if group.divided:  # it has its part in those of the others
                _generate(model, [prompts[i] for i in batches[0]], greedy | {"max_new_tokens": 1})
            continue
        chosen = batches[number]
        settings = greedy | ({"eos_token_id": None} if within[chosen[0]] else {})
        output_BT = _generate(model, [prompts[i] for i in chosen], settings).tolist()
        for i, ids in zip(chosen, output_BT, strict=True):
            found = [at for at, token in enumerate(ids) if token in stop_ids]
            given[i] = ids[: found[within[i]]] if len(found) > within[i] else ids
    return given


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


@dataclass(frozen=True)
class _Way:
    """How ``generate`` is called."""

    cached: bool  # whether each token reuses what was computed of those before it
    batch: int  # prompts at once, at most
    padded: bool = False  # whether prompts of several lengths may be among them


def _way(model: Any, prompts: Sequence[Sequence[int]], greedy: dict[str, Any], batch: int, group: Group) -> _Way:
    """The fastest way that gives what the model itself computes of the shortest and the longest prompt.

    Padding stands between learned vectors and the prompt that they belong before, and some architectures see it; some
    take a cache behind learned vectors for an empty one, or count positions anew. What a way changes may be no more
    than what rounding does.

    Args:
        model: a causal language model.
        prompts: the shortest first.
        greedy: settings of ``generate``.
        batch: prompts at once, at most.
        group: the workers, which all try the same and choose the same.

    Raises:
        UserError: no way does; on all workers.
    """
    if not prompts:
        return _Way(cached=True, batch=batch)
    short, long = prompts[0], prompts[-1]
    several = (short, long[: len(short)]) if batch > 1 else (short,)
    learned_prompt = any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())
    ways: list[tuple[_Way, list[Sequence[Sequence[int]]]]] = [
        (_Way(cached=True, batch=batch), [several, (long,)]),
        (_Way(cached=True, batch=1), [(short,), (long,)]),
        (_Way(cached=False, batch=batch), [several, (long,)]),
        (_Way(cached=False, batch=1), [(short,), (long,)]),
    ]
    if len(short) < len(long) and batch > 1 and not learned_prompt:
        ways.insert(0, (_Way(cached=True, batch=batch, padded=True), [(short, long)]))
    coarse = model.dtype not in (torch.float32, torch.float64) or getattr(model, "is_quantized", False)
    changes: dict[_Way, float] = {}
    trouble: Exception | None = None
    for way, probes in ways:
        found, failed = _tried(model, probes, greedy | {"use_cache": way.cached}, group)
        if found is None:
            trouble = failed or trouble
            continue
        changes[way] = found
        if found < _ROUNDING[coarse]:
            break
    else:
        way = min(changes, key=lambda way: changes[way], default=ways[0][0])
        if not changes and trouble is not None and classify(trouble).status == OOM:
            raise NoRoom("evaluation.max_new_tokens: there is no memory to answer the longest prompt with") from trouble
        if not changes.get(way, math.inf) < _WRONG[coarse]:
            raise UserError(
                "evaluation.generate_rows: transformers' generate() computes other tokens than the model's forward "
                "pass, with and without a cache, so that no answer would be the model's own; set "
                "evaluation.generate_rows=0"
            ) from trouble
    if not way.cached:
        _logger.warning("the model computes other tokens with a cache than without: it answers without, and slowly")
    return way


def _tried(
    model: Any, probes: Sequence[Sequence[Sequence[int]]], greedy: dict[str, Any], group: Group
) -> tuple[float | None, Exception | None]:
    """What a way changes at most on any worker, None where it fails on one; and how it failed here."""
    found, failed = None, None
    try:
        found = _largest([_change(model, probe, greedy) for probe in probes])
    except Exception as error:  # some models' code fails with caches, or behind learned vectors
        failed = error
        if group.divided and classify(error).status == OOM:
            raise  # the others are in the middle of it
        if group.start_afresh is not None:
            group.start_afresh()
    everywhere = group.gather(found)
    return (None if None in everywhere else _largest(everywhere)), failed


def _largest(values: Sequence[float]) -> float:
    """Not a number, if one is."""
    return float(torch.tensor(values, dtype=torch.float64).max())


@torch.no_grad()
def _change(model: Any, prompts: Sequence[Sequence[int]], greedy: dict[str, Any]) -> float:
    """By how much the logits of the first tokens of some prompts' answers differ from those of plain forward passes.

    Returns:
        The largest difference, in standard deviations of the logits.
    """
    count = min(_PROBED, greedy["max_new_tokens"])
    few = {"max_new_tokens": count, "min_new_tokens": count, "output_logits": True, "return_dict_in_generate": True}
    output = _generate(model, prompts, greedy | few)
    found_BTV = _comparable(torch.stack(output.logits, 1))
    written_BT = output.sequences[:, -count:].tolist()
    expected_BTV = torch.stack(
        [_plain_logits(model, [*prompt, *ids], count) for prompt, ids in zip(prompts, written_BT, strict=True)]
    )
    return float((found_BTV - expected_BTV).abs().amax() / expected_BTV.std())


def _plain_logits(model: Any, ids: Sequence[int], count: int) -> torch.Tensor:
    """Logits of each of the last tokens, (T, V), by a forward pass over all that stand before it, with no cache."""
    last = {"logits_to_keep": 1} if _takes(model, "logits_to_keep") else {}
    device = next(model.parameters()).device
    logits = []
    for end in range(len(ids) - count, len(ids)):
        ids_1T = torch.tensor([ids[:end]], device=device)
        output = model(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False, **last)
        logits.append(output.logits[0, -1])
    return _comparable(torch.stack(logits))


def _takes(model: Any, name: str) -> bool:
    """Whether an argument of that name can be handed to a model, with an adapter or without."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return name in inspect.signature(base.forward).parameters


def _comparable(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype is torch.float64 else logits.float()


def _generate(model: Any, prompts: Sequence[Sequence[int]], settings: dict[str, Any]) -> Any:
    """What ``generate`` gives, of sequences only what is new; padded on the left, so that prompts end together."""
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.full((len(prompts), width), settings["pad_token_id"])
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    inputs = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.to(device)}
    output = model.generate(**inputs, **_own_positions(model, inputs["input_ids"]), **settings)
    return output if settings["return_dict_in_generate"] else output[:, width:]


def _own_positions(model: Any, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions as RoBERTa's kin count them, from behind the padding token's number; ``generate`` begins at 0."""
    for module in model.modules() if _takes(model, "position_ids") else ():
        if hasattr(module, "create_position_ids_from_input_ids") and hasattr(module, "padding_idx"):
            return {"position_ids": module.create_position_ids_from_input_ids(ids_BT, module.padding_idx)}
    return {}
