"""The best configurations are trained again with other seeds, so that luck does not win.

A run that confirms is a trial of its own in the journal, named after the trial whose parameters it has and its seed
(``0003-s1``). It trains to its full length: no scheduler stops it, no budget counts it and the study is not told of it.
"""

from __future__ import annotations

import math
import queue
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from raytune_lora.config.schema import RunConfig
from raytune_lora.config.search import ConfirmConfig
from raytune_lora.data.store import TokenStore
from raytune_lora.training.board import Report
from raytune_lora.training.failures import Ended, classify, halting, not_its_own
from raytune_lora.training.place import SAVE_AND_STOP, STOP
from raytune_lora.training.task import TaskFailed
from raytune_lora.tuning.disk import Quota
from raytune_lora.tuning.isolated import train
from raytune_lora.tuning.space import apply
from raytune_lora.tuning.trials import COMPLETED, CONFIRM, Journal, Record, Trial
from raytune_lora.working_copy import WorkingCopy

SEED = "training.seed"
NOISE = 0.05  # p from which on a difference may be noise


def best_configurations(record: Record, top: int) -> list[Trial]:
    """The trials of the search that were trained to their end and have the lowest losses, the best first."""
    able = [trial for trial in record.searched if trial.status == COMPLETED and trial.eval_loss is not None]
    return sorted(able, key=lambda trial: (trial.eval_loss, trial.trial_id))[:top]


def planned(record: Record, cfg: ConfirmConfig, seed: int) -> list[Trial]:
    """The runs that have not ended yet, in the order in which they are started.

    Args:
        record: of a sweep whose search is over.
        cfg: how many configurations, and runs of each.
        seed: of the search's trials.
    """
    runs = []
    for trial in best_configurations(record, cfg.top):
        first = trial.params.get(SEED, seed)
        for other in range(first + 1, first + cfg.seeds):
            name = f"{trial.trial_id}-s{other}"
            fresh = Trial(name, {**trial.params, SEED: other}, confirms=trial.trial_id)
            runs.append(record.trials.get(name, fresh))
    return [run for run in runs if not run.ended]


def train_runs(
    runs: Sequence[Trial],
    journal: Journal,
    board: Any,
    cfg: RunConfig,
    store: TokenStore,
    trials: Path,
    *,
    at_once: int,
) -> None:
    """Train the runs and record what they do.

    Args:
        runs: as ``planned`` gives them; one that was interrupted goes on from its checkpoint.
        journal: of the sweep.
        board: of the pool whose groups train.
        cfg: of the sweep, without the parameters.
        store: the data.
        trials: the folder of all trials.
        at_once: how many at a time.
    """
    news: queue.SimpleQueue[tuple[Trial, Report | Ended | None]] = queue.SimpleQueue()

    def follow(run: Trial) -> None:
        news.put((run, None))
        try:
            for report in train(board, run.trial_id, apply(cfg, run.params), store, trials):
                news.put((run, report))
            news.put((run, Ended(COMPLETED)))
        except TaskFailed as failure:
            news.put((run, failure.ended))
        except Exception as error:
            news.put((run, not_its_own(classify(error))))

    with ThreadPoolExecutor(at_once) as followers:
        for run in runs:
            followers.submit(follow, run)
        copy = WorkingCopy.at(cfg.output, cfg.cluster.node_cache, trials)
        try:
            _record(news, len(runs), journal, cfg.workers * cfg.gpus_per_worker, Quota(cfg.disk, copy))
        except BaseException as error:  # interrupted: they go on when the sweep does
            followers.shutdown(wait=False, cancel_futures=True)
            how = SAVE_AND_STOP if isinstance(error, KeyboardInterrupt) else STOP
            ray.get([board.stop.remote(run.trial_id, how) for run in runs])
            raise


def _record(news: queue.SimpleQueue[Any], running: int, journal: Journal, gpus: int, quota: Quota) -> None:
    began: dict[str, float] = {}
    while running:
        run, what = news.get()
        name = run.trial_id
        if what is None:
            began[name] = time.monotonic()
            journal.append("trial_started", trial_id=name, params=run.params, confirms=run.confirms, gpus=gpus)
        elif isinstance(what, Ended):
            if (halt := halting(what.status, what.error)) is not None:
                raise halt
            running -= 1
            seconds = round(time.monotonic() - began[name], 3)
            journal.append("trial_ended", trial_id=name, status=what.status, error=what.error, seconds=seconds)
        else:
            journal.report(name, what)
            quota.keep(journal.record)


