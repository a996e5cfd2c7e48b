"""How much each search finds for its samples: ``python jobs/bench/search_quality.py --json FILE --html FILE``.

Searches on surrogates of fine-tuning (``surrogates.py``), in virtual time and with the sweep's own searcher, samplers
and ASHA. Regret is how far the best trial's parameters, trained to where its lowest measured loss was, lie above the
optimum, both without noise; the budget counts samples trained on, those of stopped trials included. The exit status is
1 where GP with ASHA, a sweep's default, needs more than ``--share`` of random search's samples to reach its final
regret on some task.
"""

from __future__ import annotations

import argparse
import copy
import functools
import heapq
import html
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from surrogates import QUICKSTART, Losses, Params, Surrogate, place, tasks

METHODS = {  # sampler, scheduler, and other overrides
    "grid": ("grid", "none"),
    "random": ("random", "none"),
    "TPE": ("tpe", "none"),
    "TPE + ASHA": ("tpe", "asha"),
    "TPE + ASHA, resumed": ("tpe", "asha", "scheduler.resume_stopped=true"),
    "GP": ("gp", "none"),
    "GP + ASHA": ("gp", "asha"),
}
BASE, OURS = "random", "GP + ASHA"
FRACTIONS = (0.1, 0.2, 0.5, 1.0)  # of the budget
_STEPS = 200  # of the budget, for the curves
_SPEED = 0.1  # sigma of the logarithm of the trials' speeds, so that they do not report in step

Trace = list[tuple[int, float]]  # samples trained on by all trials, and the regret from there on


# ----------------------------------------------------------------------------------------------------------- one search


@dataclass
class Running:
    """A trial in virtual time."""

    proposal: str  # its name to the searcher
    name: str
    params: Params
    losses: Losses  # that it measures, if it is not stopped
    pace: float  # time from one validation to the next
    done: int = 0  # validations


class Play:
    """One search on a surrogate, in virtual time, by the sweep's own parts."""

    def __init__(self, task: Surrogate, optimum: float, cfg: Any) -> None:
        import optuna

        from raytune_lora.tuning.scheduler import build, turns
        from raytune_lora.tuning.search import StudySearcher
        from raytune_lora.tuning.trials import Record

        self._task, self._optimum, self._cfg = task, optimum, cfg
        self._record = Record()
        self._study = optuna.create_study(directions=["minimize"])
        when = {"total": task.total, "every": task.every}
        self._scheduler = build(cfg.scheduler, record=self._record, **when)
        whose = turns(cfg, self._scheduler, self._record, **when)
        self._searcher = StudySearcher(self._study, cfg.space, cfg, [], turns=whose)
        self._stopped: dict[str, Running] = {}
        self.trace: Trace = []
        self._spent = 0  # samples
        self._proposed = 0
        self._draw = random.Random(cfg.search.seed)

    def run(self, budget: int) -> Trace:
        """Search until that many samples have been trained on."""
        running: list[tuple[float, int, Running]] = []  # by the time of the next validation
        started, now = 0, 0.0
        while self._spent < budget:
            while len(running) < self._cfg.search.concurrent and (trial := self._start()) is not None:
                heapq.heappush(running, (now + trial.pace, started, trial))
                started += 1
            if not running:
                break
            now, number, trial = heapq.heappop(running)
            if self._validate(trial):
                heapq.heappush(running, (now + trial.pace, number, trial))
        return self.trace

    def _start(self) -> Running | None:
        self._proposed += 1
        proposal = self._searcher.suggest(str(self._proposed))
        if not isinstance(proposal, dict):
            return None
        name, params = proposal["trial_id"], proposal["params"]
        self._record.add({"event": "trial_started", "trial_id": name, "params": params})
        if name in self._stopped:
            return replace(self._stopped.pop(name), proposal=str(self._proposed))
        losses = self._task.measured(params, random.Random(f"{self._cfg.search.seed}/{name}"))
        return Running(str(self._proposed), name, params, losses, math.exp(self._draw.gauss(0, _SPEED)))

    def _validate(self, trial: Running) -> bool:
        """Take in the trial's next validation; whether it goes on."""
        from ray.tune.schedulers import TrialScheduler

        from raytune_lora.training.failures import DIVERGED, STOPPED
        from raytune_lora.tuning.told import report
        from raytune_lora.tuning.trials import COMPLETED, MEASURED

        loss, seen = float(trial.losses[trial.done]), self._task.samples[trial.done]
        trial.done += 1
        self._spent += self._task.every
        if not math.isfinite(loss):
            return self._end(trial, DIVERGED)
        last = trial.done == len(trial.losses)
        measured = {"samples_seen": seen, "eval_loss": loss, "train_loss": loss, "checkpoint": str(trial.done)}
        event = dict.fromkeys(MEASURED, 0) | measured | {"last": last}
        self._record.add({"event": "trial_result", "trial_id": trial.name, **event})
        report(self._study, self._record.trials[trial.name])
        self._note()
        live: Any = SimpleNamespace(trial_id=trial.name, config={"trial_id": trial.name})
        none: Any = None
        decision = self._scheduler.on_trial_result(none, live, event)
        if last or decision == TrialScheduler.STOP:
            return self._end(trial, COMPLETED if last else STOPPED)
        return True

    def _end(self, trial: Running, status: str) -> bool:
        from raytune_lora.tuning.told import tell

        self._record.add(
            {"event": "trial_ended", "trial_id": trial.name, "status": status, "error": None, "seconds": 0.0}
        )
        tell(self._study, self._record.trials[trial.name])
        self._searcher.on_trial_complete(trial.proposal)
        self._stopped[trial.name] = trial
        self._note()
        return False

    def _note(self) -> None:
        """The regret of the trial that leads."""
        best = self._record.leader
        if best is not None and best.checkpoint is not None:
            regret = float(self._task.expected(best.params)[int(best.checkpoint) - 1]) - self._optimum
            if not self.trace or self.trace[-1][1] != regret:
                self.trace.append((self._spent, regret))


