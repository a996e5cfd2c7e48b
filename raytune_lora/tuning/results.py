"""``results.json`` and ``report.html``: what a sweep or run found, from its config and its record.

Schema, version 2. Null stands for what was not measured.

- ``schema_version``, ``kind`` (``sweep`` or ``run``), ``name``, ``version`` (of raytune-lora), ``created`` (UTC),
  ``state`` (``finished`` or ``interrupted``)
- ``model``: ``name``, ``parameters``; ``data``: ``name``, ``fingerprint``, ``rows`` by split, ``loss_rows``,
  ``final_rows`` and ``generate_rows`` as configured; ``search``: ``sampler``, ``scheduler``, ``trials``,
  ``concurrent`` (null for a run)
- ``baseline``: ``eval_loss`` (nats a token) on ``eval_loss_rows`` rows of the validation split; ``trial_loss``, on
  those of them that trials are measured on; ``exact_match`` (share) on ``exact_match_rows`` rows of the test split;
  ``eval_loss_interval`` and ``exact_match_interval``: 95 % intervals, low and high, as estimates for rows of that kind
- ``best``: the same, measured on the exported adapter, and null before it is; but ``trial_loss`` is what the trial
  reported. And ``trial_id``, ``params``, ``adapter`` (folder relative to the sweep's; null before it is exported),
  ``loading`` (Python that loads it, run in the sweep's folder; null before),
  ``mismatch`` (why it is not exported, where its loss is another than the trial reported: ``trial_id``, ``trial``,
  ``measured``, ``tolerance`` in nats a token, ``why``; else null), and ``segments``: the parameters that trained it in
  turn (``trial_id``, ``from_samples``, ``params``), one but for a child of a population; null without one
- ``ended_by``: the budget that ended the search: ``budget`` (its key after ``budget.``, or ``space`` where no point
  fulfils the constraints), ``why`` and ``remedy``; null
  where none did
- ``remarks``: sentences about the number of optimizer steps, where they are few or hold rows twice
- ``confirmation``: ``winner``, ``runner_up`` (null without one), ``differs`` (whether their means differ by more than
  noise; null where that cannot be said), ``p`` (of Welch's t-test), ``words``, and ``configurations``, the best first:
  ``trial_id``, ``params``, ``mean`` and ``standard_deviation`` of the runs' losses, ``runs`` (``trial_id``, ``seed``,
  ``status``, ``eval_loss``); null where none was asked for or it is not done
- ``trials``: ``trial_id``, ``confirms`` (the trial that it runs again with another seed, or null), ``status``
  (completed, stopped, failed, diverged, oom, lost, quota, or running or paused where interrupted), ``params``,
  ``parent`` (the trial from whose checkpoint it began, or null) and ``born`` (samples seen at that), ``resumed`` (how
  often it was taken up again after it had been stopped), ``eval_loss`` (the lowest), ``samples_seen``, ``seconds``,
  ``training_seconds``, ``parameters``, ``error``, ``log`` (folder relative to the sweep's), ``curve``,
  ``peak_memory_bytes`` (of the first worker), ``micro_batch`` (smaller than the config's where memory ran out),
  ``retries`` (new attempts, after memory ran out or a worker or machine was lost or about to be)
- ``examples``: ``prompt``, ``expected``, ``base``, ``tuned``; ``importance`` by parameter;
  ``refused``: by constraint, how many proposals broke it, none of them a trial;
  ``pareto``: with several objectives, the trials that none beats in all of them, the lowest loss first
- ``seconds``: ``total``, at work in all sittings, and each phase
"""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from raytune_lora import __version__
from raytune_lora.artifacts import write_json
from raytune_lora.config.schema import SweepConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.evaluation import ANSWERS
from raytune_lora.models.sources import display_name
from raytune_lora.report import render
from raytune_lora.training import plan
from raytune_lora.training.place import LOGS
from raytune_lora.tuning.budget import remedy
from raytune_lora.tuning.confirm import verdict
from raytune_lora.tuning.folder import SweepFolder
from raytune_lora.tuning.samplers import chosen
from raytune_lora.tuning.space import at_bounds
from raytune_lora.tuning.trials import BASELINE as BASELINE
from raytune_lora.tuning.trials import BEST as BEST
from raytune_lora.tuning.trials import TRIALS as TRIALS
from raytune_lora.tuning.trials import Record, Trial

SCHEMA_VERSION = 2


def write_results(
    folder: SweepFolder, cfg: SweepConfig, store: TokenStore, record: Record, *, kind: str, learned: dict[str, Any]
) -> dict[str, Any]:
    """Write both files and return what ``results.json`` says."""
    results = _results(folder, cfg, store, record, kind, learned)
    write_json(folder.results, results)
    page = folder.report.with_suffix(".tmp")
    page.write_text(render(results), encoding="utf-8", errors="backslashreplace")
    page.replace(folder.report)
    return results