# -------------------------------------------------------------------------------------------------------- the verdict


def ranked(record: Record, confirmed: Sequence[str]) -> Iterator[str]:
    """The confirmed trials, the best first: by the mean of their runs' losses.

    A run's loss is that of its best checkpoint, the one that would be exported. A configuration with a run that did not
    come to its end comes after those without one: it holds only where it is lucky.
    """

    def rank(name: str) -> tuple[bool, float, str]:
        runs = record.runs(name)
        return any(run.status != COMPLETED for run in runs), statistics.fmean(_losses(runs)), name

    yield from sorted(confirmed, key=rank)


def verdict(record: Record, seed: int) -> dict[str, Any] | None:
    """What ``results.json`` says of the confirmation; None before it is done.

    The winner differs from the runner-up by more than noise where Welch's t-test says so (p < 0.05, two-sided). The
    first run of each is the one that the search chose for its low loss, so that both means are somewhat too low.

    Args:
        record: of the sweep.
        seed: of the search's trials.
    """
    if CONFIRM not in record.phases:
        return None
    names = list(ranked(record, record.phases[CONFIRM]["confirmed"]))
    configurations = [_configuration(record, name, seed) for name in names]
    p = welch(*(_losses(record.runs(name)) for name in names[:2])) if len(names) > 1 else None
    found = {
        "winner": names[0],
        "runner_up": names[1] if len(names) > 1 else None,
        "differs": None if p is None else p < NOISE,
        "p": p,
        "configurations": configurations,
    }
    return {**found, "words": _words(found)}


def _configuration(record: Record, name: str, seed: int) -> dict[str, Any]:
    runs, losses = record.runs(name), _losses(record.runs(name))
    return {
        "trial_id": name,
        "params": record.trials[name].params,
        "mean": statistics.fmean(losses),
        "standard_deviation": statistics.stdev(losses) if len(losses) > 1 else None,
        "runs": [
            {
                "trial_id": run.trial_id,
                "seed": run.params.get(SEED, seed),
                "status": run.status,
                "eval_loss": run.eval_loss if run.status == COMPLETED else None,
            }
            for run in runs
        ],
    }


def _losses(runs: Sequence[Trial]) -> list[float]:
    return [run.eval_loss for run in runs if run.status == COMPLETED and run.eval_loss is not None]


def _words(found: dict[str, Any]) -> str:
    first, *others = found["configurations"]
    text = f"configuration {found['winner']} has a mean loss of {_mean(first)}"
    if not others:
        return f"{text}; it is the only one that was confirmed"
    text += f", and {found['runner_up']}, the next, of {_mean(others[0])}: "
    if any(run["status"] != COMPLETED for run in others[0]["runs"]) and others[0]["mean"] <= first["mean"]:
        return f"{text}it comes after the first because not all of its runs came to their end"
    if found["p"] is None:
        return f"{text}with so few runs it cannot be said whether that is more than noise"
    p = f"Welch's t-test, p = {found['p']:.2g}"
    if found["differs"]:
        return f"{text}they differ by more than noise ({p})"
    return f"{text}they differ by no more than noise ({p}), and either may be the better one"


def _mean(configuration: dict[str, Any]) -> str:
    runs = sum(run["eval_loss"] is not None for run in configuration["runs"])
    deviation = configuration["standard_deviation"]
    spread = "" if deviation is None else f" ± {deviation:.4f}"
    return f"{configuration['mean']:.4f}{spread} ({runs} run{'s' if runs > 1 else ''})"


def welch(a: Sequence[float], b: Sequence[float]) -> float | None:
    """The two-sided p of Welch's t-test that two samples have the same mean; None where one has less than two values.

    Welch 1947, "The generalization of Student's problem when several different population variances are involved",
    Biometrika 34: t = (mean a - mean b) / sqrt(u + v), u = var a / n a and v = var b / n b, against Student's t with
    (u + v)^2 / (u^2 / (n a - 1) + v^2 / (n b - 1)) degrees of freedom (Satterthwaite 1946).
    """
    from scipy.special import stdtr  # type: ignore[import-untyped]

    if min(len(a), len(b)) < 2:
        return None
    difference = abs(statistics.fmean(a) - statistics.fmean(b))
    u, v = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    if u + v == 0:
        return float(difference == 0)
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1))
    return float(2 * stdtr(freedom, -difference / math.sqrt(u + v)))
