"""How long a trial waits for its first step, and a group for its next trial: ``python jobs/bench/trial_start.py``.

Sweeps of the tiny model with one trial at a time, each by ``run_sweep`` as a user starts it: with resident worker
groups, and with a fresh group for each trial. Every second trial is stopped half way. From the moment that the searcher
proposed a trial to the end of its first step, and from the end of training or the decision to stop to the group's
asking for the next trial, all parts are named. The exit status is 1 where with resident groups a trial needs more than
``--over`` seconds up to its first step beside building the model and that step, or more than ``--whole`` in all.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import ray
from common import Measured, TimedTraining
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raytune_lora.training.board import Board
from raytune_lora.training.driver import Pool
from raytune_lora.training.place import STOP
from raytune_lora.training.task import Task, TaskFailed, stream
from raytune_lora.tuning import job, sweep
from raytune_lora.tuning.space import apply

START = {  # part: from which mark to which
    "Tune starts the trial": ("proposed", "started"),
    "task to the board": ("started", "submitted"),
    "wait for a group": ("submitted", "taken"),
    "task to the worker": ("taken", "received"),
    "imports of the worker": ("received", "function"),
    "process group and config": ("function", "load"),
    "base model": ("load", "loaded"),
    "adapter": ("loaded", "adapted"),
    "trainer": ("adapted", "train"),
    "engine": ("train", "begin"),
    "first step": ("begin", "first"),
}
BUILDING = ("base model", "adapter")
STOPPED = {
    "the board hears of it": ("decided", "told"),
    "the step at hand": ("told", "heard"),
    "training returns": ("heard", "returned"),
    "garbage and the board": ("returned", "free"),
}
ENDED = {"training returns": ("last step", "returned"), "garbage and the board": ("returned", "free")}
FILE = "marks.json"


# ------------------------------------------------------------------------------------------------- a sweep with a clock


class TimedBoard(Board):
    """The board, with the times of what happens on it."""

    def __init__(self) -> None:
        super().__init__()
        self._times: dict[str, dict[str, float]] = {}
        self._last: dict[str, str] = {}  # each group's task

    async def submit(self, task: Task, again: bool = False) -> None:
        self._times.setdefault(task.name, {})["submitted"] = time.time()
        await super().submit(task, again)

    async def take(self, group: str, number: int) -> Task | None:
        if group in self._last:
            self._times[self._last[group]].setdefault("free", time.time())
        task = await super().take(group, number)
        if task is not None:
            self._times.setdefault(task.name, {}).setdefault("taken", time.time())
            self._last[group] = task.name
        return task

    async def group_ended(self, group: str) -> None:
        """A group that does one task is free, for what is left of it, when it is gone."""
        if group in self._last:
            self._times[self._last[group]].setdefault("free", time.time())

    async def stop(self, name: str, how: int = STOP) -> None:
        self._times.setdefault(name, {}).setdefault("told", time.time())
        await super().stop(name, how)

    async def times(self) -> dict[str, dict[str, float]]:
        """Unix times, by task."""
        return self._times


class TimedPool(Pool):
    """A pool with such a board, which is asked at the end."""

    found: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.board = ray.remote(num_cpus=0)(TimedBoard).remote()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        TimedPool.found = ray.get(self.board.times.remote())

    def _run_group(self, group: str, slot: int) -> None:
        super()._run_group(group, slot)
        ray.get(self.board.group_ended.remote(group))


class KeepingTraining(TimedTraining):
    """Leaves what it measured in the trial's folder, also of a trial that was stopped."""

    def keep(self, measured: Measured, place: Any) -> None:
        path = place.folder / FILE
        path.write_text(json.dumps({**measured.marks, "ends": measured.ends}))


def timed_trial(proposal: dict[str, Any], *, board: Any, cfg: Any, store: Any, trials: Path) -> None:
    """``isolated.run_trial`` with a clock."""
    from ray import tune

    started = time.time()
    name = proposal["trial_id"]
    (trials / name).mkdir(parents=True, exist_ok=True)
    (trials / name / "started.json").write_text(json.dumps({"started": started}))
    task = Task(name, KeepingTraining(), apply(cfg, proposal["params"]), store, trials / name, steps=True)
    try:
        for report in stream(board, task):
            tune.report(report)
    except TaskFailed as failure:
        tune.report({"status": failure.ended.status, "error": failure.ended.error})


