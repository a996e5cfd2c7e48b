"""Measure a model, untouched or with an adapter: loss on the validation split, exact match on the test split."""

from __future__ import annotations

import json
import time
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
from raytune_lora.evaluation.generate import answer, exact_match, stops
from raytune_lora.models.loading import load_model, loader_of, precision
from raytune_lora.models.methods import method_for
from raytune_lora.models.sources import materialize
from raytune_lora.models.tokenizer import load_tokenizer
from raytune_lora.training.leaks import check_causal
from raytune_lora.training.metrics import mean_loss, row_losses, rows_measured
from raytune_lora.training.place import Place
from raytune_lora.working_copy import WorkingCopy


def measure(cfg: RunConfig, store: TokenStore, place: Place, *, adapter: str | None) -> None:
    """Report the loss and the exact match, and write each answer to ``answers.jsonl`` in the place's folder.

    Reported are ``eval_loss`` over ``eval_loss_rows`` rows, with its ``eval_loss_interval``; of these, ``trial_loss``
    over the rows that a trial is measured on, and in which ``arithmetic``; and ``exact_match`` over
    ``exact_match_rows`` rows, with its ``exact_match_interval``, all None where no rows are to be answered;
    ``unanswered``, why none could be of an adapter; and the base model's ``parameters``, ``dtype`` and ``loader``, the
    class of transformers that loads it, or None where none does alone. The workers share the rows; each holds the whole
    model.

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
    on_gpu = cfg.gpus_per_worker > 0
    model = load_model(folder, cfg.model, cfg.quantization, on_gpu=on_gpu)
    parameters, loader = model.num_parameters(), loader_of(model, folder, cfg.model, whole=cfg.method.kind == "full")
    if adapter is not None:
        method = method_for(cfg.method)
        model = method.load(model, _here(cfg, adapter), folder)
        # merged it answers faster; 16 bits or fewer would round the update away
        if method.mergeable and cfg.quantization.kind is Quantization.none and model.dtype is torch.float32:
            model = method.merge(model)
    if on_gpu:
        model = model.to(torch.device("cuda", torch.cuda.current_device()))
    if adapter is None:  # which is before the first trial
        check_causal(model, store, tokenizer.pad_token_id)
    facts = _losses(cfg, store, place, model, tokenizer.pad_token_id)
    answers: list[dict[str, str]] = []
    unanswered = None
    try:
        answers = _answers(cfg, store, place, model, tokenizer)
    except UserError as error:  # on every worker
        if adapter is None:
            raise
        unanswered = str(error)  # what was trained is still worth its loss
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
    seconds = time.perf_counter() - began
    facts |= {
        "parameters": parameters,
        "dtype": str(precision(cfg.model.precision, on_gpu=on_gpu)).removeprefix("torch."),
    }
    place.report(facts | {"loader": loader, "measuring_seconds": seconds})


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
    return str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch.")


def _here(cfg: RunConfig, adapter: str) -> Path:
    if storage.local_path(adapter) is not None:
        return Path(adapter)
    checkpoint, _, name = adapter.rpartition("/")
    return WorkingCopy.of(str(cfg.output), cfg.cluster.node_cache).here(checkpoint) / name


def _answers(cfg: RunConfig, store: TokenStore, place: Place, model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """Prompt, expected and given answer of test rows, a sample of those that have one to compare, on every worker."""
    rows = store.answered(cfg.evaluation.generate_rows)
    count = len(rows)
    if count == 0:
        return []
    mine = range(place.rank, count, place.workers)
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
    expected = [row["input_ids"][row["prompt_length"] :][: row["answer_length"]] for row in rows]
    stop_ids = stops(model, tokenizer, store.stop_ids, expected)
    given = answer(
        model,
        tokenizer,
        [prompts[i] for i in mine],
        stop_ids=stop_ids,
        batch=cfg.evaluation.generate_batch,
        max_new_tokens=cfg.evaluation.max_new_tokens,
        within=[sum(token in stop_ids for token in expected[i]) for i in mine],
        among=prompts,
    )
    parts: list[Any] = [dict(zip(mine, given, strict=True))]
    if place.workers > 1:
        parts = [None] * place.workers
        torch.distributed.all_gather_object(parts, dict(zip(mine, given, strict=True)))
    together = {i: text for part in parts for i, text in part.items()}
    return [
        {"prompt": tokenizer.decode(prompts[i]), "expected": rows[i]["answer"], "answer": together[i]}
        for i in range(count)
    ]