def _results(
    folder: SweepFolder, cfg: SweepConfig, store: TokenStore, record: Record, kind: str, learned: dict[str, Any]
) -> dict[str, Any]:
    phases = {name: phase["seconds"] for name, phase in record.phases.items()}
    if TRIALS in phases and record.began is not None:  # the trials of earlier sittings are among them
        phases[TRIALS] = max(phases[TRIALS], round(record.phases[TRIALS]["clock"] - record.began, 3))
    search = {
        "sampler": chosen(cfg).value,
        "scheduler": cfg.scheduler.kind.value,
        "trials": cfg.search.trials,
        "concurrent": cfg.search.concurrent,
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "name": folder.name,
        "version": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "state": "finished" if record.finished else "interrupted",
        "model": {"name": display_name(cfg.model), "parameters": record.phases.get(BASELINE, {}).get("parameters")},
        "data": {
            "name": cfg.data.kind,
            "fingerprint": store.manifest["fingerprint"],
            "rows": store.rows,
            "loss_rows": cfg.evaluation.loss_rows,
            "final_rows": cfg.evaluation.final_rows,
            "generate_rows": cfg.evaluation.generate_rows,
        },
        "search": search if kind == "sweep" else None,
        "baseline": _measured(record.phases.get(BASELINE, {})),
        "best": _best(folder, record),
        "ended_by": record.ended_by and {**record.ended_by, "remedy": remedy(record.ended_by["budget"])},
        "remarks": remarks(cfg, store.rows["train"], searching=kind == "sweep"),
        "confirmation": verdict(record, cfg.training.seed),
        "trials": [_trial(folder, record.trials[name]) for name in sorted(record.trials)],
        "importance": learned.get("importance", {}),
        "pareto": learned.get("pareto", []),
        "refused": learned.get("refused", {}),
        "examples": _examples(folder, cfg.evaluation.examples) if BEST in record.phases else [],
        "seconds": {"total": round(record.clock, 3), **phases},
    }


def remarks(cfg: SweepConfig, rows: int, *, searching: bool) -> list[str]:
    """What is unusual about the number of steps, in a search of the trial whose steps are the largest."""
    trials = at_bounds(cfg) if searching else [cfg]
    return plan.remarks(max(trials, key=lambda trial: trial.training.global_batch), rows)


def _measured(phase: dict[str, Any]) -> dict[str, Any]:
    return {
        "eval_loss": _number(phase.get("eval_loss")),
        "eval_loss_rows": phase.get("eval_loss_rows"),
        "eval_loss_interval": phase.get("eval_loss_interval"),
        "trial_loss": _number(phase.get("trial_loss")),
        "exact_match": _number(phase.get("exact_match")),
        "exact_match_rows": phase.get("exact_match_rows"),
        "exact_match_interval": phase.get("exact_match_interval"),
    }


def _best(folder: SweepFolder, record: Record) -> dict[str, Any] | None:
    trial = record.best()
    if trial is None:
        return None
    return {
        **_measured(record.phases.get(BEST, {})),
        "trial_id": trial.trial_id,
        "params": trial.params,
        "trial_loss": _number(trial.eval_loss),
        "mismatch": record.mismatch and {**record.mismatch, "measured": _number(record.mismatch["measured"])},
        "adapter": str((folder.best / "adapter").relative_to(folder.path)) if BEST in record.phases else None,
        "loading": record.phases.get(BEST, {}).get("loading"),
        "segments": [
            {"trial_id": part.trial_id, "from_samples": part.born, "params": part.params}
            for part in record.lineage(trial)
        ],
    }


def _trial(folder: SweepFolder, trial: Trial) -> dict[str, Any]:
    return {
        "trial_id": trial.trial_id,
        "confirms": trial.confirms,
        "status": trial.status,
        "params": trial.params,
        "parent": trial.parent,
        "born": trial.born,
        "resumed": trial.resumed,
        "eval_loss": _number(trial.eval_loss),
        "samples_seen": trial.samples_seen,
        "seconds": round(trial.seconds, 3),
        "training_seconds": round(trial.training_seconds, 3),
        "error": trial.error,
        "log": str((folder.trials / trial.trial_id / LOGS).relative_to(folder.path)),
        "curve": [{key: _number(value) for key, value in point.items()} for point in trial.curve],
        "parameters": {"trainable": trial.trainable_parameters},
        "peak_memory_bytes": trial.peak_memory_bytes,
        "micro_batch": trial.micro_batch,
        "retries": trial.retries,
    }


def _examples(folder: SweepFolder, count: int) -> list[dict[str, str]]:
    base, tuned = (_read_answers(folder.phase(name) / ANSWERS) for name in (BASELINE, BEST))
    return [
        {"prompt": b["prompt"], "expected": b["expected"], "base": b["answer"], "tuned": t["answer"]}
        for b, t in zip(base[:count], tuned[:count], strict=False)
    ]


def _read_answers(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
