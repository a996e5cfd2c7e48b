"""What a trial costs beside its training: ``python jobs/bench/search_scale.py --json FILE --trials 1000``.

A sweep of trials that train nothing: each reports a surrogate's learning curve (``surrogates.py``) at once. All else is
the sweep's own: Tune with a process for each trial at a time, the searcher and its study, the journal, the recorder and
ASHA. Times of trials come from the journal; the parts are measured in the driver, each without what it calls of the
others. With ``--alone`` Tune runs as many trials by itself. The exit status is 1 where a trial costs ``--limit``
milliseconds or more, or where with 10,000 trials the last tenth costs more than ``--growth`` times what the first
thousand do, the start of the processes aside.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import functools
import itertools
import json
import logging
import os
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from surrogates import lora_like

REPORTS = 4  # of a whole trial
TENTHS = 10
MIB = 2**20


# ------------------------------------------------------------------------------------------------------------ the sweep


def report_curve(proposal: dict[str, Any], *, board: Any, cfg: Any, store: Any, trials: Path) -> None:
    """A Tune trial that trains nothing. It has the signature of ``tuning.isolated.run_trial``."""
    from ray import tune

    from raytune_lora.tuning.trials import MEASURED

    losses = lora_like().measured(proposal["params"], random.Random(proposal["trial_id"]))
    for number in range(1, REPORTS + 1):
        loss = float(losses[number * len(losses) // REPORTS - 1])
        if loss != loss:
            tune.report({"status": "diverged", "error": "the loss is nan"})
            return
        measured = {"samples_seen": 100 * number, "eval_loss": loss, "train_loss": loss, "checkpoint": "none"}
        tune.report({**dict.fromkeys(MEASURED, 0), **measured, "last": number == REPORTS})


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The search part of a sweep, by its own function; what it cost."""
    import ray

    from raytune_lora.cluster import connect
    from raytune_lora.config.compose import compose
    from raytune_lora.data.store import TokenStore
    from raytune_lora.training.board import Board
    from raytune_lora.tuning import sweep
    from raytune_lora.tuning.budget import Budget
    from raytune_lora.tuning.constraints import Constraints
    from raytune_lora.tuning.folder import SweepFolder
    from raytune_lora.tuning.interrupt import Interrupts
    from raytune_lora.tuning.job import SWEEP, Job
    from raytune_lora.tuning.progress import Progress
    from raytune_lora.tuning.study import open_study
    from raytune_lora.tuning.trials import Journal

    rows = 100 * REPORTS
    settings = [f"search.trials={args.trials}", f"search.concurrent={args.concurrent}", "evaluation.every=100"]
    cfg = compose(
        ["model=tiny", "data=fake", "training.epochs=1", "training.global_batch=4", *settings, *args.overrides]
    )
    cfg.space = lora_like().space
    os.environ.update(connect.ENVIRONMENT)
    quiet: Any = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=args.concurrent, object_store_memory=128 * MIB, **quiet)
    with (folder / "lines").open("w") as lines, contextlib.redirect_stderr(lines):  # of each event, as off a terminal
        progress = Progress("scale", args.trials)
        store = TokenStore(folder / "store", {"rows": {"train": rows, "validation": 4}})
        clock = Clock()
        journal = Journal(folder / "journal.jsonl", clock.around("progress", progress.watch))
        job = Job(
            SWEEP, cfg, SweepFolder(folder), journal, progress, store, folder, Interrupts(print), Constraints(cfg)
        )
        pool: Any = SimpleNamespace(board=ray.remote(num_cpus=0)(Board).remote())
        job.pool = pool
        study = open_study(folder, cfg.search)
        budget = Budget(cfg.budget, journal, cfg.search.trials, print)
        before = resident()
        profiler = cProfile.Profile()
        profiling: Any = profiler if args.profile else contextlib.nullcontext()
        began, cpu = time.time(), time.process_time()
        with patch.object(sweep, "run_trial", report_curve), timed(clock), clock.measuring("Tune"), profiling:
            sweep._tune(job, study, [], budget)
        seconds, cpu = time.time() - began, time.process_time() - cpu
    ray.shutdown()
    if args.profile:
        profiler.dump_stats(args.profile)
    return {
        "trials": args.trials,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parts": dict(clock.seconds),
        "calls": dict(clock.calls),
        "memory": {"before": before, "after": resident()},
        "files": {
            "study": size(folder / "study.db"),
            "journal": size(folder / "journal.jsonl"),
            "tune": size(folder / "tune"),
        },
        **from_journal(folder / "journal.jsonl", began),
    }