def config(method: str, task: Surrogate, seed: int, args: argparse.Namespace) -> Any:
    """Of one search; a grid's has a step in each dimension."""
    cfg = copy.deepcopy(_composed(method, tuple(args.overrides)))
    budget = args.trials * task.total // task.every  # a trial has one validation at least
    cfg.search.seed, cfg.search.concurrent, cfg.search.trials = seed, args.concurrent, budget
    cfg.space = task.space
    if METHODS[method][0] == "grid":
        from raytune_lora.tuning.space import points

        cfg.space = lattice(task)
        cfg.search.trials = sum(1 for _ in points(cfg.space, cfg))
    return cfg


@functools.cache
def _composed(method: str, overrides: tuple[str, ...]) -> Any:
    from raytune_lora.config.compose import compose

    sampler, scheduler, *others = METHODS[method]
    settings = [f"search={sampler}", f"scheduler={scheduler}", *others]
    return compose(["model=tiny", "data=fake", *settings, *overrides])


def lattice(task: Surrogate) -> dict[str, Any]:
    """The space with few values of each dimension, 64 points of four: what one asks of a grid."""
    from raytune_lora.config.search import DimensionConfig, DimensionKind

    found = {}
    for name, d in task.space.items():
        few = 2 if d.kind is DimensionKind.categorical or d.step else 4
        values = [place(d, (n + 0.5) / few) for n in range(few)]
        found[name] = DimensionConfig(
            d.key, DimensionKind.categorical, choices=list(dict.fromkeys(values)), multiple_of=d.multiple_of
        )
    return found


# --------------------------------------------------------------------------------------------------------- all searches

_known: dict[str, tuple[Surrogate, float]] = {}  # of this process: the tasks and their optima


def measure(job: tuple[str, str, int, argparse.Namespace]) -> tuple[str, str, int, list[float], float]:
    """One search: task, method, seed, the regret at each step of the budget, and the seconds it took."""
    name, method, seed, args = job
    if name not in _known:
        task = tasks([name], args.curves)[0]
        _known[name] = task, task.optimum()
    task, optimum = _known[name]
    began = time.perf_counter()
    budget = args.trials * task.total
    trace = Play(task, optimum, config(method, task, seed, args)).run(budget)
    return name, method, seed, sampled(trace, budget), time.perf_counter() - began


def sampled(trace: Trace, budget: int) -> list[float]:
    """The regret at each step of the budget; infinite before the first validation."""
    found, at, regret = [], 0, math.inf
    for step in range(1, _STEPS + 1):
        while at < len(trace) and trace[at][0] <= step * budget / _STEPS:
            regret = max(0.0, trace[at][1])
            at += 1
        found.append(regret)
    return found


def prepare() -> None:
    """One thread a process, and nothing said of studies."""
    import optuna
    import torch

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    torch.set_num_threads(1)


