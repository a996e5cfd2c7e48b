"""What a base model has room for, positions and token ids, against the config and the data: known before training.

A table of positions ends where it ends. Positions that are computed (rotary, ALiBi) do not, and a model is merely at a
loss beyond the length that it was made for: that is said, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from raytune_lora.config.methods import PromptTuningMethodConfig
from raytune_lora.config.schema import RunConfig, SweepConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.models.methods import method_for
from raytune_lora.planning.shape import Shape
from raytune_lora.tuning import space as spaces


@dataclass(frozen=True)
class _Lengths:
    """Tokens at most, without those that the method puts before a row."""

    row: int  # of what is trained or validated
    prompt: int  # of what is answered; 0 where nothing is
    answers: list[int]  # of each expected answer
    before: int  # that the method puts before a row, at most over the search space

    @classmethod
    def of(cls, cfg: SweepConfig, shape: Shape, store: TokenStore) -> _Lengths:
        rows = store.answered(cfg.evaluation.generate_rows)
        lengths = [store.lengths(split) for split in ("train", "validation")]
        return cls(
            row=max(int(lengths_N.max()) for lengths_N in lengths if len(lengths_N)),
            prompt=max(rows["prompt_length"], default=0),
            answers=list(rows["answer_length"]),
            before=max(_before(each, shape) for each in spaces.at_bounds(cfg)),
        )


def _before(cfg: RunConfig, shape: Shape) -> int:
    added = method_for(cfg.method).added(shape)
    return added.prefix + added.keys


def config_problems(cfg: RunConfig, shape: Shape) -> list[str]:
    """What the config alone tells."""
    if shape.positions is None or cfg.data.max_length <= shape.positions:
        return []
    return [
        f"data.max_length must be <= the {shape.positions} positions that the model has (got {cfg.data.max_length}); "
        f"set data.max_length={shape.positions}"
    ]


def text_problems(cfg: SweepConfig, shape: Shape, tokenizer: Callable[[], Any]) -> list[str]:
    """Tokens of ``method.text`` that the model's embedding has no row for; the tokenizer is loaded where there is one.

    Of a search, its choices too.
    """
    methods = [each.method for each in spaces.at_bounds(cfg) if isinstance(each.method, PromptTuningMethodConfig)]
    texts = {(method.text, method.virtual_tokens) for method in methods if method.text}
    if shape.embeddings is None or not texts:
        return []
    spell = tokenizer()  # as PEFT does: from the beginning, and no more than there are vectors
    largest = max((token for text, count in texts for token in spell(text)["input_ids"][:count]), default=0)
    if largest < shape.embeddings:
        return []
    return [
        f"method.text has a token of id {largest}, and the model's embedding has {shape.embeddings} rows, for ids "
        "below that; write it without that token"
    ]


def problems(cfg: SweepConfig, shape: Shape, store: TokenStore) -> list[str]:
    """What would fail in the middle of the work, on this data."""
    found = []
    largest, token = store.manifest["largest_id"], store.manifest["largest_token"]
    if shape.embeddings is not None and largest >= shape.embeddings:
        found.append(
            f"model: the tokenizer writes token ids up to {largest} ({token!r}), and the model's embedding has "
            f"{shape.embeddings} rows, for ids below that; save the model with more rows (transformers: "
            f"model.resize_token_embeddings({largest + 1})), or take those tokens out of the tokenizer"
        )
    if shape.positions is None:
        return found
    lengths = _Lengths.of(cfg, shape, store)
    own = f" and the {lengths.before} of method={cfg.method.kind} before it" if lengths.before else ""
    has = f"and the model has {shape.positions}"
    if lengths.row + lengths.before > shape.positions:
        room = shape.positions - lengths.before
        remedy = f"set data.max_length={room}" if room > 1 else "set a smaller method.virtual_tokens"
        found.append(
            f"data.max_length={cfg.data.max_length}: the longest row's {lengths.row} tokens{own} need "
            f"{lengths.row + lengths.before} positions, {has}; {remedy}"
        )
    needed = lengths.prompt + lengths.before + cfg.evaluation.max_new_tokens
    if lengths.prompt and needed > shape.positions:
        room = shape.positions - lengths.prompt - lengths.before
        remedy = f"evaluation.max_new_tokens={room}" if room > 0 else "evaluation.generate_rows=0"
        found.append(
            f"evaluation.max_new_tokens={cfg.evaluation.max_new_tokens}: the longest prompt's {lengths.prompt} "
            f"tokens{own} and the answer need {needed} positions, {has}; set {remedy}"
        )
    return found


def notes(cfg: SweepConfig, shape: Shape, store: TokenStore) -> list[str]:
    """What works and is not what one may think."""
    lengths, limit = _Lengths.of(cfg, shape, store), cfg.evaluation.max_new_tokens
    found = []
    asked = lengths.prompt + limit if lengths.prompt else 0
    longest = lengths.before + max(lengths.row, asked)
    if shape.positions is None and shape.context is not None and longest > shape.context:
        key = "data.max_length" if lengths.row >= asked else "evaluation.max_new_tokens"
        found.append(
            f"the model was made for {shape.context} tokens in a row (max_position_embeddings), and up to {longest} "
            f"come together: what it does beyond is not what it was trained for; a smaller {key} avoids that"
        )
    cut = store.rows["test"] - len(store.answered(store.rows["test"]))
    if cut and cfg.evaluation.generate_rows:
        found.append(
            f"exact match: {cut} of {store.rows['test']} test rows are not answered, as their prompt or answer is not "
            "whole or they have no prompt"
        )
    if beyond := sum(length > limit for length in lengths.answers):
        found.append(
            f"exact match: {beyond} of {len(lengths.answers)} expected answers have more than "
            f"evaluation.max_new_tokens={limit} tokens and can never be given; set evaluation.max_new_tokens="
            f"{max(lengths.answers) + 1}"
        )
    return found
