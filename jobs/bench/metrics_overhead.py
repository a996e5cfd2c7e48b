"""What Ray's metrics cost the training: ``python jobs/bench/metrics_overhead.py --json FILE``.

Two answers. The first is what counts: the CPU time of all that the tracker ``ray`` does, measured alone with Ray
running, as a share of a step: noting a step's numbers and handing them to the tracker's thread, once a step, and giving
them to Ray, twice an export interval. The second is the step itself with the tracker off and on, trial after trial in
one resident worker group: on a machine with other work its noise is larger than what is looked for, so its spread is
printed beside it. The exit status is 1 where the first is above ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from common import Case, Measured, run_ours, write_data
from train_overhead import MID_SIZE

from raytune_lora.config.compose import compose
from raytune_lora.config.schema import TrackingConfig
from raytune_lora.training.tracking import TrackedTrial, Trackers, tracker_class
from raytune_lora.training.tracking.gauges import Exporter, RayGauges
from raytune_lora.tuning.job import plain_run

NUMBERS = (
    *("samples_seen", "loss", "eval_loss", "learning_rate", "grad_norm", "step_seconds", "data_wait_seconds"),
    *("checkpoint_seconds", "tokens_per_second", "memory_bytes", "mfu"),
)  # of a step, all of them measured
OFF, ON = "default", "ray"  # of ``tracking``
SKIPPED = 2  # first steps of a trial


def reporting(steps: int = 20_000, readings: int = 2_000) -> dict[str, float]:
    """CPU seconds, all threads of the process together, of one step's numbers and of one giving to Ray.

    Args:
        steps: how many are noted, as fast as the tracker's thread takes them.
        readings: how often the numbers are given to Ray.
    """
    import ray
    from ray._raylet import Config  # type: ignore[attr-defined]  # compiled

    ray.init(address="local", num_cpus=1, object_store_memory=128 * 2**20, include_dashboard=False, log_to_driver=False)
    values = dict.fromkeys(NUMBERS, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        trial = TrackedTrial.of(plain_run(compose(["experiment=tiny"])), Path(folder))
        trackers = Trackers([tracker_class("ray")(TrackingConfig())], trial)
        began = time.process_time()
        for first in range(0, steps, 1000):
            for step in range(first, first + 1000):
                trackers.log(step, values)
            time.sleep(0.1)  # else the backlog fills
        trackers.close()
        a_step = (time.process_time() - began) / steps
        tracker = RayGauges(TrackingConfig())
        tracker.start(trial)
        tracker.log(1, values)
        exporter: Exporter = tracker._exporter
        exporter._show()
        began = time.process_time()
        for _ in range(readings):
            exporter._show()
        a_reading = (time.process_time() - began) / readings
        tracker.close()
    interval = Config.metrics_report_interval_ms() / 1000
    ray.shutdown()
    return {"step": a_step, "reading": a_reading, "readings_a_second": 2 / interval}


def share(cost: dict[str, float], step: float) -> float:
    """Of a step of that many seconds."""
    return cost["step"] / step + cost["reading"] * cost["readings_a_second"]


def trials(case: Case, pairs: int) -> list[tuple[Measured, Measured]]:
    """Pairs of trials, the tracker off and on, in one group and in turns; the group's first trial is left out."""
    kinds = [OFF, *(kind for n in range(pairs) for kind in ((OFF, ON) if n % 2 == 0 else (ON, OFF)))]
    runs = run_ours(replace(case, trials=[[f"tracking={kind}"] for kind in kinds]))
    found = []
    for n in range(pairs):
        one, other = runs[1 + 2 * n], runs[2 + 2 * n]
        found.append((one, other) if n % 2 == 0 else (other, one))
    return found


def step(run: Measured) -> float:
    """Median seconds of a trial's steps."""
    return statistics.median(run.step_times()[SKIPPED:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help=f"of the config, the model above all; else {' '.join(MID_SIZE)}")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--limit", type=float, default=0.005, help="most that the tracker may take of a step")
    parser.add_argument("--pairs", type=int, default=4, help="of trials, the tracker off and on")
    parser.add_argument("--steps", type=int, default=16)
    args = parser.parse_args()
    cost = reporting()
    with tempfile.TemporaryDirectory() as folder:
        case = Case(args.overrides or list(MID_SIZE), 128, args.steps, 8, 4, 1, 0, folder)
        write_data(case)
        found = trials(case, args.pairs)
    off = statistics.median(step(run) for run, _ in found)
    ratios = [step(on) / step(without) for without, on in found]
    cpu = [on.cpu[-1] - on.cpu[SKIPPED] for _, on in found], [run.cpu[-1] - run.cpu[SKIPPED] for run, _ in found]
    shares = {"measured": share(cost, off), "0.1": share(cost, 0.1)}  # by seconds of the step
    answer = {
        "cost": cost,
        "step_seconds": off,
        "shares": shares,
        "ratios": ratios,
        "cpu_ratios": [with_it / without for with_it, without in zip(*cpu, strict=True)],
        "limit": args.limit,
    }
    print(f"noting a step:   {cost['step'] * 1e6:8.1f} us of CPU, once a step")
    print(f"giving it to Ray:{cost['reading'] * 1e6:8.1f} us of CPU, {cost['readings_a_second']:g} times a second")
    print(f"of a step of {off:.3f} s: {shares['measured']:.4%}; of one of 0.1 s: {shares['0.1']:.4%}")
    print(f"step on / off:   {statistics.median(ratios):.4f}  ({min(ratios):.4f} to {max(ratios):.4f})")
    within = shares["measured"] <= args.limit
    print(f"{'within' if within else 'ABOVE'} the limit of {args.limit:.2%}")
    if args.json:
        args.json.write_text(json.dumps(answer, indent=2) + "\n")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
