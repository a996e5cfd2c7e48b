"""A sweep whose driver is killed (SIGKILL) again and again at random moments, and what each kill costs.

    python jobs/bench/kills.py --kills 10 --seed 0

The moments are drawn over the journal's events, so that each sitting gets somewhere on a fast machine and on a slow
one: after a few events, and then after a random part of the time between two of them. Nothing is waited for between a
kill and the next start. At the end the sweep is let through, and its journal is compared with what was asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOB = Path(__file__).resolve().parents[1] / "sweep.py"
SWEEP = (
    "experiment=tiny",
    "scheduler=none",
    "training.patience=null",
    "training.global_batch=8",
    "training.max_steps=60",
    "evaluation.every=80",
    "evaluation.loss_rows=8",
    "evaluation.generate_rows=0",
)
LIMIT = 300  # seconds of a sitting


@dataclass
class Kill:
    """One sitting that was killed."""

    seconds: float  # that it lasted
    to_first_event: float  # seconds from its start to its first event of a trial
    events: int  # of trials, in this sitting
    ended: int  # trials that had ended by then, in all sittings
    lost: float  # seconds of the trials that ran since their last checkpoints, or since they went on


def events(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of the journal that are about trials."""
    journal = folder / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    return [event for event in map(json.loads, lines) if event["event"].startswith("trial_")]


def running(folder: Path) -> dict[str, float]:
    """The trials that have not ended, and when each started or went on (Unix time)."""
    found: dict[str, float] = {}
    for event in events(folder):
        if event["event"] == "trial_started":
            found[event["trial_id"]] = event["time"]
        elif event["event"] == "trial_ended":
            found.pop(event["trial_id"], None)
    return found


def start(*overrides: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(JOB), *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_once(folder: Path, overrides: tuple[str, ...], draw: random.Random) -> Kill | None:
    """One sitting; None where it came to its end before its kill."""
    known, began, process = len(events(folder)), time.time(), start(*overrides)
    wanted, part, first = draw.randint(1, 6), draw.random(), 0.0
    while (new := len(events(folder)) - known) < wanted and process.poll() is None:
        first = first or (time.time() if new else 0.0)
        if time.time() - began > LIMIT:
            process.kill()
            raise SystemExit(f"a sitting got nowhere in {LIMIT} s")
        time.sleep(0.02)
    first = first or time.time()
    time.sleep(part * (time.time() - first) / max(1, new))
    if process.poll() is not None:
        return None
    process.kill()
    killed = time.time()
    process.wait()
    lost = 0.0
    for name, started in running(folder).items():
        saved = [m.stat().st_mtime for m in (folder / "trials" / name).glob("checkpoint-*/manifest.json")]
        if started > began:  # in this sitting
            lost += killed - max([started, *saved])
    sitting = events(folder)
    ended = sum(event["event"] == "trial_ended" for event in sitting)
    return Kill(killed - began, first - began, len(sitting) - known, ended, lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--concurrent", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of the sweep; a temporary one is deleted")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.output or Path(temporary) / "sweep"
        sizes = (f"search.trials={args.trials}", f"search.concurrent={args.concurrent}")
        overrides: tuple[str, ...] = (*SWEEP, *sizes, f"cache={temporary}/cache", f"output={folder}", *args.overrides)
        draw, kills = random.Random(args.seed), list[Kill]()
        while len(kills) < args.kills:
            kill = kill_once(folder, overrides, draw)
            if kill is None:
                break
            kills.append(kill)
            print(f"kill {len(kills)}: {kill}", file=sys.stderr)
            if (folder / "config.yaml").exists():
                overrides = (f"resume={folder}",)
        last = start(f"resume={folder}")
        _, err = last.communicate()
        print(json.dumps(summary(folder, kills, args.trials, last.returncode, err.decode()[-2000:]), indent=2))


def summary(folder: Path, kills: list[Kill], trials: int, status: int, said: str) -> dict[str, Any]:
    ends = [event["trial_id"] for event in events(folder) if event["event"] == "trial_ended"]
    results = json.loads((folder / "results.json").read_text()) if (folder / "results.json").exists() else {}
    known = [trial["trial_id"] for trial in results.get("trials", [])]
    fine = status == 0 and len(ends) == len(set(ends)) == len(known) == trials and results["state"] == "finished"
    if not fine:
        print(said, file=sys.stderr)
    return {
        "fine": fine,
        "kills": [asdict(kill) for kill in kills],
        "trials": {"asked for": trials, "ended": len(ends), "twice": len(ends) - len(set(ends)), "known": len(known)},
        "lost seconds a kill": sum(kill.lost for kill in kills) / max(1, len(kills)),
        "seconds to the first event": sum(kill.to_first_event for kill in kills) / max(1, len(kills)),
    }


if __name__ == "__main__":
    main()
