"""Measure a model, untouched or with an adapter: loss on the validation split, exact match on the test split."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from raytune_lora import storage
from raytune_lora.cache import Cache
from raytune_lora.config.schema import Precision, Quantization, RunConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.errors import UserError
from raytune_lora.evaluation import ANSWERS
from raytune_lora.evaluation.figures import loss_interval, wilson
from raytune_lora.evaluation.generate import Group, NoRoom, answer, exact_match, stops
from raytune_lora.models.loading import loader_of, parameter_count, precision
from raytune_lora.models.methods import method_for
from raytune_lora.models.sources import materialize
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.training.leaks import check_causal
from raytune_lora.training.metrics import fit_by_rows, mean_loss, row_losses, rows_measured
from raytune_lora.training.place import Place
from raytune_lora.training.sharding import divides, measured_model
from raytune_lora.working_copy import WorkingCopy


def measure(cfg: RunConfig, store: TokenStore, place: Place, *, adapter: str | None) -> None:
    """Report the loss and the exact match, and write each answer to ``answers.jsonl`` in the place's folder.

    Reported are ``eval_loss`` over ``eval_loss_rows`` rows, with its ``eval_loss_interval``; of these, ``trial_loss``
    over the rows that a trial is measured on, and in which ``arithmetic``; and ``exact_match`` over
    ``exact_match_rows`` rows, with its ``exact_match_interval``, all None where no rows are to be answered;
    ``unanswered``, why none could be, of an adapter or for want of memory; and the base model's ``parameters``,
    ``dtype`` and ``loader``, the class of transformers that loads it, or None where none does alone. The workers share
    the rows; each holds of the model what it holds in training.

    Args:
        cfg: the run.
        store: the data.
        place: of this worker.
        adapter: folder of an adapter, or its URI in a checkpoint of the sweep; None measures the untouched model.

    Raises:
        UserError: it is no causal model.
    """
    began = time.perf_counter()
    folder = materialize(cfg.model, Cache.of(cfg.cache, cfg.cluster.node_cache))
    tokenizer = load_tokenizer(folder, cfg.model)
    facts: dict[str, Any] = {"dtype": _name(precision(cfg.model.precision, on_gpu=cfg.gpus_per_worker > 0))}

    def adapted(base: Any) -> Any:
        whole = cfg.method.kind == "full"
        facts["parameters"] = parameter_count(base)
        facts["loader"] = loader_of(base, folder, cfg.model, whole=whole)
        return base if adapter is None else _with_adapter(cfg, base, _here(cfg, adapter), folder)

    answers: list[dict[str, str]] = []
    unanswered = None
    with measured_model(cfg, folder, adapted) as (model, start_afresh):
        if adapter is None:  # which is before the first trial
            check_causal(model, store, tokenizer.pad_token_id)
        fit_by_rows(model, store.split("validation"), tokenizer.pad_token_id, start_afresh=start_afresh)
        facts |= _losses(cfg, store, place, model, tokenizer.pad_token_id)
        try:
            answers = _answers(cfg, store, place, model, tokenizer, start_afresh)
        except UserError as error:  # on every worker
            if adapter is None and not isinstance(error, NoRoom):
                raise
            unanswered = str(error)  # the loss is still worth to be known
    match = exact_match([a["answer"] for a in answers], [a["expected"] for a in answers]) if answers else None
    if place.rank == 0:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
        (place.folder / ANSWERS).write_text(lines, encoding="utf-8")
    facts |= {
        "unanswered": unanswered,
        "exact_match": match,
        "exact_match_rows": len(answers),
        "exact_match_interval": None if match is None else wilson(round(match * len(answers)), len(answers)),
    }
    place.report(facts | {"measuring_seconds": time.perf_counter() - began})


def _with_adapter(cfg: RunConfig, base: Any, adapter: Path, folder: Path) -> Any:
    method = method_for(cfg.method)
    model = method.load(base, adapter, folder)
    # merged it answers faster; 16 bits or fewer would round the update away, and parts of weights cannot be merged
    exact = cfg.quantization.kind is Quantization.none and model.dtype is torch.float32
    return method.merge(model) if method.mergeable and exact and not divides(cfg) else model


def _losses(cfg: RunConfig, store: TokenStore, place: Place, model: Any, pad_id: int) -> dict[str, Any]:
    """The figures of the loss: over the rows of a trial's validations, as these take them, and over more of them."""
    split, asked = store.split("validation"), cfg.evaluation
    of_trials = rows_measured(asked.loss_rows, len(split))
    count = max(of_trials, rows_measured(asked.final_rows, len(split)))
    losses_N2 = torch.cat(
        [
            row_losses(
                model,
                split,
                rows,
                batch=cfg.training.micro_batch,
                pad_id=pad_id,
                rank=place.rank,
                workers=place.workers,
            )
            for rows in (range(of_trials), range(of_trials, count))
            if rows
        ]
    )
    return {
        "eval_loss": mean_loss(losses_N2),
        "eval_loss_rows": count,
        "eval_loss_interval": loss_interval(*losses_N2.T.numpy()),
        "trial_loss": mean_loss(losses_N2[:of_trials]),
        "arithmetic": _arithmetic(cfg),
    }


def _arithmetic(cfg: RunConfig) -> str:
    """The number format whose rounding a loss has: the coarsest that the model computes in."""
    kind, formats = cfg.quantization.kind, [cfg.model.precision]
    if kind is Quantization.int8:
        return "int8"
    if kind is not Quantization.none and cfg.quantization.compute is not Precision.auto:
        formats.append(cfg.quantization.compute)
    dtypes = [precision(asked, on_gpu=cfg.gpus_per_worker > 0) for asked in formats]
    return _name(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _here(cfg: RunConfig, adapter: str) -> Path:
    if storage.local_path(adapter) is not None:
        return Path(adapter)
    checkpoint, _, name = adapter.rpartition("/")
    return WorkingCopy.of(str(cfg.output), cfg.cluster.node_cache).here(checkpoint) / name


def _answers(
    cfg: RunConfig,
    store: TokenStore,
    place: Place,
    model: Any,
    tokenizer: Any,
    start_afresh: Callable[[], None] | None,
) -> list[dict[str, str]]:
    """Prompt, expected and given answer of test rows, a sample of those that have one to compare, on every worker."""
    rows = store.answered(cfg.evaluation.generate_rows)
    if not rows:
        return []
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    expected = [row["input_ids"][row["prompt_length"] :][: row["answer_length"]] for row in rows]
    stop_ids = stops(model, tokenizer, store.stop_ids, expected)
    given = answer(
        model,
        tokenizer,
        prompts,
        stop_ids=stop_ids,
        batch=cfg.evaluation.generate_batch,
        max_new_tokens=cfg.evaluation.max_new_tokens,
        within=[sum(token in stop_ids for token in ids) for ids in expected],
        group=Group(place.rank, place.workers, start_afresh),
    )
    return [
        {"prompt": tokenizer.decode(prompt), "expected": row["answer"], "answer": text}
        for prompt, row, text in zip(prompts, rows, given, strict=True)
    ]