class EverySecond(FIFOScheduler):
    """Stops every second trial half way."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self._total = total
        self.decided: dict[str, float] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["trial_id"]
        if int(name) % 2 and result.get("samples_seen", 0) >= self._total / 2 and not result.get("last"):
            self.decided[name] = time.time()
            return TrialScheduler.STOP
        return TrialScheduler.CONTINUE


def measure(resident: bool, args: argparse.Namespace) -> list[dict[str, float]]:
    """One sweep; the Unix times of each of its trials."""
    from raytune_lora.config.compose import compose

    proposed: dict[str, float] = {}
    suggest = sweep._Searcher.suggest

    def timed_suggest(self: Any, trial_id: str) -> Any:
        found = suggest(self, trial_id)
        if isinstance(found, dict):
            proposed[found["trial_id"]] = time.time()
        return found

    total = 8 * args.steps
    scheduler = EverySecond(total)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as patched:
        folder = Path(temporary) / "sweep"
        settings = [
            *(
                "experiment=tiny",
                f"output={folder}",
                f"training.max_steps={args.steps}",
                f"search.trials={args.trials}",
            ),
            *("search.concurrent=1", f"evaluation.every={total // 4}", "evaluation.generate_rows=0"),
            f"cluster.reuse_workers={str(resident).lower()}",
        ]
        patched.enter_context(patch.object(sweep._Searcher, "suggest", timed_suggest))
        patched.enter_context(patch.object(sweep, "run_trial", timed_trial))
        patched.enter_context(patch.object(sweep, "build", lambda *_, **__: scheduler))
        patched.enter_context(patch.object(job, "Pool", TimedPool))
        sweep.run_sweep(compose([*settings, *args.overrides]))
        events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        ended = {event["trial_id"]: event["time"] for event in events if event["event"] == "trial_ended"}
        found = []
        for name in sorted(ended):
            trial = folder / "trials" / name
            marks = json.loads((trial / FILE).read_text()) | json.loads((trial / "started.json").read_text())
            marks |= TimedPool.found[name] | {"proposed": proposed[name], "ended": ended[name]}
            found.append(marks | ({"decided": scheduler.decided[name]} if name in scheduler.decided else {}))
    return found


# ----------------------------------------------------------------------------------------------------------- the answer


def durations(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the trials: the parts up to the first step, those of an end and of a stop, and sums of them."""
    starts: list[dict[str, float]] = []
    ends: list[dict[str, float]] = []
    stops: list[dict[str, float]] = []
    sums: list[dict[str, float]] = []
    for trial in trials:
        steps = trial["ends"]
        marks = trial | {"first": steps[0], "last step": steps[-1]}
        parts = {part: marks[b] - marks[a] for part, (a, b) in START.items()}
        starts.append(parts)
        step = statistics.median(b - a for a, b in itertools.pairwise(steps))
        building = sum(parts[name] for name in BUILDING)
        total = {"to the first step": sum(parts.values()), "building the model": building, "a step": step}
        total["over building and step"] = total["to the first step"] - building - step
        if "decided" in marks:
            # the step at whose end the worker heard, or the last one, which was done when the stop was decided
            marks["heard"] = min(max(marks["told"], steps[-1]), marks["returned"])
            stops.append({part: marks[b] - marks[a] for part, (a, b) in STOPPED.items()})
            total["from stopped to free"] = marks["free"] - marks["decided"]
        else:
            ends.append({part: marks[b] - marks[a] for part, (a, b) in ENDED.items()})
            total["whole trial"] = marks["ended"] - marks["proposed"]
            total["whole trial, to free"] = marks["free"] - marks["proposed"]
        sums.append(total)
    groups = {"start": starts, "end": ends, "stop": stops, "sums": sums}
    return {name: middle(rows) for name, rows in groups.items()}


def middle(rows: list[dict[str, float]]) -> dict[str, float]:
    """The median of each part, over the rows that have it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: statistics.median(row[name] for row in rows if name in row) for name in names}


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    titles = {
        "start": "from proposed to the end of the first step",
        "end": "from the last step to the group's asking for more",
        "stop": "from the decision to stop to the group's asking for more",
        "sums": "in all",
    }
    print(f"{'seconds, medians':38}" + "".join(f"{side:>12}" for side in found))
    for group, title in titles.items():
        print(f"\n{title}")
        for part in next(iter(found.values()))[group]:
            print(f"  {part:36}" + "".join(f"{of[group][part]:12.3f}" for of in found.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the config")
    parser.add_argument("--trials", type=int, default=8, help="of each sweep; the first one does not count")
    parser.add_argument("--fresh", type=int, default=4, help="trials with fresh groups; 0 leaves them out")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--over", type=float, default=0.5, help="seconds")
    parser.add_argument("--whole", type=float, default=2.0, help="seconds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    runs = {"resident": measure(True, args)}
    if args.fresh:
        runs["fresh"] = measure(False, argparse.Namespace(**{**vars(args), "trials": args.fresh}))
    found = {side: durations(trials[1:]) for side, trials in runs.items()}
    show(found)
    sums = found["resident"]["sums"]
    within = sums["over building and step"] <= args.over and sums["whole trial"] <= args.whole
    print(
        f"\nresident: {sums['over building and step']:.2f} s over building the model (at most {args.over:g}), ", end=""
    )
    print(f"a trial of {args.steps} steps in {sums['whole trial']:.2f} s (at most {args.whole:g}): ", end="")
    print("within" if within else "ABOVE", "the limits")
    if args.json:
        args.json.write_text(json.dumps({"within": within, "medians": found, "runs": runs}, indent=1) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