def measure_all(names: list[str], args: argparse.Namespace) -> dict[str, dict[str, list[list[float]]]]:
    """The regrets of each seed, by task and method."""
    slowest = [method for method in reversed(METHODS) if method in args.methods]
    jobs = [(n, m, seed, args) for m in slowest for n in names for seed in range(args.seeds)]
    found: dict[str, dict[str, list[list[float]]]] = {n: {m: [[]] * args.seeds for m in args.methods} for n in names}
    seconds: dict[str, float] = dict.fromkeys(args.methods, 0.0)
    os.environ["OMP_NUM_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(args.processes, prepare) as pool:
        for done, (name, method, seed, regrets, took) in enumerate(pool.imap_unordered(measure, jobs), 1):
            found[name][method][seed] = regrets
            seconds[method] += took
            if done % 50 == 0 or done == len(jobs):
                spent = ", ".join(f"{m} {s:.0f} s" for m, s in seconds.items())
                print(f"{done} of {len(jobs)} searches: {spent}", file=sys.stderr, flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------- the answer


def medians(regrets: list[list[float]]) -> list[float]:
    """Over the seeds, at each step of the budget."""
    return [statistics.median(step) for step in zip(*regrets, strict=True)]


def reached(curve: list[float], regret: float) -> float:
    """The fraction of the budget from which on the curve is at most the regret; infinite where it never stays there."""
    above = [step for step, value in enumerate(curve, 1) if value > regret]
    first = above[-1] + 1 if above else 1
    return first / _STEPS if first <= _STEPS else math.inf


def summarize(found: dict[str, dict[str, list[list[float]]]]) -> dict[str, dict[str, Any]]:
    """Of each task and method: the median regrets, and when random search's last one is reached."""
    answer: dict[str, dict[str, Any]] = {}
    for name, methods in found.items():
        curves = {method: medians(regrets) for method, regrets in methods.items()}
        answer[name] = {
            method: {
                "at": {str(f): curve[round(f * _STEPS) - 1] for f in FRACTIONS},
                "reaches": reached(curve, curves[BASE][-1]),
                "curve": curve,
            }
            for method, curve in curves.items()
        }
    return answer


def show(answer: dict[str, dict[str, Any]], args: argparse.Namespace) -> None:
    for name, methods in answer.items():
        print(f"\n{name}: median regret over {args.seeds} seeds, by share of {args.trials} trials' samples")
        print(f"{'':20}" + "".join(f"{f:>10g}" for f in FRACTIONS) + f"{'reaches random at':>20}")
        for method, of in methods.items():
            row = "".join(f"{of['at'][str(f)]:10.4f}" for f in FRACTIONS)
            print(f"{method:20}{row}{of['reaches']:20.3f}")


def page(answer: dict[str, dict[str, Any]], about: dict[str, str], args: argparse.Namespace) -> str:
    """A chart of each task."""
    from raytune_lora.report.charts import Line, curves

    parts = []
    for name, methods in answer.items():
        least = 1e-4  # a regret of nothing has no place on a logarithmic axis
        budget = args.trials * tasks([name], args.curves)[0].total
        lines = [
            Line(
                [(budget * step / _STEPS, max(least, v)) for step, v in enumerate(of["curve"], 1) if math.isfinite(v)],
                f"m{list(METHODS).index(method)}",
                method,
                "",
            )
            for method, of in sorted(methods.items(), key=lambda item: item[0] == OURS)
        ]
        reference = methods[BASE]["curve"][-1] or None
        chart = curves(lines, reference, 760, 380)
        parts.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(about[name])}</p>{chart}")
    colours = ("#999", "#555", "#2a7", "#37c", "#e90", "#a5c", "#c33")
    style = "".join(f".m{n}{{--ink:{colour}}}" for n, colour in enumerate(colours))
    legend = " ".join(f'<b class="m{n}">{html.escape(method)}</b>' for n, method in enumerate(METHODS))
    return f"""<!doctype html><meta charset="utf-8"><title>Search quality</title><style>
body{{font:14px system-ui;max-width:800px;margin:2em auto}} .tick{{font-size:11px;fill:#666}} .end{{text-anchor:end}}
.middle{{text-anchor:middle}} .grid{{stroke:#eee}} .axis{{stroke:#999}} b{{color:var(--ink);margin-right:1em}}
.reference{{stroke:#555;stroke-dasharray:4 4}} .curve polyline{{fill:none;stroke:var(--ink);stroke-width:2}}
.curve .reach{{stroke:transparent}} .curve circle{{fill:var(--ink)}} {style}</style>
<h1>Regret over samples</h1><p>The vertical axis is the median regret (loss above the optimum) of {args.seeds} seeds;
the dashed line is what random search ends with. {args.concurrent} trials at a time.</p><p>{legend}</p>{"".join(parts)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the searches' config: search.startup_trials=…, scheduler=…")
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--trials", type=int, default=64, help="the budget: the samples of that many whole trials")
    parser.add_argument("--concurrent", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", default=[], help="default: all")
    parser.add_argument("--share", type=float, default=0.2, help="most that GP with ASHA may need of random's samples")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--curves", type=Path, default=QUICKSTART, help="file of their curves")
    args = parser.parse_args()
    missing = {BASE, OURS} - set(args.methods)
    if missing:
        parser.error(f"--methods: {' and '.join(sorted(missing))} must be among them")
    chosen = tasks(args.tasks, args.curves)
    if not args.tasks and not args.curves.exists():
        print(f"there is no {args.curves.name}, and so no task of real trainings; quickstart_curves.py makes it")
    answer = summarize(measure_all([task.name for task in chosen], args))
    show(answer, args)
    worst = max(methods[OURS]["reaches"] for methods in answer.values())
    within = worst <= args.share
    print(f"\n{OURS} reaches random's final regret with {worst:.3f} of its samples at the worst: ", end="")
    print(f"{'within' if within else 'ABOVE'} the limit of {args.share:g}")
    settings = {key: getattr(args, key) for key in ("overrides", "seeds", "trials", "concurrent", "share")}
    if args.json:
        args.json.write_text(json.dumps({**settings, "within": within, "tasks": answer}, indent=1) + "\n")
    if args.html:
        args.html.write_text(page(answer, {task.name: task.about for task in chosen}, args))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