def alone(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tune by itself: as many trials at a time with as many reports, drawn by nobody, judged and recorded by nobody."""
    import ray
    from ray import tune

    from raytune_lora.cluster import connect
    from raytune_lora.tuning.thrift import Fifo

    os.environ.update(connect.ENVIRONMENT)
    quiet: Any = {"include_dashboard": False, "log_to_driver": False}
    ray.init(address="local", num_cpus=args.concurrent, object_store_memory=128 * MIB, **quiet)
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        tune.with_resources(report_nothing, {"memory": 1}),
        tune_config=tune.TuneConfig(
            num_samples=args.trials, max_concurrent_trials=args.concurrent, reuse_actors=True, scheduler=Fifo()
        ),
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    began, cpu = time.time(), time.process_time()
    tuner.fit()
    found = {"seconds": time.time() - began, "cpu_seconds": time.process_time() - cpu}
    ray.shutdown()
    return found


def report_nothing(config: dict[str, Any]) -> None:
    """A trial of as many reports as a stopped one has in the middle."""
    from ray import tune

    for number in range(REPORTS // 2):
        tune.report({"samples_seen": number})


def from_journal(path: Path, began: float) -> dict[str, Any]:
    """How the trials ended, when the first of them began and ended, and milliseconds a trial in each tenth of them."""
    events = [json.loads(line) for line in path.read_text().splitlines()]
    ends = [event for event in events if event["event"] == "trial_ended"]
    counts: dict[str, int] = defaultdict(int)
    for event in ends:
        counts[event["status"]] += 1
    times = [event["time"] for event in ends]
    marks = [times[round(tenth * len(times) / TENTHS) - 1] if tenth else began for tenth in range(TENTHS + 1)]
    tenths = [1000 * (b - a) / (len(times) / TENTHS) for a, b in itertools.pairwise(marks)]
    return {"ended": dict(counts), "first_end": times[0] - began, "times": [t - began for t in times], "tenths": tenths}


# ------------------------------------------------------------------------------------------------------------ the parts


class Clock:
    """Seconds of each part, those of the parts inside it aside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._inside: list[float] = []  # seconds of the parts inside each open one

    @contextlib.contextmanager
    def measuring(self, part: str) -> Iterator[None]:
        self._inside.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[part] += took - self._inside.pop()
            self.calls[part] += 1
            if self._inside:
                self._inside[-1] += took

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, measured."""

        @functools.wraps(function)
        def measured(*arguments: Any, **options: Any) -> Any:
            with self.measuring(part):
                return function(*arguments, **options)

        return measured


@contextlib.contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Measure the sweep's parts."""
    import ray

    from raytune_lora.tuning import scheduler, search, storage, sweep, trials

    places: list[tuple[Any, str, str]] = [
        (search.StudySearcher, "suggest", "study: ask"),
        (search.StudySearcher, "__init__", "study: begin"),
        (sweep, "report", "study: report"),
        (sweep, "tell", "study: tell"),
        (storage.KeptStorage, "keep", "study: database"),
        (trials.Journal, "append", "journal: write"),
        (os, "fsync", "fsync"),  # of the journal; with storage=journal://… of the study too
        (trials.Record, "add", "journal: record"),
        (scheduler._Remembering, "on_trial_result", "ASHA"),
        (sweep._Recorder, "_end", "board"),  # but for what it tells the journal and the study
        (sweep._Recorder, "on_step_end", "recorder: each step of Tune"),
        (ray, "wait", "Tune: wait"),
    ]
    with contextlib.ExitStack() as patched:
        for owner, name, part in places:
            patched.enter_context(patch.object(owner, name, clock.around(part, getattr(owner, name))))
        yield


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


# ----------------------------------------------------------------------------------------------------------- the answer


def growth(found: dict[str, Any]) -> float:
    """What a trial of the last tenth costs, of what one does once all processes are up: from the second tenth's on."""
    tenths: list[float] = found["tenths"]
    return tenths[-1] / tenths[1]


def show(found: dict[str, Any], concurrent: int) -> None:
    trials, seconds = found["trials"], found["seconds"]
    steady = statistics.median(found["tenths"][1:])
    each, cpu = 1000 * seconds / trials, 1000 * found["cpu_seconds"] / trials
    print(f"\n{trials} trials, {concurrent} at once: {seconds:.1f} s, {each:.1f} ms a trial, {cpu:.1f} ms CPU")
    if other := found.get("alone"):
        each, cpu = (1000 * other[key] / trials for key in ("seconds", "cpu_seconds"))
        print(f"Tune alone: {other['seconds']:.1f} s, {each:.1f} ms a trial, {cpu:.1f} ms CPU")
    print(
        f"first end after {found['first_end']:.1f} s; {steady:.1f} ms a trial, the first tenth aside; {found['ended']}"
    )
    print("ms a trial in each tenth: " + " ".join(f"{tenth:.0f}" for tenth in found["tenths"]))
    print(f"\n{'driver':32}{'seconds':>9}{'share':>8}{'ms a trial':>12}{'calls':>9}")
    for part, spent in sorted(found["parts"].items(), key=lambda item: -item[1]):
        print(f"{part:32}{spent:9.2f}{spent / seconds:8.1%}{1000 * spent / trials:12.2f}{found['calls'][part]:9d}")
    memory, files = found["memory"], found["files"]
    print(f"\ndriver: {memory['before'] / MIB:.0f} MiB before, {memory['after'] / MIB:.0f} MiB after; ", end="")
    print(f"CPU {found['cpu_seconds']:.1f} s; " + ", ".join(f"{name} {n / MIB:.1f} MiB" for name, n in files.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the config")
    parser.add_argument("--trials", type=int, nargs="+", default=[1000])
    parser.add_argument("--concurrent", type=int, default=64)
    parser.add_argument("--limit", type=float, default=100.0, help="milliseconds a trial")
    parser.add_argument("--growth", type=float, default=1.5, help="of the time of a trial, from early ones to the last")
    parser.add_argument("--alone", action="store_true", help="measure Tune by itself too")
    parser.add_argument("--profile", type=Path, help="file for cProfile's numbers of the driver; it costs time itself")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    answers = []
    for trials in args.trials:
        with tempfile.TemporaryDirectory() as folder:
            one = argparse.Namespace(**{**vars(args), "trials": trials})
            answers.append(run(Path(folder), one) | ({"alone": alone(Path(folder), one)} if args.alone else {}))
        show(answers[-1], args.concurrent)
    each = {found["trials"]: 1000 * found["seconds"] / found["trials"] for found in answers}
    grown = {found["trials"]: growth(found) for found in answers}
    if len(each) > 1:  # one size to the next says more than tenths
        grown[max(each)] = max(grown[max(each)], each[max(each)] / each[min(each)])
    within = max(each.values()) < args.limit and max(grown.values()) <= args.growth
    worst = f"{max(each.values()):.0f} ms a trial, growing {max(grown.values()):.2f} times"
    print(f"\n{worst}: {'within' if within else 'ABOVE'} the limits of {args.limit:g} ms and {args.growth:g} times")
    if args.json:
        args.json.write_text(
            json.dumps({"concurrent": args.concurrent, "within": within, "runs": answers}, indent=1) + "\n"
        )
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
